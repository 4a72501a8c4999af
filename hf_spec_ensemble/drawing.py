"""The rules for drawing: how a token is proposed from q and how proposals are judged against r.

Each rule is an object with

- `propose(log_q [B, V], position [B]) -> tokens [B]`,
- `verify(tokens [B, K], log_q [B, K, V], log_r [B, K, V], proposed [B], position [B]) -> accepted [B], emitted [B]`
  as in `verify.verify_maximal`,

where `position[b]` counts the tokens generated before the (first) one in question, on the CPU.
"""

import torch

from .padded import columns
from .verify import gumbel_noise, verify_maximal, verify_shared_noise


class Greedy:
    """argmax q is proposed, argmax r is emitted."""

    needs_proposal_probs = False

    def propose(self, log_q, position):
        return (log_q + self.noise(log_q[:, None], position).squeeze(1)).argmax(-1)

    def verify(self, tokens, log_q, log_r, proposed, position):
        return verify_shared_noise(tokens, log_r, proposed, self.noise(log_r, position))

    def noise(self, like: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The noise `[B, K, V]` of K positions from `position[b]` on."""
        return like.new_zeros(1, 1, 1)


class Gumbel(Greedy):
    """argmax(log q + g) is proposed, argmax(log r + g) is emitted, g being the position's noise."""

    def __init__(self):
        # The only draw from torch's global generator: all noise follows from it
        self.seed = int(torch.randint(2**63 - 1, ()))

    def noise(self, like, position):
        rows = torch.arange(like.shape[0])[:, None]
        positions = columns(position, like.shape[1])
        device = "cpu" if like.device.type == "mps" else like.device  # float64 does not exist there
        return gumbel_noise(self.seed, rows.to(device), positions.to(device), like.shape[2]).to(like)


class Maximal:
    """x ~ q is kept with probability min(1, r(x) / q(x)), else replaced from the residual."""

    needs_proposal_probs = True

    def propose(self, log_q, position):
        return torch.multinomial(log_q.exp(), 1).squeeze(-1)

    def verify(self, tokens, log_q, log_r, proposed, position):
        uniforms = torch.rand(tokens.shape, device=log_r.device, dtype=log_r.dtype)
        return verify_maximal(tokens, log_q, log_r, proposed, uniforms)


def drawing_rule(do_sample: bool, coupling: str) -> Greedy | Gumbel | Maximal:
    if not do_sample:
        return Greedy()
    return Gumbel() if coupling == "gumbel" else Maximal()
