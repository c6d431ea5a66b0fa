"""Large buffers on a CPU: reused when nobody holds them any more, and only then."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

import kdfast
from kdfast import memory

CPU = torch.device("cpu")
ROWS, VOCAB = 64, 32000  # 8 MB in float32


@pytest.fixture(autouse=True)
def nothing_idle() -> Iterator[None]:
    memory.release()
    yield
    memory.release()


def large(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return memory.empty((rows, VOCAB), dtype=dtype, device=CPU)


def gradient(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(ROWS, VOCAB, generator=generator, requires_grad=True)
    kdfast.kd_loss(student, torch.randn(ROWS, VOCAB, generator=generator)).backward()
    assert student.grad is not None
    return student.grad


def test_a_buffer_is_reused_once_its_last_view_is_gone() -> None:
    first = large()
    address, view = first.data_ptr(), first[3:, 5:]
    del first
    second = large()
    assert second.data_ptr() != address
    del view
    assert large().data_ptr() == address


def test_shape_dtype_and_alignment_are_those_of_torch_empty() -> None:
    for shape, dtype in (
        ((ROWS, VOCAB), torch.bfloat16),
        ((3, 1000003), torch.float32),
        ((7, 2, 300001), torch.float64),
        ((0, 9), torch.float32),
    ):
        got, wanted = memory.empty(shape, dtype=dtype, device=CPU), torch.empty(shape, dtype=dtype)
        assert (got.shape, got.dtype, got.stride(), got.device) == (wanted.shape, wanted.dtype, wanted.stride(), wanted.device)
        assert got.data_ptr() % 64 == 0


def test_memory_nobody_wrote_is_poisoned_when_torch_is_asked_to() -> None:
    assert large().isnan().all()  # tests/conftest.py asks


def test_a_much_larger_buffer_is_not_spent_on_a_small_tensor() -> None:
    wide = large(8 * ROWS)
    address = wide.data_ptr()
    del wide
    assert large().data_ptr() != address


def test_gradients_of_successive_steps_share_memory_only_when_dropped() -> None:
    kept = gradient(1)
    copy, address = kept.clone(), kept.data_ptr()
    other = gradient(2)
    assert other.data_ptr() != address
    assert torch.equal(kept, copy)
    del kept
    again = gradient(1)
    assert again.data_ptr() == address
    assert torch.equal(again, copy)


def test_backward_twice_leaves_the_first_gradient_alone() -> None:
    student = torch.randn(ROWS, VOCAB, requires_grad=True)
    loss = kdfast.kd_loss(student, torch.randn(ROWS, VOCAB))
    (first,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
    copy = first.clone()
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, copy)
    torch.testing.assert_close(3 * second, first)


def test_idle_memory_stays_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEEP_MB", 20)
    tensors = [large() for _ in range(5)]
    del tensors
    assert 0 < memory.release() <= 20 << 20
    monkeypatch.setattr(memory, "KEEP_MB", 0)
    large()
    assert memory.release() == 0


def test_growing_batches_do_not_pile_up_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEEP_MB", 64)
    for rows in range(40, 400, 20):
        large(rows).fill_(1)
    assert memory.release() <= 64 << 20


def test_threads_never_share_a_live_buffer() -> None:
    clashes: list[int] = []

    def work(number: int) -> None:
        for _ in range(40):
            mine = large().fill_(number)
            if not bool((mine == number).all()):
                clashes.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not clashes


def test_a_process_ends_cleanly_with_buffers_alive_and_idle() -> None:
    code = "\n".join(
        (
            "import torch; from kdfast import memory",
            "make = lambda: memory.empty((4 << 20,), dtype=torch.float32, device=torch.device('cpu'))",
            "alive = make(); idle = make(); del idle",
        )
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
