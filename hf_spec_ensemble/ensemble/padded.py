"""Rows of different lengths: windows of padded tensors `[B, K, ...]`, and vectors by row that are not padded.

Lengths are numpy integers `[B]`: deciding on them waits for no device, and costs little where there are few.
"""

from collections.abc import Sequence

import numpy as np
import torch


def left_padded(
    rows: Sequence[Sequence[int]], length: int | None = None, pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rows of tokens as ids and mask `[B, P]`, padded on the left.

    >>> from hf_spec_ensemble.ensemble.padded import left_padded

    >>> left_padded([[3, 4], [5]])
    (tensor([[3, 4],
            [0, 5]]), tensor([[1, 1],
            [0, 1]]))
    """
    length = length or max(map(len, rows))
    gaps = [length - len(row) for row in rows]
    ids = [[pad] * gap + list(row) for gap, row in zip(gaps, rows)]
    return torch.tensor(ids), torch.tensor([[0] * gap + [1] * (length - gap) for gap in gaps])


def columns(first: np.ndarray, width: int) -> np.ndarray:
    """`first[b] + j` for j < width: `[B]` -> `[B, width]`."""
    return first[:, None] + np.arange(width)


def pick(padded: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    """`padded[b, index[b, k]]`: `[B, K, ...]`, `[B, k]` -> `[B, k, ...]`; past the end, the last column."""
    index = torch.from_numpy(np.minimum(index, padded.shape[1] - 1)).to(padded.device)
    return padded[torch.arange(len(padded), device=padded.device)[:, None], index]


def window(padded: torch.Tensor, first: np.ndarray, width: int) -> torch.Tensor:
    """`padded[b, first[b] : first[b] + width]`: `[B, K, ...]` -> `[B, width, ...]`; past the end, the last column."""
    start = int(first[0])
    if start + width <= padded.shape[1] and (first == start).all():
        return padded[:, start : start + width]
    return pick(padded, columns(first, width))


class Ragged:
    """
    Vectors `[V]` of B rows that have different numbers of them. They are held as views of the tensors they came in:
    nothing is copied before a window of them is asked for.
    """

    def __init__(self, batch: int):
        self._rows: list[list[torch.Tensor]] = [[] for _ in range(batch)]

    def put(self, at: np.ndarray, new: torch.Tensor, first: np.ndarray, count: np.ndarray) -> None:
        """Lets `new[b, first[b] : first[b] + count[b]]` of `new` `[B, K, V]` follow the first `at[b]` of row b."""
        for row, vectors, have, start, n in zip(self._rows, new.unbind(0), at.tolist(), first.tolist(), count.tolist()):
            row[have:] = vectors.unbind(0)[start : start + n]

    def keep_rows(self, rows: np.ndarray) -> None:
        """Goes on with these rows alone."""
        self._rows = [self._rows[row] for row in rows.tolist()]

    def keep_first(self, count: np.ndarray) -> None:
        """Removes all but the first `count[b]` of row b."""
        for row, n in zip(self._rows, count.tolist()):
            del row[n:]

    def count(self, row: int) -> int:
        """How many vectors row b has."""
        return len(self._rows[row])

    def at(self, row: int, j: int) -> torch.Tensor:
        """The j-th vector `[V]` of row b."""
        return self._rows[row][j]

    def drop_first(self, count: np.ndarray) -> None:
        """Removes the first `count[b]` of row b, or all if it has less."""
        for row, n in zip(self._rows, count.tolist()):
            del row[:n]

    def window(self, first: np.ndarray, width: int) -> torch.Tensor:
        """`[B, width, V]`: those of row b from `first[b]` on; past its end, any. Some row must have any."""
        some = next(row[-1] for row in self._rows if row)
        chosen = []
        for row, start in zip(self._rows, first.tolist()):
            there = row[start : start + width]
            chosen += there + [some] * (width - len(there))
        if len(chosen) == 1:
            return chosen[0][None, None]
        return torch.stack(chosen).view(len(self._rows), width, -1)
