"""The soft decision tree against a loop over its nodes in float64; its runs, its explanations, its pictures."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers")

from kdfast.cli import main
from kdfast.models.soft_tree import SoftTree, TreeOutput, log_paths
from kdfast.models.view import View
from kdfast.train import Batch, Recipe, capture_classes, distill
from kdfast.train.objective import Setting
from kdfast.train.recipe import Teacher
from kdfast.train.recipes.soft_tree import SoftTreeMethod, SoftTreeOptions

# The definition, node by node


class Loop:
    """The tree of the same parameters, visited node by node with probabilities in float64."""

    def __init__(self, tree: SoftTree) -> None:
        self.tree, self.weight, self.bias = tree, tree.weight, tree.bias
        self.depth, self.beta = tree.depth, tree.beta

    @property
    def leaves(self) -> Tensor:
        return self.tree.leaf_scale * self.tree.leaves

    def nodes(self, x: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
        """(node, level, P_i, probability of going left, of going right) of every inner node."""
        waiting = [(0, 0, x.new_ones(len(x)))]
        while waiting:
            node, level, path = waiting.pop()
            gate = self.beta * (x.flatten(1) @ self.weight[node] + self.bias[node])
            left, right = 1 / (1 + gate.exp()), 1 / (1 + (-gate).exp())
            yield node, level, path, left, right
            if level + 1 < self.depth:
                waiting += [(2 * node + 1, level + 1, path * left), (2 * node + 2, level + 1, path * right)]

    def paths(self, x: Tensor) -> Tensor:
        found = {}
        first = 2 ** (self.depth - 1) - 1
        for node, level, path, left, right in self.nodes(x):
            if level + 1 == self.depth:
                found[2 * (node - first)], found[2 * (node - first) + 1] = path * left, path * right
        return torch.stack([found[leaf] for leaf in range(2**self.depth)], 1)

    def cross_entropy(self, x: Tensor, target: Tensor) -> Tensor:
        """sum over rows, leaves and classes of -P_l T_k log Q_lk."""
        total, paths = x.new_zeros(()), self.paths(x)
        for leaf, phi in enumerate(self.leaves):
            q = phi.exp() / phi.exp().sum()
            total = total - (paths[:, leaf] * (target * q.log()).sum(1)).sum()
        return total

    def penalty(self, x: Tensor, decay: float = 0.5) -> Tensor:
        """Of one batch by itself."""
        total = x.new_zeros(())
        for _, level, path, _, right in self.nodes(x):
            a = (path * right).sum() / path.sum()
            total = total - decay**level * (a.log() + (1 - a).log()) / 2
        return total


def make_tree(depth: int, inputs: int = 6, classes: int = 5, scale: float = 1.0, **options: Any) -> SoftTree:
    torch.manual_seed(depth)
    tree = SoftTree([inputs], classes, depth=depth, **options).double()
    with torch.no_grad():
        for parameter in tree.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return tree


def make_method(tree: SoftTree, teachers: int = 0, **options: Any) -> SoftTreeMethod:
    taught = [SimpleNamespace(info=None, weight=float(1 + i)) for i in range(teachers)]
    return SoftTreeMethod(SoftTreeOptions(**options), Setting(tree, taught, None)).double()


def loss_of(
    method: SoftTreeMethod, tree: SoftTree, x: Tensor, labels: Tensor | None, said: Any = (), num_items: int = 1, **batch: Any
) -> tuple[Tensor, Any]:
    out = tree(x)
    return method(View(own_logits=out.logits, output=out), [View(own_logits=logits) for logits in said],
                  Batch({"x": x}, labels, **batch), num_items)  # fmt: skip


def same(got: Tensor, want: Tensor, tree: SoftTree, rtol: float = 1e-9) -> None:
    """Values, and gradients of every parameter under an incoming gradient of 3."""
    assert torch.allclose(got, want, rtol=rtol, atol=1e-12)
    parameters = list(tree.parameters())
    found = torch.autograd.grad(3 * got, parameters, allow_unused=True)
    wanted = torch.autograd.grad(3 * want, parameters, allow_unused=True)
    for g, w in zip(found, wanted, strict=True):
        assert (g is None or not g.any()) if w is None else torch.allclose(g, w, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 5], ids=["one-node", "three-nodes", "deep"])
def test_paths_cross_entropy_and_penalty_equal_a_loop_over_nodes(depth: int) -> None:
    tree = make_tree(depth, beta=0.7, leaf_scale=1.5)
    loop, x = Loop(tree), torch.randn(9, 6, dtype=torch.float64)
    labels = torch.randint(5, (9,))
    out = tree(x)
    assert torch.allclose(out.log_leaves.exp(), loop.paths(x), rtol=1e-12)
    for node, _, path, _, right in loop.nodes(x):
        assert torch.allclose(out.log_nodes[:, node].exp(), path, rtol=1e-12)
        assert torch.allclose(out.gates[:, node].sigmoid(), right, rtol=1e-12)
    one_hot = F.one_hot(labels, 5).double()
    got, _ = loss_of(make_method(tree, penalty=0.0, hard_weight=1.0), tree, x, labels, num_items=9)
    same(got, loop.cross_entropy(x, one_hot) / 9, tree)
    got, metrics = loss_of(make_method(tree, penalty=0.3, hard_weight=0.8, penalty_decay=0.6), tree, x, labels, num_items=9)
    same(got, 0.8 * loop.cross_entropy(x, one_hot) / 9 + 0.3 * loop.penalty(x, 0.6), tree)
    assert torch.allclose(metrics["penalty"].total, 0.3 * loop.penalty(x, 0.6))


def test_the_soft_term_is_of_all_rows_and_the_hard_term_of_those_with_a_label() -> None:
    tree = make_tree(3)
    x = torch.randn(8, 6, dtype=torch.float64)
    labels = torch.tensor([1, -100, 4, -100, 0, 0, 2, -100])
    heard = torch.tensor([True] * 7 + [False])
    said = [torch.randn(8, 5), torch.randn(8, 5)]
    method = make_method(tree, 2, temperature=2.0, soft_weight=0.7, hard_weight=0.3, penalty=0.0)
    got, metrics = loss_of(method, tree, x, labels, said, 7, soft_mask=heard)
    target = sum(w * (logits.double() / 2).softmax(1) for w, logits in zip((1 / 3, 2 / 3), said, strict=True)) * heard[:, None]
    hard = F.one_hot(labels.clamp(min=0), 5).double() * (labels >= 0)[:, None]
    loop = Loop(tree)
    want = (0.7 * loop.cross_entropy(x, target) + 0.3 * loop.cross_entropy(x, hard)) / 7
    same(got, want, tree)
    assert (float(metrics["soft"].count), float(metrics["hard"].count)) == (7, 5)
    # No label anywhere: the teacher's word alone.
    got, metrics = loss_of(method, tree, x, None, said, 8)
    assert "hard" not in metrics
    assert torch.isfinite(got)
    with pytest.raises(ValueError, match="data: method soft_tree without a teacher expects labels"):
        loss_of(make_method(tree), tree, x, None, (), 8)


def test_the_window_grows_with_the_level() -> None:
    """Three batches; a_i at level d is the mean over a window of 2^(d+1) batches, its slope the last batch's."""
    tree = make_tree(3)
    method = make_method(tree, hard_weight=1.0, penalty=0.5, window=2.0)
    loop, seen = Loop(tree), []
    for turn in range(3):
        x = torch.randn(7, 6, dtype=torch.float64)
        seen.append(x)
        got = method.penalty(tree(x))
        want = x.new_zeros(())
        for node in range(7):
            sums = []
            for batch in seen:
                _, level, path, left, right = next(found for found in loop.nodes(batch) if found[0] == node)
                sums.append(torch.stack([(path * left).sum(), (path * right).sum()]))
            kept = 1 - 1 / (2 * 2.0**level)
            ages = [kept ** (turn - i) for i in range(turn + 1)]
            mean = sum(age * s.detach() for age, s in zip(ages, sums, strict=True)) / sum(ages)
            a = mean[1] / mean.sum()
            value = -(0.5**level) * (a.log() + (1 - a).log()) / 2
            slope = -(0.5**level) * (1 / a - 1 / (1 - a)) / 2
            moved = (sums[-1][1] - a * sums[-1].sum()) / mean.sum()  # of N / D, N and D the window's means
            want = want + value + slope * (moved - moved.detach())
        same(got, want, tree)
    method.eval()
    before = method.log_sides.clone()
    method.penalty(tree(seen[0]))
    assert torch.equal(method.log_sides, before)


