"""From records to numbers: ratios prompt by prompt, medians, bootstrap intervals."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .limits import limit_of
from .plan import Condition, short_names
from .records import CONDITION, Record, Records
from .tasks import TASKS
from .variants import BATCHED, STANDARD, kind_of, place_of, repeats_standard, split


RESAMPLES = 2000
COLUMN_OF_CURVE = {"members": "members", "batch": "batch_size", "prompt-length": "prompt_length"}


@dataclass(frozen=True)
class Interval:
    """A median and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Summary:
    """
    What a variant did under a condition. Lists have an entry for each member, and for a drafter if there is one.

    Args:
        prompts (`int`): Measured so far.
        speedup (`Interval`): Of the ratios of prompts, the standard ensemble's time for a token by the variant's.
        tokens_per_second (`Interval`): Over prompts.
        passes, acceptance (`list`): Forward passes for each new token; accepted of verified proposals.
        member_seconds, overhead_seconds: For each new token. For standard ensembles the overhead is part of the
            main model's.
        overhead (`float`, *optional*): Its share.
        predicted (`float`, *optional*): The speed-up that the ensemble itself expected.
        limit (`float`, *optional*): The speed-up that passes' costs and acceptance allow; see `limits`.
        score (`float`, *optional*): The task's.
        identical (`tuple[int, int]`, *optional*): Texts equal to the standard ensemble's, of so many.
        gap (`float`, *optional*): Where texts differ, the greatest lead of the ensemble's most probable token there.
    """

    condition: Condition
    variant: str
    prompts: int
    speedup: Interval
    tokens_per_second: Interval
    passes: list[float]
    acceptance: list[float | None]
    member_seconds: list[float]
    overhead_seconds: float
    overhead: float | None
    predicted: float | None
    limit: float | None
    score: float | None
    identical: tuple[int, int] | None
    gap: float | None

    @property
    def reached(self) -> float | None:
        """The share of the limit that the median prompt reached."""
        return None if self.limit is None else self.speedup.median / self.limit


def interval(values: Sequence[float]) -> Interval:
    """
    The median, and its 95 % percentile interval over bootstrap resamples; the same values give the same interval.

    >>> from hf_spec_ensemble.bench.summary import interval

    >>> str(interval([1.5, 1.5, 1.5]))
    '1.50 [1.50, 1.50]'
    """
    values = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[chosen], axis=1), [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))


def summarise(records: Records) -> list[Summary]:
    """One summary for each condition and variant that has been measured, in the order of `_place`."""
    runs: dict[Condition, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records.of_kind("run"), key=_place):
        runs[_condition(record)][record["variant"]].append(record)
    gaps: dict[tuple[Condition, str], list[float]] = defaultdict(list)
    for record in records.of_kind("divergence"):
        gaps[_condition(record), record["variant"]].append(record["gap"])

    repeatable = records.header["settings"]["config"]["coupling"] != "maximal"
    summaries = []
    for condition, variants in runs.items():
        standard = {_turn(record): record for record in variants[STANDARD]}
        for variant, own in variants.items():
            paired = [record for record in own if _turn(record) in standard]  # all, but for an interrupted run
            if paired:
                comparable = repeats_standard(variant) and (
                    condition.temperature == 0 or (repeatable and not variant.startswith(BATCHED))
                )
                texts = [
                    a == b
                    for record in paired
                    for a, b in zip(record["tokens"], standard[_turn(record)]["tokens"])
                    if comparable
                ]
                limit = limit_of(records, condition, variant, paired)
                own_gaps = gaps.get((condition, variant))
                summaries.append(_summary(condition, variant, paired, standard, texts, own_gaps, limit))
    return summaries


def _summary(condition, variant, runs, standard, texts, gaps, limit) -> Summary:
    ratios, speeds = defaultdict(list), defaultdict(list)  # by prompt, over repeats and seeds
    for run in runs:
        own, base = (record["seconds"] / record["new_tokens"] for record in (run, standard[_turn(run)]))
        ratios[run["group"]].append(base / own)
        speeds[run["group"]].append(1 / own)
    tokens = sum(run["new_tokens"] for run in runs)
    accepted, verified = (_added(run.get(name) or [] for run in runs) for name in ("accepted", "verified"))
    member_seconds = _added(run["member_seconds"] for run in runs)
    loop_seconds = sum(run["loop_seconds"] for run in runs)
    predictions = [run["predicted_speedup"] for run in runs if run.get("predicted_speedup") is not None]
    scores = [score for run in runs for score in run["scores"] or []]
    return Summary(
        condition=condition,
        variant=variant,
        prompts=len(ratios) * condition.batch_size,
        speedup=interval([statistics.median(x) for x in ratios.values()]),
        tokens_per_second=interval([statistics.median(x) for x in speeds.values()]),
        passes=[n / tokens for n in _added(run["forward_passes"] for run in runs)],
        acceptance=[kept / tried if tried else None for kept, tried in zip(accepted, verified)],
        member_seconds=[seconds / tokens for seconds in member_seconds],
        overhead_seconds=(loop_seconds - sum(member_seconds)) / tokens,
        overhead=None if kind_of(variant) == STANDARD else 1 - sum(member_seconds) / loop_seconds,
        predicted=statistics.median(predictions) if predictions else None,
        limit=limit,
        score=statistics.mean(scores) if scores else None,
        identical=(sum(texts), len(texts)) if texts else None,
        gap=max(gaps) if gaps else None,
    )


def label(variant: str, members: Sequence[str]) -> str:
    """What a table calls a variant, with the members' short names."""
    prefix, name = split(variant)
    kind, _, rest = name.partition(":")
    if kind == "member":
        return f"{members[int(rest)]} alone"
    return f"{prefix}drafter:{short_names([rest])[0]}" if kind == "drafter" else variant


def members_of(records: Records, condition: Condition) -> list[str]:
    """The short names of the members that a condition has."""
    names = records.header["settings"]["members"]
    return short_names([names[i % len(names)] for i in range(condition.members)])


def _added(lists) -> list[float]:
    """Sums by position."""
    return [sum(column) for column in zip(*lists)]


def _condition(record: Record) -> Condition:
    return Condition(**{name: record[name] for name in CONDITION})


def _turn(record: Record) -> tuple:
    return record["group"], record["seed"], record["repeat"]


def _place(record: Record) -> tuple:
    """What runs are sorted by: the same records give the same numbers and tables, in whatever order they were made."""
    c = _condition(record)
    condition = list(TASKS).index(c.task), c.temperature, c.members, c.batch_size, c.prompt_length or 0
    return *condition, place_of(record["variant"]), *_turn(record)
