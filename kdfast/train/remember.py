"""What a teacher says of each row, asked once: for a phase that reads rows again and sees nothing else of the teacher."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdfast import files
from kdfast.models.view import View
from kdfast.tensors import digest_of_tensors, load_tensors, save_tensors
from kdfast.train.batch import Batch
from kdfast.train.data import RowsOf, Source, digest_of, lengths_of
from kdfast.train.teachers.live import LiveTeacher

#: Rows in one call.
_ROWS = 64
_NAME = "teacher_logits"


class RememberedRows(RowsOf):
    """Rows with a teacher's logits: `heard(batch)` is its view.

    Args:
        logits: `[N, C]` of rows with one distribution each, `[tokens, C]` of rows with one for every token.
    """

    def __init__(self, rows: Source, logits: Tensor) -> None:
        super().__init__(rows)
        self._logits, self._ends = logits, None
        if len(logits) != len(rows):
            self._ends = np.concatenate([[0], np.cumsum(lengths_of(rows))])

    def batch(self, indices: Sequence[int]) -> Batch:
        batch, ends = self.rows.batch(indices), self._ends
        if ends is None:
            found = self._logits[torch.as_tensor(list(indices))]
        else:
            found = pad_sequence([self._logits[ends[i] : ends[i + 1]] for i in indices], True)
        return dataclasses.replace(batch, extra={**batch.extra, _NAME: found}, attention_mask=None)


def heard(batch: Batch) -> list[View]:
    """What the teacher said of a batch of `RememberedRows`; nothing of any other."""
    return [View(own_logits=batch.extra[_NAME])] if _NAME in batch.extra else []


@torch.no_grad()
def remembered(
    rows: Source, teacher: LiveTeacher, folder: Path, device: torch.device, *,
    autocast: Callable[[], Any] = contextlib.nullcontext, bar: Any = None,
) -> RememberedRows:  # fmt: skip
    """`rows` with the teacher's logits in float32, kept in `folder`.

    Args:
        rows: with `lengths`; batched by these, which leaves little padding.
        autocast: makes the context that the teacher runs in. bar: makes a progress bar, or None.
    """
    about = {"rows": len(rows), "data": digest_of(rows), "teacher": digest_of_tensors(*teacher.model.state_dict().values())}
    file, marker = folder / "logits.safetensors", folder / "logits.json"
    if marker.is_file() and files.read_json(marker) == files.json_value(about):
        return RememberedRows(rows, load_tensors(file)["logits"])
    teacher.to(device)
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    order = np.argsort(lengths_of(rows), kind="stable")
    with contextlib.nullcontext() if bar is None else bar("teacher", len(rows), "rows") as shown:
        for start in range(0, len(rows), _ROWS):
            some = order[start : start + _ROWS].tolist()
            batch = rows.batch(some)
            with autocast():
                logits = teacher(batch.to(device)).logits
            for i, row in enumerate(logits.float().cpu()):
                length = row.shape[0] if batch.attention_mask is None else int(batch.attention_mask[i].sum())
                found[some[i]] = row[None] if row.ndim == 1 else row[:length]
            if shown is not None:
                shown.update(start + len(some))
    logits = torch.cat(found)
    with files.written(file) as part:
        save_tensors({"logits": logits}, part)
    files.write_json(marker, about)
    return RememberedRows(rows, logits)
