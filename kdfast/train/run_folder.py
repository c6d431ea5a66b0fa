"""What a run folder says about itself: recipe, seed, versions, commit, data hash, result, the model that came of it."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import kdfast
from kdfast.files import locked, read_json, write_json, write_text
from kdfast.train.best import FOLDER as BEST
from kdfast.train.best import forget_beyond
from kdfast.train.data import digest_of
from kdfast.train.inputs import Inputs
from kdfast.train.recipe import Recipe
from kdfast.train.tasks.classes import ClassTask
from kdfast.train.tasks.task import Evaluation

#: Keys that change how a run is watched, not what it computes.
_FREE = (
    "steps", "ahead", "alignment", "log_every", "eval_every", "eval_teacher", "keep_best", "save_every", "keep", "tracker",
    "check", "out",
)  # fmt: skip
#: Keys, wherever they stand, of files and folders: what is compared is where they lie, however it is spelled.
_PLACES = ("path", "weights", "cache", "init_from", "tokenizer")
#: Keys of a recipe's data that say what is trained on, or how, and nothing of the files that are scored.
_OF_TRAINING = frozenset({
    "train", "validation", "validation_share", "validation_split", "unlabelled", "dataset", "dataset_config", "split",
    "streaming", "pack", "group_by_length", "domain_shares", "shift", "exclude_labels", "excluded",
})  # fmt: skip


def begin(folder: Path, recipe: Recipe, inputs: Inputs, corpora: Sequence[str], say: Callable[[str], None]) -> None:
    """Writes `recipe.yaml` and `run.json`, and removes the checkpoint that a kill cut short; `say` is told where a run
    goes on over another number of steps than it began with. `corpora`: digests of what phases read beside the training data.

    Raises:
        ValueError: the folder holds a run of another recipe or of other data, which this one must not continue.
    """
    if (folder / "run.json").is_file():
        _check_same(folder, recipe, inputs)
        if read_json(folder / "run.json").get("corpora", list(corpora)) != list(corpora):
            raise ValueError(_differs(folder, "the corpus of a phase"))
        before, begun = Recipe.load(folder / "recipe.yaml").total_steps, any((folder / "checkpoints").glob("step-????????"))
        if begun and before != recipe.total_steps and not (folder / "result.json").is_file():
            say(f"steps: {before} when this run began, {recipe.total_steps} now, and so its schedules from here on")
        if forgotten := forget_beyond(folder, recipe.total_steps):
            say(forgotten)
    folder.mkdir(parents=True, exist_ok=True)
    for part in (folder / ".model.part", folder / f".{BEST}.part", *(folder / "checkpoints").glob(".step-????????.part")):
        shutil.rmtree(part, ignore_errors=True)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    classes = {"classes": inputs.task.names} if isinstance(inputs.task, ClassTask) else {}
    write_json(
        folder / "run.json", {"seed": recipe.seed, **classes, "corpora": list(corpora), **_hashes(inputs), **environment()}
    )


@contextlib.contextmanager
def claimed(folder: Path, main: bool) -> Iterator[None]:
    """While the block runs no other run trains in `folder`; the `main` process of several claims it for all.

    Raises:
        ValueError: one does.
    """
    with contextlib.ExitStack() as stack:
        try:
            if main:
                stack.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise ValueError(f"out: another process trains in {folder}; wait until it has ended, or set another out") from None
        yield


def finish(folder: Path, steps: int, seconds: float, evaluation: Evaluation | None) -> None:
    """Writes `result.json`, the mark of a finished run."""
    write_json(folder / "result.json", {"steps": steps, "seconds": seconds, "evaluation": evaluation})


def finished(folder: Path, recipe: Recipe, inputs: Inputs) -> dict[str, Any] | None:
    """The result of a finished run of this very recipe and data, or None; it may have been of fewer steps.

    Raises:
        ValueError: the folder holds a run of another recipe.
    """
    if not (folder / "run.json").is_file() or recipe.check:
        return None
    _check_same(folder, recipe, inputs)
    if not (folder / "result.json").is_file():
        return None
    result: dict[str, Any] = read_json(folder / "result.json")
    return result


@dataclass(frozen=True)
class Trained:
    """The model of a run that is done, and what its recipe says of it and of data like those it was scored on."""

    model: str = ""
    function: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    classes: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)


def trained(folder: Path, best: bool = False) -> Trained:
    """Of a run's folder; empty of any other folder, and of one that is a model's itself. `best`: with the model of the best
    evaluation.

    Raises:
        ValueError: the run has not come to its model, or kept no best one.
    """
    if not (folder / "recipe.yaml").is_file() or (folder / "config.json").is_file():
        if best:
            raise ValueError(f"best: expected a run's folder, got {str(folder)!r}")
        return Trained()
    if best and not (folder / BEST).is_dir():
        raise ValueError(f"best: expected a run with keep_best: true, got {str(folder)!r}, which kept none")
    if not best and not (folder / "model").is_dir():
        raise ValueError(f"model: expected a run that is done, got {str(folder)!r}, which has no model; run kdfast train again")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    student, task = recipe["student"], recipe["task"]
    return Trained(
        str(folder / (BEST if best else "model")),
        student["function"],
        student["arguments"] if student["function"] else {},
        task if isinstance(task, dict) else {"name": task},
        {key: value for key, value in recipe["data"].items() if key not in _OF_TRAINING},
        recipe["tokenizer"],
        read_json(folder / "run.json").get("classes", []) if (folder / "run.json").is_file() else [],
        recipe["data"].get("validation") or [],
    )


def environment() -> dict[str, Any]:
    """Versions, commit and machine a result belongs to."""
    packages = {}
    for name in ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy"):
        packages[name] = metadata.version(name)
    return {"kdfast": kdfast.__version__, "commit": _commit(), "python": platform.python_version(), "packages": packages,
            "threads": torch.get_num_threads(), "machine": platform.machine()}  # fmt: skip


def peak_memory_gb() -> float:
    """Peak memory of the device so far, of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _hashes(inputs: Inputs) -> dict[str, str | None]:
    return {"data_hash": inputs.digest, "validation_hash": None if inputs.validation is None else digest_of(inputs.validation)}


