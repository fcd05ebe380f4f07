"""`fastpref train` sets torch's huge pages before torch reads the setting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="this system has no huge pages for those who ask",
)

SCRIPT = """
import sys
sys.argv = ["fastpref", {command!r}, "--help"]
from fastpref.cli import main
try:
    main()
except SystemExit:
    pass
import torch
block = torch.ones(1 << 24)
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
"""


@pytest.mark.parametrize("command, value, huge", [("train", None, True), ("plan", None, False)])
def test_commands_that_train_have_huge_pages(command, value, huge):
    assert (huge_kib(command, value) > 0) == huge


def test_the_users_setting_stands():
    assert huge_kib("train", "0") == 0


def huge_kib(command: str, value: str | None) -> int:
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    if value is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = value
    script = [sys.executable, "-c", SCRIPT.format(command=command)]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=True)
    return int(done.stdout.splitlines()[-1])
