"""Earlier path of the head's plan, which is in `fastpref.logps`."""

from fastpref.logps import HeadPlan, plan_head

__all__ = ["HeadPlan", "plan_head"]
