"""Makes `corpus/train`, `corpus/validation` and `corpus/tokenizer.json` from Python's standard library.

python prepare.py [FOLDER]
"""

import shutil
import sys
import sysconfig
from pathlib import Path

from kdfast.text.files import list_files, split_files
from kdfast.text.tokenizers import train_tokenizer

EXCLUDE = ("test", "tests", "idlelib", "site-packages", "dist-packages", "pydoc_data", "encodings", "lib2to3")

out = Path(sys.argv[1] if len(sys.argv) > 1 else "corpus")
names = {path: name for name, path in list_files([sysconfig.get_path("stdlib")], "**/*.py", EXCLUDE)}
validation, train = split_files([(name, path) for path, name in names.items()], [0.08], seed=0)
for split, files in (("train", train), ("validation", validation)):
    (out / split).mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, out / split / names[file].replace("/", "."))
train_tokenizer(train, 4096).save(str(out / "tokenizer.json"))
print(f"{out}: {len(train)} files to train on, {len(validation)} to validate on, tokenizer.json with 4096 ids")
