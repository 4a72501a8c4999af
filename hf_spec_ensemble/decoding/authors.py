"""Authors: what runs and proposes tokens. A member of the ensemble, several that share passes, or a model or generator
that drafts.

All have the same interface: how many tokens to read, run, propose, and take the result of the verification.
"""

import numpy as np
import torch

from ..members.costs import PassCosts, SharedCosts
from ..members.member import Member
from ..members.prefill import Prefill
from ..members.rows import SharedMember
from ..members.stopwatch import Stopwatch
from .drafter import GeneratorDrafter
from .scores import Context, MemberScores
from .text import Outcome, Proposal


class Author:
    """
    What proposes tokens.

    State: the counts below, and what subclasses say; written by the author itself.

    Args:
        index (`int`): Its number among the A authors, members first.
        context (`Context`): Of the call.
        stopwatch (`Stopwatch`): Times what it does; a lap's label is the tokens it read, `None` for a prompt.
        costs (`PassCosts`): Where these times go.
    """

    def __init__(self, index: int, context: Context, stopwatch: Stopwatch, costs: PassCosts | SharedCosts):
        self.index, self.context = index, context
        self.stopwatch, self.costs = stopwatch, costs
        self.proposed = self.verified = self.accepted = 0  # tokens, over all rows
        self.prompt_seconds = 0.0  # that reading the prompt took

    @property
    def passes(self) -> int:
        """Forward passes so far."""
        raise NotImplementedError

    def unread(self) -> np.ndarray:
        """How many tokens `[B]` it has to read."""
        raise NotImplementedError

    def run(self, most: int, width: int) -> None:
        """Reads them, at most so many of each row, in a pass over at least `width` tokens a row."""
        raise NotImplementedError

    def offer(self) -> Proposal | None:
        """
        What it would propose to follow the texts, of which at most so much is taken as the schedule decides, knowing
        the confidence alone.
        """
        raise NotImplementedError

    def shorten(self, offer: Proposal, length: int) -> Proposal | None:
        """Of what it has offered the first `length` tokens of each row, 0 included; `None` if none are left."""
        return offer if length else None

    def judged(self, row: int, kept: bool) -> None:
        """One of its proposals was verified."""
        self.verified += 1
        self.accepted += kept

    def settle(self, outcome: Outcome) -> list[tuple[float, bool]]:
        """
        Is told what a verification has come to, before the text changes. Gives confidence and fate of what it would
        have proposed and did not.
        """
        raise NotImplementedError

    def begin(self) -> None:
        """Makes its first pass, unless it has made it."""

    @property
    def can_refill(self) -> bool:
        """Whether a row can begin another text while others go on; known after the first pass."""
        return True

    def refill(self, row: int, prompt: list[int], prefills: list[Prefill]) -> None:
        """A row of the text has begun anew, with this prompt; each of the models that it runs has read its own."""
        raise NotImplementedError

    @property
    def can_keep_rows(self) -> bool:
        """Whether `keep_rows` works."""
        return True

    def keep_rows(self, rows: np.ndarray) -> None:
        """Goes on with these rows alone."""
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        """Seconds spent by this author; waits for running work."""
        return self.stopwatch.seconds

    def close(self) -> None:
        """Ends its use in this call."""

    def tokens_read(self, lap: int | None) -> int:
        """Of a lap with this label, in each row."""
        return lap or 0


