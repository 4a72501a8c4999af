"""What `generate()` returns: the text so far, token by token in step over the rows, and the statistics of the call."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from ..trace import Trace
from .call import Call
from .final_scores import FinalScores, padding
from .writing import Writer


@dataclass
class EnsembleStats:
    """
    What a call did. Lists have one entry for each member, in the order `[model, *assistant_models]`, and last one for a
    drafter if there is one. For members that share passes (`shared`) these count for the first; the others have 0.

    Args:
        new_tokens (`int`): Tokens generated, over all rows.
        forward_passes (`list[int]`): Forward passes; one serves all rows of a batch.
        proposed (`list[int]`): Tokens proposed, over all rows.
        verified (`list[int]`): Of those, the ones that were verified; the others followed a rejected one.
        accepted (`list[int]`): Of those, the ones that were kept.
        seconds (`float`): From the first forward pass to the last token.
        member_seconds (`list[float]`): Inside the forward passes. For the standard ensemble the main model's entry also
            holds the rest of transformers' own loop.
        owned (`list[int]`): Tokens that were drawn from each member, with `"ancestral"` coupling; else empty.
        shared (`list[list[int]]`): Members that ran as rows of one pass, by their places in these lists.
        prompt_tokens_saved (`int`): Tokens of such members' prompts that were read once for several rows.
        predicted_speedup (`float`, *optional*): Over the standard ensemble, inside the passes, those over the prompt
            included, as `theory.predict` has it for this acceptance, the costs measured in this process and the
            proposal lengths (the last plan's if they choose themselves); `None` where costs are not known. A batch, a
            greedy mixture that some members settle, and drafts in places are simulated.
        settled_early (`float`, *optional*): Of a greedy mixture: the share of tokens that members with more than half
            of the weight settled before the others had scored them; `None` if there were none.
        row_tokens (`list[int]`): Tokens generated, by row.
        authors (`list[str]`): What members and drafter are called.

    Printed, it is a short report. Example: two rows, which share their passes.

    >>> from hf_spec_ensemble import EnsembleStats

    >>> stats = EnsembleStats(
    ...     10, forward_passes=[4, 5], verified=[4, 5], accepted=[4, 3], row_tokens=[6, 4], authors=["base", "math"]
    ... )
    >>> stats.acceptance, stats.passes_per_token, stats.passes_per_token_of_a_row
    ([1.0, 0.6], 0.9, 1.5)
    >>> print(stats)
    10 tokens in 2 rows, 0.00 s: 9 forward passes, 1.50 per token of a row, 0.90 per token of the batch
    base: 4 passes, accepted 4 of 4 proposals (100 %)
    math: 5 passes, accepted 3 of 5 proposals (60 %)
    """

    new_tokens: int = 0
    forward_passes: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0
    member_seconds: list[float] = field(default_factory=list)
    owned: list[int] = field(default_factory=list)
    shared: list[list[int]] = field(default_factory=list)
    prompt_tokens_saved: int = 0
    predicted_speedup: float | None = None
    settled_early: float | None = None
    row_tokens: list[int] = field(default_factory=list)
    authors: list[str] = field(default_factory=list)

    @property
    def acceptance(self) -> list[float | None]:
        """Accepted of verified proposals, by member; `None` where there were none."""
        return [kept / tried if tried else None for kept, tried in zip(self.accepted, self.verified)]

    @property
    def passes_per_token(self) -> float | None:
        """
        Forward passes, all members', for each token of the batch; `None` if there is none. Rows share passes: the
        standard ensemble of N members takes about N / B.
        """
        return sum(self.forward_passes) / self.new_tokens if self.new_tokens else None

    @property
    def passes_per_token_of_a_row(self) -> float | None:
        """
        Forward passes, all members', for each token of the longest row; `None` if there is none. The standard ensemble
        of N members takes N, whatever the batch.
        """
        longest = max(self.row_tokens, default=0)
        return sum(self.forward_passes) / longest if longest else None

    def __str__(self) -> str:
        rows = f" in {len(self.row_tokens)} rows" if len(self.row_tokens) > 1 else ""
        said = f"{self.new_tokens} tokens{rows}, {self.seconds:.2f} s: {sum(self.forward_passes)} forward passes"
        if rows and self.new_tokens:
            said += f", {self.passes_per_token_of_a_row:.2f} per token of a row"
        if self.new_tokens:
            said += f", {self.passes_per_token:.2f} per token{' of the batch' if rows else ''}"
        lines = [said]
        for i, passes in enumerate(self.forward_passes):
            line = f"{self.authors[i] if self.authors else f'author {i}'}: {passes} passes"
            if self.verified[i:] and self.verified[i]:
                share = f"{self.accepted[i] / self.verified[i]:.0%}".replace("%", " %")
                line += f", accepted {self.accepted[i]} of {self.verified[i]} proposals ({share})"
            lines.append(line + (f", {self.owned[i]} tokens drawn from it" if self.owned else ""))
        if self.predicted_speedup is not None and any(self.verified):  # else nothing to expect it from
            lines.append(
                f"Expected: {self.predicted_speedup:.2f} times as fast as the standard ensemble, in passes, from "
                "this acceptance and the measured costs"
            )
        return "\n".join(lines)


@dataclass
class EnsembleDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """
    transformers' `GenerateDecoderOnlyOutput` with `stats` (`EnsembleStats`), and with `trace` (`Trace`) if
    `EnsembleConfig(trace=True)` asks for one.

    `scores` are the log-probabilities of the distribution r that each token was drawn from, `logits` the main model's
    raw logits; for a row that has finished they give its padding token probability one. `cache` (in
    older versions of transformers `past_key_values`) is the main model's, of as many tokens of `sequences` as it has
    seen in every row (at most all but the last), or `None` where a cache of convolutions cannot be cut to that.
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
        tell (`Callable[[int], None]`, *optional*): Called with the position of every column, among the new tokens,
            before the streamer is given it.

    State: all of it, written here alone.
    """

    def __init__(self, call: Call, final_scores: FinalScores | None = None, tell: Callable[[int], None] | None = None):
        self.sequences = prompt = call.input_ids.long()
        self.prompt_length = prompt.shape[1]
        self.stopping_criteria, self.streamer, self.ranks = call.stopping_criteria, call.streamer, call.ranks
        self.tell = tell
        self.unfinished = np.ones(len(prompt), bool)  # [B]
        pads = pads_finished_rows(call.stopping_criteria)
        self.pad = call.generation_config._pad_token_tensor if pads else None
        keeps = final_scores is None
        self.scores = () if keeps and call.returns("scores") else None  # one tensor [B, V] a column
        self.logits = () if keeps and call.returns("logits") else None
        self.lengths = np.zeros(len(prompt), int)  # [B]: tokens committed of texts that had not finished
        self.writer = None if call.union is None else Writer(call.union.maps[0], prompt, call.pad_token_id)
        self._rows: dict[str, list[list[torch.Tensor]]] = {
            name: [[] for _ in prompt] for name in ("scores", "logits") if getattr(self, name) is not None
        }

    @property
    def new_tokens(self) -> int:
        """Tokens committed, by row."""
        return self.sequences.shape[1] - self.prompt_length

    @property
    def written(self) -> torch.Tensor:
        """What `generate()` returns `[B, T]`: prompts and texts, in the main model's ids."""
        return self.sequences if self.writer is None else self.writer.sequences()

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
            written = tokens[:, None] if self.writer is None else self.writer.put(tokens, self.wanted.tolist())
            done = self.ranks.agree(self._stop())
            self.unfinished = self.unfinished & ~done.cpu().numpy()
            if self.tell is not None:
                self.tell(column - self.prompt_length)
            if self.streamer is not None:
                for column in written.cpu().T:
                    self.streamer.put(column)

    def _stop(self) -> torch.Tensor:
        """Which rows `[B]` stop with their last token."""
        if self.writer is None:
            return self.stopping_criteria(self.sequences, self.scores)
        return self.writer.asked(self.stopping_criteria, self.sequences, self.scores)

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
