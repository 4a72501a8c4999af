"""Applies a call's logits processors to several pending positions at once, each with its own prefix."""

from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from .grammar import GrammarMask, holds_grammar
from .padded import pick


# Processors that read the scores only: one call serves all positions. Every other one is called position by position.
POSITION_FREE = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.TopHLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
)

# Processors that keep state from call to call and rely on one call a token, in order.
STATEFUL = (hf.UnbatchedClassifierFreeGuidanceLogitsProcessor, hf.SynthIDTextWatermarkLogitsProcessor)


class PositionwiseProcessor:
    """
    A `LogitsProcessorList` for pending positions.

    A processor that depends on the prefix is called once for each distinct prefix length, always with all B rows in
    order, since it may keep something per row. Rows that are shorter than that length are padded on the left, as a
    shorter prompt would be, and their result is not used.

    Positions come out of order, and once for each member, so a processor must not keep state from call to call. One
    from outside transformers that changes itself when it is called is taken to do so, unless it says of itself
    `stateless = True`: that what it returns depends on its arguments only. xgrammar's is known, and goes back.

    Args:
        processors (`LogitsProcessorList`): As `generate()` prepared it.
        pad_token_id (`int`): Fills prefixes of rows that are shorter than others.
        in_order (`bool`): Whether it will be called just once for each token, in order, so that state does no harm.
    """

    def __init__(self, processors: LogitsProcessorList, pad_token_id: int = 0, in_order: bool = False):
        self.processors = [GrammarMask(one) if holds_grammar(one) else one for one in processors]
        self.pad_token_id = pad_token_id
        self.in_order = in_order

    def __call__(self, logits: torch.Tensor, ids: torch.Tensor, first: np.ndarray, count: np.ndarray) -> torch.Tensor:
        """
        Args:
            logits (`torch.Tensor` `[B, K, V]`): Not changed.
            ids (`torch.LongTensor` `[B, >= T]`): The rows' tokens.
            first (`np.ndarray` `[B]`): Index in `ids` of the token that `logits[b, 0]` predicts.
            count (`np.ndarray` `[B]`): How many of the K positions of a row matter.

        Returns:
            `torch.Tensor` `[B, K, V]`: Processed logits; arbitrary where `k >= count[b]`.

        Raises:
            `ValueError`: if a processor keeps state from call to call.
        """
        if not self.processors:
            return logits
        logits = logits.clone()  # some processors write to their argument
        for processor in self.processors:
            if type(processor) in POSITION_FREE:
                flat = logits.flatten(0, 1)  # [B * K, V]
                logits = processor(ids.new_empty(len(flat), 0), flat).view_as(logits)
            elif isinstance(processor, GrammarMask):
                logits = processor(logits, ids, first, count)
            else:
                logits = self._by_position(processor, logits, ids, first, count)
        return logits

    def _by_position(self, processor, logits, ids, first, count) -> torch.Tensor:
        out = logits.clone()
        known = first + count - 1  # tokens of each row up to its last position that matters
        lengths = sorted({int(f) + j for f, c in zip(first, count) for j in range(int(c))})
        for length in lengths:
            column = length - first  # [B]
            rows = np.flatnonzero((column >= 0) & (column < count))
            prefix = ids[:, :length]
            short = np.flatnonzero(known < length)
            if len(short):
                prefix = prefix.clone()
                for row in short.tolist():
                    have = max(min(int(known[row]), length), 0)
                    prefix[row] = self.pad_token_id
                    prefix[row, length - have :] = ids[row, :have]
            scores = pick(logits, np.maximum(column, 0)[:, None])[:, 0]  # [B, V]
            rows, column = (torch.from_numpy(x).to(out.device) for x in (rows, column[rows]))
            watched = not (self.in_order or _is_known(processor))
            before = _state(processor) if watched else {}
            out[rows, column] = processor(prefix, scores).to(out.dtype)[rows]
            if watched and (changed := _changed(before, _state(processor))):
                raise ValueError(
                    f"{type(processor).__name__} keeps state from call to call (its `{changed}` has changed), while an "
                    "ensemble calls processors out of order and once for each member. Use EnsembleConfig("
                    "speculative=False, combine_on='raw_logits'), which calls it once for each token, in order; or, if "
                    "what it returns depends on its arguments only, set `stateless = True` on it."
                )
        return out


def _is_known(processor: Any) -> bool:
    return type(processor).__module__.startswith("transformers.") or getattr(processor, "stateless", False)


def _state(processor: Any) -> dict[str, tuple]:
    """What tells whether a processor has changed, as far as it can be told without looking into its attributes."""
    sized = (list, tuple, dict, set)
    return {
        name: (id(value), len(value) if isinstance(value, sized) else 0, getattr(value, "_version", 0))
        for name, value in getattr(processor, "__dict__", {}).items()
        if value is not None  # what is made when it is first needed is no state
    }


def _changed(before: dict[str, tuple], after: dict[str, tuple]) -> str | None:
    """The name of an attribute that has changed or gone."""
    return next((name for name, state in before.items() if after.get(name) != state), None)
