"""
Several processes that measure one plan, each its share of the prompts, as `accelerate launch` or `torchrun` starts
them.

They know of each other by files alone: none waits inside a collective operation for one that is gone. Process 0 writes
the file of records, every other a part beside it, and all read all of them at the start. When process 0 has measured
its share, it watches the parts until nothing is missing, measures itself what a lost process has left, and merges. If
it is lost itself, the parts stay, and the same command goes on from them, with any number of processes.

Processes on several machines need a folder that they share.
"""

import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


BEAT = 5.0  # seconds after which a process shows that it lives
SILENCE = 120.0  # seconds without that after which it counts as lost; network file systems tell of it a minute late


@dataclass(frozen=True)
class Process:
    """
    One of the processes that measure together.

    Args:
        rank (`int`): Its number.
        world (`int`): How many there are.
        local_rank (`int`): Its number on its machine.

    Example:

    >>> from hf_spec_ensemble.bench.processes import Process

    >>> Process.of({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    Process(rank=1, world=2, local_rank=1)
    >>> Process.of({})
    Process(rank=0, world=1, local_rank=0)
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Process":
        """
        The process that a launcher's environment variables describe; without them the only one.

        Raises:
            `ValueError`: if they contradict each other.
        """
        values = {name: environment.get(name, default) for name, default in LAUNCHER.items()}
        if not all(value.isdigit() for value in values.values()) or int(values["RANK"]) >= int(values["WORLD_SIZE"]):
            said = ", ".join(f"{name}={value}" for name, value in values.items())
            raise ValueError(f"The environment variables {said} describe no process: RANK must be below WORLD_SIZE.")
        return cls(*map(int, values.values()))

    @property
    def leads(self) -> bool:
        """Whether it is the one that merges and reports."""
        return self.rank == 0

    @property
    def others(self) -> range:
        return range(1, self.world)

    def device(self, name: str) -> str:
        """A device by name: of several GPUs, each process on a machine takes its own, unless the name has a number."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.world > 1 else name

    def rank_of(self, group: int) -> int:
        """Whose share a group of prompts is. All variants of a prompt are, for ratios are of times of one process."""
        return group % self.world


LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # what launchers set, as it is without one


def launch_notes(environment: Mapping[str, str]) -> list[str]:
    """A note if `accelerate launch` was asked for several processes and started one, which it does without a word."""
    asked = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if not asked or "WORLD_SIZE" in environment:
        return []
    return ["accelerate started one process only, as it does on CPUs: add --multi_gpu for several, or use torchrun."]


def part_of(file: Path, rank: int) -> Path:
    """Where a process keeps its records: `records.rank1.jsonl` beside `records.jsonl`, which is process 0's."""
    return file if rank == 0 else file.with_suffix(f".rank{rank}{file.suffix}")


def parts_of(file: Path) -> list[Path]:
    """The parts that there are, of this run or earlier ones."""
    return sorted(file.parent.glob(f"{file.stem}.rank*{file.suffix}"))


class Heartbeat:
    """
    Touches a file from time to time while it is entered, which says that the process lives.

    Args:
        file (`Path`): Never made anew: when it is removed, all is merged.
    """

    def __init__(self, file: Path):
        self._file = file
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while True:
            with suppress(FileNotFoundError):
                os.utime(self._file)
            if self._over.wait(BEAT):
                return


class Watch:
    """
    Tells which processes are lost, by their parts. It compares what it saw with its own clock: machines' clocks differ.

    Args:
        file (`Path`): The records'.
        ranks (`range`): Those that are watched.
    """

    def __init__(self, file: Path, ranks: range):
        self._file = file
        self._seen = {rank: (self._stamp(rank), time.monotonic()) for rank in ranks}

    def is_lost(self, rank: int) -> bool:
        """Whether nothing has been seen of it for long."""
        stamp, now = self._stamp(rank), time.monotonic()
        if stamp != self._seen[rank][0]:
            self._seen[rank] = (stamp, now)
        return now - self._seen[rank][1] > SILENCE

    def _stamp(self, rank: int) -> int | None:
        with suppress(FileNotFoundError):
            return part_of(self._file, rank).stat().st_mtime_ns
        return None
