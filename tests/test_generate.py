"""What models write, alone and together, against beams that are searched by hand, and `decode`, which keeps it."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from tiny_translation import SIZE, llama, make_tokenizer, marian, pairs, write_rows

from kdfast.models.ensemble import Ensemble, mean_logits
from kdfast.models.generate import Decoding, write
from kdfast.text import TextData
from kdfast.text.documents import Corpus
from kdfast.text.tokenizers import load_tokenizer
from kdfast.train.decode import asked_in, decode
from kdfast.train.documents import Documents
from kdfast.train.teachers import LiveTeacher

SOURCES = [[3, 4, 5, 6], [7, 1], [2, 9, 11]]


def padded(rows: list[list[int]], left: bool = False) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(row)) for row in rows]
    ids = [f + row if left else row + f for f, row in zip(fill, rows, strict=True)]
    mask = [[0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f)
            for f, row in zip(fill, rows, strict=True)]  # fmt: skip
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def next_logs(models: list[nn.Module], weights: list[float], source: list[int], said: tuple[int, ...]) -> Tensor:
    """log of the members' mean probability of each next id, without any cache, in float64."""
    probabilities = torch.zeros(SIZE, dtype=torch.float64)
    for model, weight in zip(models, weights, strict=True):
        if model.config.is_encoder_decoder:
            inputs = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[0, *said]])}
        else:
            inputs = {"input_ids": torch.tensor([[*source, *said]])}
        probabilities += weight * model(**inputs).logits[0, -1].double().softmax(-1)
    return probabilities.log()


def beam_by_hand(models: list[nn.Module], weights: list[float], source: list[int], beams: int, most: int) -> list[Any]:
    """The textbook search, no penalty of length: [(ids, log P)], best first."""
    running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished = []
    for step in range(most):
        grown = [((*said, i), score + float(log)) for said, score in running
                 for i, log in enumerate(next_logs(models, weights, source, said))]  # fmt: skip
        grown.sort(key=lambda x: -x[1])
        grown = grown[: 2 * beams]
        done = [g for g in grown[:beams] if g[0][-1] == 0 or step == most - 1]
        finished += done
        running = [g for g in grown if g[0][-1] != 0][:beams]
    return sorted(finished, key=lambda x: -x[1])[:beams]


MEMBERS = {
    "one encoder-decoder": lambda: [marian(0)],
    "three encoder-decoders of two widths": lambda: [marian(0), marian(1, width=24), marian(2, decoder_layers=2)],
    "one causal": lambda: [llama(3)],
    "two causal": lambda: [llama(3), llama(4, num_hidden_layers=1)],
}


@pytest.mark.parametrize("beams", [1, 3, 6])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_beam_is_the_textbook_search_over_mean_probabilities(name: str, beams: int) -> None:
    models = MEMBERS[name]()
    weights = [1.0] if len(models) == 1 else [0.5, 0.3, 0.2] if len(models) == 3 else [0.7, 0.3]
    model = models[0] if len(models) == 1 else Ensemble(models, [10 * w for w in weights]).eval()
    causal = not models[0].config.is_encoder_decoder
    before = models[0].generation_config
    found = write(model, padded(SOURCES, left=causal), Decoding(beams, beams, 5, length_penalty=0.0), [0])
    assert models[0].generation_config is before
    for source, group in zip(SOURCES, found, strict=True):
        want = beam_by_hand(models, weights, source, beams, 5)
        if beams == 1:  # greedy takes the likeliest next id and never looks back
            greedy: tuple[int, ...] = ()
            while len(greedy) < 5 and 0 not in greedy:
                greedy = (*greedy, int(next_logs(models, weights, source, greedy).argmax()))
            want = [(greedy, sum(float(next_logs(models, weights, source, greedy[:i])[x]) for i, x in enumerate(greedy)))]
        assert [tuple(h.ids.tolist()) for h in group] == [ids for ids, _ in want]
        assert [h.score for h in group] == pytest.approx([score for _, score in want], abs=1e-4)


def test_the_members_own_settings_say_nothing_about_how() -> None:
    model = marian(0)
    want = [h.ids.tolist() for (h,) in write(model, padded(SOURCES), Decoding(3, 1, 6), [0])]
    model.generation_config.update(num_beams=1, do_sample=True, max_length=3, forced_eos_token_id=5, repetition_penalty=9.0)
    assert [h.ids.tolist() for (h,) in write(model, padded(SOURCES), Decoding(3, 1, 6), [0])] == want
    model.generation_config.suppress_tokens = [want[0][0]]  # but what may be written at all stays
    assert all(want[0][0] not in h.ids.tolist() for (h,) in write(model, padded(SOURCES), Decoding(3, 1, 6), [0]))
    together = Ensemble([model, marian(1)]).eval()
    assert all(want[0][0] not in h.ids.tolist() for (h,) in write(together, padded(SOURCES), Decoding(3, 1, 6), [0]))


