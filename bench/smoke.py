"""The public calls a GPU meets first: every op in few calls, its value and gradients against float64.

kdfast bench smoke                    on this machine's GPU
kdfast bench smoke --launch           no GPU: Triton's own binder and compiler for sm_90, nothing is run (`bench.launch`)
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kdfast
from kdfast.options import DIVERGENCES

from .commands import Parser
from .launch import checked_calls

#: Largest error of a tensor over its largest value, by the dtype it is in.
_ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
#: Products of float32 heads may run in TF32, which is what PyTorch allows or not.
_ALLOWED_PRODUCT = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Call:
    """A public call: `run(inputs)` on tensors that `make(generator)` drew, gradients of the `trained` ones."""

    name: str
    make: Callable[[torch.Generator], dict[str, Tensor]]
    run: Callable[..., Tensor]
    trained: tuple[str, ...]
    dtype: torch.dtype
    product: bool = False


def calls() -> list[Call]:
    """In order of worth."""
    return [*_logits(), *_topk(), *_linear(), *_pairs(), *_matching()]


def _rows(vs: int, vt: int | None = None, n: int = 9, teachers: int = 1) -> Callable[[torch.Generator], dict[str, Tensor]]:
    def make(g: torch.Generator) -> dict[str, Tensor]:
        labels = torch.randint(0, vs, (n,), generator=g)
        labels[n // 2] = -100
        found = {"student": 3 * torch.randn(n, vs, generator=g), "labels": labels}
        return found | {f"teacher{i}": 3 * torch.randn(n, vt or vs, generator=g) for i in range(teachers)}

    return make


def _kd(**options: Any) -> Callable[..., Tensor]:
    def run(student: Tensor, labels: Tensor, **teachers: Tensor) -> Tensor:
        given: Any = list(teachers.values())
        inputs = student.mul(1) if options.get("overwrite_logits") and student.requires_grad else student
        out = kdfast.kd_loss(inputs, given if len(given) > 1 else given[0], labels, **options)
        return out[0] if isinstance(out, tuple) else out

    return run


def _logits() -> list[Call]:
    both = {"soft_weight": 0.7, "hard_weight": 0.3}
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        for vocab in (1, 50257, 128256):
            for t in (1.0, 2.0):
                name = f"kd_loss {short} V={vocab} T={t:g}"
                found.append(Call(name, _rows(vocab), _kd(temperature=t, **both), ("student",), dtype))
    half, rows = torch.bfloat16, _rows(50257)
    found += [
        Call("kd_loss float16", rows, _kd(temperature=2.0, **both), ("student",), torch.float16),
        Call("kd_loss overwrite", _rows(128256), _kd(temperature=2.0, overwrite_logits=True, **both), ("student",), half),
        Call("kd_loss parts", rows, _kd(temperature=2.0, return_parts=True, **both), ("student",), half),
        Call("kd_loss rows", rows, _kd(temperature=2.0, reduction="none", **both), ("student",), half),
        Call("kd_loss smoothing, z", rows, _kd(label_smoothing=0.1, z_loss=1e-4, **both), ("student",), half),
        Call("kd_loss softcap", rows, _kd(student_head=kdfast.Head(30.0), **both), ("student",), half),
        Call("kd_loss two teachers", _rows(50257, teachers=2), _kd(teacher_weights=[2, 1]), ("student",), half),
        Call("kd_loss mean of logits", _rows(50257, teachers=2), _kd(teacher_mix="logits"), ("student",), half),
        Call("kd_loss sizes differ", _rows(5003, 4000), _kd(temperature=2.0, **both), ("student",), half),
        Call("kd_loss only hard", rows, _kd(soft_weight=0.0, hard_weight=1.0), ("student",), half),
    ]  # fmt: skip
    return found + [
        Call(f"kd_loss {kind}", rows, _kd(divergence=kind, temperature=2.0, **both), ("student",), torch.float32)
        for kind in DIVERGENCES[1:]
    ]


def _topk() -> list[Call]:
    def capture(**options: Any) -> Callable[..., Tensor]:
        def run(student: Tensor, labels: Tensor, teacher0: Tensor) -> Tensor:
            t = kdfast.topk_targets(teacher0, 64, temperatures=(1.0, 2.0), **options)
            kept = t.logprobs.where(t.ids >= 0, 0.0)
            return torch.cat([kept.double(), t.log_z.double(), t.log_tail.double()], -1).sum() + 0 * student.sum()

        return run

    def loss(**options: Any) -> Callable[..., Tensor]:
        def run(student: Tensor, labels: Tensor, teacher0: Tensor) -> Tensor:
            with kdfast.use_backend("reference"):
                t = kdfast.topk_targets(teacher0, 16, temperatures=(1.0, 2.0))
            return kdfast.topk_kd_loss(student, t, labels, temperature=2.0, hard_weight=0.5, **options)

        return run

    half = torch.bfloat16
    found = [Call(f"topk_targets {str(d)[6:]}", _rows(128256), capture(), (), d) for d in (half, torch.float32)]
    found += [
        Call(f"topk_kd_loss {tail}", _rows(50257), loss(tail=tail), ("student",), half)
        for tail in ("ghost", "renormalize", "uniform", "none")
    ]
    found += [
        Call(f"topk_kd_loss {kind}", _rows(50257), loss(divergence=kind), ("student",), torch.float32)
        for kind in ("reverse_kl", "jsd")
    ]
    return found


def _heads(
    n: int = 96, vocab: int = 32000, dims: tuple[int, int] = (256, 512)
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    def make(g: torch.Generator) -> dict[str, Tensor]:
        labels = torch.randint(0, vocab, (n,), generator=g)
        labels[n // 2] = -100
        ds, dt = dims
        return {
            "hidden": torch.randn(n, ds, generator=g), "weight": 0.1 * torch.randn(vocab, ds, generator=g), "labels": labels,
            "teacher_hidden": torch.randn(n, dt, generator=g), "teacher_weight": 0.1 * torch.randn(vocab, dt, generator=g),
        }  # fmt: skip

    return make


def _linear() -> list[Call]:
    both = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3, "workspace_mb": 8}

    def kd(**options: Any) -> Callable[..., Tensor]:
        def run(hidden: Tensor, weight: Tensor, labels: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
            out = kdfast.linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, labels, **both, **options)
            return out[0] if isinstance(out, tuple) else out

        return run

    def sparse(hidden: Tensor, weight: Tensor, labels: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        t = kdfast.linear_topk_targets(teacher_hidden, teacher_weight, 16, temperatures=(1.0, 2.0), workspace_mb=8)
        return kdfast.linear_topk_kd_loss(hidden, weight, t, labels, temperature=2.0, hard_weight=0.5, workspace_mb=8)

    def match(hidden: Tensor, weight: Tensor, labels: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        return kdfast.linear_logit_mse(hidden, weight, teacher_hidden, teacher_weight)

    trained = ("hidden", "weight")
    return [
        Call("linear_kd_loss bfloat16", _heads(), kd(), trained, torch.bfloat16, product=True),
        Call("linear_kd_loss float32", _heads(), kd(), trained, torch.float32, product=True),
        Call("linear_kd_loss float16", _heads(), kd(), trained, torch.float16, product=True),
        Call("linear_kd_loss half logits", _heads(), kd(logits_dtype=torch.bfloat16), trained, torch.bfloat16, product=True),
        Call("linear_kd_loss parts", _heads(), kd(return_parts=True), trained, torch.bfloat16, product=True),
        Call("linear_kd_loss rows", _heads(), kd(reduction="none"), trained, torch.bfloat16, product=True),
        Call("linear_topk", _heads(), sparse, trained, torch.bfloat16, product=True),
        Call("linear_logit_mse", _heads(vocab=4000), match, trained, torch.bfloat16, product=True),
    ]  # fmt: skip


def _pairs() -> list[Call]:
    def make(g: torch.Generator) -> dict[str, Tensor]:
        found = {name: torch.randn(2, 3, 130, 64, generator=g) for name in ("q_s", "k_s", "q_t", "k_t")}
        mask = torch.ones(2, 130, dtype=torch.bool)
        mask[0, 100:] = False
        return found | {"mask": mask}

    def mse(**options: Any) -> Callable[..., Tensor]:
        def run(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor) -> Tensor:
            call = kdfast.attention_kl if options.get("kl") else kdfast.attention_mse
            given = {k: v for k, v in options.items() if k != "kl"}
            return call(q_s, k_s, q_t, k_t, query_mask=mask, key_mask=mask, **given)

        return run

    def maps(g: torch.Generator) -> dict[str, Tensor]:
        return {"maps_s": torch.randn(2, 3, 65, 65, generator=g), "maps_t": torch.randn(2, 3, 65, 65, generator=g)}

    trained = ("q_s", "k_s")

    def many(g: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.randn(66000, 1, 2, 16, generator=g) for name in ("q_s", "k_s", "q_t", "k_t")} | {
            "mask": torch.ones(66000, 2, dtype=torch.bool)
        }

    return [
        call
        for dtype in (torch.bfloat16, torch.float32)
        for call in (
            Call(f"attention_mse scores {str(dtype)[6:]}", make, mse(), trained, dtype, product=True),
            Call(f"attention_mse probs {str(dtype)[6:]}", make, mse(on="probs", causal=True), trained, dtype, product=True),
            Call(f"attention_kl {str(dtype)[6:]}", make, mse(kl=True, causal=True), trained, dtype, product=True),
        )
    ] + [
        # More heads than a grid has blocks along y.
        Call("attention_kl 66000 heads", many, mse(kl=True), trained, torch.float32),
        Call(
            "attention_map_mse",
            maps,
            lambda maps_s, maps_t: kdfast.attention_map_mse(maps_s, maps_t),
            ("maps_s",),
            torch.bfloat16,
        ),
    ]


def _matching() -> list[Call]:
    def make(g: torch.Generator) -> dict[str, Tensor]:
        mask = torch.arange(300) % 7 != 0
        return {"h_s": torch.randn(300, 192, generator=g), "h_t": torch.randn(300, 384, generator=g),
                "projection": 0.1 * torch.randn(384, 192, generator=g), "mask": mask}  # fmt: skip

    def projected(h_s: Tensor, h_t: Tensor, projection: Tensor, mask: Tensor) -> Tensor:
        return kdfast.hidden_mse(h_s, h_t, projection, mask=mask)

    def plain(h_s: Tensor, h_t: Tensor, projection: Tensor, mask: Tensor) -> Tensor:
        return kdfast.hidden_mse(h_s, h_t[:, :192], mask=mask)

    def cosine(h_s: Tensor, h_t: Tensor, projection: Tensor, mask: Tensor) -> Tensor:
        return kdfast.hidden_cosine(h_s, h_t[:, :192], mask=mask)

    half = torch.bfloat16
    return [
        Call("hidden_mse projected", make, projected, ("h_s", "projection"), half, product=True),
        Call("hidden_mse", make, plain, ("h_s",), half),
        Call("hidden_cosine", make, cosine, ("h_s",), half),
    ]


def outputs(call: Call, device: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Value and gradients of a call, its inputs rounded to the call's dtype and then held in `dtype` (None: that one)."""
    inputs = call.make(torch.Generator().manual_seed(0))
    for name, value in inputs.items():
        if value.is_floating_point():
            value = value.to(call.dtype).to(dtype or call.dtype)
        inputs[name] = value.to(device).requires_grad_(name in call.trained)
    loss = call.run(**inputs)
    total = (loss * torch.linspace(0.5, 2, loss.numel(), device=device)).sum() if loss.ndim else loss
    if call.trained:
        (total / 3).backward()
    return {"value": total.detach()} | {name: inputs[name].grad for name in call.trained}


