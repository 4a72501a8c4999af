"""The ensemble's distribution from its members' logits: pure tensor functions, no state.

Shapes: N members, V vocabulary, `...` any leading dimensions (rows, pending positions).
"""

import math
from collections.abc import Sequence

import torch

from ..config import EnsembleConfig


def weighted_sum(scores: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """
    sum_i w_i s_i, where -inf means that a processor (top-k, suppressed tokens, ...) removed a token for a member.

    A token is removed from the sum by the members of positive weight. If between them they remove every token, those
    removed by the least weight stay, so that there always is a distribution. For members of weight <= 0 a removed token
    counts as their least probable kept one: a token that an amateur removes must not get an infinite score.

    Args:
        scores (`Sequence[torch.Tensor]`, N tensors `[..., V]`): Logits or log-probabilities.
        weights (`Sequence[float]`, N): Of any sign.

    Returns:
        `torch.Tensor` `[..., V]`: Logits, not normalised; -inf for removed tokens, never nan.
    """
    total = _linear(scores, weights)
    # A finite sum has finite terms only. Elsewhere than on a CPU, asking costs more than it saves
    if total.device.type == "cpu" and total.sum().isfinite():
        return total
    removed = [member == -torch.inf for member in scores]
    # Of the kept ones
    lowest = [member.masked_fill(gone, torch.inf).amin(-1, keepdim=True) for member, gone in zip(scores, removed)]
    total = _linear([torch.where(gone, low, member) for member, gone, low in zip(scores, removed, lowest)], weights)
    removed_by = _linear([gone.to(total.dtype) for gone in removed], [max(weight, 0.0) for weight in weights])
    return total.masked_fill(removed_by > removed_by.amin(-1, keepdim=True), -torch.inf)


def mixture(probs: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """
    sum_i w_i p_i.

    Args:
        probs (`Sequence[torch.Tensor]`, N tensors `[..., V]`): Probabilities.
        weights (`Sequence[float]`, N): Non-negative, with a sum of one.

    Returns:
        `torch.Tensor` `[..., V]`: Probabilities.
    """
    return _linear(probs, weights)


def _linear(terms: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = terms[0] * weights[0]
    for term, weight in zip(terms[1:], weights[1:]):
        total.add_(term, alpha=weight)
    return total


def exclude_implausible(scores: torch.Tensor, expert: torch.Tensor, plausibility: float) -> torch.Tensor:
    """
    Removes tokens with less than `plausibility` times the probability of the expert's best token (the adaptive
    plausibility constraint of contrastive decoding, Li et al., arXiv 2210.15097, equation 1).

    Args:
        scores (`torch.Tensor` `[..., V]`): What is cut.
        expert (`torch.Tensor` `[..., V]`): The expert's logits.
        plausibility (`float`): alpha in [0, 1].

    Returns:
        `torch.Tensor` `[..., V]`.
    """
    if plausibility == 0:
        return scores
    cut = expert.amax(-1, keepdim=True) + math.log(plausibility)
    return scores.masked_fill(expert < cut, -torch.inf)


def works_on_probs(config: EnsembleConfig) -> bool:
    """Whether `combine` takes and returns probabilities, and not logits."""
    return config.combine_on == "probs" and (callable(config.method) or config.method == "weighted")


def combine(members: Sequence[torch.Tensor], config: EnsembleConfig) -> torch.Tensor:
    """
    Combines the members' distributions by `config.method`.

    Args:
        members (`Sequence[torch.Tensor]`, N tensors `[..., V]`):
            The members' probabilities if `works_on_probs(config)`, else their logits; processed unless
            `config.combine_on` is `"raw_logits"`.
        config (`EnsembleConfig`):
            With its weights filled in (`EnsembleConfig.for_members`).

    Returns:
        `torch.Tensor` `[..., V]`: The ensemble's, in the form of the members'. A callable need not have normalised it.

    Raises:
        `ValueError`: if a callable method returns another shape.

    Example:

    >>> import torch
    >>> from hf_spec_ensemble import EnsembleConfig
    >>> from hf_spec_ensemble.ensemble.combine import combine

    >>> combine(torch.tensor([[0.5, 0.5], [0.9, 0.1]]), EnsembleConfig(weights=[0.5, 0.5]))
    tensor([0.7000, 0.3000])
    """
    if callable(config.method):
        stacked = torch.stack(list(members))
        combined = config.method(stacked)
        if not isinstance(combined, torch.Tensor) or combined.shape != stacked.shape[1:]:
            got = tuple(combined.shape) if isinstance(combined, torch.Tensor) else type(combined).__name__
            raise ValueError(
                f"The callable `method` must map the members' stacked tensors {tuple(stacked.shape)} to a tensor "
                f"{tuple(stacked.shape[1:])}, but returned {got}."
            )
        return combined
    if config.method == "contrastive":
        contrasted = weighted_sum(members, [1.0, -config.contrast])
        return exclude_implausible(contrasted, members[0], config.plausibility)
    return (mixture if works_on_probs(config) else weighted_sum)(members, config.weights)
