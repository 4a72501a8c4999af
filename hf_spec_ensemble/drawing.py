"""The rules for drawing: how a token is proposed from q and how proposals are judged against r.

Each rule is an object with

- `form`, what q and r are given as: `"probs"`, or `"scores"`, anything with the same maximum,
- `propose(q [B, V], position [B]) -> tokens [B]`,
- `verify(tokens [B, K], q [B, K, V], r [B, K, V], proposed [B], position [B]) -> accepted [B], emitted [B]` as in
  `verify.verify_maximal`; q only where `needs_q`,

where `proposed` and `position`, the number of tokens generated before the (first) one in question, are numpy integers.
"""

import numpy as np
import torch

from .verify import draw, exponential_noise, verify_match, verify_maximal


class Greedy:
    """argmax q is proposed, argmax r is emitted."""

    form = "scores"
    needs_q = False

    def propose(self, q, position):
        return q.argmax(-1)

    def verify(self, tokens, q, r, proposed, position):
        return verify_match(tokens, r.argmax(-1), torch.from_numpy(proposed))


class Gumbel:
    """argmax(log q + g) is proposed, argmax(log r + g) is emitted, g being the position's Gumbel noise."""

    form = "probs"
    needs_q = False

    def __init__(self):
        # The only draw from torch's global generator: all noise follows from it
        self.seed = int(torch.randint(2**63 - 1, ()))
        self._noise: dict[tuple[int, int], torch.Tensor] = {}  # by row and position: drawn with, then verified with

    def propose(self, q, position):
        return self.pick(q[:, None], position)[:, 0]

    def verify(self, tokens, q, r, proposed, position):
        target = self.pick(r, position)
        first = position.tolist()
        self._noise = {key: noise for key, noise in self._noise.items() if key[1] > first[key[0]]}
        return verify_match(tokens, target, torch.from_numpy(proposed))

    def pick(self, probs: torch.Tensor, position: np.ndarray) -> torch.Tensor:
        """The draws `[B, K]` from `[B, K, V]` with the noise of K positions from `position[b]` on."""
        keys = [(row, int(first) + j) for row, first in enumerate(position) for j in range(probs.shape[1])]
        missing = [key for key in keys if key not in self._noise]
        if missing:
            device = "cpu" if probs.device.type == "mps" else probs.device  # no float64 there
            rows, positions = torch.tensor(missing, device=device).T
            noise = exponential_noise(self.seed, rows, positions, probs.shape[2])
            self._noise |= dict(zip(missing, noise.to(probs)))
        noise = torch.stack([self._noise[key] for key in keys]) if len(keys) > 1 else self._noise[keys[0]]
        return (probs / noise.view(probs.shape)).argmax(-1)


class Maximal:
    """x ~ q is kept with probability min(1, r(x) / q(x)), else replaced from the residual."""

    form = "probs"
    needs_q = True

    def propose(self, q, position):
        return draw(q, self._uniforms(q, len(q)))

    def verify(self, tokens, q, r, proposed, position):
        uniforms = self._uniforms(r, len(tokens), tokens.shape[1] + 1)
        return verify_maximal(tokens, q, r, torch.from_numpy(proposed), uniforms)

    def _uniforms(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        return torch.rand(shape, device=like.device, dtype=dtype)


def drawing_rule(do_sample: bool, coupling: str) -> Greedy | Gumbel | Maximal:
    if not do_sample:
        return Greedy()
    return Gumbel() if coupling == "gumbel" else Maximal()
