"""`kdfast eval MODEL --data FILES`, of a model's folder or of a run's."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Options of the data that are flags.
_OWN = ("data", "glob", "exclude", "sequence_length", "special_tokens", "separator", "end")
#: What a recipe calls otherwise than a flag is called.
_FLAGS = {"validation": "data", "train": "data"}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "eval", help="a model's scores on files: perplexity and top-1 of text, accuracy of classes, BLEU, what its task knows",
        epilog="examples: kdfast eval runs/word_kd --data held_out/, kdfast eval runs/word_kd/model --data held_out/",
        description="Evaluates a model on files, through its head where that can be named: logits are never formed whole. Of"
        " a run's folder its recipe holds for task, data, tokenizer and function, but for what is said here. Of the folder of"
        " a model (config.json, safetensors weights, tokenizer.json), what stands around documents is what the tokenizer and"
        " the model's configuration say.",
    )  # fmt: skip
    parser.add_argument("model", help="a run's folder, a folder with config.json and safetensors weights, or a hub name")
    parser.add_argument("--best", action="store_true", help="of a run with keep_best: the model of its best evaluation")
    parser.add_argument(
        "--function", metavar="MODULE:FUNCTION", help="what makes a model that is no transformers model, as student.function of"
        " its recipe; the folder or file then holds its weights. Its module may lie in the current folder",
    )  # fmt: skip
    parser.add_argument("--arguments", nargs="+", default=[], metavar="KEY=VALUE", help="of --function")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILES",
        help="files or folders (default: of a run's folder what its recipe is validated on)",
    )
    parser.add_argument("--glob", help="which files of a folder (default: those that the task reads, of text **/*.txt)")
    parser.add_argument("--exclude", nargs="+", default=[], help="names of files and folders to leave out")
    parser.add_argument(
        "--task", help="what the data are (default: the run's, or by the model's config.json; kdfast train --keys task)"
    )
    parser.add_argument("--tokenizer", help="tokenizer.json or its folder (default: the model's folder, or the run's)")
    parser.add_argument("--sequence-length", type=int, help="tokens per sequence (default: the run's, or 128)")
    parser.add_argument(
        "--special-tokens", choices=["auto", "none"], help="auto (default): around documents what the tokenizer and the"
        " model's configuration say; none: only what --separator and --end name",
    )  # fmt: skip
    parser.add_argument("--separator", metavar="TOKEN", help="after each text")
    parser.add_argument("--end", metavar="TOKEN", help="after each completion")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="any other key of the task's data, as under"
        " data: in a recipe, or task.KEY of the task (kdfast train --keys seq2seq)",
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
    parser.add_argument(
        "--predictions", metavar="FILE", help="of a task with classes: write what the model says of each row as lines of JSON"
        " (label, class, probabilities; of words their tags). Rows without labels will do",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name, low in (("sequence_length", 2), ("batch_size", 1), ("limit", 0)):
        given = getattr(args, name)
        if given is not None and given < low:
            raise ValueError(f"--{name.replace('_', '-')}: expected a number >= {low}, got {given}")

    from kdfast.files import json_text

    try:
        found, headline = _scores(args)
    except ValueError as error:
        raise ValueError(_with_flags(str(error))) from None
    if args.predictions:
        print(f"{args.predictions}: what the model says of each row", file=sys.stderr)
    if found is None:
        return 0
    if args.json:
        print(json_text(found))
    elif set(found) == {"ppl", "nll", "top1", "tokens"}:
        print(f"perplexity {found.ppl:.3f}, {found.nll:.4f} nats a token, top-1 {found.top1:.2%}, {found.tokens:,} tokens")
    else:
        print(headline)
    return 0


def _scores(args: argparse.Namespace) -> tuple[Any, str]:
    """The scores, and what the task says of them."""
    from kdfast.models.load import (
        check_ids,
        device_named,
        from_function,
        kind_of,
        load_folder,
        load_weights,
        read_config,
        resolve_folder,
    )
    from kdfast.strict import build, override
    from kdfast.text.tokenizers import load_tokenizer
    from kdfast.train.data import Subset
    from kdfast.train.evaluate import evaluate, predict
    from kdfast.train.positions import check_positions
    from kdfast.train.recipe import named
    from kdfast.train.run_folder import trained
    from kdfast.train.tasks import task_class
    from kdfast.train.tasks.classes import ClassTask

    run = trained(Path(args.model), args.best)
    function = args.function or run.function
    arguments = override(run.arguments, args.arguments)
    if function and not (args.task or run.task):
        raise ValueError("task: expected what the data are, which --function does not say, got none; set --task")
    if args.arguments and not function:
        raise ValueError("--arguments: they belong to --function, got none; set --function")
    where = run.model or args.model
    folder = Path(where) if function else resolve_folder(where, "model")
    # `task.beams=[1, 5]` is the task's, any other key its data's.
    own = [setting.removeprefix("task.") for setting in args.set if setting.startswith("task.")]
    rest = [setting.removeprefix("data.") for setting in args.set if not setting.startswith("task.")]
    name = args.task or run.task.get("name") or kind_of(folder)
    same = name == run.task.get("name")
    chosen = named({"name": name, **override(run.task if same else {}, own)}, "task")
    cls = task_class(chosen.name)
    given = {name: value for name in _OWN[1:] if (value := getattr(args, name))}
    files = args.data or (run.validation if same else [])
    if not files:
        raise ValueError(
            "--data: expected files or folders, got none; only a run whose recipe names validation files does without"
        )
    if not args.data:
        print(f"--data: {' '.join(files)}, as the run's recipe says", file=sys.stderr)
    data = build(cls.Data, override({**(run.data if same else {}), **given, "validation": files}, rest), "data")
    # What the model's folder has, was written beside the weights: the recipe's may have moved.
    read = args.tokenizer or (folder if (folder / "tokenizer.json").is_file() else run.tokenizer or folder)
    tokenizer, file = load_tokenizer(read) if cls.needs_tokenizer else (None, None)
    device = device_named(args.device, "--device")
    task = cls(chosen.options, data)
    if isinstance(task, ClassTask):
        task.names = task.names or run.classes
        task.take_classes([] if function else [read_config(folder)])
        task.learned = True
        task.scored = not args.predictions
        if same and args.data:
            task.inherited = frozenset(run.data).difference(setting.partition("=")[0].strip() for setting in rest)
    elif args.predictions:
        raise ValueError(f"--predictions: expected a task with classes, got {chosen.name}; leave it out")
    with tempfile.TemporaryDirectory() as kept:
        rows = task.open(tokenizer, file, Path(kept), needs_train=False).validation
        if rows is None:
            raise ValueError(f"--data: expected rows for {chosen.name}, got none")
        if function:
            sys.path.append("")
            model = from_function(function, arguments, "--function" if args.function else "student.function")
            load_weights(model, folder, "model")
        else:
            if isinstance(task, ClassTask):
                task.check_folder(folder, "model", heard=True)
            model = load_folder(folder, "model", kind=task.kind, dtype=args.dtype)
        task.check_model(model, rows, "model")
        if tokenizer is not None:
            check_ids(model, tokenizer.get_vocab_size(), "model")
        check_positions([("model", model)], rows, task)
        model = model.to(device)
        unnamed = task.order_notes(["model"]) if isinstance(task, ClassTask) else []
        for note in [*task.notes, *unnamed]:
            print(_with_flags(note), file=sys.stderr)
        if args.predictions:
            rows = rows if not args.limit else Subset(rows, range(min(args.limit, len(rows))))
            if not predict(model, rows, task, Path(args.predictions), batch_size=args.batch_size):
                return None, ""
        found = evaluate(model, rows, batch_size=args.batch_size, limit=args.limit, task=task)
    return found, task.headline(found)


def _with_flags(message: str) -> str:
    """`data.sequence_length: ...`, `data.field: ...` as the command line has them."""

    from dataclasses import fields

    from kdfast.train.tasks import names, task_class

    # Only what they have is an option: `data.tsv` is a file.
    classes = [task_class(name) for name in names()]
    options = {
        kind: "|".join({field.name for cls in classes for field in fields(getattr(cls, kind))}) for kind in ("Data", "Options")
    }

    def flag(match: re.Match[str]) -> str:
        name = _FLAGS.get(match[1], match[1])
        return f"--{name.replace('_', '-')}" if name in _OWN else f"--set {name}"

    def setting(match: re.Match[str]) -> str:
        return f"--set task.{match[1]}" + (f'="{match[2]}"' if match[2] else "")

    message = re.sub(rf"(?<![\w.'-])data\.({options['Data']}|\w+(?=: unknown key))\b(?!\.)", flag, message)
    message = re.sub(rf"(?<![\w.'-])task\.({options['Options']}|\w+(?=: unknown key))\b(?:: (\[.*?\]))?", setting, message)
    return re.sub(r"^(tokenizer|task|best)(?=[: ])", r"--\1", message)
