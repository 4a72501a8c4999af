"""A benchmark's report: a Markdown table, and the plots beside it."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from .curves import curve_table
from .dtypes import dtype_note
from .plan import Condition, short_names
from .records import CONDITION, Record, Records
from .summary import COLUMN_OF_CURVE, Summary, label, members_of, summarise
from .tasks import TASKS
from .variants import NOTES, STANDARD, note_of


TITLES = {
    "task": "task", "temperature": "T", "batch_size": "batch", "members": "members", "prompt_length": "prompt length",
}  # fmt: skip

LIMIT = (
    "Limit: the speed-up that the best proposal lengths would have, for what passes cost here and the acceptance in "
    "this run, with no time outside the passes. Reached: the share of it. It is the theory's for one row, and the best "
    "of many simulated schedules for batches and for greedy mixtures that some members settle. It is too high where an "
    "author proposes only what it is sure of."
)
CURVES = (
    "Milliseconds of a forward pass over so many tokens in each row, medians, in the middle of a text; in brackets, "
    "times those of a pass over one token."
)


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
    if curves := _curves(records):
        lines += ["", "## What passes cost", "", *curve_table(curves), "", CURVES]
    for condition in dict.fromkeys(summary.condition for summary in summaries):
        own = [summary for summary in summaries if summary.condition == condition]
        prompts = max(s.prompts for s in own)
        lines += ["", f"## {_title(condition)}", "", f"{prompts} prompt{'s' * (prompts != 1)}.", ""]
        lines += _details(own, members_of(records, condition))
    lines += [
        "",
        "Passes per token, acceptance: by member, a drafter's last. Overhead: the share of time outside forward passes "
        "(not told apart for standard ensembles). Text: whether it is the standard ensemble's; where it is not, the "
        "gap is the lead, in log-probability, of its most probable token at the first difference.",
        *_below_prediction(summaries, records),
    ]
    if any(summary.limit is not None for summary in summaries):
        lines += ["", LIMIT]
    kinds = dict.fromkeys(note_of(summary.variant) for summary in summaries)
    lines += [f"\n{mark} {NOTES[kind]}" for kind, mark in _marks(kinds).items()]
    return "\n".join(lines) + "\n"


def _circumstances(records: Records) -> list[str]:
    """What the records tell of how they were made, as notes."""
    notes = [dtype_note(record) for record in records.of_kind("dtype")]
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
    marks = _marks(dict.fromkeys(note_of(summary.variant) for summary in summaries))
    head = ["method", "speed-up", "limit", "reached", "tokens/s", "passes per token", "acceptance", "overhead"]
    head += ["predicted speed-up", TASKS[summaries[0].condition.task].metric, "text"]
    rows = []
    for s in summaries:
        rows.append(
            [
                f"{label(s.variant, members)} {marks.get(note_of(s.variant), '')}".strip(),
                "1" if s.variant == STANDARD else str(s.speedup),
                "-" if s.limit is None else f"{s.limit:.2f}",
                _percent(s.reached),
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


def _curves(records: Records) -> list[Record]:
    """In an order that does not depend on when they were made: under each condition the members' first."""
    members = records.header["settings"]["members"]

    def place(curve: Record) -> tuple:
        condition = list(TASKS).index(curve["task"]), curve["batch_size"], curve["prompt_length"] or 0
        model = curve["model"]
        return *condition, curve["variant"], members.index(model) if model in members else len(members), model

    return sorted(records.of_kind("curve"), key=place)


def _title(condition: Condition) -> str:
    values = {TITLES[name]: getattr(condition, name) for name in CONDITION[1:]}
    return ", ".join([condition.task, *(f"{name} {_shown(x)}" for name, x in values.items() if x is not None)])


def _below_prediction(summaries: Sequence[Summary], records: Records) -> list[str]:
    """What is compared where less was measured than predicted."""
    below = [s for s in summaries if s.predicted is not None and round(s.speedup.median, 2) < round(s.predicted, 2)]
    if not below:
        return []
    lines = [
        "",
        "A predicted speed-up is of the time inside forward passes of one row, at the acceptance of that run and the "
        "costs that the passes had in this process so far. A measured one is of whole calls: it has the overhead, "
        "waits for the slowest row of a batch, and compares with the standard ensemble's passes as they ran beside it. "
        "Less than predicted was measured for:",
        "",
    ]
    for s in below:
        name = label(s.variant, members_of(records, s.condition))
        share = "" if s.overhead is None else f", with {_percent(s.overhead)} of its time outside forward passes"
        lines.append(
            f"- {name}, {_title(s.condition)}: {s.speedup.median:.2f} measured, {s.predicted:.2f} predicted{share}"
        )
    return lines


def _marks(kinds) -> dict[str, str]:
    """Footnote marks of the kinds that have a note."""
    return dict(zip([kind for kind in kinds if kind in NOTES], "¹²³⁴"))


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def write_report(records: Records, folder: Path, notes: Sequence[str] = ()) -> list[Path]:
    """Writes the table and the plots, and returns their paths. Each file is replaced as a whole."""
    from .plots import plot  # needs matplotlib

    with TemporaryDirectory(dir=folder, prefix="report-") as made:
        table = Path(made) / "table.md"
        table.write_text(markdown(records, notes), encoding="utf-8")
        return [file.replace(folder / file.name) for file in [table, *plot(records, Path(made))]]
