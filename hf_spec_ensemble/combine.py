"""The ensemble's distribution from its members' logits: pure tensor functions, no state.

Shapes: N members, V vocabulary, `...` any leading dimensions (rows, pending positions).
"""

import math

import torch

from .config import EnsembleConfig


def weighted_sum(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    sum_i w_i s_i, where -inf means that a processor (top-k, suppressed tokens, ...) removed a token for a member.

    A token is removed from the sum by the members of positive weight. If between them they remove every token, those
    removed by the least weight stay, so that there always is a distribution. For members of weight <= 0 a removed token
    counts as their least probable kept one: an amateur's cut must not turn into infinite praise.

    Args:
        scores (`torch.Tensor` `[N, ..., V]`): Logits or log-probabilities.
        weights (`torch.Tensor` `[N]`): Of any sign.

    Returns:
        `torch.Tensor` `[..., V]`: Logits, not normalised; -inf for removed tokens, never nan.
    """
    weights = weights.view(-1, *[1] * (scores.dim() - 1))
    removed = scores == -torch.inf
    lowest = scores.masked_fill(removed, torch.inf).amin(-1, keepdim=True)  # of the kept ones
    total = (weights * torch.where(removed, lowest, scores)).sum(0)
    removed_by = (weights.clamp(min=0) * removed).sum(0)
    return total.masked_fill(removed_by > removed_by.amin(-1, keepdim=True), -torch.inf)


def mixture(log_probs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    log sum_i w_i p_i.

    Args:
        log_probs (`torch.Tensor` `[N, ..., V]`): Normalised log-probabilities; -inf allowed.
        weights (`torch.Tensor` `[N]`): Non-negative, with a sum of one.

    Returns:
        `torch.Tensor` `[..., V]`: Normalised log-probabilities.
    """
    return torch.logsumexp(log_probs + weights.log().view(-1, *[1] * (log_probs.dim() - 1)), dim=0)


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


def combine(scores: torch.Tensor, config: EnsembleConfig) -> torch.Tensor:
    """
    Combines the members' scores by `config.method`.

    Args:
        scores (`torch.Tensor` `[N, ..., V]`):
            The members' logits, processed unless `config.combine_on` is `"raw_logits"`.
        config (`EnsembleConfig`):
            With its weights filled in (`EnsembleConfig.for_members`).

    Returns:
        `torch.Tensor` `[..., V]`: Logits of the ensemble, not normalised.

    Raises:
        `ValueError`: if a callable method returns another shape.

    Example:

    >>> import torch
    >>> from hf_spec_ensemble import EnsembleConfig
    >>> from hf_spec_ensemble.combine import combine

    >>> members = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    >>> combine(members, EnsembleConfig(weights=[0.5, 0.5])).exp()
    tensor([0.7000, 0.3000])
    """
    if callable(config.method):
        stacked = scores.softmax(-1) if config.combine_on == "probs" else scores
        combined = config.method(stacked)
        if not isinstance(combined, torch.Tensor) or combined.shape != scores.shape[1:]:
            got = tuple(combined.shape) if isinstance(combined, torch.Tensor) else type(combined).__name__
            raise ValueError(
                f"The callable `method` must map the members' stacked tensors {tuple(scores.shape)} to a tensor "
                f"{tuple(scores.shape[1:])}, but returned {got}."
            )
        return combined.log() if config.combine_on == "probs" else combined
    if config.method == "contrastive":
        contrasted = weighted_sum(scores, scores.new_tensor([1.0, -config.contrast]))
        return exclude_implausible(contrasted, scores[0], config.plausibility)
    weights = scores.new_tensor(config.weights)
    if config.method == "product":
        return weighted_sum(scores, weights)
    if config.combine_on == "probs":
        return mixture(scores.log_softmax(-1), weights)
    return weighted_sum(scores, weights)
