"""The result of a fit: the config, and its evaluation on texts that were held out, as data and as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..config import EnsembleConfig
from ..trace.extras import extra


if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESAMPLES = 2000
LEVEL = 0.95
FEW = 10  # texts, of which a bootstrap says little


class Interval(NamedTuple):
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """
    One model on the held-out texts.

    Args:
        name (`str`): A member's, `"uniform"` (of a contrast: `"contrast 0.1"`, the default) or `"fitted"`.
        nats (`Interval`): Per token, with a bootstrap interval of 95 % over texts.
        bits_per_byte (`float`): Of the texts that count, in UTF-8: what can be compared between tokenizers.
    """

    name: str
    nats: Interval
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats.value) if self.nats.value < 700 else math.inf


class Gain(NamedTuple):
    """Nats per token of another model less those of the fitted one, on the same resampled texts."""

    over: str
    nats: Interval

    @property
    def is_noise(self) -> bool:
        return not self.nats.low > 0


class Part(NamedTuple):
    """How much was read of a part."""

    texts: int
    tokens: int


@dataclass
class FitResult:
    """
    What `fit` returns; `print` it for a report.

    Args:
        config (`EnsembleConfig`): With the weights, or the contrast, that make the fitted texts most likely.
        names (`list[str]`, N): What the members are called here.
        rows (`list[Row]`): Each member, the uniform ensemble and the fitted one, on the held-out texts.
        gains (`list[Gain]`): Of the fitted ensemble, over the best member and over the uniform ensemble.
        fitted_on (`Part`), held_out (`Part`): What counts in either part.
        warnings (`list[str]`): What to know before the weights are used.
        interrupted (`bool`): Whether an interruption left texts unread, or the search unfinished.
        points (`list`): Weights at which a product or a contrast was evaluated, and nats per token there.
        log_probs (`torch.Tensor` `[N, T]`, *optional*): Of a mixture: of the tokens it was fitted on, by member.
    """

    config: EnsembleConfig
    names: list[str]
    rows: list[Row]
    gains: list[Gain]
    fitted_on: Part
    held_out: Part
    warnings: list[str] = field(default_factory=list)
    interrupted: bool = False
    points: list[tuple[tuple[float, ...], float]] = field(default_factory=list, repr=False)
    log_probs: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def numbers(self) -> str:
        """What was fitted, in words."""
        if self.config.method == "contrastive":
            cut = f", plausibility {self.config.plausibility:.3g}" if self.config.plausibility else ""
            return f"contrast {self.config.contrast:.4g}{cut}"
        return "weights " + ", ".join(f"{weight:.4g}" for weight in self.config.weights)

    def __str__(self) -> str:
        width = max(len("held out"), *(len(row.name) for row in self.rows))
        lines = [
            f"{self.config.method} of {', '.join(self.names)}: {self.numbers}",
            f"fitted on {_amount(self.fitted_on)}, held out {_amount(self.held_out)}",
            "",
            f"{'held out':{width}}  nats per token (95 %)    perplexity  bits per byte",
        ]
        for row in self.rows:
            spread = f"{row.nats.value:.4f} ({row.nats.low:.4f} to {row.nats.high:.4f})"
            lines.append(f"{row.name:{width}}  {spread:25}{row.perplexity:>10.4g}{row.bits_per_byte:>15.4f}")
        lines.append("")
        for gain in self.gains:
            low, high = f"{gain.nats.low:.4f}", f"{gain.nats.high:.4f}"
            lines.append(f"fitted gains {gain.nats.value:.4f} nats per token over {gain.over} ({low} to {high})")
        return "\n".join(lines + [f"! {warning}" for warning in self.warnings])

    def plot(self, file: str | Path | None = None) -> "Figure":
        """
        The likelihood of the fitted texts over the weights: a curve for two members of a mixture or for a contrast, a
        triangle for three members of a mixture.

        Args:
            file (`str` or `Path`, *optional*): Where to write it, as a picture of the kind its ending names.

        Returns:
            `matplotlib.figure.Figure`.

        Raises:
            `ImportError`: without matplotlib.
            `ValueError`: for a product, whose weights are on no line or triangle, or more than three members.
        """
        extra("matplotlib")
        from .plot import plot

        figure = plot(self.config, self.names, self.points, self.log_probs)
        if file is not None:
            figure.savefig(file, dpi=150, bbox_inches="tight")
        return figure


class FitResults(dict):
    """What `fit` returns for several sets of texts: a `FitResult` by name, which prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "nothing was fitted"
        width = max(len("texts"), *map(len, self))
        first = next(iter(self.values()))
        of_weights = max(len(result.numbers) for result in self.values())
        uniform = first.rows[-2].name
        head = f"{'texts':{width}}  {'fitted':{of_weights}}  nats per token: fitted  {uniform:>12}  best member"
        lines = [f"{first.config.method} of {', '.join(first.names)}", "", head]
        for name, result in self.items():
            best = min(result.rows[:-2], key=lambda row: row.nats.value)
            fitted, plain = result.rows[-1].nats.value, result.rows[-2].nats.value
            lines.append(
                f"{name:{width}}  {result.numbers:{of_weights}}  {fitted:>22.4f}  {plain:>12.4f}  "
                f"{best.nats.value:.4f} {best.name}"
            )
        warnings = [f"! {name}: {warning}" for name, result in self.items() for warning in result.warnings]
        return "\n".join(lines + (["", *warnings] if warnings else []))


