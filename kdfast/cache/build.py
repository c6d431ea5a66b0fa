"""`build`: a teacher's folder and a corpus to a cache; what `kdfast cache build` does, in Python."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdfast.cache import remote
from kdfast.cache.capture import capture
from kdfast.cache.capture_file import read_capture, write_capture
from kdfast.cache.format import CacheFull, CacheMismatch
from kdfast.cache.manifest import MANIFEST, CacheInfo, is_unfinished, read_manifest
from kdfast.cache.merge import merge, part_path
from kdfast.cache.writer import CacheWriter
from kdfast.text import Example, TextData
from kdfast.text.spec import Naming, python_name

if TYPE_CHECKING:
    from kdfast.text.documents import Corpus

#: Task of a teacher -> the kind `kdfast.models` loads it as.
TASKS = {"causal": "causal_lm", "seq2seq": "seq2seq", "masked": "masked_lm"}
#: What changes nothing in the records: where the corpus lies and how it is fetched, and the places of turns.
_FREE = ("paths", "streaming", "turns", "stopped")


def _python_name(option: str) -> str:
    """An option as a Python caller of `build` gives it: by itself, or as a field of `data`."""
    return python_name(option) if option in {f.name for f in dataclasses.fields(TextData)} else option


@dataclass(frozen=True)
class BuildOptions:
    """How a cache is captured.

    task: auto (by the teacher's config.json), causal, masked or seq2seq. k: ids kept a token. top_p: only the fewest of them
    that hold this mass. samples: ids drawn from the rest a token; with k = 0 from the whole teacher. sample_temperature: of the
    draws. temperatures: 1 among them. max_kl: KL error allowed a token, nats. drop_masked: no entries of tokens that do not
    count. dtype: auto (as the teacher's config.json says), float32, bfloat16 or float16. batch_size: documents in one call of
    the teacher. window: batches whose documents are grouped by length. shard_mb, max_gb: sizes of a shard and of the whole.
    seed: of masks and draws. device: default a GPU where there is one.
    """

    task: str = "auto"
    k: int = 64
    top_p: float | None = None
    samples: int = 0
    sample_temperature: float = 1.0
    temperatures: tuple[float, ...] = (1.0,)
    max_kl: float = 5e-5
    drop_masked: bool = False
    dtype: str = "auto"
    batch_size: int = 8
    window: int = 64
    shard_mb: int = 64
    max_gb: float | None = None
    seed: int = 0
    device: str | None = None

    def check(self, name: Naming) -> None:
        for option, least in (("batch_size", 1), ("window", 1), ("shard_mb", 1)):
            if getattr(self, option) < least:
                raise ValueError(f"{name(option)}: expected a number >= {least}, got {getattr(self, option)}")
        if self.max_gb is not None and not self.max_gb > 0:
            raise ValueError(f"{name('max_gb')}: expected a number above 0, got {self.max_gb}")
        for option, choices in (("task", ("auto", *TASKS)), ("dtype", ("auto", "float32", "bfloat16", "float16"))):
            if getattr(self, option) not in choices:
                raise ValueError(f"{name(option)}: expected one of {', '.join(choices)}, got {getattr(self, option)!r}")
        if self.samples < 0 or self.k < 0:
            raise ValueError(f"{name('k')}, {name('samples')}: expected numbers >= 0, got {self.k} and {self.samples}")
        if not self.samples and self.sample_temperature != 1:
            raise ValueError(f"{name('sample_temperature')}: expected it with {name('samples')}, got it without; leave it out")
        if self.samples and self.top_p is not None:
            raise ValueError(
                f"{name('samples')}: expected it without {name('top_p')} (drawn entries come on top of a fixed number of"
                " likeliest ids)"
            )

    @property
    def entries(self) -> dict[str, Any]:
        """The settings that say which entries a token keeps; a cache counts its slots, drawn ones among them, as k."""
        if self.samples == 0:
            return {"k": self.k, "kind": "topk" if self.top_p is None else "topp"}
        kind, drawn = "mixed" if self.k else "sampled", self.sample_temperature
        return {"k": self.k + self.samples, "kind": kind, "samples": self.samples, "sample_temperature": drawn}


@dataclass(frozen=True)
class Built:
    """What a build left: `stopped` where `max_gb` was reached, `merged` where this was the last of several ranks."""

    path: Path
    info: CacheInfo
    capture: dict[str, Any]
    stopped: bool = False
    merged: bool = False


def build(
    teacher: str | Path,
    data: TextData,
    out: str | Path,
    *,
    rank: int | None = None,
    world: int | None = None,
    resume: bool = False,
    progress: Callable[[int, float | None], None] | None = None,
    say: Callable[[str], None] = print,
    name: Naming = _python_name,
    **options: Any,
) -> Built:
    """Runs a teacher over a corpus and keeps its targets. Equals

        with CacheWriter(out, ...) as writer:
            capture(load(teacher), Corpus(data, tokenizer, teacher), writer, window=64, head=find_head(...), ...)

    Killed and run again, it goes on after the last shard that was finished.

    Args:
        teacher: a folder with config.json, safetensors weights and tokenizer.json, or a name that the model hub knows.
        rank, world: which of several processes this is; by default what `torchrun` and `accelerate launch` say (RANK and
            WORLD_SIZE). Each captures its share; whichever is last merges them into the cache that one process would make.
        resume: fail where there is no unfinished cache to go on with.
        progress: called as progress(tokens_done, share_of_the_corpus_read), the share None where nobody knows.
        say: takes a line about documents that were cut or dropped, or a teacher whose head could not be named.
        name: how an error calls an option.
        options: fields of `BuildOptions`.

    Raises:
        ValueError: an option is out of range, data or teacher are not there, or do not go together.
        CacheMismatch: an unfinished cache was begun with other options.
    """
    chosen = BuildOptions(**options)
    chosen.check(name)
    rank, world = _rank(rank, world, name)
    whole = remote.writable(out, name("out"))  # before the teacher is loaded
    path = whole if world == 1 else part_path(whole, rank, world)
    if resume and not is_unfinished(path):
        raise ValueError(
            f"{name('resume')}: expected an unfinished cache in {str(path)!r}, found none; leave {name('resume')} out to begin"
            " one"
        )
    if world > 1 and (path / MANIFEST).is_file() and not is_unfinished(path):
        return _finished(whole, path, world)  # this rank was done before another one was killed
    job = _Job(teacher, data, chosen, name)
    job.check_resumed(path)
    model = job.load(say)
    limit = None if chosen.max_gb is None else int(chosen.max_gb * 1e9 / world)
    described, turns = job.describe(model), list[int]()

    def told(tokens: int, _: int | None) -> None:
        if progress is not None:
            progress(tokens, job.corpus.share_read)

    with CacheWriter(
        path, shard_bytes=chosen.shard_mb << 20, max_bytes=limit, queue=2 * chosen.batch_size, **job.settings(model)
    ) as writer:
        write_capture(path, described)
        capture(
            model.module, job.corpus, writer, window=chosen.window, rank=rank, world=world, turns=turns, progress=told,
            **job.options(model),
        )  # fmt: skip
        with contextlib.suppress(CacheFull):  # of a record that waited
            writer.flush()
        described |= {"turns": turns, "stopped": writer.full} if world > 1 else {"stopped": writer.full}
        write_capture(path, described)
    if report := job.corpus.report():
        say(report)
    return dataclasses.replace(_finished(whole, path, world), stopped=writer.full)


def estimate(
    teacher: str | Path,
    data: TextData,
    *,
    say: Callable[[str], None] = print,
    name: Naming = _python_name,
    **options: Any,
) -> dict[str, Any]:
    """Size and time of a `build`, from its first batch; nothing is kept. The corpus is walked through to be counted."""
    chosen = BuildOptions(**options)
    chosen.check(name)
    job = _Job(teacher, data, chosen, name)
    model = job.load(say)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with CacheWriter(folder, **job.settings(model)) as writer:
            first = list(itertools.islice(job.corpus, chosen.batch_size))
            capture(model.module, first, writer, **job.options(model))
        info = CacheInfo.of(*read_manifest(Path(folder)))
    rate = info.tokens / (time.perf_counter() - began)
    documents, tokens = job.corpus.count()
    if report := job.corpus.report():
        say(report)
    return {
        "vocab_size": info.vocab_size, "k": info.k, "kind": info.kind, "alignment": info.alignment, "records": documents,
        "tokens": tokens, "bytes_per_token": info.bytes_per_token, "bytes": round(info.bytes_per_token * tokens),
        "kl_mean": info.kl_mean, "kl_max": info.kl_max, "tokens_per_second": rate, "seconds": tokens / rate,
    }  # fmt: skip


def load_teacher(teacher: str | Path, task: str = "auto", dtype: str = "auto") -> nn.Module:
    """The teacher in a folder, in evaluation mode, its weights in the dtype that config.json says unless told otherwise."""
    from kdfast.models.load import load_folder

    folder = _folder_of(teacher)
    return load_folder(folder, "teacher", kind=TASKS[task_of(folder, task)], dtype=dtype).eval()


def _folder_of(teacher: str | Path) -> Path:
    """A local folder, which is seen without loading anything; else the hub's copy of that name."""
    folder = Path(teacher)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or folder.is_absolute():
        raise ValueError(f"teacher: expected a folder with config.json and safetensors weights, got {str(teacher)!r}")
    from kdfast.models.load import resolve_folder

    return resolve_folder(teacher, "teacher")


def task_of(folder: Path, asked: str = "auto") -> str:
    """The task that was asked for, or the one that config.json tells."""
    if asked != "auto":
        return asked
    from kdfast.models.load import read_config

    config = read_config(folder)
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    return "masked" if any("MaskedLM" in name for name in config.get("architectures") or ()) else "causal"


@dataclass(frozen=True)
class _Teacher:
    """A loaded teacher: where it runs, its head where it has one that can be named, its vocabulary and what fills a batch."""

    module: nn.Module
    device: str
    head: Any
    vocab_size: int
    pad_id: int

    @property
    def dtype(self) -> str:
        return str(next(self.module.parameters()).dtype).removeprefix("torch.")


class _Job:
    """What a build reads: the corpus is opened, and its options checked, before the teacher is loaded."""

    corpus: Corpus

    def __init__(self, teacher: str | Path, data: TextData, chosen: BuildOptions, name: Naming) -> None:
        from kdfast.text.documents import Corpus
        from kdfast.text.tokenizers import load_tokenizer

        self._chosen, self._name = chosen, name
        data.check(name)
        self._folder = _folder_of(teacher)
        tokenizer, self._tokenizer_file = load_tokenizer(self._folder)
        self.task = task_of(self._folder, chosen.task)
        if self.task != "causal" and chosen.drop_masked:
            raise ValueError(f"{name('drop_masked')}: expected a causal teacher, got a {self.task} one; leave it out")
        self.corpus = Corpus(data, tokenizer, self._folder, task=self.task, seed=chosen.seed, name=name)

    def check_resumed(self, path: Path) -> None:
        """Raises where an unfinished cache was begun with options that make other records."""
        there = read_capture(path) if is_unfinished(path) else {}
        asked = {**self._described, "dtype": self._dtype}
        different = [
            f"{self._name(option)}: {asked.get(option)} != {there[option]}"
            for option in there
            if option not in _FREE and option in asked and asked[option] != there[option]
        ]
        if different:
            raise CacheMismatch(
                f"{path}: holds an unfinished cache captured with other options (asked for != there): {'; '.join(different)}."
                " Use these, or another path"
            )

    def load(self, say: Callable[[str], None]) -> _Teacher:
        from kdfast.models.heads import find_head
        from kdfast.models.load import check_ids, device_named

        device = str(device_named(self._chosen.device or _default_device(), self._name("device")))
        module = load_teacher(self._folder, self.task, self._chosen.dtype).to(device)
        check_ids(module, self.corpus.tokenizer.get_vocab_size(), "teacher")
        example = next(iter(self.corpus))
        inputs = _inputs(example, device)
        head = find_head(module, inputs)
        if head is None:
            say("the teacher's head is no single linear layer that can be named: its logits are formed whole")
            with torch.no_grad():
                vocab_size = int(module(**inputs).logits.shape[-1])
        else:
            vocab_size = head.weight.shape[0]
        pad_id = getattr(module.config, "pad_token_id", None)
        return _Teacher(module, device, head, vocab_size, pad_id if isinstance(pad_id, int) else 0)

    def settings(self, model: _Teacher) -> dict[str, Any]:
        """The cache's settings."""
        from kdfast.models.load import weights_hash
        from kdfast.text.tokenizers import file_hash

        return {
            "vocab_size": model.vocab_size, **self._chosen.entries, "temperatures": tuple(self._chosen.temperatures),
            "max_kl": self._chosen.max_kl, "teacher": weights_hash(self._folder),
            "tokenizer_hash": file_hash(self._tokenizer_file), "alignment": "same" if self.task == "masked" else "next",
        }  # fmt: skip

    def options(self, model: _Teacher) -> dict[str, Any]:
        """How `capture` runs the teacher."""
        chosen = self._chosen
        return {
            "batch_size": chosen.batch_size, "device": model.device, "top_p": chosen.top_p, "seed": chosen.seed,
            "pad_id": model.pad_id, "drop_masked": chosen.drop_masked, "head": model.head,
        }  # fmt: skip

    def describe(self, model: _Teacher) -> dict[str, Any]:
        """What is kept in `capture.json`."""
        return {**self._described, "dtype": model.dtype, "through_head": model.head is not None}

    @property
    def _described(self) -> dict[str, Any]:
        own = ("top_p", "drop_masked", "batch_size", "window", "seed")
        return {**self.corpus.describe(), **{option: getattr(self._chosen, option) for option in own}}

    @property
    def _dtype(self) -> str:
        from kdfast.models.load import torch_dtype

        return str(torch_dtype(self._chosen.dtype, self._folder)).removeprefix("torch.")


def _rank(rank: int | None, world: int | None, name: Naming) -> tuple[int, int]:
    if rank is None and world is None:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rank, world = rank or 0, 1 if world is None else world
    if world < 1:
        raise ValueError(f"{name('world')}: expected a number >= 1, got {world}")
    if not 0 <= rank < world:
        raise ValueError(f"{name('rank')}: expected 0 to {world - 1}, got {rank}")
    return rank, world


def _default_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _inputs(example: Example, device: str) -> dict[str, torch.Tensor]:
    """A few tokens of a document as a batch."""
    ids = example.input_ids[None, :8].to(device)
    if example.context_ids is None:
        return {"input_ids": ids}
    return {"input_ids": example.context_ids[None, :8].to(device), "decoder_input_ids": ids}


def _finished(whole: Path, path: Path, world: int) -> Built:
    """What is there after this process is done; the last of several merges.

    They look one at a time, each after it is done, so that the last finds all parts finished. It removes them once they are
    merged: whoever was not the last has read its own before the next may look.
    """
    with _alone(whole) if world > 1 else contextlib.nullcontext():
        parts = [part_path(whole, rank, world) for rank in range(world)]
        merged = world > 1 and all((part / MANIFEST).is_file() and not is_unfinished(part) for part in parts)
        if merged:
            merge(whole)
        found = path if path.is_dir() else whole  # merged by this process, or just before by another
        return Built(found, CacheInfo.of(*read_manifest(found)), read_capture(found), merged=merged)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
