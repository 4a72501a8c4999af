"""The trace of a call: what it records, that recording changes nothing, and how it is shown."""

import json
import re
from html import unescape

import oracle
import pytest
import torch
from families import EOS, members, prompts, tokenizer

import hf_spec_ensemble as se
from hf_spec_ensemble.decoding import candidates
from hf_spec_ensemble.decoding.verify import exponential_noise, shared_noise_acceptance
from hf_spec_ensemble.trace import DraftTrace, PassTrace, TokenTrace, Trace
from hf_spec_ensemble.trace.text import pieces


def traced(models, inputs, name="weighted", seed=0, trace=True, drafter=None, eos=EOS, length=24, **config):
    torch.manual_seed(seed)
    do_sample = "coupling" in config
    config = oracle.config_of(name, len(models), **{"trace": trace, "num_assistant_tokens": 2, **config})
    return models[0].generate(
        **inputs, assistant_model=models[1:], ensemble_config=config, do_sample=do_sample,
        drafter=drafter, max_new_tokens=length, eos_token_id=[eos], return_dict_in_generate=True,
    )  # fmt: skip


RULES = {"greedy": {}, "gumbel": {"coupling": "gumbel"}, "maximal": {"coupling": "maximal"}}
DRAFTERS = [None, "model", "prompt_lookup"]


@pytest.mark.parametrize("family, batch", [("llama", 1), ("llama", 3), ("opt", 3)])
@pytest.mark.parametrize(
    "drafter, rule", [*((None, rule) for rule in RULES), ("model", "maximal"), ("prompt_lookup", "gumbel")]
)
def test_it_records_the_text_and_what_the_statistics_count(drafter, rule, batch, family):
    models, inputs = members(family, 4), prompts(batch)
    models, given = models[:3], models[3] if drafter == "model" else drafter
    plain, out = (traced(models, inputs, drafter=given, trace=on, **RULES[rule]) for on in (False, True))
    assert plain.trace is None and plain.sequences.tolist() == out.sequences.tolist(), "recording changed the text"

    trace, stats, prompt = out.trace, out.stats, inputs["input_ids"].shape[1]
    for b, row in enumerate(trace.rows):
        assert [token.token for token in row] == out.sequences[b, prompt : prompt + len(row)].tolist()
        assert [token.position for token in row] == list(range(len(row)))
    assert len(trace.tokens) == stats.new_tokens and trace.rule == rule
    assert len(trace.authors) == len(set(trace.authors)) == len(stats.forward_passes) and trace.members == 3
    assert trace.seconds == stats.seconds
    for author, passes in enumerate(stats.forward_passes):
        assert trace.counts_of(author)["passes"] == passes
        assert trace.seconds_of(author) == pytest.approx(stats.member_seconds[author])
        if batch == 1:  # else what was verified behind the end of a row counts there
            assert trace.counts_of(author)["verified"] == stats.verified[author]
            assert trace.counts_of(author)["accepted"] == stats.accepted[author]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_token_took_one_pass_of_every_member(drafter, batch):
    models, inputs = members("llama", 4), prompts(batch)
    models, given = models[:3], models[3] if drafter == "model" else drafter
    trace = traced(models, inputs, drafter=given, coupling="maximal").trace
    assert any(token.outcome == "corrected" for token in trace.tokens)
    for token in trace.tokens:
        passes = [trace.passes[i] for i in token.passes]
        assert sorted(run.author for run in passes if run.author < 3) == [0, 1, 2]
        assert len({run.author for run in passes}) == len(passes) and max(run.round for run in passes) <= token.round
        if token.draft and (token.draft.author < 3 or drafter == "model"):
            assert token.draft.author in {run.author for run in passes}
    assert all(run.seconds > 0 for run in trace.passes)


