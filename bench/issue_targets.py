"""What every kind of call is meant to come to, what the model says of it, and what forbids it where it does not.

A call through heads is products at the rate that they were measured at, row kernels by their counts, and passes over what is
summed; attention is products, instructions and special functions of its tiles; small calls are launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import issue_model as model
from .issue_counts import Count
from .issue_model import H100, H200, Card, Outcome, Row

_CARDS = (H100, H200)
#: (op, dtype, shape) in the committed measurements.
_LINEAR = ("linear", "bfloat16", "N=8192 V=128256 Ds=2048 Dt=4096")
_HIDDEN = ("hidden_projected", "bfloat16", "N=32768 Ds=2048 Dt=4096")
_ATTENTION = "B=2 H=4 L=4096 D=64"
_N, _V, _DS, _DT = 8192, 128256, 2048, 4096
_SCORES = 2 * 4 * 4096**2


@dataclass(frozen=True)
class Target:
    """A call, what it is meant to come to in `unit`, how it was, and what the model says on a card (None: nothing)."""

    name: str
    reach: float
    unit: str
    before: str
    outcome: Callable[[Card], Outcome] | None
    remark: str = ""

    def cells(self) -> list[str]:
        meant = f"{self.reach:g} {self.unit}"
        if self.outcome is None:
            return [f"`{self.name}`", meant, self.before, "", "", self.remark]
        found = {card.name: self.outcome(card) for card in _CARDS}
        ranges = [" - ".join(dict.fromkeys((f"{o.worst:.2f}", f"{o.best:.2f}"))) for o in found.values()]
        said = {name: o.verdict(self.reach) for name, o in found.items()}
        same = len(set(said.values())) == 1
        verdict = next(iter(said.values())) if same else "; ".join(f"{name}: {text}" for name, text in said.items())
        remark = f". {self.remark}" if self.remark else ""
        return [f"`{self.name}`", meant, self.before, *ranges, verdict + remark]


def _share(card: Card, moved: float, ms: float) -> float:
    return moved / card.bandwidth * 1e3 / ms


def targets(rows: list[Row], now: dict[str, Count], first: dict[str, Count]) -> Iterator[Target]:
    """In the order of the aims."""
    by_name = {row.name: row for row in rows}
    for row in rows:
        if row.reach and row.name.startswith("kd_loss"):
            yield _row_target(row, now, first)
    yield Target(
        "kd_loss bf16 T=2 4096 x 128256, cluster kernel", 0.88, "of the bytes", "not measured", None,
        "not counted: unproven. A row stays in distributed shared memory, so that bytes alone allow 1",
    )  # fmt: skip
    for logits, reach in (("fp32", 0.80), ("bf16", 0.85)):
        yield _linear(logits, reach, by_name, now, first)
    for row in rows:
        if row.reach and not row.name.startswith("kd_loss"):
            yield _row_target(row, now, first)
    yield _attention_scores(now, first)
    for kind in ("probs", "kl"):
        yield _attention(kind, now, first)
    yield _hidden()
    yield from _float16(by_name, now, first)


def _row_target(row: Row, now: dict[str, Count], first: dict[str, Count]) -> Target:
    was = model.measured().get(row.measured)
    if was:
        text = f"{_share(H200, row.moved, was):.2f} (measured)"
    elif row.name in first:
        low, high = model.before(row, first[row.name], H200)
        text = f"{_share(H200, row.moved, high):.2f} - {_share(H200, row.moved, low):.2f} (predicted)"
    else:
        text = ""
    remark = "Its second look at some lanes and the sorting are not counted" if row.name.startswith("topk_targets") else ""
    return Target(row.name, row.reach, "of the bytes", text, lambda card: model.row_outcome(row, now[row.name], card), remark)


def linear_flops() -> float:
    return 2.0 * _N * _V * (3 * _DS + _DT)


def product_share() -> float:
    """Of a card's product rate what the four products of `linear` reach alone."""
    alone = model.measured("four GEMMs alone")[_LINEAR]
    return linear_flops() / H200.products * 1e3 / alone


