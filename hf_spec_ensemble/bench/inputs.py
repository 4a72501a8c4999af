"""Prompts as models take them."""

from collections.abc import Mapping, Sequence

import torch


def batch_of(prompts: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """
    Prompts as `input_ids` and `attention_mask` `[B, P]`, padded on the left.

    >>> from hf_spec_ensemble.bench.inputs import batch_of

    >>> batch_of([[5, 6], [7]], pad=0, device="cpu")["input_ids"].tolist()
    [[5, 6], [0, 7]]
    """
    longest = max(len(ids) for ids in prompts)
    gaps = [longest - len(ids) for ids in prompts]
    ids = [[pad] * gap + list(ids) for gap, ids in zip(gaps, prompts)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def lengthened(inputs: Mapping[str, torch.Tensor], more: int, at_most: int | None) -> dict[str, torch.Tensor]:
    """Prompts with any so many tokens behind them, cut in front to `at_most`."""
    longer = {name: torch.cat([x, x[:, -1:].repeat(1, more)], dim=1) for name, x in inputs.items()}
    return longer if at_most is None else {name: x[:, -max(at_most, 1) :] for name, x in longer.items()}
