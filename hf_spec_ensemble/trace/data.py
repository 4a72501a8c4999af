"""Trace: the record of a call. Plain data and counts; `show` adds the methods that display it."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from .extras import extra
from .text import pieces


if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class DraftTrace:
    """
    A proposal that was verified.

    Args:
        token (`int`): Its id.
        author (`int`): Who proposed it, an index of `Trace.authors`.
        place (`int`): Its number among the proposals of the author's turn, from 1.
        q (`float`): The probability its author gave it; 1 for a drafter that is not a model.
        r (`float`): The probability the ensemble gives it.
        acceptance (`float`): The probability that it was kept, once it was proposed: min(1, r/q) with `"maximal"`
            coupling, 1 / sum_y max(q(y), r(y) q(x) / r(x)) with `"gumbel"` and `"ancestral"`; greedy, 1 for the
            ensemble's most probable token and 0 for others. Where fewer members than all settle a token, what is said
            of the ensemble is said of these: of the owner, or of those that had scored the position.
        text (`str`, *optional*): Its text, if the tokenizer is known.
    """

    token: int
    author: int
    place: int
    q: float
    r: float
    acceptance: float
    text: str | None = None


@dataclass(frozen=True)
class TokenTrace:
    """
    A token of the text.

    Args:
        row (`int`): Of the batch.
        position (`int`): In the row's new tokens, from 0.
        token (`int`): Its id.
        probability (`float`): Of it, in what it was drawn from: r, or in a mixture what is known of r by then, the
            distribution of its owner or the weighted sum over those that settled it.
        draft (`DraftTrace`, *optional*): The proposal that was verified here: this very token, or one that was
            rejected and that this token corrects. `None` if the token was drawn from r without one, because every
            member had scored the position already.
        round (`int`): Of verification, from 1.
        passes (`tuple[int, ...]`): The forward passes that it took, indices of `Trace.passes`: those that scored its
            position, the proposer's among them.
        owner (`int`, *optional*): The member that it was drawn from, an index of `Trace.authors`, with `"ancestral"`
            coupling.
        text (`str`, *optional*): What it adds to the text, if the tokenizer is known; empty for a token that is an
            incomplete character.
    """

    row: int
    position: int
    token: int
    probability: float
    draft: DraftTrace | None
    round: int
    passes: tuple[int, ...]
    owner: int | None = None
    text: str | None = None

    @property
    def outcome(self) -> str:
        """`"accepted"`: a proposal that was kept. `"corrected"`: in place of a rejected one. `"drawn"`: from r."""
        if self.draft is None:
            return "drawn"
        return "accepted" if self.draft.token == self.token else "corrected"


@dataclass(frozen=True)
class Mark:
    """
    How a token came into the text: what a streamer is told that has a method `put_marks`. Printed, it says that.

    Args:
        outcome (`str`): As `TokenTrace.outcome`.
        author (`int`, *optional*): Who proposed it, or for `"corrected"` who proposed the token that was rejected, a
            number in the order of `Trace.authors`. `None` for `"drawn"`.
        name (`str`, *optional*): The author's.

    Example:

    >>> from hf_spec_ensemble.trace import Mark

    >>> str(Mark("accepted", 1, "math"))
    'proposed by math'
    """

    outcome: str
    author: int | None = None
    name: str | None = None

    def __str__(self) -> str:
        if self.outcome == "accepted":
            return f"proposed by {self.name}"
        return "corrected" if self.outcome == "corrected" else "drawn from the ensemble"


def legend_of(marks: Iterable[Mark]) -> dict[str, tuple[Mark, int]]:
    """By what they say, marks and how many there are: authors in their order, then the rest."""
    counts = Counter(map(str, marks := list(marks)))
    order = sorted({str(mark): mark for mark in marks}.values(), key=lambda mark: (mark.outcome, mark.author or 0))
    return {str(mark): (mark, counts[str(mark)]) for mark in order}


@dataclass(frozen=True)
class PassTrace:
    """
    A forward pass, which serves all rows; or a call of a drafter that is not a model.

    Args:
        author (`int`): Whose, an index of `Trace.authors`.
        round (`int`): Of the verification that came after it, from 1.
        tokens (`int`): Tokens that it read in each row, padding included; 0 for a drafter that is not a model.
        seconds (`float`): It took.
    """

    author: int
    round: int
    tokens: int
    seconds: float


@dataclass
class Trace:
    """
    How a speculative ensemble decoded: `generate(..., return_dict_in_generate=True).trace` with
    `EnsembleConfig(trace=True)`. The last expression of a notebook's cell, it shows the text, coloured by proposer.

    Args:
        authors (`list[str]`): Names of the models in the order `[model, *assistant_models]`, then of the drafter.
        members (`int`): How many of the authors are members of the ensemble; the others only propose.
        rows (`list[list[TokenTrace]]`): The new tokens of every row of the batch.
        passes (`list[PassTrace]`): In the order in which they ran, calls of a drafter that is not a model among them.
        seconds (`float`): From the first pass to the last token.
        rule (`str`): How tokens were drawn: `"greedy"`, `"gumbel"`, `"ancestral"` or `"maximal"`.
        prompts (`list[list[int]]`): The last tokens of every prompt, which the text's first token is read with.

    Example:

    >>> from hf_spec_ensemble.trace import DraftTrace, PassTrace, TokenTrace, Trace

    >>> draft = DraftTrace(token=7, author=1, place=1, q=0.6, r=0.5, acceptance=0.83)
    >>> token = TokenTrace(row=0, position=0, token=7, probability=0.5, draft=draft, round=1, passes=(0, 1))
    >>> passes = [PassTrace(author=1, round=1, tokens=9, seconds=0.02), PassTrace(0, 1, 10, 0.03)]
    >>> trace = Trace(["base", "math"], 2, [[token]], passes, seconds=0.052, rule="maximal")
    >>> print(trace.summary())
    1 token in 1 round, 2 passes (2.00 a token), 0.05 s; 1 proposal was verified, 0 rejected; 0 drawn without one
    <BLANKLINE>
               in the text   verified   accepted     passes     seconds
    base                 0          0          -          1  0.03  58 %
    math                 1          1      100 %          1  0.02  38 %
    the rest                                                 0.00   4 %
    """

    authors: list[str]
    members: int
    rows: list[list[TokenTrace]]
    passes: list[PassTrace]
    seconds: float
    rule: str
    prompts: list[list[int]] = field(default_factory=list)

    @property
    def tokens(self) -> list[TokenTrace]:
        """Of all rows."""
        return [token for row in self.rows for token in row]

    @property
    def drafts(self) -> list[tuple[DraftTrace, bool]]:
        """The proposals that were verified for the text, and whether they were kept."""
        return [(token.draft, token.outcome == "accepted") for token in self.tokens if token.draft is not None]

    @property
    def rounds(self) -> int:
        return self.passes[-1].round if self.passes else 0

    @property
    def forward_passes(self) -> int:
        """Of all models; the calls of a drafter that is none do not count."""
        return sum(run.tokens > 0 for run in self.passes)

    def seconds_of(self, author: int) -> float:
        """Inside the passes of an author."""
        return sum(run.seconds for run in self.passes if run.author == author)

    @property
    def overhead(self) -> float:
        """Seconds outside all passes."""
        return self.seconds - sum(run.seconds for run in self.passes)

    def counts_of(self, author: int) -> Counter:
        """Of `"passes"`, of proposals `"verified"` and of those `"accepted"`, which are in the text."""
        counts = Counter(passes=sum(run.author == author and run.tokens > 0 for run in self.passes))
        for draft, kept in self.drafts:
            if draft.author == author:
                counts += Counter(verified=1, accepted=int(kept))
        return counts

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "Trace":
        """
        This trace with the tokens' text. `generate(..., tokenizer=tokenizer)` does it at once.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The members'.
        """
        rows = []
        for b, row in enumerate(self.rows):
            context = self.prompts[b] if self.prompts else []
            ids = [*context, *(token.token for token in row)]
            texts = pieces(tokenizer, ids, len(context))
            rows.append(
                [
                    replace(token, text=text, draft=_read(token, text, tokenizer, ids[: len(context) + token.position]))
                    for token, text in zip(row, texts)
                ]
            )
        return replace(self, rows=rows)

    def summary(self) -> str:
        """What was decoded and what it cost, as a few lines for the terminal."""
        outcomes = Counter(token.outcome for token in self.tokens)
        count, passes, drafts = len(self.tokens), self.forward_passes, outcomes["accepted"] + outcomes["corrected"]
        a_token = f" ({passes / count:.2f} a token)" if count else ""
        lines = [
            f"{_so_many(count, 'token')} in {_so_many(self.rounds, 'round')}, {_so_many(passes, 'pass')}{a_token}, "
            f"{self.seconds:.2f} s; {_so_many(drafts, 'proposal')} {'was' if drafts == 1 else 'were'} verified, "
            f"{outcomes['corrected']} rejected; {outcomes['drawn']} drawn without one",
            "",
        ]
        width = max(map(len, [*self.authors, "the rest"]))
        lines.append(f"{'':{width}}{'in the text':>14}{'verified':>11}{'accepted':>11}{'passes':>11}{'seconds':>12}")
        for author, name in enumerate(self.authors):
            counts, seconds = self.counts_of(author), self.seconds_of(author)
            share = f"{counts['accepted'] / counts['verified']:.0%}".replace("%", " %") if counts["verified"] else "-"
            lines.append(
                f"{name:{width}}{counts['accepted']:>14}{counts['verified']:>11}{share:>11}{counts['passes']:>11}"
                f"{self._time(seconds)}"
            )
        lines.append(f"{'the rest':{width}}{'':47}{self._time(self.overhead)}")
        return "\n".join(lines)

    def _time(self, seconds: float) -> str:
        return f"{seconds:>6.2f}{100 * seconds / self.seconds if self.seconds else 0:>4.0f} %"

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types; tokens with their `outcome`."""
        fields = asdict(self)
        for row, tokens in zip(self.rows, fields["rows"]):
            for token, entry in zip(row, tokens):
                entry |= {"outcome": token.outcome, "passes": list(token.passes)}
        return fields

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_pandas(self) -> "pandas.DataFrame":
        """
        A line for each token, with the fields of its proposal as `draft_...` and names in place of authors' numbers.

        Raises:
            `ImportError`: without pandas.
        """
        pandas = extra("pandas")
        lines = []
        for token in self.tokens:
            fields = {"outcome": token.outcome} | {name: getattr(token, name) for name in TokenTrace.__annotations__}
            draft = fields.pop("draft")
            for name in DraftTrace.__annotations__:
                fields[f"draft_{name}"] = None if draft is None else getattr(draft, name)
            fields["draft_author"] = None if draft is None else self.authors[draft.author]
            fields["owner"] = None if token.owner is None else self.authors[token.owner]
            lines.append(fields)
        columns = ["row", "position", "token", "text", "outcome", "probability", "owner", "round", "passes"]
        return pandas.DataFrame(lines, columns=columns + [f"draft_{name}" for name in DraftTrace.__annotations__])


def _read(token: TokenTrace, text: str, tokenizer, before: list[int]) -> DraftTrace | None:
    """The token's proposal with its text."""
    if token.outcome != "corrected":
        return token.draft and replace(token.draft, text=text)
    return replace(token.draft, text=pieces(tokenizer, [*before, token.draft.token], len(before))[0])


def _so_many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"
