"""Resident memory while a large generated corpus is read: `python -m tests.corpus_memory --megabytes 1000 --form rows`.

What reading takes stays the same however long it goes on: nothing but a window of documents is held.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORMS = ("one-file", "files", "rows")


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


def read(tokenizer: str, data: str, after: int) -> None:
    """Prints by how many MiB the peak grew once `after` million characters were read, and the tokens."""
    from kdfast.text import TextData
    from kdfast.text.documents import Corpus
    from kdfast.text.tokenizers import load_tokenizer

    corpus, tokens, settled = Corpus(TextData(paths=(data,)), load_tokenizer(tokenizer)[0]), 0, 0
    for example in corpus:
        tokens += len(example.input_ids)
        if not settled and corpus._source.done > after * 1e6:
            settled = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"grown_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - settled) / 1024, "tokens": tokens}))


def grow(tokenizer: Path, form: str, megabytes: int, after: int = 8) -> float:
    """MiB by which the memory of a process grows between `after` and `megabytes` million characters."""
    with tempfile.TemporaryDirectory() as folder:
        data = generate(Path(folder), form, megabytes)
        words = [
            sys.executable,
            "-m",
            "tests.corpus_memory",
            "--tokenizer",
            str(tokenizer),
            "--read",
            data,
            "--after",
            str(after),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(json.loads(done.stdout)["grown_mb"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--form", choices=FORMS, default="one-file")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json or its folder")
    parser.add_argument("--after", type=int, default=8, help="million characters after which memory has settled")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read(args.tokenizer, args.read, args.after)
    else:
        print(f"grew by {grow(Path(args.tokenizer), args.form, args.megabytes, args.after):.1f} MiB")


if __name__ == "__main__":
    main()
