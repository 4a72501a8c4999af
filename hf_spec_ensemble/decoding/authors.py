"""Authors: what proposes tokens. A member of the ensemble, a model that drafts, or a generator that drafts.

All have the same interface: how many tokens to read, run, propose, and take the result of the verification.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..ensemble.distribution import EnsembleDistribution
from ..ensemble.padded import Ragged
from ..members.costs import PassCosts
from ..members.member import Member
from ..members.ranks import Ranks
from ..members.stopwatch import Stopwatch
from ..trace.recorder import NoRecord
from .drafter import GeneratorDrafter
from .drawing import Greedy
from .final_scores import FinalScores
from .text import Outcome, Proposal, Text


@dataclass(frozen=True)
class Context:
    """
    What authors and the loop share in one call.

    Args:
        text (`Text`): The rows' new tokens.
        distribution (`EnsembleDistribution`), drawing (`drawing.Greedy`, `Gumbel`, `Maximal`): What is proposed from
            and verified against, and how tokens are drawn.
        recorder (`NoRecord`): Told what happens, for a trace.
        ranks (`Ranks`): The processes that decode together.
        in_step (`bool`): Whether all rows must gain and propose equally many tokens.
        final_scores (`FinalScores`, *optional*): Told what members give at final positions.
    """

    text: Text
    distribution: EnsembleDistribution
    drawing: Greedy
    recorder: NoRecord
    ranks: Ranks
    in_step: bool = False
    final_scores: FinalScores | None = None

    @property
    def keeps_q(self) -> bool:
        """Whether what proposals were drawn from is looked at again."""
        return self.drawing.needs_q or self.recorder.on


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

    def __init__(self, index: int, context: Context, stopwatch: Stopwatch, costs: PassCosts):
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
    A member, or a model that drafts.

    State: the scores of pending positions, by row, the j-th belonging to position `text.final[b] + j`; the rest is the
    member's.

    Args:
        index, context: As for `Author`.
        member (`Member`): The model and what it has read.
        keeps_logits (`bool`): Whether raw logits are to be kept for the output.
    """

    def __init__(self, index: int, context: Context, member: Member, keeps_logits: bool = False):
        super().__init__(index, context, member.stopwatch, member.runner.costs)
        self.member = member
        self.evidence, self.peaks = Ragged(context.text.batch), Ragged(context.text.batch)
        self.logits = Ragged(context.text.batch) if keeps_logits else None

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
        text, distribution, member = self.context.text, self.context.distribution, self.member
        reads = end > member.seen
        first = np.maximum(member.seen + 1, 0)  # [B]: the positions that the new logits predict
        have = text.scored(member.seen)
        late = np.maximum(text.final - first, 0)  # what it missed needs no scores any more, but for the output
        unwanted = 0 if self.context.final_scores else int(late.min())
        unwanted = min(unwanted, int((end - np.maximum(member.seen, -1)).max()) - 1)
        logits = distribution.align(member.score(text.new, end, width, skip=unwanted))
        first, late = first + unwanted, late - unwanted
        count = np.maximum(member.seen + 1 - first, 0) * reads
        scores = distribution.scores(logits, text.ids, text.place(first), count)
        evidence = distribution.evidence_of(scores)
        added = np.maximum(count - late, 0)
        if self.context.final_scores:
            for row, n in enumerate(np.minimum(late, count).tolist()):
                for j in range(n):
                    self._pass_on(row, int(first[row]) + j, evidence[row, j], logits[row, j])
        self.context.recorder.ran(self.index, first + late, added)
        self.evidence.put(have, evidence, late, added)
        self.peaks.put(have, scores.amax(-1, keepdim=True), late, added)
        if self.logits is not None:
            self.logits.put(have, logits, late, added)

    def _pass_on(self, row: int, position: int, probs: torch.Tensor, logits: torch.Tensor | None) -> None:
        """Gives scores `[V]` of a final position to who keeps them for the output."""
        self.context.final_scores.add(self.index, row, position, probs, None if self.logits is None else logits)

    def offer(self):
        """The next token of every open row of which it has seen all."""
        text, distribution, drawing = self.context.text, self.context.distribution, self.context.drawing
        rows = text.open & (self.member.seen == text.total)
        if not rows.any():
            return None
        evidence = self.evidence.window(text.unverified, 1)
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
        if self.context.final_scores:
            for row, gained in enumerate(outcome.gained.tolist()):
                for j in range(min(gained, self.evidence.count(row))):
                    logits = None if self.logits is None else self.logits.at(row, j)
                    self._pass_on(row, int(text.final[row]) + j, self.evidence.at(row, j), logits)
        final = text.final + outcome.gained
        # A token drawn from r has been seen by no member; a kept proposal is settled
        keep, settled = np.where(outcome.falls, final - 1, text.total), final - outcome.falls
        if self.context.in_step and outcome.falls.any():  # rows at their end make room: slots go from all rows at once
            keep, settled = (np.full_like(length, length[outcome.falls].min()) for length in (keep, settled))
        self.member.forget(keep, settled)
        for held in (self.evidence, self.peaks, self.logits):
            if held is not None:
                held.drop_first(outcome.gained)
                held.keep_first(np.maximum(self.member.seen + 1 - final, 0))
        return []

    def close(self):
        self.member.close()

    def tokens_read(self, lap):
        return lap or self.member.prompt_length


class GeneratorAuthor(Author):
    """
    A generator that drafts, such as transformers' candidate generators. It proposes all tokens at once, without a pass.

    State: the drafts of its last run; the rest is the drafter's.

    Args:
        index, context, costs: As for `Author`.
        drafter (`GeneratorDrafter`): Of the call.
        dtype (`torch.dtype`): Of probabilities.
    """

    passes = 0

    def __init__(self, index: int, context: Context, drafter: GeneratorDrafter, costs: PassCosts, dtype: torch.dtype):
        super().__init__(index, context, drafter.stopwatch, costs)
        self.drafter, self.dtype = drafter, dtype
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
            room, pending = text.max_new_tokens - end, text.drawn[row]
            tokens, self._logits[row] = self.drafter.draft(row, text.prefix(row, end), room, pending)
            stop = next((j + 1 for j, token in enumerate(tokens) if token in text.stop_tokens), None)
            drafts[row] = tokens[:stop]
        drafts = self.context.ranks.agree_on(drafts)
        if self.context.in_step:
            shortest = min(len(drafts[row]) for row in rows)
            drafts = [tokens[:shortest] for tokens in drafts]
        self.stopwatch.stop(1)
        self._drafts = drafts
        self.context.recorder.ran(self.index)

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
