"""`Alarms`: sentences about a run that goes wrong without failing, each said once.

    micro-step -> sums on the device (metrics.py, moments.py) -> read once per log line
      -> `Alarms.observe` keeps those of the last pairs -> `Alarms.on_log` looks at them
    first step with a real learning rate -> moved.py counts weights that changed
    first step -> step_zero.py

Every alarm is a warning of the logger "fastpref" whose record has the attribute `alarm`, its name.
It is also a trackio alert where `report_to` has trackio. docs/alarms.md describes each.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from fastpref.trainer.moments import explained_by_length, margin_size

logger = logging.getLogger("fastpref")

FEW, MANY = 64, 256  # pairs that an alarm looks at: of a frequent event, of a correlation
SATURATED, EARLY = 0.98, 0.05  # accuracy; share of the run's steps
FALL = 1.0  # nats that the chosen answers lose before that is called displacement
EXPLAINED, LARGE_MARGIN = 0.5, 0.1  # R^2; root mean square of the rewards' margins
RANKED, RIGHT = 0.4, 0.8  # shares of pairs
IPO_STEPS, OUT_OF_SCALE = 20, 10.0


def raise_alarm(name: str, message: str, args: Any = None) -> None:
    """Say that something is wrong with a run.

    Args:
        name: of the alarm, such as "displacement".
        message: one sentence: what was seen, and what to do.
        args: the trainer's arguments; with "trackio" in `report_to` the dashboard gets it, too.
    """
    logger.warning(message, extra={"alarm": name})
    trackio = sys.modules.get("trackio")  # transformers imports it if it is asked for
    if trackio is None or "trackio" not in (getattr(args, "report_to", None) or ()):
        return
    try:
        trackio.alert(title=f"fastpref: {name}", text=message, level=trackio.AlertLevel.WARN)
    except Exception as error:  # a dashboard that fails must not end a run
        logger.warning(f"trackio did not take the alarm {name!r}: {error}")


class Alarms(TrainerCallback):
    """Looks at the sums of the last pairs whenever they are logged.

    Args:
        args: the trainer's configuration.
        has_reference: whether the rewards are log-ratios to a reference.
        starts_as_reference: whether all rewards are 0 before the first step.
    """

    def __init__(self, args: Any, has_reference: bool, starts_as_reference: bool) -> None:
        self.args, self.beta = args, args.beta
        self.ipo: str | None = args.ipo_normalization if args.loss_type == "ipo" else None
        self.has_reference, self.starts_as_reference = has_reference, starts_as_reference
        self._reset(0)

    def _reset(self, step: int) -> None:
        self._said: set[str] = set()
        self._last: deque[Mapping[str, float]] = deque()
        self._pairs = 0.0
        self._start: float | None = 0.0 if self.starts_as_reference else None
        self._first_step = step

    def observe(self, sums: Mapping[str, float]) -> None:
        """Keep the sums of a micro-step over all processes; sums of single answers are ignored."""
        if "pairs" not in sums:
            return
        self._last.append(sums)
        self._pairs += sums["pairs"]
        while self._pairs - self._last[0]["pairs"] >= MANY:
            self._pairs -= self._last.popleft()["pairs"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reset(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}) or not self._last:
            return
        few, many = self._sums(FEW), self._sums(MANY)
        if state.max_steps > 0 and state.global_step <= EARLY * state.max_steps:
            self._look_at_accuracy(few, state)
        self._look_at_displacement(few)
        self._look_at_length(many)
        self._look_at_ranking(many)
        if self.ipo is not None and state.global_step - self._first_step >= IPO_STEPS:
            self._look_at_target(few)

    def _sums(self, pairs: int) -> dict[str, float]:
        """The sums over the last micro-steps that have at least so many pairs together."""
        total = dict.fromkeys(self._last[-1], 0.0)
        for sums in reversed(self._last):
            for key, value in sums.items():
                total[key] += value
            if total["pairs"] >= pairs:
                break
        return total

    def _say(self, name: str, message: str) -> None:
        if name not in self._said:
            self._said.add(name)
            raise_alarm(name, message, self.args)

    def _look_at_accuracy(self, sums: dict[str, float], state: Any) -> None:
        accuracy = sums["rewards/accuracies"] / max(sums["pairs"], 1.0)
        if sums["pairs"] >= FEW and accuracy > SATURATED:
            self._say(
                "saturated",
                f"the reward accuracy is {accuracy:.3f} after step {state.global_step} of "
                f"{state.max_steps}: the sides differ in something that is learnt at once, as "
                "pairs of two models or formats do; run fastpref check-data, and compare answers "
                "of one source",
            )

    def _look_at_displacement(self, sums: dict[str, float]) -> None:
        if not self.has_reference or sums["pairs"] < FEW:
            return
        scale = self.beta * sums["pairs"]
        chosen = sums["rewards/chosen"] / scale
        if self._start is None:
            self._start = chosen
        margin, fall = chosen - sums["rewards/rejected"] / scale, self._start - chosen
        if fall >= FALL and margin > 0 and fall >= margin:
            self._say(
                "displacement",
                f"likelihood displacement: chosen answers have lost {fall:.1f} nats each and the "
                f"margin is {margin:.1f}, so it grows by making both answers less likely; add an "
                "NLL term (nll_weight=1), raise beta, or lower the learning rate",
            )

    def _look_at_length(self, sums: dict[str, float]) -> None:
        # Without a reference the margin is of log-probs, which lengths explain before any training.
        if not self.has_reference or sums["pairs"] < MANY or margin_size(sums) < LARGE_MARGIN:
            return
        explained = explained_by_length(sums)
        if explained >= EXPLAINED:
            sign = sums["md"] / sums["pairs"] - sums["m"] * sums["d"] / sums["pairs"] ** 2
            self._say(
                "length",
                f"the answers' difference in length explains {100 * explained:.0f} % of the "
                f"margin's variance ({'longer' if sign > 0 else 'shorter'} answers win): the model "
                "learns length; set ld_alpha below 1, take a loss with mean log-probs (simpo, "
                "ipo), or pairs of like lengths",
            )

    def _look_at_ranking(self, sums: dict[str, float]) -> None:
        if not self.has_reference or sums["pairs"] < MANY:
            return
        accuracy = sums["rewards/accuracies"] / sums["pairs"]
        ranked = sums["ranked"] / sums["pairs"]
        if accuracy > RIGHT and ranked < RANKED:
            self._say(
                "ranking",
                f"the reward accuracy is {accuracy:.2f}, but in only {100 * ranked:.0f} % of the "
                "pairs the chosen answer is the more likely one per token: samples will not show "
                "what the accuracy promises; train an SFT model on chosen answers first, or judge "
                "samples",
            )

    def _look_at_target(self, sums: dict[str, float]) -> None:
        """Compare IPO's target 1/(2 beta) with what log-probs can do and have done."""
        if sums["pairs"] < FEW / 2 or "target" in self._said:
            return
        self._said.add("target")  # it is looked at once
        target, observed = 1 / (2 * self.beta), margin_size(sums) / self.beta
        tokens = sums["tokens/chosen"] if self.ipo == "token_mean" else sums["pairs"]
        unit = "nats a token" if self.ipo == "token_mean" else "nats an answer"
        room = -sums["logps/chosen"] / max(tokens, 1.0)
        suggested = min(max(4 * observed, 0.1 * room), 0.5 * room)
        if suggested <= 0:
            return
        advice = f"try beta={1 / (2 * suggested):.2g}, a target of {suggested:.2g}"
        if target > room and target > OUT_OF_SCALE * observed:
            raise_alarm(
                "target",
                f"IPO's target 1/(2 beta) is {target:.3g} {unit}, but the chosen answers can gain "
                f"at most {room:.2g}, their NLL, and the log-ratios are {observed:.2g} apart so "
                f"far: only rejected answers that become ever less likely could meet it; {advice}",
                self.args,
            )
        elif observed > OUT_OF_SCALE * target:
            raise_alarm(
                "target",
                f"IPO's target 1/(2 beta) is {target:.3g} {unit}, but the log-ratios are "
                f"{observed:.2g} apart already, so the loss draws them together; {advice}",
                self.args,
            )