class ModelAuthor(Author):
    """
    A member, a group of members that share passes, or a model that drafts.

    State: the scores of pending positions, for each of its members; the rest is the model's.

    Args:
        index, context: As for `Author`.
        member (`Member` or `SharedMember`): The model and what it has read.
        scores (`list[MemberScores]`, G): Where what it scores for each member goes.
    """

    def __init__(self, index: int, context: Context, member: Member | SharedMember, scores: list[MemberScores]):
        super().__init__(index, context, member.stopwatch, member.costs)
        self.member, self.scores = member, scores
        weights = context.distribution.config.weights or ()
        # Of several members it speaks for the one that counts most
        self._spokesman = max(scores, key=lambda one: weights[one.number] if one.number < len(weights) else 0.0)

    @property
    def passes(self):
        return self.member.passes

    def unread(self):
        return np.maximum(self.context.text.readable - self.member.seen, 0)

    def run(self, most, width):
        text, seen = self.context.text, self.member.seen
        self._read(np.maximum(np.minimum(text.readable, np.maximum(seen, 0) + most), seen), width)

    def catch_up(self) -> None:
        """Reads what is final and not read yet, for the output's sake."""
        end = np.maximum(self.context.text.final - 1, self.member.seen)
        if (end > self.member.seen).any():
            self._read(end)

    def _read(self, end: np.ndarray, width: int = 0) -> None:
        text, member, passes = self.context.text, self.member, self.member.passes
        reads = end > member.seen
        first = np.maximum(member.seen + 1, 0)  # [B]: the positions that the new logits predict
        have = text.scored(member.seen)
        late = np.maximum(text.final - first, 0)  # what it missed needs no scores any more, but for the output
        unwanted = 0 if self.context.final_scores else int(late.min())
        unwanted = min(unwanted, int((end - np.maximum(member.seen, -1)).max()) - 1)
        logits = self.context.distribution.align(member.score(text.new, end, width, skip=unwanted))
        first, late = first + unwanted, late - unwanted
        count = np.maximum(member.seen + 1 - first, 0) * reads
        for scores, own in zip(self.scores, logits.unflatten(0, (len(self.scores), -1))):
            scores.put(own, have, first, count, late)
        for _ in range(member.passes - passes - 1):
            self.context.recorder.ran(self.index)
        self.context.recorder.ran(self.index, first + late, np.maximum(count - late, 0))

    def begin(self):
        if not self.passes:
            self.run(int(self.unread().max()), 0)

    @property
    def can_refill(self):
        return self.member.can_refill

    def refill(self, row, prompt, prefills):
        text, batch = self.context.text, self.context.text.batch
        here, nothing = np.arange(batch) == row, np.zeros(batch, int)
        have = text.scored(self.member.seen) * ~here
        for part, (prefill, scores) in enumerate(zip(prefills, self.scores)):
            logits = self.context.distribution.align(prefill.logits)  # [1, V]
            rows = logits.new_zeros(batch, 1, logits.shape[-1])
            rows[row] = logits
            self.member.refill(row, prefill.reader, part)
            scores.put(rows, have, nothing, here.astype(int), nothing)
            self.context.recorder.ran(self.index)

    @property
    def can_keep_rows(self):
        return self.member.can_keep_rows

    def keep_rows(self, rows):
        self.member.reorder(torch.from_numpy(rows))
        for scores in self.scores:
            scores.keep_rows(rows)

    def offer(self):
        """The next token of every open row of which it has seen all."""
        text, distribution, drawing = self.context.text, self.context.distribution, self.context.drawing
        rows = text.open & (self.member.seen == text.total)
        if not rows.any():
            return None
        evidence = self._spokesman.evidence.window(text.unverified, 1)
        q = distribution.proposal(evidence, text.ids, text.place(text.total), rows.astype(int), drawing.form)
        tokens = drawing.propose(q[:, 0], text.total)
        # Fetched together, in one transfer; the decision sees the confidence alone
        proposal = torch.stack([tokens.double(), distribution.top_prob(q[:, 0], drawing.form).double()])
        proposal = self.context.ranks.agree(proposal)
        drawn, confidence = proposal.tolist()
        # Where q is no distribution nothing is proposed: if the text comes there, r will tell
        sound = np.isfinite(confidence) & (np.array(confidence) > 0)
        if self.context.in_step and not sound[rows].all():
            return None
        rows = rows & sound
        if not rows.any():
            return None
        return Proposal(
            self.index,
            tokens=proposal[0].long()[:, None],
            drawn=[[int(token)] if row else [] for token, row in zip(drawn, rows.tolist())],
            confidence=[own if row else None for own, row in zip(confidence, rows.tolist())],
            q=distribution.probs(q, drawing.form) if self.context.keeps_q else None,
        )

    def settle(self, outcome):
        text = self.context.text
        for scores in self.scores:
            scores.pass_on(outcome.gained)
        final = text.final + outcome.gained
        # A token drawn from r has been seen by no member; a kept proposal is settled
        keep, settled = np.where(outcome.falls, final - 1, text.total), final - outcome.falls
        if self.context.in_step and outcome.falls.any():  # rows at their end make room: slots go from all rows at once
            keep, settled = (np.full_like(length, length[outcome.falls].min()) for length in (keep, settled))
        self.member.forget(keep, settled)
        for scores in self.scores:
            scores.keep(outcome.gained, np.maximum(self.member.seen + 1 - final, 0))
        return []

    def close(self):
        self.member.close()

    def tokens_read(self, lap):
        return lap or self.member.prompt_length


