"""The probe of the first step, at which a policy that starts as its reference has no rewards."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from fastpref.trainer.alarms import raise_alarm

TOLERANCE = 1e-3  # of rewards and margins
ROUNDING_16_BIT = 0.5  # nats an answer, where a 16-bit pass was done in other batches
SMALL = 0.05  # nats a token: so much another dtype explains, and no other text


def tolerance(source: str, beta: float, half: bool) -> float:
    """How far rewards may be from 0 where policy and reference are the same model.

    Arguments as in `StepZeroProbe`.
    """
    return max(TOLERANCE, ROUNDING_16_BIT * beta) if half and source != "step" else TOLERANCE


class StepZeroProbe(TrainerCallback):
    """Warns once if the policy's log-probs differ from the reference's before any weight moved.

    The metrics of the first optimiser step are read on its end, which synchronises once in a run.
    The rewards are beta times the log-ratios, so that all of them are 0 where the two agree.

    Args:
        window: the `MetricWindow` of the trainer.
        source: where the reference's log-probs come from: "columns", "ahead" or "step".
        beta: of the loss.
        half: whether the models compute in 16 bits.
        noise: the NEFTune noise of the embeddings, or None.
    """

    def __init__(
        self, window: Any, source: str, beta: float, half: bool, noise: float | None
    ) -> None:
        self.window, self.source, self.beta, self.noise = window, source, beta, noise
        self.tolerance = tolerance(source, beta, half)
        self._noisy: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._noisy = None

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0 and model is not None:
            self._noisy = noise_of(model, self.noise)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 1 or not state.is_world_process_zero or not self.window.pending:
            return
        total = sum(step.sums.double() for step in self.window.pending).tolist()
        sums = dict(zip(self.window.names, total, strict=True))
        rewards, tokens = [], 0.0
        for side in ("chosen", "rejected"):
            answers = sums.get("pairs", 0.0) or sums.get(f"answers/{side}", 0.0)
            if answers:
                rewards.append(sums[f"rewards/{side}"] / answers)
                tokens = max(tokens, sums[f"tokens/{side}"] / answers)
        largest = max(map(abs, rewards), default=0.0)
        if len(rewards) == 2:
            largest = max(largest, abs(rewards[0] - rewards[1]))
        if largest >= self.tolerance:
            per_token = largest / self.beta / max(tokens, 1.0) if self.beta else largest
            cause = likely_cause(self.source, per_token, self._noisy)
            raise_alarm(
                "step_zero",
                f"the first step has rewards of {', '.join(f'{r:.4f}' for r in rewards)} (chosen, "
                "rejected) before any weight moved, where a policy that starts as its reference "
                f"has 0: {cause}",
                args,
            )


def likely_cause(source: str, per_token: float, noisy: str | None = None) -> str:
    """Why a policy's log-probs probably differ from its reference's, for people.

    Args:
        source: where the reference's log-probs come from: "columns", "ahead" or "step".
        per_token: the log-ratio in nats a token.
        noisy: what makes the policy random, if anything does.
    """
    if noisy is not None:
        return f"{noisy}, and the reference is computed without it"
    if source == "step":
        return (
            "the model computes something else in training than in evaluation mode (noise of a "
            "router, say)"
        )
    if source == "ahead":
        return "the model has changed since its log-probs were computed"
    if per_token < SMALL:
        return (
            "the data's reference log-probs were probably computed in another dtype, or with "
            "an adapter or dropout active"
        )
    return (
        "the data's reference log-probs are probably those of another model, of another chat "
        "template or tokenisation, or means instead of sums"
    )


def noise_of(model: Any, neftune: float | None) -> str | None:
    """What makes a model in training mode random, or None."""
    if neftune:
        return f"neftune_noise_alpha={neftune:g} adds noise to the embeddings"
    for name, module in model.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"dropout is active ({name}, p={module.p:g}; disable_dropout=True ends it)"
        for key, value in vars(module).items():
            if isinstance(value, float) and value > 0 and ("dropout" in key or "jitter" in key):
                return f"{key}={value:g} is active ({name or type(module).__name__})"
    return None
