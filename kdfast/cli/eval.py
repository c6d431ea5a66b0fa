"""`kdfast eval MODEL --data FILES`."""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

#: What a recipe calls otherwise than a flag is called.
_FLAGS = {"validation": "data", "train": "data"}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "eval", help="perplexity and top-1 accuracy of a model on text files",
        epilog="example: kdfast eval runs/word_kd/model --data held_out/ --glob '**/*.txt'",
        description="Evaluates the model in a folder (config.json, safetensors weights, tokenizer.json) on files, through its"
        " head where that can be named: logits are never formed whole. What stands around documents is what the tokenizer and"
        " the model's configuration say.",
    )  # fmt: skip
    parser.add_argument("model", help="a folder with config.json and safetensors weights, or a hub name")
    parser.add_argument(
        "--function", metavar="MODULE:FUNCTION", help="what makes a model that is no transformers model, as student.function of"
        " its recipe; the folder or file then holds its weights",
    )  # fmt: skip
    parser.add_argument("--arguments", nargs="+", default=[], metavar="KEY=VALUE", help="of --function")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILES", help="files or folders")
    parser.add_argument("--glob", default="**/*.txt", help="which files of a folder (default %(default)s)")
    parser.add_argument("--exclude", nargs="+", default=[], help="names of files and folders to leave out")
    parser.add_argument("--task", help="what the data are (default: by the model's config.json; kdfast train --keys task)")
    parser.add_argument("--tokenizer", help="tokenizer.json or its folder (default: the model's folder)")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens per sequence (default %(default)s)")
    parser.add_argument(
        "--special-tokens", choices=["auto", "none"], default="auto", help="auto: around documents what the tokenizer and the"
        " model's configuration say; none: only what --separator and --end name",
    )  # fmt: skip
    parser.add_argument("--separator", metavar="TOKEN", help="after each text")
    parser.add_argument("--end", metavar="TOKEN", help="after each completion")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="any other key of the task's data, as under data: in a"
        " recipe, or task.KEY of the task (kdfast train --keys seq2seq)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=16, help="sequences at a time (default %(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="read so many sequences at most (default: all)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU when there is one)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights (default: as stored)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name, low in (("sequence_length", 2), ("batch_size", 1), ("limit", 0)):
        if getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')}: expected a number >= {low}, got {getattr(args, name)}")

    from kdfast.files import json_text

    try:
        found, headline = _scores(args)
    except ValueError as error:
        raise ValueError(_with_flags(str(error))) from None
    if args.json:
        print(json_text(found))
    elif set(found) == {"ppl", "nll", "top1", "tokens"}:
        print(f"perplexity {found.ppl:.3f}, {found.nll:.4f} nats a token, top-1 {found.top1:.2%}, {found.tokens:,} tokens")
    else:
        print(headline)
    return 0


def _scores(args: argparse.Namespace) -> tuple[Any, str]:
    """The scores, and what the task says of them."""
    from kdfast.models.load import check_ids, device_named, from_function, kind_of, load_folder, load_weights, resolve_folder
    from kdfast.strict import build, override
    from kdfast.text.tokenizers import load_tokenizer
    from kdfast.train.evaluate import evaluate
    from kdfast.train.positions import check_positions
    from kdfast.train.recipe import named
    from kdfast.train.tasks import task_class

    if args.function and not args.task:
        raise ValueError("task: expected what the data are, which --function does not say, got none; set --task")
    if args.arguments and not args.function:
        raise ValueError("--arguments: they belong to --function, got none; set --function")
    folder = Path(args.model) if args.function else resolve_folder(args.model, "model")
    chosen = named(args.task or kind_of(folder), "task")
    cls, rest = task_class(chosen.name), [setting for setting in args.set if not setting.startswith("task.")]
    # `task.beams=[1, 5]` is the task's, any other key its data's.
    own = [setting.removeprefix("task.") for setting in args.set if setting.startswith("task.")]
    chosen = named({"name": chosen.name, **override({}, own)}, "task")
    known = {name: getattr(args, name) for name in ("glob", "exclude", "sequence_length", "special_tokens", "separator", "end")}
    # A task without one of these has no use for its default.
    given = {name: value for name, value in known.items() if name in {f.name for f in fields(cls.Data)}}
    data = build(cls.Data, override({**given, "validation": args.data}, rest), "data")
    tokenizer, file = load_tokenizer(args.tokenizer or folder) if cls.needs_tokenizer else (None, None)
    device = device_named(args.device, "--device")
    task = cls(chosen.options, data)
    with tempfile.TemporaryDirectory() as kept:
        rows = task.open(tokenizer, file, Path(kept), needs_train=False).validation
        if rows is None:
            raise ValueError(f"--data: expected rows for {chosen.name}, got none")
        if args.function:
            model = from_function(args.function, override({}, args.arguments), "--function")
            load_weights(model, folder, "model")
            task.check_model(model, rows, "model")
        else:
            model = load_folder(folder, "model", kind=task.kind, dtype=args.dtype)
        if tokenizer is not None:
            check_ids(model, tokenizer.get_vocab_size(), "model")
        check_positions([("model", model)], rows, task)
        model = model.to(device)
        found = evaluate(model, rows, batch_size=args.batch_size, limit=args.limit, task=task)
    return found, task.headline(found)


def _with_flags(message: str) -> str:
    """`data.sequence_length: ...` as the command line has it."""

    def flag(match: re.Match[str]) -> str:
        return f"--{_FLAGS.get(match[1], match[1]).replace('_', '-')}"

    return re.sub(r"^(tokenizer|task)(?=[: ])", r"--\1", re.sub(r"\bdata\.(\w+)", flag, message))
