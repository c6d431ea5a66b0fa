"""Datasets over a cache: packing, order, ranks, exact resumption, workers."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from cache_helpers import assert_same, document, small_cache
from torch.utils.data import DataLoader

from kdfast.cache import Batch, CacheDataset, CacheError, CacheReader, CacheStream
from kdfast.cache.dataset import pack_rows


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return CacheReader(small_cache(tmp_path_factory.mktemp("stream") / "c", documents=23))


def documents_of(batch: Batch) -> list[list[int]]:
    """The documents of a batch, packed or not, as lists of input ids."""
    out = []
    for row in range(len(batch.input_ids)):
        if batch.document_ids is None:
            out.append(batch.input_ids[row][batch.attention_mask[row]].tolist())
        else:
            numbers = batch.document_ids[row]
            out += [batch.input_ids[row][numbers == d].tolist() for d in range(int(numbers.max()) + 1)]
    return out


def seen(stream: CacheStream, count: int) -> list[list[list[int]]]:
    return [documents_of(b) for b in islice(stream, count)]


def test_packed_rows_are_the_records_end_to_end(reader: CacheReader) -> None:
    groups, length = [[3, 0], [4], [1, 2]], 160
    batch = reader.packed(groups, length)
    assert batch.position_ids is not None
    assert batch.document_ids is not None
    assert batch.input_ids.shape == batch.labels.shape == batch.document_ids.shape == (3, length)
    for row, group in enumerate(groups):
        at = 0
        for d, i in enumerate(group):
            record, n = reader[i], len(document(i)[0])
            here = slice(at, at + n)
            assert batch.input_ids[row, here].equal(record.input_ids)
            assert batch.position_ids[row, here].equal(torch.arange(n))
            assert (batch.document_ids[row, here] == d).all()
            assert batch.labels[row, here].tolist() == [*record.input_ids[1:].tolist(), -100]
            assert_same(batch.targets[row, here], record.targets)
            at += n
        assert not batch.attention_mask[row, at:].any()
        assert not batch.loss_mask[row, at:].any()
        assert (batch.document_ids[row, at:] == -1).all()
        assert (batch.targets.ids[row, at:] == -1).all()
        assert (batch.targets.log_tail[row, at:] == 0).all()


def test_a_record_is_cut_at_the_end_of_its_row_and_keeps_its_label(reader: CacheReader) -> None:
    record = reader[1]
    batch = reader.packed([[0, 1]], 60)
    n = len(document(0)[0])
    assert batch.input_ids[0, n:].equal(record.input_ids[: 60 - n])
    assert batch.labels[0, n:].equal(record.input_ids[1 : 61 - n])
    assert batch.loss_mask[0, n:].all()
    assert_same(batch.targets[0, n:], record.targets[: 60 - n])
    with pytest.raises(CacheError, match="begin within 20"):
        reader.packed([[0, 1]], 20)
    with pytest.raises(CacheError, match="groups"):
        reader.packed([[0], []], 20)


def test_packing_keeps_every_document_once_and_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 2000)
    rows = pack_rows(lengths, np.random.default_rng(1).permutation(2000), 512)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    totals = [int(lengths[row].sum()) for row in rows]
    assert max(totals) <= 512
    assert sum(totals) / (512 * len(rows)) > 0.95
    assert pack_rows(np.array([700, 3]), np.array([0, 1]), 512) == [[0], [1]]


@pytest.mark.parametrize("pack", [pytest.param(None, id="padded"), pytest.param(160, id="packed")])
def test_every_epoch_shows_every_document_in_its_own_order(reader: CacheReader, pack: int | None) -> None:
    stream = CacheStream(reader, 1, pack=pack, seed=3, epochs=2)
    epochs = [len(stream.plan(e)) for e in range(2)]
    batches = seen(stream, sum(epochs) + 5)
    assert len(batches) == sum(epochs)
    first, second = ([d for b in part for d in b] for part in (batches[: epochs[0]], batches[epochs[0] :]))
    everything = sorted(document(i)[0].tolist() for i in range(23))
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert seen(CacheStream(reader, 1, pack=pack, seed=3, prefetch=0), 9) == batches[:9]
    assert seen(CacheStream(reader, 1, pack=pack, seed=4), 9) != batches[:9]
    plain = CacheStream(reader, 1, shuffle=False)
    assert [d for b in seen(plain, 23) for d in b] == [document(i)[0].tolist() for i in range(23)]


@pytest.mark.parametrize("pack", [pytest.param(None, id="padded"), pytest.param(160, id="packed")])
def test_ranks_share_what_one_process_sees(reader: CacheReader, pack: int | None) -> None:
    alone = CacheStream(reader, 2, pack=pack, seed=1)
    ranks = [CacheStream(reader, 2, pack=pack, seed=1, rank=r, world=3) for r in range(3)]
    per_rank = len(ranks[0].plan(0))
    whole = seen(alone, 3 * per_rank)
    assert [seen(s, per_rank) for s in ranks] == [whole[r::3] for r in range(3)]
    assert len({len(s.plan(1)) for s in ranks}) == 1


@pytest.mark.parametrize("at", [0, 1, 11, 30])
def test_a_stream_goes_on_exactly_where_it_was(reader: CacheReader, at: int) -> None:
    """Whatever was prefetched beyond the position, also across epochs."""
    settings = {"seed": 5, "pack": 160, "prefetch": 3, "threads": 2}
    whole = seen(CacheStream(reader, 1, **settings), 45)
    stream = CacheStream(reader, 1, **settings)
    assert seen(stream, at) == whole[:at]
    state = stream.state_dict()
    resumed = CacheStream(reader, 1, **settings)
    resumed.load_state_dict(state)
    assert seen(resumed, 45 - at) == whole[at:]
    assert seen(stream, 45 - at) == whole[at:]
    with pytest.raises(CacheError, match=r"seed 5 != 6"):
        CacheStream(reader, 1, **{**settings, "seed": 6}).load_state_dict(state)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_what_the_parent_gives(reader: CacheReader, context: str) -> None:
    alone = seen(CacheStream(reader, 4, seed=2, epochs=1), 99)
    loader = DataLoader(CacheStream(reader, 4, seed=2, epochs=1), None, num_workers=2, multiprocessing_context=context)
    assert [documents_of(b) for b in loader] == alone
    if context == "fork":
        dataset = CacheDataset(reader)
        mapped = DataLoader(dataset, 5, num_workers=2, collate_fn=dataset.collate, multiprocessing_context=context)
        assert [d for b in mapped for d in documents_of(b)] == [document(i)[0].tolist() for i in range(23)]


@pytest.mark.parametrize(
    ("change", "name"),
    [({"batch_size": 0}, "batch_size"), ({"batch_size": 24}, "batch_size"), ({"rank": 2, "world": 2}, "rank"),
     ({"threads": 0}, "threads"), ({"pack": 0}, "pack")],
)  # fmt: skip
def test_arguments_out_of_range(reader: CacheReader, change: dict[str, int], name: str) -> None:
    with pytest.raises(CacheError, match=name):
        next(iter(CacheStream(reader, **{"batch_size": 2, **change})))


def firsts(loader: object) -> list[list[int]]:
    """A pass over a loader: the first ids of every batch."""
    return [b.input_ids[:, 0].tolist() for b in loader]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("persistent", [False, True], ids=["fresh", "persistent"])
def test_every_pass_of_a_loader_is_the_next_one(reader: CacheReader, workers: int, epochs: int, persistent: bool) -> None:
    if persistent and not workers:
        pytest.skip("nobody to persist")
    wanted = [firsts(islice(CacheStream(reader, 4, seed=2), 15))[5 * e : 5 * e + 5] for e in range(3)]
    wanted = [[b for e in wanted[p : p + epochs] for b in e] for p in range(0, 4 - epochs, epochs)]
    stream = CacheStream(reader, 4, seed=2, epochs=epochs)
    loader = DataLoader(stream, None, num_workers=workers, persistent_workers=persistent)
    assert len(loader) == len(stream) == 5 * epochs
    for passed in wanted:
        torch.manual_seed(0)  # the loader then draws the same seed for its workers again
        assert firsts(loader) == passed
    stream.set_epoch(0)
    assert firsts(loader) == wanted[0]
    other = DataLoader(stream, None, num_workers=3 - workers)
    assert firsts(other) == firsts(islice(CacheStream(reader, 4, seed=2), 5 * epochs, 10 * epochs))


@pytest.mark.parametrize("workers", [None, 0, 1, 2])
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("at", [1, 4, 5, 7])
def test_a_pass_that_was_broken_off_is_over(reader: CacheReader, workers: int | None, epochs: int, at: int) -> None:
    whole = firsts(islice(CacheStream(reader, 4, seed=2), 15))
    stream = CacheStream(reader, 4, seed=2, epochs=epochs)
    loader = stream if workers is None else DataLoader(stream, None, num_workers=workers)
    used = []
    for batch in loader:
        used.append(batch)
        if len(used) == min(max(at, 1), 5 * epochs):
            break
    for p in range(1, 3 // epochs):
        assert firsts(loader) == whole[5 * epochs * p : 5 * epochs * (p + 1)]
    again = CacheStream(reader, 4, seed=2, epochs=epochs)
    again.load_state_dict(stream.state_dict(used[-1]))  # a state is a place within it
    assert firsts(again) == whole[len(used) : 5 * epochs]
    assert firsts(islice(again, 2)) == whole[5 * epochs : 5 * epochs + 2]


@pytest.mark.parametrize("kept", ["iterator", "endless"])
def test_a_loop_that_was_broken_off_can_go_on(reader: CacheReader, kept: str) -> None:
    whole = firsts(islice(CacheStream(reader, 4, seed=2), 10))
    stream = CacheStream(reader, 4, seed=2, epochs=1 if kept == "iterator" else None)
    batches = iter(stream) if kept == "iterator" else stream
    assert firsts(islice(batches, 2)) == whole[:2]
    assert firsts(islice(batches, 3)) == whole[2:5]


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("at", [1, 4, 5])
def test_the_last_batch_used_knows_the_position(reader: CacheReader, workers: int, at: int) -> None:
    whole = firsts(islice(CacheStream(reader, 4, seed=5), 10))
    stream = CacheStream(reader, 4, seed=5, epochs=1)
    batch = list(islice(DataLoader(stream, None, num_workers=workers), at))[-1]
    if workers:
        with pytest.raises(CacheError, match=r"state: a DataLoader's workers are ahead .* call state_dict\(batch\)"):
            stream.state_dict()
    resumed = CacheStream(reader, 4, seed=5, epochs=1)
    resumed.load_state_dict(stream.state_dict(batch))
    assert resumed.epoch == 0
    resumed.set_epoch(0)
    with pytest.raises(CacheError, match="epoch: expected 0, that of the state that was loaded, got 1"):
        resumed.set_epoch(1)
    loader = DataLoader(resumed, None, num_workers=workers)
    assert firsts(loader) == whole[at:5]
    resumed.set_epoch(1)
    assert firsts(loader) == whole[5:]
    with pytest.raises(CacheError, match="after: expected a batch of a CacheStream"):
        stream.state_dict(reader.batch([0]))


def test_a_state_loaded_under_an_iterator_moves_it(reader: CacheReader) -> None:
    whole = firsts(islice(CacheStream(reader, 4, seed=5), 10))
    stream = CacheStream(reader, 4, seed=5, prefetch=3)
    walk = iter(stream)
    next(walk)
    stream.load_state_dict({**stream.state_dict(), "batch": 4})
    assert firsts(islice(walk, 2)) == whole[4:6]
    stream.set_epoch(0)
    assert firsts(islice(walk, 2)) == whole[:2]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_see_every_record_once(reader: CacheReader, workers: int) -> None:
    records = []
    for rank in range(2):
        stream = CacheStream(reader, 1, seed=1, rank=rank, world=2, epochs=1)
        loader = DataLoader(stream, None, num_workers=workers)
        records += [d for _ in range(2) for b in loader for d in documents_of(b)][-11:]
    everything = [document(i)[0].tolist() for i in range(23)]
    assert len(records) == 22
    assert all(records.count(d) <= 1 for d in everything)
    assert all(d in everything for d in records)


@pytest.mark.parametrize(("world", "size"), [(1, 4), (4, 1), (1, 2), (2, 1)])
def test_other_ranks_go_on_where_all_were(reader: CacheReader, world: int, size: int) -> None:
    before = CacheStream(reader, 2, seed=1, rank=1, world=2)
    firsts(islice(before, 3))
    state = before.state_dict()
    order = [d for b in islice(CacheStream(reader, 1, seed=1), 23) for d in documents_of(b)]
    seen_now = []
    for rank in range(world):
        now = CacheStream(reader, size, seed=1, rank=rank, world=world, epochs=1)
        now.load_state_dict(state)
        seen_now += [d for b in now for d in documents_of(b)]
    left = order[12 : 23 // (size * world) * size * world]
    assert sorted(seen_now) == sorted(left)


def test_ranks_that_do_not_fit_are_told_the_remedy(reader: CacheReader) -> None:
    before = CacheStream(reader, 2, seed=1, world=2, epochs=1)
    whole = list(before)
    now = CacheStream(reader, 2, seed=1, world=4)
    with pytest.raises(CacheError, match=r"saved after 12 records of epoch 0 .* a divisor of 12, or with set_epoch\(1\)"):
        now.load_state_dict(before.state_dict(whole[2]))
    for state in (before.state_dict(), before.state_dict(whole[-1])):  # an epoch's beginning, and its end
        now.load_state_dict(state)
        assert firsts(islice(now, 1)) == firsts(islice(CacheStream(reader, 2, seed=1, world=4), 2, 3))


def test_an_endless_stream_has_no_length(reader: CacheReader) -> None:
    with pytest.raises(TypeError, match="pass epochs"):
        len(CacheStream(reader, 4))
    packed = CacheStream(reader, 1, pack=160, epochs=2)
    assert len(packed) == len(list(packed))


def test_accelerate_prepares_a_loader(reader: CacheReader) -> None:
    accelerate = pytest.importorskip("accelerate")
    one_by_one = accelerate.DataLoaderConfiguration(dispatch_batches=False)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=one_by_one)
    whole = firsts(islice(CacheStream(reader, 4, seed=2), 10))
    stream = CacheStream(reader, 4, seed=2, epochs=1)
    loader = accelerator.prepare(DataLoader(stream, None))
    assert len(loader) == 5
    assert [firsts(loader) for _ in range(2)] == [whole[:5], whole[5:]]
    stream.set_epoch(0)
    loader.set_epoch(0)
    used = list(islice(loader, 2))  # the loader is one batch ahead
    resumed = CacheStream(reader, 4, seed=2, epochs=1)
    resumed.load_state_dict(stream.state_dict(used[-1]))
    assert firsts(resumed) == whole[2:5]
    dataset = CacheDataset(reader)
    mapped = accelerator.prepare(DataLoader(dataset, 5, collate_fn=dataset.collate))
    assert [d for b in mapped for d in documents_of(b)] == [document(i)[0].tolist() for i in range(23)]
