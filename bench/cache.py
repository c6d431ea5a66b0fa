"""The teacher cache on one core: bytes a token and KL error of a stated law, speed of encoding, decoding and reading batches.

Times in the rows are milliseconds a million tokens, so that 1000 over them is million tokens a second.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch

import kdfast
from kdfast.cache import CacheReader, CacheWriter, codec

from .contest import parser, positive, settings_of
from .measure import compare
from .report import Limits, Model, Row, heading, stamp, table, timed, to_json, write_csv

#: What others say of their own caches; other teachers, other text, no KL beside it.
PUBLISHED = (
    "DistillKit (Parquet) as published: 121 bytes a token at k=50, 328 at k=128, decode 35 k tokens/s",
    "Megatron-LM (tar of zstd .pt) as published: 418 bytes a token at k=128 and V <= 131072, decode 1.08 M tokens/s",
)
_LENGTH = 512


def law(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """Logits with probabilities that fall as (rank + 1.5)^-s, s uniform in [1.1, 3.5]; Gaussian noise of 0.5; ids shuffled."""
    random = torch.Generator().manual_seed(seed)
    slope = torch.empty(rows, 1).uniform_(1.1, 3.5, generator=random)
    logits = -slope * (torch.arange(vocab) + 1.5).log() + 0.5 * torch.randn(rows, vocab, generator=random)
    order = torch.rand(rows, vocab, generator=random).argsort(-1)
    return logits.gather(-1, order)


def targets_of(rows: int, vocab: int, k: int) -> kdfast.TopKTargets:
    """Captured in parts, so that the logits need not all be there at once."""
    parts = [kdfast.topk_targets(law(64, vocab, seed), k) for seed in range(rows // 64)]
    fields = {n: torch.cat([getattr(p, n) for p in parts]) for n in ("ids", "logprobs", "log_z", "log_tail")}
    return dataclasses.replace(parts[0], **fields)


def main(argv: list[str]) -> int:
    p = parser("cache", __doc__ or "", ["--quick", "--k 12 --vocab 32000", "--csv cache.csv"])
    p.add_argument("--vocab", type=positive, default=151936, metavar="V", help="default 151936")
    p.add_argument("--k", type=positive, default=64, help="default 64")
    args = p.parse_args(argv)
    settings = settings_of(args)
    torch.set_num_threads(args.threads or 1)
    distinct, documents = (256, 8) if args.quick else (1024, 96)
    targets = targets_of(distinct, args.vocab, args.k)
    random = torch.Generator().manual_seed(0)
    batch = min(16, documents)
    stream = batch * _LENGTH  # tokens a call, as many as a batch has
    drawn = targets[torch.randint(distinct, (stream,), generator=random)]
    rows = codec.Rows(*(x.numpy() for x in (drawn.ids, drawn.logprobs, drawn.log_z, drawn.log_tail)))
    layout = codec.Layout(args.k, args.vocab, (1.0,))
    encoded = codec.encode(layout, rows, 5e-5, None)
    data, room = np.frombuffer(encoded.data, np.uint8), codec.empty_rows(layout, (stream,))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        with CacheWriter(path, vocab_size=args.vocab, k=args.k, teacher="law", tokenizer_hash="none") as writer:
            for _ in range(documents):
                ids = torch.randint(args.vocab, (_LENGTH,), generator=random)
                writer.add(ids, targets[torch.randint(distinct, (_LENGTH,), generator=random)])
        reader, at = CacheReader(path), np.random.default_rng(0)
        info = reader.info
        works = {
            "decode, codec alone": (lambda: codec.decode(layout, data, encoded.has_counts, room), stream),
            "decode, reader.batch with checksums": (lambda: reader.batch(at.integers(0, documents, batch)), stream),
            "reader.batch with checksums, left in code": (
                lambda: reader.batch(at.integers(0, documents, batch), decode="loss"),
                stream,
            ),
            "encode, codec alone": (lambda: codec.encode(layout, rows, 5e-5, None), stream),
        }
        timings = compare(
            {name: work for name, (work, _) in works.items()},
            repeats=settings.repeats * 5,
            budget_s=settings.budget_s,
            cold=False,  # a rate: of a stream of records, not of a first call
        )
    note = f"{info.bytes_per_token:.1f} bytes a token, KL mean {info.kl_mean:.2g} max {info.kl_max:.2g}"
    found = []
    for name, (_, tokens) in works.items():
        a_million = dataclasses.replace(timings[name], seconds=tuple(s * 1e6 / tokens for s in timings[name].seconds))
        row = Row("cache", name, shape=f"V={args.vocab} k={args.k}", note=f"{1 / a_million.median:.1f} M tokens/s; {note}")
        found.append(stamp(timed(row, a_million, Model(), Limits()), "cpu"))
    if args.csv:
        write_csv(found, args.csv)
    if args.json:
        print(to_json(found))
        return 0
    print(heading(found, Limits()))
    print("milliseconds a million tokens\n\n" + table(found), *PUBLISHED, sep="\n")
    return 0
