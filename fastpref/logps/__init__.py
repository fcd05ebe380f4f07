"""Log-probabilities of tokens and sequences, with their gradients, without the logits."""

from __future__ import annotations

from fastpref.logps.columns import GradientReport, last_gradient_report
from fastpref.logps.forward import TokenStats
from fastpref.logps.linear import linear_token_logps
from fastpref.logps.logits import token_logps
from fastpref.logps.plan import HeadPlan, plan_head
from fastpref.logps.sequences import sequence_logps
from fastpref.logps.vocab_parallel import VocabParallelWeight

__all__ = [
    "GradientReport",
    "HeadPlan",
    "TokenStats",
    "VocabParallelWeight",
    "last_gradient_report",
    "linear_token_logps",
    "plan_head",
    "sequence_logps",
    "token_logps",
]
