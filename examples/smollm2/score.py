"""Models on held-out text, by plain transformers: perplexity, top-1 accuracy, and how often they say what the teacher says.

python examples/smollm2/score.py TEACHER MODEL ... [--data FOLDER] [--sequences 256] [--sequence-length 256]
"""

from __future__ import annotations

import argparse
import math
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


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("teacher")
    p.add_argument("models", nargs="*")
    p.add_argument("--data", type=Path, default=Path("runs/smollm2/text/test"))
    p.add_argument("--sequences", type=int, default=256)
    p.add_argument("--sequence-length", type=int, default=256)
    args = p.parse_args()
    batches = list(
        torch.stack(rows(args.data, AutoTokenizer.from_pretrained(args.teacher), args.sequences, args.sequence_length)).split(8)
    )
    tokens = sum(b[:, 1:].numel() for b in batches)
    answers: list[torch.Tensor] = []
    for folder in [args.teacher, *args.models]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        loss, right, agree, first = 0.0, 0, 0, folder == args.teacher
        for i, batch in enumerate(tqdm(batches, desc=folder, leave=False)):
            part, said = says(model, batch)
            if first:
                answers.append(said)
            loss += part
            right += int((said == batch[:, 1:]).sum())
            agree += int((said == answers[i]).sum())
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f"{folder}: perplexity {math.exp(loss / tokens):.2f}, top-1 {100 * right / tokens:.1f}%, agrees with the teacher"
            f" {100 * agree / tokens:.1f}% ({size:.1f} M parameters, {tokens} tokens)",
            flush=True,
        )


if __name__ == "__main__":
    main()
