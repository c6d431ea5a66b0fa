"""Multi30k English-German as `corpus/{train,validation,test}.jsonl`, and a joint BPE tokenizer of 8000 ids.

python prepare.py DATA [FOLDER]      DATA holds train.en, train.de, val.*, test_2016_flickr.*, gzipped or not

The files are those of the repository multi30k/dataset (folder data/task1/raw), 29000 pairs of captions.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

from kdfast.files import write_json, written
from kdfast.text.tokenizers import SEPARATOR, train_tokenizer

SPLITS = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
VOCABULARY = 8000


def lines(data: Path, name: str) -> list[str]:
    """The sentences of one side."""
    file = data / name if (data / name).is_file() else data / f"{name}.gz"
    if not file.is_file():
        raise SystemExit(f"{data}: expected {name} or {name}.gz of Multi30k, found neither")
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as text:
        return [line.strip() for line in text]


def prepare(data: Path, out: Path) -> dict[str, int]:
    """Writes the corpus; what is there already stays."""
    counts = {}
    out.mkdir(parents=True, exist_ok=True)
    for split, stem in SPLITS.items():
        pairs = list(zip(lines(data, f"{stem}.en"), lines(data, f"{stem}.de"), strict=True))
        counts[split] = len(pairs)
        with written(out / f"{split}.jsonl") as part:
            rows = (json.dumps({"source": source, "target": target}, ensure_ascii=False) for source, target in pairs)
            part.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    if not (out / "tokenizer.json").is_file():
        text = out / "text"
        text.write_text("\n".join(lines(data, "train.en") + lines(data, "train.de")), encoding="utf-8")
        tokenizer = train_tokenizer([text], VOCABULARY)
        text.unlink()
        with written(out / "tokenizer.json") as part:
            tokenizer.save(str(part))
        # One special token ends a sentence, starts the decoder and fills a batch.
        end = tokenizer.token_to_id(SEPARATOR)
        write_json(
            out / "generation_config.json", dict.fromkeys(("decoder_start_token_id", "eos_token_id", "pad_token_id"), end)
        )
    return counts


if __name__ == "__main__":
    named = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("KDFAST_DATA")
    if named is None:
        raise SystemExit("usage: python prepare.py DATA [FOLDER] (DATA, or KDFAST_DATA, holds Multi30k)")
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else "corpus")
    print(json.dumps({"corpus": str(folder), **prepare(Path(named), folder)}))
