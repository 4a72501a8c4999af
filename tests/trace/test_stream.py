"""TraceStreamer: the text as it is made, in a notebook, a terminal and elsewhere; and what streamers are told."""

import io
import sys
from itertools import pairwise
from types import SimpleNamespace

import oracle
import pytest
import torch
from families import EOS, members, prompts, tokenizer

import hf_spec_ensemble as se
from hf_spec_ensemble.trace import Mark, TraceStreamer, screens
from hf_spec_ensemble.trace.screens import Notebook, Terminal, screen_of
from hf_spec_ensemble.trace.text import Reader


def rule_of(name: str) -> dict[str, str]:
    return {} if name == "greedy" else {"coupling": name}


class Told:
    """A streamer that writes down what it is told."""

    def __init__(self):
        self.marks, self.tokens = [], []

    def put_marks(self, marks):
        self.marks.append(marks)

    def put(self, value):
        if value.dim() == 1:
            self.tokens.append(value.tolist())

    def end(self):
        self.ended = True


def generate(models, inputs, streamer, drafter=None, length=24, **config):
    torch.manual_seed(0)
    do_sample = "coupling" in config
    config = oracle.config_of("weighted", len(models), **{"num_assistant_tokens": 2, **config})
    return models[0].generate(
        **inputs, assistant_model=models[1:], ensemble_config=config, do_sample=do_sample, streamer=streamer,
        drafter=drafter, max_new_tokens=length, eos_token_id=[EOS], return_dict_in_generate=True,
    )  # fmt: skip


@pytest.mark.parametrize("drafter", [None, "prompt_lookup"])
@pytest.mark.parametrize("rule, batch", [("greedy", 1), ("greedy", 3), ("gumbel", 1), ("maximal", 3), ("ancestral", 1)])
def test_streamers_are_told_what_a_trace_records(rule, batch, drafter):
    models, inputs, told = members("llama", 3), prompts(batch), Told()
    trace = generate(models, inputs, told, drafter, trace=True, **rule_of(rule)).trace
    assert told.ended and len(told.marks) == len(told.tokens) == max(map(len, trace.rows))
    seen = set()
    for b, row in enumerate(trace.rows):
        marks = [marks[b] for marks in told.marks]
        assert marks[len(row) :] == [None] * (len(marks) - len(row)), "a row that has ended"
        for token, mark, tokens in zip(row, marks, told.tokens):
            assert tokens[b] == token.token
            author = None if token.draft is None else token.draft.author
            assert mark == Mark(token.outcome, author, None if author is None else trace.authors[author])
            seen.add(mark.outcome)
    assert "corrected" in seen and len(seen) > 1


def test_the_standard_ensemble_tells_nothing_and_streams_the_same_text():
    told = Told(), Told()
    for each, speculative in zip(told, (True, False)):
        generate(members("llama", 2), prompts(1), each, speculative=speculative)
    assert told[0].tokens == told[1].tokens and told[0].marks and not told[1].marks


# --- What is shown ------------------------------------------------------------------------------------------------


class Cell:
    """A notebook's output: what it showed, one after the other."""

    def __init__(self, monkeypatch):
        self.shown = []
        display = SimpleNamespace(display=self.display)
        shell = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()), display=display)
        monkeypatch.setitem(sys.modules, "IPython", shell)
        monkeypatch.setitem(sys.modules, "IPython.display", display)

    def display(self, thing, display_id):
        assert display_id is True
        self.update(thing)
        return self

    def update(self, thing):
        self.shown.append(thing)


@pytest.fixture
def terminal(monkeypatch):
    """What is written to a terminal of true colours."""
    pytest.importorskip("rich")
    monkeypatch.setitem(sys.modules, "IPython", None)
    written, console = io.StringIO(), screens.Console
    monkeypatch.setattr(
        screens, "Console", lambda **more: console(file=written, force_terminal=True, color_system="truecolor", **more)
    )
    monkeypatch.delenv("NO_COLOR", raising=False)
    return written


