"""Capture from a real model, killed and resumed; and the alignment guard."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cache_helpers import assert_same
from torch import Tensor, nn

import kdfast
from kdfast.cache import (
    AlignmentError,
    CacheError,
    CacheMismatch,
    CacheReader,
    CacheWriter,
    capture,
    check_alignment,
    verify,
)
from kdfast.ops.targets import TopKTargets

VOCAB, K, BATCH = 211, 8, 4
SETTINGS = {"vocab_size": VOCAB, "k": K, "teacher": "tiny", "tokenizer_hash": "none", "temperatures": (1.0, 2.0)}


class Tiny(nn.Module):
    """A recurrent language model: causal, so that padding after a document cannot reach it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed, self.rnn, self.head = nn.Embedding(VOCAB, 16), nn.GRU(16, 32, batch_first=True), nn.Linear(32, VOCAB)
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.drop(self.rnn(self.embed(input_ids))[0])) * 3


def documents(n: int = 30) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (int(torch.randint(5, 90, (), generator=g)),), generator=g) for _ in range(n)]


def run_capture(path: Path, docs: list[Tensor], batch_size: int = BATCH, progress=None) -> None:  # type: ignore[no-untyped-def]
    with CacheWriter(path, **SETTINGS, records_per_shard=6) as writer:
        capture(Tiny(), docs, writer, batch_size=batch_size, progress=progress)


def test_captured_targets_are_the_teacher_s(tmp_path: Path) -> None:
    docs, seen = documents(6), []
    run_capture(tmp_path, docs, progress=lambda done, total: seen.append((done, total)))
    total = sum(map(len, docs))
    assert seen == [(sum(map(len, docs[:4])), total), (total, total)]
    model = Tiny().eval()
    for document, record in zip(docs, CacheReader(tmp_path), strict=True):
        with torch.no_grad():
            exact = kdfast.topk_targets(model(document[None])[0], K, temperatures=(1.0, 2.0))
        assert record.input_ids.equal(document)
        assert record.targets.ids.equal(exact.ids.sort(-1).values)
        torch.testing.assert_close(record.targets.log_tail, exact.log_tail, atol=2e-3, rtol=0)
        assert float(record.targets.log_z[:, 0].abs().max()) == 0


@pytest.mark.parametrize(("kind", "k", "samples"), [("sampled", 20, 20), ("mixed", 12, 6)])
def test_drawn_targets_go_through_a_capture(kind: str, k: int, samples: int, tmp_path: Path) -> None:
    docs, temperatures = documents(9), (1.0, 2.0)
    teacher = Tiny().eval()
    settings = {**SETTINGS, "k": k, "kind": kind, "samples": samples}
    with CacheWriter(tmp_path / "whole", **settings) as writer:
        capture(teacher, docs, writer, batch_size=BATCH)
    reader = CacheReader(tmp_path / "whole")
    with CacheWriter(tmp_path / "second-half", **settings) as writer:
        capture(teacher, docs[BATCH:], writer, batch_size=BATCH)
    for i, record in enumerate(CacheReader(tmp_path / "second-half")):
        assert torch.equal(record.targets.ids, reader[BATCH + i].targets.ids)
    for document, record in zip(docs, reader, strict=True):
        targets = record.targets
        logp = teacher(document[None])[0].detach().log_softmax(-1)
        counts = targets.ids >= 0
        assert counts.any(-1).all()
        assert targets.weights is not None
        exact = logp.gather(-1, targets.ids.clamp(min=0).long())
        off = torch.where(counts, targets.logprobs - exact, 0)
        assert (0.5 * exact.exp() * off.square()).sum(-1).max() < 2 * 5e-5  # KL of small errors, at the default max_kl
        if kind == "sampled":  # drawn at T = 1 from the whole teacher: a weight is the share of draws
            draws = targets.weights * samples
            torch.testing.assert_close(draws, draws.round(), atol=1e-3, rtol=0)
            torch.testing.assert_close(draws.sum(-1), torch.full((len(document),), float(samples)), atol=1e-3, rtol=0)
        else:  # the likeliest are there whatever was drawn
            first = logp.topk(k - samples).indices
            assert (first[..., None] == targets.ids[:, None]).any(-1).all()
    batch = reader.batch(range(len(docs)))
    logits = torch.zeros(*batch.input_ids.shape, VOCAB, requires_grad=True)
    for temperature in temperatures:
        loss = kdfast.topk_kd_loss(logits, batch.targets, batch.labels, tail="none", temperature=temperature)
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_a_teacher_keeps_its_mode_and_gets_a_mask_it_takes(tmp_path: Path) -> None:
    class Masked(Tiny):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            masks.append(attention_mask)
            assert not self.training
            return super().forward(input_ids)

    masks: list[Tensor | None] = []
    model = Masked()
    model.rnn.eval()
    docs = [torch.arange(5), torch.arange(3), torch.arange(4), torch.arange(4)]
    with CacheWriter(tmp_path, **SETTINGS) as writer:
        capture(model, docs, writer, batch_size=2)
    assert masks[0] is not None
    assert masks[0].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert masks[1] is None
    assert (model.training, model.rnn.training) == (True, False)


