"""What counts of a model's own settings when it writes: the ids that start and end a text, and those that may not stand in it.

How to decode is said by `kdfast.models.generate.Decoding` alone, whatever else a model's settings say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    ForcedBOSTokenLogitsProcessor,
    GenerationConfig,
    LogitsProcessor,
    NoBadWordsLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from kdfast.models.ensemble import Ensemble

#: What a configuration says of where and how the model is kept.
_ABOUT = ("transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id")
#: Which ids may be written at all.
_BANS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")


def members_of(model: Any) -> list[Any]:
    return list(model.members) if isinstance(model, Ensemble) else [model]


def end_ids(model: nn.Module, otherwise: int | None = None) -> list[int]:
    """The ids that end what a model writes: of its generation config, else of its config, else `otherwise`. What several write
    together ends where one of them would."""
    ends: list[int] = []
    for member in members_of(model):
        found = _said(member, "eos_token_id")
        if found is not None:
            ends += found if isinstance(found, list | tuple) else [int(found)]
    return list(dict.fromkeys(ends)) or ([] if otherwise is None else [otherwise])


def end_like(model: Any, end: int | None) -> None:
    """Has a model end what it writes with the id that ends the rows it learns, unless it does."""
    if end is None or end in end_ids(model):
        return
    for its in (model.config, getattr(model, "generation_config", None)):
        if its is not None:
            its.eos_token_id = end


def settings_of(model: Any) -> dict[str, Any]:
    """What beside its weights decides the text that a model writes: its dtype, and the settings of its own that count."""
    pair = model.config.is_encoder_decoder
    own = {name: _said(model, name, config=False) for name in (*_BANS, *(("forced_bos_token_id",) if pair else ()))}
    ids = {"start": start_of(model) if pair else None, "end": end_ids(model)}
    return {"dtype": str(next(model.parameters()).dtype).removeprefix("torch."), **ids, **own}


def config_of(model: Any) -> dict[str, Any]:
    """What of a model's configuration decides what it says beside its weights; nothing of a module without one."""
    config = getattr(model, "config", None)
    values = {} if config is None else config.to_dict()
    return {name: value for name, value in values.items() if name not in _ABOUT and not name.startswith("_")}


def _said(model: Any, name: str, config: bool = True) -> Any:
    """A setting of the generation config, else of the config."""
    found = getattr(getattr(model, "generation_config", None), name, None)
    return getattr(getattr(model, "config", None), name, None) if found is None and config else found


def start_of(member: Any) -> int:
    """What a decoder starts from."""
    for name in ("decoder_start_token_id", "bos_token_id"):
        found = _said(member, name)
        if found is not None:
            return int(found)
    raise ValueError("model: expected decoder_start_token_id or bos_token_id in its config, which starts what it writes")


def generation_config(lead: Any, decoding: Any, end: Sequence[int], room: int) -> GenerationConfig:
    """What `generate` is told of a `Decoding` with `room` for so many tokens: nothing of the model's own but ids."""
    pad = _said(lead, "pad_token_id")
    how: dict[str, Any] = {}
    if decoding.sample:
        how = {"temperature": decoding.temperature, "top_k": decoding.top_k or 0, "top_p": decoding.top_p}
    elif decoding.beams > 1:
        how = {"early_stopping": False, "length_penalty": decoding.length_penalty}
    return GenerationConfig(
        max_new_tokens=room, use_cache=True, do_sample=decoding.sample, num_return_sequences=decoding.count,
        num_beams=1 if decoding.sample else decoding.beams, eos_token_id=list(end) or None,
        pad_token_id=pad if pad is not None else (end[0] if end else 0),
        decoder_start_token_id=start_of(lead) if lead.config.is_encoder_decoder else None, **how,
    )  # fmt: skip


@contextlib.contextmanager
def configured(lead: Any, config: GenerationConfig) -> Iterator[None]:
    """What is None in a config that is given, `generate` takes from the model's: so that has to be the same one."""
    before, lead.generation_config = lead.generation_config, config
    try:
        yield
    finally:
        lead.generation_config = before


def bans_of(members: Sequence[Any], end: Sequence[int], start: int, device: torch.device) -> list[LogitsProcessor]:
    """What takes out the ids that one of the members may not write; the first one that forces an id to begin with does.

    start: the length of what stands before a text, of which an id is forced behind a decoder's start alone.
    """
    bans: list[LogitsProcessor] = []
    pairs = [member for member in members if member.config.is_encoder_decoder]
    said = [_said(member, "forced_bos_token_id", config=False) for member in pairs]
    forced = next((found for found in said if found is not None), None)
    for member in members:
        words, never, at_first = (_said(member, name, config=False) for name in _BANS)
        bans += [NoBadWordsLogitsProcessor(words, list(end) or None)] if words else []
        bans += [SuppressTokensLogitsProcessor(never, str(device))] if never else []
        begin = start + 1 if forced is not None else start
        bans += [SuppressTokensAtBeginLogitsProcessor(at_first, begin, str(device))] if at_first else []
    return bans if forced is None else [*bans, ForcedBOSTokenLogitsProcessor(forced)]
