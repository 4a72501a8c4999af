"""Greedy text and shared-noise samples are the standard ensemble's, token for token, and that is the formulas'."""

import copy
import itertools

import oracle
import pytest
import torch
from covering import pairwise
from families import EOS, FAMILIES, PAD, VOCAB, members, prompts, tiny, tokenizer
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from hf_spec_ensemble import EnsembleConfig


PROMPT = 7  # tokens of the longest prompt of a batch
MANY_EOS = [EOS, 7, 11, 13, 19, 23, 29, 31]  # rows end early, and at different tokens

# transformers' own loop, which the standard ensemble runs in, rounds the main model's logits to float32
ROUNDING = 1e-5

# What generate() is given, and the same processors for the oracle
SETTINGS = {
    "plain": ({}, []),
    "repetition penalty": (dict(repetition_penalty=1.3), [RepetitionPenaltyLogitsProcessor(1.3)]),
    "no-repeat ngram": (dict(no_repeat_ngram_size=2), [NoRepeatNGramLogitsProcessor(2)]),
    "min new tokens": (
        dict(min_new_tokens=6, eos_token_id=MANY_EOS),
        [MinNewTokensLengthLogitsProcessor(PROMPT, 6, torch.tensor(MANY_EOS))],
    ),
    "early EOS": (dict(eos_token_id=MANY_EOS), []),
}
STOP_STRINGS = dict(stop_strings=["k", "rs"], tokenizer=tokenizer())


def generate(models, inputs, config, **kwargs):
    kwargs = dict(max_new_tokens=16, return_dict_in_generate=True, output_scores=True, output_logits=True) | kwargs
    return models[0].generate(**inputs, assistant_model=models[1:], ensemble_config=config, **kwargs)


def assert_same_scores(one, two, tolerance=ROUNDING):
    """Up to the padding behind it, every row has the same log-probabilities and logits, but for rounding."""
    for row, tokens in enumerate(one.sequences[:, PROMPT:].tolist()):
        while tokens and tokens[-1] == PAD:
            tokens.pop()
        for name in ("scores", "logits"):
            pair = [torch.stack([column[row] for column in out[name][: len(tokens)]]).double() for out in (one, two)]
            torch.testing.assert_close(*pair, rtol=0, atol=tolerance)


# --- The standard ensemble is the formulas ------------------------------------------------------------------------


