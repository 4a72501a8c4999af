"""Members' scores of texts: the passes, batched by length, and what is kept of them. No maths of weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..ensemble.union import Union
from ..members.adapters import lock_of
from ..members.placement import device_of
from ..notices import warn_once
from .linear import CHUNK, GONE, Block
from .texts import Text


@dataclass
class Batch:
    """Texts that are read together, and the log-probabilities `[N, t, V]` at what counts of them, where these fit."""

    texts: list[Text]
    held_out: bool
    kept: torch.Tensor | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """What counts of all its texts, one after the other: `[t]`."""
        return torch.tensor([token for text in self.texts for token in text.ids[text.first :]])


class OwnTokens(NamedTuple):
    """A member's own tokens of a text, and behind which of them what counts begins and each of its tokens ends."""

    ids: Sequence[int]
    ends: Sequence[int]  # t + 1

    @classmethod
    def of(cls, text: Text, member: int, union: Union | None) -> "OwnTokens":
        """Of the member with this number, from 0."""
        if union is None or member == 0:
            return cls(text.ids, range(text.first - 1, len(text.ids)))
        ids = list(text.prompts[member - 1])
        ends = [len(ids) - 1]
        for u in text.ids[text.first :]:
            ids += union.maps[member].read(u)
            ends.append(len(ids) - 1)
        return cls(ids, ends)


class Scored(NamedTuple):
    """
    What a member says of texts, one after the other: logits `[m, V]` over its own tokens, which predict its tokens
    `[m]`, and which `[t]` of these logits predict what counts.
    """

    logits: torch.Tensor
    tokens: torch.Tensor
    at: torch.Tensor


