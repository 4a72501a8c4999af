"""Processors that keep state: xgrammar's goes back with the ensemble; others are called once a token, or refused."""

import json
import random

import numpy as np
import oracle
import pytest
import torch
from covering import pairwise
from families import EOS, PAD, prompts, tiny
from families import members as related
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.ensemble.grammar import GrammarMask


xgrammar = pytest.importorskip("xgrammar")
from xgrammar.contrib.hf import LogitsProcessor as Grammar  # noqa: E402


ALPHABET = ["<pad>", "<bos>", "<eos>", *'{}[]":, 0123456789abcdefghijklmnopqrstuvwxyzABCDEFG-._']
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-f]{1,6}$"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"enum": ["a", "bc", "d0"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def grammar():
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(ALPHABET)}, unk_token="_"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(ALPHABET), stop_token_ids=[EOS])
    return xgrammar.GrammarCompiler(info).compile_json_schema(SCHEMA, any_whitespace=False)


def members(likeness=0.9):
    return related("llama", 3, likeness, vocab=len(ALPHABET))


def generate(models, inputs, config, processor, **kwargs):
    kwargs = dict(max_new_tokens=50, return_dict_in_generate=True) | kwargs
    torch.manual_seed(3)
    return models[0].generate(
        **inputs, assistant_model=models[1:], ensemble_config=config, logits_processor=[processor], **kwargs
    )


