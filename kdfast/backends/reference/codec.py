"""Rows of the teacher cache decoded in plain PyTorch, by section 4 of docs/cache-format.md. Contract: `kdfast.backends`.

Every line is one IEEE operation on float32 or float64, as the specification has them, so that the floats are those of every
other decoder. Integers are int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.options import CODEC_SLACK, CodecLayout

_BLOCK, _PATCHES, _TAIL_ALL = 64, 63, 65535
_EXP = (0.00836888886988163, 0.04166620597243309, 0.166665181517601, 0.5)
_LOG = (0.1276140958070755, -0.13160260021686554, 0.14201785624027252, -0.16623352468013763,
        0.20001225173473358, -0.250008225440979, 0.3333333134651184)  # fmt: skip
_SQRT_HALF = 0x3F3504F3


def decode(data: Tensor, offsets: Tensor, counts: Tensor, layout: CodecLayout) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_t, end = len(layout.temperatures), data.numel() - CODEC_SLACK
    n, at = counts.long()[:, None], offsets[:, None]
    sound = (n > 0) & (n <= layout.k) & (at >= 0) & (at <= end)
    empty, n, at = n == 0, torch.where(sound, n, 1), torch.where(sound, at, 0)
    entry = torch.arange(layout.k, device=data.device)
    there = entry < n
    codes = _word(data, at + 2 * torch.arange(n_t, device=data.device)) & 0xFFFF
    exact = (codes == _TAIL_ALL).all(1, keepdim=True)  # the values are stored as they were given
    sound &= exact | (codes != _TAIL_ALL).all(1, keepdim=True)
    ids, at, fine = _ids(data, at + 2 * n_t, n, layout, end)
    values, values_end, fits = _exact(data, at, n, there, n_t, end)
    levels, levels_end, good = _numbers(data, at, n, layout.k, end)
    at = torch.where(exact, values_end, levels_end)
    sound &= fine & torch.where(exact, fits, good)
    tail, rest = _masses(codes)
    odd = torch.where(there, 2 * levels + 1, 0)
    unit = (rest[:, [layout.temperatures.index(1.0)]] / (odd * odd).sum(1, keepdim=True).double()).float()
    p = odd.float() * odd.float() * unit
    logp = torch.where(exact, values[0], _log(p))
    p = torch.where(exact, _exp(logp), p)
    top = torch.where(there, logp, -torch.inf).amax(1)
    log_z = torch.zeros(n.shape[0], n_t, device=data.device)
    for j, temperature in enumerate(layout.temperatures):
        if temperature != 1.0:
            inverse = 1 / temperature
            powers = torch.where(there, _exp((logp - top[:, None]) * inverse), 0)
            log_z[:, j] = top * inverse + _log((_sum16(powers) / rest[:, j]).float())
    log_z = torch.where(exact, values[1], log_z)
    log_tail = torch.where(codes == 0, -torch.inf, _log(tail.float()))
    log_tail = torch.where(exact, values[2], log_tail)
    tail = torch.where(exact, torch.where(log_tail > -torch.inf, _exp(log_tail), 0).double(), tail)
    weights = logp.new_zeros(0)
    if layout.samples:
        draws, at, good = _numbers(data, at, n, layout.k, end)
        draws = torch.where(there, draws, 0)
        undrawn = (there & (draws == 0)).any(1, keepdim=True)
        sound &= good & (draws.sum(1, keepdim=True) == layout.samples) & (layout.mixed | ~undrawn)
        weights = _weights(p, logp, draws, log_z, tail, layout)
    full, bad = there & sound, ~(sound | empty)
    weights = torch.where(full, weights, 0).masked_fill(bad, torch.nan) if layout.samples else weights
    return (
        torch.where(full, ids, -1).masked_fill(bad, 0).int(),
        torch.where(full, logp, -torch.inf).masked_fill(bad, torch.nan),
        torch.where(sound, log_z, 0).masked_fill(bad, torch.nan),
        torch.where(sound, log_tail, 0).masked_fill(bad, torch.nan),
        weights,
    )


def _byte(data: Tensor, at: Tensor) -> Tensor:
    inside = (at >= 0) & (at < data.numel())
    return torch.where(inside, data[at.clamp(0, data.numel() - 1)].long(), 0)


def _word(data: Tensor, at: Tensor) -> Tensor:
    return _byte(data, at) | _byte(data, at + 1) << 8 | _byte(data, at + 2) << 16 | _byte(data, at + 3) << 24


def _packed(data: Tensor, at: Tensor, width: Tensor, place: Tensor) -> Tensor:
    """Number `place` of those that are packed at `width` bits from byte `at` on."""
    bit = place * width
    return _word(data, at + (bit >> 3)) >> (bit & 7) & ((1 << width) - 1)


def _exact(
    data: Tensor, at: Tensor, n: Tensor, there: Tensor, n_t: int, end: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """(logprobs, log_z, log_tail) of exact rows, where what follows begins, and whether they are log-probabilities."""
    column = torch.arange(n_t, device=data.device)
    logp = torch.where(there, _float(data, at + 4 * torch.arange(there.shape[1], device=data.device)), 0)
    log_z, log_tail = _float(data, at + 4 * (n + column)), _float(data, at + 4 * (n + n_t + column))
    after, highest = at + 4 * (n + 2 * n_t), 1e-3
    sound = ((logp <= highest) & (logp > -torch.inf)).all(1, keepdim=True)
    sound &= (log_z.isfinite() & (log_tail <= highest)).all(1, keepdim=True)
    return (logp, log_z, log_tail), after, sound & (after <= end)


def _float(data: Tensor, at: Tensor) -> Tensor:
    word = _word(data, at)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).int().view(torch.float32)


def _ids(data: Tensor, at: Tensor, n: Tensor, layout: CodecLayout, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of n entries a row, where what follows begins, and whether they are ids."""
    k, vocab = layout.k, layout.vocab_size
    width = (vocab // n >= 2 ** torch.arange(1, 25, device=data.device)).sum(1, keepdim=True)
    high = at + (n * width + 7) // 8
    after = high + (n + (vocab - 1 >> width) + 7) // 8
    bit = torch.arange(3 * k + 8, device=data.device)  # (V - 1) >> width is below 2 n
    one = (_byte(data, high + (bit >> 3)) >> (bit & 7) & 1) * (high + (bit >> 3) < after)
    rank = one.cumsum(1) - 1
    places = torch.zeros(len(n), k + 1, dtype=torch.int64, device=data.device)
    places.scatter_(1, torch.where((one == 1) & (rank < k), rank, k), bit.expand(len(n), -1))
    entry = torch.arange(k, device=data.device)
    ids = places[:, :k] - entry << width | _packed(data, at, width, entry)
    wrong = (ids >= vocab) | (ids <= torch.nn.functional.pad(ids[:, :-1], (1, 0), value=-1))
    sound = (after <= end) & (one.sum(1, keepdim=True) == n) & ~(wrong & (entry < n)).any(1, keepdim=True)
    return ids, after, sound


def _numbers(data: Tensor, at: Tensor, n: Tensor, k: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels or draws of n entries a row, where what follows begins, and whether they are numbers."""
    blocks, sound = [], torch.ones_like(n, dtype=torch.bool)
    j = torch.arange(_PATCHES, device=data.device)
    for start in range(0, k, _BLOCK):
        m = (n - start).clamp(0, _BLOCK)
        head = torch.where(m > 0, _word(data, at) & 0xFFFF, 0)
        width, more, patches = head & 31, head >> 5 & 31, head >> 10
        patches_at = at + 2 + (m * width + 7) // 8
        after = patches_at + (patches * (more + 6) + 7) // 8
        patch = _packed(data, patches_at, more + 6, j)
        place, used = patch & 63, j < patches
        wrong = (place >= m) | (place <= torch.nn.functional.pad(place[:, :-1], (1, 0), value=-1))
        sound &= (m == 0) | ((width + more <= 16) & ((patches > 0) == (more > 0)) & (after <= end))
        sound &= ~(wrong & used).any(1, keepdim=True)
        upper = torch.zeros(len(n), _BLOCK + 1, dtype=torch.int64, device=data.device)
        upper.scatter_(1, torch.where(used, place, _BLOCK), patch >> 6 << width)
        entry = torch.arange(_BLOCK, device=data.device)
        blocks.append(_packed(data, at + 2, width, entry) | upper[:, :_BLOCK])
        at = torch.where(m > 0, after, at)
    return torch.cat(blocks, 1)[:, :k], at, sound


def _masses(codes: Tensor) -> tuple[Tensor, Tensor]:
    """What is left, and what the entries hold together."""
    odds = torch.where(codes == 0, 0, ((codes << 43) + (1023 - 96 << 52)).view(torch.float64))
    return odds / (1 + odds), torch.ones_like(odds) / (1 + odds)


def _weights(p: Tensor, logp: Tensor, draws: Tensor, log_z: Tensor, tail: Tensor, layout: CodecLayout) -> Tensor:
    column, inverse = layout.sample_column, 1 / layout.sample_temperature
    z = log_z[:, column, None]
    drawn = torch.where(draws > 0, _exp(logp * inverse - z), 0)
    begin = (_sum16(drawn) + tail[:, column]).float()[:, None] if layout.mixed else torch.ones_like(z)
    # A tensor: a number would be multiplied by its reciprocal on a GPU.
    share = draws.float() / torch.full_like(p, layout.samples)
    return torch.where(draws > 0, share * begin * _exp(logp - (logp * inverse - z)), p)


def _sum16(x: Tensor) -> Tensor:
    wide = torch.nn.functional.pad(x, (0, -x.shape[1] % 16)).double().view(len(x), -1, 16)
    sums = torch.zeros_like(wide[:, 0])
    for i in range(wide.shape[1]):
        sums = sums + wide[:, i]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def _exp(x: Tensor) -> Tensor:
    x = x.clamp(-87, 88)
    n = (x * 1.44269504 + 12582912) - 12582912
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    y = torch.full_like(r, 0.0013950476422905922)
    for c in _EXP:
        y = y * r + c
    return ((y * (r * r) + r) + 1) * (n.int() + 127 << 23).view(torch.float32)


def _log(x: Tensor) -> Tensor:
    shifted = x.contiguous().view(torch.int32) - _SQRT_HALF
    n = (shifted >> 23).float()
    f = ((shifted & 0x007FFFFF) + _SQRT_HALF).view(torch.float32) - 1
    y = torch.full_like(f, -0.07634081691503525)
    for c in _LOG:
        y = y * f + c
    g = f * f
    return n * 0.693145752 + (n * 1.42860677e-6 + ((y * f) * g - g * 0.5 + f))
