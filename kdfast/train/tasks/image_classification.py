"""A class for each image."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.extras import need
from kdfast.strict import one_of, ranged, refuse_unused
from kdfast.tensors import digest_of_tensors
from kdfast.train.batch import IGNORE, Batch
from kdfast.train.data import Source, Subset
from kdfast.train.tasks.classes import ClassTask, check_share, label_name
from kdfast.train.tasks.task import Splits

#: Image files whose content is hashed, spread over a folder.
_LOOKED_AT = 64
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: numpy's name of each type of value in an IDX file.
_IDX = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True)
class Data:
    """Images with classes: files in the IDX format of MNIST, gzipped or not, or a folder of image files for each class.

    Args:
        train: IDX files of images (their labels lie beside them, `images` and `idx3` being `labels` and `idx1` in the name),
            folders that hold such files, or folders with a folder of images for each class.
        unlabelled: images for training that have no class and get a teacher's word only: IDX files of images, folders that hold
            such files, or folders of image files. Labels beside them are not read.
        validation: like train; empty: a seeded share of the training rows is held out. validation_share: that share.
        size: height and width that image files are brought to (one number: a square); none: as they are, all the same.
        channels: 1 (grey) or 3, of image files.
        mean, std: of each channel, or one for all; pixels are in [0, 1] before (x - mean) / std.
        shift: in training each image is there as it is and shifted by up to so many pixels each way, its outermost
            pixels repeated: (2 * shift + 1)^2 rows for each. A teacher sees it shifted too.
        exclude_labels: classes that are not shown in training; they stay classes, and are evaluated.
        excluded: `drop` leaves their rows out of training; `hide` keeps them for the teacher, without label.
    """

    train: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    validation_share: float = ranged(0.05, low=0.0, high=0.5)
    size: tuple[int, ...] = ()
    channels: int = 3
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    shift: int = ranged(0, low=0, high=8)
    exclude_labels: tuple[Any, ...] = ()
    excluded: str = one_of("drop", "drop", "hide")

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {self.channels}")
        if len(self.size) > 2 or any(n < 1 for n in self.size):
            raise ValueError(f"size: expected a height and a width, got {list(self.size)}")
        if not self.mean or not self.std or any(s <= 0 for s in self.std):
            raise ValueError(f"std: expected numbers above 0 and a mean, got {list(self.std)} and {list(self.mean)}")
        check_share(self)
        if not self.exclude_labels:
            refuse_unused(self, ("excluded",), "without exclude_labels expected none")


class ImageClassification(ClassTask[Data]):
    """A model gets `pixel_values` `[B, C, H, W]`; a module that is no `transformers` model gets it by position."""

    Data = Data
    kind = "image_classification"
    needs_tokenizer = False
    #: Channels, height and width, once the data are open.
    shape: tuple[int, ...] = ()
    #: Whether any data are folders of image files.
    _folders = False

    def open(self, tokenizer: Any, tokenizer_file: Path | None, folder: Path, needs_train: bool) -> Splits:
        data = self.data
        images: Images | None = None
        validation: Source | None = None
        if needs_train:
            if not data.train:
                raise ValueError("data.train: expected files or folders, got none; add data.train to the recipe")
            images = self._read(data.train, "data.train", data.unlabelled)
        if data.validation:
            validation = self._read(data.validation, "data.validation")
        if self.shape and not self._folders:
            refuse_unused(data, ("size", "channels"), "of IDX files, whose images are as they are, expected none", "data")
        train, validation = self.splits(images, validation)
        if train is not None and data.exclude_labels:
            train = self._excluded(train)
        if train is not None and data.shift:
            train = _Shifted(train, data.shift)
        return Splits(train, validation)

    def model_fields(self, vocab_size: int | None) -> dict[str, Any]:
        own = {"image_size": self.shape[1], "num_channels": self.shape[0]} if self.shape else {}
        return {**super().model_fields(None), **own}

    def _read(self, paths: Sequence[str], key: str, unlabelled: Sequence[str] = ()) -> Images:
        stored: list[IdxImages | FolderImages] = []
        labels: list[str | None] = []
        for path in map(Path, paths):
            for images, found in self._under(path, key):
                stored.append(images)
                labels += found
        for path in map(Path, unlabelled):
            for images, _ in self._under(path, "data.unlabelled", labelled=False):
                stored.append(images)
                labels += [None] * len(images)
        shapes = {images.shape for images in stored}
        if len(shapes) > 1:
            remedy = "; data.size and data.channels say how image files are read" if self._folders else ""
            where = f"{key} and data.unlabelled" if unlabelled else key
            raise ValueError(f"{where}: expected images of one shape, got {' and '.join(map(str, sorted(shapes)))}{remedy}")
        if not labels:
            raise ValueError(f"{key}: expected at least one image, got none in {', '.join(paths)}")
        self.shape = shapes.pop()
        for name in ("mean", "std"):
            if len(getattr(self.data, name)) not in (1, self.shape[0]):
                raise ValueError(f"data.{name}: expected one number, or one for each of {self.shape[0]} channels")
        return Images(stored, self.ids_of(labels, key), self.data.mean, self.data.std)

    def _under(
        self, path: Path, key: str, labelled: bool = True
    ) -> list[tuple[IdxImages | FolderImages, Sequence[str | None]]]:
        if path.is_file():
            return [_idx(path, key, labelled)]
        if not path.is_dir():
            raise ValueError(f"{key}: expected a file or a folder, got {str(path)!r}, which does not exist")
        idx = sorted(file for file in path.iterdir() if file.is_file() and "idx3" in file.name)
        if idx:
            return [_idx(file, key, labelled) for file in idx]
        folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()] if labelled else [path]
        files = [(f, folder.name) for folder in folders for f in sorted(folder.rglob("*")) if f.suffix.lower() in _PICTURES]
        if not files:
            what = "a folder of images for each class" if labelled else "images"
            raise ValueError(f"{key}: expected IDX files, or {what}, got neither in {str(path)!r}")
        self._folders = True
        return [(FolderImages([f for f, _ in files], self.data, key), [name for _, name in files])]

    def _excluded(self, train: Source) -> Source:
        names = [label_name(label) for label in self.data.exclude_labels]
        for name in names:
            if name not in self.names:
                raise ValueError(f"data.exclude_labels: expected labels among {', '.join(self.names)}, got {name!r}")
        ids = torch.tensor([self.names.index(str(name)) for name in names])
        if self.data.excluded == "hide":
            return _Hidden(train, ids)
        whole, rows = (train.source, train.rows) if isinstance(train, Subset) else (train, list(range(len(train))))
        assert isinstance(whole, Images)
        shown = ~torch.isin(whole.labels[torch.tensor(rows)], ids)
        return Subset(whole, [row for row, kept in zip(rows, shown.tolist(), strict=True) if kept])


class Images:
    """Images with a class each, made into floats as they are read."""

    def __init__(
        self, stored: Sequence[IdxImages | FolderImages], labels: Tensor, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.stored, self.labels = list(stored), labels
        self.labelled = labels != IGNORE
        self.unlabelled = not bool(self.labelled.all())
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self._places = [(part, i) for part in self.stored for i in range(len(part))]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> Batch:
        raw = torch.stack([part.image(i) for part, i in (self._places[row] for row in indices)])
        labels = self.labels[torch.as_tensor(indices)]
        heard = torch.ones_like(labels, dtype=torch.bool) if self.unlabelled else None
        return Batch({"pixel_values": (raw - self.mean) / self.std}, labels, soft_mask=heard)

    @property
    def digest(self) -> str:
        """Hash of the labels, the normalisation and what the images are, by content or by file name and size."""
        parts = "+".join(part.digest for part in self.stored)
        return f"{digest_of_tensors(self.labels, self.mean, self.std)}:{parts}"


class IdxImages:
    """Images `[N, H, W]` of an IDX file, kept as they are."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.shape = (1, *values.shape[1:])

    def __len__(self) -> int:
        return len(self.values)

    def image(self, i: int) -> Tensor:
        """`[1, H, W]`; bytes become shares of 255."""
        image = torch.from_numpy(self.values[i].astype(np.float32))[None]
        return image / 255 if self.values.dtype.itemsize == 1 else image

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.values.tobytes(), digest_size=8).hexdigest()


