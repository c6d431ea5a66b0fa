"""Text that models write: beam search and sampling by transformers' `generate`, one model or several as an ensemble."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from kdfast.models.ensemble import Ensemble, mean_logits
from kdfast.models.heads import call, logits_in
from kdfast.models.load import quiet

#: What a model's own settings say about how to decode: left out, so that the options alone decide. Which ids may be written
#: at all (`forced_bos_token_id`, `bad_words_ids`, `suppress_tokens`) stays.
_SILENCED = {
    "max_length": None, "min_length": 0, "forced_eos_token_id": None, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0, "penalty_alpha": None, "num_beam_groups": None, "diversity_penalty": None,
    "typical_p": None, "epsilon_cutoff": None, "eta_cutoff": None, "min_p": None, "max_time": None,
    "cache_implementation": None, "output_scores": False, "return_dict_in_generate": False,
}  # fmt: skip


@dataclass(frozen=True)
class Decoding:
    """How hypotheses are found.

    Args:
        beams: width of the beam; 1: greedy. count: hypotheses of each source, at most `beams` unless sampled.
        max_tokens: most tokens of one, its end among them, as far as the model has positions.
        length_penalty: a beam's score is log P / length ** length_penalty.
        sample: draw them, at `temperature` from the `top_k` likeliest ids (0: all) that hold the mass `top_p`.
    """

    beams: int = 5
    count: int = 1
    max_tokens: int = 64
    length_penalty: float = 1.0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Hypothesis(NamedTuple):
    """ids: int64, without start and padding, the end among them where it was written. score: log P(ids | source), summed."""

    ids: Tensor
    score: float


def end_ids(model: nn.Module, otherwise: int | None = None) -> list[int]:
    """The ids that end what a model writes: of its generation config, else of its config, else `otherwise`."""
    lead = model.members[0] if isinstance(model, Ensemble) else model
    for said in (getattr(lead, "generation_config", None), getattr(lead, "config", None)):
        found = getattr(said, "eos_token_id", None)
        if found is not None:
            return list(found) if isinstance(found, list | tuple) else [int(found)]
    return [] if otherwise is None else [otherwise]


@torch.no_grad()
def write(
    model: nn.Module, inputs: Mapping[str, Tensor], decoding: Decoding, end: Sequence[int], *, scores: bool = True
) -> list[list[Hypothesis]]:
    """Hypotheses of each row of a batch, the best first. Equals, for one model,

        model.generate(**inputs, num_beams=beams, num_return_sequences=count, max_new_tokens=max_tokens, ...)

    and for an `Ensemble` the same with the mean of the members' probabilities at each step.

    Args:
        model: of `transformers`, in evaluation mode; an encoder-decoder, or causal with prompts padded on the left.
        inputs: `input_ids` and, where there is padding, `attention_mask`.
        end: ids that end a hypothesis.
        scores: whether to score them, by one pass over all that was written; otherwise their score is 0.

    Raises:
        ValueError: a model cannot write.
    """
    members = list(model.members) if isinstance(model, Ensemble) else [model]
    weights = model.weights if isinstance(model, Ensemble) else [1.0]
    for member in members:
        if not hasattr(member, "generate"):
            raise ValueError(f"model: expected a transformers model, which can write text, got {type(member).__name__}")
    lead: Any = members[0]
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    config = _settings(lead, decoding, end, min(_room(member, ids.shape[1]) for member in members))
    processors = LogitsProcessorList()
    if len(members) > 1:
        processors.append(_Together(members[1:], weights, ids, mask, config))
    with quiet(), _configured(lead, config):
        written = lead.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors)
    start = 1 if lead.config.is_encoder_decoder else ids.shape[1]
    found = [_cut(row, end) for row in written[:, start:]]
    values = _scored(members, weights, ids, mask, found, decoding.count) if scores else [0.0] * len(found)
    grouped = [list(map(Hypothesis, found[i : i + decoding.count], values[i : i + decoding.count]))
               for i in range(0, len(found), decoding.count)]  # fmt: skip
    return [sorted(group, key=lambda h: -h.score) if decoding.sample else group for group in grouped]


def _room(member: Any, prompt: int) -> float:
    """Tokens for which the model has positions."""
    most = getattr(member.config, "max_position_embeddings", None)
    if most is None:
        return math.inf
    return int(most) if member.config.is_encoder_decoder else max(int(most) - prompt, 1)


def _settings(lead: Any, decoding: Decoding, end: Sequence[int], room: float) -> GenerationConfig:
    config = copy.deepcopy(lead.generation_config)
    pad = config.pad_token_id if config.pad_token_id is not None else lead.config.pad_token_id
    start = config.decoder_start_token_id
    for name, value in _SILENCED.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.max_new_tokens, config.use_cache = int(min(decoding.max_tokens, room)), True
    config.eos_token_id = list(end) or None
    config.pad_token_id = pad if pad is not None else (end[0] if end else 0)
    config.decoder_start_token_id = start if start is not None else getattr(lead.config, "decoder_start_token_id", None)
    config.do_sample, config.num_return_sequences = decoding.sample, decoding.count
    config.num_beams = 1 if decoding.sample else decoding.beams
    config.early_stopping, config.length_penalty = False, decoding.length_penalty
    config.temperature = decoding.temperature if decoding.sample else None
    config.top_k = (decoding.top_k or 0) if decoding.sample else None
    config.top_p = decoding.top_p if decoding.sample else None
    if config.num_beams == 1:
        config.early_stopping = config.length_penalty = None
    return config


@contextlib.contextmanager
def _configured(lead: Any, config: GenerationConfig) -> Iterator[None]:
    """What is None in a config that is given, `generate` takes from the model's: so that has to be the same one."""
    before, lead.generation_config = lead.generation_config, config
    try:
        yield
    finally:
        lead.generation_config = before


