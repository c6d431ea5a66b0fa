"""Where the kernels run, what a launch may be given (`bench.launch_lint`), NumPy's warnings, and what makes the interpreter
bearable. The warnings are off: it computes both sides of a `where`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from bench import launch_lint

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure() -> None:
    """Spares the interpreter what costs it three quarters of its time and no kernel needs: replacing `triton.language` anew at
    every call of a helper, types that it has made before, and a watch for integer overflow, which no GPU keeps and small cases
    do not have.
    """
    if not INTERPRETED:
        return
    from triton.language import core
    from triton.runtime import interpreter

    replace, seen = interpreter._patch_lang, set()

    def once(fn: Any) -> Any:
        if fn.__module__ not in seen:
            replace(fn)
            seen.add(fn.__module__)
        return types.SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    make, known = core.block_type.__init__, {}

    def made_before(self: Any, element_ty: Any, shape: Any) -> None:
        key = None if isinstance(element_ty, core.pointer_type) else (element_ty, *(getattr(n, "value", n) for n in shape))
        if key not in known:
            make(self, element_ty, shape)
            if key is not None:  # a pointer has no hash
                known[key] = self.__dict__
        else:
            self.__dict__ = known[key]

    core.block_type.__init__ = made_before


def thinned(axes: Sequence[Sequence[int]], n: int) -> list[int]:
    """Which of these places in a product of parameters are kept: every n-th diagonal.

    Of three or more parameters every two values must still meet, of two every value be met.
    """
    kept = [i for i, places in enumerate(axes) if sum(places) % n == 0]
    together = 1 if len(axes[0]) == 2 else 2
    for chosen in itertools.combinations(range(len(axes[0])), together):
        of_all = {tuple(places[a] for a in chosen) for places in axes}
        assert of_all == {tuple(axes[i][a] for a in chosen) for i in kept}, f"thinned({n}) leaves out values"
    return kept


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A product of a test marked `thinned(n)` is run whole on a GPU and on CPU backends, thinned under the interpreter."""
    if not INTERPRETED:
        return
    left_out = []
    for _, group in itertools.groupby(items, lambda item: getattr(item, "originalname", item.name)):
        same = list(group)
        mark = same[0].get_closest_marker("thinned")
        if mark is None or len(same) == 1:
            continue
        axes = [m.args[0].split(",") if isinstance(m.args[0], str) else m.args[0] for m in same[0].iter_markers("parametrize")]
        values = [[tuple(id(item.callspec.params[name]) for name in axis) for axis in axes] for item in same]
        numbers = [{value: i for i, value in enumerate(dict.fromkeys(column))} for column in zip(*values, strict=True)]
        kept = thinned([[n[v] for n, v in zip(numbers, row, strict=True)] for row in values], *mark.args)
        left_out += [item for i, item in enumerate(same) if i not in kept]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def quiet() -> None:
    np.seterr(all="ignore")


@pytest.fixture(autouse=True)
def linted(device: str) -> Iterator[None]:
    """What the interpreter takes, a GPU's launch may not; what a CPU answers at once, a GPU has the host wait for."""
    if device == "cuda":
        yield
        return
    with launch_lint.interpreted():
        yield