def _check_same(folder: Path, recipe: Recipe, inputs: Inputs) -> None:
    # Read as a recipe, what was written before a key existed has that key's default.
    before = _flat(yaml.safe_load(Recipe.load(folder / "recipe.yaml").to_yaml()))
    now = _flat(yaml.safe_load(recipe.to_yaml()))
    for values in (before, now):  # a longer run is the same run, gone on
        values.pop(f"phases[{len(recipe.phases) - 1}].steps", None)
    outs = before["out"], now["out"]
    differs = [
        k for k in sorted(before.keys() | now.keys())
        if k.split(".")[0] not in _FREE and before.get(k) != now.get(k)
        and not (k.split(".")[-1] in _PLACES and _same_place((before.get(k), now.get(k)), outs))
    ]  # fmt: skip
    known = read_json(folder / "run.json")
    if not differs:  # evaluations of other data than before would be no continuation either
        differs = [f"the {'training' if name == 'data_hash' else 'validation'} data"
                   for name, value in _hashes(inputs).items() if known.get(name, value) != value]  # fmt: skip
    if differs:
        # What was chosen by name says why its options differ.
        differs.sort(key=lambda key: not key.endswith((".name", ".path", ".function", ".model_type")))
        more = f" and {len(differs) - 4} more" if len(differs) > 4 else ""
        raise ValueError(_differs(folder, ", ".join(differs[:4]) + more))


def _differs(folder: Path, what: str) -> str:
    return f"out: {folder} holds a run that differs in {what}; set another out, or remove the folder"


def _same_place(paths: tuple[Any, Any], outs: tuple[str, str]) -> bool:
    """Whether two paths lead to one place, or lie alike as seen from the run's folder, which may have been moved with what lies
    in it: the members of a generation, which teach the next."""
    if not all(isinstance(path, str) for path in paths):
        return False
    before, now = (os.path.relpath(path, out) for path, out in zip(paths, outs, strict=True))
    return os.path.realpath(paths[0]) == os.path.realpath(paths[1]) or before == now


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        return {k: v for i, value in enumerate(values) for k, v in _flat(value, f"{path}[{i}]").items()}
    if not isinstance(values, dict):
        return {path: values}
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{path}.{key}" if path else key)
    return out


def _commit() -> str | None:
    """The commit of the source tree kdfast is imported from, when it is one."""
    root = Path(kdfast.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
