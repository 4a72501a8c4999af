"""EnsembleCandidateGenerator: the proposals awaiting verification, and the members' passes that make and score them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation import AssistedCandidateGenerator, GenerationConfig

from ..compat import encoded, without_cache
from ..ensemble.distribution import EnsembleDistribution
from ..ensemble.padded import Ragged, window
from ..members.costs import PassCosts
from ..members.member import Member
from ..members.placement import Placed
from ..members.ranks import Ranks
from ..schedule.turns import Schedule, Situation
from ..trace.recorder import NoRecord
from .drafter import GeneratorDrafter
from .drawing import Greedy


ROOM = 256  # tokens that there is room for at least, if texts may become so long


def assistant_kwargs(
    assistants: list[PreTrainedModel],
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict,
    inputs_tensor: torch.Tensor | None = None,
    media: dict[str, torch.Tensor] | None = None,
) -> list[dict]:
    """
    What each assistant's `forward` is given, on its device, as transformers' own candidate generator prepares it. Every
    assistant encodes with its own encoders what these read.

    Args:
        assistants, input_ids (`torch.LongTensor` `[B, P]`), generation_config, model_kwargs:
            As the main model's decoding method gets them.
        inputs_tensor (`torch.Tensor` `[B / R, ...]`, *optional*):
            What an encoder-decoder model's encoder reads; every entry is for R rows.
        media (`dict[str, torch.Tensor]`, *optional*):
            Images and videos that the main model has encoded already, as its caller gave them.
    """
    repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    of_main_model = {name: value for name, value in without_cache(model_kwargs).items() if name != "mm_encoder_outputs"}
    if inputs_tensor is not None:
        inputs_tensor = inputs_tensor.repeat_interleave(len(input_ids) // len(inputs_tensor), dim=0)
    prepared = []
    for assistant in map(Placed, assistants):
        kwargs = AssistedCandidateGenerator(
            input_ids, assistant, generation_config, of_main_model, inputs_tensor
        ).assistant_kwargs
        if media:
            _, expanded = assistant._expand_inputs_for_generation(
                expand_size=repeats, is_encoder_decoder=False, input_ids=input_ids[::repeats], **media
            )
            kwargs |= {name: value.to(assistant.device) for name, value in expanded.items()}
            kwargs = encoded(assistant, kwargs.get("inputs_embeds"), kwargs, None, generation_config)
        prepared.append(kwargs)
    return prepared


@dataclass
class Candidates:
    """
    Positions that every member has scored, ready to be verified. Row b has `proposed[b]` proposals; where `drawable[b]`
    the next position is scored as well, and a token can be drawn from r there.

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
    that all members have scored before it is proposed needs no proposal: it is drawn from r. A drafter proposes too,
    but what it has scored or not holds up nothing.

    The rows' tokens are `ids[b, :total[b]]`, of which `ids[b, :verified[b]]` are final; counts are numpy integers.
    Scores of pending positions are held by row, the j-th belonging to token `verified[b] + j`.

    Where processors must be called once for each token, in order, positions are verified one at a time, in all rows
    that go on (`by_column`).

    Args:
        members (`list[Member]`): N, in the order `[model, *assistant_models]`.
        drafters (`list[Member | GeneratorDrafter]`): Propose and are no part of r. The authors are
            `[*members, *drafters]`.
        input_ids (`torch.LongTensor` `[B, P]`): The prompts.
        distribution (`EnsembleDistribution`), drawing (`drawing.Greedy`, `Gumbel`, `Maximal`), schedule (`Schedule`):
            What is proposed from and verified against, how tokens are drawn, who runs.
        costs (`list[PassCosts]`, A): Where the times of passes go.
        max_length (`int`): Tokens of the longest text allowed, prompt included.
        stop_tokens (`Collection[int]`): Tokens after which nothing is proposed.
        keep_scores, keep_logits (`bool`): Whether candidates carry log r and the main model's raw logits.
        recorder (`Recorder`, *optional*): Told what happens, for a trace.
        ranks (`Ranks`, *optional*): The processes that decode together.
    """

    def __init__(
        self,
        members: list[Member],
        drafters: list[Member | GeneratorDrafter],
        input_ids: torch.Tensor,
        distribution: EnsembleDistribution,
        drawing: Greedy,
        schedule: Schedule,
        costs: list[PassCosts],
        max_length: int,
        stop_tokens: Collection[int] = (),
        keep_scores: bool = False,
        keep_logits: bool = False,
        recorder: NoRecord | None = None,
        ranks: Ranks | None = None,
    ):
        # Not the parent's: that prepares one assistant for its own `generate()`; see `assistant_kwargs`
        self.members = members
        self.authors = [*members, *drafters]
        self.models = [author for author in self.authors if isinstance(author, Member)]
        self.distribution = distribution
        self.drawing = drawing
        self.schedule = schedule
        self.costs = costs
        self.stop_tokens = frozenset(stop_tokens)
        self.by_column = distribution.process.once_a_token
        self.in_step = len(input_ids) > 1 and any(model.in_step for model in self.models)

        batch, prompt_length = input_ids.shape
        self.prompt_length = prompt_length
        self.max_length = max_length
        self.ids = input_ids  # [B, >= max(total)]; see `_reserve`
        self.verified = np.full(batch, prompt_length)
        self.total = self.verified.copy()
        self.sealed = np.zeros(batch, bool)  # the last token ends the text: nothing follows it
        self.barred = np.zeros(batch, bool)  # the last token is a draft that a processor forbids: nor here, so far
        self.stuck = np.zeros(batch, bool)  # there is nothing to draw the next token from
        self.active = np.ones(batch, bool)  # rows whose text goes on
        self.current: int | None = None  # the author of the last pass, and its consecutive passes
        self.turn = 0

        self.evidence = [Ragged(batch) for _ in self.models]
        self.peaks = [Ragged(batch) for _ in self.members]
        self.q = Ragged(batch)
        self.logits = Ragged(batch)
        self.keep_scores, self.keep_logits = keep_scores, keep_logits
        self.recorder = recorder or NoRecord()
        self.ranks = ranks or Ranks()
        self.keep_q = drawing.needs_q or recorder.on
        self.pending: list[list[tuple[int, float]]] = [[] for _ in range(batch)]  # author and confidence of proposals
        self.drawn: list[list[int]] = [[] for _ in range(batch)]  # and which they are
        self.prompt_seconds = 0.0  # inside the authors' passes over the prompts
        self.proposed, self.judged, self.accepted = ([0] * len(self.authors) for _ in range(3))  # by author

    def get_candidates(self, input_ids: torch.Tensor | None = None, **kwargs) -> Candidates:
        """Runs members until some active row has a position that all have scored. The arguments are not needed."""
        while True:
            scored = self._scored(np.minimum.reduce([member.seen for member in self.members]))  # [B]
            scored = np.where(self.stuck & (self.verified > self.verified[self.active].min()), 0, scored)
            if self.by_column:  # settle one, once all rows have it
                scored = np.minimum(scored, 1) * (scored[self.active] > 0).all()
            proposed = np.minimum(scored, self.total - self.verified)
            drawable = scored > proposed
            if drawable.any() or proposed.any():
                return self._collect(proposed, drawable)
            if self.current is not None and self.current < len(self.models):
                self._propose(self.current)
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
        verdict = self.ranks.agree(torch.stack([num_matches, emitted, self.distribution.sound()]))
        emitted = verdict[1]
        accepted, tokens, sound = verdict.cpu().numpy()  # the round's only transfer
        self._check(candidates, sound)
        emits = ((accepted < candidates.proposed) | candidates.drawable) & (accepted < sound)
        accepted = np.minimum(accepted, sound)
        self._count(candidates.proposed, accepted)
        gained, falls = self._align(accepted + emits, emits) if self.in_step else (accepted + emits, emits)
        kept = np.minimum(accepted, gained)
        emits = gained > kept
        if self.recorder.on:
            acceptance = self.drawing.acceptance(candidates.tokens, candidates.q, candidates.r)
            self.recorder.verified(self.verified, candidates, acceptance, kept, gained, tokens, falls)
        for i in range(len(self.models), len(self.authors)):
            for b, (n, token) in enumerate(zip(kept.tolist(), tokens.tolist())):
                self._learn(i, b, n, [token] if emits[b] else [], bool(falls[b]))
        self._put(emitted, np.flatnonzero(emits), self.verified + kept)
        last = [int(token) if new else (drawn[n - 1] if n else -1)
                for token, new, drawn, n in zip(tokens, emits, self.drawn, kept.tolist())]  # fmt: skip
        self.verified = self.verified + gained
        self.total = np.where(falls, self.verified, self.total)
        self._seal(falls, last)
        self.barred &= self.total > self.verified
        # A token drawn from r has been seen by no member; a kept proposal is settled
        keep, settled = np.where(falls, self.verified - 1, self.total), self.verified - falls
        if self.in_step and falls.any():  # rows at their end make room: slots are only removed from all rows
            keep, settled = (np.full_like(length, length[falls].min()) for length in (keep, settled))
        for author in self.models:
            author.forget(keep, settled)
        for held in (*self.evidence, *self.peaks, self.q, self.logits):
            held.drop_first(gained)
        for rows in (self.pending, self.drawn):
            for row, n, all_fall in zip(rows, gained.tolist(), falls.tolist()):
                del row[: len(row) if all_fall else n]
        self.schedule.advanced(int(gained.sum()) / max(int(self.active.sum()), 1))
        return gained

    def _check(self, candidates: Candidates, sound: np.ndarray) -> None:
        """
        Raises if there is nothing to draw a row's next token from. A row that is ahead of others waits for them, and a
        later position for a later round, since texts may end before.
        """
        scored = candidates.proposed + candidates.drawable > 0
        self.stuck = np.where(scored, sound == 0, self.stuck)
        lost = np.flatnonzero(self.stuck & (self.verified == self.verified[self.active].min()))
        if len(lost):
            row, none = int(lost[0]), np.zeros_like(sound)
            place = f"New token {int(self.verified[row]) - self.prompt_length + 1} of row {row}"
            peaks, evidence = ([held.window(none, 1)[row, 0] for held in many] for many in (self.peaks, self.evidence))
            peaks, evidence = map(float, peaks), evidence[: len(self.members)]
            raise self.distribution.fault(row, list(peaks), evidence, place)

    def _align(self, gained: np.ndarray, emits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Cuts what rows gain `[B]` to what the slowest row gains that does not end here. Says also in which rows `[B]`
        the tokens behind these fall: in all that go on, unless no row has lost or drawn any.
        """
        # Exact: cap_b, the least gain of the *other* rows that do not end, depends on their draws alone. Row b keeps
        # min(gained_b, cap_b) whatever it drew, and draws the rest anew. So a row that ends is cut too: it would have
        # been cut if its last proposal had been rejected.
        ends = self.sealed & ~emits & (self.verified + gained == self.total)
        if not (self.active & ~ends).any():
            return gained, emits
        least = gained[self.active & ~ends].min()
        going_on = self.active & ~(ends & (gained <= least))
        all_fall = (emits[going_on] | (gained[going_on] > least)).any()
        return np.minimum(gained, least), np.where(going_on, all_fall, emits)

    def retire(self, wanted: np.ndarray) -> None:
        """Goes on only with rows `[B]` that are wanted and not at their end."""
        self.active = wanted & ~(self.sealed & (self.verified == self.total))

    def _scored(self, seen: np.ndarray) -> np.ndarray:
        """How many positions `[B]` from `verified[b]` on are scored after so many tokens; 0 if a row is not active."""
        return np.maximum(seen + 1 - self.verified, 0) * self.active

    def _readable(self) -> np.ndarray:
        """Up to which token `[B]` reading is of use: what follows a closed row's last token is not wanted."""
        return (self.total - (self.sealed | self.barred)) * self.active

    def _open(self) -> np.ndarray:
        """Rows `[B]` in which another token may be proposed."""
        return self.active & ~(self.sealed | self.barred)

    def _situation(self) -> Situation:
        readable = self._readable()
        lag = [np.maximum(readable - model.seen, 0).tolist() for model in self.models]
        lag += [[0] * len(readable)] * (len(self.authors) - len(lag))  # what is no model has nothing to read
        return Situation(self.current, self.turn, lag, self.pending, self._open().tolist())

    def _run_next(self) -> None:
        """One forward pass of the author whose turn it is; keeps what it scored. Or one call of a generator."""
        situation = self._situation()
        self.current, self.turn = self.schedule.next(situation)
        if self.current >= len(self.models):
            return self._draft(self.current)
        author = self.authors[self.current]
        lag = situation.lag[self.current]
        first = np.maximum(author.seen + 1, self.prompt_length)  # [B]: the tokens that the new logits predict
        have = self._scored(author.seen)
        width = self.schedule.width(self.current, max(lag)) if author.passes else 0
        logits = self.distribution.align(author.score(self.ids, np.maximum(self._readable(), author.seen), width))
        late = np.maximum(self.verified - first, 0)  # what a drafter missed needs no scores any more
        unwanted = int(late.min())
        first, late, logits = first + unwanted, late - unwanted, logits[:, unwanted:]
        count = np.maximum(author.seen + 1 - first, 0) * (np.array(lag) > 0)
        scores = self.distribution.scores(logits, self.ids, first, count)
        added = np.maximum(count - late, 0)
        self.recorder.ran(self.current, first + late, added)
        self._take_time(self.current)
        self.evidence[self.current].put(have, self.distribution.evidence_of(scores), late, added)
        if self.current < len(self.members):
            self.peaks[self.current].put(have, scores.amax(-1, keepdim=True), late, added)
        if self.keep_logits and self.current == 0:
            self.logits.put(have, logits, late, added)

    def _propose(self, i: int) -> None:
        """Author i proposes, if the schedule wants it, the next token of every open row of which it has seen all."""
        rows = self._open() & (self.authors[i].seen == self.total)
        if not rows.any():
            return
        pending = self.total - self.verified  # [B]
        evidence, form = self.evidence[i].window(pending, 1), self.drawing.form
        q = self.distribution.proposal(evidence, self.ids, self.total, rows.astype(int), form)
        tokens = self.drawing.propose(q[:, 0], self.total - self.prompt_length)
        # Fetched together, in one transfer; the decision sees the confidence alone
        proposal = torch.stack([tokens.double(), self.distribution.top_prob(q[:, 0], form).double()])
        proposal = self.ranks.agree(proposal)
        tokens = proposal[0].long()
        drawn, confidence = proposal.tolist()
        # Where q is no distribution nothing is proposed: if the text comes there, r will tell
        sound = np.isfinite(confidence) & (np.array(confidence) > 0)
        if self.in_step and not sound[rows].all():
            return
        rows = rows & sound
        if not rows.any():
            return
        confidence = [own if row else None for own, row in zip(confidence, rows.tolist())]
        if not self.schedule.proposes(self._situation(), confidence):
            return
        self._put(tokens, np.flatnonzero(rows), self.total)
        if self.keep_q:
            self.q.put(pending, self.distribution.probs(q, form), np.zeros_like(pending), rows.astype(int))
        self._note(i, confidence, [[int(token)] if row else [] for token, row in zip(drawn, rows.tolist())])

    def _draft(self, i: int) -> None:
        """Drafter i, which is no model, proposes in every open row as many tokens as it has and the schedule wants."""
        drafter, batch = self.authors[i], len(self.ids)
        drafts: list[list[int]] = [[] for _ in range(batch)]
        logits: list[torch.Tensor | None] = [None] * batch
        drafter.stopwatch.start()
        for row in np.flatnonzero(self._open()).tolist():
            end = int(self.total[row])
            drafts[row], logits[row] = drafter.draft(row, self.ids[row : row + 1, :end], self.max_length - end)
            stop = next((j + 1 for j, token in enumerate(drafts[row]) if token in self.stop_tokens), None)
            drafts[row] = drafts[row][:stop]
        drafts = self.ranks.agree_on(drafts)
        if self.in_step:
            shortest = min(len(drafts[row]) for row in np.flatnonzero(self._open()).tolist())
            drafts = [tokens[:shortest] for tokens in drafts]
        drafter.stopwatch.stop(1)
        self.recorder.ran(i)
        self._take_time(i)

        trust = [drafter.trust[row] if drafts[row] else None for row in range(batch)]
        length = self.schedule.draft(self._situation(), trust) if any(drafts) else 0
        for row, tokens in enumerate(drafts):
            if tokens and not length:
                drafter.watch(row, int(self.total[row]), tokens)
            drafts[row] = tokens[:length]
        forbidden = self._cut_at_forbidden(drafts)
        longest = max(map(len, drafts))
        if not longest:
            return
        added = np.array([len(tokens) for tokens in drafts])
        tokens = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in drafts], device=self.ids.device)
        if self.keep_q:
            dtype = torch.promote_types(self.members[0].model.dtype, torch.float32)
            q = torch.zeros(batch, longest, self.distribution.width, dtype=dtype, device=self.ids.device)
            q.scatter_(2, tokens[:, :, None], 1.0)  # certain
            for row, given in enumerate(logits):
                if self.drawing.needs_q and given is not None and added[row]:
                    q[row, : added[row]] = self.distribution.align(given[: added[row]]).softmax(-1)
            self.q.put(self.total - self.verified, q, np.zeros_like(added), added)
        for j in range(longest):
            self._put(tokens[:, j], np.flatnonzero(added > j), self.total + j)
        self._note(i, trust, drafts)
        self.barred |= forbidden

    def _cut_at_forbidden(self, drafts: list[list[int]]) -> np.ndarray:
        """
        Cuts drafts behind the first token that a function of prefixes forbids: it will be rejected, and the function
        may fail on what it never allowed. Says which rows `[B]` end with one. The token itself stays a proposal, since
        what is proposed must not depend on what was drawn.
        """
        allowed = [
            self.distribution.process.allowed(row, self.ids[row, : self.total[row]], tokens) if tokens else 0
            for row, tokens in enumerate(drafts)
        ]
        if self.in_step:
            allowed = [min(n for n, tokens in zip(allowed, drafts) if tokens)] * len(drafts) if any(drafts) else allowed
        forbidden = np.array([n < len(tokens) for n, tokens in zip(allowed, drafts)])
        for row, n in enumerate(allowed):
            del drafts[row][n + 1 :]
        return forbidden

    def _take_time(self, i: int) -> None:
        """Passes on how long author i took."""
        for width, seconds in self.authors[i].stopwatch.laps():
            self.recorder.timed(i, width, seconds)
            if width is None:  # the prompt's pass is no measure for the others
                self.prompt_seconds += seconds
            else:
                self.costs[i].add(len(self.ids), width, seconds)
                self.schedule.ran(i, seconds)

    def take_all_times(self) -> None:
        """Passes on how long everything took, waiting for what is still under way."""
        for i, author in enumerate(self.authors):
            author.stopwatch.wait()
            self._take_time(i)

    def _note(self, i: int, confidence: Sequence[float | None], drawn: list[list[int]]) -> None:
        """Takes up the proposals of author i: so many tokens of each row that all have its confidence there."""
        for row, tokens in enumerate(drawn):
            self.pending[row] += [(i, confidence[row])] * len(tokens)
            self.drawn[row] += tokens
        added = np.array([len(tokens) for tokens in drawn])
        self.total = self.total + added
        self.proposed[i] += int(added.sum())
        self.recorder.proposed(i, self.turn, added)
        self._seal(added > 0, [tokens[-1] if tokens else -1 for tokens in drawn])

    def _put(self, tokens: torch.Tensor, rows: np.ndarray, where: np.ndarray) -> None:
        """Writes `tokens[b]` at `ids[b, where[b]]` in some rows."""
        if len(rows):
            self._reserve(int(where[rows].max()) + 1)
        column = int(where[0])
        if len(rows) == len(where) and (where == column).all():
            self.ids[:, column] = tokens
        elif len(rows):
            index = torch.from_numpy(np.stack([rows, where[rows]])).to(self.ids.device)
            self.ids[index[0], index[1]] = tokens[index[0]].to(self.ids.device)

    def _reserve(self, length: int) -> None:
        """Makes room in `ids` for so many tokens: twice what is needed, so that few copies are made."""
        have = self.ids.shape[1]
        if length > have:
            self.ids = torch.nn.functional.pad(self.ids, (0, min(max(2 * length, ROOM), self.max_length) - have))

    def _seal(self, changed: np.ndarray, tokens: Sequence[int]) -> None:
        """Notes for rows with a new last token `[B]` whether anything can follow it."""
        ends = (self.total >= self.max_length) | [token in self.stop_tokens for token in tokens]
        self.sealed = np.where(changed, ends, self.sealed)

    def _collect(self, proposed: np.ndarray, drawable: np.ndarray) -> Candidates:
        count = proposed + drawable
        width = int(count.max())
        start = np.zeros_like(count)
        evidence = [held.window(start, width) for held in self.evidence[: len(self.members)]]
        position = (self.ids, self.verified, count)
        form = self.drawing.form
        log_r = self.distribution.target(evidence, *position, "log_probs") if self.keep_scores else None
        if log_r is None:
            r = self.distribution.target(evidence, *position, form)
        else:  # processors are not called again
            r = log_r.exp() if form == "probs" else log_r
        q = probs = None
        if self.recorder.on:
            probs = self.distribution.probs(r, form)
        if self.keep_q:
            q = self.q.window(start, width) if proposed.any() else r
        return Candidates(
            tokens=window(self.ids, self.verified, width),
            r=r,
            q=q,
            probs=probs,
            log_r=log_r,
            logits=self.logits.window(start, width) if self.keep_logits else None,
            proposed=proposed,
            drawable=drawable,
        )

    def _count(self, proposed: np.ndarray, accepted: np.ndarray) -> None:
        """Adds verified and accepted proposals to their authors' account."""
        for b, (row, tried, kept) in enumerate(zip(self.pending, proposed.tolist(), accepted.tolist())):
            for j, (author, confidence) in enumerate(row[: min(kept + 1, tried)]):
                self.judged[author] += 1
                self.accepted[author] += j < kept
                self.schedule.judged(author, confidence, j < kept)
                if author >= len(self.models):
                    self.authors[author].judged(b, j < kept)

    def _learn(self, i: int, b: int, kept: int, drawn: list[int], falls: bool) -> None:
        """
        Shows drafter i, which is no model, what row b has gained: proposals kept, perhaps a token drawn from r; and
        whether what was pending behind them falls.
        """
        drafter = self.authors[i]
        own = [j < kept for j, (author, _) in enumerate(self.pending[b]) if author == i]
        if own and kept + len(drawn):
            drafter.settle(b, self.ids[b : b + 1, : int(self.verified[b]) + kept], len(own), sum(own))
        for hit in drafter.compare(b, int(self.verified[b]), [*self.drawn[b][:kept], *drawn], falls):
            self.schedule.judged(i, drafter.trust[b], hit)
            drafter.judged(b, hit)
