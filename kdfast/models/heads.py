"""The linear head a model ends in: found, checked against the model's own logits, and stepped around.

A loss through a head needs what enters the head, not what leaves it. `LinearHead.entered` runs a model with its head
standing aside, so that no logits are formed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.options import Head


@dataclass(frozen=True)
class LinearHead:
    """logits = form(hidden @ weight.T + bias), with hidden what enters `module`.

    Args:
        module: the linear layer. form: cap and factor after it.
        biased_by: the model, where it adds a buffer `final_logits_bias` `[1, V]` after its head, as BART and Marian do.
    """

    module: nn.Linear
    form: Head = Head()
    biased_by: nn.Module | None = None
    #: One for all calls: a compiled model is compiled again for each object it has not met.
    _stand_in: _StandIn = field(default_factory=lambda: _StandIn(), init=False, repr=False, compare=False)

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        own: Tensor | None = self.module.bias
        if self.biased_by is None:
            return own
        added: Tensor = self.biased_by.final_logits_bias[0]  # type: ignore[index]
        return added if own is None else own + added

    @contextlib.contextmanager
    def entered(self) -> Iterator[_Entrance]:
        """Within the block the head passes its input through; after it `.hidden` of what this yields is the last one.

        with head.entered() as entrance:
            model(input_ids)                       # its `.logits` mean nothing here
        logits = entrance.hidden @ head.weight.T   # + bias, then form
        """
        entrance = _Entrance()
        self.module.forward = self._stand_in  # type: ignore[method-assign,assignment]
        added = None
        if self.biased_by is not None:
            added = self.biased_by.final_logits_bias
            self.biased_by.final_logits_bias = added.new_zeros(1, 1)  # type: ignore[operator]
        try:
            yield entrance
        finally:
            del self.module.forward
            entrance.hidden, self._stand_in.hidden = self._stand_in.hidden, None
            if self.biased_by is not None:
                self.biased_by.final_logits_bias = added  # type: ignore[assignment]

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., V]`, formed whole."""
        z = nn.functional.linear(hidden, self.weight, self.bias)
        if self.form.scale != 1:
            z = z * self.form.scale
        return z if self.form.softcap is None else self.form.softcap * torch.tanh(z / self.form.softcap)


class _Entrance:
    """What entered a head, known after the block."""

    hidden: Any = None


class _StandIn:
    """Stands in for the forward of a head."""

    hidden: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return hidden


@torch.no_grad()
def find_head(model: nn.Module, example: Mapping[str, Tensor]) -> LinearHead | None:
    """The head of `model`, or None where its logits are not form(linear(hidden)) of one plain layer.

    A `transformers` model names its head (`get_output_embeddings`) and its config the form; of any other module it is the
    linear layer whose output the module returns. Either way the candidate is run on `example` and has to give the model's
    logits.

    Args:
        model: called as `model(**example)`, returning logits `[..., V]` or an output with `.logits`.
        example: a small batch of the model's inputs, on its device.
    """
    was_training = model.training
    model.eval()
    try:
        candidate = _named(model) or _returned(model, example)
        return candidate if candidate is not None and _gives(candidate, model, example) else None
    finally:
        model.train(was_training)


def call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """`model(**inputs)`; a `transformers` model keeps no cache of keys, any other gets its first input by position."""
    if hasattr(model, "get_output_embeddings"):
        extra = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
        return model(**inputs, **extra)
    first, *others = inputs
    return model(inputs[first], **{name: inputs[name] for name in others})


def logits_in(output: Any) -> Tensor:
    """The logits a model returned, as they are or in an output."""
    return output if isinstance(output, Tensor) else output.logits


def _named(model: nn.Module) -> LinearHead | None:
    find = getattr(model, "get_output_embeddings", None)
    module = find() if find is not None else None
    if not _plain_linear(module):
        return None
    # The module that has the buffer itself: an adapter's wrapper shows it too, and setting it there changes nothing.
    biased_by = next((m for m in model.modules() if m._buffers.get("final_logits_bias") is not None), None)
    return LinearHead(module, head_form(model.config), biased_by)  # type: ignore[arg-type]


def head_form(config: Any) -> Head:
    """What a `transformers` config says happens to logits after the head: Gemma's cap, Cohere's factor, Granite's divisor."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap, scale = getattr(text, "final_logit_softcapping", None), getattr(text, "logit_scale", None)
    divisor = getattr(text, "logits_scaling", None)
    return Head(softcap=softcap, scale=float(scale or 1.0) / float(divisor or 1.0))


def _returned(model: nn.Module, example: Mapping[str, Tensor]) -> LinearHead | None:
    """The linear layer whose output is what the module returns."""
    seen: list[tuple[nn.Module, Tensor]] = []
    watched = [m for m in model.modules() if _plain_linear(m)]
    handles = [m.register_forward_hook(lambda m, _, out: seen.append((m, out))) for m in watched]
    try:
        logits = logits_in(call(model, example))
    finally:
        for handle in handles:
            handle.remove()
    module = next((m for m, out in reversed(seen) if out is logits or _same_memory(out, logits)), None)
    return None if module is None else LinearHead(module)  # type: ignore[arg-type]


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _plain_linear(module: Any) -> bool:
    """A layer whose weight is all there is to it: no adapter, no quantised weight."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and module.weight.is_floating_point()


def _gives(head: LinearHead, model: nn.Module, example: Mapping[str, Tensor]) -> bool:
    want = logits_in(call(model, example)).float()
    with head.entered() as entrance:
        call(model, example)
    hidden = entrance.hidden
    if hidden is None:
        return False
    got = head.logits(hidden).float()
    allowed = 4 * torch.finfo(head.weight.dtype).eps * max(float(want.abs().max()), 1.0)
    return got.shape == want.shape and bool(((got - want).abs() <= allowed).all())
