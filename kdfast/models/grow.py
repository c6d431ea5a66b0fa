"""A larger model that begins as a smaller one: its weights put into the larger's, the rest so that nothing else is heard.

New neurons, heads and channels keep their random weights, and what would read from them begins at zero (Net2Net, Chen et al.
2016, arXiv 1511.05641, without copies of neurons, which would learn the same; bert2BERT, Chen et al. 2022, arXiv 2110.07143).
A new layer is a copy of the one before it whose outputs are zero, an identity behind its residual sum (LLaMA Pro, Wu et al.
2024, arXiv 2401.02415).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kdfast.models.heads import call, logits_in
from kdfast.models.load import load_folder, load_weights, read_config, tied, weight_files
from kdfast.models.shrink import _DECODER_DEPTH, _DEPTH, _HEADS, _WIDTH, _name_of_first, _stacks
from kdfast.tensors import reading_tensors

#: Root-mean-square norms before each block: wider and deeper without a change of what the model says.
_ANY_WIDTH = ("llama", "mistral", "qwen2", "qwen3", "t5")
#: Layer norms before each block: deeper without a change; wider, mean and variance would be others.
_PRE_NORM = ("gpt2",)
#: A norm after each residual sum: a layer that adds nothing is still no identity, so layers are copied whole.
_POST_NORM = ("bart", "bert", "distilbert", "marian", "mbart", "roberta")

#: What adds to the residual stream.
_WRITERS = re.compile(r"\.(o_proj|down_proj|SelfAttention\.o|EncDecAttention\.o|wo|c_proj)\.(weight|bias)$")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|shared)\.weight$")
_FINAL_NORMS = ("model.norm.weight", "decoder.final_layer_norm.weight")
#: What lies along each dimension of a weight: the residual stream (R), inner neurons (I), channels of query heads (Q), of key
#: heads (K), whole heads (N); what must be equal (=).
_AXES = (
    (r"(embed_tokens|shared|lm_head)\.weight$", "=R"),
    (r"(q_proj|Attention\.q)\.weight$", "QR"), (r"([kv]_proj|Attention\.[kv])\.weight$", "KR"),
    (r"q_proj\.bias$", "Q"), (r"[kv]_proj\.bias$", "K"), (r"(o_proj|Attention\.o)\.weight$", "RQ"),
    (r"(gate_proj|up_proj|wi|wi_0|wi_1)\.weight$", "IR"), (r"(gate_proj|up_proj)\.bias$", "I"),
    (r"(down_proj|wo)\.weight$", "RI"), (r"(o_proj|down_proj)\.bias$", "R"),
    (r"relative_attention_bias\.weight$", "=N"), (r"[qk]_norm\.weight$", "="), (r"norm\.weight$", "R"),
)  # fmt: skip
#: What a configuration says that changes nothing a model computes in evaluation.
_BESIDE = re.compile(
    r"drop|_token_id|dtype|version|architectures|_name_or_path|use_cache|2(id|label)|num_labels|problem_type|initializer|init_std"
    r"|finetuning_task|task_specific|transformers"
)
#: Blocks of rows, one for each gate.
_GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


def start_from(
    student: nn.Module, path: str | Path, key: str, *, kind: str, example: Mapping[str, Tensor] | None = None
) -> str | None:
    """Puts the weights in `path` into `student`; where they are those of a smaller model, `student` grows out of it.

    Args:
        path: a folder or a safetensors file. key: what an error calls it. kind: of model, for `load_folder`.
        example: inputs on which both models are compared.

    Returns:
        A line about what grew, None where the weights fit as they are.

    Raises:
        ValueError: they do not fit and the student is no larger model of the same kind.
    """
    shapes = _shapes(path, key)
    own = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    fits = all(own.get(name) == shape for name, shape in shapes.items())
    config: Any = getattr(student, "config", None)
    deeper = config is not None and any(_depth(shapes, stack) != len(layers) for stack, layers in _stacks(student).items())
    described = (Path(path) / "config.json").is_file()
    repeated = tied(student)
    lacking = own.keys() - shapes.keys() - repeated.keys() - set(repeated.values())
    if fits and not deeper and not (lacking and described and config is not None):
        load_weights(student, path, key)
        return _other_settings(config, path, key) if config is not None and described else None
    if config is None or not described:
        return _grow_module(student, path, shapes, key)
    small: Any = load_folder(path, key, kind=kind, missing=[])
    if small.config.model_type != config.model_type:
        raise ValueError(f"{key}: expected a model of type {config.model_type} as the student, got {small.config.model_type}")
    if config.model_type not in (*_ANY_WIDTH, *_PRE_NORM, *_POST_NORM):
        known = ", ".join(sorted((*_ANY_WIDTH, *_PRE_NORM, *_POST_NORM)))
        raise ValueError(
            f"{key}: expected weights of the student's size; a larger student can be of type {known}, got {config.model_type}"
        )
    grow(student, small, key)
    grown = _sizes(small, student)
    if example is None:
        return f"{key}: {grown}"
    gap = difference(student, small, example)
    return f"{key}: {grown}; logits as before to {gap:.1e} of the largest" + ("" if gap < 1e-3 else ": another function")


@torch.no_grad()
def grow(student: nn.Module, small: nn.Module, key: str = "init_from") -> None:
    """Puts the weights of `small` into `student`, a `transformers` model of the same type with no size smaller.

    Layers are spread evenly: layer j of M comes from layer j * N // M of the smaller model's N, the first of a run as it is,
    the others with their outputs zero. Logits stay what they were, to rounding:

    - Llama, Mistral, Qwen2, Qwen3, T5: of any width, inner size, number of heads (each of the size it has) and layers. The
      stream is scaled by sqrt(D / d) so that its root mean square, epsilon included, is that of the narrow one.
    - GPT-2: of any inner size and number of layers.
    - BERT, RoBERTa, DistilBERT, BART, Marian, mBART: of any inner size. New layers are whole copies, after which the model is
      another one: nothing that a layer with a norm after its sum could do would leave its input alone.

    Raises:
        ValueError: a size that is smaller than in `small`, or that cannot grow for this type; names `key`.
    """
    config: Any = student.config
    _check(small.config, config, key)
    source, repeated, layers = small.state_dict(), tied(student), _layers(student, small, key)
    scale = (_width(config) / _width(small.config)) ** 0.5
    rooms = _rooms(small.config, config, key) if config.model_type in _ANY_WIDTH else None
    modules = dict(student.named_modules())
    anew = set(getattr(student, "_keys_to_ignore_on_save", None) or ()) - set(repeated)
    for name, target in student.state_dict().items():
        if name in repeated or name in anew:
            continue
        theirs, fresh = _source_of(name, layers)
        weight = source[_name_of_first(theirs, source)]
        if fresh and config.model_type not in _POST_NORM and _WRITERS.search(name):
            target.zero_()
        elif rooms is not None:
            target.copy_(_roomy(name, target, weight.float(), rooms, scale, config, key))
        else:
            owner = modules[name.rpartition(".")[0]]
            target.copy_(_padded(name, target, weight, owner, name in repeated.values(), key))
    student.tie_weights()  # type: ignore[operator]


@torch.no_grad()
def difference(student: nn.Module, small: nn.Module, example: Mapping[str, Tensor]) -> float:
    """The largest difference of their logits on `example`, as a share of the largest logit."""
    found = []
    for model in (student, small):
        was_training = model.training
        found.append(logits_in(call(model.eval(), example)).float())
        model.train(was_training)
    return float((found[0] - found[1]).abs().max() / found[1].abs().max().clamp(min=1e-30))


def _other_settings(config: Any, path: str | Path, key: str) -> str | None:
    """A line about what the weights, which fit, were trained with and the student has not: bases of angles, kinds of norms."""
    theirs, its = read_config(Path(path)), config.to_dict()
    differs = [f"{name} {theirs[name]!r}, here {its[name]!r}" for name in theirs.keys() & its.keys()
               if theirs[name] != its[name] and not _BESIDE.search(name)]  # fmt: skip
    return f"{key}: {path} was trained with {'; '.join(sorted(differs))}: another function" if differs else None


def _grow_module(student: nn.Module, path: str | Path, shapes: Mapping[str, tuple[int, ...]], key: str) -> str:
    """A plain module: each weight of the same name takes the leading entries, and what read them reads zeros beside them."""
    own = student.state_dict()
    missing = [name for name in own if name not in shapes and name not in tied(student)]
    if missing or not all(
        name in own and len(shape) == own[name].ndim and all(a <= b for a, b in zip(shape, own[name].shape, strict=True))
        for name, shape in shapes.items()
    ):
        load_weights(student, path, key)  # which says what does not fit
        raise AssertionError(f"{key}: {path} fits after all")
    modules, repeated, grown = dict(student.named_modules()), tied(student), []
    norms = False
    with torch.no_grad():
        for name, target in own.items():
            if name not in shapes:
                continue
            owner = modules[name.rpartition(".")[0]]
            weight = _tensor(path, key, name)
            if weight.shape != target.shape:
                grown.append(name)
                norms = norms or isinstance(owner, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)
            target.copy_(_padded(name, target, weight, owner, name in repeated.values(), key))
    said = f"{key}: {len(grown)} of {len(shapes)} tensors grew: {', '.join(grown[:4])}{', ...' if len(grown) > 4 else ''}"
    return f"{said}; a norm over more channels makes another function of it" if norms else said


def _padded(name: str, own: Tensor, weight: Tensor, owner: nn.Module, is_tied: bool, key: str) -> Tensor:
    """`own` with `weight` in its leading entries, and zeros where the old outputs would read from new inputs."""
    if own.shape == weight.shape:
        return weight
    if own.ndim != weight.ndim or any(a > b for a, b in zip(weight.shape, own.shape, strict=True)):
        raise ValueError(f"{key}: {name} is {list(weight.shape)} there, expected at most the student's {list(own.shape)}")
    out, kind = own.clone(), type(owner)
    if own.ndim == 1 and kind not in _GATES:
        out[: len(weight)] = weight
        return out
    gates = _GATES.get(kind, 1) if not name.rpartition(".")[2].startswith("weight_hr") else 1
    plain = isinstance(owner, nn.Linear | nn.Embedding) or kind in _GATES or kind.__name__ == "Conv1D"
    if not plain and not (isinstance(owner, nn.modules.conv._ConvNd) and owner.groups == 1 and not owner.transposed):
        raise ValueError(
            f"{key}: {name} is {list(weight.shape)} there, {list(own.shape)} in the student, and how a {kind.__name__} grows is"
            " not known; linear, embedding, convolution and recurrent layers grow"
        )
    # A table that is also a head is read along its last dimension; `Conv1D` of transformers keeps its inputs first.
    inputs = None if isinstance(owner, nn.Embedding) and not is_tied else 0 if kind.__name__ == "Conv1D" else 1
    for block, part in zip(out.chunk(gates), weight.chunk(gates), strict=True):
        leading = [slice(0, n) for n in part.shape]
        if inputs is not None and own.ndim > 1:
            heard = list(leading)
            heard[inputs] = slice(part.shape[inputs], None)
            block[tuple(heard)] = 0
        block[tuple(leading)] = part
    return out


def _roomy(name: str, own: Tensor, weight: Tensor, rooms: Mapping[str, Tensor], scale: float, config: Any, key: str) -> Tensor:
    """The weight of a model with root-mean-square norms, in the place that it has in the larger model."""
    axes = next((axes for pattern, axes in _AXES if re.search(pattern, name)), None)
    if axes is None:
        raise ValueError(f"{key}: what {name} is in a model of type {config.model_type} is not known")
    out = own.float().clone()
    if _EMBEDDINGS.search(name) or _WRITERS.search(name):
        out.zero_()
        weight = weight * scale
    elif name in _FINAL_NORMS:
        # The head is tied to the scaled embedding, or not; T5 divides what enters it by the root of its width.
        head = scale if config.tie_word_embeddings else 1.0
        weight = weight / (scale * head / (scale if getattr(config, "scale_decoder_outputs", False) else 1.0))
    elif axes == "R":
        weight = weight / scale
    # One index for each dimension, broadcast against the others.
    index = [rooms.get(axis, torch.arange(size)) for axis, size in zip(axes, weight.shape, strict=True)]
    out[torch.meshgrid(*index, indexing="ij")] = weight
    return out


def _rooms(small: Any, large: Any, key: str) -> dict[str, Tensor]:
    """Where the entries of the smaller model lie along each kind of dimension of the larger."""
    size, heads = _head_size(small), _first(small, _HEADS)
    groups, more_groups = _groups(small), _groups(large)
    each, more_each = heads // groups, _first(large, _HEADS) // more_groups
    if _head_size(large) != size:
        raise ValueError(
            f"{key}: expected heads of size {size} as in the smaller model, got {_head_size(large)} in the student"
        )
    if more_groups < groups or more_each < each:
        raise ValueError(
            f"{key}: expected at least {groups} key heads, each for at least {each} query heads, got {more_groups} and"
            f" {more_each} in the student"
        )

    def channels(numbers: Tensor) -> Tensor:
        return (numbers[:, None] * size + torch.arange(size)).flatten()

    own = torch.arange(groups)
    query = (own[:, None] * more_each + torch.arange(each)).flatten()
    return {"Q": channels(query), "K": channels(own), "N": query}


def _check(small: Any, large: Any, key: str) -> None:
    """Raises where a size is not what it has to be."""
    if small.vocab_size != large.vocab_size:
        raise ValueError(f"{key}: expected vocab_size {small.vocab_size} as in the smaller model, got {large.vocab_size}")
    narrow, wide = _width(small), _width(large)
    if wide < narrow or (wide != narrow and large.model_type not in _ANY_WIDTH):
        expected = (
            f"at least {narrow}" if large.model_type in _ANY_WIDTH else f"{narrow}, as its layer norms are over all of it"
        )
        raise ValueError(f"{key}: expected a student whose width is {expected}, got {wide}")
    if large.model_type not in _ANY_WIDTH and _first(small, _HEADS) != _first(large, _HEADS):
        raise ValueError(f"{key}: expected {_first(small, _HEADS)} heads as in the smaller model, got {_first(large, _HEADS)}")
    if large.tie_word_embeddings and not small.tie_word_embeddings:
        raise ValueError(f"{key}: expected tie_word_embeddings false as in the smaller model, got true")


def _layers(student: nn.Module, small: nn.Module, key: str) -> dict[str, list[int]]:
    """Stack -> for each of its layers the smaller model's."""
    found, theirs = {}, _stacks(small)
    for stack, own in _stacks(student).items():
        few, many = len(theirs.get(stack, ())), len(own)
        if not few or few > many:
            raise ValueError(f"{key}: expected at most {many} layers in {stack}, as the student has, got {few}")
        found[stack] = [j * few // many for j in range(many)]
    return found


def _source_of(name: str, layers: Mapping[str, list[int]]) -> tuple[str, bool]:
    """The name in the smaller model, and whether the layer is a further one made from it."""
    for stack, chosen in layers.items():
        match = re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.*)", name)
        if match:
            j = int(match[1])
            return f"{stack}.{chosen[j]}.{match[2]}", j > 0 and chosen[j] == chosen[j - 1]
    return name, False


