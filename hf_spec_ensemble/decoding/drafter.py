"""Drafters that are not models: transformers' candidate generators as proposers from outside the ensemble."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import CandidateGenerator, PromptLookupCandidateGenerator

from ..choices import PROMPT_LOOKUP
from ..config import AUTO, EnsembleConfig
from ..members.member import Member
from ..members.stopwatch import Stopwatch
from .suffixes import Suffixes


NAMED = (AUTO, PROMPT_LOOKUP)  # drafters that are asked for by a word
LOOKUP_TOKENS = 16  # that a lookup copies at most
LOOKUP_NGRAM = 3  # that must match, or a shorter one if none does
FORGETTING = 0.3  # weight of the last proposal in how far a drafter is trusted


class GeneratorDrafter:
    """
    Takes all proposals of candidate generators at once, and tracks how many of them are accepted.

    If a generator returns the logits that its proposals were drawn from, these are used. Otherwise q is one at the
    proposal, which is then accepted with probability r(x). Both are exact.

    Args:
        generators (`list[CandidateGenerator]`, B): One for each row.
        vocab_size (`int`): Of the main model: a candidate that it does not know, and what follows, is cut.
        on_host (`bool`): Whether they take their tokens on the CPU.
    """

    _by_row = ("generators", "trust", "watched")

    def __init__(self, generators: list[CandidateGenerator], vocab_size: int, on_host: bool = False):
        self.generators = generators  # which keep nothing of a text, where rows are refilled
        self.on_host = on_host
        self.vocab_size = vocab_size
        self.stopwatch = Stopwatch(torch.device("cpu"))
        self.trust = [0.5] * len(generators)  # [B]: recent share of proposals kept, standing in for a confidence
        # [B]: where tokens that were not proposed would have stood, the tokens, and how sure it was of them; to learn
        # from what comes instead
        self.watched: list[tuple[int, list[int], float]] = [(0, [], 0.0)] * len(generators)

    def draft(
        self, row: int, ids: torch.Tensor, most: int, pending: Sequence[int] = ()
    ) -> tuple[list[int], torch.Tensor | None]:
        """
        Args:
            row (`int`): b.
            ids (`torch.LongTensor` `[1, T]`): The row's tokens so far, what is pending included.
            most (`int`): The largest number of tokens.
            pending (`Sequence[int]`): The last of these tokens, which may yet be rejected.

        Returns:
            At most so many proposed tokens, and the logits `[K, V]` they were drawn from, or `None`.
        """
        candidates, logits = self.generators[row].get_candidates(ids.cpu() if self.on_host else ids)
        tokens = self._known(candidates[0, ids.shape[1] :].tolist()[:most])
        return tokens, None if logits is None else logits[0]

    def _known(self, tokens: list[int]) -> list[int]:
        """These tokens up to the first that the main model does not have."""
        return tokens[: next((j for j, token in enumerate(tokens) if token >= self.vocab_size), len(tokens))]

    def learn(self, row: int, tokens: Sequence[int]) -> None:
        """Adds a row's new final tokens; generators see them in the next call."""

    def settle(self, row: int, ids: torch.Tensor, proposed: int, kept: int) -> None:
        """Tells the generator how many of the last tokens it proposed were kept, as transformers' loop does."""
        scores = ids.new_empty(1, proposed + 1, 0)  # [1, candidates + 1, 0]: only the number is looked at
        self.generators[row].update_candidate_strategy(ids, scores, kept)

    def refill(self, row: int, prompt: list[int]) -> None:
        """Another text begins in a row."""
        self.trust[row], self.watched[row] = 0.5, (0, [], 0.0)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Goes on with these rows alone."""
        for name in self._by_row:
            setattr(self, name, [getattr(self, name)[row] for row in rows])

    def confidence(self, row: int) -> float:
        """How sure it is of what it drafted last for a row, in [0, 1]."""
        return self.trust[row]

    def judged(self, row: int, kept: bool) -> None:
        self.trust[row] += FORGETTING * (kept - self.trust[row])

    def watch(self, row: int, position: int, tokens: list[int]) -> None:
        """Remembers tokens that were not proposed from `position` on, unless others are still being compared."""
        if not self.watched[row][1]:
            self.watched[row] = (position, tokens, self.confidence(row))

    def compare(self, row: int, position: int, tokens: list[int], falls: bool) -> list[tuple[float, bool]]:
        """
        Which of the remembered tokens were generated, up to the first that was not, each with the drafter's confidence.

        Args:
            position (`int`): Where the tokens stand that the row has gained.
            tokens (`list[int]`): These.
            falls (`bool`): Whether what was pending behind them fell.
        """
        start, watched, confidence = self.watched[row]
        end = position + len(tokens)
        if falls and end <= start:
            self.watched[row] = (0, [], 0.0)  # they continued another text
            return []
        hits = [a == b for a, b in zip(watched, tokens[max(start - position, 0) :])]
        missed = False in hits
        rest = [] if missed else watched[len(hits) :]
        self.watched[row] = (max(start, end), rest, confidence)
        return [(confidence, hit) for hit in (hits[: hits.index(False) + 1] if missed else hits)]


class SuffixDrafter(GeneratorDrafter):
    """
    Proposes what followed before when the text ended as it ends now: `Suffixes`, for a batch.

    Args:
        suffixes (`Suffixes`): What was learnt, perhaps in earlier calls too.
        prompts (`list[list[int]]`, B): Of the rows, without padding.
        vocab_size (`int`): As for `GeneratorDrafter`.
    """

    _by_row = (*GeneratorDrafter._by_row, "texts", "_confidence")

    def __init__(self, suffixes: Suffixes, prompts: list[list[int]], vocab_size: int):
        super().__init__([None] * len(prompts), vocab_size)
        self.suffixes = suffixes
        self.texts = [suffixes.text(prompt) for prompt in prompts]
        self._confidence = [0.0] * len(prompts)

    def draft(self, row, ids, most, pending=()):
        tokens, chances = self.texts[row].draft(pending, most=min(most, LOOKUP_TOKENS))
        if chances:
            self._confidence[row] = math.prod(chances) ** (1 / len(chances))
        return self._known(tokens), None

    def confidence(self, row):
        """The geometric mean of the chances that its tokens are kept."""
        return self._confidence[row]

    def settle(self, row, ids, proposed, kept):
        pass

    def refill(self, row, prompt):
        super().refill(row, prompt)
        self.texts[row] = self.suffixes.text(prompt)

    def learn(self, row, tokens):
        self.texts[row].extend(tokens)


def is_named(drafter: Any) -> bool:
    """Whether a drafter is a word, or none, instead of something that has to be loaded or was."""
    return drafter is None or (isinstance(drafter, str) and drafter in NAMED)


def chosen_drafter(drafter: Any, config: EnsembleConfig) -> Any:
    """
    The `drafter` argument of `generate`, with `"auto"` replaced by what it stands for: new `Suffixes`, where proposal
    lengths choose themselves; none where lengths or the only proposer were given, which would mean something else then.
    """
    if not (isinstance(drafter, str) and drafter == AUTO):
        return drafter
    free = isinstance(config, EnsembleConfig) and config.num_assistant_tokens == AUTO
    return Suffixes() if free and config.alternate and config.speculative else None


def drafter_for(
    drafter: str | Suffixes | CandidateGenerator, main: Member, vocab_size: int, max_length: int
) -> GeneratorDrafter:
    """
    For the `drafter` argument of `generate`, if it is not a model.

    Args:
        drafter: `"prompt_lookup"`, `Suffixes`, or a generator, which serves one row.
        main (`Member`): The main model's, for its prompts.
        vocab_size (`int`): As for `GeneratorDrafter`.
        max_length (`int`): Tokens of the longest text, prompt included.

    Raises:
        `ValueError`: if there are several rows for one generator.
    """
    batch = len(main.prompt)
    if isinstance(drafter, Suffixes):
        prompts = [row[visible].tolist() for row, visible in zip(main.prompt.cpu().numpy(), main.prompt_visible)]
        return SuffixDrafter(drafter, prompts, vocab_size)
    if drafter == PROMPT_LOOKUP:
        lookup = dict(num_output_tokens=LOOKUP_TOKENS, max_matching_ngram_size=LOOKUP_NGRAM, max_length=max_length)
        return GeneratorDrafter([PromptLookupCandidateGenerator(**lookup) for _ in range(batch)], vocab_size, True)
    if batch > 1:
        raise ValueError(
            f"A {type(drafter).__name__} as `drafter` serves one row, but the batch has {batch}: generate row by row, "
            f"or use a model or {PROMPT_LOOKUP!r}."
        )
    return GeneratorDrafter([drafter], vocab_size)
