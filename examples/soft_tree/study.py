"""A soft decision tree alone, from a network's soft targets, and the network, on MNIST; the same with labels for 1000 images.

PYTHONPATH=../hinton_mnist python study.py --out runs/soft_tree [--data FOLDER] [--network RUN]

Every choice is made on validation images with a seed of its own, as many for the tree alone as for the distilled one. Three
seeds of both; a run that is there is not run again. Pictures and an explained path go to `out`.

A tree that parts its images at every node needs many. Where few have a label, the network, which does not, says what the others
are: a tree learns from its word on all images, one from labels has 1000.
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
from prepare import write_idx  # noqa: E402

from kdfast.train.tasks.image_classification import read_idx  # noqa: E402

Grid = Sequence[list[str]] | None
ALONE = ("method={name: soft_tree, hard_weight: 1}", "teacher=null")
#: What is tried: three learning rates with the recipe's values, then two changes at the best rate.
RATES = (["optimizer.lr=3e-4"], ["optimizer.lr=1e-3"], ["optimizer.lr=3e-3"])
CHANGES_ALONE = (["method.penalty=0.03"], ["optimizer.weight_decay=0.3"])
CHANGES_DISTILLED = (["method.penalty=0.03"], ["method.penalty=0.03", "method.temperature=1"])


def chosen(study: Study, name: str, rates: Sequence[list[str]], options: Sequence[list[str]], *changes: str) -> list[str]:
    """The values that are best on the validation images, with a seed that is used for nothing else."""

    def score(tried: list[str]) -> float:
        label = "-".join(value.partition(".")[2] for value in tried)
        run = study.run(HERE / "recipe.yaml", f"choose/{name}-{label}", "seed=0", *changes, *tried)
        return study.accuracy(run, "validation")

    rate = max(rates, key=score)
    return max([rate, *([*rate, *option] for option in options)], key=score)


def trees(
    study: Study, heading: str, network: Path, arms: dict[str, Sequence[str]], grids: Sequence[Grid],
    rates: Sequence[list[str]], seeds: Sequence[int],
) -> None:  # fmt: skip
    """Rows of the network and of each arm, a name and its changes; an arm without a grid takes what the one before chose."""
    top = study.accuracy(network)
    study.row(heading, "the network", size(study.model(network)), [study.accuracy(network, "validation")], [top])
    base, choices = None, None
    for (what, changes), grid in zip(arms.items(), grids, strict=True):
        name = "-".join(what.replace(",", "").split())
        if grid is not None:
            choices = chosen(study, name, rates, grid, *changes)
        assert choices is not None, "the first arm has a grid of its own"
        found: dict[str, dict[str, list[float]]] = {p: {"validation": [], "test": []} for p in ("leaf", "mixture")}
        for seed in seeds:
            tree: Any = study.model(study.run(HERE / "recipe.yaml", f"{name}-{seed}", f"seed={seed}", *changes, *choices))
            for tree.predict, scores in found.items():
                for part, values in scores.items():
                    logits, labels = study.logits(tree, part)
                    values.append(float((logits.argmax(-1) == labels).float().mean()))
        mean = statistics.fmean(found["leaf"]["test"])
        share = {} if base is None else {"share of the gap": f"{(mean - base) / (top - base):.0%}"}
        base = mean if base is None else base
        shown = " ".join(change.partition(".")[2] for change in choices)
        study.row(heading, f"{what}, likeliest leaf ({shown})", size(tree), **found["leaf"], **share)
        study.row(heading, f"{what}, mixture of leaves", size(tree), **found["mixture"])


def part_of_labels(study: Study, labelled: int) -> tuple[str, str]:
    """Changes of a recipe: the first `labelled` training images with their labels, and the others without."""
    folder, out = study.folders["train"], study.out / "mnist" / f"{labelled}-labels"
    images = read_idx(folder / "images-idx3-ubyte", 3, "train")
    write_idx(out / "labelled" / "images-idx3-ubyte", images[:labelled])
    write_idx(out / "labelled" / "labels-idx1-ubyte", read_idx(folder / "labels-idx1-ubyte", 1, "train")[:labelled])
    write_idx(out / "unlabelled" / "images-idx3-ubyte", images[labelled:])
    return f"data.train={out / 'labelled'}", f"data.unlabelled={out / 'unlabelled'}"


def study_of(
    study: Study, network: Path | None = None, seeds: Sequence[int] = SEEDS, rates: Sequence[list[str]] = RATES,
    grids: Sequence[Sequence[list[str]]] = (CHANGES_ALONE, CHANGES_DISTILLED), labelled: int = 1000,
) -> str:  # fmt: skip
    """All of it; the table."""
    network = network or study.run(NETWORKS / "network.yaml", "network")
    arms = {"tree alone": ALONE, "tree, distilled": [f"teacher.weights={network / 'model'}"]}
    trees(study, "tree", network, arms, grids, rates, seeds)
    few, others = part_of_labels(study, labelled)
    network = study.run(NETWORKS / "network.yaml", f"network-{labelled}", few)
    taught = f"teacher.weights={network / 'model'}"
    arms = {
        f"tree alone on {labelled} labels": [*ALONE, few],
        f"tree, distilled on all images, {labelled} labels": [taught, few, others],
        f"tree, distilled on the {labelled} images": [taught, few],
    }
    trees(study, f"tree, {labelled} labels", network, arms, [*grids, None], rates, seeds)
    source = study.sources["validation"]
    images = source.batch(range(len(source))).by_name["pixel_values"]
    explained(study.out / f"tree-distilled-{seeds[0]}", images, 0, study.out, list(study.names))
    return study.table()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/soft_tree"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--network", type=Path, help="a run of ../hinton_mnist/network.yaml on the same split")
    args = parser.parse_args()
    if args.network and not (args.network / "model").is_dir():
        parser.error(f"--network: expected the folder of a run, with model in it, got {args.network}")
    print(study_of(Study(args.out, args.data), args.network))


if __name__ == "__main__":
    main()
