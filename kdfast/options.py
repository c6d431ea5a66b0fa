"""The options every row-wise distillation loss shares, as one frozen value.

They travel through every floor as `RowOptions`; the `torch.library` schemas are written from its fields, so
a new option is a new field here and nothing else has to be kept in step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from typing_extensions import Self

_SCHEMA_TYPE = {"float": "float", "int": "int", "bool": "bool", "str": "str", "tuple[float, ...]": "float[]"}

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha_beta")
#: How several teachers become one distribution: the weighted mean of their tempered probabilities, or of their logits.
TEACHER_MIXES = ("probs", "logits")
#: Columns of the per-row metrics a kernel fills when asked for parts, in this order.
PARTS = ("soft", "hard", "z", "kl_at_1", "teacher_nll", "teacher_entropy", "top1_agreement", "student_entropy")


def other_parts(extension: ModuleType) -> str | None:
    """How the columns of the per-row metrics that a compiled extension fills differ from `PARTS`; None: they are these."""
    found = tuple(getattr(extension, "parts", ()))
    return None if found == PARTS else f"it fills {', '.join(found) or 'metrics without names'}, not {', '.join(PARTS)}"


class _OpOptions:
    """What options of a `torch.library` op share; a frozen dataclass."""

    @classmethod
    def schema(cls) -> str:
        """The fields as `torch.library` schema arguments."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return ", ".join(f"{_SCHEMA_TYPE[str(f.type)]} {f.name}" for f in fields)

    @property
    def values(self) -> tuple[Any, ...]:
        """The fields in schema order, to pass to an op; `of` is the way back."""
        return tuple([getattr(self, name) for name in self.__dataclass_fields__])  # type: ignore[attr-defined]

    @classmethod
    def of(cls, values: Sequence[Any]) -> Self:
        """From what an op was given: it hands its `float[]` arguments over as lists, which Triton's binder refuses and no cache
        can hash."""
        return cls(*(tuple(value) if isinstance(value, list) else value for value in values))


@dataclass(frozen=True)
class Head:
    """What a model does between its linear head and its softmax: z = softcap * tanh(scale * x / softcap).

    Args:
        softcap: bound of the logits; None: no cap, z = scale * x.
        scale: factor of the head's output. A model that scales after the cap, z = s * c * tanh(x / c), is
            Head(softcap=s * c, scale=s).
    """

    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class RowOptions(_OpOptions):
    """loss of a row = soft_weight * T^2 * D(p_T, q_T) + hard_weight * CE(q_1, label) + z_loss * lse(student)^2.

    p is the teacher, q the student. A softcap of 0 is no cap. A term of weight 0 is no term, infinite or not (`weighted`).
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    soft_weight: float = 1.0
    hard_weight: float = 0.0
    scale_by_t2: bool = True
    ignore_index: int = -100
    beta: float = 0.5
    skew: float = 0.1
    ab_alpha: float = 1.0
    ab_beta: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    student_softcap: float = 0.0
    student_scale: float = 1.0
    teacher_softcap: float = 0.0
    teacher_scale: float = 1.0
    teacher_weights: tuple[float, ...] = (1.0,)
    teacher_mix: str = "probs"

    @property
    def soft_scale(self) -> float:
        """What the divergence at temperature T is multiplied by."""
        return self.soft_weight * (self.temperature**2 if self.scale_by_t2 else 1.0)

    @property
    def kind(self) -> str:
        """The divergence to compute: the end points of a family that are forward or reverse KL go by those names."""
        match self.divergence:
            case "jsd" if self.beta in (0, 1):
                return "forward_kl" if self.beta == 0 else "reverse_kl"
            case "skew_forward_kl" | "skew_reverse_kl" if self.skew == 0:
                return self.divergence.removeprefix("skew_")
            case "alpha_beta" if (self.ab_alpha, self.ab_beta) in ((1, 0), (0, 1)):
                return "forward_kl" if self.ab_alpha == 1 else "reverse_kl"
        return self.divergence

    @property
    def coefficients(self) -> tuple[float, float]:
        """The two numbers a divergence is parametrised by.

        (alpha, beta) for alpha_beta. For those that compare with a mixture M = w*p + (1-w)*q: (w, the weight of q in M).
        """
        match self.kind:
            case "alpha_beta":
                return self.ab_alpha, self.ab_beta
            case "jsd":
                return self.beta, 1 - self.beta
            case "skew_forward_kl":
                return self.skew, 1 - self.skew
            case "skew_reverse_kl":
                return 1 - self.skew, self.skew
        return 0.0, 0.0

    @property
    def heads(self) -> bool:
        """Whether any logit is capped or scaled."""
        return (self.student_softcap, self.teacher_softcap, self.student_scale, self.teacher_scale) != (0, 0, 1, 1)


def weighted(weight: float, term: Any) -> Any:
    """weight * term of a row loss; without weight no term even if it is infinite, but a NaN stays and names a bad row."""
    return weight * (term if weight != 0 else term.nan_to_num(math.nan, 0.0, 0.0))


#: How far the probabilities of a sparse target, tail included, may be from 1 together: rounding, not another unit.
MASS_ERROR = 0.01

#: Bytes after the last row of encoded targets that belong to no row, so that whole words may be read.
CODEC_SLACK = 64


@dataclass(frozen=True)
class CodecLayout(_OpOptions):
    """What is the same for every row of a teacher cache; one of the temperatures is 1.

    With `samples` (draws a row) entries have draw counts: kind `mixed` has exact ones too, with 0 draws.
    """

    k: int
    vocab_size: int
    temperatures: tuple[float, ...]
    samples: int = 0
    mixed: bool = False
    sample_temperature: float = 1.0

    @property
    def sample_column(self) -> int:
        """Place of the temperature that was drawn at; 0 where nothing was drawn."""
        return self.temperatures.index(self.sample_temperature) if self.samples else 0

    @property
    def native(self) -> tuple[Any, ...]:
        """What the C++ codec takes."""
        return self.k, self.vocab_size, list(self.temperatures), self.samples, self.mixed, self.sample_column


#: What `AttentionOptions.kind` may be; kernels know one by its place here.
ATTENTION_KINDS = ("scores", "probs", "kl")


@dataclass(frozen=True)
class AttentionOptions(_OpOptions):
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
