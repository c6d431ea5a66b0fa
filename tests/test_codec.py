"""Encoded targets: the cache's bytes on their way to a device, decoded to the same floats by every backend."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_cases import (
    CASES,
    LAYOUTS,
    LENGTHS,
    among_others,
    assert_same_bits,
    cache_of,
    collated,
    encoded,
    flips,
    forged,
    job_of,
)

import kdfast
from kdfast import EncodedTargets, topk_kd_loss
from kdfast.cache import Batch, CacheError, CacheReader, CacheStream, CorruptCache, codec
from kdfast.cache.batch import DECODE, where_to_decode

ALL = range(len(LENGTHS))
needs_native = pytest.mark.skipif(not codec.native(), reason="the C++ extension is not built")
BACKENDS = [pytest.param("cpp", marks=needs_native), "reference"]
#: A batch with padding, one that needs none, documents end to end, and one that is cut.
WAYS = {
    "padded": lambda reader, **how: reader.batch([2, 0, 1, 0], **how),
    "alone": lambda reader, **how: reader.batch([0], threads=2, **how),
    "packed": lambda reader, **how: reader.packed([[0, 1], [2]], 6, **how),
    "cut": lambda reader, **how: reader.packed([[1, 0], [2]], 3, threads=3, **how),
}


@pytest.fixture(scope="module", params=CASES)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return cache_of(request.param, tmp_path_factory.mktemp("codec") / "c")


@pytest.fixture
def any_reader(tmp_path: Path) -> CacheReader:
    return cache_of("topp", tmp_path / "c")


def assert_same_rest(a: Batch, b: Batch) -> None:
    for name in (f.name for f in dataclasses.fields(Batch) if f.name not in ("targets", "place")):
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, torch.Tensor):
            assert (x.dtype, x.tolist()) == (y.dtype, y.tolist()), name
        else:
            assert x == y, name


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_backend_decodes_what_the_host_decodes(reader: CacheReader, way: object) -> None:
    on_host, as_bytes = way(reader), way(reader, decode="loss")
    assert_same_rest(on_host, as_bytes)
    assert isinstance(as_bytes.targets, EncodedTargets)
    for backend in ["cpp", "reference"] if codec.native() else ["reference"]:
        with kdfast.use_backend(backend):
            assert_same_bits(as_bytes.targets.decode(), on_host.targets)
    on_device = way(reader, decode="device")
    assert_same_bits(on_device.targets, on_host.targets)
    assert_same_rest(on_host, on_device)


@needs_native
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_both_languages_write_the_same_index(reader: CacheReader, way: object, monkeypatch: pytest.MonkeyPatch) -> None:
    native = way(reader, decode="loss")
    monkeypatch.setattr(codec, "_native", None)
    python = way(reader, decode="loss")
    assert_same_rest(native, python)
    for name in ("data", "offsets", "counts"):
        assert getattr(native.targets, name).equal(getattr(python.targets, name)), name
    assert_same_bits(native.targets.decode(), way(reader).targets)


def test_bytes_of_a_batch_are_those_of_its_records(tmp_path: Path) -> None:
    reader = cache_of("k64", tmp_path / "c")
    size = reader.batch(ALL, decode="loss").targets.data.numel()
    assert size == sum(len(payload_of(reader, i)) for i in ALL) + 64
    assert size < sum(LENGTHS) * (64 * 8 + 8) / 2.5  # a third where documents are longer than their headers


def test_a_batch_lies_in_one_piece(any_reader: CacheReader) -> None:
    for decode in DECODE:
        batch = any_reader.packed([[0, 1], [2]], 6, decode=decode)
        targets = batch.targets.data if decode == "loss" else batch.input_ids
        parts = [batch.input_ids, batch.labels, batch.loss_mask, batch.attention_mask, batch.document_ids, targets]
        assert len({x.untyped_storage().data_ptr() for x in parts}) == 1
    assert [where_to_decode("auto", device) for device in ("cpu", "cuda:1", "mps")] == ["host", "device", "host"]
    with pytest.raises(CacheError, match=r"decode: expected one of auto, host, device, loss, got 'gpu'"):
        any_reader.batch([0], decode="gpu")
    with pytest.raises(CacheError, match="decode"):
        CacheStream(any_reader, 1, decode="gpu")


@pytest.mark.parametrize("pack", [None, 6], ids=["padded", "packed"])
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("decode", ["device", "loss"])
def test_a_stream_hands_out_the_same_batches(any_reader: CacheReader, pack: int | None, prefetch: int, decode: str) -> None:
    settings = {"pack": pack, "seed": 3, "epochs": 2, "prefetch": prefetch}
    found = list(CacheStream(any_reader, 1, decode=decode, **settings))
    for a, b in zip(CacheStream(any_reader, 1, **settings), found, strict=True):
        assert_same_rest(a, b)
        assert isinstance(b.targets, EncodedTargets) == (decode == "loss")
        assert_same_bits(b.targets.decode() if decode == "loss" else b.targets, a.targets)


LOSSES = {"ghost": {"tail": "ghost"}, "jsd": {"tail": "uniform", "divergence": "jsd"}, "none": {"tail": "none"}}


@pytest.mark.parametrize(("case", "how"), [("topp", "ghost"), ("k65-three-T", "jsd"), ("mixed", "none"), ("sampled", "none")])
def test_losses_take_bytes_like_targets(tmp_path: Path, case: str, how: str) -> None:
    reader = cache_of(case, tmp_path / "c")
    decoded, coded = reader.batch(ALL).targets, reader.batch(ALL, decode="loss").targets
    options = {**LOSSES[how], "temperature": decoded.temperatures[-1]}
    lead, vocab = decoded.ids.shape[:-1], reader.settings.vocab_size
    hidden, weight = torch.randn(*lead, 8), torch.randn(vocab, 8)
    results = []
    for targets in (decoded, coded):
        x, h, w = (t.clone().requires_grad_() for t in (hidden @ weight.T, hidden, weight))
        loss = topk_kd_loss(x, targets, **options)
        through = kdfast.linear_topk_kd_loss(h, w, targets, **options)
        several = topk_kd_loss(x, [targets, decoded], **options)
        (loss + through + several).backward()
        results.append([loss, through, several, x.grad, h.grad, w.grad])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def test_rows_are_chosen_and_moved_without_decoding(any_reader: CacheReader) -> None:
    targets = any_reader.batch([2, 0]).targets
    coded = any_reader.batch([2, 0], decode="loss").targets
    assert (coded.k, coded.vocab_size, coded.temperatures) == (targets.k, targets.vocab_size, targets.temperatures)
    for index in (1, (0, slice(1, 3)), torch.tensor([[True, False, True, False], [False, False, True, True]])):
        assert_same_bits(coded[index].decode(), targets[index])
    moved = coded.to("cpu")
    assert_same_bits(moved.decode(), targets)
    nothing = coded[:0].decode()
    assert nothing.ids.shape == (0, 4, targets.k)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"data": torch.zeros(80)}, "data: expected dtype torch.uint8"), ({"data": torch.zeros(60, dtype=torch.uint8)}, "64"),
     ({"offsets": torch.zeros(2, dtype=torch.int32)}, "offsets: expected dtype torch.int64"),
     ({"counts": torch.zeros(3, dtype=torch.int32)}, "one shape")],
)  # fmt: skip
def test_targets_that_are_none_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    good = {"data": torch.zeros(64, dtype=torch.uint8), "offsets": torch.zeros(2, dtype=torch.int64),
            "counts": torch.zeros(2, dtype=torch.int32)}  # fmt: skip
    EncodedTargets(**good, layout=LAYOUTS["topk"])
    with pytest.raises(ValueError, match=message):
        EncodedTargets(**{**good, **change}, layout=LAYOUTS["topk"])
    with pytest.raises(ValueError, match="targets: expected TopKTargets, got Tensor"):
        topk_kd_loss(torch.zeros(2, 40), torch.zeros(2, 40))


def payload_of(reader: CacheReader, i: int) -> np.ndarray:
    shard, at = reader._locate(i)
    return shard.read(at).copy()


@pytest.mark.parametrize("language", [pytest.param(True, id="cpp", marks=needs_native), pytest.param(False, id="python")])
def test_every_changed_byte_is_refused_by_name(tmp_path: Path, language: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = cache_of("mixed", tmp_path / "c")
    if not language:
        monkeypatch.setattr(codec, "_native", None)
    shard, at = reader._locate(2)
    path, good = shard.path, shard.path.read_bytes()
    begin = good.index(payload_of(reader, 2).tobytes())
    with open(path, "r+b", buffering=0) as file:
        for place in range(begin, begin + int(shard.offsets[at + 1] - shard.offsets[at])):
            file.seek(place)
            file.write(bytes([good[place] ^ 1 << place % 8]))
            with pytest.raises(CorruptCache, match=r"record 2 .*checksum"):
                reader.batch([0, 2], decode="loss")
            file.seek(place)
            file.write(good[place : place + 1])
    assert_same_bits(reader.batch([0, 2], decode="loss").targets.decode(), reader.batch([0, 2]).targets)


def verdict(layout: codec.Layout, payload: np.ndarray, tokens: int) -> tuple[codec.Rows, str, int]:
    """What the decoder of whole records makes of a payload whose checksum fits: rows, fault, and the token at fault."""
    rows = codec.empty_rows(layout, (tokens,))
    try:
        codec.decode_batch(layout, job_of(payload, tokens), True, rows, collated(tokens), 1)
    except CorruptCache as error:
        return rows, str(error), token_of(str(error))
    return rows, "", -1


def indexed(layout: codec.Layout, payload: np.ndarray, tokens: int) -> tuple[EncodedTargets | None, str]:
    try:
        return encoded(layout, payload, tokens), ""
    except CorruptCache as error:
        return None, str(error)


def token_of(message: str) -> int:
    found = re.search(r"at token (\d+)", message)
    return int(found[1]) if found else -1


@needs_native
@pytest.mark.parametrize("case", ["topp", "mixed", "sampled-tempered", "k3-three-T", "exact", "exact-mixed"])
def test_forged_records_get_the_verdict_of_the_decoder(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte changed under a checksum that fits: refused alike, or decoded alike, or the row at fault is NaN."""
    reader = cache_of(case, tmp_path / "c")
    layout, native, tokens = reader._layout, codec._native, LENGTHS[2]
    outcomes = {"refused": 0, "nan": 0, "decoded": 0}
    for i, payload in enumerate(flips(payload_of(reader, 2))):
        rows, fault, token = verdict(layout, payload, tokens)
        targets, refusal = indexed(layout, payload, tokens)
        if i % 8 == 0:  # the Python one is slow
            monkeypatch.setattr(codec, "_native", None)
            assert indexed(layout, payload, tokens)[1] == refusal
            monkeypatch.setattr(codec, "_native", native)
        if targets is None:
            # The decoder may have found fault with ids before the index gets to what cannot be walked over.
            assert fault
            assert token_of(refusal) >= token
            outcomes["refused"] += 1
            continue
        decoded = []
        for backend in ("cpp", "reference"):
            with kdfast.use_backend(backend):
                decoded.append(targets.decode())
        assert_same_bits(*decoded)
        outcomes["nan" if fault else "decoded"] += 1
        if fault:
            assert decoded[0].logprobs[token].isnan().all()
            assert (decoded[0].ids[token] == 0).all()
            assert not decoded[0].logprobs[:token].isnan().any()
        else:
            assert_same_bits(decoded[0], _as_targets(layout, rows))
    assert min(outcomes.values()) > 0, outcomes


