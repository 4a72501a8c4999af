"""Plots of a trace, with matplotlib (extra `notebooks`)."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .data import Trace
from .html import COLOURS


HATCHES = ("", "//", "..", "xx", "\\\\", "++")
MARKERS = "osD^vX"
PLACES = 8  # of a turn that are told apart; later ones are few


def plot(trace: Trace) -> Figure:
    """See `Trace.plot`."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    _acceptance(trace, axes[0])
    _gains(trace, axes[1])
    _time(trace, axes[2])
    plt.close(figure)  # a notebook shows what is returned, and would show what is open once more
    return figure


def colour_of(author: int) -> tuple[float, ...]:
    return tuple(int(part) / 255 for part in COLOURS[author % len(COLOURS)].split(","))


def _acceptance(trace: Trace, ax: Axes) -> None:
    for author, name in enumerate(trace.authors):
        fates: dict[int, list[bool]] = {}
        for draft, kept in trace.drafts:
            if draft.author == author:
                fates.setdefault(min(draft.place, PLACES), []).append(kept)
        if not fates:
            continue
        places = sorted(fates)
        shares = [sum(fates[place]) / len(fates[place]) for place in places]
        sizes = [15 + 150 * len(fates[place]) / len(trace.drafts) for place in places]
        beside = [place + 0.08 * (author - (len(trace.authors) - 1) / 2) for place in places]  # not on each other
        ax.plot(beside, shares, color=colour_of(author), lw=1, zorder=1)
        ax.scatter(beside, shares, sizes, color=colour_of(author), marker=MARKERS[author % len(MARKERS)], label=name)
    ax.set(
        title="Acceptance (larger marks: more proposals)",
        xlabel="place of the proposal in its turn",
        ylabel="accepted of verified proposals",
    )
    ax.set_ylim(-0.05, 1.05)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if trace.drafts:
        ax.set_xlim(0.5, max(1, *(min(draft.place, PLACES) for draft, _ in trace.drafts)) + 0.5)
        legend = ax.legend(frameon=False, loc="lower left")
        for handle in legend.legend_handles:
            handle.set_sizes([40])
    _plain(ax)


def _gains(trace: Trace, ax: Axes) -> None:
    """Tokens gained by each round, averaged over the rows that gained any."""
    gained = [[0] * (trace.rounds + 1) for _ in trace.rows]
    for token in trace.tokens:
        gained[token.row][token.round] += 1
    rounds = range(1, trace.rounds + 1)
    means = []
    for n in rounds:
        some = [row[n] for row in gained if row[n]]
        means.append(sum(some) / len(some) if some else 0.0)
    ax.step(rounds, means, where="mid", color="0.35", lw=1)
    mean = sum(means) / max(len(means), 1)
    ax.set(title=f"Tokens gained: {mean:.2f} a round", xlabel="round of verification", ylabel="tokens per row")
    ax.set_ylim(0, max([*means, 1]) * 1.15)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    _plain(ax)


def _time(trace: Trace, ax: Axes) -> None:
    names = [*trace.authors, "outside the passes"]
    seconds = [trace.seconds_of(author) for author in range(len(trace.authors))] + [trace.overhead]
    colours = [colour_of(author) for author in range(len(trace.authors))] + [(0.75,) * 3]
    bars = ax.barh(names, seconds, color=colours, height=0.6)
    for bar, hatch in zip(bars, HATCHES):
        bar.set(hatch=hatch, edgecolor="white")
    share = [f"{part / trace.seconds:.0%}" if trace.seconds else "" for part in seconds]
    ax.bar_label(bars, share, padding=4, fontsize=9)
    ax.invert_yaxis()
    ax.set(title=f"Time: {trace.seconds:.2f} s", xlabel="seconds")
    ax.set_xlim(0, max(seconds) * 1.18 or 1)
    _plain(ax)


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
