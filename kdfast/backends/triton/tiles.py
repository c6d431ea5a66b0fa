"""What the row kernels share: tiles of columns, online log-sum-exps, launch sizes.

A row is read in tiles of LANES x VEC columns, VEC neighbours filling one 16-byte load, so that a reduction over VEC
stays inside a thread and a row statistic costs one register per lane instead of one per column. Statistics are kept
as (maximum, log2 of the sum relative to it), in float64 between forward and backward: subtracting the maximum first is
exact where a float32 log-sum-exp of 640 would round away 3e-5.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.options import PARTS

#: Where an online maximum starts: finite, so that exp2(-inf - LOWEST) is 0 and not NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
N_PARTS = tl.constexpr(len(PARTS))
TWO_MINUS_INF = tl.constexpr(0xFF80FF80 - (1 << 32))  # as bfloat16 in a word
#: What lies between the stored logits and the softmax (`kdfast.options.Head`).
NO_HEAD = tl.constexpr(0)
SCALED = tl.constexpr(1)
CAPPED = tl.constexpr(2)
#: How rows lie: every one on 16 bytes; anywhere; anywhere, but all tensors of a row alike.
ALIGNED = tl.constexpr(0)
SCATTERED = tl.constexpr(1)
PHASED = tl.constexpr(2)


@dataclass(frozen=True)
class Launch:
    """Size of one program: `lanes` x `vec` columns a tile, on `warps` warps.

    `ragged` says how rows lie. Where they are SCATTERED nothing wider than one value can be loaded, and a lane takes every
    `lanes`-th column, which keeps the loads of a warp next to each other. PHASED rows are loaded like aligned ones from the
    first column on that lies on 16 bytes; the few columns before and behind make a tile of their own.
    """

    lanes: int
    vec: int
    warps: int
    ragged: int

    @property
    def shape(self) -> dict[str, int]:
        """The arguments of a kernel that say how it tiles a row."""
        return {"LANES": self.lanes, "VEC": self.vec, "RAGGED": self.ragged}

    @property
    def options(self) -> dict[str, int | bool]:
        """Compiler options. The register limit is what 16 warps can have: left to itself, ptxas spills row constants to
        reach an occupancy that a persistent grid does not use."""
        limit = {} if torch.version.hip else {"maxnreg": 128}
        return {"num_warps": self.warps, "enable_fp_fusion": True, **limit}


#: (largest vocabulary, warps, 16-byte loads a thread and tensor). Wide rows want few programs in flight, so that a row
#: read in the first pass is still in L2 in the second; narrow ones several, whose reductions hide behind each other.
_SIZES = ((1024, 4, 1), (65536, 8, 2), (1 << 31, 16, 2))


def launch(vocab: int, *dtypes: torch.dtype, heavy: int = 0, ragged: int = ALIGNED.value) -> Launch:
    """Size of the programs that walk rows of `vocab` columns of these dtypes; a pure function of its arguments.

    `heavy` kernels hold more statistics a column: at 1 they get half the columns, at 2 a quarter.
    """
    vec = 16 // max(d.itemsize for d in dtypes)
    _, warps, loads = next(size for size in _SIZES if vocab <= size[0])
    if vec == 4:
        loads = 2
    if heavy:
        loads = 8 // vec
    if ragged == SCATTERED.value:
        vec, loads = 8, 1
    if heavy == 2:
        vec, loads = 4, 1
    return Launch(warps * 32 * loads, vec, warps, ragged)


def launch_for(vocab: int, *rows: Tensor, heavy: int = 0, phased: bool = False) -> Launch:
    """`launch` for these `[N, V]` tensors; `phased`: the kernel knows rows that begin off 16 bytes."""
    starts = [r.data_ptr() % 16 for r in rows]
    strides = [r.stride(0) % 16 for r in rows]
    if not any((vocab % 16, *(r.shape[1] % 16 for r in rows), *strides, *starts)):
        ragged = ALIGNED
    elif phased and not any(starts) and len(set(strides)) == 1:
        ragged = PHASED
    else:
        ragged = SCATTERED
    return launch(vocab, *(r.dtype for r in rows), heavy=heavy, ragged=int(ragged.value))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; for the interpreter 2, which suffices to walk every loop: it runs programs one after the other."""
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def before_hopper(device: torch.device) -> bool:
    """Whether an NVIDIA GPU is older than Hopper: its products take both operands from registers."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 9


def grid(rows: int, device: torch.device, warps: int) -> tuple[int]:
    """Programs for `rows` rows: 16 warps a multiprocessor, which is what 128 registers allow; each walks rows with that
    stride."""
    programs = multiprocessors(device) * (max(1, 16 // warps) if device.type == "cuda" else 1)
    return (min(rows, programs),)


def on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of `tensor` current, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def tile_columns(start, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr):
    """[LANES, VEC] column numbers from `start`: VEC neighbours a lane, or in ragged rows neighbouring lanes."""
    lane = tl.arange(0, LANES)[:, None]
    place = tl.arange(0, VEC)[None, :]
    columns = start + lane * VEC + place
    if RAGGED:
        columns = start + place * LANES + lane
    return columns


@triton.jit
def lead_of(offset, width, VEC: tl.constexpr, RAGGED: tl.constexpr):
    """How many columns of a row, `offset` values behind a multiple of 16 bytes, come before the first that lies on one."""
    lead = 0
    if RAGGED == PHASED:
        lead = tl.minimum((-offset) & (VEC - 1), width).to(tl.int32)
    return lead


@triton.jit
def body_width(lead, width, VEC: tl.constexpr, RAGGED: tl.constexpr):
    """Columns of a row's body: all, or from the lead on as many as fill whole loads."""
    if RAGGED == PHASED:
        width = (width - lead) // VEC * VEC
    return width


