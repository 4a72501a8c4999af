"""Weights of a mixture, by expectation maximisation. Pure functions of log-probabilities; no models."""

import torch


TOLERANCE = 1e-9  # nats per token that the weights may be short of the best ones
ITERATIONS = 20_000


def mixture_weights(log_probs: torch.Tensor) -> torch.Tensor:
    """
    The weights that make tokens most likely under `sum_i w_i p_i`.

    Every iteration multiplies a weight by the mean of `p_i / sum_j w_j p_j` over the tokens, `g_i`. The likelihood is
    concave in w, and no weights are better than these by more than `max_i g_i - 1` nats per token, which ends it
    (Cover, "An algorithm for maximizing expected log investment return", 1984).

    Args:
        log_probs (`torch.Tensor` `[N, T]`): Of the tokens of the texts, under each member.

    Returns:
        `torch.Tensor` `[N]`: float64, with a sum of one.

    Raises:
        `ValueError`: if there is a token to which no member gives a probability.

    Example:

    >>> import torch
    >>> from hf_spec_ensemble.fitting.mixture import mixture_weights

    >>> mixture_weights(torch.tensor([[0.9, 0.9, 0.1], [0.1, 0.1, 0.9]]).log()).round(decimals=3)
    tensor([0.7080, 0.2920], dtype=torch.float64)
    """
    log_probs = log_probs.double()
    best = log_probs.amax(0)
    if not best.isfinite().all():
        raise ValueError("Some token has the probability zero, or none, under all members: no weights make it likely.")
    probs = (log_probs - best).exp()  # a factor for each token leaves g as it is
    weights = torch.full((len(probs),), 1 / len(probs), dtype=torch.float64)
    for _ in range(ITERATIONS):
        gains = (probs / (weights @ probs)).mean(1)
        if gains.max() - 1 <= TOLERANCE:
            break
        weights = weights * gains
        weights /= weights.sum()
    return weights


def mixture_log_probs(log_probs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`log sum_i w_i p_i`: `[N, T]`, `[..., N]` -> `[..., T]`."""
    return (weights.double().log().unsqueeze(-1) + log_probs.double()).logsumexp(-2)
