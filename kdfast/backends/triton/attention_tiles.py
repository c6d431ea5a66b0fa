"""What the kernels of `attention` share: sizes of programs, loads, products; and the kernel of maps that exist already.

A program owns a block of queries (or of keys) and walks the keys (queries) a tile at a time. Products are of tensor cores:
halves as they are with float32 sums (`attention_half`), float32 as three TF32 products (`attention_wide`), but for heads
wider than 64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

SCORES, PROBS, KL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class Launch:
    """A program: `own` queries (or keys), `other` keys (or queries) a tile, on `warps` warps, `stages` tiles on their way."""

    own: int
    other: int
    warps: int
    stages: int

    @property
    def of_queries(self) -> dict[str, int]:
        return {"BLOCK_Q": self.own, "BLOCK_K": self.other}

    @property
    def of_keys(self) -> dict[str, int]:
        return {"BLOCK_Q": self.other, "BLOCK_K": self.own}

    @property
    def options(self) -> dict[str, int | bool]:
        # All the registers there are: left to itself, ptxas spills a few to reach a higher occupancy.
        limit = {} if torch.version.hip else {"maxnreg": 255}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True, **limit}


def launch(
    ds: int, dt: int, dtype: torch.dtype, of_keys: bool, programs: int = 1 << 30, older: bool = False, key_mask: bool = False,
    scores: bool = False,
) -> Launch:  # fmt: skip
    """Size of the programs of either walk: the largest that hold their tiles in registers, and halves of them where `programs`
    (blocks of 128) would leave multiprocessors idle. A pure function of its arguments.

    `older`: than Hopper, whose warp groups multiply out of shared memory. Before it both sides of a product are registers' too.
    `key_mask`: of a length that nothing divides, it takes the few registers that a tile of 32 keys leaves. `scores`: neither
    probabilities nor KL; in their keys' walk the compiler keeps more tiles at once.
    """
    widest = max(padded(ds), padded(dt))
    if dtype == torch.float32:
        if widest > 64:
            return Launch(16, 16, 8, 1)
        if older:
            return Launch(16, 16, 8, 1) if of_keys else Launch(16, 32, 4, 1)
        if of_keys:
            return Launch(16 if scores and widest > 32 else 32, 16 if scores or widest <= 32 else 32, 8, 1)
        return Launch(64, 16 if key_mask and widest > 32 else 32, 4, 1)
    if older and widest <= 128 and (widest <= 64 or not of_keys):
        return Launch(128, 16 if of_keys else 32, 8, 3) if widest <= 64 else Launch(64, 16, 8, 2)
    if widest <= 64:
        if programs >= 2 * 132:
            return Launch(128, 64, 8, 3)
        return Launch(64, 32 if of_keys and dtype == torch.float16 else 64, 4, 3)
    other = 32 if widest <= 128 else 16
    return Launch(32, other, 4, 1) if of_keys else Launch(64, other, 4, 2 if other == 32 else 1)


def padded(size: int) -> int:
    """What a product's inner dimension must be: a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(size))


def precision(dtype: torch.dtype, gpu: bool) -> str:
    """How `product` multiplies. The interpreter has no product of halves, AMD no three of TF32."""
    if dtype == torch.float32:
        return "ieee" if torch.version.hip else "tf32x3"
    return "half" if gpu else "widened"


def flags(
    kind: int, ds: int, dt: int, dtype: torch.dtype, query_mask: bool, key_mask: bool, causal: bool, gpu: bool = True,
    older: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Compile-time arguments that both kernels share."""
    # Wider float32 would spill: three TF32 products hold the parts of whole rows, an IEEE product rows of every operand.
    narrow = max(padded(ds), padded(dt)) <= 64
    wide: dict[str, object] = {"CLOSE": ds == dt and narrow} if dtype == torch.float32 else {}
    return wide | {
        "KIND": kind,
        "QUERY_MASK": query_mask,
        "KEY_MASK": key_mask,
        "CAUSAL": causal,
        "PRECISION": precision(dtype, gpu) if dtype != torch.float32 or (narrow and not older) else "ieee",
        "DS": padded(ds),
        "DT": padded(dt),
    }


@triton.jit
def load_rows(ptr, positions, counts, stride, size, D: tl.constexpr):
    """[rows, D] of one head; zero where a row does not count, whatever it holds."""
    columns = tl.arange(0, D)[None, :]
    inside = counts[:, None] & (columns < size)
    return tl.load(ptr + positions[:, None].to(tl.int64) * stride + columns, mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, at, values, inside, size, D: tl.constexpr):
    """Writes [rows, D] to rows `at` of a tensor of `size` columns, in its dtype."""
    columns = tl.arange(0, D)[None, :]
    mask = inside[:, None] & (columns < size)
    tl.store(ptr + at[:, None] * size + columns, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def visible(queries, keys, key_counts, CAUSAL: tl.constexpr):
    """[queries, keys] or [1, keys]: the pairs that count, of a query that does; what it comes to otherwise is not stored."""
    seen = key_counts[None, :]
    if CAUSAL:
        seen = seen & (keys[None, :] <= queries[:, None])
    return seen


@triton.jit
def counted(mask_ptr, batch, positions, length, MASK: tl.constexpr):
    counts = positions < length
    if MASK:
        counts = counts & (tl.load(mask_ptr + batch * length + positions, mask=counts, other=0) != 0)
    return counts


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32, both of a side's dtype."""
    if PRECISION == "half":
        found = tl.dot(a, b)
    elif PRECISION == "widened":
        found = tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        found = tl.dot(a, b, input_precision=PRECISION)
    return found


@triton.jit
def weighted(g, x, PRECISION: tl.constexpr):
    """g @ x of halves x and float32 g: rounded to bfloat16 beside bfloat16, but float16 has not the range of a gradient."""
    if x.dtype == tl.bfloat16:
        found = product(g.to(tl.bfloat16), x, PRECISION)
    else:
        found = tl.dot(g, x.to(tl.float32), input_precision="tf32")  # which holds every float16 exactly
    return found


@triton.jit
def map_kernel(
    student_ptr, teacher_ptr, mask_ptr, scale_ptr, loss_ptr, grad_ptr,
    student_batch, student_head, student_row, teacher_batch, teacher_head, teacher_row,
    mask_batch, mask_head, mask_row, mask_column, heads, lq, lk,
    MASK: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, head, query = row // (heads * lq), row // lq % heads, row % lq
    student_ptr += batch * student_batch + head * student_head + query * student_row
    teacher_ptr += batch * teacher_batch + head * teacher_head + query * teacher_row
    mask_ptr += batch * mask_batch + head * mask_head + query * mask_row
    scale = tl.load(scale_ptr + row // lq)
    loss = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, lk, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < lk
        counts = inside
        if MASK:
            counts = counts & (tl.load(mask_ptr + columns * mask_column, mask=inside, other=0) != 0)
        s = tl.load(student_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(teacher_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(scale != 0, tl.where(counts, s - t, 0.0), 0.0)
        loss += d * d
        if GRAD:
            tl.store(grad_ptr + row * lk + columns, (2 * scale * d).to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + row, scale * tl.sum(loss, 0))