@triton.jit
def body_ptr(row_ptr, lead, VEC: tl.constexpr, RAGGED: tl.constexpr):
    if RAGGED == PHASED:
        row_ptr = tl.multiple_of(row_ptr + lead, VEC * (row_ptr.dtype.element_ty.primitive_bitwidth // 8))
    return row_ptr


@triton.jit
def edge_columns(lead, body, LANES: tl.constexpr):
    """[LANES, 1] columns of a phased row before and behind its body, then such as are in no row."""
    lane = tl.arange(0, LANES)[:, None]
    return tl.where(lane < lead, lane, lane + body)


@triton.jit
def load_tile(row_ptr, columns, width, policy: tl.constexpr):
    """A tile as it is stored, -inf beyond the row: what is loaded ahead of its turn waits in the row's own dtype."""
    return tl.load(row_ptr + columns, mask=columns < width, other=-INF, eviction_policy=policy)


@triton.jit
def _tanh(x):
    # Below 0.625 x + x^3 * P(x^2), P fitted to 1e-7 of itself; 1 - 2 / (e^2x + 1) would cancel there.
    z = x * x
    tail = -0.33333329 + z * (0.1333277 + z * (-0.05385096 + z * (0.02099738 + z * -0.006096967)))
    size = tl.abs(x)
    far = 1 - 2 / (tl.exp2(size * (2 * LOG2E)) + 1)
    return tl.where(size < 0.625, x + x * z * tail, tl.where(x < 0, -far, far))


@triton.jit
def load_words(row_ptr, start, width, policy: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr):
    """A tile from `start` on as it waits for its turn: bfloat16 two to a word, which takes half the registers and one
    instruction a value to widen."""
    if RAGGED == SCATTERED or row_ptr.dtype.element_ty != tl.bfloat16:
        tile = load_tile(row_ptr, tile_columns(start, LANES, VEC, RAGGED == SCATTERED), width, policy)
    else:
        words = start // 2 + tl.arange(0, LANES)[:, None] * (VEC // 2) + tl.arange(0, VEC // 2)[None, :]
        pairs = row_ptr.to(tl.pointer_type(tl.int32))
        tile = tl.load(pairs + words, mask=words < width // 2, other=TWO_MINUS_INF, eviction_policy=policy)
    return tile


@triton.jit
def from_words(words, LANES: tl.constexpr, VEC: tl.constexpr):
    """The [LANES, VEC] values that `load_words` loaded, not yet through a head."""
    if words.dtype == tl.int32:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
        values = tl.reshape(tl.join(low, high), (LANES, VEC))
    else:
        values = words
    return values


@triton.jit
def through_head(x, columns, width, cap, scale, HEAD: tl.constexpr):
    """A loaded tile as the softmax sees it: cap * tanh(scale * x / cap); +inf is as bad a value as NaN."""
    x = x.to(tl.float32)
    if HEAD == SCALED:
        x = x * scale
    if HEAD == CAPPED:
        capped = cap * _tanh(x * (scale / cap))
        x = tl.where(columns < width, tl.where(x == INF, float("nan"), capped), -INF)
    return x


@triton.jit
def load_head(row_ptr, columns, width, cap, scale, HEAD: tl.constexpr, policy: tl.constexpr):
    return through_head(load_tile(row_ptr, columns, width, policy), columns, width, cap, scale, HEAD)


@triton.jit
def back_through_head(g, z, cap, scale, HEAD: tl.constexpr):
    """The gradient with respect to what is stored, from that with respect to z, what the softmax sees."""
    if HEAD == SCALED:
        g = g * scale
    if HEAD == CAPPED:
        r = z * (1 / cap)
        g = g * (scale * (1 - r * r))
    return g


@triton.jit
def grad_at_1(q, columns, label, weights, FLAT: tl.constexpr):
    """Gradient of the terms at T = 1, q their softmax: weights = (of q, taken from the label, taken from every column)."""
    g = weights[0] * q - tl.where(columns == label, weights[1], 0.0)
    if FLAT:
        g -= weights[2]
    return g


@triton.jit
def add_exp2(total, m, m_new, x, c):
    """sum of exp2((x - m) * c) per lane, moved from maximum m to m_new, with a tile x added."""
    return total * tl.exp2((m - m_new) * c) + tl.sum(tl.exp2((x - m_new[:, None]) * c), 1)


@triton.jit
def summed(m, a, b, x, c, AT_1: tl.constexpr, SQUARED: tl.constexpr):
    """(maximum, sum at T, sum at 1) of each lane [LANES] with a tile x more; at T = 2 the terms at 1 are squares."""
    # x - m first: the largest term is exactly 1, so that a saturated row stays one.
    m_new = tl.maximum(m, tl.max(x, 1))
    e = tl.exp2((x - m_new[:, None]) * c)
    moved = tl.exp2((m - m_new) * c)
    a = a * moved + tl.sum(e, 1)
    if AT_1:
        b = b * (moved * moved) + tl.sum(e * e, 1) if SQUARED else add_exp2(b, m, m_new, x, LOG2E)
    return m_new, a, b


@triton.jit
def closed(m, total, top, c):
    """log2 of the sum of all lanes relative to the row's maximum `top`; -inf when every logit is -inf.

    A lane whose maximum is +inf contributes inf - inf, so a row that holds NaN or +inf gives NaN.
    """
    return tl.log2(tl.sum(total * tl.exp2((m - top) * c), 0))


@triton.jit
def joined(m, l, temperature):
    """The log-sum-exp at T, in float64, of a maximum and a log2 sum."""
    return m.to(tl.float64) / temperature + l.to(tl.float64) * LN2


@triton.jit
def split(lse, temperature):
    """(m, l) with m + T * ln2 * l = T * lse, both float32: l is what rounding m to float32 lost."""
    wide = lse * temperature
    m = wide.to(tl.float32)
    return m, ((wide - m.to(tl.float64)) / temperature * LOG2E).to(tl.float32)


@triton.jit
def zero_row(row_ptr, width, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr):
    for start in range(0, width, LANES * VEC):
        columns = tile_columns(start, LANES, VEC, RAGGED)
        zeros = tl.zeros([LANES, VEC], row_ptr.dtype.element_ty)
        tl.store(row_ptr + columns, zeros, mask=columns < width, eviction_policy="evict_first")


@triton.jit
def zero_outputs(loss_ptr, stats_ptr, parts_ptr, STATS: tl.constexpr, PARTS: tl.constexpr):
    """What a row with scale 0 reports."""
    tl.store(loss_ptr, 0.0)
    for i in tl.static_range(STATS):
        tl.store(stats_ptr + i, 0.0)
    if PARTS:
        for i in tl.static_range(N_PARTS):
            tl.store(parts_ptr + i, 0.0)


@triton.jit
def with_extra(
    s_ptr, common, width, top, l1, cap, scale, HEAD: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """(maximum, log2 sum at 1) over the whole vocabulary, given those over the common columns; and the sum of the others."""
    m = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    plain = tl.zeros([LANES], tl.float32)
    for start in range(common, width, LANES * VEC):
        columns = tile_columns(start, LANES, VEC, RAGGED)
        s = load_head(s_ptr, columns, width, cap, scale, HEAD, "evict_last")
        plain += tl.sum(tl.where(columns < width, s, 0.0), 1)
        m, total, _ = summed(m, total, total, s, LOG2E, False, False)
    top_x = tl.max(m, 0)
    both = tl.maximum(top, top_x)
    # Each side moves to the common maximum by itself: the smaller one may vanish, the larger one must not.
    here = tl.exp2((top - both) * LOG2E + l1)
    there = tl.exp2((top_x - both) * LOG2E + closed(m, total, top_x, LOG2E))
    return both, tl.log2(here + there), tl.sum(plain, 0)


@triton.jit
def extra_grad(
    s_ptr, g_ptr, common, width, label, m_h, l_h, weights, cap, scale, HARD: tl.constexpr, FLAT: tl.constexpr,
    HEAD: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Gradient of the student's columns beyond the teacher's vocabulary: what is at T = 1 alone (see `grad_at_1`)."""
    for start in range(common, width, LANES * VEC):
        columns = tile_columns(start, LANES, VEC, RAGGED)
        g = tl.zeros([LANES, VEC], tl.float32)
        if HARD:
            s = load_head(s_ptr, columns, width, cap, scale, HEAD, "evict_first")
            g = grad_at_1(tl.exp2((s - m_h) * LOG2E - l_h), columns, label, weights, FLAT)
            g = back_through_head(g, s, cap, scale, HEAD)
        tl.store(g_ptr + columns, g.to(g_ptr.dtype.element_ty), mask=columns < width, eviction_policy="evict_first")
