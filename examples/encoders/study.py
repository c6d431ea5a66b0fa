"""Every run of the encoder examples, one after another: teachers, students alone and distilled, ablations.

python study.py [NAME ...] [--seeds 1,2,3] [--precision bf16] [--list] [--table] [--picture] [--speed]

Run it in the folder that has `data` (prepare.py) and `encoder`. A name may have `*`. What a run needs is run first; what is
done is left as it is, and a run that was stopped goes on. `results.json` has the scores of each run: on the validation rows,
which everything was chosen by, and on the test rows. A teacher is trained once; seeds are the students'. Where a processor has
matrix instructions for it, `--precision bf16` is faster; every run of one folder has the same.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from runs import RUNS, SHARES, recipe_of

from kdfast import files
from kdfast.extras import need
from kdfast.models.load import load_folder, read_config
from kdfast.text.tokenizers import load_tokenizer
from kdfast.train import Recipe, distill, evaluate
from kdfast.train.tasks import task_class
from kdfast.train.tasks.classes import ClassTask

RESULTS = Path("results.json")


def scores(model: Path, recipe: Recipe, tests: Sequence[str]) -> dict[str, Any]:
    """The task's scores of a model on the rows of the files `tests`."""
    cls = task_class(recipe.task.name)
    task = cls(recipe.task.options, replace(recipe.data, train=(), validation=tuple(tests)))
    if isinstance(task, ClassTask):
        task.take_classes([read_config(model)])
    tokenizer, home = load_tokenizer(model)
    rows = task.open(tokenizer, home, model.parent / "test", False).validation
    return dict(evaluate(load_folder(model, "model", kind=cls.kind), rows, batch_size=64, task=task))


def parameters(model: torch.nn.Module) -> dict[str, int]:
    embeddings = sum(p.numel() for name, p in model.named_parameters() if "embeddings" in name)
    whole = sum(p.numel() for p in model.parameters())
    return {"parameters": whole, "without_embeddings": whole - embeddings}


def carry_out(name: str, seed: int, precision: str, known: dict[str, Any]) -> None:
    """The run, after what it needs, and its scores in `known` and in the file."""
    run = RUNS[name]
    seed = seed if run.seeded else 1
    for needed in run.needs:
        carry_out(needed, seed, precision, known)
    key = f"{name}:{seed}"
    if key in known:
        return
    recipe = recipe_of(name, seed, precision)
    print(f"{key}: {recipe.total_steps} steps", flush=True)
    result = distill(recipe)
    kind = task_class(recipe.task.name).kind
    found = {
        "validation": dict(result.evaluation or {}), "test": scores(result.model, recipe, run.test), "steps": result.steps,
        "seconds": round(result.seconds, 1), "precision": precision,
        **parameters(load_folder(result.model, "model", kind=kind)),
    }  # fmt: skip
    keep(key, found, known)


def keep(key: str, found: Mapping[str, Any], known: dict[str, Any]) -> None:
    """In `known` and in the file, where another study may have written meanwhile."""
    with files.locked(Path()):
        known |= {**done(), key: found}
        files.write_json(RESULTS, known)


def done() -> dict[str, Any]:
    """What `results.json` has."""
    if not RESULTS.is_file():
        return {}
    try:
        found = files.read_json(RESULTS)
    except ValueError as error:
        raise SystemExit(f"{error}; move it away: finished runs are scored again, and none is trained twice") from None
    if not isinstance(found, dict):
        raise SystemExit(f"{RESULTS}: expected runs by name, got a {type(found).__name__}; move it away")
    return found


def headline(found: Mapping[str, Any]) -> tuple[str, float]:
    return next((name, found[name]) for name in ("entity_f1", "accuracy", "ppl") if name in found)


