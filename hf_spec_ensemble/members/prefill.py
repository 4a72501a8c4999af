"""Prefill: a prompt that a member reads for one of its rows, in parts, while the rows go on."""

import torch

from .member import Member
from .rows import SharedMember


class Prefill:
    """
    State: what was read, and in the end `logits` `[1, V]`, which predict the first new token.

    Args:
        member (`Member`): Which `can_refill`. It takes up in `Member.refill` what was read.
        prompt (`torch.LongTensor` `[1, P]`), mask (`torch.LongTensor` `[1, P]`), part (`int`): As for `Member.prefill`.
    """

    def __init__(self, member: Member | SharedMember, prompt: torch.Tensor, mask: torch.Tensor, part: int = 0):
        self.reader = member.prefill(prompt, mask, part)
        self.logits: torch.Tensor | None = None
        self._nothing = prompt[:, :0]

    def read(self, tokens: int) -> int:
        """Reads so many tokens, or those that are left, in one pass. How many it has read."""
        left = -int(self.reader.seen[0])
        tokens = min(tokens, left)
        if tokens:
            logits = self.reader.score(self._nothing, self.reader.seen + tokens)
            if tokens == left:
                self.logits = logits[:, -1]
        return tokens
