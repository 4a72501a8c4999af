"""Ensembles as folders and as repositories on the Hub: names, config, card.
Never writes weights, and never decodes: it loads models and calls `generate()`."""

from .card import ensemble_card
from .folders import Ensemble, generate_with, load_ensemble, push_ensemble, save_ensemble
from .references import MemberReference


__all__ = [
    "Ensemble",
    "MemberReference",
    "ensemble_card",
    "generate_with",  # saved ensembles import it from here
    "load_ensemble",
    "push_ensemble",
    "save_ensemble",
]