class GeneratorAuthor(Author):
    """
    A generator that drafts, such as transformers' candidate generators. It proposes all tokens at once, without a pass.

    State: the drafts of its last run, and how often it was asked and had any; the rest is the drafter's.

    Args:
        index, context, costs: As for `Author`.
        drafter (`GeneratorDrafter`): Of the call.
        dtype (`torch.dtype`): Of probabilities.
    """

    passes = 0

    def __init__(self, index: int, context: Context, drafter: GeneratorDrafter, costs: PassCosts, dtype: torch.dtype):
        super().__init__(index, context, drafter.stopwatch, costs)
        self.drafter, self.dtype = drafter, dtype
        self._asked = self._answered = self._taken = 0  # times a row, over all rows
        self._drafts: list[list[int]] = []
        self._logits: list[torch.Tensor | None] = []

    def unread(self):
        return np.zeros(self.context.text.batch, int)

    def run(self, most, width):
        """Drafts for every open row as many tokens as it has."""
        text, drafts = self.context.text, [[] for _ in range(self.context.text.batch)]
        self._logits = [None] * text.batch
        rows = np.flatnonzero(text.open).tolist()
        self.stopwatch.start()
        for row in rows:
            end = int(text.total[row])
            room, pending = int(text.max_new_tokens[row]) - end, text.drawn[row]
            tokens, self._logits[row] = self.drafter.draft(row, text.prefix(row, end), room, pending)
            stop = next((j + 1 for j, token in enumerate(tokens) if token in text.stop_tokens), None)
            drafts[row] = tokens[:stop]
        drafts = self.context.ranks.agree_on(drafts)
        if self.context.in_step:
            shortest = min(len(drafts[row]) for row in rows)
            drafts = [tokens[:shortest] for tokens in drafts]
        self.stopwatch.stop(1)
        self._drafts = drafts
        self._asked, self._answered = self._asked + len(rows), self._answered + sum(map(bool, drafts))
        self.context.recorder.ran(self.index)

    @property
    def coverage(self) -> float:
        """How often it had drafts when it was asked."""
        return self._answered / self._asked if self._asked else 0.0

    @property
    def habit(self) -> tuple[int, float]:
        """How many tokens it proposed at a time, and how often when it was asked."""
        return (round(self.proposed / self._taken), self._taken / self._asked) if self._taken else (0, 0.0)

    def offer(self):
        drafts, self._drafts = self._drafts, []
        if not any(drafts):
            return None
        confidence = [self.drafter.confidence(row) if tokens else None for row, tokens in enumerate(drafts)]
        return self._proposal(drafts, confidence)

    def shorten(self, offer, length):
        text = self.context.text
        if not length:
            for row, tokens in enumerate(offer.drawn):
                if tokens:
                    self.drafter.watch(row, int(text.total[row]), tokens)
            return None
        drafts = [tokens[:length] for tokens in offer.drawn]
        self._taken += sum(map(bool, drafts))
        forbidden = self._cut_at_forbidden(drafts)
        return self._proposal(drafts, offer.confidence, forbidden, with_q=self.context.keeps_q)

    def _proposal(self, drafts, confidence, forbidden=None, with_q=False) -> Proposal:
        longest = max(map(len, drafts))
        padded = [tokens + [0] * (longest - len(tokens)) for tokens in drafts]
        tokens = torch.tensor(padded, device=self.context.text.ids.device)
        q = self._q(tokens, drafts) if with_q else None
        return Proposal(self.index, tokens, drafts, confidence, q, forbidden)

    def _q(self, tokens: torch.Tensor, drafts: list[list[int]]) -> torch.Tensor:
        """What drafts were drawn from, `[B, L, V]`: as the generator says, or certain."""
        q = torch.zeros(*tokens.shape, self.context.distribution.width, dtype=self.dtype, device=tokens.device)
        q.scatter_(2, tokens[:, :, None], 1.0)
        for row, given in enumerate(self._logits):
            count = len(drafts[row])
            if self.context.drawing.needs_q and given is not None and count:
                q[row, :count] = self.context.distribution.align(given[:count]).softmax(-1)
        return q

    def _cut_at_forbidden(self, drafts: list[list[int]]) -> np.ndarray:
        """
        Cuts drafts behind the first token that a function of prefixes forbids: it will be rejected, and the function
        may fail on what it never allowed. Says which rows `[B]` end with one. The token itself stays a proposal, since
        what is proposed must not depend on what was drawn.
        """
        text, allows = self.context.text, self.context.distribution.process.allowed
        allowed = [
            allows(row, text.prefix(row, text.total[row])[0], tokens) if tokens else 0
            for row, tokens in enumerate(drafts)
        ]
        if self.context.in_step:
            allowed = [min(n for n, tokens in zip(allowed, drafts) if tokens)] * len(drafts)
        forbidden = np.array([n < len(tokens) for n, tokens in zip(allowed, drafts)])
        for row, n in enumerate(allowed):
            del drafts[row][n + 1 :]
        return forbidden

    def judged(self, row, kept):
        super().judged(row, kept)
        self.drafter.judged(row, kept)

    def refill(self, row, prompt, prefills):
        self.drafter.refill(row, prompt)

    def keep_rows(self, rows):
        self.drafter.keep_rows(rows.tolist())
        if self._drafts:
            self._drafts, self._logits = ([each[row] for row in rows] for each in (self._drafts, self._logits))

    def settle(self, outcome):
        text, fates = self.context.text, []
        for row, kept in enumerate(outcome.kept.tolist()):
            final, drawn = int(text.final[row]), [int(outcome.tokens[row])] * bool(outcome.draws[row])
            own = [j < kept for j, (author, _) in enumerate(text.pending[row]) if author == self.index]
            if own and outcome.gained[row]:
                self.drafter.settle(row, text.prefix(row, final + kept), len(own), sum(own))
            gained = [*text.drawn[row][:kept], *drawn]
            self.drafter.learn(row, gained)
            compared = self.drafter.compare(row, final, gained, bool(outcome.falls[row]))
            for _, hit in compared:
                self.drafter.judged(row, hit)
            fates += compared
        return fates

    def tokens_read(self, lap):
        return 0
