"""Who runs the next forward pass, and who may propose. Pure decisions from counts: nothing here sees a token.

That last point is what makes any schedule exact: whether a position is proposed, and by whom, is decided before its
token is drawn.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """
    Takes turns: a member runs as many passes as its proposal length, then the member that lags most takes over.

    Args:
        lengths (`tuple[int, ...]`): Proposal lengths, one for each of the N members.
        proposer (`int`): The member that begins, and begins again after a rejection: the smallest.
        alternate (`bool`): Whether the others propose too.

    Example:

    >>> import torch
    >>> from hf_spec_ensemble.schedule import Schedule

    >>> schedule = Schedule(lengths=(1, 1), proposer=1, alternate=True)
    >>> schedule.next(None, 0, torch.tensor([[4], [4]]), torch.tensor([True]))  # a prompt of 4 tokens, not seen
    (1, 1)
    >>> schedule.next(1, 1, torch.tensor([[5], [1]]), torch.tensor([True]))  # member 1 has proposed one
    (0, 1)
    """

    lengths: tuple[int, ...]
    proposer: int
    alternate: bool = True

    def may_propose(self, member: int) -> bool:
        return self.alternate or member == self.proposer

    def next(self, current: int | None, turn: int, lag: torch.Tensor, open_: torch.Tensor) -> tuple[int, int]:
        """
        Args:
            current (`int`, *optional*): The member of the last pass; `None` before the first.
            turn (`int`): Its consecutive passes so far.
            lag (`torch.LongTensor` `[N, B]`): Tokens of each row that each member has not seen and has to read; at
                least one entry is positive.
            open_ (`torch.BoolTensor` `[B]`): Rows in which another token may still be proposed.

        Returns:
            `tuple[int, int]`: The member that runs now, and its consecutive passes with this one.
        """
        level = (lag == lag[0]).all()  # at the start, and after every row had a token drawn from r: begin again
        goes_on = current is not None and not level and self.may_propose(current) and turn < self.lengths[current]
        if goes_on and (lag[current] > 0)[open_].any():
            return current, turn + 1
        total = lag.sum(1)
        return max(range(len(lag)), key=lambda member: (int(total[member]), member == self.proposer, -member)), 1
