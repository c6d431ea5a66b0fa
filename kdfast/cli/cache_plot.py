"""What a cache looks like: how much mass k entries hold, where the bytes go, and the KL error of single tokens."""

from __future__ import annotations

import numpy as np

from kdfast.cache import CacheReader
from kdfast.cache.format import KL_EDGES

_SAMPLE_TOKENS = 50_000


def plot(path: str, target: str) -> None:
    """Draws three panels to an image file (its ending names the kind).

    Raises:
        CacheError: the cache is unfinished. CorruptCache: a sampled record is not what was written.
        ValueError: the ending is none that matplotlib draws.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reader = CacheReader(path)
    info, (mass, sections) = reader.info, _sample(reader)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    left.plot(np.arange(1, len(mass) + 1), mass)
    left.set(xlabel="entries", ylabel="mean probability mass at T = 1", title="mass over k", ylim=(0, 1.02))
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    bars = middle.barh(list(sections), list(sections.values()))
    middle.bar_label(bars, fmt="%.1f", padding=3)
    middle.set(xlabel="bytes a token", title=f"{info.bytes_per_token:.1f} bytes a token, {info.tokens:,} tokens")
    middle.margins(x=0.15)
    edges = np.concatenate([[KL_EDGES[0] / 10**0.25], KL_EDGES, [KL_EDGES[-1] * 10**0.25]])
    right.stairs(np.array(info.kl_histogram), edges, fill=True)
    right.axvline(info.kl_mean, color="black", linestyle="--", label=f"mean {info.kl_mean:.2g}")
    right.set(xscale="log", xlabel="KL(exact || decoded), nats", ylabel="tokens", title=f"KL error, largest {info.kl_max:.2g}")
    right.legend()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def _sample(reader: CacheReader) -> tuple[np.ndarray, dict[str, float]]:
    """Mean mass of the j likeliest entries, and bytes a token by section, over evenly spread records."""
    records = max(1, min(len(reader), _SAMPLE_TOKENS * len(reader) // max(reader.info.tokens, 1)))
    mass, sizes, tokens = np.zeros(reader.settings.k), np.zeros(3), 0
    for i in np.linspace(0, max(len(reader) - 1, 0), records).astype(int) if len(reader) else ():
        targets = reader[int(i)].targets
        mass += np.sort(np.exp(targets.logprobs.numpy().astype(np.float64)), -1)[:, ::-1].cumsum(-1).sum(0)
        sizes += reader.section_bytes(int(i))
        tokens += len(targets.ids)
    ids, values, rest = sizes / max(tokens, 1)
    total = reader.info.bytes_per_token
    sections = {"ids": ids, "values": values, "input ids, tails, heads": rest, "index, keys": total - ids - values - rest}
    return mass / max(tokens, 1), sections