def test_samples_follow_the_mean_probabilities() -> None:
    models = [llama(3), llama(4)]
    torch.manual_seed(0)
    groups = write(Ensemble(models).eval(), padded([[3, 4]] * 4, True), Decoding(count=500, max_tokens=1, sample=True), [0])
    drawn = torch.bincount(torch.tensor([int(h.ids[0]) for group in groups for h in group]), minlength=SIZE) / 2000
    want = next_logs(models, [0.5, 0.5], [3, 4], ()).exp()
    assert float((drawn - want).abs().max()) < 0.05
    assert all(a.score >= b.score for group in groups for a, b in itertools.pairwise(group))


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    z = [torch.randn(2, 3, 7, dtype=torch.float64).float() for _ in range(3)]
    want = (0.5 * z[0].double().softmax(-1) + 0.25 * z[1].double().softmax(-1) + 0.25 * z[2].double().softmax(-1)).log()
    assert torch.allclose(mean_logits(z, [0.5, 0.25, 0.25]).double(), want, atol=1e-6)
    with pytest.raises(ValueError, match="members: expected at least one model"):
        Ensemble([])


def test_what_cannot_write_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected a transformers model, which can write text, got Linear"):
        write(nn.Linear(2, 2), padded(SOURCES), Decoding(), [0])


# The stage


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Any, Documents]:
    file = make_tokenizer(tmp_path / "tokenizer")
    data = write_rows(tmp_path / "pairs.jsonl", pairs(23))
    tokenizer = load_tokenizer(file)[0]
    corpus = Corpus(TextData(paths=(str(data),), sequence_length=16), tokenizer, file.parent, task="seq2seq")
    return tokenizer, Documents.of(corpus, tmp_path / "rows")


@contextmanager
def stopping_bar(after: int) -> Iterator[Any]:
    class Shown:
        def update(self, done: int) -> None:
            if done >= after:
                os.kill(os.getpid(), signal.SIGINT)

    yield Shown()


@pytest.mark.parametrize("sample", [False, True])
def test_a_decoding_that_is_stopped_and_killed_ends_in_the_same_bytes(
    sample: bool, rows: tuple[Any, Documents], tmp_path: Path
) -> None:
    tokenizer, documents = rows
    teachers = [LiveTeacher(marian(0)), LiveTeacher(marian(1), weight=2.0)]
    decoding = Decoding(3, 3, 6, sample=sample)
    options: dict[str, Any] = {"tokenizer": tokenizer, "identity": ["a", "b"], "batch_size": 5}
    said: list[str] = []
    whole = decode(teachers, documents, decoding, tmp_path / "whole", say=said.append, **options)
    assert said[-1].startswith("decoded 23 sources")
    with pytest.raises(KeyboardInterrupt, match="stopped after 10 of 23 sources"):
        decode(teachers, documents, decoding, tmp_path / "cut", say=said.append, bar=lambda *_: stopping_bar(10), **options)
    part = tmp_path / "cut" / "hypotheses.part.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    # Killed amid a batch: some of its lines are there, and half of one.
    part.write_text("".join(lines) + lines[0] + lines[1][:20])
    again = decode(teachers, documents, decoding, tmp_path / "cut", say=said.append, **options)
    assert said[-2].endswith("going on after 2 of 5 batches")
    assert again.read_bytes() == whole.read_bytes()
    assert not part.exists()
    assert decode(teachers, documents, decoding, tmp_path / "cut", say=said.append, **options) == again
    assert said[-1].endswith("decoded before")
    read = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [(line["row"], line["rank"]) for line in read] == [(i, j) for i in range(23) for j in range(3)]
    assert [line["source"] for line in read[::3]] == [pair["source"] for pair in pairs(23)]
    assert all(line["target"] == tokenizer.decode(line["ids"]) for line in read)


def test_a_folder_of_another_decoding_is_refused(rows: tuple[Any, Documents], tmp_path: Path) -> None:
    tokenizer, documents = rows
    options: dict[str, Any] = {"tokenizer": tokenizer, "say": lambda line: None}
    decode([LiveTeacher(marian(0))], documents, Decoding(2, 2, 4), tmp_path / "d", identity=["a"], **options)
    for identity, decoding, named in ((["b"], Decoding(2, 2, 4), "teachers"), (["a"], Decoding(3, 3, 4), "beams, count")):
        with pytest.raises(ValueError, match=rf"method\.decoded: .* holds what was decoded with other {named}"):
            decode([LiveTeacher(marian(0))], documents, decoding, tmp_path / "d", identity=identity, **options)


def test_what_a_row_asks(rows: tuple[Any, Documents]) -> None:
    _, documents = rows
    asked = asked_in(documents, 3)
    assert (asked.source.tolist(), asked.start) == (documents.batch([3]).input_ids[0].tolist(), 0)
    assert asked.gold.tolist() == documents.batch([3]).labels[0].tolist()
