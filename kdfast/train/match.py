"""Layers of two encoders side by side: embeddings, hidden states and attention scores, as TinyBERT compares them.

Source: Jiao et al. 2020 (TinyBERT), arXiv 1909.10351, equations 7 to 9.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast import attention_mse, hidden_mse
from kdfast.integrations.transformers import check_capturable
from kdfast.models.view import Needs, View
from kdfast.train.batch import Batch, tokens_of_rows

TERMS = ("embedding", "hidden", "attention")
FLAVORS = ("paper", "reference")


class LayerMatch(nn.Module):
    """The terms of a student and a teacher on one batch, each a mean over the tokens (pairs of tokens) that count:

        embedding = mse(h_s[0] @ W_e.T, h_t[0])
        hidden    = sum_m lambda_m * mse(h_s[m] @ W_h.T, h_t[g(m)])
        attention = sum_m lambda_m * mse(Q_s K_s^T / sqrt(d_s), Q_t K_t^T / sqrt(d_t))     # layers m and g(m), all heads

    h[0] is the embedding's output, h[m] what leaves layer m; scores are taken before mask and softmax. With another number of
    heads on both sides their greatest common divisor is compared (`attention_mse`'s relation heads).

    Args:
        student, teacher: models with a `transformers` config. key: what an error calls the layer map.
        layer_map: the teacher's layer g(m) for each of the student's layers 1, 2, ...; empty: evenly spaced, the last the last.
        layer_weights: lambda_m; empty: 1. terms: which of `TERMS` are formed.
        flavor: `paper`: W_e and W_h without bias, none where the widths are equal; they start as the matrix that puts a
            student's channels in the place of the teacher's first ones. Padding counts nowhere. `reference`, as the code that
            was published: one projection with bias for all, drawn at random; hidden states of padding count, and so do queries
            of padding; pairs with a key of padding are 0, and the mean is over all pairs. (It sets every score <= -100 to 0,
            which is how it finds padding; here a score of a real token keeps its value.)

    Raises:
        ValueError: a model that is no encoder or decoder, or a layer that is not there; one line.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, layer_map: Sequence[int] = (), layer_weights: Sequence[float] = (), *,
        flavor: str = "paper", terms: Collection[str] = TERMS, key: str = "method",
    ) -> None:  # fmt: skip
        super().__init__()
        depth, width = shape_of(student, "student")
        their_depth, their_width = shape_of(teacher, "teacher")
        self.layer_map = tuple(layer_map) or tuple(-(-m * their_depth // depth) for m in range(1, depth + 1))
        self._check_map(depth, their_depth, f"{key}.layer_map")
        if layer_weights and len(layer_weights) != depth:
            raise ValueError(
                f"{key}.layer_weights: expected a weight for each of the student's {depth} layers, got {len(layer_weights)}"
            )
        if layer_weights and (min(layer_weights) < 0 or not any(layer_weights)):
            given = ", ".join(map(str, layer_weights))
            raise ValueError(f"{key}.layer_weights: expected numbers >= 0, some of them above, got {given}")
        self.layer_weights = tuple(layer_weights) or (1.0,) * depth
        self.terms = tuple(term for term in TERMS if term in terms)
        if "attention" in self.terms:
            for name, model in (("student", student), ("teacher", teacher)):
                _check_attention(model, name, key)
        self.reference = flavor == "reference"
        self.widths = width, their_width
        projected = [term for term in ("embedding", "hidden") if term in self.terms]
        if self.reference:
            shared = nn.Linear(width, their_width)
            nn.init.normal_(shared.weight, std=0.02)
            nn.init.zeros_(shared.bias)
            self.projections = nn.ModuleDict({"all": shared} if projected else {})
        else:
            self.projections = nn.ModuleDict(
                {} if width == their_width else {term: leading(width, their_width) for term in projected}
            )

    def _check_map(self, depth: int, their_depth: int, key: str) -> None:
        if len(self.layer_map) != depth:
            raise ValueError(
                f"{key}: expected a layer of the teacher for each of the student's {depth} layers, got {len(self.layer_map)}"
            )
        wrong = [g for g in self.layer_map if not 1 <= g <= their_depth]
        if wrong:
            raise ValueError(f"{key}: expected layers of the teacher from 1 to {their_depth}, got {wrong[0]}")

    def share(self, others: Iterable[LayerMatch]) -> None:
        """Takes the projections of the last of `others` that has them: a later phase goes on with what an earlier one learned,
        whatever terms and layers weigh in it.
        """
        for other in others:
            if (other.reference, other.widths) == (self.reference, self.widths):
                self.projections.update(
                    {name: other.projections[name] for name in self.projections if name in other.projections}
                )

    def needs(self, of_teacher: bool) -> Needs:
        """What has to be seen of the teacher, or of the student."""
        numbers = self.layer_map if of_teacher else range(1, len(self.layer_map) + 1)
        states = ((0,) if "embedding" in self.terms else ()) + (tuple(numbers) if "hidden" in self.terms else ())
        attended = tuple(m - 1 for m in numbers) if "attention" in self.terms else ()
        return Needs(layers=tuple(sorted(set(states))), attention=tuple(sorted(set(attended))))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Of how many tokens and pairs of tokens the terms are means; causal or not, the attention says."""
        each = tokens_of_rows(batch)
        if self.reference and batch.attention_mask is not None:
            each = torch.full_like(each, batch.attention_mask.shape[1])
        pairs = each**2
        causal = pairs if self.reference else (pairs + each) // 2
        return {"tokens": each.sum(), "pairs": pairs.sum(), "causal_pairs": causal.sum()}

    def counted(self, term: str, student: View) -> str:
        """Which of `counts` a term is a mean over."""
        if term != "attention":
            return "tokens"
        return "causal_pairs" if next(iter(student.attention.values())).causal else "pairs"

    def projection(self, term: str) -> nn.Module | None:
        """From the student's width to the teacher's; None: as it is."""
        name = "all" if self.reference else term
        return self.projections[name] if name in self.projections else None  # noqa: SIM401

    def forward(
        self, student: View, teacher: View, mask: Tensor | None = None, row_weight: Tensor | None = None
    ) -> dict[str, Tensor]:  # fmt: skip
        """The terms by name.

        Args:
            mask: `[B, L]`, True: a token, not padding. None: no padding.
            row_weight: `[B]`: instead of the mean over the batch the sum over its rows of weight times the row's own mean.
        """
        found: dict[str, Tensor] = {}
        if "embedding" in self.terms:
            found["embedding"] = self._states("embedding", student.layers[0], teacher.layers[0], mask, row_weight)
        numbered = list(zip(range(1, len(self.layer_map) + 1), self.layer_map, self.layer_weights, strict=True))
        if "hidden" in self.terms:
            found["hidden"] = torch.stack([
                weight * self._states("hidden", student.layers[m], teacher.layers[g], mask, row_weight)
                for m, g, weight in numbered
            ]).sum()  # fmt: skip
        if "attention" in self.terms:
            found["attention"] = torch.stack([
                weight * self._scores(student.attention[m - 1], teacher.attention[g - 1], mask, row_weight)
                for m, g, weight in numbered
            ]).sum()  # fmt: skip
        return found

    def _states(self, term: str, h_s: Tensor, h_t: Tensor, mask: Tensor | None, row_weight: Tensor | None) -> Tensor:
        projection = self.projection(term)
        weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
        mask = None if self.reference else mask
        if row_weight is None:
            return hidden_mse(h_s, h_t, weight, bias, mask=mask)
        rows = hidden_mse(h_s, h_t, weight, bias, mask=mask, reduction="none").sum(1)
        return (row_weight * rows / (h_s.shape[1] if mask is None else mask.sum(1).clamp(min=1))).sum()

    def _scores(self, s: Any, t: Any, mask: Tensor | None, row_weight: Tensor | None) -> Tensor:
        # With other heads than the model's own its scale would not be theirs.
        scales = {"scale_s": s.scale, "scale_t": t.scale} if s.query.shape[1] == t.query.shape[1] else {}
        options = {"query_mask": None if self.reference else mask, "key_mask": mask, "causal": s.causal, **scales,
                   "normalize": "all" if self.reference else "valid"}  # fmt: skip
        if row_weight is None:
            return attention_mse(s.query, s.key, t.query, t.key, **options)
        heads = attention_mse(s.query, s.key, t.query, t.key, reduction="none", **options)
        return (row_weight * heads.mean(1)).sum()


def _check_attention(model: nn.Module, name: str, key: str) -> None:
    try:
        check_capturable(model)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('model: ')}; set {key}.attention_weight: 0") from None


def leading(width: int, their_width: int) -> nn.Linear:
    """A projection without bias that starts as the one which makes a student's channels the teacher's first ones."""
    made = nn.Linear(width, their_width, bias=False)
    nn.init.eye_(made.weight)
    return made


def shape_of(model: nn.Module, key: str) -> tuple[int, int]:
    """Layers and hidden size of an encoder or decoder.

    Raises:
        ValueError: its config does not say, or it is an encoder-decoder.
    """
    config = getattr(model, "config", None)
    depth, width = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if depth is None or width is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{key}: expected a transformers encoder or decoder, whose config has num_hidden_layers and hidden_size, got"
            f" {type(model).__name__}"
        )
    return int(depth), int(width)


def one_teacher(setting: Any, method: str) -> nn.Module:
    """The model of the one live teacher.

    Raises:
        ValueError: there are several, or it is a cache.
    """
    if len(setting.teachers) != 1:
        raise ValueError(f"teachers: method {method} expects one teacher, got {len(setting.teachers)}")
    if setting.teachers[0].info is not None:
        raise ValueError(f"teacher.cache: method {method} looks into the teacher's layers, expected teacher.path or function")
    model: nn.Module = setting.teachers[0].model
    return model


def token_mask(batch: Batch) -> Tensor | None:
    """`[B, L]`, False at padding; None where there is none."""
    return None if batch.attention_mask is None else batch.attention_mask.bool()
