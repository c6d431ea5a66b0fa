"""The architecture as a test: a room imports only rooms below it, and an op has one name on every floor."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kdfast"

#: Rooms from the ground up, each with the rooms it may import beside itself.
ROOMS = {
    "_C": set(),
    "_cuda": set(),
    "files": set(),
    "extras": set(),
    "tensors": set(),
    "options": set(),
    "dispatch": set(),
    "memory": set(),
    "chunks": {"options", "memory"},
    "grams": {"options"},
    "head_grams": set(),
    "logit_grams": {"memory", "chunks", "head_grams"},
    "backends.reference": {"options", "dispatch", "chunks"},
    "backends.compiled": {"options", "dispatch", "memory", "chunks", "grams", "logit_grams", "_C"},
    "backends.cuda": {"options", "dispatch", "_cuda"},
    "backends.triton": {"options", "dispatch", "chunks", "grams", "logit_grams"},
    "ops": {"options", "dispatch", "memory", "chunks"},
    "losses": {"options", "ops"},
    "strict": set(),
    "integrations": set(),
    "models": {"options", "files", "extras", "strict", "tensors", "integrations"},
    "text": {"strict", "files", "extras"},
    "cache": {"options", "ops", "memory", "files", "extras", "strict", "text", "models", "_C"},
    "train": {"options", "ops", "losses", "files", "extras", "text", "cache", "strict", "tensors", "integrations", "models"},
    "cli": {
        *(
            "options",
            "dispatch",
            "files",
            "extras",
            "ops",
            "losses",
            "text",
            "cache",
            "train",
            "strict",
            "models",
            "_C",
            "_cuda",
        ),
    },
}
OPS = ["attention", "codec", "hidden", "linear", "linear_logit_mse", "logits", "scale", "topk"]


def room_of(module: str) -> str:
    """The room a dotted module below kdfast belongs to; "" for the package itself."""
    parts = module.split(".")
    if parts[0] == "backends":
        return ".".join(parts[:2])
    return parts[0]


def imports(path: Path) -> set[str]:
    """Rooms a file imports, imports inside functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "kdfast" else [node.module]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
            continue
        found |= {room_of(name.removeprefix("kdfast.")) for name in names if name.startswith("kdfast.")}
    return found


ABOVE = (PACKAGE / "__init__.py", PACKAGE / "__main__.py", PACKAGE / "backends" / "__init__.py")
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p not in ABOVE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_upward_import(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    room = room_of(module)
    assert room in ROOMS, f"{path}: no floor is known for {room}; add it to ROOMS with what it may import"
    for target in imports(path):
        if target in ROOMS:
            assert target == room or target in ROOMS[room], f"{path} imports {target}, which is not below {room}"
        else:  # a name from the package itself: the public functions, above every floor but training and the commands
            assert room in ("cache", "train", "cli", "losses"), f"{path} imports kdfast.{target} from below it"


@pytest.mark.parametrize("op", OPS)
def test_one_name_per_op_on_every_floor(op: str) -> None:
    for folder in ("backends/reference", "backends/compiled", "backends/triton", "ops"):
        assert (PACKAGE / folder / f"{op}.py").exists(), f"{folder} has no {op}.py"


def test_the_extension_knows_nothing_of_torch() -> None:
    sources = list((ROOT / "csrc").rglob("*.[hc]*"))
    assert sources
    assert not [str(p) for p in sources if any(word in p.read_text() for word in ("<torch/", "<ATen/", "<c10/"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def imported_files(path: Path) -> set[Path]:
    """Files of the package that a file imports, inside functions too, but for the names of types alone."""
    tree = ast.parse(path.read_text())
    types = {id(n) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
             for n in ast.walk(block)}  # fmt: skip
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in types:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import) and id(node) not in types:
            names |= {alias.name for alias in node.names}
    found = {ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names if name.startswith("kdfast.")}
    return {file for file in found if file.exists()} - {path}


def test_no_file_imports_itself_through_others() -> None:
    below = {path: imported_files(path) for path in FILES}
    while leaves := [path for path, wanted in below.items() if not wanted]:
        below = {path: wanted.difference(leaves) for path, wanted in below.items() if path not in leaves}
    assert not below, f"a circle runs through {', '.join(sorted(str(p.relative_to(ROOT)) for p in below))}"