def text_of(out, words, inputs) -> str:
    return words.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_notebook_shows_the_coloured_text_as_it_grows(monkeypatch):
    cell, words, inputs = Cell(monkeypatch), tokenizer(), prompts(1)
    out = generate(members("llama", 2), inputs, se.TraceStreamer(words, interval=0), coupling="maximal")
    texts = [repr(shown) for shown in cell.shown]
    assert len(texts) == 1 + out.stats.new_tokens + 1  # the prompt's place, tokens, the end
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert texts[-1].strip() == text_of(out, words, inputs).strip()
    html = cell.shown[-1]._repr_html_()
    assert 'class="a0"' in html and 'class="a1"' in html and 'class="fix"' in html and "proposed by" in html
    assert "<script" not in html
    cell.shown.clear()
    generate(members("llama", 2), inputs, se.TraceStreamer(words, interval=3600), coupling="maximal")
    assert [repr(shown) for shown in cell.shown] == ["", texts[-1]], "it waits between two updates, but not at the end"


def test_a_terminal_gets_colours_marks_and_a_legend(terminal):
    words, inputs = tokenizer(), prompts(1)
    out = generate(members("llama", 2), inputs, TraceStreamer(words), coupling="maximal")
    written = terminal.getvalue()
    assert "\x1b[" in written and "\u2717" in written and "proposed by" in written and "corrected" in written
    plain = "".join(part.partition("m")[2] for part in ("m" + written).split("\x1b["))
    text, legend = plain.replace("\u2717", "").rstrip("\n").rsplit("\n", 1)
    assert text.strip() == text_of(out, words, inputs).strip()
    counts = [int(part.rsplit(" ", 1)[1]) for part in legend.split(" \u00b7 ")]
    assert sum(counts) == out.stats.new_tokens


@pytest.mark.parametrize("config", [{}, {"speculative": False}])
def test_elsewhere_the_text_is_plain(config, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    words, inputs = tokenizer(), prompts(1)
    out = generate(members("llama", 2), inputs, TraceStreamer(words), **config)
    assert capsys.readouterr().out == text_of(out, words, inputs) + "\n"
    generate(members("llama", 2), inputs, TraceStreamer(words, skip_prompt=False, skip_special_tokens=False), **config)
    assert capsys.readouterr().out == words.decode(out.sequences[0]) + "\n"


def test_the_standard_ensemble_has_no_colours(terminal):
    generate(members("llama", 2), prompts(1), TraceStreamer(tokenizer()), speculative=False)
    assert terminal.getvalue() and "\x1b" not in terminal.getvalue()


def test_one_streamer_shows_one_text_after_the_other(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    streamer, inputs = TraceStreamer(tokenizer()), prompts(1)
    texts = []
    for _ in range(2):
        generate(members("llama", 2), inputs, streamer)
        texts.append(capsys.readouterr().out)
    streamer.put(inputs["input_ids"])
    streamer.put(torch.tensor([7]))  # and its call failed
    capsys.readouterr()
    generate(members("llama", 2), inputs, streamer)
    assert texts[0] == texts[1] == capsys.readouterr().out


def test_a_batch_is_refused_before_the_first_pass(monkeypatch):
    models = members("llama", 2)
    for model in models:
        monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("a pass"))
    with pytest.raises(ValueError, match="the batch has 3 rows"):
        generate(models, prompts(3), TraceStreamer(tokenizer()))


def test_what_is_written_is_safe(terminal):
    """No model's text moves the cursor or leaves its place in the page."""
    screen = Terminal()
    parts = [("a\x1b[2J\u202e", Mark("accepted", 0, "<b>")), ("[red]\n\nb", Mark("drawn")), ("\n", None)]
    screen.show(parts, last=True)
    assert "\x1b[2J" not in terminal.getvalue() and "[red]\n\nb\n" in terminal.getvalue()
    html = screens.html_of_stream(parts)
    assert "<b>" not in html and "\x1b" not in html and "\u202e" not in html


def test_a_shell_without_a_kernel_is_no_notebook(monkeypatch):
    for shell, kind in ((None, Terminal), (SimpleNamespace(), Terminal), (SimpleNamespace(kernel=1), Notebook)):
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert type(screen_of(0.1)) is kind


def test_characters_of_several_tokens_come_with_the_last():
    class Bytes:
        def decode(self, ids, **kwargs):
            return bytes(ids).decode(errors="replace")

    reader = Reader(Bytes(), b"ab")
    assert [reader.add(byte) for byte in "c€d".encode()] == ["c", "", "", "€", "d"]
    assert reader.rest() == "" and [reader.add(0xE2), reader.rest()] == ["", "\ufffd"]
    texts = [reader.add(0xFF) for _ in range(12)]
    assert any(texts), "what is no character does not wait for ever"
