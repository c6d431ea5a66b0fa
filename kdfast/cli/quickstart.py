"""`kdfast quickstart`: the whole product on real text that is on every machine, with the numbers it ends in."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdfast.cli.quickstart_job import Corpus, Job


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quickstart", help="teacher, cache, students with and without distillation, on text every machine has",
        epilog="example: kdfast quickstart --seeds 1,2,3 --out runs/quickstart",
        description="Trains a teacher on Python's standard library, captures it to a cache, trains the same student on hard"
        " labels and from the cache, evaluates on held-out files, and times the losses. Killed and run again, it goes on from"
        " what is finished.",
    )  # fmt: skip
    parser.add_argument("--seeds", default="1", help="seeds of the students, comma-separated (default %(default)s)")
    parser.add_argument("--out", default="runs/quickstart", help="where everything goes (default %(default)s)")
    parser.add_argument("--short", action="store_true", help="the same path in about a minute, too small for a claim")
    parser.add_argument("--fresh", action="store_true", help="do not continue what an earlier quickstart left in --out")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    seeds = read_seeds(args.seeds)

    from kdfast.cli.progress import bar
    from kdfast.cli.quickstart_job import Job, Plan
    from kdfast.cli.quickstart_report import draw, show
    from kdfast.files import json_text, write_json

    began = time.perf_counter()
    lines = sys.stderr if args.json else sys.stdout
    plan = Plan.short() if args.short else Plan()
    job = Job(Path(args.out), plan, seeds, bar, lambda line: print(line, file=lines, flush=True))
    job.prepare(args.fresh)
    summary = measure(job)
    summary["short"] = args.short
    summary["seconds"] = time.perf_counter() - began
    write_json(job.out / "summary.json", summary)
    draw(job.out, seeds, summary)
    if args.json:
        print(json_text(summary))
    else:
        show(summary, job.out)
    return 0


def read_seeds(text: str) -> list[int]:
    """Different whole numbers, comma-separated."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds: expected whole numbers like 1,2,3, got {text!r}") from None
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"--seeds: expected different numbers >= 0, got {text!r}")
    return seeds


def measure(job: Job) -> dict[str, Any]:
    """Runs every stage, or reads what a stage left; returns the summary."""
    from kdfast.cli.quickstart_speed import speed

    plan = job.plan
    corpus = job.corpus()
    text, own = corpus.train.ids.numel(), corpus.transfer.ids.numel()
    job.say(f"corpus: {text:,} tokens for the teacher, {own:,} others for students, from {corpus.folder}")
    teacher = job.teacher(corpus)
    job.say(f"teacher: {plan.teacher_steps} steps in {teacher.seconds:.0f} s")
    cache = job.capture(corpus, teacher)
    job.say(f"cache: {cache['tokens']:,} tokens, {cache['bytes_per_token']:.0f} bytes each, KL {cache['kl']:.1e}")
    students = _students(job, corpus, cache["capture_seconds"])
    job.say("speed: kd_loss and linear_kd_loss against plain PyTorch")
    from kdfast.train.run_folder import environment

    return {
        "teacher": job.test(corpus, teacher), **students, "cache": cache, "speed": speed(), "seeds": job.seeds,
        "data": {"folder": corpus.folder, "files": dict(zip(("train", "validation", "test"), corpus.files, strict=True)),
                 "train_tokens": text, "student_tokens": own, "hash": corpus.train.digest,
                 "teacher_tokens_read": min(plan.teacher_steps * plan.batch_size * plan.length, text),
                 "student_epochs": plan.student_steps * plan.batch_size * plan.length / own},
        "loss": {"temperature": plan.temperature, "soft_weight": plan.soft_weight, "hard_weight": plan.hard_weight},
        "environment": environment(),
    }  # fmt: skip


def _students(job: Job, corpus: Corpus, capture_seconds: float) -> dict[str, Any]:
    """Every student of every seed: `ce` and `kd` at equal steps, `ce_longer` at the seconds of capture and `kd`."""
    found: dict[str, list[dict[str, float]]] = {"ce": [], "kd": [], "ce_longer": []}
    for seed in job.seeds:
        job.say(f"students of seed {seed}: hard labels, from the cache, hard labels for as long as capture and that one")
        plain = job.student("ce", corpus, job.plan.student_steps, seed)
        distilled = job.student("kd", corpus, job.plan.student_steps, seed)
        longer = job.student("ce_longer", corpus, job.longer_steps(plain, distilled, capture_seconds), seed)
        for name, result in (("ce", plain), ("kd", distilled), ("ce_longer", longer)):
            found[name].append(job.test(corpus, result))
    return {f"student_{name}": _over_seeds(rows) for name, rows in found.items()}


def _over_seeds(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Means over the seeds, the spread (largest - smallest) of the perplexity, and each seed's own numbers."""
    keys = ("ppl", "top1", "seconds", "steps", "best_ppl", "best_step")
    out: dict[str, Any] = {key: statistics.fmean(row[key] for row in rows) for key in keys}
    for key in ("ppl", "best_ppl"):
        out[f"{key}_spread"] = max(row[key] for row in rows) - min(row[key] for row in rows)
    out["per_seed"] = {key: [row[key] for row in rows] for key in keys}
    return out
