"""Records a trace while a call is decoded."""

from collections import deque
from dataclasses import replace

import numpy as np
import torch

from .data import DraftTrace, PassTrace, TokenTrace, Trace
from .text import CONTEXT


class NoRecord:
    """Records nothing."""

    on = False

    def ran(self, author: int, first: np.ndarray | None = None, count: np.ndarray | None = None) -> None:
        """A pass of an author has scored `count[b]` positions of row b from `first[b]` on; a generator's call none."""

    def timed(self, author: int, tokens: int, seconds: float) -> None:
        """The author's first pass that was not timed yet read so many tokens in each row."""

    def proposed(self, author: int, turn: int, count: np.ndarray) -> None:
        """An author has proposed `count[b]` tokens in row b in its n-th consecutive pass, from 1."""

    def verified(self, start, candidates, acceptance, outcome) -> None:
        """
        A round has ended.

        Args:
            start (`np.ndarray` `[B]`): The positions of the first tokens that were gained.
            candidates (`Candidates`): With `probs` and `q`.
            acceptance (`torch.Tensor` `[B, K]`): The proposals' probability of being kept.
            outcome (`Outcome`): What it has come to.
        """


class Recorder(NoRecord):
    """
    Builds a `Trace`.

    Args:
        prompt (`torch.LongTensor` `[B, P]`).
    """

    on = True

    def __init__(self, prompt: torch.Tensor):
        self.prompts = prompt[:, -CONTEXT:].tolist()
        self.rows: list[list[TokenTrace]] = [[] for _ in prompt]
        self.passes: list[PassTrace] = []
        self.round = 1
        self._untimed: dict[int, deque[int]] = {}  # by author
        self._pending: list[list[tuple[int, int]]] = [[] for _ in prompt]  # author and place of proposals
        self._scored: list[dict[int, list[int]]] = [{} for _ in prompt]  # passes by position

    def ran(self, author, first=None, count=None):
        index = len(self.passes)
        self.passes.append(PassTrace(author, self.round, tokens=0, seconds=0.0))
        self._untimed.setdefault(author, deque()).append(index)
        if first is not None:
            for scored, start, n in zip(self._scored, first.tolist(), count.tolist()):
                for position in range(start, start + n):
                    scored.setdefault(position, []).append(index)

    def timed(self, author, tokens, seconds):
        index = self._untimed[author].popleft()
        self.passes[index] = replace(self.passes[index], tokens=tokens, seconds=seconds)

    def proposed(self, author, turn, count):
        for pending, n in zip(self._pending, count.tolist()):
            pending += [(author, turn + j) for j in range(n)]

    def verified(self, start, candidates, acceptance, outcome):
        drafts = candidates.tokens.unsqueeze(-1)
        r, q = (values.gather(-1, drafts).squeeze(-1).tolist() for values in (candidates.probs, candidates.q))
        drafts, acceptance = drafts.squeeze(-1).tolist(), acceptance.tolist()
        for b, (n, kept) in enumerate(zip(outcome.gained.tolist(), outcome.kept.tolist())):
            for j in range(n):
                draft = None
                if j < candidates.proposed[b]:
                    draft = DraftTrace(drafts[b][j], *self._pending[b][j], q[b][j], r[b][j], acceptance[b][j])
                token = drafts[b][j] if j < kept else int(outcome.tokens[b])
                position = int(start[b]) + j
                self.rows[b].append(
                    TokenTrace(
                        row=b,
                        position=position,
                        token=token,
                        probability=float(candidates.probs[b, j, token]),
                        draft=draft,
                        round=self.round,
                        passes=tuple(self._scored[b].pop(position)),
                    )
                )
            del self._pending[b][: None if outcome.falls[b] else n]
            if outcome.falls[b]:
                self._scored[b].clear()
        self.round += 1

    def trace(
        self, names: list[str], order: tuple[int, ...], members: int, lengths, seconds: float, rule: str, owners=None
    ):
        """
        What was recorded, as a `Trace`.

        Args:
            names (`list[str]`, A): Of the authors, in the caller's order.
            order (`tuple[int, ...]`, A): The caller's number of each author.
            members (`int`): Of them.
            lengths (`np.ndarray` `[B]`): Tokens of the rows' texts; what was verified behind their ends is left out.
            seconds (`float`), rule (`str`): As in `Trace`.
            owners (`np.ndarray` `[B, T]`, *optional*): The caller's numbers of the members that tokens were drawn from.
        """

        def called(thing: DraftTrace | PassTrace | None):
            return thing and replace(thing, author=order[thing.author])

        def owner(token: TokenTrace) -> int | None:
            return None if owners is None else int(owners[token.row, token.position])

        rows = [
            [replace(token, draft=called(token.draft), owner=owner(token)) for token in row[:length]]
            for row, length in zip(self.rows, lengths.tolist())
        ]
        return Trace(names, members, rows, [called(run) for run in self.passes], seconds, rule, self.prompts)