def one_by_one(models, inputs, name, grammar, steps):
    """xgrammar's own processor, called once for each token, in order, on the ensemble's log-probabilities."""
    processor = Grammar(grammar)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    done = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(steps):
        log_r = oracle.next_log_probs(models, ids, mask, name)
        token = torch.where(done, PAD, processor(ids, log_r.float()).argmax(-1))
        ids = torch.cat([ids, token[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        done = done | (token == EOS)
        if done.all():
            break
    return ids


def texts(sequences):
    names = dict(enumerate(ALPHABET))
    return ["".join(names[token] for token in row if token > EOS) for row in sequences[:, 7:].tolist()]


CASES = pairwise(
    dict(
        name=["weighted", "weighted logits", "weighted raw logits", "product"],
        batch=[1, 3],
        likeness=[0.0, 0.9],
        draw=[dict(do_sample=False), dict(do_sample=True)],
    )
)


@pytest.mark.parametrize("name,batch,likeness,draw", CASES, ids=str)
def test_json_of_an_ensemble(grammar, name, batch, likeness, draw):
    models, inputs = members(likeness), prompts(batch, vocab=len(ALPHABET))
    outputs = []
    for speculative in (True, False):
        config = oracle.config_of(name, 3, num_assistant_tokens=[2, 3, 1], speculative=speculative)
        outputs.append(generate(models, inputs, config, Grammar(grammar), **draw))
    assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()
    if not draw["do_sample"] and name == "weighted raw logits":
        expected = one_by_one(models, inputs, name, grammar, 50)
        assert outputs[0].sequences.tolist() == expected.tolist()
    for row, text in zip(outputs[0].sequences, texts(outputs[0].sequences)):
        assert text.startswith('{"name": "')
        if EOS in row:
            assert set(json.loads(text)) == {"name", "age", "tags"}


def test_some_texts_end_and_proposals_are_rejected(grammar):
    models, inputs = members(0.3), prompts(3, vocab=len(ALPHABET))
    out = generate(models, inputs, EnsembleConfig(num_assistant_tokens=2), Grammar(grammar), do_sample=True)
    assert EOS in out.sequences
    assert sum(out.stats.accepted) < sum(out.stats.verified)


@pytest.mark.parametrize("speculative", [True, False])
def test_a_drafter_that_knows_no_grammar(grammar, speculative):
    models, inputs = members(), prompts(3, vocab=len(ALPHABET))
    config = EnsembleConfig(speculative=speculative)
    drafted = generate(models, inputs, config, Grammar(grammar), drafter="prompt_lookup")
    assert drafted.sequences.tolist() == generate(models, inputs, config, Grammar(grammar)).sequences.tolist()


def test_a_grammar_for_each_row(grammar):
    models, inputs = members(), prompts(3, vocab=len(ALPHABET))
    out = generate(models, inputs, EnsembleConfig(), Grammar([grammar] * 3))
    assert out.sequences.tolist() == generate(models, inputs, EnsembleConfig(), Grammar(grammar)).sequences.tolist()
    with pytest.raises(ValueError, match="2 grammars for 3 rows"):
        generate(models, inputs, EnsembleConfig(), Grammar([grammar] * 2))


def test_prefixes_in_any_order(grammar):
    """What may follow a prefix does not depend on what was asked before."""
    number = {token: i for i, token in enumerate(ALPHABET)}
    whole = ['{"name": "abc", "age": 12, "tags": ["a"]}', '{"name": "ab", "age": -3, "tags": []}', '{"name": "x']
    prefixes = [[number[letter] for letter in text[:end]] for text in whole for end in range(len(text) + 1)]
    random.Random(0).shuffle(prefixes)
    logits, prompt = torch.zeros(1, 1, len(ALPHABET)), [5, 6]

    def allowed(mask, prefix):
        ids = torch.tensor([prompt + prefix])
        return mask(logits, ids, np.array([ids.shape[1]]), np.array([1]))

    used = GrammarMask(Grammar(grammar))
    allowed(used, [])
    for prefix in prefixes:
        afresh = GrammarMask(Grammar(grammar))
        allowed(afresh, [])
        assert torch.equal(allowed(used, prefix), allowed(afresh, prefix))


# --- Processors that nobody knows ---------------------------------------------------------------------------------


class Counts(LogitsProcessor):
    """Forbids another token every time that it is called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, 3 + self.calls % 40] = -torch.inf
        return scores


class Remembers(Counts):
    """The same in a list."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.shape[1])
        scores = scores.clone()
        scores[:, 3 + len(self.seen) % 40] = -torch.inf
        return scores


class MadeWhenNeeded(LogitsProcessor):
    """Depends on its arguments only."""

    stateless = True

    def __init__(self):
        self.bias = None
        self.calls = [0]

    def __call__(self, input_ids, scores):
        if self.bias is None:
            self.bias = torch.linspace(-1, 1, scores.shape[-1], dtype=scores.dtype)
        self.calls[0] += 1
        return scores + self.bias * (input_ids[:, -1:] % 3)


@pytest.mark.parametrize("processor", [Counts, Remembers])
@pytest.mark.parametrize("config", [dict(), dict(combine_on="logits"), dict(speculative=False)], ids=str)
def test_state_is_refused_before_the_first_token(config, processor):
    models, seen = [tiny(), tiny(seed=1)], []

    class Streamer:
        def put(self, tokens):
            seen.append(tokens)

        def end(self):
            pass

    with pytest.raises(ValueError, match=rf"{processor.__name__} may keep state.*combine_on='raw_logits'.*stateless"):
        generate(models, prompts(1), EnsembleConfig(**config), processor(), streamer=Streamer())
    assert len(seen) == 1  # the prompt


@pytest.mark.parametrize("speculative", [True, False])
def test_state_is_welcome_where_calls_come_in_order(speculative):
    models, inputs = [tiny(), tiny(seed=1)], prompts(3)
    config = EnsembleConfig(speculative=speculative, combine_on="raw_logits")
    processor = Counts()
    out = generate(models, inputs, config, processor, max_new_tokens=12, eos_token_id=None)
    assert processor.calls == 12
    text, _ = oracle.greedy(models, inputs, HALVES, max_new_tokens=12, processors=[Counts()], eos=())
    assert out.sequences.tolist() == text.tolist()


HALVES = oracle.Method(
    lambda n: dict(method="weighted", combine_on="raw_logits"),
    lambda logits, process: process(logits.mean(0)).log_softmax(-1),
)


@pytest.mark.parametrize("processor", [Counts, MadeWhenNeeded])
def test_what_says_that_it_is_stateless_is_believed(processor):
    models, inputs, processor = [tiny(), tiny(seed=1)], prompts(3), processor()
    processor.stateless = True
    texts = [
        generate(models, inputs, EnsembleConfig(speculative=speculative), processor, max_new_tokens=12).sequences
        for speculative in (True, False)
    ]
    assert isinstance(processor, Counts) or texts[0].tolist() == texts[1].tolist()
