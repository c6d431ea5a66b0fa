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
