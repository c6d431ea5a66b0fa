"""Resident memory while a large generated corpus is read, or captured:

    python -m tests.corpus_memory --tokenizer T --megabytes 1000 --form rows
    python -m tests.corpus_memory --tokenizer T --megabytes 1000 --form rows --max-gb 1

What either takes stays the same however long it goes on: nothing but a window of documents is held. The first reads every
document without a teacher; the second is `kdfast cache build` with a tiny teacher, watched from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FORMS = ("one-file", "files", "rows")
#: Points of a curve.
POINTS = 20


def generate(folder: Path, form: str, megabytes: int) -> str:
    """A corpus of about this size; returns what `--data` would name."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(1, 9))) for _ in range(5000)]
    block = "\n".join(" ".join(chance.choices(words, k=12)) for _ in range(14_000))[:1_000_000]
    if form == "files":
        (folder / "corpus").mkdir()
        for number in range(megabytes):
            (folder / "corpus" / f"{number}.txt").write_text(block)
        return str(folder / "corpus")
    file = folder / ("corpus.jsonl" if form == "rows" else "corpus.txt")
    with open(file, "w") as out:
        for _ in range(megabytes):
            if form == "one-file":
                out.write(block)
            for line in block.splitlines() if form == "rows" else ():
                out.write(json.dumps({"text": line}) + "\n")
    return str(file)


def read(tokenizer: str, data: str, megabytes: int, after: int) -> None:
    """Prints [million characters read, MiB resident] along the way, by how much the peak grew since `after`, and the tokens."""
    from kdfast.text import TextData
    from kdfast.text.documents import Corpus
    from kdfast.text.tokenizers import load_tokenizer

    corpus, tokens, settled = Corpus(TextData(paths=(data,)), load_tokenizer(tokenizer)[0]), 0, 0
    curve: list[tuple[float, float]] = []
    for example in corpus:
        tokens += len(example.input_ids)
        done = corpus._source.done / 1e6
        if not settled and done > after:
            settled = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if done >= (len(curve) + 1) * megabytes / POINTS:
            curve.append((round(done, 1), round(resident(os.getpid()), 1)))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - settled) / 1024
    print(json.dumps({"grown_mb": grown, "tokens": tokens, "curve": curve}))


def resident(process: int) -> float:
    """MiB of a process in memory, pages of mapped files among them."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def grow(tokenizer: Path, form: str, megabytes: int, after: int = 8) -> dict[str, Any]:
    """What `read` prints of a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        data = generate(Path(folder), form, megabytes)
        words = [sys.executable, "-m", "tests.corpus_memory", "--tokenizer", str(tokenizer), "--read", data,
                 "--megabytes", str(megabytes), "--after", str(after)]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def capture(
    tokenizer: Path, form: str, megabytes: int, max_gb: float, every: float = 5.0
) -> Iterator[tuple[float, float, float]]:
    """(seconds, MiB resident, MB of the cache) of a `kdfast cache build` that `max_gb` stops, every so many seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, teacher = generate(folder, form, megabytes), make_teacher(folder / "teacher", tokenizer)
        cache = folder / "cache"
        words = [sys.executable, "-m", "kdfast", "cache", "build", str(teacher), "--data", data, "--out", str(cache),
                 "--k", "32", "--max-gb", str(max_gb), "--shard-mb", "4"]  # fmt: skip
        began = time.monotonic()
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while process.poll() is None:
            time.sleep(every)
            if process.poll() is None:
                size = sum(file.stat().st_size for file in cache.glob("shard-*.safetensors"))
                yield time.monotonic() - began, resident(process.pid), size / 1e6
        print(process.communicate()[0].strip())
        if process.returncode:
            raise SystemExit(process.returncode)


def make_teacher(folder: Path, tokenizer: Path) -> Path:
    """A causal model of one narrow layer with this tokenizer's vocabulary and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from kdfast.text.tokenizers import load_tokenizer

    found, _ = load_tokenizer(tokenizer)
    config = LlamaConfig(vocab_size=found.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    found.save(str(folder / "tokenizer.json"))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--form", choices=FORMS, default="one-file")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json or its folder")
    parser.add_argument("--after", type=int, default=8, help="million characters after which memory has settled")
    parser.add_argument("--max-gb", type=float, help="capture, until the cache has this size")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read(args.tokenizer, args.read, args.megabytes, args.after)
    elif args.max_gb:
        for seconds, mib, megabytes in capture(Path(args.tokenizer), args.form, args.megabytes, args.max_gb):
            print(f"{seconds:8.1f} s  {mib:8.1f} MiB  cache {megabytes:8.1f} MB", flush=True)
    else:
        found = grow(Path(args.tokenizer), args.form, args.megabytes, args.after)
        for megabytes, mib in found["curve"]:
            print(f"{megabytes:8.1f} MB read  {mib:8.1f} MiB")
        print(f"{found['tokens']} tokens; the peak grew by {found['grown_mb']:.1f} MiB after {args.after} MB")


if __name__ == "__main__":
    main()
