"""Applies a call's logits processors to several pending positions at once, each with its own prefix."""

from collections.abc import Iterable
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

# transformers' own that keep state from call to call and rely on one call a token, in order.
STATEFUL = (
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    hf.SynthIDTextWatermarkLogitsProcessor,
    hf.DiaEOSDelayPatternLogitsProcessor,
)


class PositionwiseProcessor:
    """
    A `LogitsProcessorList` for pending positions.

    Processors that `may_run_ahead` are called for positions that may yet be rejected, out of order and once for each
    member. One that depends on the prefix is called once for each distinct prefix length, always with all B rows in
    order, since it may keep something per row. In the place of a row that has no such prefix it is shown another row's,
    and its result for that row is not used. `prefix_allowed_tokens_fn` and xgrammar's grammars are asked row by row.

    Any other processor is called as in `generate()`: once for each token, in order, on final tokens, with the texts of
    all rows at the same length. While there is one (`once_a_token`), whoever calls this settles column by column.

    Args:
        processors (`LogitsProcessorList`): As `generate()` prepared it.
        pad_token_id (`int`, defaults to 0): Follows the end of a row's text, where others go on.
        beams (`bool`, defaults to `False`): Whether rows are beams of one prompt, which `prefix_allowed_tokens_fn`
            constrains together.
    """

    def __init__(self, processors: LogitsProcessorList, pad_token_id: int = 0, beams: bool = False):
        self.once_a_token = bool(in_order_only(processors))
        self.processors = [_by_row(one, beams) for one in flat(processors)]
        self.pad_token_id = pad_token_id

    def __call__(
        self, logits: torch.Tensor, ids: torch.Tensor, first: np.ndarray, count: np.ndarray, final: bool = True
    ) -> torch.Tensor:
        """
        Args:
            logits (`torch.Tensor` `[B, K, V]`): Not changed.
            ids (`torch.LongTensor` `[B, >= T]`): The rows' tokens.
            first (`np.ndarray` `[B]`): Index in `ids` of the token that `logits[b, 0]` predicts.
            count (`np.ndarray` `[B]`): How many of the K positions of a row matter; while `once_a_token`, 1 of rows
                that go on, which must all be equally long, and 0 of others.
            final (`bool`, defaults to `True`): `False` leaves out the processors that may not run ahead.

        Returns:
            `torch.Tensor` `[B, K, V]`: Processed logits; arbitrary where `k >= count[b]`.
        """
        if not self.processors:
            return logits
        logits = logits.clone()  # some processors write to their argument
        for processor in self.processors:
            if type(processor) in POSITION_FREE:
                rows = logits.flatten(0, 1)  # [B * K, V]
                logits = processor(ids.new_empty(len(rows), 0), rows).view_as(logits)
            elif isinstance(processor, BY_ROW):
                logits = processor(logits, ids, first, count)
            elif may_run_ahead(processor):
                logits = self._by_position(processor, logits, ids, first, count)
            elif final:
                logits = self._once(processor, logits, ids, first, count)
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
            out[rows, column] = processor(prefix, scores).to(out.dtype)[rows]
        return out

    def _once(self, processor, logits, ids, first, count) -> torch.Tensor:
        length = int(first[count > 0][0])
        prefix = ids[:, :length].clone()  # it may keep it
        for row in np.flatnonzero(first < length).tolist():
            prefix[row, int(first[row]) :] = self.pad_token_id
        out = logits.clone()
        out[:, 0] = processor(prefix, logits[:, 0]).to(out.dtype)
        return out


def flat(processors: Iterable[Any]) -> list[Any]:
    """The processors, those of lists among them one by one."""
    return [
        one
        for processor in processors
        for one in (flat(processor) if isinstance(processor, LogitsProcessorList) else [processor])
    ]


def may_run_ahead(processor: Any) -> bool:
    """
    Whether a processor may be called out of order, for positions that may be rejected, and several times for one: if it
    is transformers' own and keeps no state, if it is xgrammar's, or if it says of itself `stateless = True`.
    """
    own = type(processor).__module__.startswith("transformers.") and not isinstance(processor, STATEFUL)
    return own or holds_grammar(processor) or getattr(processor, "stateless", False) is True


def in_order_only(processors: Iterable[Any]) -> list[str]:
    """The names of those that may not run ahead."""
    return [getattr(one, "__name__", type(one).__name__) for one in flat(processors) if not may_run_ahead(one)]


def _by_row(processor: Any, beams: bool) -> Any:
    if holds_grammar(processor):
        return GrammarMask(processor)
    if type(processor) is hf.PrefixConstrainedLogitsProcessor and not beams:
        return PrefixConstraint(processor)
    return processor
