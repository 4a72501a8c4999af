"""What `generate()` returns: the text so far, token by token in step over the rows, and the statistics of the call."""

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from ..trace import Trace
from .call import Call
from .final_scores import FinalScores, padding


@dataclass
class EnsembleStats:
    """
    What a call did. Lists have one entry for each member, in the order `[model, *assistant_models]`, and last one for a
    drafter if there is one.

    Args:
        new_tokens (`int`): Tokens generated, over all rows.
        forward_passes (`list[int]`): Forward passes; one serves all rows of a batch.
        proposed (`list[int]`): Tokens proposed, over all rows.
        verified (`list[int]`): Of those, the ones that were verified; the others followed a rejected one.
        accepted (`list[int]`): Of those, the ones that were kept.
        seconds (`float`): From the first forward pass to the last token.
        member_seconds (`list[float]`): Inside the forward passes. For the standard ensemble the main model's entry also
            holds the rest of transformers' own loop.
        owned (`list[int]`): Tokens that were drawn from each member, where a speculative ensemble draws with
            `"ancestral"` coupling; else empty.
        predicted_speedup (`float`, *optional*): Over the standard ensemble, inside the passes, those over the prompt
            included, as `theory.predict` has it for this acceptance, the costs measured in this process and the
            proposal lengths (the last plan's if they choose themselves); `None` where costs are not known. A batch
            takes as long as its slowest row, which is not foreseen.

    Example:

    >>> from hf_spec_ensemble import EnsembleStats

    >>> EnsembleStats(new_tokens=10, forward_passes=[6, 7], verified=[4, 5], accepted=[4, 3]).acceptance
    [1.0, 0.6]
    """

    new_tokens: int = 0
    forward_passes: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0
    member_seconds: list[float] = field(default_factory=list)
    owned: list[int] = field(default_factory=list)
    predicted_speedup: float | None = None

    @property
    def acceptance(self) -> list[float | None]:
        """Accepted of verified proposals, by member; `None` where there were none."""
        return [kept / tried if tried else None for kept, tried in zip(self.accepted, self.verified)]

    @property
    def passes_per_token(self) -> float | None:
        """Forward passes, all members', per generated token; `None` if there is none."""
        return sum(self.forward_passes) / self.new_tokens if self.new_tokens else None


@dataclass
class EnsembleDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """
    `GenerateDecoderOnlyOutput`, `stats`, and `trace` where `EnsembleConfig(trace=True)` asks for one.

    `scores` are the log-probabilities of the distribution r that each token was drawn from, `logits` the main model's
    raw logits; for a row that has finished they give its padding token probability one. `past_key_values` is the main
    model's cache, of as many tokens of `sequences` as it has seen in every row (at most all but the last), or `None`
    where a cache of convolutions cannot be cut to that.
    """

    stats: EnsembleStats | None = None
    trace: Trace | None = None


class EnsembleEncoderDecoderOutput(GenerateEncoderDecoderOutput):
    """
    `GenerateEncoderDecoderOutput`, `stats` and `trace`, as in `EnsembleDecoderOnlyOutput`. Here these are attributes
    and no items: Whisper's `generate` takes all items apart into rows.
    """

    def __init__(self, *args, stats: EnsembleStats | None = None, trace: Trace | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.stats, self.trace = stats, trace


def output_class(model: PreTrainedModel) -> type:
    return EnsembleEncoderDecoderOutput if model.config.is_encoder_decoder else EnsembleDecoderOnlyOutput


def pads_finished_rows(stopping_criteria: StoppingCriteriaList) -> bool:
    """As in transformers: rows that have finished are padded only if some token could have finished them."""
    return any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)


class Transcript:
    """
    The generated text as the other decoding methods see it: every row has the same number of tokens.

    Rows get ahead of each other; a column is committed when every row that is not finished has it. Then stopping
    criteria and streamer see just what they would see in the standard ensemble, in the same order, once a column.

    Args:
        call (`Call`): Of which it takes the prompt, the stopping criteria, the streamer, and what is to be returned.

        final_scores (`FinalScores`, *optional*): Where scores and logits come from, at the end; else from `add`.

    State: all of it, written here alone.
    """

    def __init__(self, call: Call, final_scores: FinalScores | None = None):
        self.sequences = prompt = call.input_ids.long()
        self.prompt_length = prompt.shape[1]
        self.stopping_criteria, self.streamer, self.ranks = call.stopping_criteria, call.streamer, call.ranks
        self.unfinished = np.ones(len(prompt), bool)  # [B]
        pads = pads_finished_rows(call.stopping_criteria)
        self.pad = call.generation_config._pad_token_tensor if pads else None
        keeps = final_scores is None
        self.scores = () if keeps and call.returns("scores") else None  # one tensor [B, V] a column
        self.logits = () if keeps and call.returns("logits") else None
        self.lengths = np.zeros(len(prompt), int)  # [B]: tokens committed of texts that had not finished
        self._rows: dict[str, list[list[torch.Tensor]]] = {
            name: [[] for _ in prompt] for name in ("scores", "logits") if getattr(self, name) is not None
        }

    @property
    def new_tokens(self) -> int:
        """Tokens committed, by row."""
        return self.sequences.shape[1] - self.prompt_length

    @property
    def wanted(self) -> np.ndarray:
        """Rows `[B]` whose next tokens are still wanted."""
        return self.unfinished if self.pad is not None else self.unfinished.any() | self.unfinished

    def add(self, count: np.ndarray, **columns: torch.Tensor) -> None:
        """Takes the first `count[b]` of the columns `[B, K, V]` called `scores` or `logits`, if they are to be kept."""
        for name, rows in self._rows.items():
            for row, n in enumerate(count.tolist()):
                rows[row].extend(columns[name][row, :n])

    def commit(self, ids: torch.Tensor, length: np.ndarray) -> None:
        """
        Commits all columns that are complete.

        Args:
            ids (`torch.LongTensor` `[B, >= T]`): The rows' tokens.
            length (`np.ndarray` `[B]`): How many of them are verified.
        """
        while self.unfinished.any() and (length > self.sequences.shape[1])[self.wanted].all():
            column = self.sequences.shape[1]
            tokens = ids[:, column]
            if self.pad is not None and not self.unfinished.all():
                going_on = torch.from_numpy(self.unfinished).to(tokens.device)
                tokens = torch.where(going_on, tokens, self.pad.to(tokens.device))
            self.lengths = self.lengths + self.wanted
            self._keep(tokens)
            self.sequences = torch.cat([self.sequences, tokens[:, None]], dim=1)
            done = self.ranks.agree(self.stopping_criteria(self.sequences, self.scores))
            self.unfinished = self.unfinished & ~done.cpu().numpy()
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())

    def take(self, final_scores: FinalScores) -> None:
        """Takes scores and logits at the end, where they were not known when tokens were committed."""
        tokens = self.sequences[:, self.prompt_length :]
        self.scores = final_scores.scores(tokens, self.lengths)
        self.logits = final_scores.logits(tokens, self.lengths)

    def _keep(self, tokens: torch.Tensor) -> None:
        for name, rows in self._rows.items():
            some = next(row[0] for row in rows if row)  # [V]
            column = [
                row.pop(0) if wanted else padding(some, token)
                for row, wanted, token in zip(rows, self.wanted.tolist(), tokens)
            ]
            setattr(self, name, (*getattr(self, name), torch.stack(column)))
