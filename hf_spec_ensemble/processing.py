"""Applies a call's logits processors to several pending positions at once, each with its own prefix."""

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

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

    Args:
        processors (`LogitsProcessorList`): As `generate()` prepared it; must not keep state from call to call.
        pad_token_id (`int`): Fills prefixes of rows that are shorter than others.
    """

    def __init__(self, processors: LogitsProcessorList, pad_token_id: int = 0):
        self.processors = processors
        self.pad_token_id = pad_token_id

    def __call__(self, logits: torch.Tensor, ids: torch.Tensor, first: np.ndarray, count: np.ndarray) -> torch.Tensor:
        """
        Args:
            logits (`torch.Tensor` `[B, K, V]`): Not changed.
            ids (`torch.LongTensor` `[B, >= T]`): The rows' tokens.
            first (`np.ndarray` `[B]`): Index in `ids` of the token that `logits[b, 0]` predicts.
            count (`np.ndarray` `[B]`): How many of the K positions of a row matter.

        Returns:
            `torch.Tensor` `[B, K, V]`: Processed logits; arbitrary where `k >= count[b]`.
        """
        if not self.processors:
            return logits
        logits = logits.clone()  # some processors write to their argument
        for processor in self.processors:
            if type(processor) in POSITION_FREE:
                flat = logits.flatten(0, 1)  # [B * K, V]
                logits = processor(ids.new_empty(len(flat), 0), flat).view_as(logits)
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
            out[rows, column] = processor(prefix, scores).to(out.dtype)[rows]
        return out
