"""Proposal and ensemble distributions for pending positions: the members' logits, the processors and the config."""

from dataclasses import replace

import torch

from .combine import combine
from .config import EnsembleConfig
from .processing import PositionwiseProcessor


class EnsembleDistribution:
    """
    Turns members' logits into what is proposed from (q) and what is verified against (r).

    A member's *evidence* is the form of its logits that is combined: processed, or raw with
    `combine_on="raw_logits"`. It is made once for every position that a member scores.

    Args:
        config (`EnsembleConfig`): With its weights filled in (`EnsembleConfig.for_members`).
        process (`PositionwiseProcessor`): The call's logits processors.
        vocab_sizes (`tuple[int, int]`): Width of the main model's logits, and how many of their first columns all
            members share: beyond those a token has probability zero.
        device (`torch.device`): Where everything is computed: that of the main model's inputs.
    """

    def __init__(self, config: EnsembleConfig, process: PositionwiseProcessor, vocab_sizes: tuple[int, int], device):
        self.config = config
        self.process = process
        self.width, self.shared = vocab_sizes
        self.device = device

    def align(self, logits: torch.Tensor) -> torch.Tensor:
        """A model's logits `[..., V']` on our device, in float32 or better, over the main model's vocabulary."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(self.device, dtype)
        if logits.shape[-1] == self.width == self.shared:
            return logits
        padded = logits.new_full((*logits.shape[:-1], self.width), -torch.inf)
        padded[..., : self.shared] = logits[..., : self.shared]
        return padded

    def evidence(self, logits: torch.Tensor, ids, first, count) -> torch.Tensor:
        """A member's aligned logits `[B, K, V]` in the form that is combined; see `PositionwiseProcessor`."""
        return logits if self.config.combine_on == "raw_logits" else self.process(logits, ids, first, count)

    def proposal(self, evidence: torch.Tensor, ids, first, count) -> torch.Tensor:
        """log q = log softmax(process(logits)) of one member, `[B, K, V]`, from its evidence."""
        if self.config.combine_on == "raw_logits":
            evidence = self.process(evidence, ids, first, count)
        return evidence.log_softmax(-1)

    def target(self, evidence: torch.Tensor, ids, first, count) -> torch.Tensor:
        """
        log r, `[B, K, V]`, from all members' evidence `[N, B, K, V]`. Where the processors forbid every token that the
        plausibility cut leaves (a minimum length, say, when only the end is plausible), there is no cut.
        """
        scores = self._combined(evidence, self.config, ids, first, count)
        if self.config.plausibility > 0 and self.config.combine_on == "raw_logits":
            empty = (scores == -torch.inf).all(-1, keepdim=True)
            if empty.any():
                uncut = self._combined(evidence, replace(self.config, plausibility=0.0), ids, first, count)
                scores = torch.where(empty, uncut, scores)
        return scores.log_softmax(-1)

    def _combined(self, evidence, config, ids, first, count) -> torch.Tensor:
        if callable(config.method) and self.shared < self.width:  # a user's function sees no padding
            combined = evidence.new_full(evidence.shape[1:], -torch.inf)
            combined[..., : self.shared] = combine(evidence[..., : self.shared], config)
        else:
            combined = combine(evidence, config)
        return self.process(combined, ids, first, count) if config.combine_on == "raw_logits" else combined
