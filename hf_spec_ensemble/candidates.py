"""EnsembleCandidateGenerator: the proposals awaiting verification, and the members' passes that make and score them."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.generation import AssistedCandidateGenerator, GenerationConfig

from .distribution import EnsembleDistribution
from .drawing import Greedy
from .member import Member
from .padded import append, columns, drop_first, pick
from .schedule import Schedule


def assistant_kwargs(
    assistants: list[PreTrainedModel], input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict
) -> list[dict]:
    """What each assistant's `forward` is given, on its device, as transformers' own candidate generator prepares it."""
    return [
        AssistedCandidateGenerator(input_ids, assistant, generation_config, model_kwargs).assistant_kwargs
        for assistant in assistants
    ]


@dataclass
class Candidates:
    """
    Positions that every member has scored, ready to be verified. Row b has `proposed[b]` proposals; where `drawable[b]`
    the next position is scored as well, and a token can be drawn from r there.

    `tokens` `[B, K]`, `log_r` `[B, K, V]`, `log_q` `[B, K, V]` or `None` if the drawing rule needs none,
    `logits` `[B, K, V]`, the main model's, or `None`; `proposed`, `drawable` `[B]` on the CPU.
    """

    tokens: torch.Tensor
    log_r: torch.Tensor
    log_q: torch.Tensor | None
    logits: torch.Tensor | None
    proposed: torch.Tensor
    drawable: torch.Tensor


class EnsembleCandidateGenerator(AssistedCandidateGenerator):
    """
    Runs members in turns until proposals can be verified.

    Every pass of a member scores all pending tokens it has not seen, and may append one proposal of its own: the
    "bonus" token of speculative decoding is a proposal here, since it comes from one member and not from r. A position
    that all members have scored before it is proposed needs no proposal: it is drawn from r.

    The rows' tokens are `ids[b, :total[b]]`, of which `ids[b, :verified[b]]` are final; counts are on the CPU. Scores
    of pending positions are held in tensors whose column j belongs to token `verified[b] + j`.

    Args:
        members (`list[Member]`): In the order `[model, *assistant_models]`.
        input_ids (`torch.LongTensor` `[B, P]`): The prompts.
        distribution (`EnsembleDistribution`), drawing (`drawing.Greedy`, `Gumbel`, `Maximal`), schedule (`Schedule`):
            What is proposed from and verified against, how tokens are drawn, who runs.
        generation_config (`GenerationConfig`), model_kwargs (`dict`): As `generate()` prepared them.
        max_length (`int`): Tokens of the longest text allowed, prompt included.
        stop_tokens (`torch.LongTensor`, *optional*): Tokens after which nothing is proposed.
        keep_logits (`bool`): Whether candidates carry the main model's raw logits.
    """

    def __init__(
        self,
        members: list[Member],
        input_ids: torch.Tensor,
        distribution: EnsembleDistribution,
        drawing: Greedy,
        schedule: Schedule,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        max_length: int,
        stop_tokens: torch.Tensor | None = None,
        keep_logits: bool = False,
    ):
        super().__init__(input_ids, members[schedule.proposer].model, generation_config, model_kwargs)
        self.members = members
        self.distribution = distribution
        self.drawing = drawing
        self.schedule = schedule
        self.stop_tokens = stop_tokens

        batch, prompt_length = input_ids.shape
        self.prompt_length = prompt_length
        self.max_length = max_length
        self.ids = torch.nn.functional.pad(input_ids, (0, max_length - prompt_length))  # [B, max_length]
        self.verified = torch.full((batch,), prompt_length)
        self.total = self.verified.clone()
        self.sealed = torch.zeros(batch, dtype=torch.bool)  # the last token ends the text: nothing follows it
        self.active = torch.ones(batch, dtype=torch.bool)  # rows whose text goes on
        self.current: int | None = None  # the member of the last pass, and its consecutive passes
        self.turn = 0

        self.evidence: list[torch.Tensor | None] = [None] * len(members)  # [B, W, V] each
        self.log_q: torch.Tensor | None = None  # [B, W, V]
        self.logits: torch.Tensor | None = None  # [B, W, V]
        self.keep_logits = keep_logits
        self.author = torch.zeros(batch, 0, dtype=torch.long)  # [B, W]: who proposed
        self.proposed, self.judged, self.accepted = ([0] * len(members) for _ in range(3))  # by member

    def get_candidates(self, input_ids: torch.Tensor | None = None, **kwargs) -> Candidates:
        """Runs members until some active row has a position that all have scored. The arguments are not needed."""
        while True:
            scored = self._scored().amin(0)  # [B], by all members
            proposed = scored.minimum(self.total - self.verified)
            drawable = scored > proposed
            if drawable.any() or proposed.any():
                return self._collect(proposed, drawable)
            if self.current is not None and self.schedule.may_propose(self.current):
                self._propose(self.current)
            self._run_next()

    def update_candidate_strategy(
        self, emitted: torch.Tensor, candidates: Candidates, num_matches: torch.Tensor
    ) -> torch.Tensor:
        """
        Settles verified positions: keeps the first `num_matches[b]` proposals of row b and, if one was rejected or if
        the row was drawable, `emitted[b]` after them. What was pending behind that token is forgotten.

        Args:
            emitted (`torch.LongTensor` `[B]`), num_matches (`torch.LongTensor` `[B]`): From the drawing rule.
            candidates (`Candidates`): What was verified.

        Returns:
            `torch.LongTensor` `[B]`, CPU: How many tokens each row has gained.
        """
        accepted = num_matches.cpu()
        self._count(candidates.proposed, accepted)
        emits = (accepted < candidates.proposed) | candidates.drawable
        rows = emits.nonzero()[:, 0].to(self.ids.device)
        where = (self.verified + accepted).to(self.ids.device)
        self.ids[rows, where[rows]] = emitted.to(self.ids.device)[rows]

        gained = accepted + emits.long()
        self.verified = self.verified + gained
        self.total = torch.where(emits, self.verified, self.total)
        self._seal(emits)
        # A token drawn from r has been seen by no member; a kept proposal is settled
        keep = torch.where(emits, self.verified - 1, self.total)
        for i, member in enumerate(self.members):
            member.forget(keep, settled=torch.where(emits, self.verified - 1, self.verified))
            self.evidence[i] = drop_first(self.evidence[i], gained)
        self.log_q = drop_first(self.log_q, gained)
        self.logits = drop_first(self.logits, gained)
        self.author = drop_first(self.author, gained)
        return gained

    def retire(self, wanted: torch.Tensor) -> None:
        """Goes on only with rows `[B]` that are wanted and not at their end."""
        self.active = wanted & ~(self.sealed & (self.verified == self.total))

    def _scored(self) -> torch.Tensor:
        """How many positions from `verified[b]` on each member has scored: `[N, B]`; 0 for rows that are not active."""
        seen = torch.stack([member.seen for member in self.members])
        return (seen + 1 - self.verified).clamp(min=0) * self.active

    def _readable(self) -> torch.Tensor:
        """Up to which token `[B]` reading is of use: what follows a sealed row's last token is not wanted."""
        return torch.where(self.active, self.total - self.sealed.long(), 0)

    def _open(self) -> torch.Tensor:
        """Rows `[B]` in which another token may be proposed."""
        return self.active & ~self.sealed

    def _run_next(self) -> None:
        """One forward pass of the member whose turn it is; keeps what it scored."""
        readable = self._readable()
        lag = torch.stack([(readable - member.seen).clamp(min=0) for member in self.members])  # [N, B]
        self.current, self.turn = self.schedule.next(self.current, self.turn, lag, self._open())
        member = self.members[self.current]
        first = (member.seen + 1).clamp(min=self.prompt_length)  # [B]: the tokens that the new logits predict
        have = self._scored()[self.current]
        logits = self.distribution.align(member.score(self.ids, readable.maximum(member.seen)))
        added = torch.where(lag[self.current] > 0, member.seen + 1 - first, 0)
        evidence = self.distribution.evidence(logits, self.ids, first, added)
        self.evidence[self.current] = append(self.evidence[self.current], have, evidence, added)
        if self.keep_logits and self.current == 0:
            self.logits = append(self.logits, have, logits, added)

    def _propose(self, i: int) -> None:
        """Member i proposes the next token of every open row of which it has seen all tokens."""
        rows = self._open() & (self.members[i].seen == self.total)
        if not rows.any():
            return
        pending = self.total - self.verified  # [B]
        log_q = self.distribution.proposal(pick(self.evidence[i], pending[:, None]), self.ids, self.total, rows.long())
        tokens = self.drawing.propose(log_q[:, 0], self.total - self.prompt_length)
        index = rows.nonzero()[:, 0].to(self.ids.device)
        self.ids[index, self.total.to(self.ids.device)[index]] = tokens[index]
        if self.drawing.needs_proposal_probs:
            self.log_q = append(self.log_q, pending, log_q, rows.long())
        self.author = append(self.author, pending, torch.full_like(pending, i)[:, None], rows.long())
        self.total = self.total + rows.long()
        self.proposed[i] += int(rows.sum())
        self._seal(rows)

    def _seal(self, changed: torch.Tensor) -> None:
        """Notes for rows with a new last token `[B]` whether anything can follow it."""
        ends = self.total >= self.max_length
        if self.stop_tokens is not None:
            last = pick(self.ids, (self.total - 1)[:, None])[:, 0]
            ends = ends | torch.isin(last, self.stop_tokens.to(last.device)).cpu()
        self.sealed = torch.where(changed, ends, self.sealed)

    def _collect(self, proposed: torch.Tensor, drawable: torch.Tensor) -> Candidates:
        count = proposed + drawable.long()
        width = int(count.max())
        index = columns(torch.zeros_like(count), width)
        evidence = torch.stack([pick(scores, index) for scores in self.evidence])  # [N, B, K, V]
        log_q = self.log_q
        if self.drawing.needs_proposal_probs:
            blank = torch.zeros_like(evidence[0, :, :0]) if log_q is None else log_q[:, :width]
            missing = width - blank.shape[1]
            log_q = torch.nn.functional.pad(blank, (0, 0, 0, missing), value=-torch.inf)
        return Candidates(
            tokens=pick(self.ids, columns(self.verified, width)),
            log_r=self.distribution.target(evidence, self.ids, self.verified, count),
            log_q=log_q,
            logits=pick(self.logits, index) if self.keep_logits else None,
            proposed=proposed,
            drawable=drawable,
        )

    def _count(self, proposed: torch.Tensor, accepted: torch.Tensor) -> None:
        """Adds verified and accepted proposals to their authors' account."""
        column = torch.arange(self.author.shape[1])
        verified = column < (accepted + 1).minimum(proposed)[:, None]
        kept = column < accepted[:, None]
        for i in range(len(self.members)):
            mine = self.author == i
            self.judged[i] += int((mine & verified).sum())
            self.accepted[i] += int((mine & kept).sum())
