"""What teachers write for every source, kept as lines of JSON: batched, by length, resumable after a kill.

A folder holds `hypotheses.jsonl`, one line for each hypothesis in the order of the rows, the best first:

    {"row": 0, "rank": 0, "source": "A dog runs.", "target": "Ein Hund rennt.", "score": -2.31, "ids": [17, ...]}

score is log P(target | source), summed over its tokens; ids are the target's, its end among them. `decoding.json` says what it
depends on, and what it took.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kdfast import files
from kdfast.models.ensemble import Ensemble
from kdfast.models.generate import Decoding, Hypothesis, write
from kdfast.models.settings import config_of, end_ids, settings_of
from kdfast.tensors import seed_of
from kdfast.text.tokenizers import SEPARATOR
from kdfast.train.batch import IGNORE
from kdfast.train.data import Source, digest_of
from kdfast.train.stop import stop_signals


class Asked(NamedTuple):
    """One row as a teacher is asked.

    source: an encoder's ids, or a prompt. gold: ids of the target, where there is one. start: the id a decoder starts from.
    more: whether answers come after this one, as in a conversation of several turns.
    """

    source: Tensor
    gold: Tensor
    start: int | None
    more: bool = False


def asked_in(rows: Source, i: int, prompt_tokens: int | None = None) -> Asked:
    """Row `i`. Of a causal row the prompt ends where something counts; with `prompt_tokens` it has so many tokens."""
    batch = rows.batch([i])
    inputs = batch.by_name
    ids = inputs["input_ids"][0]
    labels = torch.full_like(ids, IGNORE) if batch.labels is None else batch.labels[0]
    kept = None if batch.attention_mask is None else batch.attention_mask[0].bool()
    if "decoder_input_ids" in inputs:
        return Asked(ids if kept is None else ids[kept], labels[labels != IGNORE], int(inputs["decoder_input_ids"][0, 0]))
    if kept is not None:  # padding may stand on either side
        ids, labels = ids[kept], labels[kept]
    counted = labels != IGNORE
    if prompt_tokens is not None or not bool(counted.any()):
        length = min(prompt_tokens or len(ids), len(ids))
        return Asked(ids[:length], ids[length:] if bool(counted.any()) else ids[:0], None)
    # Row t says what follows token t: an answer begins behind its first and ends behind its last.
    first = int(counted.nonzero()[0])
    uncounted = (~counted[first:]).nonzero()
    last = first + int(uncounted[0]) if len(uncounted) else len(ids)
    return Asked(ids[: first + 1], ids[first + 1 : last + 1], None, bool(counted[last:].any()))


def decode(
    teachers: Sequence[Any],
    rows: Source,
    decoding: Decoding,
    folder: Path,
    *,
    tokenizer: Any,
    identity: Sequence[str],
    batch_size: int = 32,
    prompt_tokens: int | None = None,
    most: int | None = None,
    limit: int = 0,
    seed: int = 1,
    say: Callable[[str], None] = print,
    bar: Any = None,
) -> Path:
    """`hypotheses.jsonl` in `folder`, written unless it is there; killed and run again it goes on after the last whole batch.

    Args:
        teachers: live ones (`kdfast.train.teachers.LiveTeacher`); several write together, their probabilities averaged.
        rows: what is asked, one source or prompt each. decoding: how. tokenizer: writes the text, or None.
        identity: what the teachers are, so that a folder is not gone on with by others.
        most: most tokens of prompt and completion of a causal model. limit: the first so many rows only, 0: all.
        seed: of samples.

    Raises:
        ValueError: the folder holds hypotheses of other teachers, rows or options.
        KeyboardInterrupt: SIGINT or SIGTERM, after the batch at hand; after the last one, when all is written.
    """
    model: nn.Module = teachers[0].model
    if len(teachers) > 1:
        model = Ensemble([teacher.model for teacher in teachers], [teacher.weight for teacher in teachers]).eval()
    count = min(limit, len(rows)) if limit else len(rows)
    settings = [settings_of(teacher.model) for teacher in teachers]
    described = files.json_value({
        "teachers": list(identity), "dtypes": [own.pop("dtype") for own in settings], "generation_config": settings,
        "weights": [teacher.weight for teacher in teachers], "data": digest_of(rows, whole=True), "rows": count,
        "configs": [config_of(teacher.model) for teacher in teachers],
        **asdict(decoding), "batch_size": batch_size, "prompt_tokens": prompt_tokens, "most": most,
        **({"seed": seed} if decoding.sample else {}),
    })  # fmt: skip
    whole, about, part = (folder / name for name in ("hypotheses.jsonl", "decoding.json", "hypotheses.part.jsonl"))
    with files.locked(folder):
        if about.is_file():
            before = files.read_json(about)["of"]
            # What an earlier version did not keep is taken to be the same.
            differs = [name for name in described if before.get(name, described[name]) != described[name]]
            if differs:
                raise ValueError(
                    f"method.decoded: {folder} holds what was decoded with other {', '.join(differs)}; name another folder, or"
                    " remove it"
                )
        if whole.is_file():
            say(f"{whole}: decoded before")
            return whole
        # A teacher that cannot write is refused before the folder is anybody's.
        stage = _Stage(model, rows, decoding, part, tokenizer, batch_size, prompt_tokens, most, seed, count)
        files.write_json(about, {"of": described})
        with stop_signals() as stop:
            seconds = stage.run(say, bar, stop)
            with files.written(whole) as new, open(new, "w", encoding="utf-8") as file:
                found = [line for line in files.read_lines(part) if "row" in line]
                if silent := count - len({line["row"] for line in found}):
                    say(f"{silent} of {count} sources are empty or leave no room for what follows, and are left out")
                for line in sorted(found, key=lambda line: (line["row"], line["rank"])):
                    file.write(files.json_line(line))
            files.write_json(about, {"of": described, "seconds": seconds})
            part.unlink(missing_ok=True)
        if stop.is_set():
            raise KeyboardInterrupt(f"stopped after {count} of {count} sources; run the same again to go on")
    return whole


class _Stage:
    """A decoding under way."""

    def __init__(
        self, model: nn.Module, rows: Source, decoding: Decoding, part: Path, tokenizer: Any, batch_size: int,
        prompt_tokens: int | None, most: int | None, seed: int, count: int,
    ) -> None:  # fmt: skip
        self._model, self._rows, self._decoding, self._part = model, rows, decoding, part
        self._tokenizer, self._prompt_tokens, self._most, self._seed = tokenizer, prompt_tokens, most, seed
        self._device = next(model.parameters()).device
        otherwise = None if tokenizer is None else tokenizer.token_to_id(SEPARATOR)
        self._end = end_ids(model, otherwise)
        if not self._end:
            raise ValueError(
                "teacher: expected eos_token_id in its generation_config.json or config.json, which ends what it writes, found"
                " none; set it there"
            )
        order = torch.arange(count)
        if hasattr(rows, "lengths"):  # the longest first: what does not fit shows at once, and time is not underestimated
            order = torch.from_numpy(rows.lengths()[:count]).argsort(descending=True, stable=True)
        #: Rows with answers behind the first.
        self._several = 0
        self._batches = [part.tolist() for part in order.split(batch_size)]

    def run(self, say: Callable[[str], None], bar: Any, stop: threading.Event) -> float:
        """Writes the missing batches; the seconds it took, those of killed processes among them."""
        done, seconds, self._several = self._resume()
        total = sum(map(len, self._batches))
        if done:
            say(f"{self._part.parent}: going on after {done} of {len(self._batches)} batches")
        drawn = contextlib.nullcontext() if bar is None else bar("decoding", total, "sources")
        with drawn as shown:
            finished = sum(map(len, self._batches[:done]))
            for number in range(done, len(self._batches)):
                began = time.perf_counter()
                lines = self._lines(number)
                seconds += time.perf_counter() - began
                # The last line says that the batch is whole.
                files.append_lines(self._part, [*lines, {"batch": number, "seconds": seconds, "several": self._several}])
                finished += len(self._batches[number])
                if shown is not None:
                    shown.update(finished)
                if stop.is_set() and number + 1 < len(self._batches):
                    raise KeyboardInterrupt(f"stopped after {finished} of {total} sources; run the same again to go on")
        say(f"decoded {total} sources in {seconds:.0f} s, {total / max(seconds, 1e-9):.1f} a second")
        if self._several:
            say(f"{self._several} of {total} rows have several answers, of which only the first is asked for")
        return round(seconds, 3)

    def _resume(self) -> tuple[int, float, int]:
        """Whole batches that are there, the seconds they took, and their rows with several answers; what a kill left of another
        one is cut off."""
        lines = files.read_lines(self._part)
        last = next((i for i in range(len(lines) - 1, -1, -1) if "batch" in lines[i]), -1)
        if last + 1 < len(lines):
            with files.written(self._part) as new:
                new.write_text("".join(files.json_text(line) + "\n" for line in lines[: last + 1]), encoding="utf-8")
        of: dict[str, Any] = lines[last] if last >= 0 else {"batch": -1, "seconds": 0.0}
        return of["batch"] + 1, of["seconds"], of.get("several", 0)

    def _lines(self, number: int) -> list[dict[str, Any]]:
        """What is written for a batch: one object for each hypothesis."""
        asked = [(i, asked_in(self._rows, i, self._prompt_tokens)) for i in self._batches[number]]
        self._several += sum(row.more for _, row in asked)
        asked = [(i, row) for i, row in asked if len(row.source)]
        if not asked:
            return []
        inputs = _padded([row.source for _, row in asked], left=asked[0][1].start is None)
        torch.manual_seed(seed_of(self._seed << 32 | number))  # the same samples whether or not a process was killed before
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        found = write(self._model, inputs, self._decoding, self._end, most=self._most)
        return [self._line(i, rank, row, hypothesis)
                for (i, row), group in zip(asked, found, strict=True) for rank, hypothesis in enumerate(group)]  # fmt: skip

    def _line(self, i: int, rank: int, row: Asked, hypothesis: Hypothesis) -> dict[str, Any]:
        ids = hypothesis.ids.tolist()
        texts = {"source": None, "target": None}
        if self._tokenizer is not None:
            source, target = (self._tokenizer.decode(x, skip_special_tokens=True) for x in (row.source.tolist(), ids))
            texts = {"source": source, "target": target}
        return {"row": i, "rank": rank, **texts, "score": round(hypothesis.score, 4), "ids": ids}


def _padded(rows: Sequence[Tensor], left: bool) -> dict[str, Tensor]:
    """Prompts end together, so that what is written begins together; sources begin together."""
    side = "left" if left else "right"
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return {"input_ids": pad_sequence(list(rows), batch_first=True, padding_side=side), "attention_mask": mask}
