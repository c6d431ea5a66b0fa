"""`kdfast cache build|info|verify`: a teacher's targets on disk."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

_BUILD = "kdfast cache build models/teacher --data corpus/ --glob '**/*.txt' --out cache --k 64 --temperatures 1 2"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "cache", help="capture a teacher's targets, and look at what was captured", epilog=f"example: {_BUILD}"
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build", help="run a teacher over text and keep its targets", epilog=f"example: {_BUILD}",
        description="Runs a teacher over text files and keeps its top-k targets. Killed and run again, it goes on after the"
        " last shard that was finished.",
    )  # fmt: skip
    build.add_argument("teacher", help="a folder with config.json, safetensors weights and tokenizer.json")
    build.add_argument("--data", nargs="+", required=True, help="text files or folders")
    build.add_argument("--out", required=True, help="the cache's folder")
    build.add_argument("--glob", default="**/*.txt", help="which files of a folder (default %(default)s)")
    build.add_argument("--sequence-length", type=int, default=512, help="tokens of a record (default %(default)s)")
    build.add_argument("--separator", default="<|endoftext|>", help="token after each file, if the tokenizer has it")
    build.add_argument("--k", type=int, default=64, help="ids kept a token (default %(default)s)")
    build.add_argument("--temperatures", type=float, nargs="+", default=[1.0], help="1 among them (default 1)")
    build.add_argument("--max-kl", type=float, default=5e-5, help="KL error allowed a token, nats (default %(default)s)")
    build.add_argument("--batch-size", type=int, default=8, help="records in one call of the teacher (default %(default)s)")
    build.add_argument("--shard-mb", type=int, default=64, help="size of a shard; a killed capture loses at most this much")
    build.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU when there is one)")
    build.add_argument(
        "--dry-run", action="store_true", help="capture one batch, print size and time of the whole, keep nothing"
    )
    info = actions.add_parser("info", help="what a cache holds", epilog="example: kdfast cache info cache --plot cache.png")
    info.add_argument("path", help="the cache's folder")
    info.add_argument("--plot", metavar="FILE.png", help="draw mass over k, bytes and the KL error")
    verify = actions.add_parser(
        "verify", help="read everything through and check it", epilog="example: kdfast cache verify cache"
    )
    verify.add_argument("path", help="the cache's folder")
    for action in (build, info, verify):
        action.add_argument("--json", action="store_true", help="print JSON")
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found: dict[str, Any] = {"build": _build, "info": _info, "verify": _verify}[args.action](args)
    print(json.dumps(found) if args.json else _table(found))
    return 0


def _build(args: argparse.Namespace) -> dict[str, Any]:
    for name, least in (("sequence_length", 2), ("batch_size", 1), ("shard_mb", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected a number >= {least}, got {getattr(args, name)}")

    import torch
    from transformers.utils import logging

    from kdfast.cache import CacheReader, CacheWriter, capture
    from kdfast.cli.progress import bar
    from kdfast.train.data import list_files, load_tokenizer, tokenize
    from kdfast.train.inputs import file_hash
    from kdfast.train.models import load_folder

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, tokenizer_file = load_tokenizer(args.teacher)
    files = [file for _, file in list_files(args.data, args.glob, key="--data")]
    documents = list(tokenize(tokenizer, files, args.sequence_length, args.separator, "--data").ids.long())
    logging.disable_progress_bar()  # it draws one for the weights, even when piped
    teacher = load_folder(args.teacher, "teacher").to(device).eval()
    with torch.no_grad():
        vocab_size = teacher(documents[0][None, :1].to(device)).logits.shape[-1]
    settings = {
        "vocab_size": vocab_size, "k": args.k, "temperatures": tuple(args.temperatures), "max_kl": args.max_kl,
        "teacher": _weights_hash(Path(args.teacher)), "tokenizer_hash": file_hash(tokenizer_file),
    }  # fmt: skip
    if args.dry_run:
        return _dry_run(args, teacher, documents, settings, device)
    with (
        CacheWriter(args.out, shard_bytes=args.shard_mb << 20, **settings) as writer,
        bar("capture", sum(map(len, documents)), "tokens") as shown,
    ):
        capture(
            teacher, documents, writer, batch_size=args.batch_size, device=device,
            progress=lambda done, total: shown.update(done),
        )  # fmt: skip
    return {"path": args.out, **CacheReader(args.out).info.as_json()}


def _dry_run(
    args: argparse.Namespace, teacher: Any, documents: list[Any], settings: dict[str, Any], device: str
) -> dict[str, Any]:
    from kdfast.cache import CacheReader, CacheWriter, capture

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with CacheWriter(folder, **settings) as writer:
            capture(teacher, documents[: args.batch_size], writer, batch_size=args.batch_size, device=device)
        info = CacheReader(folder).info
    tokens = sum(map(len, documents))
    rate = info.tokens / (time.perf_counter() - began)
    return {
        "vocab_size": info.vocab_size, "k": info.k, "records": len(documents), "tokens": tokens,
        "bytes_per_token": info.bytes_per_token, "bytes": round(info.bytes_per_token * tokens),
        "kl_mean": info.kl_mean, "kl_max": info.kl_max, "tokens_per_second": rate, "seconds": tokens / rate,
    }  # fmt: skip


def _weights_hash(folder: Path) -> str:
    """sha256 of the weights: of the one file, or of the hashes of several in the order of their names."""
    hashes = []
    for path in sorted(folder.glob("*.safetensors")):
        state = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                state.update(block)
        hashes.append(state.hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _info(args: argparse.Namespace) -> dict[str, Any]:
    from kdfast.cache.manifest import CacheInfo, read_manifest

    found: dict[str, Any] = CacheInfo.of(*read_manifest(Path(args.path))).as_json()
    if args.plot:
        from kdfast.cli.cache_plot import plot

        plot(args.path, args.plot)
        found["plot"] = args.plot
    return found


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    from kdfast.cache import CacheReader, verify
    from kdfast.cli.progress import bar

    with bar("verify", CacheReader(args.path).info.tokens, "tokens") as shown:
        info = verify(args.path, lambda done, total: shown.update(done))
    return {"path": args.path, "verified": True, "records": info.records, "tokens": info.tokens, "bytes": info.bytes}


def _table(found: dict[str, Any]) -> str:
    shown = {name: _readable(name, value) for name, value in found.items() if name != "kl_histogram"}
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def _readable(name: str, value: Any) -> str:
    if name == "bytes":
        return f"{value:,} ({value / 1e9:.3f} GB)"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if name.startswith(("kl", "max_kl")) else f"{value:,.1f}"
    return ", ".join(f"{x:g}" for x in value) if isinstance(value, list) else str(value)
