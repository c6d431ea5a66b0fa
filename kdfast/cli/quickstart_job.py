"""The quickstart's work: tokenizer, teacher, cache, students, on Python's own standard library.

Every stage leaves a finished file or folder behind and is skipped when that is there.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from kdfast.cache import CacheReader, CacheWriter, capture
from kdfast.cache.manifest import read_manifest
from kdfast.text.files import list_files, split_files
from kdfast.text.tokenizers import SEPARATOR, file_hash, train_tokenizer
from kdfast.train import Recipe, Result, distill
from kdfast.train.data import Order, Sequences, tokenize
from kdfast.train.evaluate import evaluate
from kdfast.train.loop import Bar
from kdfast.train.models import load_folder
from kdfast.train.recipe import Teacher
from kdfast.train.run_folder import write_json

#: Tests repeat themselves, and the rest is generated tables or not Python's own.
EXCLUDE = ("test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "pydoc_data", "encodings", "lib2to3")
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Plan:
    """Sizes of the job. Temperature, weights and learning rates were chosen on the validation files."""

    vocab_size: int = 4096
    length: int = 128
    batch_size: int = 8
    teacher_steps: int = 550
    student_steps: int = 400
    teacher: dict[str, Any] = field(default_factory=lambda: llama(256, 4))
    student: dict[str, Any] = field(default_factory=lambda: llama(128, 2))
    teacher_lr: float = 2e-3
    student_lr: float = 4e-3
    k: int = 64
    temperatures: tuple[float, ...] = (1.0, 2.0)
    temperature: float = 1.0
    soft_weight: float = 0.9
    hard_weight: float = 0.1
    held_out_sequences: int = 512
    part: float = 1.0

    @classmethod
    def short(cls) -> Plan:
        """The same path in about a minute: small enough for CI, too small for a claim."""
        return replace(
            cls(), vocab_size=1024, length=64, batch_size=8, teacher_steps=60, student_steps=40, teacher=llama(96, 2),
            student=llama(48, 1), held_out_sequences=64, part=0.1,
        )  # fmt: skip


def llama(width: int, layers: int) -> dict[str, Any]:
    """Fields of a llama configuration with heads of 64 and a tied head."""
    return {
        "hidden_size": width, "intermediate_size": width * 8 // 3 // 8 * 8, "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 2), "num_key_value_heads": max(width // 64, 2), "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        # The usual 0.02 fits widths in the thousands; at these it costs hundreds of steps on a plateau.
        "initializer_range": round(0.7 * width**-0.5, 3),
    }  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """The three splits by file, packed, and what they were made from."""

    train: Sequences
    validation: Sequences
    test: Sequences
    tokenizer: Path
    files: tuple[int, int, int]
    folder: str


class Job:
    """One quickstart in one folder."""

    def __init__(self, out: Path, plan: Plan, seeds: Sequence[int], bar: Bar, say: Callable[[str], None]) -> None:
        self.out, self.plan, self.seeds, self.bar, self.say = out, plan, list(seeds), bar, say

    def prepare(self, fresh: bool) -> None:
        """Makes the folder, or checks that what is there was made by the same plan.

        Raises:
            ValueError: it holds the job of another plan.
        """
        marker, mine = self.out / "plan.json", json.loads(json.dumps(asdict(self.plan)))
        if fresh and marker.is_file():
            for name in ("teacher", "cache", *(p.name for p in self.out.glob("student_*"))):
                shutil.rmtree(self.out / name, ignore_errors=True)
            for name in ("plan.json", "tokenizer.json", "corpus.safetensors", "capture.json", "summary.json", "report.png"):
                (self.out / name).unlink(missing_ok=True)
        if marker.is_file() and json.loads(marker.read_text()) != mine:
            raise ValueError(f"--out: {self.out} holds a quickstart of other sizes; add --fresh, or give another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(marker, mine)

    def corpus(self) -> Corpus:
        """Tokenizer and packed splits."""
        folder = sysconfig.get_path("stdlib")
        files = list_files([folder], "**/*.py", EXCLUDE, "the standard library")
        files = files[: max(int(len(files) * self.plan.part), 40)]
        test, validation, train = split_files(files, [0.08, 0.05], _SPLIT_SEED)
        tokenizer_file = self.out / "tokenizer.json"
        if not tokenizer_file.is_file():
            self.say(f"tokenizer: BPE {self.plan.vocab_size} on {len(train)} files")
            tokenizer = train_tokenizer(train, self.plan.vocab_size)
            part = tokenizer_file.with_suffix(".part")
            tokenizer.save(str(part))
            part.replace(tokenizer_file)
        packed = self._packed(tokenizer_file, {"train": train, "validation": validation, "test": test})
        splits = {name: Sequences(ids) for name, ids in packed.items()}
        counts = (len(train), len(validation), len(test))
        n = self.plan.held_out_sequences
        held_out = {name: _shuffled(splits[name].ids, n) for name in ("validation", "test")}
        return Corpus(splits["train"], held_out["validation"], held_out["test"], tokenizer_file, counts, folder)

    def _packed(self, tokenizer_file: Path, splits: dict[str, list[Path]]) -> dict[str, torch.Tensor]:
        file = self.out / "corpus.safetensors"
        if not file.is_file():
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
            packed = {n: tokenize(tokenizer, f, self.plan.length, SEPARATOR, n).ids for n, f in splits.items()}
            save_file(packed, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        return load_file(file)

    def teacher(self, corpus: Corpus) -> Result:
        """The teacher, trained once whatever the seeds."""
        plan = self.plan
        recipe = self._recipe("teacher", corpus, plan.teacher, plan.teacher_steps, plan.teacher_lr, seed=0)
        return distill(recipe, train_data=corpus.train, validation_data=corpus.validation, bar=self.bar, say=_quiet)

    def students_data(self, corpus: Corpus, steps: int) -> Sequences:
        """Fresh sequences for every step, as far as there are any; fewer steps get the beginning of the same walk."""
        return _shuffled(corpus.train.ids, steps * self.plan.batch_size)

    def longer_steps(self, plain: Result, capture_seconds: float) -> int:
        """Steps that training on hard labels does in its own time and the capture's."""
        return plain.steps + round(capture_seconds * plain.steps / plain.seconds)

    def capture(self, corpus: Corpus, data: Sequences, teacher: Result) -> dict[str, float]:
        """The teacher's targets on `data`; a capture that was killed goes on where its last shard ended."""
        path, rate_file = self.out / "cache", self.out / "capture.json"
        if not ((path / "manifest.json").is_file() and read_manifest(path)[0].complete):
            model = load_folder(teacher.model, "teacher")
            with CacheWriter(
                path, vocab_size=self.plan.vocab_size, k=self.plan.k, temperatures=self.plan.temperatures,
                teacher=file_hash(teacher.model / "model.safetensors"), tokenizer_hash=file_hash(corpus.tokenizer),
                records_per_shard=self.plan.batch_size * 32,
            ) as writer:  # fmt: skip
                left = data.ids[len(writer) :].numel()
                began = time.perf_counter()
                with self.bar("capture", data.ids.numel(), "tokens") as shown:
                    capture(model, list(data.ids.long()), writer, batch_size=self.plan.batch_size,
                            progress=lambda done, total: shown.update(done))  # fmt: skip
                # Written before the cache is finished: a finished cache is not captured again.
                if left or not rate_file.is_file():
                    write_json(rate_file, {"tokens_per_s": left / (time.perf_counter() - began)})
        rate = json.loads(rate_file.read_text())["tokens_per_s"]
        info = CacheReader(path, teacher=file_hash(teacher.model / "model.safetensors")).info
        return {"bytes_per_token": info.bytes_per_token, "kl": info.kl_mean, "kl_max": info.kl_max, "k": info.k,
                "tokens": info.tokens, "capture_tokens_per_s": rate, "capture_seconds": info.tokens / rate}  # fmt: skip

    def student(self, name: str, corpus: Corpus, data: Sequences, steps: int, seed: int) -> Result:
        """One student of one seed: `kd` reads the cache, any other name trains on hard labels."""
        plan = self.plan
        recipe = self._recipe(f"student_{name}-seed{seed}", corpus, plan.student, steps, plan.student_lr, seed)
        if name != "kd":
            return distill(recipe, train_data=data, validation_data=corpus.validation, bar=self.bar, say=_quiet)
        recipe = replace(
            recipe, method="word_kd", teacher=Teacher(cache=str(self.out / "cache")),
            temperature=plan.temperature, soft_weight=plan.soft_weight, hard_weight=plan.hard_weight,
        )  # fmt: skip
        return distill(recipe, validation_data=corpus.validation, bar=self.bar, say=lambda line: self.say(f"student: {line}"))

    def test(self, corpus: Corpus, result: Result) -> dict[str, float]:
        """The model on the test files, which nothing was chosen on."""
        found = evaluate(load_folder(result.model, "model"), corpus.test, batch_size=32)
        return {"ppl": found.ppl, "top1": found.top1, "tokens": found.tokens, "seconds": result.seconds, "steps": result.steps}

    def _recipe(self, name: str, corpus: Corpus, config: dict[str, Any], steps: int, lr: float, seed: int) -> Recipe:
        return Recipe.build({
            "method": "supervised", "out": str(self.out / name), "tokenizer": str(corpus.tokenizer),
            "student": {"model_type": "llama", "config": {**config, "vocab_size": self.plan.vocab_size}},
            "optimizer": {"lr": lr, "warmup_steps": max(steps // 15, 1), "schedule": "cosine", "final_lr_share": 0.05},
            "steps": steps, "batch_size": self.plan.batch_size, "seed": seed, "eval_sequences": 256, "save_every": 100,
            "keep": 1, "tracker": "none",
        })  # fmt: skip


def _shuffled(ids: torch.Tensor, count: int) -> Sequences:
    """The first `count` sequences of a fixed shuffle, so that a part of a split is drawn from all of its files."""
    return Sequences(ids[Order(len(ids), _SPLIT_SEED).take(0, min(count, len(ids)))])


def _quiet(line: str) -> None:
    """Lines of runs that the quickstart reports on itself."""