def test_a_capture_killed_and_resumed_is_the_one_in_one_go(tmp_path: Path) -> None:
    """SIGKILL in the middle of a group; groups of 4, shards due after 6 records and so closed at 8, 16, 24."""
    root = Path(__file__).parents[1]
    code = (
        "import sys, pathlib, test_cache_capture as t\n"
        "def progress(done, total): print(done, flush=True)\n"
        "t.run_capture(pathlib.Path(sys.argv[1]), t.documents(), progress=progress)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    path, docs = tmp_path / "killed", documents()
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    for _ in range(5):
        assert child.stdout.readline()
    child.kill()
    child.wait()
    child.stdout.close()
    with CacheWriter(path, **SETTINGS) as writer:
        assert len(writer) in (16, 24)
        with pytest.raises(CacheMismatch, match="groups of 4"):
            capture(Tiny(), docs, writer, batch_size=5)
        with pytest.raises(CacheError, match=r"is not the one that .* holds as its record"):
            capture(Tiny(), docs[1:] + docs[:1], writer, batch_size=BATCH)
        capture(Tiny(), docs, writer, batch_size=BATCH)
    run_capture(tmp_path / "whole", docs)
    verify(path)
    resumed, whole = CacheReader(path), CacheReader(tmp_path / "whole")
    assert len(resumed) == len(whole) == 30
    for a, b in zip(resumed, whole, strict=True):
        assert a.input_ids.equal(b.input_ids)
        assert_same(a.targets, b.targets)


def test_capture_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "v", **{**SETTINGS, "vocab_size": VOCAB + 1}) as writer, pytest.raises(CacheError, match="212"):
        capture(Tiny(), documents(2), writer, batch_size=2)
    with CacheWriter(tmp_path / "s", **SETTINGS, alignment="same") as writer, pytest.raises(CacheError, match="alignment"):
        capture(Tiny(), documents(2), writer, batch_size=2)
    with contextlib.suppress(KeyboardInterrupt), CacheWriter(tmp_path / "f", **SETTINGS, records_per_shard=2) as writer:
        capture(Tiny(), documents(2), writer, batch_size=2)
        raise KeyboardInterrupt
    with CacheWriter(tmp_path / "f", **SETTINGS) as writer, pytest.raises(CacheError, match="got only 1 documents"):
        capture(Tiny(), documents(1), writer, batch_size=2)


def sure_targets(labels: Tensor) -> TopKTargets:
    """A teacher that gives its label 0.9 and two others 0.03 each."""
    ids = torch.stack([labels, (labels + 1) % VOCAB, (labels + 2) % VOCAB], -1).int()
    logprobs = torch.tensor([0.9, 0.03, 0.03]).log().expand(ids.shape).contiguous()
    lead = (*labels.shape, 1)
    return TopKTargets(ids, logprobs, torch.zeros(lead), torch.full(lead, math.log(0.04)), (1.0,), VOCAB)


def test_alignment_numbers_are_the_teacher_s_losses() -> None:
    labels = torch.randint(0, VOCAB, (2, 60))
    labels[0, :7] = -100
    result = check_alignment(sure_targets(labels.clamp(min=0)), labels)
    assert result.at == pytest.approx(-math.log(0.9), abs=1e-5)
    assert min(result.before, result.after) > 3
    assert f"{result.at:.3f}" in str(result)


@pytest.mark.parametrize("shift", [-1, 1])
def test_targets_one_off_raise_and_name_the_shift(shift: int) -> None:
    labels = torch.randint(0, VOCAB, (2, 60))
    with pytest.raises(AlignmentError, match=re.escape(f"shifted by {shift:+d} ")):
        check_alignment(sure_targets(labels.roll(-shift, -1)), labels)
    with pytest.raises(AlignmentError, match=re.escape(f"shifted by {shift:+d} ")):
        check_alignment(sure_targets(labels.roll(-shift, -1))[0], labels[0])


def test_targets_of_another_text_raise() -> None:
    """Worse than a guess at every shift: the teacher is sure of what the text does not say."""
    labels = torch.randint(0, VOCAB, (2, 60))
    with pytest.raises(AlignmentError, match="above log V"):
        check_alignment(sure_targets(torch.randint(0, VOCAB, (2, 60))), labels)


def test_a_few_labels_prove_nothing_and_shapes_must_fit() -> None:
    labels = torch.randint(0, VOCAB, (1, 8))
    assert check_alignment(sure_targets(labels.roll(1, -1)), labels).at > 1
    assert math.isnan(check_alignment(sure_targets(labels), torch.full_like(labels, -100)).at)
    with pytest.raises(ValueError, match="labels: expected shape"):
        check_alignment(sure_targets(labels), labels[:, 1:])


def test_a_cache_made_with_shifted_targets_is_caught_at_the_first_batch(tmp_path: Path) -> None:
    for name, shift in (("good", 0), ("late", 1), ("early", -1)):
        with CacheWriter(tmp_path / name, vocab_size=VOCAB, k=3, teacher="sure", tokenizer_hash="none") as writer:
            for seed in range(3):
                ids = torch.randint(0, VOCAB, (50,), generator=torch.Generator().manual_seed(seed))
                writer.add(ids, sure_targets(ids.roll(shift - 1)))
        batch = CacheReader(tmp_path / name).batch([0, 1, 2])
        if shift:
            with pytest.raises(AlignmentError, match=re.escape(f"shifted by {-shift:+d} ")):
                check_alignment(batch.targets, batch.labels)
        else:
            assert check_alignment(batch.targets, batch.labels).at < 0.2
