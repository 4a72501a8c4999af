"""Many prompts through the rows of one batch: a row whose text has ended is given the next prompt."""

import copy
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Cache

from ..ensemble.padded import left_padded
from ..members.placement import device_of
from ..members.prefill import Prefill
from ..members.prompts import Prompt
from .authors import Author, ModelAuthor
from .call import Call
from .candidates import EnsembleCandidateGenerator
from .drawing import Greedy
from .output import EnsembleStats
from .requests import Request, RowProcessors, Rows
from .speculative import counts_of, prepare, rounds
from .text import Text


# Tokens of prompts that are read between two rounds, at most, and so in one pass: the rows that go on wait for one such
# pass of each member. It is wide enough that reading the weights is a small part of it.
PREFILL = 256

# When no prompts are left, ended rows are left out as soon as no more than this share of the rows goes on. By halves,
# so that there are few sizes of batches whose passes must be measured before lengths are chosen for them.
KEPT = 0.5


@dataclass
class Group(Call):
    """
    Several requests as the rows of one call.

    Args:
        requests (`list[Request]`, B): The rows'.
        left (`int`): Requests that are to be served, these included.
        longest (`tuple[int, int]`): Tokens of the longest prompt, and of the longest text behind one, of all requests.
        widest (`list[int]`): Tokens of the longest prompt that each of `models` has for its own, of all requests.
        like (`Cache`, *optional*): The kind of cache that is wanted. Each member makes its own.
        rule (`Greedy`, *optional*): By which all groups draw.
    """

    requests: list[Request]
    left: int
    longest: tuple[int, int]
    widest: list[int]
    like: Cache | None
    rule: Greedy | None

    @property
    def max_length(self):
        return sum(self.longest)  # prompts are padded to one length

    @property
    def max_new_tokens(self):
        return self.longest[1]

    @property
    def tokens_of_a_row(self):
        return self.max_new_tokens * self.left // len(self.requests)

    @property
    def cache(self):
        return self.like

    def longest_of(self, place):
        return self.max_length if self.prompts[place] is None else self.widest[place] + self.max_new_tokens

    def text(self):
        starts = np.array([self.longest[0] - len(request.prompt) for request in self.requests])
        ids, _ = left_padded([request.prompt for request in self.requests], self.longest[0])
        return Text(
            ids.to(self.input_ids.device),
            np.array([request.max_new_tokens for request in self.requests]),
            self.stop_tokens,
            starts,
            np.array([request.number for request in self.requests]),
        )

    def process(self, text):
        return RowProcessors(text, [request.process for request in self.requests])

    def drawing(self, config):
        rule = self.rule or super().drawing(config)
        rule.numbers = np.array([request.number for request in self.requests])
        return rule


