"""UncachedMember: a model that none of transformers' caches serve. It reads the whole text in every pass."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..compat import cache_names
from ..ensemble.padded import columns, pick
from .member import Member
from .runner import Runner


def can_cache(model: PreTrainedModel) -> bool:
    """Whether the model's `forward` takes one of transformers' caches."""
    return cache_names(model)[1] is not None and model._supports_default_dynamic_cache()


def member_of(
    model: PreTrainedModel,
    kwargs: dict[str, Any],
    prompt: torch.Tensor,
    runner: Runner | None = None,
) -> Member:
    """A `Member` with a cache where the model takes one, else one that reads the whole text in every pass."""
    return (Member if can_cache(model) else UncachedMember)(model, kwargs, prompt, runner)


class UncachedMember(Member):
    """
    A model without a cache, such as the first GPT, or with one of its own, such as RWKV. Every pass reads all tokens
    of the rows again: exact, and slow for long texts. Rows are padded behind their tokens. Arguments as for `Member`.
    """

    def __init__(self, model, kwargs, prompt, runner=None):
        self._begin(model, kwargs, prompt, runner or Runner(model))
        self.seen = np.zeros(len(prompt), int)
        self.settled = self.seen
        self.cache = None
        self.windowed = self.minds_hidden_slots = False  # a roll-back leaves no slots behind

    @property
    def in_step(self):
        return False

    @property
    def visible(self):
        """Which tokens `[B, S]` of the text attention sees."""
        index = np.arange(int(self.seen.max()))
        return self._visible(index < self.seen[:, None])

    def score(self, ids, end, width=0):
        """As `Member.score`; `width` plays no role."""
        before = np.maximum(self.seen, self.prompt_length - 1)
        index = columns(np.zeros_like(end), int(end.max()))
        inputs = self._inputs(
            ids[:, : index.shape[1]],
            self._visible(index < end[:, None]),
            positions=np.minimum(index, np.maximum(end - 1, 0)[:, None]),
            masked=False,
            use_cache=False,
            is_first_iteration=True,
        )
        needed = int((end - before).max())
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = index.shape[1]
        with self._lock:
            self.stopwatch.start()
            logits, _ = self.runner.run(inputs, 0)
            self.stopwatch.stop(None)
        self.seen, self.passes = np.maximum(self.seen, end), self.passes + 1
        return pick(logits[:, -index.shape[1] :], columns(before, needed))

    def _visible(self, read: np.ndarray) -> np.ndarray:
        """Of the tokens `[B, S]` that are read, those that the prompt's mask does not hide."""
        length = min(self.prompt_length, read.shape[1])
        read[:, :length] &= self.prompt_visible[:, :length]
        return read

    def forget(self, length, settled):
        self.seen, self.settled = np.minimum(self.seen, length), settled

    def insert_masked(self, slots):
        pass

    def release(self, length, copied=True):
        return None

    def close(self):
        pass

    def reorder(self, rows):
        self._reorder_prompt(rows)
        self.seen, self.settled = self.seen[rows.numpy()], self.settled[rows.numpy()]
