"""What spoils a training, before it: `check_data` looks at the data, `verify` at the model as well.

The commands are `fastpref check-data` and `fastpref verify`. docs/check-data.md and docs/verify.md
describe each finding.
"""

from __future__ import annotations

from fastpref.quality.check import DataQuality, check_data
from fastpref.quality.findings import LEVELS, Finding
from fastpref.quality.fix import write_fixed
from fastpref.quality.verification import verify
from fastpref.quality.verified import Verification

__all__ = [
    "LEVELS",
    "DataQuality",
    "Finding",
    "Verification",
    "check_data",
    "verify",
    "write_fixed",
]
