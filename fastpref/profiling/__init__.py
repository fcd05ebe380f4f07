"""What a training step costs: memory by component and time by phase, with and without logits.

`fastpref profile` is the command. docs/profile.md describes the figures.
"""

from __future__ import annotations

from fastpref.profiling.profile import Profile, SideProfile, profile_training

__all__ = ["Profile", "SideProfile", "profile_training"]
