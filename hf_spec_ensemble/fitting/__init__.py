"""Weights that make given texts most likely: the texts, the passes over them, the maths, the report.
Never generates, and never changes a model: its members read texts that are there."""

from .call import fit
from .report import FitResult, FitResults


__all__ = ["FitResult", "FitResults", "fit"]