@pytest.mark.parametrize("scale", [40.0, 1000.0], ids=["steep", "past-the-range-of-exp"])
def test_saturated_gates_give_finite_losses_and_gradients(scale: float) -> None:
    tree = make_tree(8, scale=scale).float()
    x = torch.randn(16, 6)
    loss, _ = loss_of(make_method(tree, penalty=0.1, hard_weight=1.0).float(), tree, x, torch.randint(5, (16,)), num_items=16)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in tree.parameters())
    gates = tree(x).gates.double()
    leaves = log_paths(gates)[:, 255:]
    assert torch.allclose(tree(x).log_leaves.double(), leaves, rtol=1e-5)
    assert torch.allclose(leaves.exp().sum(1), torch.ones(16).double())


def test_float32_is_as_exact_as_its_own_rounding() -> None:
    tree = make_tree(10, inputs=40, scale=0.3)
    x, labels = torch.randn(64, 40, dtype=torch.float64), torch.randint(5, (64,))
    losses, grads = [], []
    for dtype in (torch.float64, torch.float32):
        tree = tree.to(dtype)
        loss, _ = loss_of(make_method(tree, hard_weight=1.0).to(dtype), tree, x.to(dtype), labels, num_items=64)
        losses.append(loss.double())
        grads.append([g.double() for g in torch.autograd.grad(loss, list(tree.parameters()))])
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)
    for truth, got in zip(*grads, strict=True):
        assert float((got - truth).norm() / truth.norm()) < 1e-5


