"""`kdfast cache build`: a teacher over text, its targets to disk. Parses and prints; `kdfast.cache.build` does the work."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

EXAMPLE = "kdfast cache build models/teacher --data corpus/ --glob '**/*.txt' --out cache --k 64 --temperatures 1 2"
EXAMPLES = f"""examples:
  {EXAMPLE}
  kdfast cache build models/teacher --data chats.jsonl --drop-masked --out cache        (conversations)
  kdfast cache build models/teacher --dataset saved/ --split train --out cache          (of the package datasets)
  kdfast cache build models/teacher --data part-0.parquet part-1.parquet --field content --out cache
  kdfast cache build models/classifier --recipe student.yaml --out cache                 (classes: its task and data)
  torchrun --nproc-per-node 4 -m kdfast.cli cache build models/teacher --data corpus/ --out cache
"""


def add_arguments(build: argparse.ArgumentParser) -> None:
    build.epilog, build.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    build.add_argument("teacher", help="a folder with config.json, safetensors weights and tokenizer.json")
    build.add_argument("--out", required=True, help="the cache's folder")
    data = build.add_argument_group("data")
    data.add_argument("--data", nargs="+", help="text files, .jsonl and .parquet files, or folders")
    data.add_argument("--glob", default="**/*.txt", help="which files of a folder (default %(default)s)")
    data.add_argument("--exclude", nargs="+", default=[], help="names of files and folders to leave out")
    data.add_argument(
        "--dataset", help="instead: a folder written by save_to_disk, a name for load_dataset, or json, csv, parquet, arrow,"
        " text with the files in --data (needs the package datasets)",
    )  # fmt: skip
    data.add_argument("--dataset-config", help="configuration of the dataset")
    data.add_argument("--split", help="of the dataset (default train)")
    data.add_argument("--streaming", action="store_true", help="read the dataset as it is downloaded, keep none of it")
    data.add_argument(
        "--recipe", metavar="FILE", help="instead: the training rows of a recipe whose task has classes (texts, words, images),"
        " their whole distributions; the teacher may be module:function",
    )  # fmt: skip
    rows = build.add_argument_group("rows", "a row is read by the first it has: conversation, prompt and completion, text;"
                                    " naming a field leaves out the others")  # fmt: skip
    rows.add_argument("--field", help="field of a row that is the text (default text)")
    rows.add_argument(
        "--messages-field", help="field with a conversation, a list of role and content, written by the teacher's chat template"
        " (default messages)",
    )  # fmt: skip
    rows.add_argument("--prompt-field", help="field with a prompt (default prompt)")
    rows.add_argument("--completion-field", help="field with its completion (default completion)")
    rows.add_argument("--source-field", default="source", help="encoder's text (seq2seq; default %(default)s)")
    rows.add_argument("--target-field", default="target", help="decoder's text (seq2seq; default %(default)s)")
    rows.add_argument("--chat-template", metavar="FILE", help="Jinja template to use instead of the teacher's")
    rows.add_argument(
        "--prompt-loss", action="store_true", help="prompts count too; otherwise completions and assistant turns only"
    )
    rows.add_argument("--drop-masked", action="store_true", help="keep no entries of tokens that do not count")
    tokens = build.add_argument_group("tokens")
    tokens.add_argument("--sequence-length", type=int, default=512, help="tokens of a record (default %(default)s)")
    tokens.add_argument(
        "--special-tokens", choices=["auto", "none"], default="auto", help="auto: around texts and completions what the"
        " tokenizer and the model's configuration say; none: only what --separator and --end name",
    )  # fmt: skip
    tokens.add_argument("--separator", metavar="TOKEN", help="after each text (default: as --special-tokens says)")
    tokens.add_argument(
        "--end", metavar="TOKEN", help="after each completion (default: --separator, else as --special-tokens says)"
    )
    tokens.add_argument("--mask-token", default="[MASK]", help="the tokenizer's mask (masked; default %(default)s)")
    tokens.add_argument("--mask-share", type=float, default=0.15, help="share of ids masked (masked; default %(default)s)")
    kept = build.add_argument_group("what is kept")
    kept.add_argument("--k", type=int, default=64, help="ids kept a token (default %(default)s)")
    kept.add_argument("--top-p", type=float, help="keep only the fewest of them that hold this mass")
    kept.add_argument(
        "--samples", type=int, default=0, help="ids drawn from the rest a token; --k 0 draws from the whole teacher"
    )
    kept.add_argument("--sample-temperature", type=float, default=1.0, help="of the draws, one of --temperatures (default 1)")
    kept.add_argument("--temperatures", type=float, nargs="+", default=[1.0], help="1 among them (default 1)")
    kept.add_argument("--max-kl", type=float, default=5e-5, help="KL error allowed a token, nats (default %(default)s)")
    run = build.add_argument_group("the run")
    run.add_argument(
        "--task", choices=["auto", "causal", "seq2seq", "masked"], default="auto", help="kind of teacher (default: by its"
        " config.json)",
    )  # fmt: skip
    run.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of the teacher's weights (default:"
        " as its config.json says)",
    )  # fmt: skip
    run.add_argument("--batch-size", type=int, default=8, help="records in one call of the teacher (default %(default)s)")
    run.add_argument("--window", type=int, default=64, help="batches grouped by length (default %(default)s)")
    run.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU when there is one)")
    run.add_argument("--seed", type=int, default=0, help="of the masks and the draws (default %(default)s)")
    run.add_argument("--shard-mb", type=int, default=64, help="size of a shard; a killed capture loses at most this much")
    run.add_argument("--max-gb", type=float, help="stop at this size, with what fits")
    run.add_argument("--rank", type=int, help="which of several processes this is (default: RANK, as torchrun sets it)")
    run.add_argument("--world", type=int, help="how many there are (default: WORLD_SIZE); the last one merges the parts")
    run.add_argument(
        "--resume", action="store_true", help="fail when there is no unfinished cache to go on with (without it, an"
        " unfinished cache is gone on with and a missing one begun)",
    )  # fmt: skip
    run.add_argument("--dry-run", action="store_true", help="capture one batch, print size and time of the whole, keep nothing")


def run(args: argparse.Namespace) -> dict[str, Any]:

    from kdfast.cache import BuildOptions, build, estimate
    from kdfast.cli.progress import bar
    from kdfast.text import TextData

    if args.recipe:
        return _classes(args)
    data = TextData(**{**_given(args, TextData), "paths": tuple(args.data or ()), "exclude": tuple(args.exclude)})
    options = {**_given(args, BuildOptions), "temperatures": tuple(args.temperatures)}
    if args.dry_run:
        return estimate(args.teacher, data, say=_say, name=flag, **options)
    with bar("capture", None, "tokens") as shown:

        def progress(tokens: int, share: float | None) -> None:
            shown.update(tokens, None if not share else round(tokens / share))

        built = build(
            args.teacher, data, args.out, rank=args.rank, world=args.world, resume=args.resume, progress=progress, say=_say,
            name=flag, **options,
        )  # fmt: skip
    return {"path": str(built.path), "stopped_at_max_gb": built.stopped, **described(built.capture), **built.info.as_json()}


#: What `--recipe` goes together with.
_WITH_RECIPE = ("out", "recipe", "temperatures", "dtype", "batch_size", "device")


def _classes(args: argparse.Namespace) -> dict[str, Any]:
    from kdfast.cli.progress import bar
    from kdfast.train import Recipe, capture_classes
    from kdfast.train.recipe import Teacher

    given = argparse.ArgumentParser()
    add_arguments(given)
    for option in _options(given):
        if option.dest not in _WITH_RECIPE and getattr(args, option.dest) != option.default:
            raise ValueError(
                f"{option.option_strings[0]}: --recipe says what is captured; leave {option.option_strings[0]} out"
            )
    named = {"function": args.teacher} if ":" in args.teacher else {"path": args.teacher}
    with bar("capture", None, "rows") as shown:
        info = capture_classes(
            Recipe.load(args.recipe), Teacher(**named, dtype=args.dtype), args.out, temperatures=args.temperatures,
            batch_size=args.batch_size, device=args.device, progress=shown.update, say=_say,
        )  # fmt: skip
    return {"path": args.out, **info.as_json()}


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


def flag(option: str) -> str:
    """An option of `TextData` or `BuildOptions` as the command line has it; nothing of what it has not."""
    if option == "unlabelled":
        return ""
    return "--data" if option == "paths" else f"--{option.replace('_', '-')}"


def described(capture: dict[str, Any]) -> dict[str, Any]:
    """What `capture.json` says of a cache, for people."""
    chosen = {name: token for name, token in (capture.get("chosen_tokens") or {}).items() if token is not None}
    found = {"dtype": capture.get("dtype"), "special_tokens": ", ".join(f"{n} {t}" for n, t in chosen.items()) or "none"}
    return found if capture else {}


def _given(args: argparse.Namespace, cls: Any) -> dict[str, Any]:
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if hasattr(args, f.name)}


def _say(line: str) -> None:
    print(f"kdfast cache build: {line}", file=sys.stderr)
