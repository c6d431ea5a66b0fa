"""The quickstart's work: tokenizer, teacher, cache, students, on Python's own standard library.

The setting is the one that distillation is for: a teacher that has read much text, and students that have little of it, which
they read for several epochs. Every stage leaves a finished file or folder behind and is skipped when that is there.
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
from torch import nn

from kdfast import files
from kdfast.cache import CacheReader, CacheWriter, capture
from kdfast.cache.manifest import read_manifest
from kdfast.models.heads import find_head
from kdfast.models.load import load_folder, load_weights, weights_hash
from kdfast.text.files import list_files, split_files
from kdfast.text.tokenizers import SEPARATOR, file_hash, train_tokenizer
from kdfast.train import Evaluation, Recipe, Result, distill, evaluate
from kdfast.train.data import SPLIT_SEED, Order, Sequences, tokenize
from kdfast.train.loop import Bar

#: Tests repeat themselves, and the rest is generated tables or not Python's own.
EXCLUDE = ("test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "pydoc_data", "encodings", "lib2to3")


@dataclass(frozen=True)
class Plan:
    """Sizes of the job. Temperature, weights and learning rates were chosen on the validation files."""

    vocab_size: int = 4096
    length: int = 128
    batch_size: int = 8
    teacher_steps: int = 700
    student_sequences: int = 800
    student_steps: int = 800
    eval_every: int = 100
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
            cls(), vocab_size=1024, length=64, batch_size=8, teacher_steps=60, student_sequences=80,
            student_steps=40, eval_every=10, teacher=llama(96, 2), student=llama(48, 1), held_out_sequences=64, part=0.1,
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
    """The three splits by file, packed, and what they were made from; `transfer` is the part of the training text that
    students get, and the teacher has not seen.
    """

    train: Sequences
    transfer: Sequences
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
        marker, mine = self.out / "plan.json", json.loads(files.json_text(asdict(self.plan)))
        if fresh and marker.is_file():
            for name in ("teacher", "cache", *(p.name for p in self.out.glob("student_*"))):
                shutil.rmtree(self.out / name, ignore_errors=True)
            for name in ("plan.json", "tokenizer.json", "corpus.safetensors", "capture.json", "summary.json", "report.png"):
                (self.out / name).unlink(missing_ok=True)
        if marker.is_file() and json.loads(marker.read_text()) != mine:
            raise ValueError(f"--out: {self.out} holds a quickstart of other sizes; add --fresh, or give another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        files.write_json(marker, mine)

    def corpus(self) -> Corpus:
        """Tokenizer and packed splits."""
        folder = sysconfig.get_path("stdlib")
        listed = list_files([folder], "**/*.py", EXCLUDE, "the standard library")
        listed = listed[: max(int(len(listed) * self.plan.part), 40)]
        test, validation, train = split_files(listed, [0.08, 0.05], SPLIT_SEED)
        tokenizer_file = self.out / "tokenizer.json"
        if not tokenizer_file.is_file():
            self.say(f"tokenizer: BPE {self.plan.vocab_size} on {len(train)} files")
            tokenizer = train_tokenizer(train, self.plan.vocab_size)
            with files.written(tokenizer_file) as part:
                tokenizer.save(str(part))
        packed = self._packed(tokenizer_file, {"train": train, "validation": validation, "test": test})
        splits = {name: Sequences(ids) for name, ids in packed.items()}
        counts = (len(train), len(validation), len(test))
        n = self.plan.held_out_sequences
        held_out = {name: _shuffled(splits[name].ids, n) for name in ("validation", "test")}
        text = _shuffled(splits["train"].ids, len(splits["train"])).ids
        transfer, train = text.split([self.plan.student_sequences, len(text) - self.plan.student_sequences])
        return Corpus(
            Sequences(train), Sequences(transfer), held_out["validation"], held_out["test"], tokenizer_file, counts, folder
        )

    def _packed(self, tokenizer_file: Path, splits: dict[str, list[Path]]) -> dict[str, torch.Tensor]:
        file = self.out / "corpus.safetensors"
        if not file.is_file():
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
            packed = {n: tokenize(tokenizer, f, self.plan.length, SEPARATOR, n).ids for n, f in splits.items()}
            with files.written(file) as part:
                save_file(packed, part)
        return load_file(file)

    def teacher(self, corpus: Corpus) -> Result:
        """The teacher, trained once whatever the seeds."""
        plan = self.plan
        recipe = self._recipe("teacher", corpus, plan.teacher, plan.teacher_steps, plan.teacher_lr, seed=0)
        return distill(recipe, train_data=corpus.train, validation_data=corpus.validation, bar=self.bar, say=_quiet)

    def longer_steps(self, plain: Result, distilled: Result, capture_seconds: float) -> int:
        """Steps that training on hard labels does in the time that capture and distillation took."""
        a_step = plain.seconds / plain.steps
        return plain.steps + max(round((capture_seconds + max(distilled.seconds - plain.seconds, 0.0)) / a_step), 1)

    def capture(self, corpus: Corpus, teacher: Result) -> dict[str, float]:
        """The teacher's targets on the students' text; a capture that was killed goes on where its last shard ended."""
        path, rate_file, data = self.out / "cache", self.out / "capture.json", corpus.transfer
        identity = weights_hash(teacher.model)
        if not ((path / "manifest.json").is_file() and read_manifest(path)[0].complete):
            model = load_folder(teacher.model, "teacher").eval()
            head = find_head(model, {"input_ids": data.ids[:1].long()})
            with CacheWriter(
                path, vocab_size=self.plan.vocab_size, k=self.plan.k, temperatures=self.plan.temperatures, teacher=identity,
                tokenizer_hash=file_hash(corpus.tokenizer), records_per_shard=self.plan.batch_size * 32,
            ) as writer:  # fmt: skip
                left = data.ids[len(writer) :].numel()
                began = time.perf_counter()
                with self.bar("capture", data.ids.numel(), "tokens") as shown:
                    capture(model, list(data.ids.long()), writer, batch_size=self.plan.batch_size, head=head,
                            progress=lambda done, total: shown.update(done))  # fmt: skip
                # Written before the cache is finished: a finished cache is not captured again.
                if left or not rate_file.is_file():
                    files.write_json(rate_file, {"tokens_per_s": left / (time.perf_counter() - began)})
        rate = json.loads(rate_file.read_text())["tokens_per_s"]
        info = CacheReader(path, teacher=identity).info
        return {"bytes_per_token": info.bytes_per_token, "kl": info.kl_mean, "kl_max": info.kl_max, "k": info.k,
                "tokens": info.tokens, "capture_tokens_per_s": rate, "capture_seconds": info.tokens / rate}  # fmt: skip

    def student(self, name: str, corpus: Corpus, steps: int, seed: int) -> Result:
        """One student of one seed: `kd` reads the cache, any other name trains on hard labels."""
        plan = self.plan
        changes: dict[str, Any] = {"eval_every": plan.eval_every, "save_every": plan.eval_every, "keep": steps}
        given: dict[str, Any] = {"train_data": corpus.transfer}
        if name == "kd":
            weights = {"temperature": plan.temperature, "soft_weight": plan.soft_weight, "hard_weight": plan.hard_weight}
            changes |= {"method": {"name": "word_kd", **weights}, "teacher": {"cache": str(self.out / "cache")}}
            given = {}
        recipe = self._recipe(f"student_{name}-seed{seed}", corpus, plan.student, steps, plan.student_lr, seed, **changes)
        say = self.say if name == "kd" else _quiet
        result = distill(
            recipe, **given, validation_data=corpus.validation, bar=self.bar, say=lambda line: say(f"student: {line}")
        )
        keep_best(result.out)
        return result

    def test(self, corpus: Corpus, result: Result) -> dict[str, float]:
        """The model on the test files, which nothing was chosen on: as it ended, and where validation liked it best."""
        model = load_folder(result.model, "model")
        found = self._score(model, corpus)
        row = {"ppl": found.ppl, "top1": found.top1, "tokens": found.tokens, "seconds": result.seconds, "steps": result.steps}
        best = result.out / "best.safetensors"
        if best.is_file():
            load_weights(model, best)
            at = json.loads((result.out / "best.json").read_text())
            row |= {"best_ppl": self._score(model, corpus).ppl, "best_step": at["step"]}
        return row

    def _score(self, model: nn.Module, corpus: Corpus) -> Evaluation:
        return evaluate(model, corpus.test, batch_size=32)

    def _recipe(
        self, name: str, corpus: Corpus, config: dict[str, Any], steps: int, lr: float, seed: int, **changes: Any
    ) -> Recipe:
        return Recipe.build({
            "method": "supervised", "out": str(self.out / name), "tokenizer": str(corpus.tokenizer),
            "student": {"model_type": "llama", "config": {**config, "vocab_size": self.plan.vocab_size}},
            "optimizer": {"lr": lr, "warmup_steps": max(steps // 15, 1), "schedule": "cosine", "final_lr_share": 0.05},
            "steps": steps, "batch_size": self.plan.batch_size, "seed": seed, "eval_sequences": 256, "save_every": 100,
            "keep": 1, "tracker": "none", **changes,
        })  # fmt: skip


def history(folder: Path) -> list[dict[str, Any]]:
    """A run's evaluations: step, seconds of training, `validation_ppl`."""
    return [row for row in files.read_lines(folder / "metrics.jsonl") if "validation_ppl" in row]


def keep_best(folder: Path) -> None:
    """Leaves of a run's checkpoints the weights that validation liked best, and the last one."""
    if (folder / "best.json").is_file():
        return
    best = min(history(folder), key=lambda row: row["validation_ppl"])
    steps = sorted((folder / "checkpoints").glob("step-*"))
    tensors = load_file(folder / "checkpoints" / f"step-{best['step']:08d}" / "training.safetensors")
    with files.written(folder / "best.safetensors") as part:
        save_file({k.removeprefix("module.student."): v for k, v in tensors.items() if k.startswith("module.student.")}, part)
    files.write_json(folder / "best.json", {"step": best["step"], "validation_ppl": best["validation_ppl"]})
    for old in steps[:-1]:
        shutil.rmtree(old)


def _shuffled(ids: torch.Tensor, count: int) -> Sequences:
    """The first `count` sequences of a fixed shuffle, so that a part of a split is drawn from all of its files."""
    return Sequences(ids[Order(len(ids), SPLIT_SEED).take(0, min(count, len(ids)))])


def _quiet(line: str) -> None:
    """Lines of runs that the quickstart reports on itself."""