class Queue:
    """
    The requests that wait.

    State: these, the rule by which all are drawn, and `stats` of what was done for them.

    Args:
        call (`Call`): Of one of them, by itself: what they have in common.
        requests (`Sequence[Request]`): All.
        batch_size (`int`): Rows.
    """

    def __init__(self, call: Call, requests: Sequence[Request], batch_size: int):
        self.call, self.batch_size = call, batch_size
        self.waiting = deque(requests)
        self.stats = EnsembleStats(authors=call.names)
        self._longest = tuple(map(max, zip(*((len(one.prompt), one.max_new_tokens) for one in requests))))
        self._rule: Greedy | None = None

    def group(self) -> Group:
        """The next requests, as many as there are rows."""
        left = len(self.waiting)
        requests = [self.waiting.popleft() for _ in range(min(self.batch_size, left))]
        ids, mask = (x.to(self.call.input_ids.device) for x in left_padded([request.prompt for request in requests]))
        places = [request.place for request in requests]
        common = vars(self.call) | {
            "input_ids": ids,
            "model_kwargs": {"attention_mask": mask},
            "prompts": [own and of_rows(own, places) for own in self.call.prompts],
        }
        widest = [own.length if own else 0 for own in self.call.prompts]
        return Group(
            **common,
            requests=requests,
            left=left,
            longest=self._longest,
            widest=widest,
            like=self.call.cache,
            rule=self._rule,
        )

    def drawn_by(self, rule: Greedy) -> None:
        """Notes the rule, with which the next group goes on."""
        self._rule = rule

    def prompt_of(self, place: int, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask `[1, P]` of what the model at this place among `call.models` reads for a request."""
        own = self.call.prompts[place]
        if own is None:
            return left_padded([request.prompt])
        return of_rows(own, [request.place]).rows(1, 1, torch.device("cpu"))


def of_rows(own: Prompt, places: Sequence[int]) -> Prompt:
    """Of a member's own prompts those in these places, where it has one for each; without padding that all have."""
    ids, mask = own.input_ids, own.attention_mask
    if len(ids) > 1:
        ids, mask = ids[list(places)], mask[list(places)]
    padding = int(mask.any(0).int().argmax())
    return Prompt(ids[:, padding:], mask[:, padding:])


class Filler:
    """
    Gives free rows the next prompts, between rounds.

    State: the prompt that is being read, and for which row.

    Args:
        queue (`Queue`), rows (`Rows`), candidates_of (`EnsembleCandidateGenerator`): Of the batch.
        order (`Sequence[int]`): The place of each member, by number, among `queue.call.models`; then of what drafts.
    """

    def __init__(
        self, queue: Queue, rows: Rows, candidates_of: EnsembleCandidateGenerator, order: Sequence[int]
    ):  # fmt: skip
        self.queue, self.rows, self.candidates_of, self.order = queue, rows, candidates_of, order
        self._row = 0
        self._request: Request | None = None
        self._prefills: list[list[Prefill]] = []  # of each author

    @property
    def is_done(self) -> bool:
        """Whether rows that are free stay so."""
        if self._request is not None:
            return False
        return not self.queue.waiting or not all(author.can_refill for author in self.candidates_of.authors)

    def fill(self) -> None:
        """Reads of the prompts that have a row as much as may be read now; while no row goes on, till one does."""
        room, text = PREFILL, self.candidates_of.text
        while room > 0 or not text.active.any():
            if self._request is None and not self._begin():
                return
            prefills = [prefill for own in self._prefills for prefill in own]
            room -= max(prefill.read(room if room > 0 else PREFILL) for prefill in prefills)
            if all(prefill.logits is not None for prefill in prefills):
                self.candidates_of.refill(self._row, self._request, self._prefills)
                self.rows.begin(self._row, self._request)
                self._request, self._prefills = None, []

    def _begin(self) -> bool:
        """Takes the next prompt to a free row, if there are both."""
        free, authors = np.flatnonzero(~self.rows.unfinished), self.candidates_of.authors
        if not len(free) or not self.queue.waiting:
            return False
        for author in authors:
            author.begin()
        if not all(author.can_refill for author in authors):
            return False
        self._row, self._request = int(free[0]), self.queue.waiting.popleft()
        self._prefills = [self._prefills_of(author) for author in authors]
        return True

    def _prefills_of(self, author: Author) -> list[Prefill]:
        if not isinstance(author, ModelAuthor):
            return []
        device = device_of(author.member.model)
        prompts = [self.queue.prompt_of(self.order[one.number], self._request) for one in author.scores]
        return [Prefill(author.member, ids.to(device), mask.to(device), i) for i, (ids, mask) in enumerate(prompts)]


@torch.no_grad()
def serve(queue: Queue) -> Iterator[tuple[Request, list[int]]]:
    """Decodes the requests that wait; gives each with the tokens of its text when that has ended."""
    while queue.waiting:
        with closing(_batch(queue)) as batch:
            yield from batch


def _leave_out_ended(rows: Rows, candidates_of: EnsembleCandidateGenerator) -> None:
    """Goes on without the rows whose texts have ended, where they are too many to run along as padding."""
    left = np.flatnonzero(rows.unfinished)
    if not 0 < len(left) <= KEPT * len(rows.unfinished) or not all(one.can_keep_rows for one in candidates_of.authors):
        return
    rows.keep_rows(left)
    candidates_of.keep_rows(left)


def _batch(queue: Queue) -> Iterator[tuple[Request, list[int]]]:
    """As `serve`, till all rows are free and none can be given another prompt."""
    group = queue.group()
    roles, readers, candidates_of = prepare(group)
    seats = roles.sharing(readers.groups)
    queue.drawn_by(candidates_of.context.drawing)
    queue.stats.shared = readers.shared(roles) or queue.stats.shared
    queue.stats.prompt_tokens_saved += readers.prompt_tokens_saved
    rows = Rows(candidates_of.text, group.requests, group.ranks, group.union and group.union.maps[0])
    filler = Filler(queue, rows, candidates_of, roles.order)
    before, start = copy.copy(queue.stats), time.perf_counter()
    try:
        for _ in rounds(candidates_of, rows):
            finished = list(rows.take_finished())
            if finished:
                for name, done in counts_of(group, seats, candidates_of.authors).items():
                    earlier = getattr(before, name) or [0] * len(done)
                    setattr(queue.stats, name, [a + b for a, b in zip(earlier, done)])
                queue.stats.new_tokens += sum(len(tokens) for _, tokens in finished)
                queue.stats.seconds += time.perf_counter() - start
                yield from finished
                start = time.perf_counter()
            filler.fill()
            if filler.is_done:
                _leave_out_ended(rows, candidates_of)
    finally:
        for author in candidates_of.authors:
            author.close()