class FolderImages:
    """Image files, opened when they are asked for."""

    def __init__(self, files: Sequence[Path], data: Data, key: str) -> None:
        self.files, self._key = list(files), key
        self._mode = "L" if data.channels == 1 else "RGB"
        self._size = (data.size * 2)[:2]
        self._pil = need("PIL.Image", extra="vision", what="a folder of images")
        self.shape = (data.channels, *(self._size or self.image(0).shape[1:]))

    def __len__(self) -> int:
        return len(self.files)

    def image(self, i: int) -> Tensor:
        """`[C, H, W]` in [0, 1]."""
        try:
            with self._pil.open(self.files[i]) as opened:
                image = opened.convert(self._mode)
        except OSError as error:
            raise ValueError(f"{self._key}: expected an image, got {str(self.files[i])!r}: {error}") from None
        if self._size:
            image = image.resize((self._size[1], self._size[0]), self._pil.Resampling.BILINEAR)
        values = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
        values = values[None] if values.ndim == 2 else values.permute(2, 0, 1)
        shape = getattr(self, "shape", tuple(values.shape))
        if tuple(values.shape) != tuple(shape):
            raise ValueError(
                f"{self._key}: expected images of one size, got {list(values.shape[1:])} in {str(self.files[i])!r} after"
                f" {list(shape[1:])}; set data.size"
            )
        return values

    @property
    def digest(self) -> str:
        names = "\0".join(f"{file.name}:{file.stat().st_size}" for file in self.files)
        state = hashlib.blake2b(f"{names}{self._mode}{self._size}".encode(), digest_size=8)
        for file in self.files[:: -(-len(self.files) // _LOOKED_AT)]:  # numbered files of one size may hold anything
            state.update(file.read_bytes())
        return state.hexdigest()


class _Hidden:
    """Rows of which those of some classes have lost their label: they get a teacher's word only."""

    def __init__(self, source: Source, classes: Tensor) -> None:
        self.source, self.classes = source, classes

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = self.source.batch(indices)
        assert batch.labels is not None
        labels = batch.labels.masked_fill(torch.isin(batch.labels, self.classes), IGNORE)
        return replace(batch, labels=labels, soft_mask=torch.ones_like(labels, dtype=torch.bool))

    @property
    def digest(self) -> str:
        return f"{getattr(self.source, 'digest', '')}:without {self.classes.tolist()}"


class _Shifted:
    """Rows n, n + N, n + 2 N ... of N images are the n-th one, shifted another way each time, as it is the first time."""

    def __init__(self, source: Source, pixels: int) -> None:
        self.source, self.pixels = source, pixels
        steps = range(-pixels, pixels + 1)
        self.ways = torch.tensor(sorted(((down, right) for down in steps for right in steps), key=lambda way: way != (0, 0)))

    def __len__(self) -> int:
        return len(self.source) * len(self.ways)

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(indices)
        batch = self.source.batch((rows % len(self.source)).tolist())
        images, ways = batch.by_name["pixel_values"], self.ways[rows // len(self.source)]
        for side, way in ((2, ways[:, 0]), (3, ways[:, 1])):
            size = images.shape[side]
            places = (torch.arange(size) - way[:, None]).clamp(0, size - 1)
            images = images.take_along_dim(places[:, None, :, None] if side == 2 else places[:, None, None, :], side)
        return replace(batch, inputs={"pixel_values": images})

    @property
    def digest(self) -> str:
        return f"{getattr(self.source, 'digest', '')}:shifted by {self.pixels}"


def read_idx(file: Path, dimensions: int, key: str) -> np.ndarray:
    """The values of an IDX file, gzipped or not.

    Raises:
        ValueError: it is none, is cut short, or has another number of dimensions.
    """
    raw = file.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{key}: {file}: {error}") from None
    kind = _IDX.get(raw[2]) if len(raw) >= 4 and raw[:2] == b"\0\0" else None
    if kind is None or raw[3] != dimensions or len(raw) < 4 + 4 * dimensions:
        raise ValueError(f"{key}: expected an IDX file of {dimensions} dimensions, got {str(file)!r}")
    shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
    wanted = int(np.dtype(kind).itemsize * np.prod(shape, dtype=np.int64))
    values = raw[4 + 4 * dimensions :]
    if len(values) != wanted:
        raise ValueError(f"{key}: expected {wanted} bytes of values ({list(shape)}) in {file}, got {len(values)}")
    return np.frombuffer(values, dtype=kind).reshape(shape)


def _idx(file: Path, key: str, labelled: bool) -> tuple[IdxImages, Sequence[str | None]]:
    """Images, and labels from the file beside theirs."""
    if not labelled:
        return IdxImages(read_idx(file, 3, key)), []
    beside = file.with_name(file.name.replace("images", "labels").replace("idx3", "idx1"))
    if beside == file or not beside.is_file():
        raise ValueError(f"{key}: expected a file of labels beside {file} ({beside.name}), found none")
    images, labels = read_idx(file, 3, key), read_idx(beside, 1, key)
    if len(images) != len(labels):
        raise ValueError(f"{key}: expected as many labels as images, got {len(labels)} in {beside} and {len(images)} in {file}")
    return IdxImages(images), [str(label) for label in labels.tolist()]
