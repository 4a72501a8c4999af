"""The rules for drawing: how a token is proposed from q and how proposals are verified against r.

Each rule is an object with

- `form`, what q and r are given as: `"probs"`, or `"scores"`, anything with the same maximum,
- `propose(q [B, V], position [B]) -> tokens [B]`,
- `verify(tokens [B, K], q [B, K, V], r [B, K, V], proposed [B], position [B]) -> accepted [B], emitted [B]` as in
  `verify.verify_maximal`; q only where `needs_q`,
- `acceptance(tokens [B, K], q [B, K, V], r [B, K, V]) -> [B, K]`: how probable it was, before the verification's draws
  and given the proposal, that this is kept; q always probabilities,

where `proposed` and `position`, the number of tokens generated before the (first) one in question, are numpy integers.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..config import EnsembleConfig
from ..ensemble.wide import argmax
from .verify import (
    acceptance_probs,
    draw,
    exponential_noise,
    mixture_owners,
    shared_noise_acceptance,
    verify_match,
    verify_maximal,
)


KEPT = 16  # positions of each row whose noise is kept; what is needed again later is made again
AHEAD = 64  # positions whose owners are drawn at once


class Greedy:
    """argmax q is proposed, argmax r is emitted."""

    form = "scores"
    needs_q = False

    def propose(self, q, position):
        return argmax(q)

    def verify(self, tokens, q, r, proposed, position):
        return verify_match(tokens, argmax(r), proposed)

    def acceptance(self, tokens, q, r):
        return (tokens == argmax(r)).to(q.dtype)


class Gumbel:
    """argmax(log q + g) is proposed, argmax(log r + g) is emitted, g being the position's Gumbel noise."""

    form = "probs"
    needs_q = False

    def __init__(self):
        # The only draw from torch's global generator: all noise follows from it
        self.seed = int(torch.randint(2**63 - 1, ()))
        self.numbers: np.ndarray | None = None  # [B], what rows' noise is keyed by, if not by their own numbers
        # Proposed with first, then verified with: noise [V] by row and position, dtype and device; oldest first
        self._kept: dict[tuple[int, torch.dtype, torch.device], torch.Tensor] = {}

    def keys(self, batch: int) -> np.ndarray:
        """What noise is keyed by in each of so many rows, besides the position."""
        return np.arange(batch) if self.numbers is None else self.numbers

    def propose(self, q, position):
        return argmax(q / self._noise_at(position, q))

    def verify(self, tokens, q, r, proposed, position):
        noise = [self._noise_at(position + j, r[:, j]) for j in range(r.shape[1])]
        target = torch.stack([argmax(r[:, j] / noise[j]) for j in range(r.shape[1])], dim=1)
        return verify_match(tokens, target, proposed)

    def acceptance(self, tokens, q, r):
        return shared_noise_acceptance(tokens, q, r)

    def _noise_at(self, position: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        """The noise `[B, V]` of one position in each row."""
        # What is drawn with must depend on neither who proposed before, nor in which precision
        places = [(place, like.dtype, like.device) for place in ((self.keys(len(like)) << 32) + position).tolist()]
        missing = [place for place in places if place not in self._kept]
        if missing:
            keys = np.array([place for place, _, _ in missing])
            values = exponential_noise(
                self.seed, keys >> 32, keys & (2**32 - 1), like.shape[-1], like.dtype, like.device
            )
            self._kept.update(zip(missing, values))
        noise = [self._kept[place] for place in places]
        while len(self._kept) > KEPT * len(places):
            del self._kept[next(iter(self._kept))]
        if len(missing) == len(places):
            return values
        return noise[0][None] if len(noise) == 1 else torch.stack(noise)


class Ancestral(Gumbel):
    """
    A draw from a mixture r = sum_i w_i p_i by its component (ancestral sampling): an owner i with probability w_i, and
    then argmax(log p_i + g). What others propose for it is argmax(log q + g).

    Args:
        weights (`Sequence[float]`, N): Of the mixture, with a sum of one.
    """

    def __init__(self, weights: Sequence[float]):
        super().__init__()
        self.weights = weights
        self._drawn: tuple[np.ndarray, np.ndarray] | None = None  # [B], the keys of rows, and the owners [B, T] there

    def owners(self, position: np.ndarray) -> np.ndarray:
        """The members, numbered from 0, that own positions `[B]` or `[B, K]` of the rows."""
        keys, farthest = self.keys(len(position)), int(position.max())
        if self._drawn is None or not np.array_equal(self._drawn[0], keys) or farthest >= self._drawn[1].shape[1]:
            ahead = np.arange(max(AHEAD, 2 * farthest))  # they are asked for several times a round
            self._drawn = keys, mixture_owners(self.seed, keys[:, None], ahead, self.weights)
        rows = np.arange(len(keys)).reshape(-1, *[1] * (position.ndim - 1))
        return self._drawn[1][rows, position]


def owned(owners: np.ndarray, lengths: np.ndarray, members: int) -> list[int]:
    """
    How many tokens of the texts each member owns.

    Args:
        owners (`np.ndarray` `[B, T]`): Of the rows' new tokens.
        lengths (`np.ndarray` `[B]`): Of the rows' texts.
        members (`int`): N.
    """
    return np.bincount(owners[np.arange(owners.shape[1]) < lengths[:, None]], minlength=members).tolist()


class Maximal:
    """x ~ q is kept with probability min(1, r(x) / q(x)), else replaced from the residual."""

    form = "probs"
    needs_q = True

    def propose(self, q, position):
        return draw(q, self._uniforms(q, len(q)))

    def verify(self, tokens, q, r, proposed, position):
        uniforms = self._uniforms(r, len(tokens), tokens.shape[1] + 1)
        return verify_maximal(tokens, q, r, proposed, uniforms)

    def acceptance(self, tokens, q, r):
        return acceptance_probs(tokens, q, r)

    def _uniforms(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        return torch.rand(shape, device=like.device, dtype=dtype)


def drawing_rule(do_sample: bool, config: EnsembleConfig) -> Greedy | Gumbel | Maximal:
    """For a config of `for_members`."""
    if not do_sample:
        return Greedy()
    if config.coupling == "ancestral":
        return Ancestral(config.weights)
    return Gumbel() if config.coupling == "gumbel" else Maximal()
