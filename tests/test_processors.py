"""Processors of a user: which prefixes they are shown, how often, and what happens where they leave no token."""

import copy
import random
from collections import deque

import numpy as np
import oracle
import pytest
import torch
from covering import pairwise
from families import EOS, PAD, members, prompts
from test_sampling import PROMPTS, chi_square_p, counts, draw, small_members
from test_sampling import batch as batch_of
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
)

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.compat import OUTPUT_CACHE, given_cache
from hf_spec_ensemble.notices import warn_once


PROMPT, NEW = 7, 14
DRAWS = {"greedy": dict(), "sampled": dict(do_sample=True)}


def generate(models, inputs, config, **kwargs):
    torch.manual_seed(3)
    kwargs = dict(max_new_tokens=NEW, return_dict_in_generate=True) | kwargs
    return models[0].generate(**inputs, assistant_model=models[1:], ensemble_config=config, **kwargs)


# --- prefix_allowed_tokens_fn ---------------------------------------------------------------------------------------


def branches(path):
    """What may follow a path in an endless trie over few tokens, so that lookups in the prompt find some."""
    few = random.Random(str(path)).sample(range(3, 12), 4)
    return [*few, EOS] if len(path) > 5 else few


class Trie:
    """Fails on any prefix of a row but its prompt and what it has allowed; where a text has ended, there is padding."""

    def __init__(self, inputs):
        self.prompts = inputs["input_ids"].tolist()
        self.calls = 0

    def __call__(self, batch_id, ids):
        self.calls += 1
        prompt, path = ids[:PROMPT].tolist(), ids[PROMPT:].tolist()
        assert prompt == self.prompts[batch_id], "the prefix of another row"
        for j, token in enumerate(path):
            if token == EOS:
                assert set(path[j + 1 :]) <= {PAD}
                return [PAD]
            if token not in branches(path[:j]):
                raise KeyError(f"{path[: j + 1]} was never allowed")
        return branches(path)


TRIES = pairwise(
    dict(
        likeness=[0.3, 0.9],
        batch=[1, 3],
        combine_on=["probs", "logits", "raw_logits"],
        # Where and how tokens fall that the trie allowed
        draw_and_drafter=[(draw, drafter) for draw in DRAWS for drafter in (None, "prompt_lookup")],
    )
)


@pytest.mark.parametrize("likeness,batch,combine_on,draw_and_drafter", TRIES)
def test_a_trie_sees_only_what_it_allowed(likeness, batch, combine_on, draw_and_drafter):
    draw, drafter = draw_and_drafter
    models, inputs = members("llama", 3, likeness), prompts(batch, vocab=12)
    texts = []
    for speculative in (True, False):
        config = EnsembleConfig(combine_on=combine_on, speculative=speculative, num_assistant_tokens=2)
        arguments = dict(prefix_allowed_tokens_fn=Trie(inputs), drafter=drafter if speculative else None)
        texts.append(generate(models, inputs, config, **arguments, **DRAWS[draw]).sequences)
    assert texts[0].tolist() == texts[1].tolist()


def test_a_trie_with_several_texts_for_each_prompt():
    models, inputs = members("llama", 3, 0.3), prompts(2, vocab=12)
    call = dict(do_sample=True, num_return_sequences=3)
    texts = [
        generate(models, inputs, EnsembleConfig(speculative=s), prefix_allowed_tokens_fn=Trie(inputs), **call).sequences
        for s in (True, False)
    ]
    assert texts[0].tolist() == texts[1].tolist() and len(texts[0]) == 6


def test_a_token_forced_after_the_trie_is_kept():
    """It is not the trie's, and yet what follows it is shown to the trie, as in the standard ensemble."""
    models, inputs = members("llama", 2), prompts(1, length=1, vocab=12)

    def one_of_two(batch_id, ids):
        return [3 + int(ids[-1]) % 7, 4 + int(ids[-1]) % 7]

    texts = []
    for speculative in (True, False):
        config = EnsembleConfig(speculative=speculative, num_assistant_tokens=3)
        given = dict(prefix_allowed_tokens_fn=one_of_two, forced_bos_token_id=11)
        texts.append(generate(models, inputs, config, **given, drafter="prompt_lookup" if speculative else None))
    assert texts[0].sequences.tolist() == texts[1].sequences.tolist()
    assert texts[0].sequences[0, 1] == 11


# --- Processors that nobody knows: called once for each token, in order, on final tokens ----------------------------


class Unknown(LogitsProcessor):
    """Keeps what it is shown, and forbids some tokens by how often it was called; subclasses hide that count."""

    def __init__(self):
        self.shown = []

    def calls(self):
        raise NotImplementedError

    def __call__(self, input_ids, scores):
        self.shown = [*self.shown, input_ids.tolist()]
        forbidden = (torch.arange(scores.shape[1]) + self.calls() * 7 + input_ids[:, -1:]) % 4 == 0
        return scores.masked_fill(forbidden, -torch.inf)


