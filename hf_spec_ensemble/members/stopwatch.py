"""Measures how long something takes, on a GPU without waiting for it."""

import time
from collections import deque
from collections.abc import Hashable

import torch


class Stopwatch:
    """
    Adds up seconds between `start` and `stop`; with device events on a GPU, so that measuring waits for nothing.

    `laps()` gives, once, each measurement with the label given to `stop`, those known by now.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: deque[tuple[Hashable, torch.Event, torch.Event]] = deque()
        self._laps: list[tuple[Hashable, float]] = []

    def start(self) -> None:
        self._begin = self._record() if self.on_gpu else time.perf_counter()

    def stop(self, label: Hashable = None) -> None:
        if self.on_gpu:
            self._events.append((label, self._begin, self._record()))
        else:
            self._lap(label, time.perf_counter() - self._begin)

    def laps(self) -> list[tuple[Hashable, float]]:
        while self._events and self._events[0][2].query():
            self._take_event()
        laps, self._laps = self._laps, []
        return laps

    @property
    def seconds(self) -> float:
        self.wait()
        return self._seconds

    def wait(self) -> None:
        """Waits until all measurements are known."""
        while self._events:
            self._events[0][2].synchronize()
            self._take_event()

    def _record(self) -> torch.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _take_event(self) -> None:
        label, begin, end = self._events.popleft()
        self._lap(label, begin.elapsed_time(end) / 1000)

    def _lap(self, label: Hashable, seconds: float) -> None:
        self._seconds += seconds
        self._laps.append((label, seconds))
