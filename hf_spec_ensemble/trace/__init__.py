"""What happened to every token of a call: recorded while it decodes, shown in a notebook, a terminal or as data.
Never changes what is decoded, and knows nothing of models but authors' names and numbers."""

from . import show  # noqa: F401  puts on `Trace` how it looks
from .data import DraftTrace, Mark, PassTrace, TokenTrace, Trace
from .stream import TraceStreamer


__all__ = ["DraftTrace", "Mark", "PassTrace", "TokenTrace", "Trace", "TraceStreamer"]
