"""docs/losses.md: its table is that of the package, and its example runs."""

import re
from pathlib import Path

from fastpref.losses.table import LOSSES

TEXT = (Path(__file__).parents[2] / "docs" / "losses.md").read_text("utf-8")


def test_every_loss_and_its_options_are_there():
    rows = {m[1]: m[2] for m in re.finditer(r"^\| `(\w+)`[^|]*\|(.*)$", TEXT, re.M)}
    assert set(LOSSES) <= set(rows)
    for name, loss in LOSSES.items():
        shared = {"f_divergence_type", *re.findall(r"`(\w+)`", rows[name].replace("\\|", ""))}
        if "the same" in rows[name] and name == "sigmoid_norm":
            shared |= set(re.findall(r"`(\w+)`", rows["sigmoid"]))
        if name == "alphapo":
            shared |= set(re.findall(r"`(\w+)`", rows["simpo"]))
        assert loss.options <= shared, name


def test_the_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    scope: dict = {}
    exec(blocks[-1], scope)
    assert scope["out"].loss.isfinite() and scope["hidden"].grad.abs().sum() > 0
