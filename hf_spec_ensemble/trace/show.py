"""How a trace is displayed: adds the display methods to `Trace`, which itself is data."""

from typing import TYPE_CHECKING

from .data import Trace
from .extras import extra
from .html import html_of


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(self: Trace) -> "Figure":
    """
    Acceptance by author and place in the turn; tokens gained by every round; where the time went.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        `ImportError`: if matplotlib is not installed.
    """
    extra("matplotlib")
    from .plot import plot

    return plot(self)


Trace.plot = plot
Trace._repr_html_ = html_of
