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
ENOUGH = 2  # measurements of a width before it is known
IMPLAUSIBLE = 1.25  # times what is in proportion to a narrower pass: a first pass that takes longer was disturbed
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
            return self._typical(batch, width)
        if width < known[0] or len(known) == 1:
            return self.measured(batch, known[0])
        below, above = next((pair for pair in pairwise(known) if width < pair[1]), known[-2:])
        low, high = self.measured(batch, below), self.measured(batch, above)
        slope = (high - low) / (above - below)
        return low + (width - below) * slope if width < above else high + (width - above) * max(slope, 0.0)

    def _typical(self, batch: int, width: int) -> float:
        """
        Of the measurements of this width. The first pass of a shape may load code or allocate memory, on a GPU for much
        longer than the pass itself takes. If it took too long to be a pass's time, it is not taken for one.
        """
        samples = sorted(self._samples[batch, width])
        if len(samples) >= ENOUGH:
            return samples[len(samples) // 4]
        known = [w for b, w in list(self._samples) if b == batch and w < width and self.is_known(b, w)]
        if not known:
            return samples[0]
        narrower = self._typical(batch, max(known))
        return samples[0] if samples[0] <= IMPLAUSIBLE * narrower * width / max(known) else narrower

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

    def one_by_one(self, batch: int) -> float | None:
        """What the standard ensemble takes for a token; `None` if nothing is known."""
        return self.seconds(batch, 1)

    def is_known(self, batch: int, width: int) -> bool:
        """Whether passes over just this width were measured often enough for an estimate."""
        return len(self._samples.get((batch, width), ())) >= ENOUGH

    def widest(self, batch: int) -> int:
        """The widest passes that `is_known`; 0 if none are."""
        return max((w for b, w in list(self._samples) if b == batch and self.is_known(b, w)), default=0)

    def _fresh(self, batch: int, width: int) -> bool:
        return self.is_known(batch, width) and self._passes - self._measured_at[batch, width] <= STALE


class SharedCosts:
    """
    The costs of passes whose rows are those of several members: to who asks of B rows, what a pass over G * B costs.

    Args:
        costs (`PassCosts`): Of the model.
        one_by_one (`list[PassCosts]`, G): Of the members' own passes.

    Example:

    >>> from hf_spec_ensemble.members.costs import PassCosts, SharedCosts

    >>> costs = PassCosts()
    >>> costs.add(1, 1, 0.05)
    >>> costs.add(2, 1, 0.06)
    >>> shared = SharedCosts(costs, [costs, costs])
    >>> shared.seconds(1, 1), shared.one_by_one(1)
    (0.06, 0.1)
    """

    def __init__(self, costs: PassCosts, one_by_one: Sequence[PassCosts]):
        self._costs, self._one_by_one = costs, tuple(one_by_one)

    def add(self, batch: int, width: int, seconds: float) -> None:
        self._costs.add(self._rows(batch), width, seconds)

    def is_known(self, batch: int, width: int) -> bool:
        return self._costs.is_known(self._rows(batch), width)

    def measured(self, batch: int, width: int) -> float | None:
        return self._costs.measured(self._rows(batch), width)

    def seconds(self, batch: int, width: int) -> float | None:
        return self._costs.seconds(self._rows(batch), width)

    def padded(self, batch: int, width: int) -> int:
        return self._costs.padded(self._rows(batch), width)

    def to_probe(self, batch: int, width: int) -> int | None:
        return self._costs.to_probe(self._rows(batch), width)

    def widest(self, batch: int) -> int:
        return self._costs.widest(self._rows(batch))

    def one_by_one(self, batch: int) -> float | None:
        """As `PassCosts.one_by_one`, of all members."""
        seconds = [costs.one_by_one(batch) for costs in self._one_by_one]
        return None if None in seconds else sum(seconds)

    def _rows(self, batch: int) -> int:
        return batch * len(self._one_by_one)


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
