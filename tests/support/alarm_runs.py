"""Alarms of runs that are given by the sums of their pairs."""

from __future__ import annotations

import random
import types

from fastpref.trainer.alarms import Alarms


def alarms(caplog):
    """The names of the alarms so far."""
    return [record.alarm for record in caplog.records if hasattr(record, "alarm")]


class State:
    is_world_process_zero = True

    def __init__(self, step=30, steps=40):
        self.global_step, self.max_steps = step, steps


def figures(pairs=256, chosen=0.5, rejected=-0.5, accuracy=0.7, slope=0.0, ranked=0.6, noise=0.3):
    """The sums of pairs whose lengths differ at random."""
    draw = random.Random(0)
    d = [draw.randint(-20, 20) for _ in range(pairs)]
    m = [chosen - rejected + slope * x + draw.gauss(0, noise) for x in d]
    sums = {
        "pairs": pairs, "rewards/chosen": chosen * pairs, "rewards/rejected": rejected * pairs,
        "rewards/accuracies": accuracy * pairs, "ranked": ranked * pairs,
        "logps/chosen": -40.0 * pairs, "tokens/chosen": 20.0 * pairs,
    }  # fmt: skip
    sums |= {"m": sum(m), "m2": sum(x * x for x in m), "d": sum(d), "d2": sum(x * x for x in d)}
    return sums | {"md": sum(x * y for x, y in zip(m, d, strict=True))}


def look(caplog, sums, state=None, loss_type="sigmoid", beta=0.1, starts=True, times=2, ref=True):
    args = types.SimpleNamespace(
        beta=beta, loss_type=loss_type, ipo_normalization="token_mean", report_to=[]
    )
    watch = Alarms(args, has_reference=ref, starts_as_reference=starts)
    start = State(step=0)
    watch.on_train_begin(None, start, None)
    for values in [sums] * times if isinstance(sums, dict) else sums:
        watch.observe(values)
        watch.on_log(None, state or State(), None, {"loss": 1.0})
    return alarms(caplog)
