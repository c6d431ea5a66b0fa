"""Hinton's experiments on MNIST: a sweep of T, an ensemble in one network, a digit that the student never sees.

python study.py --out runs/hinton [--data FOLDER]      # IDX files of MNIST; default $KDFAST_DATA/mnist_t10k

Every choice is made on validation images; three seeds of every student; a run that is there is not run again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from mnist_runs import HERE, SEEDS, Study, size

TEMPERATURES = (1, 2, 4, 8, 20)
MEMBERS = 5
MISSING = 3
ALONE = ("method=supervised", "teacher=null")
#: Images shifted anew in every epoch, three times as many steps.
SHIFTED = ("data.shift=2", "steps=4200")
#: Learning rate and weight decay, the same choice for the small net alone and distilled.
GRID = [(3e-3, 0.01), (3e-3, 0.3), (1e-2, 0.01)]


def settings(lr: float, decay: float) -> list[str]:
    return [f"optimizer.lr={lr}", f"optimizer.weight_decay={decay}"]


def chosen(study: Study, name: str, *changes: str, grid: Sequence[tuple[float, float]] = GRID) -> list[str]:
    """The pair of `grid` that is best on validation images, with a seed that is used for nothing else."""

    def score(pair: tuple[float, float]) -> float:
        run = study.run(HERE / "recipe.yaml", f"choose/{name}-{pair[0]}-{pair[1]}", "seed=0", *changes, *settings(*pair))
        return study.accuracy(run, "validation")

    return settings(*max(grid, key=score))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/hinton"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--network", type=Path, help="a run of network.yaml on the same split; default: one is trained")
    args = parser.parse_args()
    print(study_of(Study(args.out, args.data), network=args.network))


def study_of(study: Study, seeds: Sequence[int] = SEEDS, temperatures: Sequence[int] = TEMPERATURES, members: int = MEMBERS,
             grid: Sequence[tuple[float, float]] = GRID, network: Path | None = None) -> str:  # fmt: skip
    """All of it; the table."""
    recipe = HERE / "recipe.yaml"
    network = network or study.run(HERE / "network.yaml", "network")
    taught = f"teacher.weights={network / 'model'}"

    def students(name: str, *changes: str) -> list[Path]:
        return [study.run(recipe, f"{name}-{seed}", f"seed={seed}", *changes) for seed in seeds]

    def row(group: str, what: str, runs: Sequence[Path], base: float | None = None, top: float | None = None) -> float:
        test = [study.accuracy(run) for run in runs]
        mean = statistics.fmean(test)
        gap = {} if base is None or top is None else {"share of the gap": f"{(mean - base) / (top - base):.0%}"}
        study.row(group, what, size(study.model(runs[0])), [study.accuracy(run, "validation") for run in runs], test, **gap)
        return mean

    # One network, one small net, T
    alone_settings, settings_ = chosen(study, "alone", *ALONE, grid=grid), chosen(study, "distilled", taught, grid=grid)
    top = row("T", "network", [network])
    alone = students("alone", *ALONE, *alone_settings)
    base = row("T", f"small net alone ({' '.join(alone_settings)})", alone)
    best, best_score = temperatures[0], -1.0
    for t in temperatures:
        runs = students(f"T{t}", taught, f"method.temperature={t}", *settings_)
        row("T", f"distilled, T = {t} ({' '.join(settings_)})", runs, base, top)
        score = statistics.fmean(study.accuracy(run, "validation") for run in runs)
        best, best_score = (t, score) if score > best_score else (best, best_score)
    hot = f"method.temperature={best}"

    # An ensemble of small nets in one of them, on images shifted anew in every epoch: on images that its members have learnt by
    # heart an ensemble says what each of them says.
    several = [
        study.run(recipe, f"member-{i}", f"seed={10 + i}", *ALONE, *SHIFTED, *alone_settings) for i in range(1, members + 1)
    ]
    single = row("ensemble", "one, from labels", students("single", *ALONE, *SHIFTED, *alone_settings))
    row("ensemble", "the members", several)
    models = [study.model(run) for run in several]
    scores = {}
    for part in ("validation", "test"):
        said = [study.logits(model, part) for model in models]
        together = torch.stack([logits.softmax(-1) for logits, _ in said]).mean(0).argmax(-1)
        scores[part] = float((together == said[0][1]).float().mean())
    study.row("ensemble", f"all {members} together", members * size(models[0]), [scores["validation"]], [scores["test"]])
    listed = ", ".join(f"{{function: 'networks:perceptron', weights: {run / 'model'}}}" for run in several)
    taught_by_all = ("teacher=null", f"teachers=[{listed}]", *SHIFTED, *settings_)

    def score(t: int) -> float:
        run = study.run(recipe, f"choose/ensembled-T{t}", "seed=0", *taught_by_all, f"method.temperature={t}")
        return study.accuracy(run, "validation")

    t = max(temperatures, key=score)
    runs = students("ensembled", *taught_by_all, f"method.temperature={t}")
    row("ensemble", f"one, distilled from all, T = {t}", runs, single, scores["test"])

    # A digit that no student sees
    hidden = f"data.exclude_labels=[{MISSING}]"
    for what, runs in (
        ("labels", students("missing-alone", *ALONE, hidden, *alone_settings)),
        ("the network's soft targets", students("missing", taught, hidden, hot, "method.soft_weight=1", "method.hard_weight=0",
                                                *settings_)),
    ):  # fmt: skip
        missing_row(study, f"no {MISSING} seen, {what}", runs)
    return study.table()


def missing_row(study: Study, what: str, runs: Sequence[Path]) -> None:
    """Accuracy on all digits and on the one that was never seen, as trained and with its bias raised.

    The bias is what gives the best accuracy on the validation images, as Hinton did on the test images.
    """
    plain: dict[str, list[float]] = {"validation": [], "test": [], "unseen": []}
    raised: dict[str, list[float]] = {"validation": [], "test": [], "unseen": []}
    biases = []
    digit = study.names.index(str(MISSING))
    for run in runs:
        model = study.model(run)
        parts = {part: study.logits(model, part) for part in ("validation", "test")}

        def accuracy(part: str, bias: float, only: bool = False, parts: dict = parts) -> float:
            logits, labels = parts[part]
            hit = (logits + bias * torch.nn.functional.one_hot(torch.tensor(digit), logits.shape[-1])).argmax(-1) == labels
            return float(hit[labels == digit].float().mean() if only else hit.float().mean())

        bias = max((b / 10 for b in range(-50, 201)), key=lambda b: (accuracy("validation", b), -abs(b)))
        biases.append(bias)
        for found, b in ((plain, 0.0), (raised, bias)):
            found["validation"].append(accuracy("validation", b))
            found["test"].append(accuracy("test", b))
            found["unseen"].append(accuracy("test", b, only=True))
    parameters = size(study.model(runs[0]))
    for name, found in ((what, plain), (f"{what}, bias {statistics.fmean(biases):+.1f}", raised)):
        study.row(
            "missing digit", name, parameters, found["validation"], found["test"], **{f"on {MISSING}s %": found["unseen"]}
        )


if __name__ == "__main__":
    main()
