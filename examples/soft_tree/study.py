"""A soft decision tree alone, from a network's soft targets, and the network, on MNIST.

PYTHONPATH=../hinton_mnist python study.py --out runs/soft_tree [--data FOLDER] [--network RUN]

Every choice is made on validation images with a seed of its own, as many for the tree alone as for the distilled one. Three
seeds of both; a run that is there is not run again. Pictures and an explained path go to `out`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "hinton_mnist"))

from explain import explained  # noqa: E402
from mnist_runs import HERE as NETWORKS  # noqa: E402
from mnist_runs import SEEDS, Study, size  # noqa: E402

ALONE = ("method={name: soft_tree, hard_weight: 1}", "teacher=null")
#: What is tried: three learning rates with the recipe's values, then two changes at the best rate.
RATES = (["optimizer.lr=3e-4"], ["optimizer.lr=1e-3"], ["optimizer.lr=3e-3"])
CHANGES_ALONE = (["method.penalty=0.03"], ["optimizer.weight_decay=0.3"])
CHANGES_DISTILLED = (["method.temperature=2"], ["method.temperature=2", "method.soft_weight=0.5", "method.hard_weight=0.5"])


def chosen(study: Study, name: str, rates: Sequence[list[str]], options: Sequence[list[str]], *changes: str) -> list[str]:
    """The values that are best on the validation images, with a seed that is used for nothing else."""

    def score(tried: list[str]) -> float:
        label = "-".join(value.partition(".")[2] for value in tried)
        run = study.run(HERE / "recipe.yaml", f"choose/{name}-{label}", "seed=0", *changes, *tried)
        return study.accuracy(run, "validation")

    rate = max(rates, key=score)
    return max([rate, *([*rate, *option] for option in options)], key=score)


def study_of(study: Study, network: Path | None = None, seeds: Sequence[int] = SEEDS, rates: Sequence[list[str]] = RATES,
             grids: Sequence[Sequence[list[str]]] = (CHANGES_ALONE, CHANGES_DISTILLED)) -> str:  # fmt: skip
    """All of it; the table."""
    recipe = HERE / "recipe.yaml"
    network = network or study.run(NETWORKS / "network.yaml", "network")
    taught = f"teacher.weights={network / 'model'}"
    alone = chosen(study, "alone", rates, grids[0], *ALONE)
    distilled = chosen(study, "distilled", rates, grids[1], taught)
    top = study.accuracy(network)
    study.row("tree", "the network", size(study.model(network)), [study.accuracy(network, "validation")], [top])
    base = None
    for what, name, changes in (
        ("tree alone", "alone", [*ALONE, *alone]),
        ("tree, distilled", "distilled", [taught, *distilled]),
    ):
        runs = [study.run(recipe, f"{name}-{seed}", f"seed={seed}", *changes) for seed in seeds]
        found: dict[str, dict[str, list[float]]] = {p: {"validation": [], "test": []} for p in ("leaf", "mixture")}
        for run in runs:
            tree: Any = study.model(run)
            for tree.predict, scores in found.items():
                for part, values in scores.items():
                    logits, labels = study.logits(tree, part)
                    values.append(float((logits.argmax(-1) == labels).float().mean()))
        mean, shown = (
            statistics.fmean(found["leaf"]["test"]),
            " ".join(c.partition(".")[2] for c in changes if c not in (*ALONE, taught)),
        )
        share = {} if base is None else {"share of the gap": f"{(mean - base) / (top - base):.0%}"}
        base = mean if base is None else base
        study.row("tree", f"{what}, likeliest leaf ({shown})", size(tree), **found["leaf"], **share)
        study.row("tree", f"{what}, mixture of leaves", size(tree), **found["mixture"])
    source = study.sources["validation"]
    images = source.batch(range(len(source))).by_name["pixel_values"]
    explained(study.out / f"distilled-{seeds[0]}", images, 0, study.out, list(study.names))
    return study.table()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/soft_tree"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--network", type=Path, help="a run of ../hinton_mnist/network.yaml on the same split")
    args = parser.parse_args()
    print(study_of(Study(args.out, args.data), args.network))


if __name__ == "__main__":
    main()
