"""Pictures of a soft decision tree: its filters and leaves, and the way of one input through them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdfast.extras import need
from kdfast.files import written

if TYPE_CHECKING:
    from kdfast.models.soft_tree import Explanation, SoftTree

_BLUE, _RED, _GREY = "#2b6cb0", "#c0392b", "#8a8a8a"
_KINDS = ("png", "svg")
_WIDE = 5  # levels that fit a page


def save_tree(
    tree: SoftTree,
    file: str | os.PathLike[str],
    *,
    root: int = 0,
    levels: int | None = None,
    shares: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Draws inner nodes as their filters (red sends to the right, blue to the left), leaves as their distributions.

    Args:
        file: ends in `.png` or `.svg`.
        root: the node to begin with, in the order of levels: of a deep tree each part is a picture of its own.
        levels: of filters; none: all there are below `root`, but 4 at most. Below the last one stands what the leaves there say
            on average.
        shares: `[leaves]`, the share of inputs that comes to each (`tree.reach(inputs)`): branches are as thick, leaves are
            weighed by it. None: all alike.
        names: of the classes; none: their numbers.
    """
    kind = _kind(file)
    names = tree._names(names)
    inner = len(tree.weight)
    if not 0 <= root < inner:
        raise ValueError(f"root: expected an inner node, 0 to {inner - 1}, got {root}")
    there = tree.depth - ((root + 1).bit_length() - 1)
    levels = min(there, _WIDE - 1) if levels is None else levels
    if not 1 <= levels <= min(there, _WIDE):
        raise ValueError(f"levels: expected 1 to {min(there, _WIDE)} below node {root}, got {levels}")
    if shares is not None and shares.shape != (inner + 1,):
        raise ValueError(f"shares: expected [{inner + 1}], one for each leaf, got {list(shares.shape)}")
    below = tree.below(shares).cpu()
    reach = _reach(tree, shares)
    filters = tree.weight.detach().float().cpu()
    columns = 2**levels
    figure = _figure(max(0.95 * columns, 4.5), 1.35 * (levels + 1) + 0.5)
    edges = figure.add_axes((0, 0, 1, 1))
    edges.set(xlim=(0, columns), ylim=(-levels - 1.2, 0.1))
    edges.axis("off")
    most = float(reach[root])
    for level in range(levels + 1):
        for place in range(2**level):
            node = (root + 1) * 2**level - 1 + place
            middle = (place + 0.5) * columns / 2**level
            if level < levels:
                end = -level - (1.5 if level + 1 < levels else 1.02)  # behind a filter, above a distribution
                for side in (0, 1):
                    share = float(reach[2 * node + 1 + side]) / max(most, 1e-12)
                    target = (2 * place + side + 0.5) * columns / 2 ** (level + 1)
                    style = {"color": (_BLUE, _RED)[side], "linewidth": 0.4 + 7 * share, "alpha": 0.6, "zorder": 1}
                    edges.plot([middle, target], [-level - 0.5, end], solid_capstyle="butt", **style)
            box = edges.inset_axes((middle - 0.44, -level - 0.95, 0.88, 0.75), transform=edges.transData, zorder=2)
            share_text = f" {float(reach[node]):.1%}" if shares is not None else ""
            if level < levels:
                _filter(box, filters[node], tree.shape)
                among = " ".join(n for n, p in zip(names, below[node].tolist(), strict=True) if p >= 1 / len(names))
                box.set_title(f"{node}{share_text}" + (f"\n{among}" if level else ""), fontsize=6, pad=2)
            else:
                _bars(box, below[node], names)
                leaf = node - inner
                what = f"leaf {leaf}" if leaf >= 0 else f"below {node}"
                box.set_title(f"{what}{share_text}", fontsize=6, pad=2)
    edges.text(0.05, 0, f"soft decision tree, depth {tree.depth}\nred: goes right, blue: goes left", fontsize=8, va="top")
    _save(figure, file, kind)


