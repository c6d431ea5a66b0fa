"""The options every row-wise distillation loss shares, as one frozen value.

They travel through every floor as `RowOptions`; the `torch.library` schemas are written from its fields, so
a new option is a new field here and nothing else has to be kept in step.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

_SCHEMA_TYPE = {"float": "float", "int": "int", "bool": "bool", "str": "str"}

#: Columns of the per-row metrics a kernel fills when asked for parts, in this order.
PARTS = ("soft", "hard", "kl_at_1", "teacher_nll", "teacher_entropy", "top1_agreement")


@dataclass(frozen=True)
class RowOptions:
    """loss of a row = soft_weight * T^2 * KL(p_T || q_T) + hard_weight * CE(q_1, label)."""

    temperature: float = 1.0
    soft_weight: float = 1.0
    hard_weight: float = 0.0
    scale_by_t2: bool = True
    ignore_index: int = -100

    @property
    def soft_scale(self) -> float:
        """What the divergence at temperature T is multiplied by."""
        return self.soft_weight * (self.temperature**2 if self.scale_by_t2 else 1.0)

    @classmethod
    def schema(cls) -> str:
        """The fields as `torch.library` schema arguments."""
        return ", ".join(f"{_SCHEMA_TYPE[str(f.type)]} {f.name}" for f in dataclasses.fields(cls))

    @property
    def values(self) -> tuple[float | int | bool, ...]:
        """The fields in schema order, to pass to an op; `RowOptions(*values)` is the way back."""
        return (self.temperature, self.soft_weight, self.hard_weight, self.scale_by_t2, self.ignore_index)


@dataclass(frozen=True)
class AttentionOptions:
    """How two attention maps are compared.

    kind: "scores" squared differences of scores, "probs" of probabilities, "kl" KL(teacher || student) of a query's row.
    scale_s, scale_t: what each side's query-key products are multiplied by. causal: query i sees keys j <= i.
    method: "gram", "tiled" or "auto"; only "scores" has a choice.
    """

    kind: str = "scores"
    scale_s: float = 1.0
    scale_t: float = 1.0
    causal: bool = False
    method: str = "auto"

    @classmethod
    def schema(cls) -> str:
        """The fields as `torch.library` schema arguments."""
        return ", ".join(f"{_SCHEMA_TYPE[str(f.type)]} {f.name}" for f in dataclasses.fields(cls))

    @property
    def values(self) -> tuple[str | float | bool, ...]:
        """The fields in schema order, to pass to an op; `AttentionOptions(*values)` is the way back."""
        return self.kind, self.scale_s, self.scale_t, self.causal, self.method