@pytest.mark.parametrize("name", oracle.METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_standard_ensemble_is_the_formula(family, name):
    n = oracle.METHODS[name].members[1 % len(oracle.METHODS[name].members)]
    models, inputs = members(family, n), prompts(3)
    text, scores = oracle.greedy(models, inputs, name, max_new_tokens=10)
    out = generate(models, inputs, oracle.config_of(name, n, speculative=False), do_sample=False, max_new_tokens=10)
    assert out.sequences.tolist() == text.tolist()
    tolerance = 1e-4 if family == "mixtral" else ROUNDING
    going = torch.ones(len(text), dtype=torch.bool)
    for column, ours, formula in zip(text[:, PROMPT:].T, out.scores, scores):
        torch.testing.assert_close(ours[going].double(), formula[going].double(), rtol=0, atol=tolerance)
        going &= column != EOS


@pytest.mark.parametrize("name", ["weighted", "weighted logits", "product"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_both_ensembles_are_the_formula_with_processors(setting, name):
    models, inputs = members("llama", 3), prompts(3)
    kwargs, processors = SETTINGS[setting]
    eos = kwargs.get("eos_token_id", [EOS])
    text, _ = oracle.greedy(models, inputs, name, max_new_tokens=16, processors=processors, eos=eos)
    for speculative in (True, False):
        config = oracle.config_of(name, 3, speculative=speculative)
        assert generate(models, inputs, config, do_sample=False, **kwargs).sequences.tolist() == text.tolist()


# --- The speculative ensemble is the standard ensemble ------------------------------------------------------------

FACTORS = dict(
    family=list(FAMILIES),
    name=list(oracle.METHODS),
    setting=[*SETTINGS, "stop strings"],
    n=[2, 3, 4],
    batch=[1, 3],
    alternate=[True, False],
    lengths=["ones", "4", "mixed"],
    draw=["greedy", "gumbel", "ancestral"],
)


def _may_meet(case):
    if case.get("draw") == "ancestral" and case.get("name", "weighted") != "weighted":
        return False
    return not {"name", "n"} <= set(case) or case["n"] in oracle.METHODS[case["name"]].members


CASES = pairwise(FACTORS, _may_meet)


def test_the_grid_has_every_pair_of_values():
    keys = list(FACTORS)
    for one, two in itertools.combinations(range(len(keys)), 2):
        got = {(case[one], case[two]) for case in CASES}
        wanted = {
            (x, y)
            for x, y in itertools.product(FACTORS[keys[one]], FACTORS[keys[two]])
            if _may_meet({keys[one]: x, keys[two]: y})
        }
        assert got >= wanted, (keys[one], keys[two], wanted - got)


@pytest.mark.slow
@pytest.mark.parametrize(",".join(FACTORS), CASES)
def test_speculative_is_standard(family, name, setting, n, batch, alternate, lengths, draw):
    models, inputs = members(family, n), prompts(batch)
    kwargs = STOP_STRINGS if setting == "stop strings" else SETTINGS[setting][0]
    sampling = dict(do_sample=False) if draw == "greedy" else dict(do_sample=True, temperature=0.8, top_k=20)
    count = {"ones": 1, "4": 4, "mixed": [2, 1, 3, 2][:n]}[lengths]
    outputs = []
    for speculative in (True, False):
        torch.manual_seed(5)
        config = oracle.config_of(
            name,
            n,
            alternate=alternate,
            num_assistant_tokens=count,
            speculative=speculative,
            coupling="auto" if draw == "greedy" else draw,
        )
        outputs.append(generate(models, inputs, config, **sampling, **kwargs))
    one, two = outputs
    assert one.sequences.tolist() == two.sequences.tolist()
    tolerance = 1e-3 if family == "mixtral" else ROUNDING
    assert_same_scores(one, two, tolerance)
    assert one.stats.new_tokens == two.stats.new_tokens


@pytest.mark.parametrize("prompt_length", [1, 2, 7])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_short_prompts_and_short_texts(prompt_length, max_new_tokens, batch):
    models = members("llama", 3)
    inputs = prompts(batch, length=max(prompt_length, 2))
    inputs = {key: value[:, -prompt_length:] for key, value in inputs.items()}
    text, _ = oracle.greedy(models, inputs, "weighted", max_new_tokens)
    for lengths in (1, 8, [3, 3, 3]):
        config = oracle.config_of("weighted", 3, num_assistant_tokens=lengths)
        out = generate(models, inputs, config, do_sample=False, max_new_tokens=max_new_tokens)
        assert out.sequences.tolist() == text.tolist()
        assert len(out.scores) == out.sequences.shape[1] - prompt_length


def test_end_of_sequence_as_first_token():
    models, inputs = members("llama", 2), prompts(1)
    first = oracle.greedy(models, inputs, "weighted", 1)[0][0, -1].item()
    config = oracle.config_of("weighted", 2, num_assistant_tokens=5)
    out = generate(models, inputs, config, do_sample=False, eos_token_id=first)
    assert out.sequences[0, PROMPT:].tolist() == [first]
    assert out.stats.forward_passes[0] == 1
    config = oracle.config_of("weighted", 2, num_assistant_tokens=5, share_passes=False)
    twice = [models[0], models[0]]  # both see the end at once: nothing is proposed behind it
    first = oracle.greedy(twice, inputs, "weighted", 1)[0][0, -1].item()
    stats = generate(twice, inputs, config, do_sample=False, eos_token_id=first).stats
    assert (stats.new_tokens, stats.forward_passes, stats.proposed) == (1, [1, 1], [1, 0])


def test_members_of_different_architectures():
    models = [tiny("qwen3"), tiny("gpt2", seed=1), tiny("gemma3", seed=2), tiny("opt", seed=3, layers=1)]
    inputs = prompts(3)
    text, _ = oracle.greedy(models, inputs, "weighted", 16)
    config = oracle.config_of("weighted", 4, num_assistant_tokens=3)
    assert generate(models, inputs, config, do_sample=False).sequences.tolist() == text.tolist()


def test_a_long_text_with_many_rejections_keeps_its_caches_right():
    """Long enough that hidden slots are compacted, several times and in rows of different lengths."""
    models, inputs = members("llama", 3), prompts(3)
    text, _ = oracle.greedy(models, inputs, "weighted", 100, eos=())
    config = oracle.config_of("weighted", 3, num_assistant_tokens=[1, 1, 2])
    out = generate(models, inputs, config, do_sample=False, max_new_tokens=100, eos_token_id=[VOCAB + 1])
    assert all(0.2 < rate < 0.9 for rate in out.stats.acceptance), "not a test of roll-back and hidden slots"
    assert out.sequences.tolist() == text.tolist()


def test_greedy_text_does_not_depend_on_the_other_rows():
    models, inputs = members("llama", 2), prompts(3)
    config = oracle.config_of("weighted", 2, num_assistant_tokens=3)
    together = generate(models, inputs, config, do_sample=False, eos_token_id=MANY_EOS).sequences
    for row in range(3):
        visible = inputs["attention_mask"][row].bool()
        alone = {key: value[row : row + 1, visible] for key, value in inputs.items()}
        text = generate(models, alone, config, do_sample=False, eos_token_id=MANY_EOS).sequences[0, visible.sum() :]
        assert together[row, PROMPT : PROMPT + len(text)].tolist() == text.tolist()
        assert (together[row, PROMPT + len(text) :] == 0).all()


def test_shared_noise_sample_does_not_depend_on_the_other_rows_nor_on_the_schedule():
    models = members("llama", 3)
    mixed, others = prompts(3), prompts(3, seed=1)
    changed = {key: value.clone() for key, value in mixed.items()}
    for row in (0, 2):
        changed["input_ids"][row] = others["input_ids"][row]
    texts = set()
    for inputs in (mixed, changed):
        for lengths, alternate in ((1, True), ([2, 1, 3], True), (4, False)):
            torch.manual_seed(3)
            config = oracle.config_of(
                "weighted", 3, num_assistant_tokens=lengths, alternate=alternate, coupling="gumbel"
            )
            out = generate(models, inputs, config, do_sample=True, eos_token_id=MANY_EOS)
            row = out.sequences[1, PROMPT:].tolist()
            ends = [i for i, token in enumerate(row) if token in MANY_EOS] or [len(row)]
            texts.add(tuple(row[: ends[0] + 1]))
    assert len(texts) == 1


def test_half_precision_differs_at_near_ties_only():
    """In bfloat16 a chunk and single tokens round differently: the first token that differs must be a near-tie."""
    models, inputs = [copy.deepcopy(m).to(torch.bfloat16) for m in members("llama", 2)], prompts(3)
    config = oracle.config_of("weighted", 2, num_assistant_tokens=4)
    one = generate(models, inputs, config, do_sample=False, max_new_tokens=32)
    config.speculative = False
    two = generate(models, inputs, config, do_sample=False, max_new_tokens=32)
    for row in range(3):
        pairs = zip(one.sequences[row, PROMPT:].tolist(), two.sequences[row, PROMPT:].tolist())
        at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if at is not None:
            best, second = two.scores[at][row].topk(2).values
            assert best - second < 0.1


@pytest.mark.parametrize("batch", [1, 3])
def test_a_constraint_that_depends_on_row_and_prefix(batch):
    models, inputs = members("llama", 2), prompts(batch)

    def allowed(row, ids):
        return [token for token in range(3, VOCAB) if token % 3 == (row + int(ids.sum())) % 3]

    texts = []
    for speculative in (True, False):
        config = oracle.config_of("weighted", 2, num_assistant_tokens=3, speculative=speculative)
        out = generate(models, inputs, config, do_sample=False, prefix_allowed_tokens_fn=allowed)
        texts.append(out.sequences.tolist())
    assert texts[0] == texts[1]


def test_a_constraint_that_forbids_every_plausible_token_lifts_the_cut():
    """With alpha = 1 only the expert's best token is plausible; min_new_tokens forbids it where it ends the text."""
    models, inputs = members("llama", 2), prompts(1)
    best = oracle.greedy(models[:1] * 2, inputs, "weighted", 1)[0][0, -1].item()
    for speculative in (True, False):
        config = EnsembleConfig(method="contrastive", plausibility=1.0, speculative=speculative)
        out = generate(models, inputs, config, do_sample=False, max_new_tokens=1, min_new_tokens=1, eos_token_id=best)
        assert out.sequences[0, -1] != best
        assert not out.scores[0].isnan().any()
