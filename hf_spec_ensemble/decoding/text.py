"""Text: the rows' new tokens, final and pending, which all authors share."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch


ROOM = 256  # tokens that there is room for at least, if texts may become so long


@dataclass(frozen=True)
class Proposal:
    """
    Tokens that an author proposes to follow the rows' texts.

    Args:
        author (`int`): Whose they are.
        tokens (`torch.LongTensor` `[B, L]`): Padded behind each row's.
        drawn (`list[list[int]]`, B): The same, not padded; empty for rows in which nothing is proposed.
        confidence (`list[float | None]`, B): How sure the author is of each of a row's tokens: the probability of its
            most probable one there, say. `None` for rows in which nothing can be proposed.
        q (`torch.Tensor` `[B, L, V]`, *optional*): What they were drawn from, as probabilities, where that is needed.
        forbidden (`np.ndarray` `[B]`, *optional*): Rows whose last token is one that a processor forbids.
    """

    author: int
    tokens: torch.Tensor
    drawn: list[list[int]]
    confidence: list[float | None]
    q: torch.Tensor | None = None
    forbidden: np.ndarray | None = None

    @property
    def count(self) -> np.ndarray:
        """How many tokens `[B]` each row is given."""
        return np.array([len(tokens) for tokens in self.drawn])


@dataclass(frozen=True)
class Outcome:
    """
    What a verification has come to. All are numpy `[B]`, but for the tensor of tokens.

    Args:
        kept: Proposals kept, in front.
        gained: Tokens gained: those kept and perhaps one that was drawn.
        falls: Whether what was pending behind these falls.
        tokens: The token that was drawn, on the host; arbitrary in rows that kept all they gained.
        emitted (`torch.LongTensor` `[B]`): The same, on the device.
    """

    kept: np.ndarray
    gained: np.ndarray
    falls: np.ndarray
    tokens: np.ndarray
    emitted: torch.Tensor

    @property
    def draws(self) -> np.ndarray:
        """Rows `[B]` in which a token was drawn."""
        return self.gained > self.kept


class Text:
    """
    The rows' new tokens: final ones, then those that are pending, that is proposed and not verified. Positions count
    new tokens, from 0; counts are numpy integers `[B]`. Authors read their own prompts, then these.

    Rows are those of one call, which share its prompt's length and wait for each other, or each is a call of its own
    (`apart`): then its prompt begins where it `starts`, and when its text has ended it can be given another.

    State: all of it is here, and is changed by `append`, `settle`, `retire`, `refill` and `keep_rows`, which
    `EnsembleCandidateGenerator` and the loop call. Everyone else reads.

    Args:
        prompt (`torch.LongTensor` `[B, P]`): The main model's, which logits processors and drafters see.
        max_new_tokens (`int` or `np.ndarray` `[B]`): Of the longest text, or of each row's.
        stop_tokens (`Collection[int]`): Tokens after which nothing is proposed.
        starts (`np.ndarray` `[B]`, *optional*): Of rows that are apart, where in `prompt` their own begins.
        numbers (`np.ndarray` `[B]`, *optional*): Of these, the prompts'.
    """

    def __init__(
        self,
        prompt: torch.Tensor,
        max_new_tokens: int | np.ndarray,
        stop_tokens: Collection[int] = (),
        starts: np.ndarray | None = None,
        numbers: np.ndarray | None = None,
    ):
        batch, self.prompt_length = prompt.shape
        self.max_new_tokens = np.zeros(batch, int) + max_new_tokens
        self.apart = starts is not None
        self.starts = starts if self.apart else np.zeros(batch, int)
        self.numbers = numbers if self.apart else np.arange(batch)
        self.stop_tokens = frozenset(stop_tokens)
        self.ids = prompt  # [B, >= P + max(total)]: the prompts, then the new tokens
        self.final = np.zeros(batch, int)
        self.total = np.zeros(batch, int)
        self.active = np.ones(batch, bool)  # rows whose text goes on
        self.pending: list[list[tuple[int, float]]] = [[] for _ in range(batch)]  # author and confidence of proposals
        self.drawn: list[list[int]] = [[] for _ in range(batch)]  # and which they are
        # Of every final token: whose proposal was verified there, `None` if there was none, and whether it was kept
        self.fates: list[list[tuple[int | None, bool]]] = [[] for _ in range(batch)]
        self._sealed = np.zeros(batch, bool)  # the last token ends the text: nothing follows it
        self._barred = np.zeros(batch, bool)  # the last token is a draft that a processor forbids: nor here, so far

    @property
    def batch(self) -> int:
        """B."""
        return len(self.ids)

    @property
    def new(self) -> torch.Tensor:
        """The new tokens, `[B, >= max(total)]`."""
        return self.ids[:, self.prompt_length :]

    @property
    def unverified(self) -> np.ndarray:
        """How many tokens `[B]` are pending."""
        return self.total - self.final

    @property
    def open(self) -> np.ndarray:
        """Rows `[B]` in which another token may be proposed."""
        return self.active & ~(self._sealed | self._barred)

    @property
    def readable(self) -> np.ndarray:
        """Up to which token `[B]` reading is of use: what follows a closed row's last token is not wanted."""
        return (self.total - (self._sealed | self._barred)) * self.active

    @property
    def behind(self) -> np.ndarray:
        """Rows `[B]` that have fewest final tokens of those that go on; of those that are apart, all."""
        return self.apart | (self.final == self.final[self.active].min())

    def place(self, position: np.ndarray) -> np.ndarray:
        """Where in `ids` these positions stand."""
        return self.prompt_length + position

    def scored(self, seen: np.ndarray) -> np.ndarray:
        """How many positions `[B]` from `final` on are scored after so many tokens; 0 if a row is not active."""
        return np.maximum(seen + 1 - self.final, 0) * self.active

    def prefix(self, row: int, end: int) -> torch.Tensor:
        """The prompt and the first `end` new tokens of a row, `[1, P + end]`."""
        return self.ids[row : row + 1, int(self.starts[row]) : self.prompt_length + int(end)]

    def named(self, row: int) -> str:
        """What messages call a row."""
        return f"prompt {int(self.numbers[row])}" if self.apart else f"row {row}"

    def ends(self, outcome: Outcome) -> np.ndarray:
        """Rows `[B]` whose text is over with what they gain."""
        return self._sealed & ~outcome.draws & (self.final + outcome.gained == self.total)

    def append(self, proposal: Proposal) -> None:
        """Takes up proposals."""
        added = proposal.count
        for j in range(int(added.max())):
            self._put(proposal.tokens[:, j], np.flatnonzero(added > j), self.total + j)
        for row, tokens in enumerate(proposal.drawn):
            self.pending[row] += [(proposal.author, proposal.confidence[row])] * len(tokens)
            self.drawn[row] += tokens
        self.total = self.total + added
        self._seal(added > 0, [tokens[-1] if tokens else -1 for tokens in proposal.drawn])
        if proposal.forbidden is not None:
            self._barred |= proposal.forbidden

    def settle(self, outcome: Outcome) -> None:
        """Makes final what rows have gained, and drops what falls."""
        self._put(outcome.emitted, np.flatnonzero(outcome.draws), self.final + outcome.kept)
        ends = zip(outcome.tokens.tolist(), outcome.draws.tolist(), outcome.kept.tolist(), self.drawn)
        last = [token if draws else (drawn[kept - 1] if kept else -1) for token, draws, kept, drawn in ends]
        self.final = self.final + outcome.gained
        self.total = np.where(outcome.falls, self.final, self.total)
        self._seal(outcome.falls, last)
        self._barred &= self.total > self.final
        for fates, row, kept, draws in zip(self.fates, self.pending, outcome.kept.tolist(), outcome.draws.tolist()):
            fates += [(author, True) for author, _ in row[:kept]]
            fates += [(row[kept][0] if kept < len(row) else None, False)] * draws
        for rows in (self.pending, self.drawn):
            for row, n, all_fall in zip(rows, outcome.gained.tolist(), outcome.falls.tolist()):
                del row[: len(row) if all_fall else n]

    def retire(self, wanted: np.ndarray) -> None:
        """Goes on only with rows `[B]` that are wanted and not at their end."""
        self.active = wanted & ~(self._sealed & (self.final == self.total))

    def refill(self, row: int, number: int, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Begins another text in a row, which is apart, with a prompt of at most P tokens."""
        start = self.prompt_length - len(prompt)
        self.ids[row, start : self.prompt_length] = self.ids.new_tensor(prompt)
        self.pending[row], self.drawn[row], self.fates[row] = [], [], []
        here = np.arange(self.batch) == row
        self.starts, self.numbers = np.where(here, start, self.starts), np.where(here, number, self.numbers)
        self.max_new_tokens = np.where(here, max_new_tokens, self.max_new_tokens)
        self.final, self.total = (np.where(here, 0, length) for length in (self.final, self.total))
        self._sealed, self._barred = self._sealed & ~here, self._barred & ~here
        self.active = self.active | here

    def keep_rows(self, rows: np.ndarray) -> None:
        """Goes on with these rows alone, which are apart."""
        self.ids = self.ids[torch.from_numpy(rows).to(self.ids.device)]
        for name in ("starts", "numbers", "max_new_tokens", "final", "total", "active", "_sealed", "_barred"):
            setattr(self, name, getattr(self, name)[rows])
        for name in ("pending", "drawn", "fates"):
            setattr(self, name, [getattr(self, name)[row] for row in rows.tolist()])

    def _put(self, tokens: torch.Tensor, rows: np.ndarray, position: np.ndarray) -> None:
        """Writes `tokens[b]` at `position[b]` in some rows."""
        if not len(rows):
            return
        where = self.place(position)
        self._reserve(int(where[rows].max()) + 1)
        column = int(where[0])
        if len(rows) == len(where) and (where == column).all():
            self.ids[:, column] = tokens
        else:
            index = torch.from_numpy(np.stack([rows, where[rows]])).to(self.ids.device)
            self.ids[index[0], index[1]] = tokens[index[0]].to(self.ids.device)

    def _reserve(self, length: int) -> None:
        """Makes room in `ids` for so many tokens: twice what is needed, so that few copies are made."""
        have = self.ids.shape[1]
        if length > have:
            longest = self.prompt_length + int(self.max_new_tokens.max())
            self.ids = torch.nn.functional.pad(self.ids, (0, min(max(2 * length, ROOM), longest) - have))

    def _seal(self, changed: np.ndarray, tokens: Sequence[int]) -> None:
        """Notes for rows with a new last token `[B]` whether anything can follow it."""
        ends = (self.total >= self.max_new_tokens) | [token in self.stop_tokens for token in tokens]
        self._sealed = np.where(changed, ends, self._sealed)
