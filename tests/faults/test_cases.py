"""Generated cases of the core are as exact as eager torch in the same dtype."""

from __future__ import annotations

import math
import time
from collections import defaultdict

import core_cases
import reliability
import torch

SEED = 1_000_000


def test_generated_cases():
    count, began = reliability.sized(10_000, 300), time.monotonic()
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    kinds: dict[str, int] = defaultdict(int)
    faults = []
    for number in range(SEED, SEED + count):
        case = core_cases.Case(number)
        try:
            found = list(case.errors())
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}; {case.description}")
            continue
        kinds[case.kind] += 1
        for error in found:
            if error.is_fault:
                faults.append(f"{error}; {case.description}")
            elif case.kind != "formula" and case.dtype != torch.float64 and error.luck > 0:
                # In units of the rounding. In float64 eager torch rounds as the truth does.
                what = "gradients" if error.name.startswith("d ") else "log-probs"
                for i, value in enumerate((error.ours, error.eager)):
                    squares[f"{case.dtype} {what}"][i] += (value / error.luck) ** 2
    again = "PYTHONPATH=.:tests:tests/support python tests/support/core_cases.py NUMBER"
    assert not faults, f"{len(faults)} faults; {again}\n" + "\n".join(faults[:10])
    ratios = {
        name.removeprefix("torch."): round(math.sqrt(ours / max(eager, 1e-30)), 3)
        for name, (ours, eager) in sorted(squares.items())
    }
    assert max(ratios.values()) <= (1.1 if count > 1000 else 1.5), ratios
    reliability.record(
        "cases", cases=count, kinds=dict(sorted(kinds.items())), faults=0,
        error_over_eager=ratios, threads=torch.get_num_threads(),
        seconds=round(time.monotonic() - began),
    )  # fmt: skip
