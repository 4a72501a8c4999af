"""PNG plots of a benchmark, with matplotlib (extra `bench`)."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plan import Condition
from .records import Records
from .summary import COLUMN_OF_CURVE, Summary, label, members_of, summarise
from .variants import STANDARD, kind_of


OVERHEAD_COLOUR = "0.75"


def plot(records: Records, folder: Path) -> list[Path]:
    """Draws the plots that suit the records into a folder: a curve, or speed-up, acceptance and time."""
    summaries = summarise(records)
    curve = records.header["settings"]["curve"]
    figures = (
        {f"curve-{curve}.png": _curves(summaries, records, curve)}
        if curve
        else {
            "speedup.png": _speedups(summaries, records),
            "acceptance.png": _acceptance(summaries, records),
            "time.png": _times(summaries, records),
        }
    )
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150, bbox_inches="tight")
    return [folder / name for name in figures]


def _colours(names: Sequence[str]) -> dict[str, tuple]:
    """A colour for each name, the same in all plots of a report."""
    names = list(dict.fromkeys(names))
    palette = colormaps["tab20" if len(names) > 10 else "tab10"]
    return {name: palette(i) for i, name in enumerate(names)}


def _panels(count: int, width: float, height: float, columns: int = 2) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _title(condition: Condition, *leave_out: str) -> str:
    words = [] if "task" in leave_out else [condition.task]
    words.append(f"T = {condition.temperature:g}")
    if "batch_size" not in leave_out:
        words.append(f"batch {condition.batch_size}")
    return ", ".join(words)


def _error(intervals) -> list[list[float]]:
    """Intervals as matplotlib takes them: distances from the medians."""
    return [[x.median - x.low for x in intervals], [x.high - x.median for x in intervals]]


def _speedups(summaries: Sequence[Summary], records: Records) -> Figure:
    """
    Bars of speed-up by task and method, a panel for each temperature and batch size. Members alone, which are no
    ensemble and by far the fastest when they are small, are left to the table.
    """
    summaries = [s for s in summaries if kind_of(s.variant) != "member"]
    panels = list(dict.fromkeys((s.condition.temperature, s.condition.batch_size) for s in summaries))
    tasks = list(dict.fromkeys(s.condition.task for s in summaries))
    variants = [name for name in dict.fromkeys(s.variant for s in summaries) if name != STANDARD]
    colours = _colours(variants)
    figure, axes = _panels(len(panels), width=max(6.0, 1.2 + 0.32 * len(tasks) * (len(variants) + 1)), height=3.8)
    entries = {}
    for axis, panel in zip(axes, panels):
        own = [s for s in summaries if (s.condition.temperature, s.condition.batch_size) == panel]
        width = 0.85 / max(1, len(variants))
        for i, name in enumerate(variants):
            bars = [s for s in own if s.variant == name]
            if bars:
                places = [tasks.index(s.condition.task) + (i - (len(variants) - 1) / 2) * width for s in bars]
                entries[name] = axis.bar(
                    places,
                    [s.speedup.median for s in bars],
                    width,
                    yerr=_error([s.speedup for s in bars]),
                    error_kw={"elinewidth": 0.8},
                    color=colours[name],
                )
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_xticks(range(len(tasks)), tasks)
        axis.set_xlim(-0.5, len(tasks) - 0.5)
        axis.set_ylabel("speed-up over the standard ensemble")
        axis.set_title(_title(own[0].condition, "task"))
    labels = [label(name, members_of(records, summaries[0].condition)) for name in entries]
    figure.legend(entries.values(), labels, loc="outside right center", fontsize="small")
    return figure


def _acceptance(summaries: Sequence[Summary], records: Records) -> Figure:
    """Bars of acceptance by method and member, a panel for each condition."""
    shown = [s for s in summaries if any(x is not None for x in s.acceptance)]
    conditions = list(dict.fromkeys(s.condition for s in shown))
    if not conditions:
        figure, (axis,) = _panels(1, 5, 2)
        axis.text(0.5, 0.5, "nothing was proposed", ha="center", va="center")
        axis.set_axis_off()
        return figure
    count = max(len([s for s in shown if s.condition == condition]) for condition in conditions)
    figure, axes = _panels(len(conditions), width=max(5.0, 1.2 * count), height=3.4)
    entries = {}
    for axis, condition in zip(axes, conditions):
        own = [s for s in shown if s.condition == condition]
        members = [*members_of(records, condition), "drafter"]
        colours = _colours(members)
        width = 0.85 / max(len(s.acceptance) for s in own)
        for place, summary in enumerate(own):
            for i, share in enumerate(summary.acceptance):
                if share is not None:
                    left = place + (i - (len(summary.acceptance) - 1) / 2) * width
                    entries[members[i]] = axis.bar(left, share, width, color=colours[members[i]])
                    axis.bar_label(entries[members[i]], [f"{share:.0%}"], fontsize="x-small")
        names = [label(s.variant, members) for s in own]
        axis.set_xticks(range(len(own)), names, rotation=20, ha="right")
        axis.set_xlim(-0.5, len(own) - 0.5)
        axis.set_ylim(0, 1.1)
        axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.set_ylabel("accepted of verified")
        axis.set_title(_title(condition))
    order = [name for name in members if name in entries]
    handles = [entries[name] for name in order]
    figure.legend(handles, order, loc="outside right center", title="proposals of", fontsize="small")
    return figure


def _times(summaries: Sequence[Summary], records: Records) -> Figure:
    """Stacked bars of the time for a token, by member and outside the forward passes."""
    conditions = list(dict.fromkeys(s.condition for s in summaries))
    count = max(len([s for s in summaries if s.condition == condition]) for condition in conditions)
    figure, axes = _panels(len(conditions), width=6.0, height=0.8 + 0.32 * count)
    entries = {}
    for axis, condition in zip(axes, conditions):
        own = [s for s in summaries if s.condition == condition]
        members = [*members_of(records, condition), "drafter"]
        colours = _colours(members)
        for place, summary in enumerate(own):
            left = 0.0
            parts = [(members[i], x, colours[members[i]]) for i, x in enumerate(summary.member_seconds)]
            for name, seconds, colour in [*parts, ("overhead", summary.overhead_seconds, OVERHEAD_COLOUR)]:
                if seconds > 0:
                    entries[name] = axis.barh(place, 1000 * seconds, left=1000 * left, color=colour)
                    left += seconds
        names = [f"{label(s.variant, members)}{'*' if kind_of(s.variant) == STANDARD else ''}" for s in own]
        axis.set_yticks(range(len(own)), names)
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds for a token")
        axis.set_title(_title(condition))
    order = [name for name in [*members, "overhead"] if name in entries]
    figure.legend([entries[x] for x in order], order, loc="outside right center", fontsize="small")
    figure.supxlabel("* the main model's part holds the overhead", fontsize="x-small", ha="left", x=0.01)
    return figure


def _curves(summaries: Sequence[Summary], records: Records, curve: str) -> Figure:
    """Speed-up and tokens/s against what varies, a line for each method, a row for each task and temperature."""
    rows = list(dict.fromkeys((s.condition.task, s.condition.temperature) for s in summaries))
    figure, axes = _panels(2 * len(rows), width=5.0, height=3.6)
    colours = _colours([_series(s, curve)[0] for s in summaries])
    entries = {}
    for row, axis_pair in zip(rows, zip(axes[::2], axes[1::2])):
        own = [s for s in summaries if (s.condition.task, s.condition.temperature) == row]
        points = sorted({x for _, x in (_series(s, curve) for s in own) if x is not None})
        for axis, quantity in zip(axis_pair, ("speedup", "tokens_per_second")):
            for name in dict.fromkeys(_series(s, curve)[0] for s in own):
                # What the varied length does not concern is as good everywhere: a level line
                line = [(x, s) for s in own for n, x in [_series(s, curve)] if n == name]
                marker = "" if line[0][0] is None else "o"
                line = [(x, s) for only, s in line for x in ([only] if only is not None else points)]
                line.sort(key=lambda point: point[0])
                xs, values = [x for x, _ in line], [getattr(s, quantity) for _, s in line]
                low, high = [v.low for v in values], [v.high for v in values]
                style = "--" if name == STANDARD else "-"
                (entries[name],) = axis.plot(
                    xs, [v.median for v in values], style, marker=marker, markersize=4, color=colours[name]
                )
                axis.fill_between(xs, low, high, color=colours[name], alpha=0.15)
            if curve != "members":
                axis.set_xscale("log", base=2)
            axis.set_xticks(points, [str(x) for x in points])
            axis.set_xlabel(curve.replace("-", " ") + (" size" if curve == "batch" else ""))
            axis.set_ylabel("speed-up over the standard ensemble" if quantity == "speedup" else "tokens/s")
            axis.set_ylim(bottom=0)
            axis.set_title(_title(own[0].condition, "batch_size"))
    labels = [label(name, members_of(records, summaries[-1].condition)) for name in entries]
    figure.legend(entries.values(), labels, loc="outside right center", fontsize="small")
    return figure


def _series(summary: Summary, curve: str) -> tuple[str, int | None]:
    """The line that a summary belongs to, and its place on it; `None` if it has none of its own."""
    if curve != "proposal-length":
        return summary.variant, getattr(summary.condition, COLUMN_OF_CURVE[curve])
    name, _, length = summary.variant.rpartition(":")
    return (name, int(length)) if length.isdigit() else (summary.variant, None)
