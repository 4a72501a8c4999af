"""Proposal and ensemble distributions for pending positions: the members' logits, the processors and the config."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..config import EnsembleConfig
from .combine import combine, works_on_probs
from .faults import named, sound_positions
from .processing import PositionwiseProcessor
from .wide import columns


class EnsembleDistribution:
    """
    Turns members' logits into what is proposed from (q) and what is verified against (r).

    A member's *evidence* is what is combined: its logits, processed or raw, or probabilities. It is made once for every
    position that a member scores.

    Args:
        config (`EnsembleConfig`): With its weights filled in (`EnsembleConfig.for_members`).
        process (`PositionwiseProcessor`): The call's logits processors.
        vocab_sizes (`tuple[int, int]`): Width of the main model's logits, and how many of their first columns all
            members share: beyond those a token has probability zero.
        device (`torch.device`): Where everything is computed: that of the main model's inputs.
        names (`Sequence[str]`, N, *optional*): What errors call the members.
        common (`torch.LongTensor` `[C]`, *optional*): Columns that all members share, where these are not the first.
    """

    def __init__(
        self,
        config: EnsembleConfig,
        process: PositionwiseProcessor,
        vocab_sizes: tuple[int, int],
        device,
        names: Sequence[str] = (),
        common: torch.Tensor | None = None,
    ):
        self.names = names
        self.peak: torch.Tensor | None = None  # [B, K]: the greatest of what `target` last made r of
        self.config = config
        self.process = process
        self.width, self.shared = vocab_sizes
        self.device = device
        self.common = None if common is None else common.to(device)
        if common is None and callable(config.method) and self.shared < self.width:
            self.common = torch.arange(self.shared, device=device)  # a user's function sees no padding
        self.on_raw_logits = config.combine_on == "raw_logits"
        self.on_probs = works_on_probs(config)

    def align(self, logits: torch.Tensor) -> torch.Tensor:
        """A model's logits `[..., V']` on our device, in float32 or better, over the main model's vocabulary."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(self.device, dtype)
        if logits.shape[-1] == self.width == self.shared:
            return logits
        padded = logits.new_full((*logits.shape[:-1], self.width), -torch.inf)
        known = min(self.shared, logits.shape[-1])  # a drafter may know less than the members share
        padded[..., :known] = logits[..., :known]
        return padded

    def evidence(self, logits: torch.Tensor, ids, first, count) -> torch.Tensor:
        """A member's aligned logits `[B, K, V]` as they are combined; see `PositionwiseProcessor`."""
        return self.evidence_of(self.scores(logits, ids, first, count))

    def scores(self, logits: torch.Tensor, ids, first, count) -> torch.Tensor:
        """What evidence is made of: a member's aligned logits `[B, K, V]`, processed or raw."""
        return logits if self.on_raw_logits else self.process(logits, ids, first, count)

    def evidence_of(self, scores: torch.Tensor) -> torch.Tensor:
        """Evidence `[..., V]` from `scores`."""
        return scores.softmax(-1) if self.on_probs else scores

    def proposal(self, evidence: torch.Tensor, ids, first, count, form: str) -> torch.Tensor:
        """
        q = softmax(process(logits)) of one member, `[B, K, V]`, from its evidence, without processors that need final
        tokens; `form` as for `target`.
        """
        processed = self.process(evidence, ids, first, count, final=False) if self.on_raw_logits else evidence
        return self._as(form, processed)

    def probs(self, values: torch.Tensor, form: str) -> torch.Tensor:
        """q or r `[..., V]`, given in the form `"probs"` or `"scores"`, as probabilities."""
        return values if form == "probs" or self.on_probs else values.softmax(-1)

    def top_prob(self, values: torch.Tensor, form: str) -> torch.Tensor:
        """The probability `[...]` of the most probable token of q `[..., V]`, given in this form."""
        return self.probs(values, form).amax(-1)

    def target(self, evidence: Sequence[torch.Tensor], ids, first, count, form: str) -> torch.Tensor:
        """
        r, `[B, K, V]`, from all N members' evidence `[B, K, V]`. Where the processors forbid every token that the
        plausibility cut leaves (a minimum length, say, when only the end is plausible), there is no cut; but for
        processors that must not be called again.

        Args:
            form (`str`): `"probs"`, `"log_probs"`, or `"scores"`: anything with the same maximum, which is cheapest.
        """
        combined = self._combined(evidence, self.config, ids, first, count)
        if self.config.plausibility > 0 and self.on_raw_logits and not self.process.once_a_token:
            empty = (combined == -torch.inf).all(-1, keepdim=True)
            if empty.any():
                uncut = self._combined(evidence, replace(self.config, plausibility=0.0), ids, first, count)
                combined = torch.where(empty, uncut, combined)
        self.note(combined)
        if self.on_probs and callable(self.config.method):
            combined = combined / combined.sum(-1, keepdim=True)
        return self._as(form, combined)

    def note(self, combined: torch.Tensor) -> None:
        """Says what is drawn from next, `[B, K, V]`, in the form of the members' evidence."""
        self.peak = combined.amax(-1)

    def sound(self) -> torch.Tensor:
        """How many positions `[B]` of what was last noted are distributions, up to the first that is none."""
        return sound_positions(self.peak, self.on_probs)

    def fault(self, row: int, peaks: Sequence[float], evidence: Sequence[torch.Tensor], place: str) -> ValueError:
        """
        The error for a row in which r, as `target` last gave it, is not a distribution at the first position. Only then
        the cause is searched for.

        Args:
            row (`int`): b.
            peaks (`Sequence[float]`, N): The greatest of each member's `scores` there.
            evidence (`Sequence[torch.Tensor]`, N tensors `[V]`): There.
            place (`str`): What the position is called.
        """
        after = "" if self.on_raw_logits else " after the logits processors"
        found = [
            f"{name} gives {named(peak)}{after}" for name, peak in zip(self.names, peaks) if not math.isfinite(peak)
        ]
        peak = float(self.peak[row, 0])
        if not found and self.on_raw_logits:
            known = torch.arange(self.shared, device=self.device) if self.common is None else self.common
            combined = float(combine([columns(one, known) for one in evidence], self.config).amax())
            if math.isfinite(combined):
                found = [f"the logits processors leave {named(peak)}"]
                if self.config.plausibility > 0 and self.process.once_a_token:
                    found[0] += " of those that `plausibility` leaves (a processor without state would be asked again)"
            peak = combined
        if not found:
            of_method = "the callable `method` returns" if callable(self.config.method) else "their combination is"
            found = [f"{of_method} {named(peak, self.on_probs)}"]
        return ValueError(f"{place} has no distribution to be drawn from: {'; '.join(found)}.")

    def _combined(self, evidence, config, ids, first, count) -> torch.Tensor:
        if self.common is None:
            combined = combine(evidence, config)
        else:
            known = combine([columns(scores, self.common) for scores in evidence], config)
            combined = evidence[0].new_full(evidence[0].shape, 0.0 if self.on_probs else -torch.inf)
            combined.index_copy_(-1, self.common, known)
        return self.process(combined, ids, first, count) if self.on_raw_logits else combined

    def _as(self, form: str, values: torch.Tensor) -> torch.Tensor:
        if form == "scores":
            return values
        if self.on_probs:
            return values.log() if form == "log_probs" else values
        return values.log_softmax(-1) if form == "log_probs" else values.softmax(-1)
