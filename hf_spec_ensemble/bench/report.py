"""From records to numbers and a Markdown table: ratios prompt by prompt, medians, bootstrap intervals."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .plan import Condition, short_names
from .records import CONDITION, Record, Records
from .tasks import TASKS
from .variants import NOTES, STANDARD, kind_of, repeats_standard, split


RESAMPLES = 2000
TITLES = {
    "task": "task", "temperature": "T", "batch_size": "batch", "members": "members", "prompt_length": "prompt length",
}  # fmt: skip
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
    score: float | None
    identical: tuple[int, int] | None
    gap: float | None


def interval(values: Sequence[float]) -> Interval:
    """
    The median, and its 95 % percentile interval over bootstrap resamples; the same values give the same interval.

    >>> from hf_spec_ensemble.bench.report import interval

    >>> str(interval([1.5, 1.5, 1.5]))
    '1.50 [1.50, 1.50]'
    """
    values = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[chosen], axis=1), [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))


def summarise(records: Records) -> list[Summary]:
    """One summary for each condition and variant that has been measured, in the order of the records."""
    runs: dict[Condition, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records.of_kind("run"):
        runs[_condition(record)][record["variant"]].append(record)
    gaps: dict[tuple[Condition, str], list[float]] = defaultdict(list)
    for record in records.of_kind("divergence"):
        gaps[_condition(record), record["variant"]].append(record["gap"])

    repeatable = records.header["settings"]["config"]["coupling"] == "gumbel"
    summaries = []
    for condition, variants in runs.items():
        standard = {_turn(record): record for record in variants[STANDARD]}
        for variant, own in variants.items():
            paired = [record for record in own if _turn(record) in standard]  # all, but for an interrupted run
            if paired:
                comparable = repeats_standard(variant) and (condition.temperature == 0 or repeatable)
                texts = [
                    a == b
                    for record in paired
                    for a, b in zip(record["tokens"], standard[_turn(record)]["tokens"])
                    if comparable
                ]
                summaries.append(_summary(condition, variant, paired, standard, texts, gaps.get((condition, variant))))
    return summaries


def _summary(condition, variant, runs, standard, texts, gaps) -> Summary:
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


def markdown(records: Records, notes: Sequence[str] = ()) -> str:
    """The report: what was measured on, speed-ups at a glance, and a table for each condition."""
    summaries = summarise(records)
    settings, environment = records.header["settings"], records.header["environment"]
    varied = ("num_assistant_tokens", "alternate", "speculative")  # by what is compared
    config = {name: x for name, x in settings["config"].items() if x is not None and name not in varied}
    lines = ["# Speculative ensemble: benchmark", ""]
    lines += [f"- members: {', '.join(short_names(settings['members']))}"]
    lines += [f"- ensemble: {', '.join(f'{name} = {value}' for name, value in config.items())}"]
    lines += [f"- at most {settings['max_new_tokens']} new tokens, {settings['dtype']}"]
    lines += [f"- {', '.join(f'{name}: {value}' for name, value in environment.items())}"]
    lines += [f"- {note}" for note in [*notes, *_circumstances(records)]]
    lines += ["", "## Speed-up over the standard ensemble", "", *_overview(summaries, records)]
    lines += [
        "",
        "Medians over prompts of the time for a token, the standard ensemble's divided by the variant's, with their "
        "bootstrap intervals (95 %).",
    ]
    for condition in dict.fromkeys(summary.condition for summary in summaries):
        own = [summary for summary in summaries if summary.condition == condition]
        lines += ["", f"## {_title(condition)}", "", f"{max(s.prompts for s in own)} prompts.", ""]
        lines += _details(own, members_of(records, condition))
    lines += [
        "",
        "Passes per token, acceptance: by member, a drafter's last. Overhead: the share of time outside forward passes "
        "(not told apart for standard ensembles). Text: whether it is the standard ensemble's; where it is not, the "
        "gap is the lead, in log-probability, of its most probable token at the first difference.",
    ]
    kinds = dict.fromkeys(kind_of(summary.variant) for summary in summaries)
    lines += [f"\n{mark} {NOTES[kind]}" for kind, mark in _marks(kinds).items()]
    return "\n".join(lines) + "\n"


def _circumstances(records: Records) -> list[str]:
    """What the records tell of how they were made, as notes."""
    notes = []
    compiling = [record["seconds"] for record in records.of_kind("warmup")]
    if compiling:
        notes.append(f"Compiling took {sum(compiling):.0f} s, which no time below contains.")
    processes = max((record.get("processes", 1) for record in records.of_kind("run")), default=1)
    if processes > 1:
        notes.append(
            f"Measured by up to {processes} processes at once. Where they share a processor they slow each other down: "
            "every ratio is of times of one process, but tokens/s are not those of a process on its own."
        )
    return notes


def _overview(summaries: Sequence[Summary], records: Records) -> list[str]:
    """Speed-ups in the shape of the paper's table: one row for a method, one column for a task or point of a curve."""
    column = COLUMN_OF_CURVE.get(records.header["settings"]["curve"], "task")
    varied = [
        name
        for name in CONDITION
        if name != column and (name == "temperature" or len({getattr(s.condition, name) for s in summaries}) > 1)
    ]
    columns = list(dict.fromkeys(getattr(summary.condition, column) for summary in summaries))
    rows: dict[tuple, dict] = defaultdict(dict)
    for summary in summaries:
        if summary.variant != STANDARD:
            name = label(summary.variant, members_of(records, summary.condition))
            place = tuple(_shown(getattr(summary.condition, x)) for x in varied)
            rows[(*place, name)][getattr(summary.condition, column)] = str(summary.speedup)
    prefix = "" if column == "task" else f"{TITLES[column]} "
    head = [*(TITLES[name] for name in varied), "method", *(f"{prefix}{value}" for value in columns)]
    return _table(head, [[*row, *(cells.get(value, "-") for value in columns)] for row, cells in rows.items()])


