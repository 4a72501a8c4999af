"""EnsembleCandidateGenerator: runs authors until proposals can be verified, and applies the result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers.generation import AssistedCandidateGenerator

from ..ensemble.padded import Ragged, window
from ..members.prefill import Prefill
from ..schedule.turns import Schedule, Situation
from .authors import Author, ModelAuthor
from .requests import Request
from .scores import Context, MemberScores
from .settling import All, Enough, Owner, OwnerAmongAll
from .text import Outcome


@dataclass
class Candidates:
    """
    Positions that enough members have scored, ready to be verified. Row b has `proposed[b]` proposals; where
    `drawable[b]` the next position is scored as well, and a token can be drawn from r there.

    `tokens` `[B, K]`; `r` `[B, K, V]` in the form of the drawing rule; `q` `[B, K, V]` only if that needs it or if a
    trace is recorded, and then as probabilities, as `probs` `[B, K, V]`, which are r's; `log_r` `[B, K, V]` and
    `logits` `[B, K, V]`, the main model's, only if they are to be kept; `proposed`, `drawable` numpy `[B]`.
    """

    tokens: torch.Tensor
    r: torch.Tensor
    q: torch.Tensor | None
    probs: torch.Tensor | None
    log_r: torch.Tensor | None
    logits: torch.Tensor | None
    proposed: np.ndarray
    drawable: np.ndarray


class EnsembleCandidateGenerator(AssistedCandidateGenerator):
    """
    Runs the authors, members and drafters, in turns until proposals can be verified.

    Every pass of a member scores all pending tokens it has not seen, and may append one proposal of its own: the
    "bonus" token of speculative decoding is a proposal here, since it comes from one member and not from r. A position
    that is settled before it is proposed needs no proposal: it is drawn from r. A drafter proposes too, but what it has
    scored or not holds up nothing.

    Where processors must be called once for each token, in order, positions are verified one at a time, in all rows
    that go on.

    State: whose turn it is, what pending proposals were drawn from, and which rows are stuck. It alone changes the
    text, and tells the authors before it does.

    Args:
        context (`Context`): Of the call.
        authors (`list[Author]`, A): First those that score for the N members.
        readers (`int`): So many; N, or fewer where members share passes.
        schedule_for (`Callable[[int], Schedule]`): For so many rows, who runs, and who proposes.
        settling (`All`): Which positions enough members have scored.
        keep_scores (`bool`): Whether candidates carry log r; only where the settling is complete.
    """

    def __init__(
        self,
        context: Context,
        authors: list[Author],
        readers: int,
        schedule_for: Callable[[int], Schedule],
        settling: All | Owner | Enough,
        keep_scores: bool = False,
    ):
        # Not the parent's: that prepares one assistant for its own `generate()`; see `Call.inputs_of`
        self.context, self.text = context, context.text
        self.authors = authors
        self.readers: list[ModelAuthor] = authors[:readers]
        members = [scores for author in self.readers for scores in author.scores]
        self.members: list[MemberScores] = sorted(members, key=lambda scores: scores.number)  # N
        self._schedule_for, self.schedule = schedule_for, schedule_for(self.text.batch)
        self.settling = settling
        self.by_column = context.distribution.process.once_a_token
        self.keep_scores = keep_scores
        self.stuck = np.zeros(self.text.batch, bool)  # there is nothing to draw the next token from
        self.current: int | None = None  # the author that ran last, and its consecutive runs
        self.turn = 0
        self._waited = [0.0, 0.0]  # tokens a row, by whether rows waited for all members
        self._patient = False  # whether they do now
        self._refilled, self._slowest = False, 0  # whether rows are, and else the new tokens of the slowest
        self.q = Ragged(self.text.batch)

    def get_candidates(self, input_ids: torch.Tensor | None = None, **kwargs) -> Candidates:
        """Runs authors until some active row has a position that is settled. The arguments are not needed."""
        text = self.text
        while True:
            scored = self.settling.scored(text, self.members)  # [B]
            self._patient = self.schedule.patient
            if self._patient:
                scored = np.minimum(scored, All().scored(text, self.members))
            scored = np.where(self.stuck & ~text.behind, 0, scored)
            if self.by_column or self.context.in_step:  # once all rows have some
                scored = scored * (scored[text.active] > 0).all()
            if self.by_column:
                scored = np.minimum(scored, 1)
            proposed = np.minimum(scored, text.unverified)
            drawable = scored > proposed
            if drawable.any() or proposed.any():
                return self._collect(proposed, drawable)
            if self.current is not None and not self._patient:
                self._propose(self.authors[self.current])
            self._run_next()

    def update_candidate_strategy(
        self, emitted: torch.Tensor, candidates: Candidates, num_matches: torch.Tensor
    ) -> np.ndarray:
        """
        Settles verified positions: keeps the first `num_matches[b]` proposals of row b and, if one was rejected or if
        the row was drawable, `emitted[b]` after them. What was pending behind that token is forgotten.

        Args:
            emitted (`torch.LongTensor` `[B]`), num_matches (`torch.LongTensor` `[B]`): From the drawing rule.
            candidates (`Candidates`): What was verified.

        Returns:
            `np.ndarray` `[B]`: How many tokens each row has gained.
        """
        sound = self.context.distribution.sound()
        verdict = self.context.ranks.agree(torch.stack([num_matches, emitted, sound]))
        accepted, tokens, sound = verdict.cpu().numpy()  # the round's only transfer
        self._check(candidates, sound)
        draws = ((accepted < candidates.proposed) | candidates.drawable) & (accepted < sound)
        accepted = np.minimum(accepted, sound)
        self._judge(candidates.proposed, accepted)
        outcome = Outcome(accepted, accepted + draws, draws, tokens, verdict[1])
        if self.context.in_step:
            outcome = self._cut_to_slowest(outcome)
        self._record(candidates, outcome)
        for author in self.authors:
            for confidence, hit in author.settle(outcome):
                self.schedule.judged(author.index, confidence, hit)
        self.text.settle(outcome)
        self.q.drop_first(outcome.gained)
        tokens = int(outcome.gained.sum()) / max(int(self.text.active.sum()), 1)
        self._waited[self._patient] += tokens
        self.schedule.advanced(tokens, self._progress(tokens))
        return outcome.gained

    def _progress(self, tokens: float) -> float:
        """Tokens by which a batch has come nearer to its end: the slowest row's, or the mean if rows are refilled."""
        if self._refilled:
            return tokens
        active, before = self.text.active, self._slowest
        self._slowest = int(self.text.final[active].min() if active.any() else self.text.final.max())
        return self._slowest - before

    @property
    def patient_share(self) -> float:
        """The share of tokens for which rows waited for all members, as the schedule wanted."""
        return self._waited[True] / max(sum(self._waited), 1)

    def refill(self, row: int, request: Request, prefills: Sequence[list[Prefill]]) -> None:
        """Begins the next text in a row whose text has ended, with what each author's models have read."""
        self._refilled = True
        self.text.refill(row, request.number, request.prompt, request.max_new_tokens)
        self.context.drawing.numbers = self.text.numbers
        self.context.distribution.process.refill(row, request.process)
        self.stuck[row] = False
        for author, own in zip(self.authors, prefills):
            author.refill(row, request.prompt, own)

    def keep_rows(self, rows: np.ndarray) -> None:
        """Goes on with these rows alone, in ascending order; the others' texts have ended."""
        self.take_times(wait=True)  # which are those of so many rows as there were
        self.text.keep_rows(rows)
        self.context.drawing.numbers = self.text.numbers
        self.context.distribution.process.keep_rows(rows)
        self.stuck = self.stuck[rows]
        self.q.keep_rows(rows)
        self.settling.keep_rows(rows)
        for author in self.authors:
            author.keep_rows(rows)
        self.schedule = self._schedule_for(len(rows))

    def take_times(self, wait: bool = False) -> None:
        """Records how long authors took; may wait for running work."""
        for author in self.authors:
            if wait:
                author.stopwatch.wait()
            for lap, seconds in author.stopwatch.laps():
                self.context.recorder.timed(author.index, author.tokens_read(lap), seconds)
                if lap is None:  # the prompt's pass is no measure for the others
                    author.prompt_seconds += seconds
                else:
                    author.costs.add(self.text.batch, lap, seconds)
                    self.schedule.ran(author.index, seconds, lap)

    def _situation(self, asked: list[np.ndarray] | None = None) -> Situation:
        lag = [author.unread().tolist() for author in self.authors]
        waiting = None if asked is None else [int(rows.sum()) for rows in asked]
        return Situation(self.current, self.turn, lag, self.text.pending, self.text.open.tolist(), waiting)

    def _asked(self) -> list[np.ndarray] | None:
        """The rows `[B]` that wait for what each of the readers scores; `None` if all wait for all."""
        asked = None if self._patient else self.settling.asked(self.text, self.members)
        if asked is None:
            return None
        return [np.logical_or.reduce([asked[one.number] for one in author.scores]) for author in self.readers]

    def _run_next(self) -> None:
        """Lets the author run whose turn it is."""
        asked = self._asked()
        situation = self._situation(asked)
        self.current, self.turn = self.schedule.next(situation)
        author, lag = self.authors[self.current], np.array(situation.lag[self.current])
        if asked is not None and self.current < len(asked) and asked[self.current].any():
            lag = lag * asked[self.current]  # other rows read no more than these
        most = int(lag.max())
        author.run(most, self.schedule.width(self.current, most) if author.passes else 0)
        self.take_times()

    def _propose(self, author: Author) -> None:
        """Takes as much of an author's offer as the schedule allows."""
        offer = author.offer()
        if offer is None:
            return
        length = self.schedule.proposes(self._situation(), offer.confidence)
        proposal = author.shorten(offer, length)
        if proposal is None:
            return
        if proposal.q is not None:
            self.q.put(self.text.unverified, proposal.q, np.zeros(self.text.batch, int), proposal.count)
        author.proposed += int(proposal.count.sum())
        self.context.recorder.proposed(author.index, self.turn, proposal.count)
        self.text.append(proposal)

    def _collect(self, proposed: np.ndarray, drawable: np.ndarray) -> Candidates:
        count = proposed + drawable
        width = int(count.max())
        start = np.zeros_like(count)
        distribution, form = self.context.distribution, self.context.drawing.form
        log_r = All().target(self.context, self.members, count, "log_probs") if self.keep_scores else None
        if log_r is None or isinstance(self.settling, OwnerAmongAll):
            r = self.settling.target(self.context, self.members, count, form)
        else:  # processors are not called again
            r = log_r.exp() if form == "probs" else log_r
        q = probs = None
        if self.context.recorder.on:
            probs = distribution.probs(r, form)
        if self.context.keeps_q:
            q = self.q.window(start, width) if proposed.any() else r
        logits = self.members[0].logits if self.settling.complete else None
        return Candidates(
            tokens=window(self.text.ids, self.text.place(self.text.final), width),
            r=r,
            q=q,
            probs=probs,
            log_r=log_r,
            logits=None if logits is None else logits.window(start, width),
            proposed=proposed,
            drawable=drawable,
        )

    def _check(self, candidates: Candidates, sound: np.ndarray) -> None:
        """
        Raises if there is nothing to draw a row's next token from. A row that is ahead of others waits for them, and a
        later position for a later round, since texts may end before.
        """
        scored = candidates.proposed + candidates.drawable > 0
        self.stuck = np.where(scored, sound == 0, self.stuck)
        lost = np.flatnonzero(self.stuck & self.text.behind)
        if len(lost):
            row = int(lost[0])
            place = f"New token {int(self.text.final[row]) + 1} of {self.text.named(row)}"
            raise self.context.distribution.fault(row, *self.settling.blamed(self.members, row), place)

    def _judge(self, proposed: np.ndarray, accepted: np.ndarray) -> None:
        """Reports which verified proposals were accepted, up to the first rejected one of each row."""
        for row, (pending, tried, kept) in enumerate(zip(self.text.pending, proposed.tolist(), accepted.tolist())):
            for j, (author, confidence) in enumerate(pending[: min(kept + 1, tried)]):
                self.authors[author].judged(row, j < kept)
                self.schedule.judged(author, confidence, j < kept)

    def _cut_to_slowest(self, outcome: Outcome) -> Outcome:
        """
        Cuts what rows gain to what the slowest row gains that does not end here. What is pending behind falls in all
        rows that go on, unless no row has lost or drawn any.
        """
        # Exact: cap_b, the least gain of the *other* rows that do not end, depends on their draws alone. Row b keeps
        # min(gained_b, cap_b) whatever it drew, and draws the rest again. So a row that ends is cut too: it would have
        # been cut if its last proposal had been rejected.
        ends, active, gained = self.text.ends(outcome), self.text.active, outcome.gained
        if not (active & ~ends).any():
            return outcome
        least = gained[active & ~ends].min()
        going_on = active & ~(ends & (gained <= least))
        all_fall = (outcome.draws[going_on] | (gained[going_on] > least)).any()
        gained = np.minimum(gained, least)
        falls = np.where(going_on, all_fall, outcome.falls)
        return replace(outcome, kept=np.minimum(outcome.kept, gained), gained=gained, falls=falls)

    def _record(self, candidates: Candidates, outcome: Outcome) -> None:
        if self.context.recorder.on:
            acceptance = self.context.drawing.acceptance(candidates.tokens, candidates.q, candidates.r)
            self.context.recorder.verified(self.text.final, candidates, acceptance, outcome)