class InAnArray(Unknown):
    def __init__(self):
        super().__init__()
        self.count = np.zeros(1, int)

    def calls(self):
        self.count[0] += 1
        return int(self.count[0])


class InADeque(Unknown):
    def __init__(self):
        super().__init__()
        self.last = deque([0], maxlen=1)

    def calls(self):
        self.last.append(self.last[0] + 1)
        return self.last[0]


class InADict(Unknown):
    def __init__(self):
        super().__init__()
        self.counts = {"calls": 0}

    def calls(self):
        self.counts["calls"] += 1
        return self.counts["calls"]


class Nested(Unknown):
    def __init__(self):
        super().__init__()
        self.inner = InADeque()

    def calls(self):
        return self.inner.calls()


class InAClosure:
    """No class of its own: a function, wrapped to have `shown`."""

    def __new__(cls):
        inner = Nested()

        def processor(input_ids, scores):
            return inner(input_ids, scores)

        processor.inner = inner
        return processor


UNKNOWN = [InAnArray, InADeque, InADict, Nested, InAClosure]
MANY_ENDS = list(range(2, 50, 7))


def seen(processor):
    return getattr(processor, "inner", processor).shown if not isinstance(processor, Unknown) else processor.shown


def in_order(processor):
    return [len(rows[0]) for rows in seen(processor)] == list(range(PROMPT, PROMPT + len(seen(processor))))


