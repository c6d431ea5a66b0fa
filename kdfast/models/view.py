"""What a method looks at in a model, taken out of one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from kdfast.integrations.transformers import QueryKey, capture_attention
from kdfast.models.heads import LinearHead, call, logits_in


@dataclass(frozen=True)
class Needs:
    """What to take out of a model beside its head or logits.

    Args:
        layers: hidden states after these layers; 0 is the embedding's output, -1 the last layer's.
        attention: queries and keys of these layers' self-attention, from 0; negative numbers count from the end.
        output: the model's own output, for what stands in it by name (`pooler_output`, a decoder's states).
    """

    layers: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    output: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            tuple(sorted({*self.layers, *other.layers})),
            tuple(sorted({*self.attention, *other.attention})),
            self.output or other.output,
        )


#: A head or logits, and nothing else.
NOTHING = Needs()


@dataclass
class View:
    """One model on one batch, as far as a method asked.

    Args:
        hidden, head: `[..., D]` and the head it enters, where it is named: logits = head.logits(hidden), not formed.
        own_logits: the model's logits where no head can be named.
        layers: layer -> hidden states `[B, L, D]`. attention: layer -> its queries and keys. output: the model's output.
        auxiliary: what the model adds to any loss by itself (balance of a mixture of experts), weighted, or None.
        targets: of a cached teacher, in the place of everything else.
    """

    hidden: Tensor | None = None
    head: LinearHead | None = None
    own_logits: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, QueryKey] = field(default_factory=dict)
    output: Any = None
    auxiliary: Tensor | None = None
    targets: Any = None

    @property
    def logits(self) -> Tensor:
        """`[..., V]`, formed whole: for a method that cannot do without."""
        if self.own_logits is not None:
            return self.own_logits
        if self.head is None or self.hidden is None:
            raise ValueError("view.logits: expected a live model's view, got cached targets; use view.targets")
        return self.head.logits(self.hidden)


def look(model: nn.Module, inputs: Mapping[str, Tensor], needs: Needs = NOTHING, head: LinearHead | None = None) -> View:
    """Runs `model(**inputs)` once and takes out what `needs` names; through `head` no logits are formed."""
    asked: dict[str, Any] = {**taken(model, inputs), **({"output_hidden_states": True} if needs.layers else {})}
    with contextlib.ExitStack() as stack:
        entrance = None if head is None else stack.enter_context(head.entered())
        watched = stack.enter_context(capture_attention(model, kinds=("self",))) if needs.attention else None
        output = call(model, asked)
        calls = [] if watched is None else watched.take()
    view = View(head=head, auxiliary=_auxiliary(model, output), output=output if needs.output else None)
    if entrance is None:
        view.own_logits = logits_in(output)
    else:
        view.hidden = entrance.hidden
    if needs.layers:
        states = output.hidden_states
        view.layers = {i: states[i] for i in needs.layers}
    view.attention = {i: calls[i] for i in needs.attention}
    return view


def taken(model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The inputs without the types of tokens where a `transformers` model has no embedding for them.

    Two models of one batch may differ in that; some take the argument for something else, or fail on it.
    """
    config = getattr(model, "config", None)
    if "token_type_ids" not in inputs or config is None or getattr(config, "type_vocab_size", 0) > 1:
        return inputs
    return {name: value for name, value in inputs.items() if name != "token_type_ids"}


def _auxiliary(model: nn.Module, output: Any) -> Tensor | None:
    loss = getattr(output, "aux_loss", None)
    coefficient = getattr(getattr(model, "config", None), "router_aux_loss_coef", None)
    return None if loss is None or not isinstance(loss, Tensor) or coefficient is None else coefficient * loss
