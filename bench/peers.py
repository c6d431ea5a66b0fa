"""Whom kdfast is compared with, by the kind of case they run on. All imported from installed packages, none pasted."""

from __future__ import annotations

from .peer import Peer, Run, agree, differs, trained
from .peers_linear import FourGemms, linear_peers
from .peers_logits import (
    SPELLINGS,
    Plain,
    divergence_peers,
    eager_log_target,
    eager_probs,
    eager_probs_of_logs,
    logits_peers,
)
from .peers_topk import capture_peers, topk_peers

__all__ = [
    "SPELLINGS", "FourGemms", "Peer", "Plain", "Run", "agree", "capture_peers", "differs", "divergence_peers",
    "eager_log_target", "eager_probs", "eager_probs_of_logs", "linear_peers", "logits_peers", "topk_peers", "trained",
]  # fmt: skip
