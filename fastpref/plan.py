"""The head"s plan, which is in `fastpref.logps`; a name of earlier versions."""

from fastpref.logps import HeadPlan, plan_head

__all__ = ["HeadPlan", "plan_head"]
