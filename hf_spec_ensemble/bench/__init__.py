"""`python -m hf_spec_ensemble.bench`: what an ensemble gains, on tasks, over what one would else use."""

from .plan import Plan, Settings
from .records import Records
from .report import write_report


__all__ = ["Plan", "Records", "Settings", "write_report"]
