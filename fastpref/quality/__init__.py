"""What is wrong with preference data before it is trained on: `check_data` and its findings.

`fastpref check-data` is the command. docs/check-data.md describes each finding.
"""

from __future__ import annotations

from fastpref.quality.check import DataQuality, check_data
from fastpref.quality.findings import LEVELS, Finding
from fastpref.quality.fix import write_fixed

__all__ = ["LEVELS", "DataQuality", "Finding", "check_data", "write_fixed"]
