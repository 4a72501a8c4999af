"""Rows of different lengths in one padded tensor `[B, K, ...]`: pure functions, each a view where rows agree.

Lengths are `torch.long` tensors `[B]` on the CPU, so that deciding on them never waits for a device.
"""

import torch


def columns(first: torch.Tensor, width: int) -> torch.Tensor:
    """`first[b] + j` for j < width: `[B]` -> `[B, width]`."""
    return first[:, None] + torch.arange(width)


def pick(padded: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`padded[b, index[b, k]]`: `[B, K, ...]`, `[B, k]` -> `[B, k, ...]`; past the end, the last column."""
    index = index.clamp(max=padded.shape[1] - 1).to(padded.device)
    return padded[torch.arange(len(padded), device=padded.device)[:, None], index]


def window(padded: torch.Tensor, first: torch.Tensor, width: int) -> torch.Tensor:
    """`padded[b, first[b] : first[b] + width]`: `[B, K, ...]` -> `[B, width, ...]`; past the end, the last column."""
    start = int(first[0])
    if start + width <= padded.shape[1] and (len(first) == 1 or (first == start).all()):
        return padded[:, start : start + width]
    return pick(padded, columns(first, width))


def append(padded: torch.Tensor | None, lengths: torch.Tensor, new: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Puts the first `added[b]` columns of `new` `[B, K', ...]` behind the first `lengths[b]` of `padded`."""
    if (lengths == lengths[0]).all() and (added == added[0]).all():
        new = new[:, : int(added[0])]
        return torch.cat([padded[:, : int(lengths[0])], new], dim=1) if padded is not None and lengths[0] else new
    if padded is None:
        return new
    out = padded.new_zeros(len(new), int((lengths + added).max()), *new.shape[2:])
    out[:, : padded.shape[1]] = padded[:, : out.shape[1]]
    rows, source = (torch.arange(new.shape[1]) < added[:, None]).nonzero(as_tuple=True)
    target = (lengths[rows] + source).to(out.device)
    rows, source = rows.to(out.device), source.to(out.device)
    out[rows, target] = new[rows, source]
    return out


def drop_first(padded: torch.Tensor | None, count: torch.Tensor) -> torch.Tensor | None:
    """Removes the first `count[b]` columns of row b; what a shorter row has at its end is arbitrary."""
    if padded is None or (count == count[0]).all():
        return padded if padded is None else padded[:, int(count[0]) :]
    kept = max(padded.shape[1] - int(count.min()), 0)
    return pick(padded, columns(count, kept))
