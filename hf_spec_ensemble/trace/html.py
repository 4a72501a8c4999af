"""A trace as HTML for notebooks: the text, marked by who proposed it, with a legend. Everything that comes from models
or files is escaped. Nothing is loaded, and no script runs."""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import count, groupby

from .data import Mark, TokenTrace, Trace, legend_of
from .text import printable


# Okabe and Ito's colours, told apart with every kind of colour vision, and a line style for those who see none
COLOURS = ("0,114,178", "230,159,0", "0,158,115", "204,121,167", "213,94,0", "86,180,233")
LINES = ("solid", "dashed", "dotted", "double", "wavy")
LONGEST = 4000  # tokens of a row that are shown

_number = count()  # of the traces shown: styles must not leak from one to another

# Colours are laid over the page's own, so that they suit light and dark themes alike
STYLE = """
#ID{font-family:system-ui,sans-serif;font-size:14px;line-height:1.5;color:inherit;max-width:60em}
#ID p{margin:.4em 0}
#ID .text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:2;font-size:15px;padding:.3em .7em;
 border:1px solid rgba(128,128,128,.4);border-radius:6px}
#ID .text span{text-decoration-thickness:2px;text-underline-offset:4px;border-radius:3px;padding:1px 0;cursor:default}
#ID .text span:hover,#ID .text span:focus{outline:2px solid currentColor;position:relative}
#ID .text span:hover::after,#ID .text span:focus::after{content:attr(data-why);position:absolute;left:0;top:1.9em;
 z-index:9;width:max-content;max-width:30em;white-space:pre-wrap;padding:.4em .7em;border-radius:6px;
 background:#222;color:#fff;border:1px solid #888;font:13px/1.45 system-ui,sans-serif}
#ID .fix{border:1.5px solid currentColor;margin:0 1px;-webkit-box-decoration-break:clone;box-decoration-break:clone}
#ID .fix::before{content:"\\2717";font-size:.75em;margin:0 2px;opacity:.8}
#ID .end{opacity:.55}
#ID table{border-collapse:collapse;margin:.4em 0;color:inherit;font-size:13px}
#ID td,#ID th{padding:.15em .8em;text-align:right;background:none;color:inherit;border:0}
#ID th{font-weight:600;border-bottom:1px solid rgba(128,128,128,.5)}
#ID td:first-child,#ID th:first-child{text-align:left}
#ID td i,#ID .note i{font-style:normal;padding:0 .4em;border-radius:3px;text-decoration-thickness:2px;
 text-underline-offset:4px}
#ID .note{opacity:.75;font-size:13px}
"""


def html_of(trace: Trace) -> str:
    """The HTML of a trace, for a cell's output or a page of one's own."""
    rows = "".join(_row(trace, b) for b in range(len(trace.rows)))
    return _framed(f"{_headline(trace)}{rows}{_legend(trace)}", range(len(trace.authors)))


def html_of_stream(parts: Sequence[tuple[str, Mark | None]]) -> str:
    """
    The HTML of a text that is being made, with a legend of what it has.

    Args:
        parts (`Sequence`): Tokens' texts, and how they came about; `None` for those of which that is not known.
    """
    text = ""
    for (kind, _), run in groupby(enumerate(parts), lambda part: _run_of(*part)):
        text += f'<span class="{kind}">{_safe("".join(each for _, (each, _) in run))}</span>'
    marks = [mark for _, mark in parts if mark is not None]
    legend = " \u00b7 ".join(
        f'<i class="{_class_of(mark)}">{_safe(said)}</i> {count}' for said, (mark, count) in legend_of(marks).items()
    )
    note = f'<p class="note">{legend}</p>' if legend else ""
    authors = {mark.author for mark in marks if mark.outcome == "accepted"}
    return _framed(f'<div class="text">{text}</div>{note}', sorted(authors))


def _run_of(place: int, part: tuple[str, Mark | None]) -> tuple[str, int | None]:
    """Tokens in a row that share this are one piece of HTML; a correction is one of its own."""
    kind = _class_of(part[1])
    return kind, place if kind == "fix" else None


def _class_of(mark: Mark | None) -> str:
    if mark is None:
        return ""
    return {"accepted": f"a{mark.author}", "corrected": "fix", "drawn": "drawn"}[mark.outcome]


def _framed(body: str, authors: Iterable[int]) -> str:
    """With the style of this body alone."""
    id_ = f"ensemble-trace-{next(_number)}"
    marks = "".join(
        f"#{id_} .a{author}{{background:rgba({COLOURS[author % len(COLOURS)]},.25);"
        f"text-decoration-line:underline;text-decoration-style:{LINES[author % len(LINES)]};"
        f"text-decoration-color:rgb({COLOURS[author % len(COLOURS)]})}}\n"
        for author in authors
    )
    style = STYLE.replace("#ID", f"#{id_}") + marks
    return f'<div id="{id_}"><style>{style}</style>{body}</div>'