def _details(summaries: Sequence[Summary], members: Sequence[str]) -> list[str]:
    marks = _marks(dict.fromkeys(kind_of(summary.variant) for summary in summaries))
    head = ["method", "speed-up", "tokens/s", "passes per token", "acceptance", "overhead", "predicted speed-up"]
    head += [TASKS[summaries[0].condition.task].metric, "text"]
    rows = []
    for s in summaries:
        rows.append(
            [
                f"{label(s.variant, members)} {marks.get(kind_of(s.variant), '')}".strip(),
                "1" if s.variant == STANDARD else str(s.speedup),
                f"{s.tokens_per_second.median:.1f}",
                " / ".join(f"{x:.2f}" for x in s.passes),
                " / ".join(_percent(x) for x in s.acceptance) if any(x is not None for x in s.acceptance) else "-",
                _percent(s.overhead),
                "-" if s.predicted is None else f"{s.predicted:.2f}",
                "-" if s.score is None else f"{s.score:.3f}",
                _text(s),
            ]
        )
    return _table(head, rows)


def _text(summary: Summary) -> str:
    if summary.identical is None:
        return "-"
    same, count = summary.identical
    if same == count:
        return f"identical ({count})"
    gap = "" if summary.gap is None else f", gap at most {summary.gap:.1e}"
    return f"{same} of {count} identical{gap}"


def _title(condition: Condition) -> str:
    values = {TITLES[name]: getattr(condition, name) for name in CONDITION[1:]}
    return ", ".join([condition.task, *(f"{name} {_shown(x)}" for name, x in values.items() if x is not None)])


def _marks(kinds) -> dict[str, str]:
    """Footnote marks of the kinds that have a note."""
    return dict(zip([kind for kind in kinds if kind in NOTES], "¹²"))


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _added(lists) -> list[float]:
    """Sums by position."""
    return [sum(column) for column in zip(*lists)]


def _condition(record: Record) -> Condition:
    return Condition(**{name: record[name] for name in CONDITION})


def _turn(record: Record) -> tuple:
    return record["group"], record["seed"], record["repeat"]


def write_report(records: Records, folder: Path, notes: Sequence[str] = ()) -> list[Path]:
    """Writes the table and the plots, and says where."""
    from .plots import plot  # needs matplotlib

    table = folder / "table.md"
    table.write_text(markdown(records, notes), encoding="utf-8")
    return [table, *plot(records, folder)]
