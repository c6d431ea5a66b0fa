"""What `kdfast bench aot` compiles: every Triton kernel at every size its launch function can pick, in representative types
and flags, with the hints that the runtime would give."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kdfast.options import DIVERGENCES

_POINTER = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_FLOATS = ("inv_t", "cap", "scale", "scale_s", "scale_t", "ratio", "ratio_rest")
#: What the row kernels' other pointers point to, by argument name.
_FIXED = {"stats_ptr": "*fp64", "labels_ptr": "*i64", "ids_ptr": "*i32", "bits_ptr": "*i32", "kept_ptr": "*i32",
          "drawn_ptr": "*i32", "points_ptr": "*fp64", "total_ptr": "*fp64", "log_mass_ptr": "*fp64",
          "done_ptr": "*i32", "lanes_ptr": "*i32", "keys_ptr": "*i64", "sorted_ids_ptr": "*i32",
          "data_ptr": "*u8", "offsets_ptr": "*i64", "counts_ptr": "*i32",
          "query_mask_ptr": "*i1", "key_mask_ptr": "*i1", "mask_ptr": "*i1"}  # fmt: skip
#: One for each launch size, the widest and tightest first, and one whose rows are not aligned.
_VOCABS = (151936, 57344, 16384, 1024, 50257)
#: Head sizes of student and teacher, each padded to a power of two: 96 is compiled as 128.
_HEADS = ((64, 64), (128, 128), (32, 256), (32, 32), (64, 128), (128, 32))


@dataclass(frozen=True)
class Case:
    """One kernel in one set of types, flags and sizes; `pointers` to tensors by argument, the teachers' as a tuple."""

    kernel: Any
    label: str
    pointers: dict[str, torch.dtype | tuple[torch.dtype, ...]]
    constants: dict[str, Any]
    options: dict[str, int | bool]
    aligned: bool = True
    older: tuple[dict[str, Any], dict[str, int | bool]] = ({}, {})  # other constants and options before Hopper

    def signature(self) -> dict[str, Any]:
        return {name: self._type(name) for name in self.kernel.arg_names}

    def _type(self, name: str) -> Any:
        if name in self.constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return _FIXED.get(name) or _POINTER[self.pointers.get(name.removesuffix("_ptr"), torch.float32)]
        if name == "o":
            from kdfast.backends.triton.logits import Scalars

            return Scalars(*["fp32"] * len(Scalars._fields))
        if name == "cs":
            return ("fp32",) * self.constants["T"]
        teachers = self.pointers.get("teachers", ())
        if name in (of_each := {"teacher_ptrs": None, "teacher_strides": "i32", "weights": "fp32"}):
            return tuple(of_each[name] or _POINTER[dtype] for dtype in teachers)
        return "fp32" if name in _FLOATS else "i32"

    def hints(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """Divisibility by 16 of every pointer and, in aligned rows, of every size and stride but the number of rows."""
        found = {}
        for at, (name, types) in enumerate(self.signature().items()):
            leaves = {(at, i): t for i, t in enumerate(types)} if isinstance(types, tuple) else {(at,): types}
            for path, leaf in leaves.items():
                if leaf.startswith("*") or (self.aligned and leaf == "i32" and name != "rows"):
                    found[path] = [["tt.divisibility", 16]]
        return found


def cases() -> Iterator[Case]:
    """Every kernel at every launch size, in representative types and flags."""
    yield from _logits_cases()
    yield from _topk_cases()
    yield from _attention_cases()
    yield from _hidden_cases()
    yield from codec_cases()
    from kdfast.backends.triton import capture_rows, drawing, scale, selection, selection_rows

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        options = {"num_warps": scale.WARPS, "enable_fp_fusion": True}
        yield Case(scale.scale_kernel, name, {"grad": dtype}, {"BLOCK": scale.BLOCK}, options)
        options = {"num_warps": selection.ORDER_WARPS, "enable_fp_fusion": True}
        flags = {"BLOCK": selection.ORDER_BLOCK, "RANK": selection.rank_block(selection.ORDER_BLOCK, selection.ORDER_WARPS)}
        yield Case(capture_rows.order_kernel, f"after {name}", {}, {**flags, "T": 2, "ONE": 1}, options)
        options = {"num_warps": selection.SELECT_WARPS, "enable_fp_fusion": True}
        for head, digits in ((0, selection.DIGITS[dtype]), (2, 4)):
            flags = {"HEAD": head, "DIGITS": digits, "BLOCK": selection.SELECT_BLOCK}
            yield Case(selection_rows.select_kernel, f"{name} head={head}", {"logits": dtype}, flags, options)
            options = {"num_warps": drawing.WARPS, "enable_fp_fusion": True}
            yield Case(
                drawing.draw_kernel, f"{name} head={head}", {"logits": dtype}, {**flags, "BLOCK": drawing.BLOCK}, options
            )


def _logits_cases() -> Iterator[Case]:
    """Forward KL at every size and mix of types; the rest where registers are tightest."""
    from kdfast.backends.triton.logits_rows import backward_kernel, forward_kernel

    bf16, fp32 = torch.bfloat16, torch.float32
    mixes = {"bf16": (bf16, bf16), "fp32": (fp32, fp32), "fp32+bf16": (fp32, bf16)}
    variants = _logits_variants()
    for vocab, (mix, (student, teacher)) in itertools.product(_VOCABS, mixes.items()):
        for name, flags in variants.items():
            usual = flags.kind == 0 and flags.teachers == 1 and flags.student_head == 0
            if not (usual or (mix, vocab) in (("bf16", 151936), ("bf16", 16384), ("bf16", 50257), ("fp32", 151936))):
                continue
            dtypes = (student, *(teacher,) * flags.teachers)
            for kernel, own in ((forward_kernel, flags), (backward_kernel, dataclasses.replace(flags, parts=False))):
                yield _logits_case(kernel, f"{mix} V={vocab} {name}", dtypes, own, vocab, phased=own.phased)
                if vocab % 16 and own.phased:
                    yield _logits_case(kernel, f"{mix} V={vocab} {name} scattered", dtypes, own, vocab, phased=False)


def _logits_variants() -> dict[str, Any]:
    """The usual flags, each divergence, and those that hold the most registers."""
    from kdfast.backends.triton import divergence
    from kdfast.backends.triton.logits import Flags

    soft = Flags()
    hard = Flags(labels=True, hard=True)
    every = dataclasses.replace(hard, student_head=2, teacher_head=2, smooth=True, z=True)
    kinds = {kind: int(getattr(divergence, kind.upper()).value) for kind in (*DIVERGENCES, "alpha_0", "beta_0", "both_0")}
    return {
        "soft": soft, "hard": hard, "hard T=2": dataclasses.replace(hard, squared=True),
        "hard T=1 parts": dataclasses.replace(hard, unit_t=True, parts=True),
        "hard parts extra": dataclasses.replace(hard, parts=True, extra=True),
        **{kind: dataclasses.replace(hard, kind=number) for kind, number in kinds.items() if number != 0},
        "jsd parts, all options": dataclasses.replace(every, kind=kinds["jsd"], parts=True),
        "all options": every,
        "2 teachers' probs": dataclasses.replace(hard, teachers=2, mixed=True),
        "3 teachers' logits": dataclasses.replace(hard, teachers=3),
        "4 teachers' probs, jsd parts": dataclasses.replace(hard, teachers=4, mixed=True, kind=kinds["jsd"], parts=True),
    }  # fmt: skip


def _logits_case(kernel: Any, label: str, dtypes: tuple[torch.dtype, ...], flags: Any, vocab: int, phased: bool = True) -> Case:
    from kdfast.backends.triton import tiles

    ragged = tiles.ALIGNED if vocab % 16 == 0 else tiles.PHASED if phased else tiles.SCATTERED
    size = tiles.launch(vocab, *dtypes, heavy=flags.heavy, ragged=ragged.value)
    pointers = {"student": dtypes[0], "grad": dtypes[0], "teachers": dtypes[1:]}
    return _row_case(kernel, label, pointers, {"F": flags}, size)


def _topk_cases() -> Iterator[Case]:
    """The usual losses at every size, the rest where registers are tightest; capture, and draws."""
    from kdfast.backends.triton import drawing, selection, selection_rows, tiles, topk_rows
    from kdfast.backends.triton.logits import Flags

    variants = _topk_variants()
    for vocab, (name, dtype) in itertools.product(_VOCABS, (("bf16", torch.bfloat16), ("fp32", torch.float32))):
        ragged = (tiles.SCATTERED if vocab % 16 else tiles.ALIGNED).value
        for flag, flags in variants.items():
            if not (flag in ("soft", "hard") or vocab in (151936, 50257)):
                continue
            size = tiles.launch(vocab, dtype, heavy=flags.heavy, ragged=ragged)
            pointers = {"student": dtype, "grad": dtype, "teachers": (torch.float32,) * flags.teachers}
            for kernel, own in ((topk_rows.forward_kernel, flags), (topk_rows.backward_kernel, _in_backward(flags))):
                yield _row_case(kernel, f"{name} V={vocab} k=64 {flag}", pointers, {"F": own, "K": 64}, size)
        size = tiles.launch(vocab, dtype, ragged=ragged)
        for head, digits in ((0, selection.DIGITS[dtype]), (2, 4)):
            yield from _capture_cases(name, dtype, vocab, size, head, digits)
            flags = {"HEAD": head, "DIGITS": digits, "T": 2, "NUMBER": 0}
            yield _row_case(selection_rows.sums_kernel, f"{name} V={vocab} head={head}", {"logits": dtype}, flags, size)
        yield _row_case(drawing.unlisted_kernel, f"{name} V={vocab} k=64", {"logits": dtype}, {"F": Flags(), "K": 64}, size)


def _capture_cases(name: str, dtype: Any, vocab: int, size: Any, head: int, digits: int) -> Iterator[Case]:
    from kdfast.backends.triton import capture_rows, selection

    size = selection.in_pairs(size)
    for k, temperatures in ((64, (2.0, 1.0)), (selection.MOST, (2.5, 1.0, 0.5))):
        if k > 64 and vocab not in (151936, 50257):
            continue
        room = selection.room_of(k)
        flags = {
            "T": len(temperatures), "ONE": temperatures.index(1.0), "SQUARED": selection.squares(temperatures),
            "HEAD": head, "DIGITS": digits, "ROOM": room, "RANK": selection.rank_block(room, size.warps),
            "BLOCK": 32 * size.warps, **size.shape,
        }  # fmt: skip
        label = f"{name} V={vocab} k={k} head={head}"
        yield Case(capture_rows.capture_kernel, label, {"logits": dtype}, flags, size.options, not size.ragged)


def _in_backward(flags: Any) -> Any:
    return dataclasses.replace(flags, parts=False, grad=True)


def _topk_variants() -> dict[str, Any]:
    """The usual flags, each tail's divergences, and those that hold the most registers."""
    from kdfast.backends.triton import divergence
    from kdfast.backends.triton.topk import Flags

    hard, reverse, jsd = Flags(labels=True, hard=True), divergence.REVERSE_KL.value, divergence.JSD.value
    every = dataclasses.replace(hard, student_head=2, smooth=True, z=True, parts=True, extra=True)
    return {
        "soft": Flags(), "hard": hard, "hard T=2": dataclasses.replace(hard, squared=True),
        "hard T=1 parts": dataclasses.replace(hard, unit_t=True, parts=True),
        "reverse": dataclasses.replace(hard, kind=reverse), "jsd": dataclasses.replace(hard, kind=jsd),
        "uniform": dataclasses.replace(hard, spread=True), "uniform jsd": dataclasses.replace(hard, spread=True, kind=jsd),
        "all options": every,
        "3 targets, uniform jsd parts": dataclasses.replace(hard, spread=True, kind=jsd, teachers=3, parts=True),
    }  # fmt: skip


def _attention_cases() -> Iterator[Case]:
    from kdfast.backends.triton import attention, attention_half, attention_wide
    from kdfast.backends.triton import attention_tiles as tiles

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
    for (name, dtype), (ds, dt), kind in itertools.product(dtypes.items(), _HEADS, (2, 1, 0)):
        if dtype == torch.float16 and ds != dt:
            continue
        pointers = dict.fromkeys(("q_s", "k_s", "q_t", "k_t", "grad"), dtype)
        small = dtype != torch.float32 and ds == dt == 64
        variants = [(1 << 30, True), *([(1 << 30, False)] if kind == 1 else []), *([(1, True)] if small and kind else [])]
        for programs, masks in variants:
            flags = tiles.flags(kind, ds, dt, dtype, masks, masks, masks)
            by_queries, by_keys = (
                tiles.launch(ds, dt, dtype, keys, programs, older=False, key_mask=masks, scores=kind == 0)
                for keys in (False, True)
            )
            few = " few" if programs == 1 else ""
            label = f"{name} D={ds},{dt} {('scores', 'probs', 'kl')[kind]}{few}{'' if masks else ' no masks'}"
            kernels = attention_wide if dtype == torch.float32 else attention_half
            was = {"PRECISION": tiles.flags(kind, ds, dt, dtype, masks, masks, masks, older=True)["PRECISION"]}
            was_queries, was_keys = (
                tiles.launch(ds, dt, dtype, keys, programs, older=True, key_mask=masks, scores=kind == 0)
                for keys in (False, True)
            )
            queries = {**flags, **by_queries.of_queries, "GRAD": True}
            older = ({**was, **was_queries.of_queries}, was_queries.options)
            yield Case(kernels.queries_kernel, label, pointers, queries, by_queries.options, older=older)
            older = ({**was, **was_keys.of_keys}, was_keys.options)
            yield Case(kernels.keys_kernel, label, pointers, {**flags, **by_keys.of_keys}, by_keys.options, older=older)
    yield from _gram_cases()
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        flags = {"MASK": True, "GRAD": True, "BLOCK": attention.MAP_BLOCK}
        options = {"num_warps": attention.MAP_WARPS, "enable_fp_fusion": True}
        pointers = {"student": dtype, "teacher": dtype, "grad": dtype}
        yield Case(tiles.map_kernel, name, pointers, flags, options)


def _gram_cases() -> Iterator[Case]:
    """Sums in float32 of equal scales and of others, and in float64."""
    from kdfast.backends.triton import attention_grams as grams

    sides = ("q_s", "k_s", "q_t", "k_t", "grad_q", "grad_k")
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for label, sums, unit in (("", torch.float32, True), (" scales", torch.float32, False), (" f64", torch.float64, False)):
            flags = grams.flags(sums, sums == torch.float32, unit, True, True, True)
            pointers = dict.fromkeys(sides, dtype) | dict.fromkeys(("partial", "share", "by_keys", "by_queries"), sums)
            own = {key: flags[key] for key in ("DIFFERENCE", "WIDE", "TILE")} | {"GRAD": True}
            yield Case(grams.gram_kernel, name + label, pointers, {**flags, "STEP": grams.STEP}, grams.OPTIONS)
            yield Case(grams.finish_kernel, name + label, pointers, own, grams.FINISH_OPTIONS)
            constants = {**flags, "GRAD": True, "ROWS": grams.ROWS, "SHARES": 4}
            older = ({"ROWS": grams.OLDER_ROWS}, {})
            yield Case(grams.gradients_kernel, name + label, pointers, constants, grams.OPTIONS, older=older)


def _hidden_cases() -> Iterator[Case]:
    from kdfast.backends.triton import hidden

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        options = {"num_warps": hidden.WARPS, "enable_fp_fusion": True}
        for kernel, block in itertools.product((hidden.mse_kernel, hidden.cosine_kernel), (1024, hidden.BLOCK)):
            pointers = {"student": dtype, "bias": dtype, "teacher": dtype, "grad": dtype}
            flags = {"BLOCK": block, "GRAD": True, **({"BIAS": True} if kernel is hidden.mse_kernel else {})}
            yield Case(kernel, f"{name} block={block}", pointers, flags, options)


def codec_cases() -> Iterator[Case]:
    """The usual rows, and those with the most to hold."""
    from kdfast.backends.triton import codec
    from kdfast.backends.triton.codec_rows import decode_kernel
    from kdfast.options import CodecLayout

    layouts = {
        "topk": CodecLayout(64, 151936, (1.0,)), "topk 3 T": CodecLayout(64, 151936, (0.5, 1.0, 2.0)),
        "sampled": CodecLayout(64, 151936, (1.0,), samples=64),
        "mixed 3 T": CodecLayout(64, 151936, (1.0, 2.0, 4.0), 32, True, 2.0),
    }  # fmt: skip
    for name, layout in layouts.items():
        constants = {"F": codec.Flags.of(layout), "BITS": codec.BITS}
        yield Case(decode_kernel, name, {}, constants, codec.OPTIONS, aligned=False)
        if layout.samples:  # arguments that are 1 are compiled in
            yield Case(decode_kernel, f"{name}, ones", {}, {**constants, "k": 1, "vocab": 1, "samples": 1}, codec.OPTIONS)


def _row_case(kernel: Any, label: str, pointers: dict[str, Any], flags: dict[str, Any], size: Any) -> Case:
    return Case(kernel, label, pointers, {**flags, **size.shape}, size.options, not size.ragged)