class Reading:
    """
    Members that read texts, each text once; and again only where whole distributions are asked for that were not kept.

    Args:
        members (`list[PreTrainedModel]`): N, causal.
        shared (`int`): V: tokens that all of them have, or those of the union that can be decoded.
        fitted (`list[Text]`), held_out (`list[Text]`): The two parts. No batch has texts of both.
        batch_size (`int`): Texts in a pass.
        memory (`int`): Bytes of distributions that are kept; 0 keeps only numbers, one for each member and token.
        seed (`int`): Of the order of the batches, which is random, so that an interruption leaves a fair sample.
        union (`Union`, *optional*): The vocabulary of members with different tokenizers.
    """

    def __init__(
        self,
        members: Sequence[PreTrainedModel],
        shared: int,
        fitted: list[Text],
        held_out: list[Text],
        batch_size: int = 8,
        memory: int = 0,
        seed: int = 0,
        union: Union | None = None,
    ):
        self.members = members
        self.shared, self.union = shared, union
        self.memory = memory
        self.given = {text: place for place, text in enumerate([*fitted, *held_out])}
        batches = [*_batches(fitted, batch_size, False), *_batches(held_out, batch_size, True)]
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
        self.waiting = [batches[i] for i in order]
        self.read: list[Batch] = []
        self.numbers: dict[Text, torch.Tensor] = {}  # [N, t], float64
        self.alone: dict[Text, torch.Tensor] = {}  # the same, of members by themselves
        self.interrupted = False

    def run(self, progress: bool = True) -> None:
        """
        Reads all texts. After an interruption, only the texts read by all members are used.

        Raises:
            `KeyboardInterrupt`: if that leaves one of the parts empty.
            `ValueError`: if a member's logits are nan.
        """
        spent, texts = 0, sum(len(batch.texts) for batch in self.waiting)
        try:
            with tqdm(total=texts, desc="reading", unit="text", disable=not progress) as bar:
                for batch in self.waiting:
                    spent += self._read(batch, self.memory - spent)
                    self.read.append(batch)
                    bar.update(len(batch.texts))
        except KeyboardInterrupt:
            if not all(self.texts(held_out) for held_out in (False, True)):
                raise
            self.interrupted = True
        if self.memory and any(batch.kept is None for batch in self.read):
            again = sum(len(batch.texts) for batch in self.read if batch.kept is None)
            warn_once(
                f"The distributions of {again} texts do not fit into `memory` ({self.memory / 2**30:.3g} GiB), so that "
                "every evaluation of the weights reads them again: raise it, or give fewer or shorter texts."
            )

    def _read(self, batch: Batch, room: int) -> int:
        """The numbers of a batch, and its distributions if there is room; gives the bytes these take."""
        count = sum(text.count for text in batch.texts)
        tokens, numbers, alone, kept = self._columns(batch.tokens), [], [], []
        for number, member in enumerate(self.members, 1):
            scored = self._logits(number - 1, batch.texts)
            dtype = torch.float64 if scored.logits.dtype == torch.float64 else torch.float16
            keep = room >= len(self.members) * count * self.shared * dtype.itemsize
            parts, chunks = [], []
            for at in range(0, count, CHUNK):
                log_probs = self._log_probs(number - 1, scored.logits[scored.at[at : at + CHUNK]])
                there = tokens[at : at + CHUNK, None].to(log_probs.device)
                parts.append(log_probs.gather(1, there)[:, 0].double().cpu())
                if keep:
                    chunks.append(_finite(log_probs).to("cpu", dtype))
            numbers.append(torch.cat(parts))
            if numbers[-1].isnan().any():
                raise ValueError(f"Member {number}, a {type(member).__name__}, gives logits that are nan.")
            alone.append(numbers[-1] if self.union is None else _by_pieces(numbers[-1], scored))
            if keep:
                kept.append(torch.cat(chunks))
        batch.kept = torch.stack(kept) if len(kept) == len(self.members) else None
        counts = [text.count for text in batch.texts]
        for kind, found in ((self.numbers, numbers), (self.alone, alone)):
            kind.update(zip(batch.texts, torch.stack(found).split(counts, 1)))
        return 0 if batch.kept is None else batch.kept.nbytes

    def texts(self, held_out: bool) -> list[Text]:
        """Those of a part that were read, in the order of the batches."""
        return [text for batch in self.read if batch.held_out == held_out for text in batch.texts]

    def log_probs(self, held_out: bool, alone: bool = False) -> torch.Tensor:
        """
        Of what counts in a part, under each member: `[N, T]`. A member `alone` writes a string that it has no token for
        with several, in place of never.
        """
        return torch.cat([(self.alone if alone else self.numbers)[text] for text in self.texts(held_out)], 1)

    def blocks(self, held_out: bool) -> Iterator[Block]:
        """The whole distributions of a part, batch by batch, in the order of `texts`."""
        device = device_of(self.members[0])
        for batch in self.read:
            if batch.held_out != held_out:
                continue
            kept = batch.kept
            if kept is None:
                each = (self._logits(i, batch.texts) for i in range(len(self.members)))
                log_probs = (self._log_probs(i, scored.logits[scored.at]) for i, scored in enumerate(each))
                kept = torch.stack([_finite(of_member).to(device) for of_member in log_probs])
            tokens = self._columns(batch.tokens)
            for at in range(0, len(tokens), CHUNK):
                yield Block(kept[:, at : at + CHUNK].to(device), tokens[at : at + CHUNK].to(device))

    def _columns(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where in the V columns tokens are."""
        common = self.union and self.union.common
        return tokens if common is None else torch.searchsorted(common, tokens)

    def _log_probs(self, member: int, logits: torch.Tensor) -> torch.Tensor:
        """A member's log-probabilities `[t, V]` of all that can be decoded, from its own logits."""
        if self.union is None:
            return logits[:, : self.shared].log_softmax(-1)
        logits, common = self.union.maps[member].to(logits.device).logits(logits), self.union.common
        return (logits if common is None else logits[:, common.to(logits.device)]).log_softmax(-1)

    @torch.inference_mode()
    def _logits(self, number: int, texts: list[Text]) -> Scored:
        """A member's logits, in float32 or better, where it predicts what counts."""
        member, own = self.members[number], [OwnTokens.of(text, number, self.union) for text in texts]
        length = max(len(text.ids) for text in own)
        # Padded on the right, which causal models do not see
        ids = torch.tensor([[*text.ids, *[0] * (length - len(text.ids))] for text in own])
        mask = torch.tensor([[1] * len(text.ids) + [0] * (length - len(text.ids)) for text in own])
        device = device_of(member)
        with lock_of(member):
            logits = member(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        rows, tokens, at, count = [], [], [], 0
        for row, text in zip(logits, own):
            first, last = text.ends[0], text.ends[-1]
            rows.append(row[first:last])
            tokens += text.ids[first + 1 : last + 1]
            at += [count + end - first for end in text.ends[:-1]]
            count += last - first
        logits = torch.cat(rows).to(torch.promote_types(logits.dtype, torch.float32))
        return Scored(logits, torch.tensor(tokens, device=device), torch.tensor(at, device=device))


def _by_pieces(log_probs: torch.Tensor, scored: Scored) -> torch.Tensor:
    """Log-probabilities `[t]`, where these are -inf those of a member's own tokens for the same strings."""
    if log_probs.isfinite().all():
        return log_probs
    own = [
        logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].double()
        for logits, tokens in zip(scored.logits.split(CHUNK), scored.tokens.split(CHUNK))
    ]
    lengths = torch.diff(scored.at, append=scored.at.new_tensor([len(scored.tokens)])).tolist()
    pieces = torch.stack([part.sum() for part in torch.cat(own).split(lengths)]).cpu()
    return torch.where(log_probs == -torch.inf, pieces, log_probs)


def _finite(log_probs: torch.Tensor) -> torch.Tensor:
    """What a mean of logits can hold: -inf times a probability of zero is nan."""
    return log_probs.clamp(min=GONE)


def _batches(texts: list[Text], size: int, held_out: bool) -> list[Batch]:
    by_length = sorted(texts, key=lambda text: len(text.ids))
    return [Batch(by_length[at : at + size], held_out) for at in range(0, len(by_length), size)]