def test_a_step_in_bfloat16_forms_paths_and_losses_in_float32() -> None:
    tree = make_tree(6).float()
    x, labels = torch.randn(32, 6), torch.randint(5, (32,))
    with torch.autocast("cpu", torch.bfloat16):
        out = tree(x)
        got, _ = make_method(tree, hard_weight=1.0).float()(
            View(own_logits=out.logits, output=out), [], Batch({"x": x}, labels), 32
        )
    again = TreeOutput(out.logits, out.gates, log_paths(out.gates), log_paths(out.gates)[:, 63:], out.log_classes)
    assert got.dtype == torch.float32
    want = -(again.log_leaves.exp() @ out.log_classes)[torch.arange(32), labels].mean()
    want = want + 0.1 * make_method(tree).float().penalty(again)
    assert torch.allclose(got, want, rtol=1e-5)


def test_predictions_of_the_likeliest_leaf_and_of_the_mixture() -> None:
    tree = make_tree(4, leaf_scale=0.7)
    x = torch.randn(11, 6, dtype=torch.float64)
    paths, said = Loop(tree).paths(x), Loop(tree).leaves.softmax(-1)
    assert torch.allclose(tree(x).logits.exp(), said[paths.argmax(1)])
    tree.predict = "mixture"
    assert torch.allclose(tree(x).logits.exp(), paths @ said)
    far = make_tree(4, scale=500.0, predict="mixture").float()
    assert torch.isfinite(far(x.float()).logits.exp()).all()


