"""Measured costs of models' passes, in seconds. Kept in memory as long as the models live; safe for any number of
threads."""

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from .adapters import identity


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

    Args:
        widths (`Sequence[int]`): What passes are padded to in any case, ascending; wider ones are not.

    Example:

    >>> from hf_spec_ensemble.members.costs import PassCosts

    >>> costs = PassCosts()
    >>> for width, seconds in ((1, 0.05), (2, 0.09), (4, 0.07)):
    ...     costs.add(1, width, seconds)
    >>> costs.seconds(1, 2), costs.padded(1, 2)
    (0.07, 4)
    """

    def __init__(self, widths: Sequence[int] = ()):
        self._widths = tuple(widths)
        self._samples: dict[tuple[int, int], tuple[float, ...]] = {}  # replaced whole: other threads may be reading
        self._measured_at: dict[tuple[int, int], int] = {}
        self._passes = 0
        self._lock = Lock()  # of those who write

    def add(self, batch: int, width: int, seconds: float) -> None:
        """Takes the measurement of a pass over `width` tokens in each of `batch` rows."""
        with self._lock:
            self._passes += 1
            self._measured_at[batch, width] = self._passes  # first: those who find samples look for it
            self._samples[batch, width] = (*self._samples.get((batch, width), ())[1 - SAMPLES :], seconds)

    def measured(self, batch: int, width: int) -> float | None:
        """
        Seconds of a pass of just this width: the lower quartile of what was measured, since what disturbs a measurement
        makes it longer. Straight lines between measured widths and beyond them; `None` if this batch size was never
        measured.
        """
        known = sorted(w for b, w in list(self._samples) if b == batch)
        if not known:
            return None
        width = next((padded for padded in self._widths if padded >= width), width)
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
        """The least width >= `width` that should be measured now; `None` if all have been, and recently."""
        for probed in PROBED:
            if probed >= width and not self._fresh(batch, probed):
                return probed
        return None

    def _fresh(self, batch: int, width: int) -> bool:
        samples = self._samples.get((batch, width), ())
        return len(samples) >= ENOUGH and self._passes - self._measured_at[batch, width] <= STALE


class _Kept:
    """What is kept for a list of models, and for longer lists that begin with it; deleted with any of the models."""

    def __init__(self):
        self.values: dict[Hashable, Any] = {}
        self.longer: WeakKeyDictionary[PreTrainedModel, _Kept] = WeakKeyDictionary()


_memory = _Kept()


def pass_costs(model: PreTrainedModel, way: str = "growing", widths: Sequence[int] = ()) -> PassCosts:
    """The process's `PassCosts` of a model whose passes run in some way (`Runner.way`)."""
    return remembered([model], ("pass costs", way), lambda: PassCosts(widths))


def remembered(models: Sequence[PreTrainedModel], key: Hashable, make: Callable[[], Any]) -> Any:
    """
    What is kept for these models, in this order, and this key, made by `make()` the first time. It is deleted with any
    of the models, and must not refer to them.
    """
    kept, adapters = _memory, []
    for owner, adapter in map(identity, models):
        kept = kept.longer.setdefault(owner, _Kept())
        adapters.append(adapter)
    key = (*adapters, key)
    if key not in kept.values:
        kept.values.setdefault(key, make())  # unless another thread was faster
    return kept.values[key]
