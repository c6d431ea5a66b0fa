"""`kdfast cache build`: a teacher over text, its targets to disk."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EXAMPLE = (
    "kdfast cache build models/teacher --data corpus/ --glob '**/*.txt' --out cache --k 64 --temperatures 1 2, or"
    " instruction data: kdfast cache build models/teacher --data chats.jsonl --drop-masked --out cache, or a dataset:"
    " kdfast cache build models/teacher --dataset saved/ --split train --out cache, or: kdfast cache build models/teacher"
    " --dataset parquet --data part-0.parquet part-1.parquet --field content --out cache"
)
TASKS = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "masked": "AutoModelForMaskedLM"}


def add_arguments(build: argparse.ArgumentParser) -> None:
    build.add_argument("teacher", help="a folder with config.json, safetensors weights and tokenizer.json")
    build.add_argument("--data", nargs="+", help="text files, .jsonl files, or folders")
    build.add_argument(
        "--dataset", help="instead: a folder written by save_to_disk, a name for load_dataset, or json, csv, parquet, arrow,"
        " text with the files in --data (needs the package datasets)",
    )  # fmt: skip
    build.add_argument("--dataset-config", help="configuration of the dataset")
    build.add_argument("--split", help="of the dataset (default train)")
    build.add_argument("--out", required=True, help="the cache's folder")
    build.add_argument("--task", choices=["auto", *TASKS], default="auto", help="kind of teacher (default: by its config.json)")
    build.add_argument("--glob", default="**/*.txt", help="which files of a folder (default %(default)s)")
    build.add_argument("--field", help="field of a .jsonl line or dataset row that is the text (default text)")
    build.add_argument(
        "--messages-field", help="field with a conversation, a list of role and content, written by the teacher's chat template"
        " (default messages). A row is read by the first it has: conversation, prompt and completion, text; naming a field"
        " leaves out the others",
    )  # fmt: skip
    build.add_argument("--prompt-field", help="field with a prompt (default prompt)")
    build.add_argument("--completion-field", help="field with its completion (default completion)")
    build.add_argument("--chat-template", metavar="FILE", help="Jinja template to use instead of the teacher's")
    build.add_argument(
        "--prompt-loss", action="store_true", help="prompts count too; otherwise completions and assistant turns only"
    )
    build.add_argument("--drop-masked", action="store_true", help="keep no entries of tokens that do not count")
    build.add_argument("--source-field", default="source", help="encoder's text in a .jsonl line (seq2seq)")
    build.add_argument("--target-field", default="target", help="decoder's text in a .jsonl line (seq2seq)")
    build.add_argument("--mask-token", default="[MASK]", help="the tokenizer's mask (masked; default %(default)s)")
    build.add_argument("--mask-share", type=float, default=0.15, help="share of ids masked (masked; default %(default)s)")
    build.add_argument("--sequence-length", type=int, default=512, help="tokens of a record (default %(default)s)")
    build.add_argument(
        "--special-tokens", choices=["auto", "none"], default="auto", help="auto: around texts and completions what the"
        " tokenizer and the model's configuration say; none: only what --separator and --end name",
    )  # fmt: skip
    build.add_argument("--separator", metavar="TOKEN", help="after each text (default: as --special-tokens says)")
    build.add_argument(
        "--end", metavar="TOKEN", help="after each completion (default: --separator, else as --special-tokens says)"
    )
    build.add_argument("--k", type=int, default=64, help="ids kept a token (default %(default)s)")
    build.add_argument("--top-p", type=float, help="keep only the fewest of them that hold this mass")
    build.add_argument(
        "--samples", type=int, default=0, help="ids drawn from the rest a token; --k 0 draws from the whole teacher"
    )
    build.add_argument("--sample-temperature", type=float, default=1.0, help="of the draws, one of --temperatures (default 1)")
    build.add_argument("--temperatures", type=float, nargs="+", default=[1.0], help="1 among them (default 1)")
    build.add_argument("--max-kl", type=float, default=5e-5, help="KL error allowed a token, nats (default %(default)s)")
    build.add_argument("--batch-size", type=int, default=8, help="records in one call of the teacher (default %(default)s)")
    build.add_argument("--shard-mb", type=int, default=64, help="size of a shard; a killed capture loses at most this much")
    build.add_argument("--max-gb", type=float, help="stop at this size, with what fits")
    build.add_argument("--rank", type=int, default=0, help="which part of the documents (then: kdfast cache merge OUT)")
    build.add_argument("--world", type=int, default=1, help="of how many parts captured side by side")
    build.add_argument("--seed", type=int, default=0, help="of the masks and the draws (default %(default)s)")
    build.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU when there is one)")
    build.add_argument(
        "--resume", action="store_true", help="fail when there is no unfinished cache to go on with (without it, an"
        " unfinished cache is gone on with and a missing one begun)",
    )  # fmt: skip
    build.add_argument(
        "--dry-run", action="store_true", help="capture one batch, print size and time of the whole, keep nothing"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    for name, least in (("sequence_length", 2), ("batch_size", 1), ("shard_mb", 1), ("world", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected a number >= {least}, got {getattr(args, name)}")
    if not 0 <= args.rank < args.world:
        raise ValueError(f"--rank: expected 0 to {args.world - 1}, got {args.rank}")

    import torch

    from kdfast.cache import CacheReader, CacheWriter, capture, part_path, remote, share_of
    from kdfast.cache.manifest import is_unfinished
    from kdfast.cli.progress import bar
    from kdfast.text.documents import Corpus
    from kdfast.text.tokenizers import file_hash, load_tokenizer

    remote.writable(args.out, "--out")  # before the teacher is loaded
    out = Path(args.out) if args.world == 1 else part_path(args.out, args.rank, args.world)
    if args.resume and not is_unfinished(out):
        raise ValueError(f"--resume: expected an unfinished cache in {str(out)!r}, found none; leave --resume out to begin one")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, tokenizer_file = load_tokenizer(args.teacher)
    task = task_of(Path(args.teacher), args.task)
    if task != "causal" and args.drop_masked:
        raise ValueError(f"--drop-masked: expected a causal teacher, got a {task} one; leave it out")
    corpus = Corpus(_data(args), tokenizer, args.teacher, task=task, seed=args.seed, name=_flag)
    documents = list(corpus)
    if report := corpus.report():
        print(f"kdfast cache build: {report}", file=sys.stderr)
    teacher = load_teacher(args.teacher, task).to(device)
    settings = {
        "vocab_size": _vocab_size(teacher, documents[0], device), **_entries(args), "temperatures": tuple(args.temperatures),
        "max_kl": args.max_kl, "teacher": weights_hash(Path(args.teacher)), "tokenizer_hash": file_hash(tokenizer_file),
        "alignment": "same" if task == "masked" else "next",
    }  # fmt: skip
    pad_id = getattr(teacher.config, "pad_token_id", None) or 0
    options = {"batch_size": args.batch_size, "device": device, "top_p": args.top_p, "seed": args.seed, "pad_id": pad_id}
    options["drop_masked"] = args.drop_masked
    if args.dry_run:
        return _dry_run(args, teacher, documents, settings, options)
    documents = list(share_of(documents, args.batch_size, args.rank, args.world))
    limit = None if args.max_gb is None else int(args.max_gb * 1e9)
    total = sum(len(_input_ids(d)) for d in documents)
    with (
        CacheWriter(out, shard_bytes=args.shard_mb << 20, max_bytes=limit, queue=2 * args.batch_size, **settings) as writer,
        bar("capture", total, "tokens") as shown,
    ):
        capture(teacher, documents, writer, progress=lambda done, _: shown.update(done), **options)
    return {"path": str(out), "stopped_at_max_gb": writer.full, **CacheReader(out).info.as_json()}


def _entries(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that say which entries a token keeps; a cache counts its slots, drawn ones among them, as k."""
    if args.samples < 0 or args.k < 0:
        raise ValueError(f"--k, --samples: expected numbers >= 0, got {args.k} and {args.samples}")
    if args.samples == 0:
        return {"k": args.k, "kind": "topk" if args.top_p is None else "topp"}
    if args.top_p is not None:
        raise ValueError(
            "--samples: expected it without --top-p (drawn entries come on top of a fixed number of likeliest ids)"
        )
    kind = "mixed" if args.k else "sampled"
    return {"k": args.k + args.samples, "kind": kind, "samples": args.samples, "sample_temperature": args.sample_temperature}