def save_path(path: Explanation, file: str | os.PathLike[str]) -> None:
    """Draws the input, the filters it meets with what each makes of it (filter * input), and the leaf it comes to."""
    kind = _kind(file)
    tree, steps = path.tree, path.steps
    below, filters = tree.below(path.shares).cpu(), tree.weight.detach().float().cpu()
    columns = len(steps) + 2
    figure = _figure(1.25 * columns, 3.6)
    boxes = figure.subplots(2, columns, gridspec_kw={"left": 0.01, "right": 0.99, "top": 0.8, "bottom": 0.14, "wspace": 0.12})
    image = boxes[0, 0]
    image.imshow(_as_image(path.x.float(), tree.shape, signed=False), cmap="gray_r")
    image.set_title("input", fontsize=8)
    boxes[1, 0].axis("off")
    boxes[1, 0].text(0, 0.5, "above: filters\nbelow: filter * input\nred: right, blue: left", fontsize=7, va="center")
    for i, step in enumerate(steps, 1):
        _filter(boxes[0, i], filters[step.node], tree.shape)
        _filter(boxes[1, i], filters[step.node] * path.x.float().flatten(), tree.shape)
        way = "right" if step.right else "left"
        boxes[0, i].set_title(f"node {step.node}\n{way}, p = {step.taken:.2f}", fontsize=8, color=_RED if step.right else _BLUE)
        left, right = (path.among(below[2 * step.node + side]) for side in (1, 2))
        boxes[1, i].set_xlabel(f"left: {left}\nright: {right}", fontsize=6)
    leaf, rest = boxes[:, -1]
    _bars(leaf, path.classes, path.names)
    leaf.set_title(f"leaf {path.leaf}\nP = {path.reached:.2f}", fontsize=8)
    rest.axis("off")
    rest.text(0.5, 0.5, path.label, fontsize=28, ha="center", va="center")
    for box in (image, *boxes[:, 1:-1].flat):
        box.set(xticks=[], yticks=[])
    _save(figure, file, kind)


def _reach(tree: SoftTree, shares: Tensor | None) -> Tensor:
    """`[2I + 1]`: the share of inputs that comes to each node and leaf."""
    leaves = torch.full((len(tree.leaves),), 1 / len(tree.leaves)) if shares is None else shares.double().cpu()
    levels = [leaves]
    while len(levels[0]) > 1:
        levels.insert(0, levels[0].reshape(-1, 2).sum(1))
    return torch.cat(levels)


def _as_image(values: Tensor, shape: Sequence[int], signed: bool = True) -> Any:
    """A filter or an input as rows and columns; three channels are colours, others are added up."""
    image = values.reshape(*((1, 1, *shape)[-3:] if len(shape) < 3 else shape))
    image = image.reshape(-1, *image.shape[-2:])
    if len(image) == 3:
        low, high = (-image.abs().max(), image.abs().max()) if signed else (image.min(), image.max())
        return ((image - low) / (high - low).clamp(min=1e-12)).permute(1, 2, 0).numpy()
    return image.sum(0).numpy()


def _filter(box: Any, values: Tensor, shape: Sequence[int]) -> None:
    image = _as_image(values, shape)
    most = max(float(abs(image).max()), 1e-12)
    box.imshow(image, cmap="RdBu_r", vmin=-most, vmax=most, aspect="equal" if image.shape[0] > 1 else "auto")
    box.set(xticks=[], yticks=[])


def _bars(box: Any, said: Tensor, names: Sequence[str]) -> None:
    best = int(said.argmax())
    box.bar(range(len(names)), said.numpy(), color=[_RED if k == best else _GREY for k in range(len(names))], width=0.8)
    box.set(ylim=(0, 1), yticks=[])
    box.set_xticks(range(len(names)), names, fontsize=5)
    box.tick_params(length=0, pad=1)
    box.spines[["top", "right", "left"]].set_visible(False)


def _kind(file: str | os.PathLike[str]) -> str:
    kind = Path(file).suffix.removeprefix(".").lower()
    if kind not in _KINDS:
        raise ValueError(f"file: expected a name that ends in .png or .svg, got {str(file)!r}")
    return kind


def _figure(width: float, height: float) -> Any:
    """A figure of its own: no window, no backend of pyplot's."""
    return need("matplotlib.figure", extra="train", what="a picture of a tree").Figure(figsize=(width, height))


def _save(figure: Any, file: str | os.PathLike[str], kind: str) -> None:
    import matplotlib

    # The same tree gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "kdfast"}), written(file) as part:
        figure.savefig(part, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else {"Software": None})
