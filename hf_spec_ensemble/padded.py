"""Rows of different lengths in one padded tensor `[B, K, ...]`: pure functions, each a view where rows agree.

Lengths are numpy integers `[B]`: deciding on them waits for no device, and costs little where there are few.
"""

import numpy as np
import torch


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


def append(padded: torch.Tensor | None, lengths: np.ndarray, new: torch.Tensor, added: np.ndarray) -> torch.Tensor:
    """Puts the first `added[b]` columns of `new` `[B, K', ...]` behind the first `lengths[b]` of `padded`."""
    have, more = int(lengths[0]), int(added[0])
    if (lengths == have).all() and (added == more).all():
        return torch.cat([padded[:, :have], new[:, :more]], dim=1) if have else new[:, :more]
    if padded is None:
        return new
    out = padded.new_zeros(len(new), int((lengths + added).max()), *new.shape[2:])
    out[:, : padded.shape[1]] = padded[:, : out.shape[1]]
    rows, source = (np.arange(new.shape[1]) < added[:, None]).nonzero()
    rows, source, target = (torch.from_numpy(x).to(out.device) for x in (rows, source, lengths[rows] + source))
    out[rows, target] = new[rows, source]
    return out


def drop_first(padded: torch.Tensor | None, count: np.ndarray) -> torch.Tensor | None:
    """Removes the first `count[b]` columns of row b; what a shorter row has at its end is arbitrary."""
    if padded is None or (count == count[0]).all():
        return padded if padded is None or not count[0] else padded[:, int(count[0]) :]
    kept = max(padded.shape[1] - int(count.min()), 0)
    return pick(padded, columns(count, kept))
