"""FinalScores: log r and logits of final positions, where tokens are final before all members have scored them."""

from collections.abc import Sequence

import numpy as np
import torch


class FinalScores:
    """
    Sums the mixture's probabilities while members score final positions, and keeps the main model's logits.

    State: both, by row and position.

    Args:
        batch (`int`): B.
        weights (`Sequence[float]`, N): Of the mixture.
        scores, logits (`bool`): What is wanted.
    """

    def __init__(self, batch: int, weights: Sequence[float], scores: bool, logits: bool):
        self.weights = list(weights)
        self._probs: list[dict[int, torch.Tensor]] | None = [{} for _ in range(batch)] if scores else None
        self._logits: list[dict[int, torch.Tensor]] | None = [{} for _ in range(batch)] if logits else None

    def add(self, member: int, row: int, position: int, probs: torch.Tensor, logits: torch.Tensor | None) -> None:
        """Takes what a member gives `[V]` at a final position; once for each."""
        if member >= len(self.weights):
            return
        if self._probs is not None:
            weighted, sums = self.weights[member] * probs, self._probs[row]
            sums[position] = sums[position] + weighted if position in sums else weighted
        if self._logits is not None and logits is not None:
            self._logits[row][position] = logits

    def scores(self, tokens: torch.Tensor, lengths: np.ndarray) -> tuple[torch.Tensor, ...] | None:
        """
        log r for the output.

        Args:
            tokens (`torch.LongTensor` `[B, T]`): The new tokens.
            lengths (`np.ndarray` `[B]`): Of the rows' texts. Behind them the padding token has probability one.

        Returns:
            A tensor `[B, V]` for each column, or `None` if it was not wanted.
        """
        if self._probs is None:
            return None
        return _columns([{at: probs.log() for at, probs in row.items()} for row in self._probs], tokens, lengths)

    def logits(self, tokens: torch.Tensor, lengths: np.ndarray) -> tuple[torch.Tensor, ...] | None:
        """As `scores`, the main model's logits."""
        return None if self._logits is None else _columns(self._logits, tokens, lengths)


def padding(like: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[V]` of a distribution with all its mass on one token."""
    return torch.full_like(like, -torch.inf).index_fill(0, token.to(like.device), 0.0)


def _columns(
    rows: list[dict[int, torch.Tensor]], tokens: torch.Tensor, lengths: np.ndarray
) -> tuple[torch.Tensor, ...]:
    some = next(row[0] for row in rows if row)
    return tuple(
        torch.stack(
            [
                row[j] if j < length else padding(some, token)
                for row, length, token in zip(rows, lengths.tolist(), tokens[:, j])
            ]
        )
        for j in range(tokens.shape[1])
    )
