"""Prompts that are calls of their own, as rows of one batch: what each asks for, and when its text has ended."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from ..ensemble.processing import POSITION_FREE, PositionwiseProcessor
from ..ensemble.union import Map
from ..members.ranks import Ranks
from .call import Call
from .text import Text
from .writing import Writer


# What ends texts by tokens and lengths alone, which `Text` knows.
OF_TEXT = (EosTokenCriteria, MaxLengthCriteria)


@dataclass(frozen=True, eq=False)
class Request:
    """
    A prompt and what a `generate()` call of its own would do with it.

    Args:
        number (`int`): By which its noise is keyed, and its text given out.
        place (`int`): Among the prompts of this call.
        prompt (`list[int]`): Tokens, without padding.
        max_new_tokens (`int`): Of its text.
        process (`PositionwiseProcessor`): For one row.
        criteria (`StoppingCriteriaList`): Those that must be asked, for one row.
    """

    number: int
    place: int
    prompt: list[int]
    max_new_tokens: int
    process: PositionwiseProcessor
    criteria: StoppingCriteriaList

    @classmethod
    def of(cls, number: int, place: int, call: Call) -> "Request":
        """What a call of one row asks for."""
        criteria = StoppingCriteriaList([one for one in call.stopping_criteria if type(one) not in OF_TEXT])
        process = PositionwiseProcessor(call.logits_processor, call.pad_token_id)
        return cls(number, place, call.input_ids[0].tolist(), call.max_new_tokens, process, criteria)


class RowProcessors:
    """
    As `PositionwiseProcessor`, for rows that are apart: each has processors of its own, which see its prompt and text
    alone, and no padding.

    State: whose each row is.

    Args:
        text (`Text`): Of the rows.
        rows (`list[PositionwiseProcessor]`, B): Of the requests that the rows begin with.
    """

    once_a_token = False

    def __init__(self, text: Text, rows: list[PositionwiseProcessor]):
        self.text, self.rows = text, rows

    def __call__(self, logits, ids, first, count, final=True):
        if all(type(processor) in POSITION_FREE for processor in self.rows[0].processors):
            return self.rows[0](logits, ids, first, count, final)
        out = logits.clone()
        for row in np.flatnonzero(count).tolist():
            one, start, n = slice(row, row + 1), int(self.text.starts[row]), int(count[row])
            given = logits[one, :n], ids[one, start:], first[one] - start, count[one]
            out[row, :n] = self.rows[row](*given, final)[0]
        return out

    def allowed(self, row: int, ids: torch.Tensor, draft: list[int]) -> int:
        """As `PositionwiseProcessor.allowed`."""
        return self.rows[row].allowed(0, ids, draft)

    def refill(self, row: int, process: PositionwiseProcessor) -> None:
        """Another text begins in a row."""
        self.rows[row] = process

    def keep_rows(self, rows: np.ndarray) -> None:
        """Goes on with these rows alone."""
        self.rows = [self.rows[row] for row in rows.tolist()]


class Rows:
    """
    Which request each row serves, and which of these have ended. Takes the place of a `Transcript`: each row is
    committed by itself, and its criteria see it alone.

    State: all of it.

    Args:
        text (`Text`), requests (`list[Request]`, B): Those that the rows begin with.
        ranks (`Ranks`): The processes that decode together.
        way (`Map`, *optional*): How the main model writes the tokens of a union, which criteria see.
    """

    def __init__(self, text: Text, requests: list[Request], ranks: Ranks, way: Map | None = None):
        self.text, self.ranks, self.way = text, ranks, way
        self.requests: list[Request | None] = list(requests)
        self._writers = [self._writer(request) for request in requests]
        self._asked = np.zeros(text.batch, int)  # new tokens after which the criteria were asked
        self._stopped = np.zeros(text.batch, bool)  # by them

    @property
    def unfinished(self) -> np.ndarray:
        """Rows `[B]` that serve a request."""
        return np.array([request is not None for request in self.requests])

    @property
    def wanted(self) -> np.ndarray:
        """Rows `[B]` whose next tokens are still wanted."""
        return self.unfinished & ~self._stopped

    def add(self, count: np.ndarray, **columns: torch.Tensor) -> None:
        """As `Transcript.add`; nothing but tokens is kept."""

    def commit(self, ids: torch.Tensor, length: np.ndarray) -> None:
        """Asks the criteria after every token that rows have gained."""
        for row in np.flatnonzero(self.wanted).tolist():
            criteria, final = self.requests[row].criteria, int(self.text.final[row])
            while criteria and self._asked[row] < final and not self._stopped[row]:
                self._asked[row] += 1
                done = self._ask(row, criteria, self.text.prefix(row, self._asked[row]))
                self._stopped[row] = bool(self.ranks.agree(done).any())

    def take_finished(self) -> Iterator[tuple[Request, list[int]]]:
        """The requests whose texts have ended, and these texts; their rows are free then."""
        for row in np.flatnonzero(self.unfinished & ~self.text.active).tolist():
            request, self.requests[row] = self.requests[row], None
            end = int(self._asked[row] if self._stopped[row] else self.text.final[row])
            yield request, self.text.new[row, :end].tolist()

    def begin(self, row: int, request: Request) -> None:
        """A row is given a request."""
        self.requests[row], self._writers[row] = request, self._writer(request)
        self._asked[row], self._stopped[row] = 0, False

    def keep_rows(self, rows: np.ndarray) -> None:
        """Goes on with these rows alone."""
        self.requests, self._writers = ([each[row] for row in rows.tolist()] for each in (self.requests, self._writers))
        self._asked, self._stopped = self._asked[rows], self._stopped[rows]

    def _writer(self, request: Request) -> Writer | None:
        if self.way is None:
            return None
        return Writer(self.way, self.text.ids.new_tensor([request.prompt]), request.process.pad_token_id)

    def _ask(self, row: int, criteria: StoppingCriteriaList, tokens: torch.Tensor) -> torch.Tensor:
        """Whether a row's text `[1, T]`, whose last token is new, has ended."""
        writer = self._writers[row]
        if writer is None:
            return criteria(tokens, None)
        writer.put(tokens[:, -1], [True])
        return writer.asked(criteria, tokens, None)
