"""What a training will need, from a model's config and the lengths of its data, without weights.

`fastpref plan` is the command. docs/plan.md describes how the figures come about.
"""

from __future__ import annotations

from fastpref.planning.model import StepOptions
from fastpref.planning.plan import Estimate, TrainingPlan, plan_training
from fastpref.planning.simulate import simulate_step

__all__ = ["Estimate", "StepOptions", "TrainingPlan", "plan_training", "simulate_step"]
