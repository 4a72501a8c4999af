"""What has been measured so far: seconds of the members' passes and how often proposals are kept. Kept for the process,
in memory, as long as the models live."""

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel


PROBED = (1, 2, 4, 8)  # numbers of tokens per row whose passes are measured on purpose
SAMPLES = 9  # measurements kept for each
ENOUGH = 2  # measurements before an estimate is used
STALE = 256  # passes after which a probed width is measured again
WORTH_PADDING = 0.95  # a longer pass must cost less than this share of the shorter one to be run instead


class PassCosts:
    """
    c(w): the seconds of one model's forward pass over w tokens in each of B rows, as measured where it runs.

    A pass over two tokens can cost more than one over four, where the shorter one meets a slower kernel. Then it pays
    to pad, so that the cost is what the cheapest pass over at least w tokens costs.

    Example:

    >>> from hf_spec_ensemble.estimates import PassCosts

    >>> costs = PassCosts()
    >>> for width, seconds in ((1, 0.05), (2, 0.09), (4, 0.07)):
    ...     costs.add(1, width, seconds)
    >>> costs.seconds(1, 2), costs.padded(1, 2)
    (0.07, 4)
    """

    def __init__(self):
        self._samples: dict[tuple[int, int], tuple[float, ...]] = {}  # replaced whole: other threads may be reading
        self._measured_at: dict[tuple[int, int], int] = {}
        self._passes = 0

    def add(self, batch: int, width: int, seconds: float) -> None:
        """Takes the measurement of a pass over `width` tokens in each of `batch` rows."""
        self._passes += 1
        self._samples[batch, width] = (*self._samples.get((batch, width), ())[1 - SAMPLES :], seconds)
        self._measured_at[batch, width] = self._passes

    def measured(self, batch: int, width: int) -> float | None:
        """
        Seconds of a pass of just this width: the lower quartile of what was measured, since what disturbs a measurement
        makes it longer. Straight lines between measured widths and beyond them; `None` if this batch size was never
        measured.
        """
        known = sorted(w for b, w in list(self._samples) if b == batch)
        if not known:
            return None
        if width in known:
            samples = sorted(self._samples[batch, width])
            return samples[len(samples) // 4]
        if width < known[0] or len(known) == 1:
            return self.measured(batch, known[0])
        below, above = next((pair for pair in pairwise(known) if width < pair[1]), known[-2:])
        low, high = self.measured(batch, below), self.measured(batch, above)
        slope = (high - low) / (above - below)
        return low + (width - below) * slope if width < above else high + (width - above) * max(slope, 0.0)

    def seconds(self, batch: int, width: int) -> float | None:
        """c(w), padded where that is cheaper; `None` if nothing is known."""
        padded = self.padded(batch, width)
        return self.measured(batch, padded)

    def padded(self, batch: int, width: int) -> int:
        """The width >= `width` of the cheapest pass that is known to be cheaper than just that, or `width`."""
        best, least = width, self.measured(batch, width)
        if least is None:
            return width
        least *= WORTH_PADDING
        for b, w in list(self._samples):
            if b == batch and w > width and self.measured(b, w) < least:
                best, least = w, self.measured(b, w)
        return best

    def to_probe(self, batch: int, width: int) -> int | None:
        """The least width >= `width` that should be measured now; `None` if all have been, and lately."""
        for probed in PROBED:
            if probed >= width and not self._fresh(batch, probed):
                return probed
        return None

    def _fresh(self, batch: int, width: int) -> bool:
        samples = self._samples.get((batch, width), ())
        return len(samples) >= ENOUGH and self._passes - self._measured_at[batch, width] <= STALE


class Acceptance:
    """
    How likely an author's proposals are kept, given its confidence: the probability of its most probable token there.

    Counts fade, so that the estimate follows the text, and an author that has not proposed for long gets another try.

    Example:

    >>> from hf_spec_ensemble.estimates import Acceptance

    >>> acceptance = Acceptance()
    >>> for _ in range(50):
    ...     acceptance.add(0.99, kept=True)
    ...     acceptance.add(0.3, kept=False)
    >>> acceptance.chance(0.99) > 0.9 and acceptance.chance(0.3) < 0.2
    True
    """

    EDGES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.97)
    PRIOR, PRIOR_WEIGHT = 0.7, 2.0
    BIN_WEIGHT = 3.0  # of the overall mean in the estimate of a bin
    FADE = 0.997  # per generated token

    def __init__(self):
        self._tried = [0.0] * (len(self.EDGES) + 1)
        self._kept = [0.0] * (len(self.EDGES) + 1)

    def add(self, confidence: float, kept: bool) -> None:
        """Takes the fate of a verified proposal."""
        bin_ = self._bin(confidence)
        self._tried[bin_] += 1
        self._kept[bin_] += kept

    def fade(self, tokens: int) -> None:
        """Lets old evidence count less, after so many more tokens were generated."""
        share = self.FADE**tokens
        self._tried = [share * count for count in self._tried]
        self._kept = [share * count for count in self._kept]

    @property
    def evidence(self) -> float:
        """How many verified proposals the estimates rest on."""
        return sum(self._tried)

    @property
    def mean(self) -> float:
        """The probability that a proposal is kept, in [0, 1]."""
        return (sum(self._kept) + self.PRIOR * self.PRIOR_WEIGHT) / (self.evidence + self.PRIOR_WEIGHT)

    def chance(self, confidence: float) -> float:
        """The probability that a proposal of this confidence is kept, in [0, 1]."""
        bin_ = self._bin(confidence)
        return (self._kept[bin_] + self.mean * self.BIN_WEIGHT) / (self._tried[bin_] + self.BIN_WEIGHT)

    def _bin(self, confidence: float) -> int:
        return sum(confidence > edge for edge in self.EDGES)


_costs: WeakKeyDictionary[PreTrainedModel, PassCosts] = WeakKeyDictionary()
_memory: WeakKeyDictionary[PreTrainedModel, dict[Hashable, Any]] = WeakKeyDictionary()


def pass_costs(model: PreTrainedModel) -> PassCosts:
    """The process's `PassCosts` of a model."""
    return _costs.setdefault(model, PassCosts())


def remembered(models: Sequence[PreTrainedModel], key: Hashable, make: Callable[[], Any]) -> Any:
    """What is kept for these models and this key, made by `make()` the first time."""
    kept = _memory.setdefault(models[0], {})
    key = (*(id(model) for model in models[1:]), key)
    if key not in kept:
        kept[key] = make()
    return kept[key]
