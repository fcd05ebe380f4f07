"""Every script in examples/ runs, on the tiny model that the package ships."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import fastpref  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# The loss before the first step, where policy and reference are the same.
FIRST = {
    "trl_one_line": math.log(2),
    "lora_head": math.log(2),
    "plain_pytorch": math.log(2),
    "custom_loss": 1.0,
}
TRL = ("trl_one_line", "lora_head")


def test_every_example_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(FIRST)


@pytest.mark.train
@pytest.mark.parametrize("name", FIRST)
def test_example(name, tmp_path, monkeypatch):
    args = ["--steps", "4"]
    if name in TRL:
        pytest.importorskip("trl")
        args += ["--output", str(tmp_path)]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    try:
        losses = importlib.import_module(name).main(args)
    finally:
        if name in TRL:
            fastpref.unpatch_trl()
    assert len(losses) == 4
    assert math.isclose(losses[0], FIRST[name], rel_tol=1e-4)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
