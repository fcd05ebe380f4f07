"""What the loss of a head costs on this machine: fastpref's ways and other libraries'.

`fastpref bench` is the command. docs/bench.md describes the figures.
"""

from __future__ import annotations
