"""Whether teachers' rows and labels belong to one another, looked at before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kdfast import linear_topk_targets, topk_targets
from kdfast.cache import check_alignment
from kdfast.models.view import View
from kdfast.train.batch import Batch

#: Entries a live teacher is looked at with.
_K = 64


def align(views: Sequence[View], batch: Batch, say: Callable[[str], None]) -> None:
    """Says each teacher's loss on the labels at three shifts; a batch without labels says nothing.

    Raises:
        AlignmentError: another shift fits better.
    """
    if batch.labels is None:
        return
    for view in views:
        say(f"alignment: {check_alignment(targets_in(view), batch.labels)}")


def targets_in(view: View) -> Any:
    """A teacher's view as top-k targets."""
    if view.targets is not None:
        return view.targets
    if view.head is None or view.hidden is None:
        return topk_targets(view.logits, min(_K, view.logits.shape[-1]))
    k = min(_K, view.head.weight.shape[0])
    return linear_topk_targets(view.hidden, view.head.weight, k, bias=view.head.bias, head=view.head.form)