def table(known: Mapping[str, Any]) -> str:
    """Mean and spread of every run's score, in Markdown; the share of its teacher's where there is one."""
    lines = [
        "| Run | Seeds | Score | Validation | Test | of the teacher | Parameters | without embeddings | Minutes |",
        "|---" * 9 + "|",
    ]
    for name in RUNS:
        rows = [value for key, value in known.items() if key.rsplit(":", 1)[0] == name]
        if not rows:
            continue
        what = headline(rows[0]["test"])[0]
        held, test = ([number(row[part].get(what)) for row in rows] for part in ("validation", "test"))
        its = next((needed for needed in RUNS[name].needs if "teacher" in needed), f"{name.split('/')[0]}/teacher")
        teacher = known.get(f"{its}:1") if RUNS[name].seeded else None
        share = ""
        if teacher is not None and what in teacher["test"] and what != "ppl":
            domain = name.split("/")[1].split("-")[0]
            whole = teacher["test"].get(f"{what}_{domain}", teacher["test"][what])
            share = f"{spread([score / whole for score in test], what)} %" if whole else ""
        minutes = statistics.mean(row["seconds"] for row in rows) / 60
        lines.append(
            f"| {name} | {len(rows)} | {what} | {spread(held, what)} | {spread(test, what)} | {share} |"
            f" {rows[0]['parameters'] / 1e6:.2f} M | {rows[0]['without_embeddings'] / 1e6:.2f} M | {minutes:.1f} |"
        )
    return "\n".join(lines)


def spread(values: Sequence[float], what: str) -> str:
    """Mean and standard deviation, of shares in percent; "-" where a run has no score, as it has diverged."""
    scale = 1.0 if what == "ppl" else 100.0
    if not all(map(math.isfinite, values)):
        return "-"
    mean = f"{statistics.mean(values) * scale:.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) * scale:.2f}"


def number(score: float | None) -> float:
    return math.nan if score is None else score


def picture(known: Mapping[str, Any], file: Path) -> None:
    """Test accuracy of every seed: students of SST-2, with most seeds, and of one domain over the share of its reviews."""
    figure = need("matplotlib.figure", extra="train", what=file.name).Figure(figsize=(12, 4.3), layout="constrained")
    students, shares = figure.subplots(1, 2)

    def accuracies(name: str) -> list[float]:
        found = (value["test"].get("accuracy") for key, value in known.items() if key.rsplit(":", 1)[0] == name)
        return [100 * score for score in found if score is not None]

    done = {name: len(accuracies(name)) for name in RUNS if name.startswith("sst2/") and RUNS[name].seeded}
    shown = [name for name, seeds in done.items() if seeds and seeds == max(done.values())]
    for place, name in enumerate(shown):
        color = "C1" if "alone" in name or "mlm" in name else "C0"
        students.plot(accuracies(name), [place] * len(accuracies(name)), "o", color=color, markersize=4)
    students.set_yticks(range(len(shown)), [name.removeprefix("sst2/") for name in shown], fontsize=8)
    students.invert_yaxis()
    for score in accuracies("sst2/teacher"):
        students.axvline(score, color="C7", linewidth=1, label="the teacher")
    for color, label in (("C0", "distilled"), ("C1", "not distilled")):
        students.plot([], [], "o", color=color, markersize=4, label=label)
    students.set(xlabel="accuracy on the test sentences of SST-2, %")
    ways = (("-meta", "meta-teacher of all domains"), ("-meta-unseen", "meta-teacher without electronics"), ("-alone", "alone"))
    for color, (way, label) in enumerate(ways):
        names = [f"reviews/electronics-{share:.0%}{way}" for share in SHARES]
        names = [name if name in RUNS else f"reviews/electronics{way}" for name in names]
        found = [(place, accuracies(name)) for place, name in enumerate(names) if accuracies(name)]
        shares.plot(
            *zip(*((place, statistics.mean(scores)) for place, scores in found), strict=True), color=f"C{color}", label=label
        )
        for place, scores in found:
            shares.plot([place] * len(scores), scores, "o", color=f"C{color}", markersize=4)
    shares.set_xticks(range(len(SHARES)), [f"{share:.0%}" for share in SHARES])
    shares.set(xlabel="of the training reviews of electronics", ylabel="accuracy on its test reviews, %")
    for axes in (students, shares):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    with files.written(file) as part:
        figure.savefig(part, format="png", dpi=140)


