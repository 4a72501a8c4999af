"""Plots of a likelihood over the weights, with matplotlib (extra `notebooks`)."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..config import EnsembleConfig
from .mixture import mixture_log_probs


STEPS = 40  # of a weight from 0 to 1
COLOUR = (0, 114 / 255, 178 / 255)
MARK = (213 / 255, 94 / 255, 0)


def plot(
    config: EnsembleConfig,
    names: Sequence[str],
    points: Sequence[tuple[Sequence[float], float]],
    log_probs: torch.Tensor | None,
) -> Figure:
    """See `FitResult.plot`; the arguments are its fields."""
    n = len(names)
    if config.method == "product":
        raise ValueError("The weights of a product are on no line or triangle: there is no plot. `points` has them.")
    if n > 3:
        raise ValueError(f"There is a plot for two and for three members, but there are {n}.")
    figure, ax = plt.subplots(figsize=(5.6, 3.8) if n == 2 else (6.0, 4.8), layout="constrained")
    if config.method == "contrastive":
        _contrast(points, names, ax)
    else:
        (_line if n == 2 else _triangle)(log_probs, config.weights, names, ax)
    plt.close(figure)  # a notebook shows what is returned, and would show what is open once more
    return figure


def _nats(log_probs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Nats per token at weights `[K, N]`: `[K]`."""
    return torch.stack([-mixture_log_probs(log_probs, each).mean() for each in weights])


def _line(log_probs: torch.Tensor, fitted: Sequence[float], names: Sequence[str], ax: Axes) -> None:
    share = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    ax.plot(share, _nats(log_probs, torch.stack([share, 1 - share], 1)), color=COLOUR)
    best = torch.tensor([fitted], dtype=torch.float64)
    _mark(ax, float(best[0, 0]), float(_nats(log_probs, best)))
    ax.set(xlabel=f"weight of {names[0]} (the rest: {names[1]})", ylabel="nats per token, fitted texts")
    _plain(ax)


def _contrast(points: Sequence[tuple[Sequence[float], float]], names: Sequence[str], ax: Axes) -> None:
    evaluated = sorted((abs(weights[1]), nats) for weights, nats in points)
    ax.plot(*zip(*evaluated), color=COLOUR, marker="o", ms=4, ls=":", lw=1, label="evaluated")
    best = min(evaluated, key=lambda point: point[1])
    _mark(ax, *best)
    ax.set(xlabel=f"contrast of {names[0]} with {names[1]}", ylabel="nats per token, fitted texts")
    _plain(ax)


def _triangle(log_probs: torch.Tensor, fitted: Sequence[float], names: Sequence[str], ax: Axes) -> None:
    """Every corner is a member alone; weights fall linearly to the side across from it."""
    grid = [(i, j, STEPS - i - j) for i in range(STEPS + 1) for j in range(STEPS + 1 - i)]
    weights = torch.tensor(grid, dtype=torch.float64) / STEPS
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]], dtype=torch.float64)
    nats = _nats(log_probs, weights)
    nats = nats.clamp(max=nats[nats.isfinite()].max())  # a member may find some token impossible
    # Corners are far worse than the rest: levels by rank, closest around the best
    levels = torch.quantile(nats, torch.linspace(0, 1, 16, dtype=torch.float64) ** 1.5).unique()
    if len(levels) > 2:
        shown = ax.tricontourf(*(weights @ corners).T, nats, levels=levels.tolist(), cmap="viridis_r")
        ax.figure.colorbar(shown, ax=ax, label="nats per token, fitted texts", format="%.4f", shrink=0.8)
    ax.plot(*corners[[0, 1, 2, 0]].T, color="0.3", lw=1)
    best = torch.tensor([fitted], dtype=torch.float64)
    _mark(ax, *(best @ corners)[0].tolist())
    places = [((-4, -6), "right", "top"), ((4, -6), "left", "top"), ((0, 6), "center", "bottom")]
    for corner, name, weight, (shift, across, up) in zip(corners.tolist(), names, fitted, places):
        text = f"{name}\n{weight:.3g}"
        ax.annotate(text, corner, shift, textcoords="offset points", ha=across, va=up)
    ax.set_aspect("equal")
    ax.margins(0.12)
    ax.axis("off")


def _mark(ax: Axes, x: float, y: float) -> None:
    ax.plot([x], [y], marker="o", ms=9, mfc="white", mec=MARK, mew=2, ls="none", label="fitted", clip_on=False)
    ax.legend(frameon=False)


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
