"""Data of several domains: what a row says of all of them, and a state that knows its domain, as Meta-KD has them.

Source: Pan et al. 2021 (Meta-KD), arXiv 2012.01266, sections 3.2 and 3.3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast import files
from kdfast.models.load import resolve_folder, weights_hash
from kdfast.models.view import Needs, look
from kdfast.tensors import digest_of_tensors, load_tensors, save_tensors
from kdfast.train.batch import IGNORE, Batch
from kdfast.train.data import RowsOf, Source, batches
from kdfast.train.match import token_mask
from kdfast.train.positions import check_positions
from kdfast.train.readers import load_reader

#: What a meta-teacher keeps beside its model.
STATE_FILE = "domains.safetensors"
#: Rows that an encoder sees at a time, and rows that are compared with all prototypes at a time.
_ROWS, _CHUNK = 64, 4096


class DomainState(nn.Module):
    """h_d = tanh(W (e_d + mean H) + b): the mean of the last hidden states of a row's tokens, with its domain's embedding."""

    def __init__(self, domains: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(domains, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor, mask: Tensor | None, domain: Tensor) -> Tensor:
        """`[B, D]` of `hidden` `[B, L, D]`, `mask` `[B, L]` and `domain` `[B]`."""
        pooled = mean_state(hidden, mask).to(self.dense.weight.dtype)
        state: Tensor = torch.tanh(self.dense(self.embedding(domain) + pooled))
        return state


def mean_state(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """`[B, D]`: the mean over the tokens that are no padding."""
    if mask is None:
        return hidden.float().mean(1)
    counted = mask.bool()[..., None]  # what padding holds may be NaN
    return hidden.float().masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp(min=1)


def save_state(folder: Path, weights: dict[str, Tensor], domains: Sequence[str]) -> None:
    """A `DomainState` and the names of its domains, beside a model."""
    kept = {name: value.contiguous() for name, value in weights.items()}
    save_tensors(kept, folder / STATE_FILE, {"domains": files.json_text(list(domains))})


def load_state(folder: Path, domains: Sequence[str]) -> DomainState | None:
    """The one kept in `folder`, for `domains`; the embedding of one that it does not know is the mean of those it knows."""
    file = folder / STATE_FILE
    if not file.is_file():
        return None
    tensors = load_tensors(file)
    with safe_open(str(file), "pt") as opened:
        theirs = json.loads(opened.metadata()["domains"])
    known = tensors["embedding.weight"]
    rows = [known[theirs.index(name)] if name in theirs else known.mean(0) for name in domains]
    state = DomainState(len(domains), known.shape[1])
    state.load_state_dict({**tensors, "embedding.weight": torch.stack(rows)})
    return state.eval().requires_grad_(False)


def check_examples(
    labels: Tensor, domains: Tensor, names: Sequence[str], flavor: str, classes: Sequence[str] = ()
) -> Tensor:  # fmt: skip
    """`[K, C]`, how many rows there are of each domain and class (`reference`: `[K, 1]`, of each domain).

    Args:
        classes: their names, for errors.

    Raises:
        ValueError: a domain without a row, or (paper) without one of a class that others have.
    """
    groups = labels if flavor == "paper" else torch.zeros_like(labels)
    kinds = int(groups.max()) + 1
    count = torch.bincount(domains * kinds + groups, minlength=len(names) * kinds).reshape(len(names), kinds)
    missing = ((count == 0) & ((count.sum(0) > 0) | (count.sum(1, keepdim=True) == 0))).nonzero().tolist()
    if missing:
        domain, kind = missing[0]
        of = f" of class {classes[kind] if classes else kind}" if flavor == "paper" and count[domain].any() else ""
        raise ValueError(
            f"data.train: expected an example{of} in every domain for its prototype, got none in domain {names[domain]!r}"
        )
    return count


def weights_of_rows(
    encodings: Tensor, labels: Tensor, domains: Tensor, names: Sequence[str], *, alpha: float, flavor: str
) -> Tensor:  # fmt: skip
    """t_i `[N]`: how like its own domain a row is, and how like the others.

    paper:      t = alpha * cos(E(x), p[k, y]) + (1 - alpha) / (K - 1) * sum_{k' != k} cos(E(x), p[k', y])
    reference:  t = 1/2 * (cos(E(x), c[k]) + mean_{k' != k} cos(E(x), c[k']))

    with p[k, y] the mean of E over the rows of domain k and class y, c[k] over all of domain k. One domain has no others.

    Args:
        encodings: `[N, D]` E(x). labels, domains: `[N]`. names: of the domains, for errors.

    Raises:
        ValueError: as of `check_examples`.
    """
    found = check_examples(labels, domains, names, flavor)
    kinds, count = found.shape[1], found.flatten().clamp(min=1)  # a class that no row has is asked for by nobody
    # A prototype of one class is a centroid.
    groups = labels if flavor == "paper" else torch.zeros_like(labels)
    number = domains * kinds + groups
    sums = torch.zeros(len(count), encodings.shape[1], dtype=torch.float64)
    parts = list(zip(encodings.split(_CHUNK), number.split(_CHUNK), groups.split(_CHUNK), strict=True))
    for some, numbers, _ in parts:
        sums.index_add_(0, numbers, some.double())
    prototypes = (sums / count[:, None]).reshape(len(names), kinds, -1)
    own = torch.cat([
        F.cosine_similarity(some.double()[:, None], prototypes[:, of].transpose(0, 1), dim=-1) for some, _, of in parts
    ])  # fmt: skip  # [N, K]
    mine = own.gather(1, domains[:, None])[:, 0]
    if len(names) == 1:
        return (alpha * mine if flavor == "paper" else mine).float()
    others = (own.sum(1) - mine) / (len(names) - 1)
    return (alpha * mine + (1 - alpha) * others if flavor == "paper" else (mine + others) / 2).float()


class WeightedRows(RowsOf):
    """Rows with a weight each: `batch.extra["row_weight"]`."""

    def __init__(self, rows: Source, weights: Tensor) -> None:
        super().__init__(rows)
        self.weights = weights

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = self.rows.batch(indices)
        return dataclasses.replace(batch, extra={**batch.extra, "row_weight": self.weights[torch.as_tensor(list(indices))]})


def check_domains(task: Any, method: str) -> list[str]:
    """The names of the domains in the training data.

    Raises:
        ValueError: the data have none.
    """
    found: list[str] = list(getattr(task, "domains", ()))
    if not found:
        raise ValueError(f"data.domain: method {method} expects the column with a row's domain, got none; set data.domain")
    return found


@torch.no_grad()
def instance_weights(
    inputs: Any, names: Sequence[str], folder: Path, *, model: nn.Module, encoder: str | None, alpha: float, flavor: str,
    autocast: Callable[[], Any] = contextlib.nullcontext,
) -> WeightedRows:  # fmt: skip
    """The training rows with t_i (`weights_of_rows`), kept in `folder`; E(x) is the mean of an encoder's last hidden states.

    Args:
        model: the encoder, unless `encoder` names the folder of another one. autocast: makes the context that it runs in.

    Raises:
        ValueError: a row without a label, or a domain without an example.
    """
    rows = inputs.train
    home = resolve_folder(encoder, "method.encoder") if encoder else None
    said = digest_of_tensors(*model.state_dict().values()) if home is None else weights_hash(home)
    about = {"data": getattr(rows, "digest", ""), "encoder": said, "alpha": alpha, "flavor": flavor}
    file, marker = folder / "weights.safetensors", folder / "weights.json"
    if marker.is_file() and files.read_json(marker) == files.json_value(about):
        return WeightedRows(rows, load_tensors(file)["weights"])
    label, domain = labels_of(rows)
    bare = int((label == IGNORE).sum())
    if bare:
        raise ValueError(f"data.train: expected a label in every row, which is weighed by its class, got {bare} without")
    check_examples(label, domain, names, flavor, inputs.task.names)
    if home is not None:
        model = load_reader(home, "method.encoder", inputs.tokenizer, inputs.task.kind)
        check_positions([("method.encoder", model)], rows, inputs.task)
    was_training = model.training
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(model.parameters()).device
    encodings = []
    for batch in batches(rows, _ROWS):
        batch = batch.to(device)
        with autocast():
            hidden = look(model, batch.by_name, Needs(layers=(-1,))).layers[-1]
        encodings.append(mean_state(hidden, token_mask(batch)).cpu())
    model.train(was_training)
    found = weights_of_rows(torch.cat(encodings), label, domain, names, alpha=alpha, flavor=flavor)
    with files.written(file) as part:
        save_tensors({"weights": found}, part)
    files.write_json(marker, about)
    return WeightedRows(rows, found)


def labels_of(rows: Source) -> tuple[Tensor, Tensor]:
    """`[N]` each: labels (`IGNORE`: none) and domains of all rows."""
    labels, domains = [], []
    for batch in batches(rows, _CHUNK):
        domains.append(batch.extra["domain"])
        labels.append(torch.full_like(domains[-1], IGNORE) if batch.labels is None else batch.labels)
    return torch.cat(labels), torch.cat(domains)