def _cut(row: Tensor, end: Sequence[int]) -> Tensor:
    """Up to the first end, which stays."""
    ends = torch.isin(row, torch.tensor(end, device=row.device, dtype=row.dtype)).nonzero() if end else row.new_zeros(0, 1)
    return row[: int(ends[0]) + 1].cpu() if len(ends) else row.cpu()


class _Together(LogitsProcessor):
    """Mixes the other members' probabilities into the lead's at each step, each member with its own cache of keys and values.

    `generate` reorders the lead's cache as beams come and go; where a beam came from shows in its prefix, so the others follow
    by looking for it among the prefixes of the step before.
    """

    def __init__(self, others: Sequence[nn.Module], weights: Sequence[float], ids: Tensor, mask: Tensor, config: Any) -> None:
        self._others, self._weights = list(others), list(weights)
        self._copies = max(config.num_beams, config.num_return_sequences)
        self._mask = mask.repeat_interleave(self._copies, 0)
        self._encoded = [_encoded(member, ids, mask) for member in others]
        for encoded in self._encoded:
            if encoded is not None:
                encoded.last_hidden_state = encoded.last_hidden_state.repeat_interleave(self._copies, 0)
        self._caches = [_cache(member) for member in others]
        self._seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids if self._seen is None else input_ids[:, self._seen.shape[1] :]
        if self._seen is not None:
            origin = self._origin(input_ids)
            for cache in self._caches:
                cache.reorder_cache(origin)
        self._seen = input_ids
        own = [self._step(i, input_ids, new) for i in range(len(self._others))]
        mixed = mean_logits([scores, *own], self._weights).to(scores.dtype)
        return mixed.masked_fill(scores == -torch.inf, -torch.inf)  # what may not be written

    def _origin(self, input_ids: Tensor) -> Tensor:
        """For each row the row of the step before, of the same source, whose text it goes on with."""
        assert self._seen is not None
        before = self._seen.view(-1, self._copies, self._seen.shape[1])
        now = input_ids[:, : self._seen.shape[1]].view_as(before)
        same = (now[:, :, None] == before[:, None]).all(-1)
        own = torch.eye(self._copies, dtype=torch.bool, device=same.device) & same
        place = (same.int() + own.int()).argmax(-1)  # itself where that is possible
        first = torch.arange(len(place), device=place.device)[:, None] * self._copies
        return (place + first).flatten()

    def _step(self, i: int, input_ids: Tensor, new: Tensor) -> Tensor:
        member: Any = self._others[i]
        inputs: dict[str, Any] = {"past_key_values": self._caches[i], "use_cache": True}
        if self._encoded[i] is not None:
            inputs |= {"encoder_outputs": self._encoded[i], "attention_mask": self._mask, "decoder_input_ids": new}
        else:
            written = input_ids.shape[1] - self._mask.shape[1]
            mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), written)], 1)
            inputs |= {"input_ids": new, "attention_mask": mask, **_positions(member, mask, new.shape[1])}
        return member(**inputs).logits[:, -1]


def _encoded(member: Any, ids: Tensor, mask: Tensor) -> Any:
    """What an encoder makes of the sources; None of a model without one."""
    return member.get_encoder()(input_ids=ids, attention_mask=mask) if member.config.is_encoder_decoder else None


def _positions(member: Any, mask: Tensor, last: int = 0) -> dict[str, Tensor]:
    """Positions counted from the first token that is no padding, for a model that takes them; of the `last` ones, 0: all."""
    if "position_ids" not in inspect.signature(member.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -last:]}


def _cache(member: Any) -> Any:
    config = member.config.get_text_config(decoder=True)
    if not member.config.is_encoder_decoder:
        return DynamicCache(config=config)
    return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))


def _scored(
    members: Sequence[nn.Module], weights: Sequence[float], ids: Tensor, mask: Tensor, found: Sequence[Tensor], count: int
) -> list[float]:
    """log P of each hypothesis, teacher-forced, in one pass."""
    lead: Any = members[0]
    lengths = [len(x) for x in found]
    text = pad_sequence(list(found), batch_first=True).to(ids.device)
    sources, masks = ids.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
    if lead.config.is_encoder_decoder:
        first = lead.generation_config.decoder_start_token_id
        first = lead.config.decoder_start_token_id if first is None else first
        started = torch.cat([text.new_full((len(text), 1), first), text[:, :-1]], 1)
        inputs = {"input_ids": sources, "attention_mask": masks, "decoder_input_ids": started}
        before = 0
    else:
        whole = torch.cat([masks, masks.new_ones(text.shape)], 1)
        inputs = {"input_ids": torch.cat([sources, text], 1), "attention_mask": whole}
        before = sources.shape[1] - 1
    logs = []
    for member in members:
        places = {} if lead.config.is_encoder_decoder else _positions(member, inputs["attention_mask"])
        logs.append(logits_in(call(member, {**inputs, **places}))[:, before : before + text.shape[1]])
    picked = mean_logits(logs, weights).gather(-1, text[..., None])[..., 0]
    counted = torch.arange(text.shape[1], device=text.device) < torch.tensor(lengths, device=text.device)[:, None]
    sums: list[float] = picked.double().masked_fill(~counted, 0.0).sum(1).tolist()
    return sums
