"""Where a text that is being made is shown: in a notebook's cell, or in a terminal or file."""

import sys
import time
from collections.abc import Sequence

from .data import Mark, legend_of
from .html import html_of_stream
from .text import printable


try:
    from rich.console import Console
    from rich.text import Text
except ImportError:  # it comes with transformers; without it texts are plain
    Console = None

Part = tuple[str, Mark | None]

LONGEST = 4000  # tokens that a notebook shows, the last ones

# Black on colours like those of `html`, but lighter, reads on light and dark terminals; and an attribute for eyes that
# see no colours
TINTS = ("#56b4e9", "#e69f00", "#2bc299", "#dc8fbb", "#f08a50", "#b8b8b8")
ATTRIBUTES = ("", "underline", "italic", "bold", "underline italic", "underline bold")


class Notebook:
    """
    A cell's output, which is replaced by a longer text a few times a second.

    State: the handle of the output, and when it was last replaced.

    Args:
        interval (`float`): Seconds between two of these.
    """

    def __init__(self, interval: float):
        self.interval = interval
        self._handle = None
        self._last = 0.0

    def show(self, parts: Sequence[Part], last: bool = False) -> None:
        now = time.monotonic()
        if not last and self._handle is not None and now - self._last < self.interval:
            return
        self._last = now
        shown = _Shown(parts[-LONGEST:])
        if self._handle is None:
            from IPython.display import display

            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)


class _Shown:
    """What IPython displays: HTML, and plain text where there is none."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = list(parts)

    def __repr__(self) -> str:
        return "".join(text for text, _ in self._parts)

    def _repr_html_(self) -> str:
        return html_of_stream(self._parts)


class Terminal:
    """
    Standard output: coloured if that is a terminal, plain text if it is a file.

    State: how much was printed.
    """

    def __init__(self):
        self._printed = 0
        self._console = Console(highlight=False) if Console else None

    def show(self, parts: Sequence[Part], last: bool = False) -> None:
        for text, mark in parts[self._printed :]:
            self._print(text, mark)
        self._printed = len(parts)
        if last:
            self._print("\n")
            self._legend([mark for _, mark in parts if mark is not None])
        sys.stdout.flush()

    def _print(self, text: str, mark: Mark | None = None) -> None:
        if self._console is None or not self._console.is_terminal:
            print(text, end="")
            return
        cross = "x" if self._console.options.ascii_only else "\u2717"
        style = style_of(mark)
        for line in printable(text).splitlines(keepends=True):  # a line's end is no part of what is coloured
            words = line.rstrip("\n")
            if words:
                corrected = mark is not None and mark.outcome == "corrected"
                self._console.print(Text(cross * corrected + words, style), end="", soft_wrap=True)
            self._console.print("\n" * (len(line) - len(words)), end="")

    def _legend(self, marks: list[Mark]) -> None:
        if self._console is None or not self._console.is_terminal or not marks:
            return
        for place, (said, (mark, count)) in enumerate(legend_of(marks).items()):
            self._print(" \u00b7 " if place and not self._console.options.ascii_only else "  " * bool(place))
            self._print(said, mark)
            self._print(f" {count}")
        self._print("\n")


def style_of(mark: Mark | None) -> str:
    """rich's style of a token."""
    if mark is None or mark.outcome == "drawn":
        return ""
    if mark.outcome == "corrected":
        return "bold reverse"
    return f"#000000 on {TINTS[mark.author % len(TINTS)]} {ATTRIBUTES[mark.author % len(ATTRIBUTES)]}".strip()


def screen_of(interval: float) -> Notebook | Terminal:
    """What there is to show on: a notebook's cell, in Jupyter, VS Code and nbconvert, or else the standard output."""
    ipython = sys.modules.get("IPython")  # whoever is in a notebook has it
    shell = ipython.get_ipython() if ipython is not None else None
    return Notebook(interval) if getattr(shell, "kernel", None) is not None else Terminal()
