"""`kdfast eval MODEL --data FILES`."""

from __future__ import annotations

import argparse
from typing import Any

from kdfast.files import json_text


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "eval", help="perplexity and top-1 accuracy of a model on text files",
        epilog="example: kdfast eval runs/word_kd/model --data held_out/ --glob '**/*.txt'",
        description="Evaluates the model in a local folder (config.json, safetensors weights, tokenizer.json) on text files.",
    )  # fmt: skip
    parser.add_argument("model", help="a folder with config.json and safetensors weights")
    parser.add_argument("--data", nargs="+", required=True, help="text files or folders")
    parser.add_argument("--glob", default="**/*.txt", help="which files of a folder (default %(default)s)")
    parser.add_argument("--tokenizer", help="tokenizer.json or its folder (default: the model's folder)")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens per sequence (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences at a time (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name in ("sequence_length", "batch_size"):
        low = 2 if name == "sequence_length" else 1
        if getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')}: expected a number >= {low}, got {getattr(args, name)}")

    import torch

    from kdfast.cli.cache_build import flag
    from kdfast.text import TextData
    from kdfast.text.documents import Corpus
    from kdfast.text.files import list_files
    from kdfast.text.packing import pack
    from kdfast.text.tokenizers import load_tokenizer

    data = TextData(paths=tuple(args.data), glob=args.glob, sequence_length=args.sequence_length)
    tokenizer, _ = load_tokenizer(args.tokenizer or args.model)
    specials = Corpus(data, tokenizer, args.model, name=flag).specials
    files = [file for _, file in list_files(args.data, args.glob, key="--data", glob_key="--glob")]
    ids = pack(tokenizer, files, args.sequence_length, specials, "--data")

    from kdfast.models.load import load_folder
    from kdfast.train.data import Sequences
    from kdfast.train.evaluate import evaluate

    model = load_folder(args.model, "model").to("cuda" if torch.cuda.is_available() else "cpu")
    found = evaluate(model, Sequences(ids), batch_size=args.batch_size)
    if args.json:
        print(json_text(dict(found)))
    else:
        print(f"perplexity {found.ppl:.3f}, {found.nll:.4f} nats a token, top-1 {found.top1:.2%}, {found.tokens:,} tokens")
    return 0
