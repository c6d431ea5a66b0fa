"""The teacher cache on disk: names, typed errors, settings. docs/cache-format.md is the specification."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

FORMAT = "kdfast-cache"
VERSION = 2
READABLE = (1, 2)
MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"shard-\d{5,9}\.safetensors")
LEFTOVER = re.compile(r"(shard-\d{5,9}\.safetensors|manifest\.json)\.tmp")
ALIGNMENTS = ("next", "same")
KINDS = ("topk", "topp", "sampled", "mixed")
MAX_SAMPLES = 65535
MAX_VOCAB = 1 << 24
KEY_TOKENS = 64
IGNORE = -100

#: Edges of the histogram of the KL error of single tokens, nats; one bin below and one above them.
KL_EDGES = np.power(10.0, np.arange(-8, -1.75, 0.25))


class CacheError(ValueError):
    """A teacher cache cannot be written or used as asked."""


class CorruptCache(CacheError):
    """The bytes on disk are not those that were written.

    Attributes:
        job: in a batch, the position of the record that is at fault.
    """

    job: int = 0


class CacheFull(CacheError):
    """A record does not fit into the size that the writer was given."""


class CacheMismatch(CacheError):
    """The cache is sound but was made with other settings than asked for."""


class AlignmentError(CacheError):
    """The targets do not belong to the labels they are trained against."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every record of a cache.

    Args:
        vocab_size: the teacher's V, at most 2^24.
        k: entries a token, 0 < k <= V.
        teacher: any text that identifies the teacher.
        tokenizer_hash: any text that identifies the tokenizer.
        temperatures: at which log_z and log_tail are kept; 1 must be among them.
        max_kl: limit of KL(exact || decoded) of a token over entries and tail, nats, at every temperature.
        values_bits: bits of a value before entropy coding, in the place of max_kl.
        alignment: `next`: row t predicts token t + 1; `same`: row t predicts position t.
        kind: `topk`; `topp`: as many of at most k as hold a certain mass; `sampled`: entries that were drawn; `mixed`: the
            first k - samples exact, the others drawn from the rest.
        samples: draws a row of `sampled` and `mixed`, at most 65535.
        sample_temperature: temperature of the draws, one of `temperatures`.

    Raises:
        ValueError: a value is out of range.
    """

    vocab_size: int
    k: int
    teacher: str
    tokenizer_hash: str
    temperatures: tuple[float, ...] = (1.0,)
    max_kl: float = 5e-5
    values_bits: int | None = None
    alignment: str = "next"
    kind: str = "topk"
    samples: int = 0
    sample_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "k", "samples"):
            if not isinstance(getattr(self, name), int):
                raise CacheError(f"{name}: expected a whole number, got {getattr(self, name)!r}")
        if not 0 < self.vocab_size <= MAX_VOCAB:
            raise CacheError(f"vocab_size: expected 1 to {MAX_VOCAB}, got {self.vocab_size}")
        if not 0 < self.k <= self.vocab_size:
            raise CacheError(f"k: expected 0 < k <= {self.vocab_size} (the vocabulary), got {self.k}")
        if not all(t > 0 and math.isfinite(t) for t in self.temperatures) or len(set(self.temperatures)) < len(
            self.temperatures
        ):
            raise CacheError(f"temperatures: expected distinct finite numbers above 0, got {self.temperatures}")
        if 1.0 not in self.temperatures:
            raise CacheError(f"temperatures: expected 1.0 among them (values are kept at T = 1), got {self.temperatures}")
        if not 0 < self.max_kl < math.inf:
            raise CacheError(f"max_kl: expected nats above 0, got {self.max_kl}")
        if self.values_bits is not None and not 1 <= self.values_bits <= 16:
            raise CacheError(f"values_bits: expected 1 to 16 or None, got {self.values_bits}")
        if self.alignment not in ALIGNMENTS:
            raise CacheError(f"alignment: expected one of {', '.join(ALIGNMENTS)}, got {self.alignment!r}")
        if self.kind not in KINDS:
            raise CacheError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        least, most = {"sampled": (1, MAX_SAMPLES), "mixed": (1, min(self.k - 1, MAX_SAMPLES))}.get(self.kind, (0, 0))
        if not least <= self.samples <= most:
            raise CacheError(f"samples: expected {least} to {most} with kind {self.kind!r} and k {self.k}, got {self.samples}")
        if self.sample_temperature not in self.temperatures:
            raise CacheError(
                f"sample_temperature: expected one of temperatures {self.temperatures}, got {self.sample_temperature}"
            )

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "temperatures": list(self.temperatures)}

    def as_metadata(self) -> dict[str, str]:
        """As the text values of a safetensors header."""
        own = {name: json.dumps(value) for name, value in self.as_json().items()}
        return {"format": FORMAT, "version": str(VERSION), **own}

    def differences(self, other: Settings) -> list[str]:
        """`name: mine != theirs` for every field that differs."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return [f"{name} {a!r} != {b!r}" for name, a, b in pairs if a != b]