def check(call: Call, device: str, backend: str | None = None) -> str:
    """What is wrong with a call on a device, against the reference in float64 there, or ""."""
    with contextlib.nullcontext() if backend is None else kdfast.use_backend(backend):
        got = outputs(call, device)
    with kdfast.use_backend("reference"):
        truth = outputs(call, device, torch.float64)
    wrong = []
    for name, want in truth.items():
        value = got[name]
        dtype = torch.float32 if name == "value" else value.dtype
        allowed = (_ALLOWED_PRODUCT if call.product else _ALLOWED)[dtype if name != "value" or not call.product else call.dtype]
        difference = float((value.double() - want.double()).abs().max())
        error = difference / max(float(want.double().abs().max()), 1e-30)
        if not (error <= allowed or difference <= 1e-7):  # NaN is neither
            wrong.append(f"{name} off by {error:.1e} of its largest, allowed {allowed:.0e}")
    return "; ".join(wrong)


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with whole numbers 0 <= I < N, such as 0/2, got {text!r}")
    return int(found[1]), int(found[2])


def chosen(words: list[str], part: tuple[int, int]) -> list[Call]:
    """The calls that have one of some words in their names (no words: all), and of those every N-th from the I-th.

    Raises:
        ValueError: a word is in no call's name.
    """
    known = calls()
    if unknown := [word for word in words if not any(word in call.name for call in known)]:
        raise ValueError(f"expected words in the names of the calls, such as kd_loss or attention_kl, got {unknown[0]!r}")
    return [call for call in known if not words or any(word in call.name for word in words)][part[0] :: part[1]]


