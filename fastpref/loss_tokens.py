"""Earlier path of `fastpref.losses.tokens`."""

from fastpref.losses.tokens import ld_sequence_logps, ld_weights, nll_tokens, wpo_weights

__all__ = ["ld_sequence_logps", "ld_weights", "nll_tokens", "wpo_weights"]