def _sum_ms(card: Card) -> float:
    """The float32 sum of the weight's gradient in two batches: written, read and added to, read and rounded."""
    return (4 + 8 + 4 + 2 - 2) * _V * _DS / card.bandwidth * 1e3  # the last: the products alone write halves as well


def linear_times(card: Card, rows_ms: float) -> dict[str, float]:
    return {
        "products": linear_flops() / card.products * 1e3 / product_share(),
        "rows": rows_ms, "sum of the weight's gradient": _sum_ms(card),
    }  # fmt: skip


def _linear(logits: str, reach: float, rows: dict[str, Row], now: dict[str, Count], first: dict[str, Count]) -> Target:
    row = rows[f"linear rows {logits} {_N} x {_V} T=2"]
    floor = {card.name: linear_flops() / card.products * 1e3 for card in _CARDS}

    def outcome(card: Card) -> Outcome:
        best, worst = (sum(linear_times(card, ms).values()) for ms in model.predicted(row, now[row.name], card))
        times = linear_times(card, model.predicted(row, now[row.name], card)[1])
        once = model.bytes_ms(row, 1, card)
        return Outcome(
            floor[card.name] / worst, floor[card.name] / best, floor[card.name] / (times["products"] + once),
            f"{times['products']:.1f} ms that the four products take alone + {once:.1f} for each logit once through memory, "
            f"floor {floor[card.name]:.1f}",
            "L2 keeps more than half of its size between two passes",
            " + ".join(f"{ms:.1f} ms {name}" for name, ms in times.items()) + f", floor {floor[card.name]:.1f}",
        )  # fmt: skip

    was = model.measured().get(_LINEAR) if logits == "fp32" else None
    text = f"{floor['H200'] / was:.2f} (measured)" if was else "did not exist"
    return Target(
        f"linear_kd_loss bf16, {logits} logits, {_N} x ({_DS}, {_DT}) x {_V}", reach, "of the products", text, outcome
    )


def linear_before(first: dict[str, Count], rows: list[Row]) -> tuple[float, float]:
    """Milliseconds on an H200 of the kernels that were measured."""
    row = next(r for r in rows if r.name == f"linear rows fp32 {_N} x {_V} T=2")
    low, high = (sum(linear_times(H200, ms).values()) for ms in model.before(row, first[row.name], H200))
    return low, high


def attention_times(found: Count, card: Card) -> tuple[float, float]:
    """Milliseconds (products, instructions and special functions overlap; products and the slower of those do not)."""
    parts = model.work(_SCORES, found, card)
    pipes = max(parts[name] for name in ("issue", "alu", "special"))
    return max(parts["products"], pipes), parts["products"] + pipes


def eager(kind: str) -> float:
    """Milliseconds of the faster spelling in plain PyTorch, measured."""
    key = (f"attention_{kind}", "bfloat16", _ATTENTION)
    return min(model.measured(name)[key] for name in ("PyTorch, materialised", "PyTorch, scaled queries"))


def _attention(kind: str, now: dict[str, Count], first: dict[str, Count]) -> Target:
    name = f"attention_{kind} bf16 {_ATTENTION}"
    plain = eager(kind)
    was = plain / model.measured()[f"attention_{kind}", "bfloat16", _ATTENTION]

    def outcome(card: Card) -> Outcome:
        best, worst = attention_times(now[name], card)
        parts = model.work(_SCORES, now[name], card)
        said = ", ".join(f"{key} {ms:.2f} ms" for key, ms in parts.items())
        return Outcome(plain / worst, plain / best, lacking="products and arithmetic overlap", largest=said)

    return Target(name, 3.0, "times eager", f"{was:.2f} (measured)", outcome, f"Eager {plain:.2f} ms, measured on the H200")


def launch_ms(first: dict[str, Count]) -> float:
    """Milliseconds of a launch from the host: the short call that was measured, by its launches then."""
    short = model.measured()["attention_scores", "bfloat16", "B=2 H=4 L=1024 D=64"]
    return short / first[f"attention_scores bf16 {_ATTENTION}"].loops