def speed(names: Sequence[str], repeats: int = 15) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass over 32 test rows of the runs' task, and over one: medians of interleaved rounds, with the
    first's ratio to each.
    """
    if not names:
        raise SystemExit("--speed: expected names of runs, the first one the measure, such as sst2/teacher sst2/tinybert")
    recipes = [recipe_of(name, 1) for name in names]
    folders = [Path(recipe.out) / "model" for recipe in recipes]
    for name, recipe, folder in zip(names, recipes, folders, strict=True):
        if recipe.task != recipes[0].task:
            raise SystemExit(f"--speed: expected runs of one task, got {names[0]} and {name}")
        if not folder.is_dir():
            raise SystemExit(f"--speed: {name} is not trained yet; run it first")
    cls, tests = task_class(recipes[0].task.name), RUNS[names[0]].test
    models = [load_folder(folder, "model", kind=cls.kind).eval() for folder in folders]
    task = cls(recipes[0].task.options, replace(recipes[0].data, train=(), validation=tuple(tests)))
    rows = task.open(*load_tokenizer(folders[0]), folders[0].parent / "test", False).validation
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for size in (32, 1):
        batch = rows.batch(range(size)).by_name
        seconds: list[list[float]] = [[] for _ in names]
        for turn in range(repeats + 2):
            for model, times in zip(models, seconds, strict=True):
                began = time.perf_counter()
                with torch.inference_mode():
                    model(**batch)
                if turn > 1:
                    times.append(time.perf_counter() - began)
        for name, times in zip(names, seconds, strict=True):
            ratio = statistics.median(first / mine for first, mine in zip(seconds[0], times, strict=True))
            found[name] |= {f"ms_{size}": 1e3 * statistics.median(times), f"times_faster_{size}": ratio}
    return found


def seeds(text: str) -> list[int]:
    if not all(word.isdecimal() for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between, such as 1,2,3, got {text!r}")
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="runs, perhaps with *")
    parser.add_argument("--seeds", type=seeds, default="1,2,3", help="of the students (default %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of training (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="name the runs")
    parser.add_argument("--table", action="store_true", help="print what is done")
    parser.add_argument("--picture", action="store_true", help="draw it: curves.png")
    parser.add_argument("--speed", action="store_true", help="time the models of the named runs, the first one the measure")
    args = parser.parse_args()
    if args.list:
        print("\n".join(RUNS))
        return
    known, wanted = done(), list[str]()
    for pattern in args.names:
        meant = [name for name in RUNS if fnmatch.fnmatch(name, pattern)]
        if not meant:
            raise SystemExit(f"no run is called {pattern}; --list names them")
        wanted += [name for name in meant if name not in wanted]
    if args.speed:
        print(json.dumps(speed(wanted), indent=2))
        return
    other = [key for key, value in known.items() if value.get("precision", args.precision) != args.precision]
    if wanted and other:
        raise SystemExit(f"--precision: expected {known[other[0]]['precision']}, which {RESULTS} has, got {args.precision}")
    if wanted and not (Path("data").is_dir() and Path("encoder").exists()):
        raise SystemExit("expected `data` (python prepare.py DATA) and `encoder` (README.md) in this folder")
    for seed in args.seeds:
        for name in wanted:
            carry_out(name, seed, args.precision, known)
    if not known:
        raise SystemExit(f"{RESULTS}: nothing is done yet; name runs, which --list has")
    if args.table:
        print(table(known))
    if args.picture:
        picture(known, Path("curves.png"))


if __name__ == "__main__":
    main()
