"""An alias: `hf_spec_ensemble.schedule.theory`, under the name that is documented."""

from .schedule.theory import Cost, Prediction, best_turns, predict, worth


__all__ = ["Cost", "Prediction", "best_turns", "predict", "worth"]
