"""Attention over rows of segments (`fastpref.data.segments`) in models of transformers.

`check_attention` compares a model's rows of segments with separate rows and returns the
`SegmentAttention` that computes them, or raises `UnsupportedAttention` with the reason.
docs/prefix-sharing.md lists what is refused.
"""

from __future__ import annotations

from fastpref.attention.check import check_attention, unsupported_reason
from fastpref.attention.switch import SegmentAttention, UnsupportedAttention

__all__ = ["SegmentAttention", "UnsupportedAttention", "check_attention", "unsupported_reason"]
