"""What a tree has learnt, as a picture, and the path that one image takes, as text and as a picture.

PYTHONPATH=../hinton_mnist python explain.py runs/soft_tree/tree --images mnist/validation --image 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from kdfast.models.load import from_function, load_weights
from kdfast.models.soft_tree import SoftTree
from kdfast.train import Recipe
from kdfast.train.recipe import Model
from kdfast.train.tasks.image_classification import ImageClassification


def load_tree(run: Path) -> SoftTree:
    """The tree of a run, as its recipe makes it."""
    spec: Model = Recipe.load(run / "recipe.yaml").student
    tree = from_function(str(spec.function), spec.arguments, "student.function")
    if not isinstance(tree, SoftTree):
        raise SystemExit(f"{run}: expected the run of a tree, got one of a {type(tree).__name__}")
    load_weights(tree, run / "model", "run")
    return tree.eval()


def explained(run: Path, images: torch.Tensor, image: int, out: Path, names: list[str]) -> str:
    """Writes `tree`, `path` (each as PNG and SVG) and `path.txt` to `out`; the text."""
    tree = load_tree(run)
    shares = tree.reach(images)
    path = tree.explain(images[image], names, shares)
    out.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        tree.save_picture(out / f"tree.{kind}", shares=shares, names=names)
        path.save(out / f"path.{kind}")
    (out / "path.txt").write_text(f"{path}\n", encoding="utf-8")
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument(
        "--images", type=Path, required=True, help="folder with IDX files, or a folder of images for each class"
    )
    parser.add_argument("--image", type=int, default=0, help="which of them (default %(default)s)")
    parser.add_argument("--out", type=Path, help="default: the run's folder")
    args = parser.parse_args()
    if not (args.run / "recipe.yaml").is_file():
        raise SystemExit(f"run: expected the folder of a run, got {str(args.run)!r}, which has no recipe.yaml")
    data = Recipe.load(args.run / "recipe.yaml").data
    task = ImageClassification(None, type(data)(validation=(str(args.images),), mean=data.mean, std=data.std))
    source = task.open(None, None, args.run, needs_train=False).validation
    assert source is not None
    batch = source.batch(range(len(source)))
    assert batch.labels is not None
    if not -len(source) <= args.image < len(source):
        raise SystemExit(f"--image: expected less than {len(source)}, the number of images in {args.images}, got {args.image}")
    print(f"image {args.image}, labelled {task.names[int(batch.labels[args.image])]}")
    print(explained(args.run, batch.by_name["pixel_values"], args.image, args.out or args.run, task.names))


if __name__ == "__main__":
    main()