@pytest.mark.parametrize("rule", RULES)
def test_probabilities_are_those_of_the_formulas(rule):
    models, inputs = members("llama", 2), prompts(2)
    out = traced(models, inputs, **RULES[rule])
    mask = inputs["attention_mask"]
    prompt, seen = mask.shape[1], set()
    for token in out.trace.tokens[::5] + [t for t in out.trace.tokens if t.outcome == "corrected"][:5]:
        b, end = token.row, prompt + token.position
        ids = out.sequences[b : b + 1, :end]
        visible = torch.cat([mask[b : b + 1], torch.ones(1, token.position, dtype=mask.dtype)], 1)
        r = oracle.next_log_probs(models, ids, visible, "weighted")[0].exp()
        assert token.probability == pytest.approx(float(r[token.token]), abs=1e-9)
        if token.draft is None:
            continue
        alone = ids[0][visible[0].bool()][None]
        with torch.no_grad():
            q = models[token.draft.author](alone).logits[0, -1].softmax(-1)
        x = token.draft.token
        assert token.draft.q == pytest.approx(float(q[x]), abs=1e-9)
        assert token.draft.r == pytest.approx(float(r[x]), abs=1e-9)
        acceptance = {
            "greedy": float(r.argmax() == x),
            "maximal": min(1.0, float(r[x] / q[x])),
            "gumbel": 1 / float(torch.maximum(q, r * q[x] / r[x]).sum()),
        }[rule]
        assert token.draft.acceptance == pytest.approx(acceptance, abs=1e-9)
        seen.add(token.outcome)
    assert seen == {"accepted", "corrected"}


def test_the_chance_of_agreeing_with_shared_noise_is_that_of_a_simulation():
    torch.manual_seed(0)
    q, r = torch.rand(2, 5, dtype=torch.float64).pow(2)
    q, r = q / q.sum(), r / r.sum()
    r[4] = 0
    noise = exponential_noise(3, torch.zeros(1).numpy().astype(int), torch.arange(40_000).numpy(), 5, torch.float64)
    drawn, target = (q / noise).argmax(-1), (r / noise).argmax(-1)
    for x in range(5):
        expected = (target == x)[drawn == x].double().mean()
        tokens = torch.tensor([[x]])
        assert float(shared_noise_acceptance(tokens, q[None, None], r[None, None])) == pytest.approx(
            float(expected), abs=0.02
        )


def test_nothing_is_kept_for_a_trace_that_nobody_wants(monkeypatch):
    seen = []
    collect = candidates.EnsembleCandidateGenerator._collect
    monkeypatch.setattr(
        candidates.EnsembleCandidateGenerator, "_collect", lambda *args: seen.append(collect(*args)) or seen[-1]
    )
    for on in (False, True):
        traced(members("llama", 2), prompts(1), trace=on)
        assert all((each.q is not None) == (each.probs is not None) == on for each in seen)
        seen.clear()


def test_it_needs_an_output_to_be_part_of(capsys, caplog):
    models, inputs = members("llama", 2), prompts(1)
    config = se.EnsembleConfig(trace=True)
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        models[0].generate(**inputs, assistant_model=models[1], ensemble_config=config, max_new_tokens=2)
    with pytest.raises(TypeError, match="`trace` must be True or False, but is 'yes'"):
        se.EnsembleConfig(trace="yes")
    assert traced(models, inputs, speculative=False).trace is None


