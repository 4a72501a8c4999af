"""The embedded family of tiny models, and `python -m hf_spec_ensemble.demo`, which runs an ensemble of them."""

from pathlib import Path


FAMILY = Path(__file__).resolve().parent / "models"  # folders `reader`, `solver` and `draft`
