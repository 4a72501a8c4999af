"""
Several processes that do one job, as `accelerate launch` or `torchrun` starts them: which one this is, and which share
of the prompts it has.

No process waits for another or watches it. Each writes a part of the results, and what all parts lack is what the next
run of the same command does, with any number of processes.
"""

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """
    One of the processes that work together.

    Args:
        rank (`int`): Its number.
        world (`int`): How many there are.
        local_rank (`int`): Its number on its machine.

    Example:

    >>> from hf_spec_ensemble.tools.processes import Process

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
        """Whether it is the one that prints notes on the plan, and a report of what was there already."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """A device by name: of several GPUs, each process on a machine takes its own, unless the name has a number."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.world > 1 else name

    def rank_of(self, number: int) -> int:
        """Whose share a prompt is, or a group of prompts."""
        return number % self.world

    def part(self, file: Path) -> Path:
        """The file that this process writes of what `file` stands for."""
        return file.with_name(f"{file.stem}.rank{self.rank}{file.suffix}") if self.rank else file


def parts_of(file: Path) -> list[Path]:
    """The files that there are, of this run or earlier ones, in which processes have written their shares."""
    ranks = file.parent.glob(f"{glob.escape(file.stem)}.rank*{glob.escape(file.suffix)}")
    return sorted([*([file] if file.exists() else []), *ranks])


LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # what launchers set, as it is without one


def launch_notes(environment: Mapping[str, str]) -> list[str]:
    """A note if `accelerate launch` was asked for several processes and silently started one."""
    asked = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if not asked or "WORLD_SIZE" in environment:
        return []
    return ["accelerate started one process only, as it does on CPUs: add --multi_gpu for several, or use torchrun."]
