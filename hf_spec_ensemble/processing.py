"""Applies a call's logits processors to several pending positions at once, each with its own prefix."""

from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from .grammar import GrammarMask, holds_grammar
from .padded import pick
from .prefix import PrefixConstraint


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

BY_ROW = (GrammarMask, PrefixConstraint)  # called for all positions at once, and asking row by row

# Processors that keep state from call to call and rely on one call a token, in order.
STATEFUL = (hf.UnbatchedClassifierFreeGuidanceLogitsProcessor, hf.SynthIDTextWatermarkLogitsProcessor)


class PositionwiseProcessor:
    """
    A `LogitsProcessorList` for pending positions.

    A processor that depends on the prefix is called once for each distinct prefix length, always with all B rows in
    order, since it may keep something per row. In the place of a row that has no such prefix it is shown another row's,
    and its result for that row is not used. `prefix_allowed_tokens_fn` and xgrammar's grammars are asked row by row.

    Positions come out of order, and once for each member, so a processor must not keep state from call to call. One
    from outside transformers that changes itself when it is called is taken to do so, unless it says of itself
    `stateless = True`: that what it returns depends on its arguments only. xgrammar's is known, and goes back.

    Args:
        processors (`LogitsProcessorList`): As `generate()` prepared it.
        in_order (`bool`): Whether it will be called just once for each token, in order, so that state does no harm.
        beams (`bool`): Whether rows are beams of one prompt, which `prefix_allowed_tokens_fn` constrains together.
    """

    def __init__(self, processors: LogitsProcessorList, in_order: bool = False, beams: bool = False):
        self.processors = [_by_row(one, beams) for one in processors]
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
            elif isinstance(processor, BY_ROW):
                logits = processor(logits, ids, first, count)
            else:
                logits = self._by_position(processor, logits, ids, first, count)
        return logits

    def allowed(self, row: int, ids: torch.Tensor, draft: list[int]) -> int:
        """How many tokens of a draft all functions of prefixes allow; arguments as `PrefixConstraint.allowed`."""
        constraints = [one for one in self.processors if isinstance(one, PrefixConstraint)]
        return min([constraint.allowed(row, ids, draft) for constraint in constraints], default=len(draft))

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
                prefix[torch.from_numpy(short).to(prefix.device)] = ids[rows[0], :length]
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


def _by_row(processor: Any, beams: bool) -> Any:
    if holds_grammar(processor):
        return GrammarMask(processor)
    if type(processor) is hf.PrefixConstrainedLogitsProcessor and not beams:
        return PrefixConstraint(processor)
    return processor


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
