"""Checkpoints: everything a run needs to go on exactly, as safetensors and JSON, never a pickle.

A checkpoint is a folder `checkpoints/step-00000100` that appears by one rename:

    training.safetensors    the wrapped module's and the optimiser's tensors, by parameter name
    rng-00000.safetensors   random states of process 0, and so on
    state.json              step, seconds, the optimiser's scalars, Python's random state, loss scale
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from kdfast import files
from kdfast.models.load import tied
from kdfast.tensors import load_tensors, save_tensors
from kdfast.train.inputs import Inputs
from kdfast.train.students import save_folder

# The optimiser's state is keyed by parameter names, so it survives another wrapping (none, DDP, FSDP).
_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint of a run folder."""
    found = sorted((folder / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def write_folder(target: Path, accelerator: Accelerator, fill: Any) -> None:
    """Calls `fill(temporary)` on every process and renames the folder into place once all are done."""
    part = target.with_name(f".{target.name}.part")
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        with files.naming(target, part):
            fill(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # a full disk has no room for it
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files.replace_folder(part, target)
    accelerator.wait_for_everyone()


def save(
    folder: Path,
    step: int,
    seconds: float,
    rows: int,
    keep: int,
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes the checkpoint of `step`, `rows` rows of data into the run, and removes all but the newest `keep`."""

    def fill(part: Path) -> None:
        weights: dict[str, Any] = get_model_state_dict(module, options=_OPTIONS)
        states: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=_OPTIONS)
        rng_tensors, rng_plain = _rng_state()
        save_tensors(rng_tensors, part / f"rng-{accelerator.process_index:05d}.safetensors")
        files.write_json(part / f"rng-{accelerator.process_index:05d}.json", rng_plain)
        if not accelerator.is_main_process:
            return
        doubled = tied(unwrapped(module))
        tensors = {f"module.{k}": v for k, v in weights.items() if k not in doubled}
        for name, state in states["state"].items():
            tensors |= {f"optimizer.{name}/{key}": value for key, value in state.items()}
        save_tensors({k: v.detach().contiguous().clone() for k, v in tensors.items()}, part / "training.safetensors")
        scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        rest = {"step": step, "seconds": seconds, "rows": rows, "world": accelerator.num_processes, "scaler": scaler,
                "param_groups": states["param_groups"]}  # fmt: skip
        files.write_json(part / "state.json", rest)

    write_folder(folder / "checkpoints" / f"step-{step:08d}", accelerator, fill)
    if accelerator.is_main_process:
        for old in sorted((folder / "checkpoints").glob("step-*"))[:-keep]:
            shutil.rmtree(old)


class Resumed(NamedTuple):
    """Where a checkpoint was taken. `same_world`: by as many processes as there are now."""

    step: int
    seconds: float
    rows: int
    same_world: bool


def load(path: Path, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> Resumed:
    """Puts a checkpoint back: weights, optimiser, and, by as many processes as it was written by, random states.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return _load(path, accelerator, module, optimizer)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error}; remove {path} to go on from the checkpoint before it, or from the start") from None


def _load(path: Path, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> Resumed:
    state = files.read_json(path / "state.json")
    tensors = load_tensors(path / "training.safetensors")
    weights: dict[str, Any] = {k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")}
    states: dict[str, Any] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, _, field = key.removeprefix("optimizer.").rpartition("/")
            states.setdefault(name, {})[field] = value
    weights |= {copy: weights[first] for copy, first in tied(unwrapped(module)).items()}
    set_model_state_dict(module, weights, options=_OPTIONS)
    groups = [_tuples(group) for group in state["param_groups"]]
    options = replace(_OPTIONS, strict=False)
    set_optimizer_state_dict(module, optimizer, {"state": states, "param_groups": groups}, options=options)
    # What a later phase trains has no state yet; loading gave it one, which would count its steps from before its first.
    for name, parameter in unwrapped(module).named_parameters():
        if name not in states:
            optimizer.state.pop(parameter, None)
    if state["scaler"] is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    same = state["world"] == accelerator.num_processes
    if same:
        rng = path / f"rng-{accelerator.process_index:05d}.safetensors"
        _set_rng_state(load_tensors(rng), files.read_json(rng.with_suffix(".json")))
    return Resumed(state["step"], state["seconds"], state["rows"], same)


def export(target: Path, accelerator: Accelerator, module: nn.Module, student: nn.Module, inputs: Inputs) -> None:
    """Writes the folder `target`, the student to be loaded by anyone with its tokenizer, and what its method keeps beside it.

    Adapters are merged into the `student` itself: a run that goes on after it gives a copy.
    """
    weights: dict[str, Any] = get_model_state_dict(module, options=_OPTIONS)

    def fill(part: Path) -> None:
        if accelerator.is_main_process:
            own = {k.removeprefix("student."): v for k, v in weights.items() if k.startswith("student.")}
            save_folder(student, part, own, inputs.tokenizer, inputs.tokenizer_homes)
            for number, objective in enumerate(unwrapped(module).objectives):  # type: ignore[arg-type]
                name = f"objectives.{number}."
                objective.export(part, {k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)})

    write_folder(target, accelerator, fill)


def unwrapped(module: nn.Module) -> nn.Module:
    """What DDP wrapped; FSDP2 wraps nothing."""
    inner: nn.Module = getattr(module, "module", module)
    return inner


@contextlib.contextmanager
def drawing_apart() -> Iterator[None]:
    """What is drawn at random in the block leaves no trace in what is drawn after it."""
    tensors, plain = _rng_state()
    try:
        yield
    finally:
        _set_rng_state(tensors, plain)


def _tuples(group: dict[str, Any]) -> dict[str, Any]:
    """JSON turned the betas into a list; AdamW wants the tuple it wrote."""
    return {k: tuple(v) if k == "betas" else v for k, v in group.items()}


def _rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": random.getstate(), "numpy": [name, position, has_gauss, cached]}


def _set_rng_state(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    name, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