def _attention_scores(now: dict[str, Count], first: dict[str, Count]) -> Target:
    name, plain = f"attention_scores bf16 {_ATTENTION}", eager("scores")
    at = {n: model.measured()["attention_scores", "bfloat16", f"B=2 H=4 L={n} D=64"] for n in (1024, 4096)}
    device = at[4096] - at[1024]

    def outcome(card: Card) -> Outcome:
        host = now[name].loops * launch_ms(first)
        said = f"{now[name].loops} launches from the host {host:.2f} ms, the device {device:.2f} at most beside them"
        best, worst = plain / max(host, device), plain / (host + device)
        return Outcome(worst, best, largest=said, lacking="the device works beside the host")

    remark = (
        f"Eager {plain:.2f} ms; {1e3 * launch_ms(first):.1f} us a launch, as {first[name].loops} launches took"
        f" {at[1024]:.2f} ms at L=1024"
    )
    return Target(name, 8.0, "times eager", f"{plain / at[4096]:.2f} (measured)", outcome, remark)


def _hidden() -> Target:
    n = 32768
    flops = 6.0 * n * _DS * _DT
    floor = {card.name: flops / card.products * 1e3 for card in _CARDS}

    def outcome(card: Card) -> Outcome:
        products = floor[card.name] / product_share()
        rows = 4 * n * _DT / card.bandwidth * 1e3  # the teacher's states read, the gradient written
        spilled = 8 * n * _DT / card.bandwidth * 1e3  # projected states written and read, where L2 does not keep them
        clean = 4 * n * _DS / card.bandwidth * 1e3
        limit = floor[card.name] / (products + rows)
        said = (
            f"{products:.2f} ms of products at the {product_share():.2f} of the rate that those of `linear` reach alone"
            f" + {rows:.2f} ms for the teacher and the gradient, floor {floor[card.name]:.2f}"
        )
        best, worst = (floor[card.name] / (products + rows + clean + more) for more in (0.0, spilled))
        return Outcome(worst, best, limit, said, "L2 keeps the projected states")

    was = floor["H200"] / model.measured()[_HIDDEN]
    return Target(f"hidden_mse projected bf16 {n} x ({_DS}, {_DT})", 0.85, "of the products", f"{was:.2f} (measured)", outcome)


def _float16(rows: dict[str, Row], now: dict[str, Count], first: dict[str, Count]) -> Iterator[Target]:
    """As fast as bfloat16 heads within 15%: their time over that of float16."""
    row = rows[f"linear rows fp32 {_N} x {_V} T=2"]
    simt = 51.21e12  # float32 products, measured on the H200
    gradients = 2.0 * _N * _V * 2 * _DS

    def outcome(slower: float, more: float) -> Callable[[Card], Outcome]:
        def of(card: Card) -> Outcome:
            ms = linear_times(card, model.predicted(row, now[row.name], card)[1])
            half = sum(ms.values())
            # One pass more over the float32 sum, for the unit of its rows.
            float16 = half + (slower - 1) * gradients / card.products * 1e3 / product_share() + more / card.bandwidth * 1e3
            forbids = (
                f"TF32 has half the rate of halves, and two of four products are in it: {half:.1f} ms become {float16:.1f}"
            )
            return Outcome(half / float16, half / float16, half / float16 if slower > 1 else 1.0, forbids)

        return of

    was = sum(linear_times(H200, model.before(row, first[row.name], H200)[1]).values())
    then = was - gradients / H200.products * 1e3 / product_share() + gradients / simt * 1e3
    text = f"{was / then:.2f} (predicted)"
    yield Target("linear_kd_loss float16, bounded losses", 0.87, "of bfloat16", text, outcome(1, 8 * _V * _DS),
                 "Forward KL, JSD, skewed KL, TVD, with hard labels and a z-loss up to 4e-4")  # fmt: skip
    yield Target("linear_kd_loss float16, reverse KL, alpha-beta", 0.87, "of bfloat16", text, outcome(2, 0.0))
