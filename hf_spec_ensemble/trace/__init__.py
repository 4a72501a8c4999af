"""What happened to every token of a call: recorded while it decodes, shown in a notebook, a terminal or as data."""

from .data import DraftTrace, PassTrace, TokenTrace, Trace


__all__ = ["DraftTrace", "PassTrace", "TokenTrace", "Trace"]
