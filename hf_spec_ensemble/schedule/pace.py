"""Whether speculation keeps up with the standard ensemble, whatever was predicted; else it pauses for a while."""

from threading import Lock


WINDOW = 16  # tokens after which it is looked whether speculation was worth while
BEHIND = 1.02  # times the standard ensemble's cost that a window may take
PAUSE = (48, 384)  # tokens for which speculation pauses, first and at most: the pauses double


class Pace:
    """
    Compares what windows of tokens cost with what the standard ensemble would have cost, and says when to pause.

    State: the window, what is left of a pause, how long the next one is, and tokens counted. Any number of threads may
    add and read.

    Example: passes that cost twice what they bring.

    >>> from hf_spec_ensemble.schedule.pace import Pace

    >>> pace = Pace()
    >>> for _ in range(16):
    ...     pace.ran(2.0)
    ...     pace.advanced(1.0, standard=1.0)
    >>> pace.pauses
    True
    """

    def __init__(self):
        self._lock = Lock()
        self._left = 0.0
        self._pause = PAUSE[0]
        self._begin()

    def _begin(self) -> None:
        self._seconds = self._standard = self._tokens = 0.0

    @property
    def pauses(self) -> bool:
        """Whether speculation should pause now."""
        return self._left > 0

    def ran(self, seconds: float) -> None:
        """A pass has cost so much."""
        with self._lock:
            self._seconds += seconds

    def advanced(self, tokens: float, standard: float | None) -> None:
        """
        Rows have gained so many tokens on average.

        Args:
            standard (`float`, *optional*): Seconds that the standard ensemble takes for a token; `None` if that is not
                known.
        """
        with self._lock:
            if self._left > 0 or standard is None:
                self._left = max(self._left - tokens, 0.0)
                self._begin()
                return
            self._tokens += tokens
            self._standard += tokens * standard
            if self._tokens < WINDOW:
                return
            if self._seconds > BEHIND * self._standard:
                self._left, self._pause = self._pause, min(2 * self._pause, PAUSE[1])
            else:
                self._pause = PAUSE[0]
            self._begin()