@pytest.mark.parametrize("name", ["weighted raw logits", "product"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("processor", UNKNOWN)
def test_state_that_cannot_be_seen(processor, batch, name):
    models, inputs = members("llama", 3), prompts(batch)
    call = dict(logits_processor=[one := processor()], eos_token_id=MANY_ENDS, output_scores=True)
    out = generate(models, inputs, oracle.config_of(name, 3, num_assistant_tokens=[2, 1, 3]), **call)
    judge = processor()
    text, log_r = oracle.greedy(models, inputs, name, NEW, [judge], eos=MANY_ENDS)
    assert out.sequences.tolist() == text.tolist()
    assert sum(out.stats.accepted) > 0, "it is speculative"
    going_on = torch.ones(batch, dtype=torch.bool)
    for column, formula, tokens in zip(out.scores, log_r, text[:, PROMPT:].T, strict=True):
        torch.testing.assert_close(column[going_on].double(), formula[going_on], rtol=0, atol=1e-5)
        going_on &= ~torch.isin(tokens, torch.tensor(MANY_ENDS))
    assert seen(one) == seen(judge) and in_order(one)


@pytest.mark.parametrize("call", [
    dict(drafter="prompt_lookup"),
    dict(num_return_sequences=3, temperature=0.7),
    dict(repetition_penalty=1.4, top_k=9),
    dict(drafter=members("llama", 4)[3]),
    dict(stopping_criteria=[MaxLengthCriteria(PROMPT + 5)]),
], ids=["prompt_lookup", "several texts", "among others", "a model drafts", "stops"])  # fmt: skip
@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
@pytest.mark.parametrize("trace", [False, True])
def test_an_unknown_processor_in_all_settings(trace, coupling, call):
    """What it sees is the text, column by column; with noise that is shared the text is the standard ensemble's."""
    models, inputs = members("llama", 3, 0.5), prompts(3, vocab=20)
    outputs = []
    for speculative in (True, False):
        more = dict(do_sample=True, eos_token_id=MANY_ENDS) | call
        more |= {} if speculative else dict(drafter=None)
        config = EnsembleConfig(
            method="product", speculative=speculative, coupling=coupling, trace=trace and speculative
        )
        out = generate(models, inputs, config, logits_processor=[one := Nested()], **more)
        text = out.sequences.tolist()
        steps = len(text[0]) - PROMPT
        assert seen(one) == [[row[: PROMPT + step] for row in text] for step in range(steps)]
        outputs.append(out)
    if coupling == "gumbel":
        assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()
    if trace:
        for tokens, row in zip(outputs[0].trace.rows, outputs[0].sequences[:, PROMPT:].tolist()):
            assert [token.token for token in tokens] == row[: len(tokens)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mpt"])
def test_an_unknown_processor_in_a_batch_of_any_family(family):
    """MPT's rows must advance in step, Gemma's windows count slots."""
    models, inputs = members(family, 2), prompts(3)
    texts = [
        generate(
            models, inputs, EnsembleConfig(method="product", speculative=s, num_assistant_tokens=3),
            logits_processor=[InAnArray()],
        ).sequences.tolist()
        for s in (True, False)
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_samples_with_an_unknown_processor_have_the_distribution():
    """Under the maximal coupling the text is not the standard ensemble's: chi-square against the formula."""
    models, prompt = small_members(2), torch.tensor(PROMPTS[0])

    def favours(input_ids, scores):
        return scores + torch.linspace(-1, 1, scores.shape[1]) * (input_ids[:, -1:] % 3 - 1)

    config = oracle.config_of("product", 2, coupling="maximal", num_assistant_tokens=2)
    texts = draw(models, batch_of(1), config, 5000, length=2, logits_processor=[favours], top_k=0)
    probs = oracle.continuation_probs(models, prompt, "product", 2, [favours])
    assert chi_square_p([counts(texts[0], 2)], [probs.flatten()]) > 1e-3


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("feature", [
    dict(guidance_scale=1.5),
    dict(watermarking_config=SynthIDTextWatermarkingConfig(ngram_len=3, keys=[654, 400, 836, 123])),
], ids=["guidance", "watermark"])  # fmt: skip
def test_transformers_own_processors_with_a_state(feature, draw, batch):
    models, inputs = members("llama", 3), prompts(batch)
    texts = [
        generate(models, inputs, EnsembleConfig(method="product", speculative=s), **feature, **DRAWS[draw])
        for s in (True, False)
    ]
    assert texts[0].sequences.tolist() == texts[1].sequences.tolist()
    plain = generate(models, inputs, EnsembleConfig(method="product"), **DRAWS[draw]).sequences
    assert texts[0].sequences.tolist() != plain.tolist()


@pytest.mark.parametrize("combine_on", ["probs", "logits"])
@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("nested", [False, True])
def test_where_members_need_it_each_it_is_refused(nested, speculative, combine_on):
    models, one = members("llama", 2), InADeque()
    config = EnsembleConfig(combine_on=combine_on, speculative=speculative)
    processors = [LogitsProcessorList([one])] if nested else [one]
    message = r"InADeque may keep state.*once for each member.*combine_on='raw_logits'.*stateless = True"
    with pytest.raises(ValueError, match=message):
        generate(models, prompts(1), config, logits_processor=processors)
    assert not one.shown
    one.stateless = True
    generate(models, prompts(1), config, logits_processor=processors)


def test_it_is_said_once_that_this_is_slower(caplog):
    warn_once.cache_clear()
    models = members("llama", 2)
    with caplog.at_level("WARNING", logger="hf_spec_ensemble"):
        for _ in range(2):
            generate(models, prompts(1), EnsembleConfig(method="product"), logits_processor=[InADeque()])
    said = [record.message for record in caplog.records if "InADeque" in record.message]
    assert len(said) == 1 and "`stateless = True`" in said[0] and "once for each token" in said[0]


# --- Positions without a distribution ---------------------------------------------------------------------------------


LATER = PROMPT + 4  # the first new token that has none is the fifth
VALUES = {"nan": (torch.nan, "nan"), "+inf": (torch.inf, r"\+inf"), "-inf": (-torch.inf, "-inf for every token")}
RULES = {
    "greedy": (dict(), "gumbel"), "gumbel": (dict(do_sample=True), "gumbel"),
    "maximal": (dict(do_sample=True), "maximal"),
}  # fmt: skip


def breaking(model, value, first=LATER):
    """A copy whose logits after `first` tokens are all this value."""
    model = copy.deepcopy(model)

    def broken(module, args, kwargs, out):
        late = kwargs["position_ids"][:, -out.logits.shape[1] :] >= first - 1
        out.logits = out.logits.masked_fill(late[..., None], value)
        return out

    model.register_forward_hook(broken, with_kwargs=True)
    return model


class FromThere(LogitsProcessor):
    stateless = True

    def __init__(self, value, rows=slice(None)):
        self.value, self.rows = value, rows

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] < LATER:
            return scores
        scores = scores.clone()
        scores[self.rows] = self.value
        return scores


@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("combine_on", ["probs", "raw_logits"])
@pytest.mark.parametrize("guilty", [0, 1])
def test_the_member_is_named(guilty, combine_on, value, rule, speculative):
    draw, coupling = RULES[rule]
    number, found = VALUES[value]
    models = members("llama", 2)
    models[guilty] = breaking(models[guilty], number)
    config = EnsembleConfig(
        combine_on=combine_on, coupling=coupling, speculative=speculative, num_assistant_tokens=[3, 2]
    )
    who = rf"{['the main model', 'assistant model 1'][guilty]} \(LlamaForCausalLM\) gives {found}"
    with pytest.raises(ValueError, match=rf"New token 5 of row 0 .*{who}"):
        generate(models, prompts(1), config, eos_token_id=None, **draw)


@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("combine_on", ["probs", "raw_logits"])
def test_the_processors_are_named(combine_on, value, rule, speculative):
    draw, coupling = RULES[rule]
    number, found = VALUES[value]
    config = EnsembleConfig(combine_on=combine_on, coupling=coupling, speculative=speculative)
    who = {
        "probs": rf"the main model \(.*\) gives {found} after the logits processors",
        "raw_logits": rf"the logits processors leave {found}",
    }[combine_on]
    with pytest.raises(ValueError, match=rf"New token 5 of row 2 .*{who}"):
        generate(
            members("llama", 2), prompts(3), config, eos_token_id=None,
            logits_processor=[FromThere(number, rows=2)], **draw,
        )  # fmt: skip


@pytest.mark.parametrize("speculative", [True, False])
def test_a_processor_that_forbids_all_of_one_member(speculative):
    models = members("llama", 3, 0.5)
    with torch.no_grad():
        logits = [model(prompts(1)["input_ids"]).logits[0, -1] for model in models]
    peak = float(logits[1].amax())

    class OfOne(LogitsProcessor):
        stateless = True

        def __call__(self, input_ids, scores):
            same = (scores.amax(-1, keepdim=True) - peak).abs() < 1e-4
            return scores.masked_fill(same, -torch.inf)

    config = EnsembleConfig(speculative=speculative)
    with pytest.raises(ValueError, match="New token 1 of row 0 .*assistant model 1 .* gives -inf for every token"):
        generate(models, prompts(1), config, logits_processor=[OfOne()])


@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", [lambda x: 0 * x[0], lambda x: torch.nan * x[0]], ids=["zero", "nan"])
def test_a_method_that_returns_nothing(method, rule, speculative):
    draw, coupling = RULES[rule]
    config = EnsembleConfig(method=method, combine_on="probs", coupling=coupling, speculative=speculative)
    with pytest.raises(ValueError, match="New token 1 of row 0 .*the callable `method` returns (nan|no positive)"):
        generate(members("llama", 2), prompts(1), config, **draw)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drafter", [None, "prompt_lookup"])
def test_what_lies_behind_the_end_is_no_error(rule, drafter):
    """A text that ends before its distribution does; rows that end, and a draft that is rejected."""
    draw, coupling = RULES[rule]
    texts = []
    for speculative in (True, False):
        config = EnsembleConfig(coupling=coupling, speculative=speculative, num_assistant_tokens=3)
        arguments = dict(logits_processor=[FromThere(torch.nan)], stopping_criteria=[Stops()], **draw)
        texts.append(
            generate(
                members("llama", 2, 0.97), prompts(3), config, drafter=drafter if speculative else None, **arguments
            )
        )
    assert texts[0].sequences.shape[1] == LATER
    assert coupling == "maximal" or texts[0].sequences.tolist() == texts[1].sequences.tolist()


class Stops(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= LATER)


@pytest.mark.parametrize("speculative", [True, False])
def test_a_cache_is_restored_and_nothing_is_streamed_after_an_error(speculative):
    models, inputs = members("llama", 2), prompts(1)
    with torch.no_grad():
        cache = given_cache(models[0](inputs["input_ids"][:, :-2], use_cache=True))
    held, streamed = cache.get_seq_length(), []

    class Streamer:
        def put(self, tokens):
            streamed.append(tokens)

        def end(self):
            pass

    broken = [breaking(models[0], torch.nan), models[1]]
    with pytest.raises(ValueError, match="New token 5 of row 0"):
        generate(broken, inputs, EnsembleConfig(speculative=speculative), streamer=Streamer(), **{OUTPUT_CACHE: cache})
    assert cache.get_seq_length() == held
    assert len(streamed) == 1 + 4


@pytest.mark.parametrize("combine_on", ["probs", "raw_logits"])
def test_a_beam_search_does_not_go_on_from_nan(combine_on):
    good = members("llama", 2)
    models = [good[0], breaking(good[1], torch.nan)]
    config = EnsembleConfig(speculative=False, combine_on=combine_on)
    with pytest.raises(ValueError, match=r"New token 5 of beam 0 .*assistant model 1 .*gives nan"):
        generate(models, prompts(2), config, num_beams=3, eos_token_id=None)
    assert generate(good, prompts(2), config, num_beams=3, eos_token_id=None).sequences.shape[1] == PROMPT + NEW


def test_the_cut_is_not_lifted_by_calling_twice():
    """What is plausible is forbidden, and what forbids it must not be asked again without the cut."""
    for speculative in (True, False):
        config = EnsembleConfig(method="contrastive", plausibility=1.0, speculative=speculative)
        with pytest.raises(ValueError, match="processors leave -inf for every token of those that `plausibility`"):
            generate(members("llama", 2), prompts(3), config, logits_processor=[one := InADeque()], max_new_tokens=40)
        assert in_order(one)
