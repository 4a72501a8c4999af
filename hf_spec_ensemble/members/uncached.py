"""UncachedMember: a model without transformers' caches. It reads the whole text in every pass."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..compat import cache_names
from ..ensemble.padded import columns, pick
from .cached import CachedMember
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
    """A member with a cache where the model takes one, else one that reads the whole text in every pass."""
    return (CachedMember if can_cache(model) else UncachedMember)(model, kwargs, prompt, runner)


class UncachedMember(Member):
    """
    A model without a cache, such as the first GPT, or with one of its own, such as RWKV. Every pass reads all tokens
    of the rows again: exact, and slow for long texts. Rows are padded behind their tokens. Arguments as for `Member`.
    """

    @property
    def visible(self):
        return self._visible(self._index(self.seen) < self.seen[:, None])

    def score(self, new, end, width=0, skip=0):
        """As `Member.score`; `width` is ignored."""
        before = np.maximum(self.seen, -1)
        index = self._index(end)  # [B, S]
        inputs = self._inputs(
            self._text(new, int(end.max())),
            self._visible(index < end[:, None]),
            positions=np.minimum(index, (end - 1)[:, None]),
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
        return pick(logits[:, -index.shape[1] :], columns(before + self.prompt_length + skip, needed - skip))

    def forget(self, length, settled):
        self.seen, self.settled = np.minimum(self.seen, length), settled

    def _index(self, end: np.ndarray) -> np.ndarray:
        """The numbers `[B, S]` of the tokens up to the longest row's end, those of the prompt negative."""
        return columns(np.full_like(end, -self.prompt_length), self.prompt_length + max(int(end.max()), 0))

    def _visible(self, read: np.ndarray) -> np.ndarray:
        """Of the tokens `[B, S]` that are read, those that the prompt's mask does not hide."""
        read[:, : self.prompt_length] &= self.prompt_visible
        return read
