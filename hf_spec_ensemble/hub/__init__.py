"""Ensembles as folders and as repositories on the Hub: names, config, card. Never decodes by itself: it loads models and
calls `generate()`, and it never writes weights."""

from .folders import (
    FILES,
    Ensemble,
    MemberReference,
    ensemble_card,
    generate_with,
    load_ensemble,
    push_ensemble,
    read_ensemble,
    save_ensemble,
)
