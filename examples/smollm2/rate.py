"""What a capture costs beside the teacher's own pass: body and head product alone, against capture with its files.

python examples/smollm2/rate.py [TEACHER] [FOLDER OF TEXT] [--rounds 7] [--dtype bfloat16]

Both see the same documents in turn; the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from kdfast.cache import CacheWriter, capture
from kdfast.models.heads import find_head
from kdfast.models.load import load_folder
from kdfast.text import TextData
from kdfast.text.documents import Corpus
from kdfast.text.tokenizers import load_tokenizer


@torch.inference_mode()
def forward(model, head, documents: list[torch.Tensor], batch_size: int) -> None:
    """Hidden states of every document and the product with the head, 512 rows at a time, thrown away."""
    for batch in torch.stack(documents).split(batch_size):
        with head.entered() as entrance:
            model(input_ids=batch, use_cache=False)
        for rows in entrance.hidden.flatten(0, 1).split(512):
            torch.nn.functional.linear(rows, head.weight)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("teacher", nargs="?", default="runs/smollm2/teacher")
    p.add_argument("data", nargs="?", default="runs/smollm2/text/train")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--sequence-length", type=int, default=256)
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = p.parse_args()
    model = load_folder(args.teacher, "teacher", dtype=args.dtype).eval()
    head = find_head(model, {"input_ids": torch.arange(8)[None]})
    tokenizer, _ = load_tokenizer(args.teacher)
    text = TextData(paths=(args.data,), sequence_length=args.sequence_length)
    whole = (e.input_ids for e in Corpus(text, tokenizer, args.teacher) if len(e.input_ids) == args.sequence_length)
    ratios, rates = [], []
    for number in range(args.rounds + 1):
        documents = [next(whole) for _ in range(args.batch_size)]
        tokens = len(documents) * args.sequence_length
        start = time.perf_counter()
        forward(model, head, documents, args.batch_size)
        between = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "k": 64,
                "vocab_size": len(head.weight),
                "temperatures": (1.0, 2.0),
                "teacher": "",
                "tokenizer_hash": "",
            }
            with CacheWriter(Path(folder) / "cache", **settings) as writer:
                capture(model, documents, writer, batch_size=args.batch_size, head=head)
        end = time.perf_counter()
        if number:  # the first round warms up
            ratios.append((between - start) / (end - between))
            rates.append((tokens / (between - start), tokens / (end - between)))
            print(f"forward {rates[-1][0]:.0f} tokens/s, capture {rates[-1][1]:.0f} tokens/s: {ratios[-1]:.3f}", flush=True)
    plain, captured = (statistics.median(r[i] for r in rates) for i in (0, 1))
    print(
        f"{args.dtype}, {torch.get_num_threads()} threads: body and head product {plain:.0f} tokens/s, capture {captured:.0f}"
        f" tokens/s, ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