def test_a_tree_is_compiled_exported_and_differentiated_by_torch() -> None:
    tree, x = make_tree(3).float(), torch.randn(5, 6)
    want = tree(x).logits
    assert torch.allclose(torch.compile(tree, fullgraph=True, backend="aot_eager")(x).logits, want, rtol=1e-5)
    assert torch.allclose(torch.export.export(tree, (x,)).module()(x).logits, want, rtol=1e-5)
    values = {name: p.detach() for name, p in tree.named_parameters()}
    grads = torch.func.grad(lambda v: torch.func.functional_call(tree, v, (x,)).log_leaves.sum())(values)
    tree(x).log_leaves.sum().backward()
    assert torch.allclose(grads["weight"], tree.weight.grad, rtol=1e-5)


def test_a_batch_in_parts_has_the_penalty_once() -> None:
    tree = make_tree(2)
    method, x, labels = make_method(tree, hard_weight=1.0, penalty=0.1), torch.randn(6, 6).double(), torch.randint(5, (6,))
    parts = [loss_of(method, tree, x[i : i + 3], labels[i : i + 3], num_items=6)[1]["penalty"] for i in (0, 3)]
    assert float(sum(part.count for part in parts)) == 1


# What a person reads


def test_an_explanation_follows_the_likeliest_path(tmp_path: Path) -> None:
    tree = make_tree(3, classes=3)
    tree.shape = (2, 3)
    x = torch.randn(2, 3, dtype=torch.float64)
    paths = Loop(tree).paths(x[None])[0]
    found = tree.explain(x, names=["cat", "dog", "owl"])
    assert found.leaf == int(paths.argmax())
    assert found.reached == pytest.approx(paths.max().item())
    node, reached = 0, 1.0
    for step in found.steps:
        assert (step.node, step.reached) == (node, pytest.approx(reached))
        node, reached = 2 * node + 1 + step.right, reached * step.taken
    assert node - 7 == found.leaf
    assert reached == pytest.approx(found.reached)
    said = tree.leaves[found.leaf].softmax(-1)
    assert found.label == ["cat", "dog", "owl"][int(said.argmax())]
    lines = str(found).splitlines()
    assert len(lines) == 4
    way = "right" if found.steps[0].right else "left"
    assert lines[0].startswith(f"level 0, node 0: filter says {found.steps[0].gate:+.2f}, goes {way} with probability")
    assert lines[-1].startswith(f"leaf {found.leaf} of 8, reached with probability {found.reached:.3f}: {found.label} (")
    assert str(tree.explain(x[None], names=["cat", "dog", "owl"])) == str(found)
    first = torch.zeros(8).double()
    first[0] = 1  # all inputs come to leaf 0: what lies right of the root is said of its leaves alike
    sides = str(tree.explain(x, names=["cat", "dog", "owl"], shares=first)).splitlines()[0]
    below = tree.below(first)
    left, right = (
        " ".join(n for n, p in zip(("cat", "dog", "owl"), below[i].tolist(), strict=True) if p >= 1 / 3) for i in (1, 2)
    )
    assert sides.endswith(f"(left: {left}; right: {right})")
    for saturated in (1e4, -1e4):
        with torch.no_grad():
            tree.bias.fill_(saturated)
        assert tree.explain(x).leaf == (7 if saturated > 0 else 0)


def test_what_lies_below_a_node_is_the_mean_of_its_leaves() -> None:
    tree = make_tree(2, classes=3, leaf_scale=2.0)
    said, x = Loop(tree).leaves.detach().softmax(-1), torch.randn(20, 6, dtype=torch.float64)
    shares = tree.reach(x, batch_size=7)
    assert torch.allclose(shares, Loop(tree).paths(x).mean(0))
    below = tree.below(shares)
    assert torch.allclose(below[3:], said)
    assert torch.allclose(below[1], (shares[:2, None] * said[:2]).sum(0) / shares[:2].sum())
    assert torch.allclose(below[0], shares @ said)
    assert torch.allclose(tree.below()[0], said.mean(0))