def _as_targets(layout: codec.Layout, rows: codec.Rows) -> kdfast.TopKTargets:
    ids, logprobs, log_z, log_tail = map(torch.from_numpy, rows[:4])
    weights = None if rows.weights is None else torch.from_numpy(rows.weights)
    return kdfast.TopKTargets(ids, logprobs, log_z, log_tail, layout.temperatures, layout.vocab_size, weights)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_nonsense_is_decoded_alike_and_nothing_outside_is_read(layout: codec.Layout) -> None:
    """Random bytes, offsets and counts; what surrounds the data, and the slack behind it, changes nothing."""
    sound = 0
    for seed in range(30):
        targets = forged(layout, seed, 40)
        decoded = []
        for backend in ("cpp", "reference"):
            with kdfast.use_backend(backend):
                for filler in (0, 0xFF):
                    decoded.append(among_others(targets, filler).decode())
        for other in decoded[1:]:
            assert_same_bits(decoded[0], other)
        bad = decoded[0].logprobs.isnan().any(-1)
        assert (bad == decoded[0].log_tail.isnan().any(-1)).all()
        assert bad[(targets.counts < 0) | (targets.counts > layout.k)].all()
        assert not bad[targets.counts == 0].any()
        sound += int((~bad & (targets.counts > 0)).sum())
    assert sound > 0 or layout.samples  # draws that add up are too rare


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_no_writer_produces_is_named_by_the_loss(any_reader: CacheReader, backend: str) -> None:
    targets = any_reader.batch([0], decode="loss").targets
    at = int(targets.offsets[0, 3])  # 16 entries: tails first, then ids that begin with their low parts
    data = targets.data.clone()
    data[at + 4 : at + 4 + 14] = 0xFF
    broken = dataclasses.replace(targets, data=data)[:, 2:]
    logits = torch.randn(1, 2, 1000)
    for tail in ("ghost", "renormalize"):
        with kdfast.use_backend(backend), pytest.raises(ValueError, match="row 1 holds NaN"):
            topk_kd_loss(logits, broken, tail=tail)


