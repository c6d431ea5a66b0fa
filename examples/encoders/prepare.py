"""The data sets of the encoder examples as files that the recipes read: `data/{sst2,rte,wnut17,amazon}/...`.

python prepare.py DATA [FOLDER]      DATA, or KDFAST_DATA, holds the folders sst2, rte, wnut17 and amazon_reviews

sst2/{train,dev}.tsv               sentence, tab, 0 or 1 (Stanford Sentiment Treebank, https://nlp.stanford.edu/sentiment)
rte/{train,dev}.tsv                index, sentence1, sentence2, label with a header line (https://gluebenchmark.com/tasks)
wnut17/{train,dev}.conll           word, tab, BIO tag; a blank line after a sentence (shared task of
                                   https://noisy-text.github.io/2017/emerging-rare-entities.html)
amazon_reviews/DOMAIN.{negative,positive}.review      Multi-Domain Sentiment Dataset (Blitzer et al. 2007), pseudo-XML,
                                   https://www.cs.jhu.edu/~mdredze/datasets/sentiment
MNLI by genre, which the paper of Meta-KD also uses, needs no preparation: its jsonl files are read as they are
(`data: {text: sentence1, text_pair: sentence2, label: gold_label, domain: genre}`).

A tenth of the training rows is held out for every choice (`validation`); the dev files are looked at once (`test`). Of the
reviews, which have no dev files, a tenth is `validation` and three tenths are `test`, as a difference of two points is lost in
fewer; the sentences of their training part are `amazon/sentences.tsv`, without a label. A set that is not there is left out.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from kdfast.files import write_text
from kdfast.text.files import share_of

VALIDATION = {"validation": 0.1}
SENTIMENTS = ("negative", "positive")
#: Fewest and most words of a sentence.
WORDS = (4, 40)


def parts(rows: Sequence[str], held: Mapping[str, float], name: str) -> dict[str, list[str]]:
    """`rows` by part: each of `held` gets its share, by the row's number alone; the rest is `train`."""
    bounds = dict(zip(held, accumulate(held.values()), strict=True))
    found: dict[str, list[str]] = {"train": [], **{part: [] for part in held}}
    for i, row in enumerate(rows):
        place = share_of(f"{name}:{i}", 0)
        found[next((part for part, bound in bounds.items() if place < bound), "train")].append(row)
    return found


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def write(folder: Path, found: dict[str, list[str]], suffix: str, header: str = "", between: str = "\n") -> dict[str, int]:
    """A file for each part, and how many rows it has."""
    for part, rows in found.items():
        write_text(folder / f"{part}{suffix}", header + between.join(rows) + "\n")
    return {part: len(rows) for part, rows in found.items()}


def sst2(data: Path, out: Path) -> dict[str, int]:
    found = parts(lines(data / "sst2/train.tsv"), VALIDATION, "sst2")
    return write(out / "sst2", {**found, "test": lines(data / "sst2/dev.tsv")}, ".tsv", "text\tlabel\n")


def rte(data: Path, out: Path) -> dict[str, int]:
    header, *rows = lines(data / "rte/train.tsv")
    found = parts(rows, VALIDATION, "rte")
    return write(out / "rte", {**found, "test": lines(data / "rte/dev.tsv")[1:]}, ".tsv", f"{header}\n")


def wnut17(data: Path, out: Path) -> dict[str, int]:
    train, dev = (
        re.split(r"\n\s*\n", (data / f"wnut17/{name}.conll").read_text(encoding="utf-8").strip()) for name in ("train", "dev")
    )
    return write(out / "wnut17", {**parts(train, VALIDATION, "wnut17"), "test": dev}, ".conll", between="\n\n")


def reviews(file: Path) -> Iterator[str]:
    """The texts of a file of `<review>` with a `<review_text>` each; the files are no XML: nothing in them is escaped."""
    for found in re.finditer(r"<review_text>(.*?)</review_text>", file.read_text(encoding="utf-8", errors="replace"), re.S):
        yield " ".join(found[1].split())


def sentences(text: str) -> Iterator[str]:
    """Of a text as `reviews` gives it, which has no tab that would end a column."""
    for found in re.split(r"(?<=[.!?]) ", text):
        if WORDS[0] <= len(found.split()) <= WORDS[1]:
            yield found


def amazon(data: Path, out: Path) -> dict[str, int]:
    folder = data / "amazon_reviews"
    counts, said = {}, []
    for domain in sorted({file.name.split(".")[0] for file in folder.glob("*.review")}):
        found: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
        absent = next((s for s in SENTIMENTS if not (folder / f"{domain}.{s}.review").is_file()), None)
        if absent:
            raise SystemExit(f"{folder}: expected {domain}.{absent}.review beside the other one, found none")
        for sentiment in SENTIMENTS:
            rows = [
                json.dumps({"text": text, "label": sentiment, "domain": domain}, ensure_ascii=False)
                for text in reviews(folder / f"{domain}.{sentiment}.review")
            ]
            for part, some in parts(rows, {**VALIDATION, "test": 0.3}, f"{domain}.{sentiment}").items():
                found[part] += some
        counts[domain] = sum(write(out / "amazon" / domain, found, ".jsonl").values())
        said += [f"{sentence}\t" for row in found["train"] for sentence in sentences(json.loads(row)["text"])]
    return {**counts, **write(out / "amazon", {"sentences": said}, ".tsv", "text\tlabel\n")}


def prepare(data: Path, out: Path) -> dict[str, dict[str, int]]:
    """Writes what `data` holds; the number of rows by set and part."""
    sets = {"sst2": sst2, "rte": rte, "wnut17": wnut17, "amazon_reviews": amazon}
    found = {name: read(data, out) for name, read in sets.items() if (data / name).is_dir()}
    if not found:
        raise SystemExit(f"{data}: expected one of the folders {', '.join(sets)}, found none")
    return found


if __name__ == "__main__":
    named = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("KDFAST_DATA")
    if named is None:
        raise SystemExit("usage: python prepare.py DATA [FOLDER] (DATA, or KDFAST_DATA, holds sst2, rte, ... as above)")
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else "data")
    print(json.dumps({"folder": str(folder), **prepare(Path(named), folder)}))
