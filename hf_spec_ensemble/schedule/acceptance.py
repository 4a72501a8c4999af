"""How often proposals have been kept so far; safe for any number of threads."""

from threading import Lock


class Acceptance:
    """
    How likely an author's proposals are kept, given its confidence: the probability of its most probable token there.

    Counts decay, so that the estimate follows the text, and an author that has long not proposed is tried again.

    Example:

    >>> from hf_spec_ensemble.schedule.acceptance import Acceptance

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
        nothing = [0.0] * (len(self.EDGES) + 1)
        self._counts = (nothing, nothing)  # tried and kept by bin; replaced whole: other threads may be reading
        self._lock = Lock()  # of those who write

    def add(self, confidence: float, kept: bool) -> None:
        """Adds the result of a verified proposal."""
        bin_ = self._bin(confidence)
        with self._lock:
            tried_counts, kept_counts = map(list, self._counts)
            tried_counts[bin_] += 1
            kept_counts[bin_] += kept
            self._counts = (tried_counts, kept_counts)

    def fade(self, tokens: int) -> None:
        """Reduces the weight of old results, after so many more tokens were generated."""
        share = self.FADE**tokens
        with self._lock:
            tried, kept = ([share * count for count in counts] for counts in self._counts)
            self._counts = (tried, kept)

    @property
    def evidence(self) -> float:
        """How many verified proposals the estimates rest on."""
        return sum(self._counts[0])

    @property
    def mean(self) -> float:
        """The probability that a proposal is kept, in [0, 1]."""
        tried, kept = map(sum, self._counts)
        return (kept + self.PRIOR * self.PRIOR_WEIGHT) / (tried + self.PRIOR_WEIGHT)

    def chance(self, confidence: float) -> float:
        """The probability that a proposal of this confidence is kept, in [0, 1]."""
        tried, kept = (counts[self._bin(confidence)] for counts in self._counts)
        return (kept + self.mean * self.BIN_WEIGHT) / (tried + self.BIN_WEIGHT)

    def _bin(self, confidence: float) -> int:
        return sum(confidence > edge for edge in self.EDGES)