def main(argv: list[str]) -> int:
    p = Parser(
        prog="kdfast bench smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: kdfast bench smoke --launch kd_loss",
    )  # fmt: skip
    p.add_argument("calls", nargs="*", help="words in the names of the calls to make; none: all")
    p.add_argument("--launch", action="store_true", help="compile for sm_90 what would be launched; needs no GPU")
    p.add_argument("--part", default=(0, 1), type=_part, metavar="I/N", help="every N-th call, from the I-th (0 is the first)")
    args = p.parse_args(argv)
    try:
        wanted = chosen(args.calls, args.part)
    except ValueError as error:
        p.error(f"argument calls: {error}")
    if not wanted:
        print(f"bench smoke: part {args.part[0]}/{args.part[1]} has no calls")
        return 0
    if args.launch:
        return 1 if checked_calls(wanted, check, trace=bool(args.calls)) else 0
    if not torch.cuda.is_available():
        print("bench smoke: torch sees no CUDA device; --launch compiles what would be launched, with no GPU", file=sys.stderr)
        return 2
    failed = 0
    for call in wanted:
        began = time.perf_counter()
        try:
            wrong = check(call, "cuda")
        except Exception as error:  # the rest is to be seen too
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        failed += bool(wrong)
        print(f"{'FAIL' if wrong else 'ok  '}  {call.name} ({time.perf_counter() - began:.1f} s) {wrong}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