def _sizes(small: nn.Module, student: nn.Module) -> str:
    """What of the sizes is larger, in words."""
    words = [("layers", _DEPTH), ("decoder layers", _DECODER_DEPTH), ("width", _WIDTH), ("heads", _HEADS)]
    pairs = [(word, _first(small.config, names), _first(student.config, names)) for word, names in words]
    grown = [f"{word} {a} to {b}" for word, a, b in pairs if a != b]
    parameters = [sum(p.numel() for p in model.parameters()) for model in (small, student)]
    return f"grown from a smaller model ({', '.join([*grown, f'parameters {parameters[0]:,} to {parameters[1]:,}'])})"


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def _width(config: Any) -> int:
    return int(_first(config, _WIDTH))


def _groups(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or _first(config, _HEADS))


def _head_size(config: Any) -> int:
    return int(_first(config, ("head_dim", "d_kv")) or _width(config) // _first(config, _HEADS))


def _depth(names: Mapping[str, Any], stack: str) -> int:
    found = [re.match(rf"{re.escape(stack)}\.(\d+)\.", name) for name in names]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _shapes(path: str | Path, key: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path, key):
        with reading_tensors(f"{key}: {file}"), safe_open(str(file), "pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found


def _tensor(path: str | Path, key: str, name: str) -> Tensor:
    for file in weight_files(path, key):
        with safe_open(str(file), "pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                found: Tensor = opened.get_tensor(name)
                return found
    raise AssertionError(name)
