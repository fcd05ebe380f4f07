"""Token-wise parts of losses, which are in `fastpref.losses.tokens`; a name of earlier versions."""

from fastpref.losses.tokens import ld_sequence_logps, ld_weights, nll_tokens, wpo_weights

__all__ = ["ld_sequence_logps", "ld_weights", "nll_tokens", "wpo_weights"]
