"""Peak memory of one training step at a large vocabulary, through the head and with logits formed whole:

    python -m tests.step_memory                                    # V 49152, 8 x 1024 tokens, float32 and bfloat16
    python -m tests.step_memory --dtype float32 --vocab 151936

Each path takes one step of AdamW in a process of its own, on a llama of random weights. `plain` is what a loop without kdfast
writes: logits, `F.cross_entropy`. The others are kdfast's trainer: `DistillStep` with its head named or not, on hard labels and
on cached targets.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
PATHS = {
    "plain": "logits formed, F.cross_entropy on labels", "dense": "logits formed, supervised",
    "head": "through the head, supervised", "dense-kd": "logits formed, word_kd from a cache with k = 64",
    "head-kd": "through the head, word_kd from a cache with k = 64",
}  # fmt: skip
DTYPES = ("float32", "bfloat16")


def step(path: str, dtype: str, args: argparse.Namespace) -> None:
    """Takes the step; prints MiB at their peak before it and in it, and its seconds."""
    import torch
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from kdfast import TopKTargets
    from kdfast.models.shrink import cast_weights
    from kdfast.models.view import View
    from kdfast.train import Batch
    from kdfast.train.data import next_labels
    from kdfast.train.objective import Setting
    from kdfast.train.recipes.supervised import Supervised, SupervisedOptions
    from kdfast.train.recipes.word_kd import WordKD, WordKDOptions
    from kdfast.train.step import DistillStep
    from kdfast.train.tasks.causal_lm import CausalLM

    torch.manual_seed(0)
    heads = args.width // 64
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.width, intermediate_size=args.width * 8 // 3, num_hidden_layers=args.layers,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
    ))  # fmt: skip
    cast_weights(model, getattr(torch, dtype))
    task = CausalLM(None, CausalLM.Data())
    cache = SimpleNamespace(kind="topk", temperatures=(1.0,), vocab_size=args.vocab)  # what a recipe's cache says of itself
    setting = Setting(model, (SimpleNamespace(weight=1.0, info=cache),), task)
    objective = (
        WordKD(WordKDOptions(hard_weight=0.5), setting) if path.endswith("kd") else Supervised(SupervisedOptions(), setting)
    )
    wrapped = DistillStep(model, objective, task)
    if path.startswith("head"):
        wrapped.name_head()
        assert wrapped.head is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():  # the optimizer's state is there before the step, as in every step but the first
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    ids = torch.randint(args.vocab, (args.batch, args.length))
    batch, teachers = Batch(ids, next_labels(ids)), []
    if path.endswith("kd"):
        chosen = torch.arange(64, dtype=torch.int32).expand(args.batch, args.length, 64).contiguous()
        each = torch.full(chosen.shape, -6.0)
        rest = torch.zeros(args.batch, args.length, 1)
        log_tail = (1 - each.exp().sum(-1, keepdim=True)).log()
        teachers = [View(targets=TopKTargets(chosen, each, rest, log_tail, (1.0,), args.vocab))]
    before, began = _peak(), time.perf_counter()
    if path == "plain":
        logits = model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
        del logits
    else:
        loss, _ = wrapped(batch, teachers, batch.count())
    loss.backward()
    optimizer.step()
    print(json.dumps({"before": before, "peak": _peak(), "seconds": time.perf_counter() - began, "loss": float(loss.detach())}))


def measure(path: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `step` prints, of a process of its own."""
    sizes = [
        word for name in ("vocab", "batch", "length", "width", "layers") for word in (f"--{name}", str(getattr(args, name)))
    ]
    words = [sys.executable, "-m", "tests.step_memory", "--step", "--path", path, "--dtype", dtype, *sizes]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", choices=PATHS, action="append", help="may be repeated (default all)")
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="of the weights; may be repeated (default both)")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    if args.step:
        step(args.path[0], args.dtype[0], args)
        return
    rows = args.batch * args.length
    one = rows * args.vocab * 4 / 2**20
    print(f"one tensor of logits in float32: {rows} x {args.vocab} x 4 bytes = {one:.0f} MiB")
    for dtype in args.dtype or DTYPES:
        for path in args.path or PATHS:
            found = measure(path, dtype, args)
            extra = found["peak"] - found["before"]
            print(
                f"{dtype:8s}  {path:8s}  peak {found['peak']:7.0f} MiB, {extra:7.0f} above model and optimizer ="
                f" {extra / one:5.2f} tensors of logits; {found['seconds']:5.1f} s; loss {found['loss']:.4f}  ({PATHS[path]})",
                flush=True,
            )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