def task_of(folder: Path, asked: str) -> str:
    """The task that was asked for, or the one that config.json tells."""
    import json

    if asked != "auto":
        return asked
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"teacher: expected a folder with config.json and safetensors weights, got {str(folder)!r}")
    config = json.loads(file.read_text())
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    return "masked" if any("MaskedLM" in name for name in config.get("architectures") or ()) else "causal"


def load_teacher(folder: str | Path, task: str) -> Any:
    """The model in a local folder, in float32 and evaluation mode; never reaches for a network."""
    import torch
    import transformers

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"teacher: expected a folder with config.json and safetensors weights, got {str(folder)!r}")
    transformers.utils.logging.disable_progress_bar()  # it draws one for the weights, even when piped
    kind = getattr(transformers, TASKS[task])
    return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32).eval()


def weights_hash(folder: Path) -> str:
    """sha256 of the weights: of the one file, or of the hashes of several in the order of their names."""
    hashes = []
    for path in sorted(folder.glob("*.safetensors")):
        state = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                state.update(block)
        hashes.append(state.hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _flag(option: str) -> str:
    return "--data" if option == "paths" else f"--{option.replace('_', '-')}"


def _data(args: argparse.Namespace) -> Any:
    """The corpus that the command line names."""
    from kdfast.text import TextData

    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(TextData) if hasattr(args, f.name)}
    return TextData(**fields, paths=tuple(args.data or ()))


def _input_ids(document: Any) -> Any:
    return getattr(document, "input_ids", document)


def _vocab_size(teacher: Any, document: Any, device: str) -> int:
    import torch

    ids = _input_ids(document)[None, :1].to(device)
    context = getattr(document, "context_ids", None)
    with torch.no_grad():
        out = teacher(ids) if context is None else teacher(context[None, :1].to(device), decoder_input_ids=ids)
    return int(out.logits.shape[-1])


def _dry_run(
    args: argparse.Namespace, teacher: Any, documents: list[Any], settings: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    from kdfast.cache import CacheReader, CacheWriter, capture

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with CacheWriter(folder, **settings) as writer:
            capture(teacher, documents[: args.batch_size], writer, **options)
        info = CacheReader(folder).info
    tokens = sum(len(_input_ids(d)) for d in documents)
    rate = info.tokens / (time.perf_counter() - began)
    return {
        "vocab_size": info.vocab_size, "k": info.k, "kind": info.kind, "alignment": info.alignment,
        "records": len(documents), "tokens": tokens, "bytes_per_token": info.bytes_per_token,
        "bytes": round(info.bytes_per_token * tokens), "kl_mean": info.kl_mean, "kl_max": info.kl_max,
        "tokens_per_second": rate, "seconds": tokens / rate,
    }  # fmt: skip
