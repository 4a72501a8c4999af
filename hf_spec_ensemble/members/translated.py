"""TranslatedMember: a member with a tokenizer of its own, which reads and scores the tokens of a union."""

import numpy as np
import torch

from ..ensemble.padded import pick
from ..ensemble.union import Map
from .member import Member


class TranslatedMember(Member):
    """
    A member that the others see as one of the union's vocabulary U: tokens, counts and logits are U's. Inside, a model
    reads its own tokens. One token of U may be several of these, which it reads in one pass; the logits after the last
    one are given. Texts are not decoded: a token is translated by itself, whatever stands before it.

    State: the own tokens of what it has read, and behind how many of them each token of U ends.

    Args:
        inner (`Member`): That reads; not `in_step` where there are several rows.
        way (`Map`): Between its tokens and U.
    """

    def __init__(self, inner: Member, way: Map):
        self.inner, self.way = inner, way.to(inner.device)
        self.model, self.runner, self.device = inner.model, inner.runner, inner.device
        self.prompt, self.prompt_visible = inner.prompt, inner.prompt_visible
        self.stopwatch, self.kwargs = inner.stopwatch, inner.kwargs
        self.settled = inner.settled
        batch = len(self.prompt)
        self._own = torch.zeros(batch, 0, dtype=torch.long)  # [B, >= own tokens], on the host
        self._ends = [[0] for _ in range(batch)]  # own tokens before each token of U that was read, and after the last

    @property
    def cache(self):
        return self.inner.cache

    @property
    def passes(self) -> int:
        return self.inner.passes

    @property
    def seen(self) -> np.ndarray:
        count = np.array([len(ends) - 1 for ends in self._ends])
        return np.where(self.inner.seen < 0, self.inner.seen, count)

    @property
    def in_step(self):
        return self.inner.in_step

    @property
    def visible(self):
        return self.inner.visible

    @property
    def can_refill(self):
        return self.inner.can_refill

    @property
    def can_keep_rows(self):
        return self.inner.can_keep_rows

    def score(self, new, end, width=0, skip=0):
        if end.max() < 0:  # a part of the prompt, which is in its own tokens
            return self.inner.score(self._own, end)
        seen = self.seen
        first = np.maximum(seen + 1, 0) + skip  # [B]: the tokens of U that logits are wanted for, from here to `end`
        wanted = int((end - np.maximum(seen, -1)).max()) - skip
        reads = end > seen
        self._translate(new, np.maximum(seen, 0), end)
        own_seen, own_end = self.inner.seen, self._own_counts(end)
        own_first = np.maximum(own_seen + 1, 0)
        last = np.maximum(first, end)[:, None]
        ends = np.minimum(first[:, None] + np.arange(wanted), last)  # [B, K]: after so many tokens of U
        column = np.stack([self._own_counts(after) for after in ends.T], axis=1) - own_first[:, None]
        own_skip = min(int(column[reads].min()), int((own_end - np.maximum(own_seen, -1)).max()) - 1)
        # What is final by now it need not read again
        self.inner.forget(np.maximum(own_seen, 0), self._own_counts(np.minimum(self.settled, end)))
        logits = self.inner.score(self._own, own_end, width, own_skip)
        return self.way.logits(pick(logits, np.maximum(column - own_skip, 0)))

    def forget(self, length, settled):
        for ends, n in zip(self._ends, length.tolist()):
            del ends[n + 1 :]
        self.settled = settled
        self.inner.forget(self._own_counts(length), self._own_counts(settled))

    def prefill(self, prompt, mask, part=0):
        return TranslatedMember(self.inner.prefill(prompt, mask), self.way)

    def refill(self, row, reader, part=0):
        self.inner.refill(row, reader.inner)
        self._ends[row] = [0]
        self.settled = np.where(np.arange(len(self.prompt)) == row, 0, self.settled)

    def reorder(self, rows):
        self.inner.reorder(rows)
        self.prompt, self.prompt_visible = self.inner.prompt, self.inner.prompt_visible
        self._own, self._ends = self._own[rows], [list(self._ends[row]) for row in rows.tolist()]
        self.settled = self.settled[rows.numpy()]

    def release(self, length, copied=True):
        return self.inner.release(int(self._own_counts(np.minimum(self.seen, length)).min()), copied)

    def close(self):
        self.inner.close()

    def _own_counts(self, count: np.ndarray) -> np.ndarray:
        """How many own tokens `[B]` so many tokens of U are, as far as they were read."""
        return np.array([ends[min(max(n, 0), len(ends) - 1)] for ends, n in zip(self._ends, count.tolist())])

    def _translate(self, new: torch.Tensor, first: np.ndarray, end: np.ndarray) -> None:
        """Appends the own tokens of `new[b, first[b]:end[b]]` to those of row b."""
        start, stop = int(first.min()), int(end.max())
        tokens = new[:, start:stop].tolist()
        added = []
        for row, ends, a, b in zip(tokens, self._ends, first.tolist(), end.tolist()):
            own = []
            for u in row[a - start : max(b - start, 0)]:
                own += self.way.read(u)
                ends.append(ends[a] + len(own))
            added.append((ends[a], own))
        room = max(at + len(own) for at, own in added)
        if room > self._own.shape[1]:
            self._own = torch.nn.functional.pad(self._own, (0, 2 * room - self._own.shape[1]))
        for row, (at, own) in enumerate(added):
            self._own[row, at : at + len(own)] = torch.tensor(own, dtype=torch.long)


def translated(way: Map, rows: list[list[int]], begin: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Whole texts of the union in a member's own tokens.

    Args:
        way (`Map`): The member's.
        rows (`list[list[int]]`, B): Tokens of U, T of each row.
        begin (`list[int]`): Its tokens before a text.

    Returns:
        `torch.LongTensor`: Own tokens `[B, L]`, padded behind; their mask; and `[B, T]`, where in L each of the rows'
        tokens ends.
    """
    texts, ends = [], []
    for row in rows:
        own = list(begin)
        ends.append([])
        for u in row:
            read = way.read(u)
            own += () if own == list(read) == begin else read  # what begins a text stands there once
            ends[-1].append(len(own) - 1)
        texts.append(torch.tensor(own))
    mask = [torch.ones_like(text) for text in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(texts, batch_first=True), pad(mask, batch_first=True), torch.tensor(ends)
