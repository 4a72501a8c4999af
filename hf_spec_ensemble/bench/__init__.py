"""`python -m hf_spec_ensemble.bench`: the speed of an ensemble on tasks, against the alternatives."""

from .plan import Plan, Settings
from .records import Records
from .report import write_report


__all__ = ["Plan", "Records", "Settings", "write_report"]
