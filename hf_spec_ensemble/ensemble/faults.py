"""Positions without a distribution: nan, +inf, or no token that is allowed. Found without waiting for the device."""

import math

import torch


def sound_positions(peak: torch.Tensor, probs: bool) -> torch.Tensor:
    """
    How many positions of each row have a distribution, up to the first that has none.

    Args:
        peak (`torch.Tensor` `[B, K]`): The greatest of what r is made of; nan if one is nan, as `amax` has it.
        probs (`bool`): Whether that are probabilities, and not logits.

    Returns:
        `torch.LongTensor` `[B]`: In [0, K].
    """
    sound = peak.isfinite() & (peak > 0) if probs else peak.isfinite()
    return sound.long().cumprod(dim=1).sum(dim=1)


def named(peak: float, probs: bool = False) -> str:
    """Describes a position whose greatest logit, or probability, is this number."""
    if math.isnan(peak):
        return "nan"
    if peak == math.inf:
        return "+inf"
    return "no positive probability" if probs else "-inf for every token"