def page_of(trace: Trace, title: str) -> str:
    """A page of its own, for a browser; light or dark as that is set."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_safe(title)}</title>'
    body = "margin:2em auto;padding:0 1em;max-width:60em;font:15px system-ui"
    style = f"<style>:root{{color-scheme:light dark}}body{{{body}}}</style>"
    return f"{head}{style}<body><p>{_safe(title)}</p>{html_of(trace)}</body></html>\n"


def _headline(trace: Trace) -> str:
    tokens, passes = len(trace.tokens), trace.forward_passes
    longest = max(map(len, trace.rows), default=0)  # a pass serves all rows
    return (
        f"<p><b>{tokens} tokens</b> in {trace.rounds} rounds and {trace.seconds:.2f} s, with "
        f"<b>{passes} forward passes</b> where the standard ensemble takes {trace.members * longest}</p>"
    )


def _row(trace: Trace, b: int) -> str:
    shown = "".join(_token(trace, token) for token in trace.rows[b][:LONGEST])
    if len(trace.rows[b]) > LONGEST:
        shown += f'<span class="end"> ... and {len(trace.rows[b]) - LONGEST} more tokens</span>'
    caption = f'<p class="note">Row {b}</p>' if len(trace.rows) > 1 else ""
    return f'{caption}<div class="text">{shown}</div>'


def _token(trace: Trace, token: TokenTrace) -> str:
    kind = _class_of(Mark(token.outcome, token.draft and token.draft.author))
    text = _visible(token.text, token.token).replace("\n", "\u21b5\n")
    said = _quoted(why(trace, token))
    return f'<span class="{kind}" tabindex="0" data-why="{said}">{_safe(text)}</span>'


def why(trace: Trace, token: TokenTrace) -> str:
    """What happened at a token, in words."""
    this, draft = f"\u201c{_visible(token.text, token.token)}\u201d", token.draft
    passes = ", ".join(f"{trace.authors[trace.passes[i].author]} #{i + 1}" for i in token.passes)
    whose = "The ensemble" if token.owner is None else f"Its owner, {trace.authors[token.owner]},"
    where = f"\n{whose} gives {this} {token.probability:.1%}.\nRound {token.round}; passes: {passes}."
    if draft is None:
        return f"{this} drawn from the ensemble: every member had scored this position.{where}"
    author = trace.authors[draft.author]
    if token.outcome == "accepted":
        given = "" if trace.rule == "greedy" else f" It had a chance of {draft.acceptance:.0%}."
        return f"{this} proposed by {author} (no. {draft.place} of its turn, {draft.q:.1%}) and accepted.{given}{where}"
    other = f"\u201c{_visible(draft.text, draft.token)}\u201d"
    reason = (
        "the ensemble's most probable token is another"
        if trace.rule == "greedy"
        else f"{other} had a chance of {draft.acceptance:.0%} to be accepted"
    )
    return (
        f"Corrected: {author} proposed {other} (no. {draft.place} of its turn), to which it gives {draft.q:.1%} and "
        f"the ensemble {draft.r:.1%}. Rejected: {reason}. {this} came in its place.{where}"
    )


def _legend(trace: Trace) -> str:
    tokens = trace.tokens
    lines = []
    for author, name in enumerate(trace.authors):
        counts, seconds = trace.counts_of(author), trace.seconds_of(author)
        share = f"{counts['accepted'] / counts['verified']:.0%}" if counts["verified"] else "-"
        cells = [counts["accepted"], f"{counts['accepted']} of {counts['verified']}", share, counts["passes"]]
        cells.append(_time(seconds, trace.seconds))
        lines.append([f'<i class="a{author}">proposed by {_safe(name)}</i>', *cells])
    for kind, mark, what in (("corrected", "fix", "corrected: drawn in place of a rejected proposal"),
                             ("drawn", "drawn", "drawn from the ensemble without a proposal")):  # fmt: skip
        number = sum(token.outcome == kind for token in tokens)
        if number:
            lines.append([f'<i class="{mark}">{what}</i>', number, "", "", "", ""])
    lines.append(["outside the passes", "", "", "", "", _time(trace.overhead, trace.seconds)])
    head = ["", "tokens", "accepted", "", "passes", "seconds"]
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    note = "Point at a token, or move to it with the Tab key, to see what happened there."
    if any(token.text is None for token in tokens):
        note += " For text in place of token numbers: trace.with_tokenizer(tokenizer)."
    header = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<table><tr>{header}</tr>{body}</table><p class="note">{note}</p>'


def _time(seconds: float, total: float) -> str:
    return f"{seconds:.2f} ({seconds / total if total else 0:.0%})"


def _visible(text: str | None, token: int) -> str:
    """A token's text, or something to see where it has none."""
    return f"[{token}]" if text is None else text or "\u25ab"


def _safe(text: str) -> str:
    return escape(printable(text))


def _quoted(text: str) -> str:
    return _safe(text).replace("\n", "&#10;")
