"""Text that models write: beam search and sampling by transformers' `generate`, one model or several as an ensemble."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    ForcedBOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from kdfast.models.ensemble import Ensemble, mean_logits
from kdfast.models.heads import call, logits_in
from kdfast.models.load import quiet
from kdfast.models.positions import positions_of
from kdfast.models.settings import bans_of, configured, generation_config, members_of, start_of


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
    """ids: int64, without start and padding, the end among them where it was written. score: log P(ids | source), summed, in
    which an id that is forced has a probability of 1."""

    ids: Tensor
    score: float


@torch.no_grad()
def write(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    decoding: Decoding,
    end: Sequence[int],
    *,
    most: int | None = None,
    scores: bool = True,
) -> list[list[Hypothesis]]:
    """Hypotheses of each row of a batch, the best first, as if the row was alone. Equals, for one model,

        model.generate(**inputs, num_beams=beams, num_return_sequences=count, max_new_tokens=max_tokens, ...)

    and for an `Ensemble` the same with the mean of the members' probabilities at each step, of the ids that all may write. A
    row has fewer than `count` where there are no more, none where its prompt leaves no room.

    Args:
        model: of `transformers`, in evaluation mode; an encoder-decoder, or causal with prompts padded on the left.
        inputs: `input_ids` and, where there is padding, `attention_mask`.
        end: ids that end a hypothesis.
        most: most tokens of a prompt and a hypothesis of it, of a causal model.
        scores: whether to score them, by one pass over all that was written; otherwise their score is 0.

    Raises:
        ValueError: a model cannot write, or not together with the others.
    """
    members = members_of(model)
    weights = model.weights if isinstance(model, Ensemble) else [1.0]
    for member in members:
        if not hasattr(member, "generate"):
            raise ValueError(f"model: expected a transformers model, which can write text, got {type(member).__name__}")
    pair = members[0].config.is_encoder_decoder
    if any(member.config.is_encoder_decoder != pair for member in members):
        raise ValueError("model: expected an ensemble of causal models or one of encoder-decoders, got both")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    positions = min(map(_positions_of, members))
    prompts = [0] * len(ids) if pair else mask.sum(1).tolist()
    limit = positions if pair or most is None else min(positions, most)
    rooms = [int(min(decoding.max_tokens, limit - prompt)) for prompt in prompts]
    found: list[list[Hypothesis]] = [[] for _ in rooms]
    for rows in _groups(prompts, rooms, positions):
        width = ids.shape[1] if pair else max(prompts[i] for i in rows)
        own = [rooms[i] for i in rows]
        groups = _written(members, weights, ids[rows, -width:], mask[rows, -width:], own, decoding, end, scores)
        for i, group in zip(rows, groups, strict=True):
            found[i] = group
    return found


def _positions_of(member: Any) -> float:
    """Tokens for which a model has positions, or for which it was made."""
    found = (getattr(member.config, "max_position_embeddings", None), positions_of(member))
    return min((most for most in found if most is not None), default=math.inf)


def _groups(prompts: Sequence[int], rooms: Sequence[int], positions: float) -> list[list[int]]:
    """Rows that may write together: those that are done go along to the longest room, for which they too must have positions.

    So all rows are one group, unless prompts nearly fill the positions.
    """
    groups: list[list[int]] = []
    for i in sorted((i for i, room in enumerate(rooms) if room > 0), key=lambda i: prompts[i]):
        if groups and prompts[i] + rooms[groups[-1][0]] <= positions:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [sorted(group) for group in groups]


def _written(
    members: list[Any], weights: Sequence[float], ids: Tensor, mask: Tensor, rooms: Sequence[int], decoding: Decoding,
    end: Sequence[int], scores: bool,
) -> list[list[Hypothesis]]:  # fmt: skip
    """Hypotheses of rows that write together, each with room of its own."""
    lead, count = members[0], decoding.count
    config = generation_config(lead, decoding, end, max(rooms))
    start = 1 if lead.config.is_encoder_decoder else ids.shape[1]
    bans, first = bans_of(members, end, start, ids.device), _First(config.num_beams)
    together = [_Together(members[1:], weights, ids, mask, config)] if len(members) > 1 else []
    # The mean comes first, so that what may not be written is taken out of it and not of the lead's part.
    processors = LogitsProcessorList([*together, *bans, *([first] if config.num_beams > 1 else [])])
    stops = StoppingCriteriaList([_Rooms(rooms, start, ids.device)] if min(rooms) < max(rooms) else [])
    with quiet(), configured(lead, config):
        written = lead.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors, stopping_criteria=stops
        )
    found = [_cut(row[: rooms[i // count]], end) for i, row in enumerate(written[:, start:])]
    forced = any(isinstance(ban, ForcedBOSTokenLogitsProcessor) for ban in bans)
    values = _scored(members, weights, ids, mask, found, count, forced) if scores else [0.0] * len(found)
    groups = [list(map(Hypothesis, found[i : i + count], values[i : i + count])) for i in range(0, len(found), count)]
    if decoding.sample:
        return [sorted(group, key=lambda h: -h.score) for group in groups]
    return groups if config.num_beams == 1 else [first.real(row, group) for row, group in enumerate(groups)]


def _cut(row: Tensor, end: Sequence[int]) -> Tensor:
    """Up to the first end, which stays."""
    ends = torch.isin(row, torch.tensor(end, device=row.device, dtype=row.dtype)).nonzero() if end else row.new_zeros(0, 1)
    return row[: int(ends[0]) + 1].cpu() if len(ends) else row.cpu()


class _Rooms(StoppingCriteria):
    """A row ends where its own room does, and leaves that of others as it is."""

    def __init__(self, rooms: Sequence[int], start: int, device: torch.device) -> None:
        self._longest = torch.tensor(rooms, device=device) + start

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        full = input_ids.shape[1] >= self._longest
        return full.repeat_interleave(len(input_ids) // len(full))


class _First(LogitsProcessor):
    """Sees which ids may begin a text: a beam that is wider than what can be written is filled up with copies and padding."""

    def __init__(self, beams: int) -> None:
        self._beams = beams
        self._banned: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._banned is None:
            self._banned = scores[:: self._beams] == -torch.inf
        return scores

    def real(self, row: int, group: Sequence[Hypothesis]) -> list[Hypothesis]:
        """What was written of a row's hypotheses, each once."""
        assert self._banned is not None
        banned = self._banned[row].cpu()
        seen: dict[tuple[int, ...], Hypothesis] = {}
        for hypothesis in group:
            if not banned[hypothesis.ids[0]]:
                seen.setdefault(tuple(hypothesis.ids.tolist()), hypothesis)
        return list(seen.values())


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
        return mean_logits([scores, *own], self._weights).to(scores.dtype)

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
            # The lead may start from another id.
            said = new if input_ids.shape[1] > 1 else torch.full_like(new, start_of(member))
            inputs |= {"encoder_outputs": self._encoded[i], "attention_mask": self._mask, "decoder_input_ids": said}
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
    members: Sequence[Any], weights: Sequence[float], ids: Tensor, mask: Tensor, found: Sequence[Tensor], count: int,
    forced: bool,
) -> list[float]:  # fmt: skip
    """log P of each hypothesis, teacher-forced, in one pass; forced: the first id is no choice."""
    text = pad_sequence(list(found), batch_first=True).to(ids.device)
    sources, masks = ids.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
    logs = []
    for member in members:
        if member.config.is_encoder_decoder:
            started = torch.cat([text.new_full((len(text), 1), start_of(member)), text[:, :-1]], 1)
            inputs = {"input_ids": sources, "attention_mask": masks, "decoder_input_ids": started}
        else:
            whole = torch.cat([masks, masks.new_ones(text[:, 1:].shape)], 1)
            inputs = {"input_ids": torch.cat([sources, text[:, :-1]], 1), "attention_mask": whole, **_positions(member, whole)}
        logs.append(logits_in(call(member, inputs))[:, -text.shape[1] :])
    picked = mean_logits(logs, weights).gather(-1, text[..., None])[..., 0]
    places = torch.arange(text.shape[1], device=text.device)
    counted = (places < torch.tensor([len(x) for x in found], device=text.device)[:, None]) & (places >= int(forced))
    sums: list[float] = picked.double().masked_fill(~counted, 0.0).sum(1).tolist()
    return sums
