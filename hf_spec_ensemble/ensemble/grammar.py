"""Grammar constraints for pending positions: xgrammar's processor has one state a row and takes tokens in order."""

from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor


KEPT = 64  # prefixes of a row for which the allowed tokens are kept


def holds_grammar(processor: LogitsProcessor) -> bool:
    """Whether this is xgrammar's processor for `generate()`."""
    return type(processor).__module__.startswith("xgrammar.") and hasattr(processor, "compiled_grammars")


class GrammarMask:
    """
    Allows what the grammars of xgrammar's processor allow after any prefix, in whatever order they come. The processor
    itself is not called, and not changed.

    Args:
        processor (`xgrammar.contrib.hf.LogitsProcessor`): With one grammar, or one for each row.

    Raises:
        `ValueError`: when called with another number of rows than it has grammars.
    """

    def __init__(self, processor: LogitsProcessor):
        self._grammars = processor.compiled_grammars
        self._rows: list[_Row] = []
        self._prompt_length = 0

    def __call__(self, logits: torch.Tensor, ids: torch.Tensor, first: np.ndarray, count: np.ndarray) -> torch.Tensor:
        """
        As `PositionwiseProcessor`. The first call is for the first new token. Positions behind a token that the grammar
        does not allow, and behind the end of the text, are left as they are.
        """
        if not self._rows:
            self._begin(len(ids), int(first.max()))
        logits = logits.clone()
        known = ids[:, : int((first + count).max())].tolist()
        for b, row in enumerate(self._rows):
            for j in range(int(count[b])):
                allowed = row.allowed_after(known[b][self._prompt_length : int(first[b]) + j])
                if allowed is not None:
                    width = min(len(allowed), logits.shape[-1])
                    logits[b, j, :width].masked_fill_(~allowed[:width].to(logits.device), -torch.inf)
                    logits[b, j, width:] = -torch.inf  # tokens that the grammar does not know
        return logits

    def _begin(self, batch: int, prompt_length: int) -> None:
        if len(self._grammars) not in (1, batch):
            raise ValueError(
                f"The grammar processor has {len(self._grammars)} grammars for {batch} rows: give it one, or one for "
                "each row."
            )
        grammars = self._grammars * (batch // len(self._grammars))
        self._rows = [_Row(grammar) for grammar in grammars]
        self._prompt_length = prompt_length


class _Row:
    """One row's matcher, what it has accepted, and what it allowed after every part of that."""

    def __init__(self, grammar: Any):
        import xgrammar

        self._allocate = lambda: xgrammar.allocate_token_bitmask(1, grammar.tokenizer_info.vocab_size)
        self._matcher = xgrammar.GrammarMatcher(grammar)
        self._accepted: list[int] = []
        self._allowed: dict[int, torch.Tensor | None] = {}  # [V] by number of tokens

    def allowed_after(self, tokens: list[int]) -> torch.Tensor | None:
        """Which tokens `[V]` may follow these; `None` where the grammar says nothing."""
        same = next((i for i, (a, b) in enumerate(zip(self._accepted, tokens)) if a != b), None)
        same = min(len(self._accepted), len(tokens)) if same is None else same
        if same == len(tokens) and same in self._allowed:
            return self._allowed[same]
        self._go_back(same)
        for token in tokens[same:]:
            if self._matcher.is_terminated() or not self._matcher.accept_token(token):
                return None
            self._accepted.append(token)
        self._allowed[len(tokens)] = None if self._matcher.is_terminated() else self._fill()
        if len(self._allowed) > KEPT:
            del self._allowed[min(self._allowed)]
        return self._allowed[len(tokens)]

    def _go_back(self, length: int) -> None:
        if length < len(self._accepted):
            self._matcher.rollback(len(self._accepted) - length)
            del self._accepted[length:]
            self._allowed = {n: allowed for n, allowed in self._allowed.items() if n <= length}

    def _fill(self) -> torch.Tensor:
        bitmask = self._allocate()  # [1, V / 32], int32
        self._matcher.fill_next_token_bitmask(bitmask)
        bits = bitmask[0, :, None] >> torch.arange(32, dtype=torch.int32)
        return (bits & 1).bool().flatten()
