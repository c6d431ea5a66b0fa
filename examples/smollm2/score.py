"""Models on held-out text, by plain transformers: perplexity, top-1 accuracy, and how often they say what the teacher says.

python examples/smollm2/score.py TEACHER RUN ... [--data FOLDER] [--sequences 256] [--sequence-length 256]
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


def rows(folder: Path, tokenizer, sequences: int, length: int) -> list[torch.Tensor]:
    """As many rows of every file as the share of its length allows: no file fills them all."""
    pieces = [
        torch.tensor(ids)
        for file in sorted(folder.rglob("*.txt"))
        for ids in [tokenizer(file.read_text("utf-8", "replace"), add_special_tokens=False)["input_ids"]]
    ]
    whole = [piece for document in pieces for piece in document.split(length) if len(piece) == length]
    step = max(len(whole) // sequences, 1)
    return whole[::step][:sequences]


@torch.inference_mode()
def says(model, batch: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Summed loss of the next tokens, and the likeliest one at each place."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
    return loss.item(), logits.argmax(-1)


def mean_and_range(values: list[float], digits: int) -> str:
    """Mean, and the lowest and the highest where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("teacher")
    p.add_argument("models", nargs="*", help="folders of runs, NAME-seedN; those of a name are a line of the table")
    p.add_argument("--data", type=Path, default=Path("runs/smollm2/text/test"))
    p.add_argument("--sequences", type=int, default=256)
    p.add_argument("--sequence-length", type=int, default=256)
    args = p.parse_args()
    batches = list(
        torch.stack(rows(args.data, AutoTokenizer.from_pretrained(args.teacher), args.sequences, args.sequence_length)).split(8)
    )
    tokens = sum(b[:, 1:].numel() for b in batches)
    answers: list[torch.Tensor] = []
    found: dict[str, list[tuple[float, float, float]]] = {}
    sizes = {}
    for folder in [args.teacher, *(str(Path(run) / "model") for run in args.models)]:
        name = "teacher" if folder == args.teacher else re.sub(r"-seed\d+$", "", Path(folder).parent.name)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        loss, right, agree = 0.0, 0, 0
        for i, batch in enumerate(tqdm(batches, desc=folder, leave=False)):
            part, said = says(model, batch)
            if name == "teacher":
                answers.append(said)
            loss += part
            right += int((said == batch[:, 1:]).sum())
            agree += int((said == answers[i]).sum())
        found.setdefault(name, []).append((math.exp(loss / tokens), 100 * right / tokens, 100 * agree / tokens))
        sizes[name] = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{tokens:,} tokens of {args.data}; mean (lowest to highest)\n")
    print("| | parameters | perplexity | top-1 % | says what the teacher says % |\n|---|---|---|---|---|")
    for name, scores in found.items():
        columns = [mean_and_range(list(column), 1) for column in zip(*scores, strict=True)]
        print(f"| {name}, {len(scores)} | {sizes[name]:.1f} M | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