@pytest.mark.parametrize("shape", [[1, 6, 5], [3, 4, 4], [2, 4, 4], [7]], ids=["grey", "colour", "two-channels", "no-image"])
def test_pictures_of_a_tree_and_of_a_path(shape: list[int], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    tree = SoftTree(shape, 4, depth=3)
    x = torch.randn(5, *shape)
    for draw in (lambda file: tree.save_picture(file, shares=tree.reach(x), levels=2, root=0), tree.explain(x[0]).save):
        draw(tmp_path / "t.png")
        assert (tmp_path / "t.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        draw(tmp_path / "t.svg")
        first = (tmp_path / "t.svg").read_bytes()
        assert ElementTree.fromstring(first).tag.endswith("svg")
        draw(tmp_path / "t.svg")
        assert (tmp_path / "t.svg").read_bytes() == first
    tree.save_picture(tmp_path / "part.png", root=2)
    assert (tmp_path / "part.png").stat().st_size > 1000


def test_a_tree_of_depth_ten_is_drawn_in_parts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tree = SoftTree([1, 4, 4], 3, depth=10)
    tree.save_picture(tmp_path / "top.png")
    tree.save_picture(tmp_path / "part.png", root=1022, levels=1)
    with pytest.raises(ValueError, match="levels: expected 1 to 1 below node 1022, got 2"):
        tree.save_picture(tmp_path / "part.png", root=1022, levels=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftTree([3], 2, depth=0), "depth: expected whole numbers of at least 1, got 0"),
        (lambda: SoftTree([3], 2, depth=40), "depth: expected at most 16"),
        (lambda: SoftTree([3], 1), "classes: expected whole numbers of at least 2, got 1"),
        (lambda: SoftTree([3, 0], 2), "shape: expected whole numbers of at least 1, got 0"),
        (lambda: SoftTree([], 2), "shape: expected whole numbers of at least 1, got 0"),
        (lambda: SoftTree([3], 2, beta=0), "beta: expected a number above 0, got 0"),
        (lambda: SoftTree([3], 2, leaf_scale=-1), "leaf_scale: expected a number above 0, got -1"),
        (lambda: SoftTree([3], 2, predict="best"), "predict: expected one of leaf, mixture, got 'best'"),
        (lambda: SoftTree([3], 2)(torch.zeros(1, 4)), r"inputs: expected \[B, 3\], got \[1, 4\]"),
        (lambda: SoftTree([3], 2).explain(torch.zeros(4)), r"x: expected one input of shape \[3\], got \[4\]"),
        (lambda: SoftTree([3], 2).explain(torch.zeros(3), ["a"]), "names: expected 2, one for each class, got 1"),
        (lambda: SoftTree([3], 2).save_picture("t.pdf"), r"file: expected a name that ends in \.png or \.svg, got 't\.pdf'"),
        (lambda: SoftTree([3], 2).save_picture("t.png", root=255), "root: expected an inner node, 0 to 254, got 255"),
        (lambda: SoftTree([3], 2).save_picture("t.png", shares=torch.ones(3)), r"shares: expected \[256\]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Runs


def write_idx(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class c is bright in column 2c."""
    folder = tmp_path_factory.mktemp("pictures")
    labels = np.arange(120) % 3
    images = np.random.default_rng(0).integers(0, 60, (120, 6, 6))
    images[np.arange(120), :, 2 * labels] += 180
    write_idx(folder / "images-idx3-ubyte", images)
    write_idx(folder / "labels-idx1-ubyte", labels)
    return folder


TREE = {"function": "kdfast.models.soft_tree:SoftTree", "arguments": {"shape": [1, 6, 6], "classes": 3, "depth": 3}}


def values(pictures: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "task": "image_classification", "method": "soft_tree", "out": str(out), "student": TREE,
        "data": {"train": str(pictures), "validation_share": 0.3, "mean": [0.2], "std": [0.3]},
        "optimizer": {"lr": 0.03, "weight_decay": 0.0}, "steps": 60, "batch_size": 16, "tracker": "none", **changes,
    }  # fmt: skip


def make_network(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, classes))


def run(recipe: dict[str, Any]) -> Any:
    return distill(Recipe.build(recipe), say=lambda line: None)


def test_a_tree_learns_from_labels_and_from_a_network_and_is_evaluated(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = {"function": f"{__name__}:make_network"}
    teacher = run(values(pictures, tmp_path / "network", method="supervised", student=network, optimizer={"lr": 0.01}))
    assert teacher.evaluation["accuracy"] == 1.0
    alone = run(values(pictures, tmp_path / "alone"))
    assert alone.evaluation["accuracy"] == 1.0
    taught = {**network, "weights": str(teacher.model)}
    soft = {"name": "soft_tree", "soft_weight": 1.0, "hard_weight": 0.0, "temperature": {"start": 2, "end": 1}}
    student = run(values(pictures, tmp_path / "student", method=soft, teacher=taught))
    assert student.evaluation["accuracy"] == 1.0
    row = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"soft", "penalty", "likeliest_leaf", "top1_agreement", "temperature"} <= row.keys()
    assert row["loss"] == pytest.approx(row["soft"] + row["penalty"], rel=1e-5)
    # The window is the run's, not the student's.
    from safetensors.torch import load_file

    assert set(load_file(student.model / "model.safetensors")) == {"weight", "bias", "leaves"}

    words = [
        "eval",
        str(student.model),
        "--function",
        TREE["function"],
        "--arguments",
        "shape=[1, 6, 6]",
        "classes=3",
        "depth=3",
    ]
    words += ["--task", "image_classification", "--data", str(pictures), "--set", "mean=[0.2]", "std=[0.3]", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == 1.0
    assert found["rows"] == 120
    for changed, message in (
        ([*words, "--task", "causal_lm"], "--set mean: unknown key"),
        ([w.replace("depth=3", "depth=4") for w in words], r"model: the weights in .* do not fit the model"),
        ([w.replace("depth=3", "deep=4") for w in words], "does not take the arguments"),
        ([*words[:2], "--task", "image_classification", "--data", str(pictures)], "config.json"),
        ([*words[:2], "--arguments", "depth=3", "--data", str(pictures)], "--arguments: they belong to --function"),
        ([*words[:4], "--data", str(pictures)], "--task: expected what the data are"),
    ):  # fmt: skip
        assert main(changed) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert message.split(".*")[0] in error


def test_a_cache_says_what_the_live_network_says(pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = {"function": f"{__name__}:make_network"}
    teacher = run(values(pictures, tmp_path / "network", method="supervised", student=network, steps=5)).model
    taught = {**network, "weights": str(teacher)}
    soft = {"name": "soft_tree", "soft_weight": 0.7, "hard_weight": 0.3, "temperature": 1.7}
    live = values(pictures, tmp_path / "live", method=soft, teacher=taught, steps=3)
    capture_classes(Recipe.build(live), Teacher(**taught), tmp_path / "cache")
    cached = {**live, "out": str(tmp_path / "cached"), "teacher": {"cache": str(tmp_path / "cache")}}
    found = []
    for recipe in (live, cached):
        run(recipe)
        lines = (Path(recipe["out"]) / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["soft"] for line in lines if "soft" in json.loads(line)])
    assert len(found[0]) == 3
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_stopped_run_goes_on_to_the_same_bits(number: int, pictures: Path, tmp_path: Path) -> None:
    changes = {"steps": 400, "save_every": 20, "log_every": 1, "keep": 1}
    commands = {}
    for name in ("whole", "stopped"):
        (tmp_path / f"{name}.yaml").write_text(Recipe.build(values(pictures, tmp_path / name, **changes)).to_yaml())
        commands[name] = [sys.executable, "-m", "kdfast.cli", "train", str(tmp_path / f"{name}.yaml")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(commands["whole"], env=env, stdout=subprocess.DEVNULL, check=True)
    process = subprocess.Popen(commands["stopped"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while (
        not any((tmp_path / "stopped" / "checkpoints").glob("step-*"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    os.kill(process.pid, number)
    assert process.wait() == (130 if number == signal.SIGINT else -number)
    assert not (tmp_path / "stopped" / "result.json").exists()
    done = subprocess.run(commands["stopped"], env=env, capture_output=True, text=True, check=True)
    assert "resuming from" in done.stdout + done.stderr
    for file in ("model/model.safetensors", "checkpoints/step-00000400/training.safetensors"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_faults_of_a_recipe_are_one_line_before_training(pictures: Path, tmp_path: Path) -> None:
    network = {"function": f"{__name__}:make_network"}

    def fails(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match) as found:
            run(values(pictures, tmp_path / "bad", **changes))
        assert "\n" not in str(found.value)
        assert not (tmp_path / "bad" / "metrics.jsonl").exists()

    fails(r"student: method soft_tree expects a kdfast\.models\.soft_tree:SoftTree", student=network)
    fails(r"method\.hard_weight: expected a number above 0 without a teacher", method={"name": "soft_tree", "hard_weight": 0})
    fails(r"method\.hart_weight: unknown key; did you mean 'hard_weight'", method={"name": "soft_tree", "hart_weight": 0})
    fails(r"method\.temperature: without a teacher expected none", method={"name": "soft_tree", "temperature": 2})
    four = {"function": f"{__name__}:make_network", "arguments": {"classes": 4}}
    fails(r"teacher: expected 3 logits, one for each of the classes 0, 1, 2, got 4", teacher=four)
    fails(r"student: expected 3 logits", student=four, method="supervised")
    arguments = {**TREE["arguments"], "depth": 99}
    fails(r"student\.function: kdfast.*SoftTree: depth: expected at most 16", student={**TREE, "arguments": arguments})
    fails(r"student\.function: .* does not take the arguments", student={**TREE, "arguments": {"deep": 3}})
    wide = {**TREE, "arguments": {**TREE["arguments"], "shape": [1, 5, 5]}}
    fails(r"student: SoftTree does not take the data \(pixel_values \[1, 1, 6, 6\]\)", student=wide)
    fails(r"teacher\.weights: .*expected a safetensors file", teacher={**network, "weights": str(tmp_path / "none")})
    fails(r"teacher\.weights: beside path expected none, they are a function", teacher={"path": "x", "weights": "y"})


@pytest.mark.slow
@pytest.mark.skipif("KDFAST_DATA" not in os.environ, reason="KDFAST_DATA is not set")
def test_a_tree_of_depth_six_reads_digits(tmp_path: Path) -> None:
    data = {"train": str(Path(os.environ["KDFAST_DATA"]) / "mnist_t10k"), "validation_share": 0.2, "mean": [0.1307],
            "std": [0.3081]}  # fmt: skip
    tree = {**TREE, "arguments": {"shape": [1, 28, 28], "classes": 10, "depth": 6}}
    changes = {"data": data, "student": tree, "steps": 1000, "batch_size": 64, "optimizer": {"lr": 0.003, "weight_decay": 0.0}}
    assert run(values(tmp_path, tmp_path / "digits", **changes)).evaluation["accuracy"] > 0.8


def test_what_is_said_of_rows_that_nobody_hears_may_be_anything() -> None:
    tree = make_tree(2)
    method = make_method(tree, teachers=1, penalty=0.0)
    x, said, labels = torch.randn(3, 6).double(), torch.randn(3, 5).double(), torch.tensor([1, -100, 2])
    want, _ = loss_of(method, tree, x, labels, [said])
    said[1] = torch.nan
    got, metrics = loss_of(method, tree, x, labels, [said])
    same(got, want, tree)
    assert all(metric.total.isfinite() for metric in metrics.values())


def test_a_step_without_any_row_that_counts_is_0() -> None:
    tree = make_tree(2)
    method = make_method(tree, penalty=0.0)
    for items in (0, torch.tensor(0)):
        loss, _ = loss_of(method, tree, torch.randn(3, 6).double(), torch.full((3,), -100), num_items=items)  # type: ignore[arg-type]
        assert loss.item() == 0
        assert not any(grad.any() for grad in torch.autograd.grad(loss, list(tree.parameters())))