# --- What is shown ------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of given pieces, in bytes."""

    def __init__(self, *words: bytes):
        self.words = words

    def decode(self, ids, **kwargs):
        assert kwargs == dict(skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return b"".join(self.words[i] for i in ids).decode(errors="replace")


def test_texts_of_tokens_make_up_the_text():
    euro = "€".encode()
    words = Words(b" a", euro[:1], euro[1:], b"<b>", b"\n")
    assert pieces(words, [0, 1, 2, 3, 0]) == [" a", "", "€", "<b>", " a"]
    assert pieces(words, [0, 0, 1, 2], start=1) == [" a", "", "€"]
    assert pieces(words, [0, 1]) == [" a", "\ufffd"], "the last token has nothing to wait for"


@pytest.fixture
def trace() -> Trace:
    """Of two rows, with every outcome."""
    kept = DraftTrace(token=0, author=0, place=1, q=0.5, r=0.4, acceptance=0.8)
    lost = DraftTrace(token=1, author=1, place=2, q=0.5, r=0.1, acceptance=0.2)
    rows = [
        [
            TokenTrace(0, 0, 0, 0.4, kept, 1, (0, 1)),
            TokenTrace(0, 1, 2, 0.7, lost, 1, (0, 1)),
            TokenTrace(0, 2, 3, 0.9, None, 2, (2, 3)),
        ],
        [TokenTrace(1, 0, 0, 0.4, kept, 2, (2, 3))],
    ]
    passes = [PassTrace(0, 1, 8, 0.02), PassTrace(1, 1, 9, 0.03), PassTrace(0, 2, 2, 0.01), PassTrace(1, 2, 1, 0.01),
              PassTrace(2, 2, 0, 0.001)]  # fmt: skip
    names = ["<base>", "math & co", "prompt_lookup"]
    found = Trace(names, 2, rows, passes, seconds=0.1, rule="maximal", prompts=[[4], [4]])
    words = Words(b"one ", b"<script>alert(1)</script>", b"two \"'&", b"\xe2\x80\xae\x1b[2J\n", b"prompt")
    return found.with_tokenizer(words)


def test_the_html_escapes_everything_and_says_what_happened(trace):
    html = trace._repr_html_()
    assert "<script" not in html and "<base>" not in html and "\u202e" not in html and "\x1b" not in html
    texts = re.findall(r'<span class="([^"]*)" tabindex="0" data-why="([^"]*)">([^<]*)</span>', html)
    assert [kind for kind, *_ in texts] == ["a0", "fix", "drawn", "a0"]
    assert [unescape(text) for *_, text in texts] == ["one ", "two \"'&", "\u25ab\u25ab[2J\u21b5\n", "one "]
    why = [unescape(each) for _, each, _ in texts]
    assert "proposed by <base>" in why[0] and "80%" in why[0]
    assert "math & co proposed “<script>alert(1)</script>”" in why[1]
    assert "50.0%" in why[1] and "10.0%" in why[1] and "20%" in why[1]
    assert "drawn from the ensemble" in why[2]
    assert "4 forward passes" in html and "ensemble takes 6" in html  # 2 members, 3 tokens in the longest row
    assert trace._repr_html_().split("<style>")[0] != html.split("<style>")[0], "two on a page share their styles"


def test_without_a_tokenizer_tokens_are_numbers():
    out = traced(members("llama", 2), prompts(1))
    html = out.trace._repr_html_()
    assert f"[{out.trace.rows[0][0].token}]" in html and "with_tokenizer" in html


def test_the_tokenizer_of_the_call_gives_the_text():
    models, inputs, words = members("llama", 2), prompts(2), tokenizer()
    out = models[0].generate(
        **inputs, assistant_model=models[1], ensemble_config=se.EnsembleConfig(trace=True), do_sample=False,
        max_new_tokens=12, return_dict_in_generate=True, tokenizer=words,
    )  # fmt: skip
    prompt = inputs["input_ids"].shape[1]
    for row, ids in zip(out.trace.rows, out.sequences):
        new = ids[prompt : prompt + len(row)]
        prefix = words.decode(ids[prompt - 1 : prompt])
        assert prefix + "".join(token.text for token in row) == words.decode(ids[prompt - 1 : prompt + len(new)])


def test_it_comes_as_data(trace):
    fields = json.loads(trace.to_json())
    assert fields["authors"] == trace.authors and len(fields["passes"]) == 5
    assert [token["outcome"] for token in fields["rows"][0]] == ["accepted", "corrected", "drawn"]
    assert fields["rows"][0][1]["draft"]["text"] == "<script>alert(1)</script>"
    table = pytest.importorskip("pandas") and trace.to_pandas()
    assert list(table["draft_author"].fillna("")) == ["<base>", "math & co", "", "<base>"]
    assert list(table["token"]) == [0, 2, 3, 0] and list(table["outcome"])[1] == "corrected"
    empty = Trace(["a", "b"], 2, [[]], [], 0.0, "greedy")
    assert len(empty.to_pandas()) == 0 and "0 tokens" in empty.summary() and "0 tokens" in empty._repr_html_()


def test_the_plot_shows_acceptance_gains_and_time(trace):
    acceptance, gains, time = trace.plot().axes
    assert [text.get_text() for text in acceptance.get_legend().get_texts()] == ["<base>", "math & co"]
    assert [line.get_ydata().tolist() for line in acceptance.lines] == [[1.0], [0.0]]
    assert gains.lines[0].get_ydata().tolist() == [2.0, 1.0] and "1.50 a round" in gains.get_title()
    assert [bar.get_width() for bar in time.patches] == pytest.approx([0.03, 0.04, 0.001, 0.029])
    assert all(ax.get_xlabel() and ax.get_title() for ax in (acceptance, gains, time))
