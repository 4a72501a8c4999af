"""`prefix_allowed_tokens_fn` for pending positions: a user's function, which is only called with the rows' prefixes."""

import numpy as np
import torch
from transformers.generation import PrefixConstrainedLogitsProcessor


class PrefixConstraint:
    """
    Calls the function of a `PrefixConstrainedLogitsProcessor` for pending positions, row by row.

    The function often walks a trie, and fails on a prefix that it never allowed. So it sees no padding in the place of
    tokens that a row does not have, and no token that it forbade: `allowed` tells where a draft must end.

    Args:
        processor (`PrefixConstrainedLogitsProcessor`): As `generate()` made it. Not changed.
    """

    def __init__(self, processor: PrefixConstrainedLogitsProcessor):
        self._function = processor._prefix_allowed_tokens_fn
        self._rows_per_prompt = processor._num_beams

    def __call__(self, logits: torch.Tensor, ids: torch.Tensor, first: np.ndarray, count: np.ndarray) -> torch.Tensor:
        """As `PositionwiseProcessor`. Where the function allows no token at all, every logit is -inf."""
        logits = logits.clone()
        for b in range(len(ids)):
            for j in range(int(count[b])):
                allowed = self._allowed_after(b, ids[b, : int(first[b]) + j])
                if len(allowed):
                    alone = PrefixConstrainedLogitsProcessor(lambda _, prefix, tokens=allowed: tokens, 1)
                    logits[b, j] = alone(ids[b : b + 1, :1], logits[b : b + 1, j])[0]
                else:
                    logits[b, j] = -torch.inf
        return logits

    def allowed(self, row: int, ids: torch.Tensor, draft: list[int]) -> int:
        """
        How many tokens of a draft the function allows, up to the first that it does not.

        Args:
            row (`int`): b.
            ids (`torch.LongTensor` `[T]`): The row's tokens so far.
            draft (`list[int]`): Tokens that may follow.
        """
        whole = torch.cat([ids, ids.new_tensor(draft)])
        for j, token in enumerate(draft):
            if token not in map(int, self._allowed_after(row, whole[: len(ids) + j])):
                return j
        return len(draft)

    def _allowed_after(self, row: int, prefix: torch.Tensor) -> list[int]:
        return self._function(row // self._rows_per_prompt, prefix)
