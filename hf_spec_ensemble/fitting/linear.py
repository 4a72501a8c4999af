"""Weights of sums of logits: of products, and of contrasts. Functions of logits that come in blocks; no models."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from ..ensemble.combine import exclude_implausible


CHUNK = 64  # positions whose `[N, V]` logits are combined at a time
GONE = torch.finfo(torch.float16).min  # log-probabilities so low are those of tokens that a member removes
FLAT = 1e-5  # slope, in nats per token and unit of weight, at which a search ends
MOST_CONTRAST = 8.0


class Block(NamedTuple):
    """Some positions of the texts: log_probs `[N, t, V]` under each member, the tokens there `[t]`."""

    log_probs: torch.Tensor
    tokens: torch.Tensor


class Scores(NamedTuple):
    """Of positions: log r(x) `[t]`, and its derivative by each weight `[t, N]`; both float64."""

    log_probs: torch.Tensor
    slopes: torch.Tensor


def score(block: Block, weights: torch.Tensor, plausibility: float = 0.0) -> Scores:
    """
    Scores tokens under `r = softmax(sum_i w_i l_i)`: `d log r(x) / d w_i = l_i(x) - sum_v r(v) l_i(v)`.

    Args:
        block (`Block`): Of any size; float32 at least is computed in.
        weights (`torch.Tensor` `[N]`): Of any sign.
        plausibility (`float`): alpha of contrastive decoding, of which the first member is the expert. A token that is
            cut has -inf, and no slope.

    Returns:
        `Scores`.
    """
    parts = []
    for at in range(0, len(block.tokens), CHUNK):
        logits, tokens = block.log_probs[:, at : at + CHUNK], block.tokens[at : at + CHUNK, None]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        gone = logits <= GONE
        if gone.any():  # as `ensemble.combine.weighted_sum` has it
            lowest = logits.masked_fill(gone, torch.inf).amin(-1, keepdim=True)
            logits = torch.where(gone & (weights < 0).to(gone.device)[:, None, None], lowest, logits)
        total = torch.einsum("n,ntv->tv", weights.to(logits), logits).masked_fill(gone.all(0), -torch.inf)
        ours = exclude_implausible(total, logits[0], plausibility).log_softmax(-1)
        log_probs = ours.gather(1, tokens)[:, 0]
        mean = torch.einsum("tv,ntv->tn", ours.exp(), logits)
        slopes = logits.gather(2, tokens.expand(len(logits), -1, 1))[..., 0].T - mean
        parts.append((log_probs.double(), slopes.double().masked_fill(log_probs[:, None] == -torch.inf, 0.0)))
    return Scores(*(torch.cat(each).cpu() for each in zip(*parts)))


class Objective:
    """
    Nats per token of texts, and their gradient, as functions of the weights. Records where it was evaluated.

    Args:
        blocks (`Callable`): Returns the texts' blocks; it is called once for every evaluation.
        plausibility (`float`): As for `score`. Tokens that are cut, whatever the weights, do not count.
    """

    def __init__(self, blocks: Callable[[], Iterable[Block]], plausibility: float = 0.0):
        self.blocks = blocks
        self.plausibility = plausibility
        self.points: list[tuple[tuple[float, ...], float]] = []  # weights and nats per token
        self.interrupted = False

    def __call__(self, weights: torch.Tensor) -> tuple[float, torch.Tensor]:
        total, slope, count = 0.0, torch.zeros(len(weights), dtype=torch.float64), 0
        for block in self.blocks():
            scores = score(block, weights, self.plausibility)
            kept = scores.log_probs > -torch.inf
            total -= float(scores.log_probs[kept].sum())
            slope -= scores.slopes.sum(0)
            count += int(kept.sum())
        value = total / max(count, 1)
        self.points.append((tuple(weights.tolist()), value))
        return value, slope / max(count, 1)

    @property
    def best(self) -> torch.Tensor:
        """The best weights so far `[N]`."""
        return torch.tensor(min(self.points, key=lambda point: point[1])[0], dtype=torch.float64)


def product_weights(objective: Objective, n: int) -> torch.Tensor:
    """
    The weights `[N]` that minimise the objective, which is convex: by L-BFGS, from 1/N each. Interrupted, the best so
    far; interrupted in the first evaluation, the error goes on.
    """
    weights = torch.full((n,), 1 / n, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights], max_iter=50, tolerance_grad=FLAT, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        value, weights.grad = objective(weights.detach().clone())
        return torch.tensor(value, dtype=torch.float64)

    try:
        optimiser.step(closure)
    except KeyboardInterrupt:
        if not objective.points:
            raise
        objective.interrupted = True
    return objective.best


def contrast_weight(objective: Objective) -> float:
    """
    The contrast mu in [0, 8] that minimises the objective of the weights `[1, -mu]`, which is convex in it: where its
    derivative is zero, by false position (the Illinois variant). Interrupted, as `product_weights`.
    """

    def slope(contrast: float) -> float:
        return -float(objective(torch.tensor([1.0, -contrast], dtype=torch.float64))[1][1])

    try:
        _root(slope, MOST_CONTRAST)
    except KeyboardInterrupt:
        if not objective.points:
            raise
        objective.interrupted = True
    return abs(float(objective.best[1]))


def _root(slope: Callable[[float], float], most: float) -> None:
    """Finds the root of an increasing function in [0, most]."""
    low, at_low = 0.0, slope(0.0)
    if at_low >= 0:
        return
    high = 0.5
    while (at_high := slope(high)) < 0:
        if high >= most:
            return
        low, at_low, high = high, at_high, 2 * high
    side = 0
    for _ in range(40):
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        found = slope(middle)
        if abs(found) < FLAT or high - low < 1e-5:
            return
        if found < 0:
            low, at_low = middle, found
            at_high = at_high / 2 if side < 0 else at_high  # else that end might stay for long
            side = -1
        else:
            high, at_high = middle, found
            at_low = at_low / 2 if side > 0 else at_low
            side = 1


def greatest_plausibility(blocks: Iterable[Block]) -> float:
    """
    The greatest alpha that cuts no token of the texts: the least of p(x) / max_v p(v) under the expert. Whatever the
    contrast, texts get the more likely the more is cut besides them, so that this alpha makes them most likely.
    """
    least = 0.0
    for block in blocks:
        for at in range(0, len(block.tokens), CHUNK):
            expert, tokens = block.log_probs[0, at : at + CHUNK], block.tokens[at : at + CHUNK, None]
            there, best = expert.gather(1, tokens)[:, 0].double(), expert.amax(-1).double()
            rounded = torch.finfo(expert.dtype).eps * (there + best)  # blocks may be kept in half precision
            least = min(least, float((there - best + rounded).min()))
    return float(torch.tensor(least, dtype=torch.float64).exp()) * 0.999  # a rounding must not cut it