class HeldOut:
    """
    Bootstrap statistics of held-out texts: all models are compared on the same resampled texts.

    Args:
        counts (`Sequence[int]`), sizes (`Sequence[int]`): Tokens and bytes that count, by text.
        seed (`int`): Of the resamples.
    """

    def __init__(self, counts: Sequence[int], sizes: Sequence[int], seed: int = 0):
        self.counts = torch.tensor(counts, dtype=torch.float64)
        self.size = sum(sizes)
        generator = torch.Generator().manual_seed(seed)
        self.resampled = torch.randint(len(counts), (RESAMPLES, len(counts)), generator=generator)
        self.totals = self.counts[self.resampled].sum(1)

    def row(self, name: str, nats: torch.Tensor) -> Row:
        """Of a model with these nats by text."""
        return Row(name, self.per_token(nats), float(nats.sum()) / math.log(2) / self.size)

    def per_token(self, nats: torch.Tensor) -> Interval:
        """The mean per token of what texts have, with its interval."""
        means = (nats[self.resampled].sum(1) / self.totals).sort().values
        tail = round(RESAMPLES * (1 - LEVEL) / 2)
        return Interval(float(nats.sum() / self.counts.sum()), float(means[tail]), float(means[-tail - 1]))


def result_of(
    config: EnsembleConfig,
    names: list[str],
    fitted_on: Part,
    counts: Sequence[int],
    sizes: Sequence[int],
    nats: dict[str, torch.Tensor],
    interrupted: bool = False,
    seed: int = 0,
    **more,
) -> FitResult:
    """
    The report.

    Args:
        counts (`Sequence[int]`), sizes (`Sequence[int]`): Tokens and bytes that count, by held-out text.
        nats (`dict`): By name, for each member, the uniform ensemble and last the fitted one: nats by held-out text.
        more: Further fields of the result.
    """
    held_out = HeldOut(counts, sizes, seed)
    rows = [held_out.row(name, each) for name, each in nats.items()]
    best = min(rows[:-2], key=lambda row: row.nats.value)
    others, fitted = dict.fromkeys((best.name, rows[-2].name)), nats[rows[-1].name]
    gains = [Gain(name, held_out.per_token(_less(nats[name], fitted))) for name in others]
    result = FitResult(config, names, rows, gains, fitted_on, Part(len(counts), sum(counts)), **more)
    result.interrupted = interrupted
    result.warnings = list(_warnings(result))
    return result


def _less(other: torch.Tensor, fitted: torch.Tensor) -> torch.Tensor:
    """Differences; none where both are infinite."""
    return torch.where(other == fitted, 0.0, other - fitted)


def _warnings(result: FitResult):
    if result.interrupted:
        yield "interrupted: the weights are the best so far, of the texts that were read until then"
    for gain in result.gains:
        if gain.nats.high < 0:
            yield f"fitted is worse than {gain.over} on the held-out texts: it was fitted on too few texts, or others"
        elif gain.is_noise:
            yield f"the gain over {gain.over} is within noise: more texts would tell"
    if result.held_out.texts < FEW:
        yield f"the intervals are of {result.held_out.texts} held-out texts, too few to rely on"
    if result.config.method == "contrastive":
        if result.config.contrast == 0:
            yield f"the contrast is 0: {result.names[1]} only drafts"
        if math.isinf(result.rows[-1].nats.value):
            yield f"`plausibility` {result.config.plausibility:.3g} makes some held-out token impossible"
    else:
        for name, weight in zip(result.names, result.config.weights):
            if weight == 0:
                yield f"{name} has the weight 0: it only drafts"


def _amount(part: Part) -> str:
    return f"{part.texts} texts ({part.tokens:,} tokens)"
