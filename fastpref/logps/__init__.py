"""Log-probabilities of tokens and sequences, with their gradients, without the logits."""

from fastpref.logps.linear import (  # noqa: F401
    CompiledLogps,
    PreparedLogps,
    TokenStats,
    adjacent_head,
    compact,
    linear_token_logps,
    plan_call,
    prepare,
    scatter,
    token_logps,
)
