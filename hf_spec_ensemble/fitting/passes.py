"""Members' scores of texts: the passes, batched by length, and what is kept of them. No maths of weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..members.adapters import lock_of
from ..members.placement import device_of
from ..notices import warn_once
from .linear import CHUNK, Block
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


class Reading:
    """
    Members that read texts, each text once; and again only where whole distributions are asked for that were not kept.

    Args:
        members (`list[PreTrainedModel]`): N, causal.
        shared (`int`): V: tokens that all of them have.
        fitted (`list[Text]`), held_out (`list[Text]`): The two parts. No batch has texts of both.
        batch_size (`int`): Texts in a pass.
        memory (`int`): Bytes of distributions that are kept; 0 keeps only numbers, one for each member and token.
        seed (`int`): Of the order of the batches, which is random, so that an interruption leaves a fair sample.
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
    ):
        self.members = members
        self.shared = shared
        self.memory = memory
        self.given = {text: place for place, text in enumerate([*fitted, *held_out])}
        batches = [*_batches(fitted, batch_size, False), *_batches(held_out, batch_size, True)]
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
        self.waiting = [batches[i] for i in order]
        self.read: list[Batch] = []
        self.numbers: dict[Text, torch.Tensor] = {}  # [N, t], float64
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
        tokens, numbers, kept = batch.tokens, [], []
        for number, member in enumerate(self.members, 1):
            logits = self._logits(member, batch.texts)
            dtype = torch.float64 if logits.dtype == torch.float64 else torch.float16
            keep = room >= len(self.members) * count * self.shared * dtype.itemsize
            parts, chunks = [], []
            for at in range(0, count, CHUNK):
                log_probs = logits[at : at + CHUNK].log_softmax(-1)
                there = tokens[at : at + CHUNK, None].to(log_probs.device)
                parts.append(log_probs.gather(1, there)[:, 0].double().cpu())
                if keep:
                    chunks.append(_finite(log_probs).to("cpu", dtype))
            numbers.append(torch.cat(parts))
            if numbers[-1].isnan().any():
                raise ValueError(f"Member {number}, a {type(member).__name__}, gives logits that are nan.")
            if keep:
                kept.append(torch.cat(chunks))
        batch.kept = torch.stack(kept) if len(kept) == len(self.members) else None
        for text, of_text in zip(batch.texts, torch.stack(numbers).split([text.count for text in batch.texts], 1)):
            self.numbers[text] = of_text
        return 0 if batch.kept is None else batch.kept.nbytes

    def texts(self, held_out: bool) -> list[Text]:
        """Those of a part that were read, in the order of the batches."""
        return [text for batch in self.read if batch.held_out == held_out for text in batch.texts]

    def log_probs(self, held_out: bool) -> torch.Tensor:
        """Of what counts in a part, under each member: `[N, T]`."""
        return torch.cat([self.numbers[text] for text in self.texts(held_out)], 1)

    def blocks(self, held_out: bool) -> Iterator[Block]:
        """The whole distributions of a part, batch by batch, in the order of `texts`."""
        device = device_of(self.members[0])
        for batch in self.read:
            if batch.held_out != held_out:
                continue
            kept = batch.kept
            if kept is None:
                each = (self._logits(member, batch.texts) for member in self.members)
                kept = torch.stack([_finite(logits.log_softmax(-1)).to(device) for logits in each])
            tokens = batch.tokens
            for at in range(0, len(tokens), CHUNK):
                yield Block(kept[:, at : at + CHUNK].to(device), tokens[at : at + CHUNK].to(device))

    @torch.inference_mode()
    def _logits(self, member: PreTrainedModel, texts: list[Text]) -> torch.Tensor:
        """A member's logits where it predicts what counts: `[t, V]`, in float32 or better."""
        length = max(len(text.ids) for text in texts)
        # Padded on the right, which causal models do not see
        ids = torch.tensor([[*text.ids, *[0] * (length - len(text.ids))] for text in texts])
        mask = torch.tensor([[1] * len(text.ids) + [0] * (length - len(text.ids)) for text in texts])
        device = device_of(member)
        with lock_of(member):
            logits = member(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        rows = [row[text.first - 1 : len(text.ids) - 1, : self.shared] for row, text in zip(logits, texts)]
        return torch.cat(rows).to(torch.promote_types(logits.dtype, torch.float32))


def _finite(log_probs: torch.Tensor) -> torch.Tensor:
    """What a mean of logits can hold: -inf times a probability of zero is nan."""
    return log_probs.clamp(min=torch.finfo(torch.float16).min)


def _batches(texts: list[Text], size: int, held_out: bool) -> list[Batch]:
    by_length = sorted(texts, key=lambda text: len(text.ids))
    return [Batch(by_length[at : at + size], held_out) for at in range(0, len(by_length), size)]
