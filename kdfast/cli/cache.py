"""`kdfast cache build|info|verify|repair|merge|cat|bench`: a teacher's targets on disk."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from kdfast.cli import cache_build
from kdfast.files import json_text

_VERIFY = "kdfast cache verify cache --teacher models/teacher"
_MERGE = "kdfast cache merge cache    (parts captured with --rank and --world), or: kdfast cache merge both first second"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "cache", help="capture a teacher's targets, and look at what was captured", epilog=f"example: {cache_build.EXAMPLE}"
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str, example: str, description: str | None = None) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(
            name, help=help, epilog=f"example: {example}", description=description or f"{help[0].upper()}{help[1:]}."
        )
        made.add_argument("--json", action="store_true", help="print JSON")
        made.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
        return made

    build = action(
        "build", "run a teacher over text and keep its targets", cache_build.EXAMPLE,
        "Runs a teacher over text and keeps its top-k targets. Killed and run again, it goes on after the last shard that"
        " was finished; --resume insists on that.",
    )  # fmt: skip
    cache_build.add_arguments(build)
    info = action("info", "what a cache holds", "kdfast cache info cache --plot cache.png")
    info.add_argument("path", help="the cache's folder or URL")
    info.add_argument("--plot", metavar="FILE.png", help="draw mass over k, bytes and the KL error")
    verify = action("verify", "read everything through and check it", _VERIFY)
    verify.add_argument("path", help="the cache's folder or URL")
    verify.add_argument("--teacher", metavar="FOLDER", help="run the teacher again over some records and compare")
    verify.add_argument("--records", type=int, default=8, help="how many of them (default %(default)s)")
    verify.add_argument("--limit", type=float, default=1e-3, help="mean KL that fails, nats (default %(default)s)")
    verify.add_argument("--device", default="cpu", help="where the teacher runs (default %(default)s)")
    repair = action("repair", "drop what is damaged and keep the rest", "kdfast cache repair cache --dry-run")
    repair.add_argument("path", help="the cache's folder")
    repair.add_argument("--dry-run", action="store_true", help="only say what would be lost")
    merge = action("merge", "join caches without copying", _MERGE)
    merge.add_argument("path", help="the folder of the joined cache")
    merge.add_argument("parts", nargs="*", help="caches in their order (default: the parts under PATH, removed afterwards)")
    cat = action("cat", "print records", "kdfast cache cat cache --records 0 7 --tokenizer models/teacher --top 3")
    cat.add_argument("path", help="the cache's folder or URL")
    cat.add_argument("--records", type=int, nargs="+", default=[0], help="which (default 0)")
    cat.add_argument("--rows", type=int, default=16, help="rows of each (default %(default)s)")
    cat.add_argument("--top", type=int, default=5, help="likeliest entries of each row (default %(default)s)")
    cat.add_argument("--tokenizer", help="tokenizer.json or its folder, to print tokens instead of ids")
    bench = action("bench", "how fast batches are read and decoded", "kdfast cache bench cache --batch-size 16 --threads 1")
    bench.add_argument("path", help="the cache's folder or URL")
    bench.add_argument("--batch-size", type=int, default=16, help="records (default %(default)s)")
    bench.add_argument("--threads", type=int, default=1, help="that decode at the same time (default %(default)s)")
    bench.add_argument("--seconds", type=float, default=3.0, help="how long (default %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    actions: dict[str, Any] = {
        "build": cache_build.run, "info": _info, "verify": _verify, "repair": _repair, "merge": _merge, "cat": _cat,
        "bench": _bench,
    }  # fmt: skip
    if args.action in ("verify", "cat", "bench") or getattr(args, "plot", None):
        args.path = _copied(args.path)
    try:
        found = actions[args.action](args)
    except KeyboardInterrupt:
        hint = "; what was finished is safe, run the same command again to go on" if args.action == "build" else ""
        print(f"kdfast cache {args.action}: interrupted{hint}", file=sys.stderr)
        return 130
    print(json_text(found) if args.json else found["text"] if "text" in found else _table(found))
    return 1 if found.get("failed") else 0


def _copied(path: str) -> str:
    """The path, or where the copy of a URL lies, made under a bar."""
    from kdfast.cache.remote import Remote, is_url
    from kdfast.cli.progress import bar

    if not is_url(path):
        return path
    remote = Remote(path)
    with bar("copy", remote.shard_bytes // 10**6, "MB") as shown:
        return str(remote.copy(lambda done, _: shown.update(done // 10**6)))


def _info(args: argparse.Namespace) -> dict[str, Any]:
    from kdfast.cache import CacheInfo, read_capture
    from kdfast.cache.remote import is_url, manifest_of

    found: dict[str, Any] = CacheInfo.of(*manifest_of(args.path)).as_json()
    if not is_url(args.path):
        found |= cache_build.described(read_capture(args.path))
    if args.plot:
        from kdfast.cli.cache_plot import plot

        plot(args.path, args.plot)
        found["plot"] = args.plot
    return found


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    from kdfast.cache import CacheReader, verify
    from kdfast.cli.progress import bar

    reader = CacheReader(args.path)
    with bar("verify", reader.info.tokens, "tokens") as shown:
        info = verify(args.path, lambda done, total: shown.update(done))
    found = {"path": args.path, "verified": True, "records": info.records, "tokens": info.tokens, "bytes": info.bytes}
    if args.teacher:
        found |= _compare(args, reader)
    return found


def _compare(args: argparse.Namespace, reader: Any) -> dict[str, Any]:
    import numpy as np

    from kdfast.cache import compare_with_teacher, load_teacher, read_capture
    from kdfast.models.load import device_named, vocab_of, weights_hash

    if "rows" in read_capture(args.path):
        raise ValueError("--teacher: expected a cache of text, got one of rows with classes; leave --teacher out")
    folder = Path(args.teacher)
    seq2seq = len(reader) and reader[0].context_ids is not None
    task = "seq2seq" if seq2seq else "masked" if reader.info.alignment == "same" else "causal"
    dtype = read_capture(args.path).get("dtype") or "float32"
    device = device_named(args.device, "--device")
    teacher = load_teacher(folder, task, dtype).to(device)
    if (its := vocab_of(teacher)) is not None and its < reader.info.vocab_size:
        raise ValueError(f"--teacher: its vocabulary has {its} ids, expected the cache's {reader.info.vocab_size}")
    records = np.unique(np.linspace(0, len(reader) - 1, min(args.records, len(reader))).astype(int)).tolist()
    check = compare_with_teacher(reader, teacher, records, device)
    failed = not check.kl_mean <= args.limit  # a teacher that says NaN fails too
    return {
        "verified": not failed, "same_weights": weights_hash(folder) == reader.info.teacher,
        "compared_rows": check.rows, "kl_to_teacher_mean": check.kl_mean, "kl_to_teacher_max": check.kl_max, "failed": failed,
    }  # fmt: skip


def _repair(args: argparse.Namespace) -> dict[str, Any]:
    from kdfast.cache import repair

    return {"path": args.path, "dry_run": args.dry_run, **repair(args.path, args.dry_run)._asdict()}


def _merge(args: argparse.Namespace) -> dict[str, Any]:
    from kdfast.cache import merge

    return {"path": args.path, **merge(args.path, args.parts or None).as_json()}


def _cat(args: argparse.Namespace) -> dict[str, Any]:
    from kdfast.cache import CacheReader

    reader = CacheReader(args.path)
    show: Any = str
    if args.tokenizer:
        from kdfast.text.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer)[0]

        def show(i: int) -> str:
            return repr(tokenizer.decode([i], skip_special_tokens=False))

    records, lines = [], []
    for number in args.records:
        if not -len(reader) <= number < len(reader):
            raise ValueError(f"--records: expected numbers from 0 to {len(reader) - 1}, got {number}")
        rows = _rows(reader, number, args.rows, args.top)
        records.append({"record": number, "tokens": int(reader.lengths()[number]), "rows": rows})
        lines.append(f"record {number}: {records[-1]['tokens']} tokens")
        for row in rows:
            entries = "  ".join(f"{show(i)} {p:.3f}" for i, p in row["entries"])
            label = "-" if row["label"] is None else show(row["label"])
            lines.append(f"{row['row']:5d}  {show(row['input'])} -> {label}   {entries}   rest {row['tail']:.3f}")
    return {"records": records} if args.json else {"text": "\n".join(lines)}


def _rows(reader: Any, number: int, count: int, top: int) -> list[dict[str, Any]]:
    batch = reader.batch([number])
    targets, column = batch.targets, batch.targets.column(1.0)
    rows = []
    for t in range(min(count, batch.input_ids.shape[1])):
        logp, at = targets.logprobs[0, t].sort(descending=True)
        ids = targets.ids[0, t][at]
        label = int(batch.labels[0, t])
        rows.append({
            "row": t, "input": int(batch.input_ids[0, t]), "label": None if label < 0 else label,
            "entries": [(int(i), float(p)) for i, p in zip(ids[:top], logp[:top].exp(), strict=True) if i >= 0],
            "tail": float(targets.log_tail[0, t, column].exp()),
        })  # fmt: skip
    return rows


def _bench(args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from kdfast.cache import CacheReader, codec

    reader = CacheReader(args.path)
    if not len(reader):
        raise ValueError(f"path: expected a cache with records, {args.path} has none")
    chance, tokens, end = np.random.default_rng(0), 0, time.perf_counter() + args.seconds
    times: list[float] = []
    while time.perf_counter() < end or len(times) < 3:
        indices = chance.integers(0, len(reader), args.batch_size)
        began = time.perf_counter()
        batch = reader.batch(indices, threads=args.threads)
        times.append((time.perf_counter() - began) / batch.attention_mask.numel())
        tokens += int(batch.attention_mask.sum())
    median, best = float(np.median(times)), min(times)
    return {
        "path": args.path, "codec": "C++" if codec.native() else "Python", "batch_size": args.batch_size,
        "threads": args.threads, "batches": len(times), "tokens": tokens, "tokens_per_second_median": 1 / median,
        "tokens_per_second_best": 1 / best, "compressed_megabytes_per_second": reader.info.bytes_per_token / median / 1e6,
    }  # fmt: skip


def _table(found: dict[str, Any]) -> str:
    shown = {name: _readable(name, value) for name, value in found.items() if name not in ("kl_histogram", "failed")}
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
