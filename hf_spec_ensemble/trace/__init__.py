"""What happened to every token of a call: recorded while it decodes, shown in a notebook, a terminal or as data.
Never changes what is decoded, and holds only the names and numbers of models."""

from . import show  # noqa: F401  puts on `Trace` how it looks
from .data import DraftTrace, Mark, PassTrace, TokenTrace, Trace
from .stream import TraceStreamer


__all__ = ["DraftTrace", "Mark", "PassTrace", "TokenTrace", "Trace", "TraceStreamer"]
