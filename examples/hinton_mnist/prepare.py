"""Splits MNIST's 10,000 images (`t10k-images-idx3-ubyte.gz` and its labels) into train, validation and test.

python prepare.py [FOLDER] [--out mnist]       # FOLDER: default $KDFAST_DATA/mnist_t10k
"""

from __future__ import annotations

import argparse
import os
import struct
from pathlib import Path

import numpy as np

from kdfast.files import written
from kdfast.train.tasks.image_classification import read_idx

PARTS = {"train": 7000, "validation": 1000, "test": 2000}


def write_idx(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with written(file) as part:
        part.write_bytes(struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes())


def split(source: Path, out: Path, parts: dict[str, int] | None = None) -> dict[str, Path]:
    """A seeded split of the IDX files in `source`, MNIST's test files where there are several; the folder of each part."""
    parts = PARTS if parts is None else parts
    files = sorted(source.glob("*images*idx3*"))
    if len(files) > 1:
        files = [file for file in files if file.name.startswith("t10k")]
    if len(files) != 1:
        raise SystemExit(f"{source}: expected t10k-images-idx3-ubyte(.gz) and its labels; set KDFAST_DATA or name its folder")
    images = read_idx(files[0], 3, "images")
    labels = read_idx(files[0].with_name(files[0].name.replace("images", "labels").replace("idx3", "idx1")), 1, "labels")
    if len(images) < sum(parts.values()):
        raise SystemExit(f"{source}: expected at least {sum(parts.values())} images, got {len(images)}")
    order, at = np.random.default_rng(0).permutation(len(images)), 0
    for name, count in parts.items():
        rows = order[at : at + count]
        write_idx(out / name / "images-idx3-ubyte", images[rows])
        write_idx(out / name / "labels-idx1-ubyte", labels[rows])
        at += count
    return {name: out / name for name in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=Path(os.environ.get("KDFAST_DATA", "data")) / "mnist_t10k")
    parser.add_argument("--out", type=Path, default=Path("mnist"))
    args = parser.parse_args()
    for name, folder in split(args.source, args.out).items():
        print(f"{name}: {PARTS[name]} images in {folder}")


if __name__ == "__main__":
    main()