def test_compiled_functions_decode_too(any_reader: CacheReader) -> None:
    batch = any_reader.batch(ALL, decode="loss")
    targets = batch.targets
    x = torch.randn(*targets.counts.shape, 1000, requires_grad=True)

    def step(x: torch.Tensor, targets: EncodedTargets) -> torch.Tensor:
        return topk_kd_loss(x, targets)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, targets), step(x, targets))
    flat = targets.data, targets.offsets.reshape(-1), targets.counts.reshape(-1)
    for backend in ["cpp", "reference"] if codec.native() else ["reference"]:
        torch.library.opcheck(torch.ops.kdfast.codec_decode.default, (*flat, *targets.layout.values, backend))


@needs_native
def test_an_index_without_room_is_refused() -> None:
    layout, payload = LAYOUTS["topk"], np.zeros(30, np.uint8)
    index = codec.Index(np.empty(93, np.uint8), np.empty(1, np.int64), np.empty(1, np.int32))
    with pytest.raises(ValueError, match="expected 94 bytes for these jobs, got 93"):
        codec.index_batch(layout, job_of(payload, 1), True, index, collated(1), 1)


def test_the_kernel_rounds_every_operation() -> None:
    """In PTX nothing is fused, nothing approximate, no subnormal is lost: the interpreter cannot tell."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench.aot_cases import codec_cases

    for case in codec_cases():
        source = ASTSource(case.kernel, case.signature(), case.constants, case.hints())
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(case.options)).asm["ptx"]
        found = set(re.findall(r"\b(?:add|sub|mul|div|fma|ex2|lg2|rcp|sqrt)\.[\w.]*f(?:32|64)\b", ptx))
        assert found <= {f"{op}.rn.f{bits}" for op in ("add", "sub", "mul", "div") for bits in (32, 64)}, found
