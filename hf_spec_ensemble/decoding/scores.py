"""MemberScores: what a member of the ensemble has scored of pending positions. Context: what all share in a call."""

from dataclasses import dataclass

import numpy as np
import torch

from ..ensemble.distribution import EnsembleDistribution
from ..ensemble.padded import Ragged
from ..members.member import Member
from ..members.ranks import Ranks
from ..members.rows import SharedMember
from ..trace.recorder import NoRecord
from .drawing import Greedy
from .final_scores import FinalScores
from .text import Text


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


class MemberScores:
    """
    What one member has scored of pending positions, the j-th of row b belonging to position `text.final[b] + j`.

    State: its evidence there, the greatest of what that was made of (`peaks`), and raw logits if they are to be kept,
    written by the author whose passes score for this member; up to where final positions were passed on.

    Args:
        number (`int`): The member's, among the N; a later one for a model that drafts.
        context (`Context`): Of the call.
        member (`Member` or `SharedMember`): What reads for it.
        keeps_logits (`bool`): Whether raw logits are to be kept for the output.
    """

    def __init__(self, number: int, context: Context, member: Member | SharedMember, keeps_logits: bool = False):
        self.number, self.context, self._member = number, context, member
        self.evidence, self.peaks = Ragged(context.text.batch), Ragged(context.text.batch)
        self.logits = Ragged(context.text.batch) if keeps_logits else None
        self._passed_on = [0] * context.text.batch

    @property
    def seen(self) -> np.ndarray:
        """How many new tokens `[B]` the member has read."""
        return self._member.seen

    @property
    def passes(self) -> int:
        """Forward passes so far."""
        return self._member.passes

    def put(self, logits: torch.Tensor, have: np.ndarray, first: np.ndarray, count: np.ndarray, late: np.ndarray):
        """
        Takes what a pass gives.

        Args:
            logits (`torch.Tensor` `[B, K, V]`): Aligned, for positions from `first[b]` on, of which `count[b]` count.
            have, first, count, late (`np.ndarray` `[B]`): Pending positions that were scored before; of the new ones
                the first, their number, and how many of them are final by now.
        """
        distribution, text = self.context.distribution, self.context.text
        scores = distribution.scores(logits, text.ids, text.place(first), count)
        evidence = distribution.evidence_of(scores)
        if self.context.final_scores:
            for row, n in enumerate(np.minimum(late, count).tolist()):
                for j in range(n):
                    self._pass_on(row, int(first[row]) + j, evidence[row, j], logits[row, j])
        added = np.maximum(count - late, 0)
        self.evidence.put(have, evidence, late, added)
        self.peaks.put(have, scores.amax(-1, keepdim=True), late, added)
        if self.logits is not None:
            self.logits.put(have, logits, late, added)

    def pass_on(self, gained: np.ndarray) -> None:
        """Gives scores of the first `gained[b]` positions, which are final now, to who keeps them for the output."""
        if not self.context.final_scores:
            return
        for row, n in enumerate(gained.tolist()):
            for j in range(min(n, self.evidence.count(row))):
                logits = None if self.logits is None else self.logits.at(row, j)
                self._pass_on(row, int(self.context.text.final[row]) + j, self.evidence.at(row, j), logits)

    def keep(self, gained: np.ndarray, count: np.ndarray) -> None:
        """Drops the first `gained[b]` positions, which are final now; of those behind, the first `count[b]` stay."""
        for held in (self.evidence, self.peaks, self.logits):
            if held is not None:
                held.drop_first(gained)
                held.keep_first(count)

    def keep_rows(self, rows: np.ndarray) -> None:
        """Goes on with these rows alone."""
        for held in (self.evidence, self.peaks, self.logits):
            if held is not None:
                held.keep_rows(rows)

    def _pass_on(self, row: int, position: int, probs: torch.Tensor, logits: torch.Tensor | None) -> None:
        if position < self._passed_on[row]:  # a recurrent member goes back farther than it must, and reads again
            return
        self._passed_on[row] = position + 1
        self.context.final_scores.add(self.number, row, position, probs, None if self.logits is None else logits)
