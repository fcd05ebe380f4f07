"""Decides whether a result is wrong, rather than imprecise. A wrong result gets no speed."""

from __future__ import annotations

from fastpref.bench.problem import BETA

Errors = dict[str, float | None]
# Bounds of relative errors of gradients, and of root mean square errors of token log-probs in nats.
# Results from logits that are rounded to bf16 stay below them.
WRONG_GRADIENT = {"bf16": 0.05, "fp32": 1e-3}
WRONG_LOGP = {"bf16": 0.2, "fp32": 0.01}
_ROUNDED_LOSS = {"bf16": 0.02, "fp32": 1e-3}  # relative; some sides return it in their own dtype


def fault(
    measured: Errors,
    dtype: str,
    *,
    tokens: int,
    loss: float | None = None,
    tolerance: float | None = None,
) -> str | None:
    """One sentence on what is wrong with a result; None if nothing is.

    Args:
        measured: the errors against float64. NaN counts as wrong; None was not measured.
        dtype: "bf16" or "fp32".
        tokens: the number of tokens of a sequence.
        loss: the true loss, for a call that returns one.
        tolerance: the call's `gradient_tolerance`, which is an average over a block of tokens.
            Twice as much is allowed.
    """
    gradient = WRONG_GRADIENT[dtype] + 2 * (tolerance or 0.0)
    bounds = {
        "dhidden": gradient,
        "dweight": gradient,
        "logp_rms": WRONG_LOGP[dtype],
        "sum_max": WRONG_LOGP[dtype] * tokens,
    }
    if loss is not None:  # its error may be what the errors of a pair's log-probs cause
        of_sums = 2 * BETA * (measured.get("sum_max") or 0.0)
        bounds["loss"] = of_sums + _ROUNDED_LOSS[dtype] * (1 + abs(loss))
    for name, bound in bounds.items():
        error = measured.get(name)
        if error is not None and not error < bound:
            return f"{_NAMES[name]} by {error:.2g}, with a bound of {bound:.2g}"
    return None


_NAMES = {
    "dhidden": "the gradient of the hidden states is off",
    "dweight": "the gradient of the head is off",
    "logp_rms": "token log-probs are off",
    "sum_max": "a sequence's log-prob is off",
    "loss": "the loss is off",
}
