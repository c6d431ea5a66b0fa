"""How long an input a model has position embeddings for."""

from __future__ import annotations

import re

from torch import nn

#: What `transformers` calls a table of positions.
_TABLES = re.compile(r"(^|\.)(wpe|embed_positions?|position_embeddings?|positions_embed)$")


def positions_of(model: nn.Module) -> int | None:
    """Tokens of the longest input for which a `transformers` model has position embeddings.

    None where it needs no table of them: positions are rotated, relative or computed, or it is another module. An input longer
    than a table is an index error on a CPU, and on a GPU the end of the process.
    """
    if getattr(model, "config", None) is None:
        return None
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or not _TABLES.search(name) or "vision" in name:
            continue
        # BART and OPT begin at an offset, RoBERTa behind the number of its padding.
        before = getattr(module, "offset", None)
        if before is None:
            before = 0 if module.padding_idx is None else module.padding_idx + 1
        found.append(module.num_embeddings - before)
    return min(found, default=None)
