"""`generate_batch`: a prompt's text is that of a call of its own, whatever shares the batch."""

import copy
import functools
import random

import mixed
import numpy as np
import pytest
import torch
from covering import pairwise
from families import VOCAB, members, tiny, tokenizer
from mixed import TEXTS
from transformers import DynamicCache, LlamaForCausalLM, StoppingCriteria

import hf_spec_ensemble as se
from hf_spec_ensemble.decoding import refill
from hf_spec_ensemble.ensemble.padded import left_padded
from hf_spec_ensemble.members import rows
from hf_spec_ensemble.members.cached import CachedMember


ENDS = [2, 3, 4, 5, 6]  # so that texts have many lengths
SETTINGS = dict(max_new_tokens=12, eos_token_id=ENDS, pad_token_id=0, do_sample=False)
WEIGHTS = {2: [0.6, 0.4], 3: [0.5, 0.3, 0.2]}


def prompts(count: int = 8, longest: int = 11, seed: int = 0) -> list[list[int]]:
    choose = random.Random(seed)
    return [
        [choose.randrange(7, VOCAB) for _ in range(1 if i == 1 else choose.randint(1, longest))] for i in range(count)
    ]


def alone(models, inputs, config, **kwargs) -> list[list[int]]:
    """Texts of one call for each prompt."""
    texts = []
    for prompt in inputs:
        ids = torch.tensor([prompt])
        out = models[0].generate(ids, assistant_model=models[1:], ensemble_config=config, **SETTINGS | kwargs)
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def together(models, inputs, config, **kwargs) -> list[list[int]]:
    """Texts of one call for all."""
    ids, mask = left_padded(inputs)
    given = dict(attention_mask=mask, assistant_model=models[1:], ensemble_config=config)
    torch.manual_seed(5)
    rows = models[0].generate(ids, **given, **SETTINGS | kwargs)[:, ids.shape[1] :].tolist()
    ends = (next((i + 1 for i, token in enumerate(row) if token in ENDS), len(row)) for row in rows)
    return [row[:end] for row, end in zip(rows, ends)]


def batched(models, inputs, config, batch_size, **kwargs) -> list[list[int]]:
    torch.manual_seed(5)
    given = dict(assistant_model=models[1:], ensemble_config=config, batch_size=batch_size, progress_bar=False)
    results = se.generate_batch(models[0], inputs, **given, **SETTINGS | kwargs)
    assert list(results) == [f"req_{i}" for i in range(len(inputs))]
    assert [result.prompt_ids for result in results.values()] == inputs
    return [result.generated_tokens for result in results.values()]


FACTORS = {
    "family": ["llama", "gemma3", "opt", "bloom"],  # with windows; with no positions, so that rows are in step
    "n": [2, 3],
    "batch_size": [1, 2, 3, 8],
    "rule": ["greedy", "gumbel", "ancestral"],
    "lengths": ["auto", 1, 4, None],  # None is the standard ensemble
    "drafter": [None, "prompt_lookup", "suffixes", "model"],
    "cache": [None, "static"],
}


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_short_prompt_may_have_a_long_text_behind_a_members_own_prompt(cache):
    """`max_length` counts the prompt: slots must do for the longest prompt and for the longest text, of another one."""
    models, inputs = members("llama", 2), [*prompts(2), [7] * 60]
    models[1] = se.with_prompt(models[1], torch.tensor([[9] * 40]))
    config = se.EnsembleConfig(weights=WEIGHTS[2], num_assistant_tokens=2)
    settings = dict(max_length=64, max_new_tokens=None, eos_token_id=None)
    expected = alone(models, inputs, config, **settings)
    assert batched(models, inputs, config, 3, cache_implementation=cache, **settings) == expected


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_light_member_may_lag_far_behind_in_one_row(cache):
    """While another row is near its end: static caches have few slots to spare."""
    models, inputs = members("llama", 2, 0.0), [[7, 8, 9], [9, 8, 7]]
    config = se.EnsembleConfig(weights=[0.985, 0.015], num_assistant_tokens=[1, 1, 16])

    def allowed(row, ids):  # the second row repeats itself, and is drafted
        return [10 + len(ids) % 5] if row == 1 else list(range(7, 50))

    settings = dict(max_new_tokens=120, eos_token_id=None, do_sample=True, prefix_allowed_tokens_fn=allowed)
    texts = []
    for kind in (None, cache):
        torch.manual_seed(399)  # the light member owns a token of the first row late, and one of the second later still
        ids, mask = left_padded(inputs)
        given = dict(assistant_model=models[1], ensemble_config=config, drafter=se.Suffixes(), pad_token_id=0)
        out = models[0].generate(ids, attention_mask=mask, cache_implementation=kind, **given, **settings)
        texts.append(out.tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(tuple(FACTORS), pairwise(FACTORS))
def test_a_text_does_not_depend_on_the_batch(family, n, batch_size, rule, lengths, drafter, cache):
    models, inputs = members(family, n), prompts()
    engine = dict(speculative=False) if lengths is None else dict(num_assistant_tokens=lengths)
    config = se.EnsembleConfig(weights=WEIGHTS[n], coupling="gumbel" if rule == "greedy" else rule, **engine)
    kwargs = dict(do_sample=rule != "greedy", cache_implementation=cache)
    expected = (alone if rule == "greedy" else together)(models, inputs, config, **kwargs)
    drafter = {"suffixes": se.Suffixes(), "model": tiny(family, seed=7, layers=1)}.get(drafter, drafter)
    assert len(set(map(len, expected))) > 1
    assert batched(models, inputs, config, batch_size, drafter=drafter, **kwargs) == expected


SHARING = {
    "family": ["llama", "gemma3", "gpt2", "bloom"],
    "kind": ["prompts", "one prompt for all", "the same model twice", "and another model"],
    "batch_size": [1, 3],
    "rule": ["greedy", "gumbel", "ancestral"],
    "lengths": ["auto", 2, None],
    "drafter": [None, "prompt_lookup", "model"],
    "worth": [32, 0],  # tokens that must be saved for prompts to be read apart, or what they have in common once
}


@pytest.mark.parametrize(tuple(SHARING), pairwise(SHARING))
def test_members_that_share_weights_are_rows_of_one_pass(
    family, kind, batch_size, rule, lengths, drafter, worth, monkeypatch
):
    monkeypatch.setattr(rows, "WORTH_A_PASS", {"cpu": worth})
    model, other, draft = (tiny(family, seed=seed) for seed in (0, 1, 7))
    inputs = prompts()
    own, mask = left_padded(prompts(seed=3))
    models = {
        "prompts": [model, se.with_prompt(model, own, mask)],
        "one prompt for all": [model, se.with_prompt(model, own[:1], mask[:1])],
        "the same model twice": [model, model],
        "and another model": [model, other, se.with_prompt(model, own, mask)],
    }[kind]
    engine = dict(speculative=False) if lengths is None else dict(num_assistant_tokens=lengths)
    engine |= dict(weights=WEIGHTS[len(models)], coupling="gumbel" if rule == "greedy" else rule)
    drafter = draft if drafter == "model" else drafter if lengths is not None else None
    texts, stats = [], []
    for share in (True, False):
        torch.manual_seed(5)
        results = se.generate_batch(
            model, inputs, assistant_model=models[1:], batch_size=batch_size, progress_bar=False,
            ensemble_config=se.EnsembleConfig(**engine, share_passes=share), drafter=drafter,
            **SETTINGS | dict(do_sample=rule != "greedy"),
        )  # fmt: skip
        texts.append([result.generated_tokens for result in results.values()])
        stats.append(results["req_0"].stats)
    assert texts[0] == texts[1] and len(set(map(len, texts[0]))) > 1
    last = len(models) - 1
    assert stats[0].shared == [[0, last]] and stats[1].shared == []
    assert stats[0].forward_passes[last] == 0 < stats[1].forward_passes[last]


FAMILIES = {
    "order": [(0, 2), (2, 0), (2, 1, 0)],
    "method": ["weighted", "product"],
    "batch_size": [1, 2, 3],
    "rule": ["greedy", "gumbel", "ancestral"],
    "lengths": ["auto", 2, None],
    "drafter": [None, "suffixes", "model"],
    "asked": ["stop strings", "processors", "prompts of their own", "nothing"],
}


def _may_meet(case: dict) -> bool:
    return (case.get("method"), case.get("rule")) != ("product", "ancestral")


@pytest.mark.parametrize(tuple(FAMILIES), pairwise(FAMILIES, _may_meet))
def test_members_with_different_tokenizers(order, method, batch_size, rule, lengths, drafter, asked, monkeypatch):
    """Each text is that of a call of its own or, sampled, of a row of one call."""
    monkeypatch.setattr(refill, "PREFILL", 3)
    models, tokenizers = mixed.family(order)
    texts, pad = [*TEXTS, "Ann", " the answer to", "🙂"], tokenizers[0].pad_token_id
    inputs = [tokenizers[0](text)["input_ids"] for text in texts]
    engine = dict(speculative=False) if lengths is None else dict(num_assistant_tokens=lengths)
    engine |= dict(weights=WEIGHTS[len(order)], coupling="gumbel" if rule == "greedy" else rule)
    config = se.EnsembleConfig(method, **engine)
    drafter = {"suffixes": se.Suffixes(), "model": models[0]}.get(drafter, drafter) if lengths is not None else None
    settings = dict(max_new_tokens=8, do_sample=rule != "greedy", pad_token_id=pad, drafter=drafter)
    settings |= dict(tokenizer=tokenizers[0], assistant_tokenizer=tokenizers[1:], ensemble_config=config)
    settings |= {
        "stop strings": dict(stop_strings=["🙂", " q"]),
        "processors": dict(repetition_penalty=1.5, no_repeat_ngram_size=2),
    }.get(asked, {})
    own = [tokenizers[1](text)["input_ids"][-3:] for text in texts]
    views = [se.with_prompt(models[1], *left_padded(own)), *models[2:]]
    settings["assistant_model"] = views if asked == "prompts of their own" else models[1:]

    def text(number):
        """Of a call of its own; the noise of a row is that of its number."""
        ids, mask = left_padded(inputs)
        if rule != "greedy":
            torch.manual_seed(5)
            rows = models[0].generate(ids, attention_mask=mask, **settings)
            return rows[number, ids.shape[1] :].tolist()
        one = dict(settings)
        if asked == "prompts of their own":
            one["assistant_model"] = [se.with_prompt(models[1], torch.tensor([own[number]])), *models[2:]]
        return models[0].generate(torch.tensor([inputs[number]]), **one)[0, len(inputs[number]) :].tolist()

    torch.manual_seed(5)
    results = se.generate_batch(models[0], inputs, batch_size=batch_size, progress_bar=False, **settings)
    assert method == "product" or len({len(result.generated_tokens) for result in results.values()}) > 1
    for number, result in enumerate(results.values()):
        expected = text(number)
        assert result.generated_tokens == expected[: len(result.generated_tokens)]
        assert set(expected[len(result.generated_tokens) :]) <= {pad}


def test_a_prompt_that_comes_later_may_be_too_long():
    """For rotary embeddings that change: also as another member's tokens, or as a prompt of its own."""
    models, tokenizers = mixed.family((2, 0))
    inputs = [tokenizers[0](text)["input_ids"] for text in ("Ann", "Tom", TEXTS[0])]
    config = copy.deepcopy(models[1].config)
    config.rope_parameters = dict(rope_type="dynamic", factor=4.0, rope_theta=1e4)
    config.max_position_embeddings = len(tokenizers[1](TEXTS[0])["input_ids"]) + 4
    dynamic = LlamaForCausalLM(config).double().eval()
    given = dict(max_new_tokens=5, batch_size=2, progress_bar=False)
    both = dict(tokenizer=tokenizers[0], assistant_tokenizer=tokenizers[1])
    with pytest.raises(ValueError, match="dynamic.*change when a text gets longer"):
        se.generate_batch(models[0], inputs, assistant_model=dynamic, **both, **given)
    long = [[5] * config.max_position_embeddings if number == 2 else [5, 6] for number in range(3)]
    with pytest.raises(ValueError, match="dynamic.*change when a text gets longer"):
        se.generate_batch(models[1], long, assistant_model=dynamic, **given)
    view = se.with_prompt(dynamic, *left_padded(long))
    with pytest.raises(ValueError, match="dynamic.*change when a text gets longer"):
        se.generate_batch(models[1], [[5], [6], [7]], assistant_model=view, **given)


@pytest.mark.parametrize("alike", [True, False], ids=["a common beginning", "prompts of unequal length"])
def test_rows_are_kept_till_members_that_share_a_pass_have_read(alike):
    """Texts that end at once leave few rows, before a group of little weight was asked for anything."""
    model, other, inputs = tiny("llama"), tiny("llama", seed=1), prompts(4, seed=2)
    begin = [[7 + row] * 40 for row in range(4)] if alike else [[]] * 4
    inputs = [first + prompt for first, prompt in zip(begin, inputs)]
    own = [[9] * 40] if not alike else [[*first, 8, 9] for first in begin]
    view = se.with_prompt(model, torch.tensor(own))

    def allowed(number, ids):
        return [2] if number else list(range(10, VOCAB))

    for seed in range(12):
        texts = []
        for share in (True, False):
            torch.manual_seed(seed)
            config = se.EnsembleConfig(weights=[0.05, 0.9, 0.05], num_assistant_tokens=1, share_passes=share)
            results = se.generate_batch(
                model, inputs, assistant_model=[other, view], ensemble_config=config, batch_size=4, do_sample=True,
                max_new_tokens=12, eos_token_id=[2], pad_token_id=0, drafter=None, prefix_allowed_tokens_fn=allowed,
                progress_bar=False,
            )  # fmt: skip
            texts.append([result.generated_tokens for result in results.values()])
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "config",
    [
        se.EnsembleConfig(method="contrastive", contrast=0.4, plausibility=0.1, num_assistant_tokens=2),
        se.EnsembleConfig(method="product", weights=[0.7, 0.3], combine_on="logits"),
        se.EnsembleConfig(method=lambda logits: logits.amax(0), alternate=False),
        se.EnsembleConfig(weights=[1.0, 0.0], num_assistant_tokens=3),  # the other one drafts
        se.EnsembleConfig(weights=[0.9, 0.1]),  # mostly settled by one, so that the other has read nothing for long
        se.EnsembleConfig(coupling="maximal"),  # which draws nothing here
    ],
)
def test_methods(config):
    assert batched(members(), prompts(), config, 3) == alone(members(), prompts(), config)


def test_the_first_prompt_is_that_of_a_call_with_the_same_seed():
    config, inputs = se.EnsembleConfig(), prompts()
    torch.manual_seed(5)
    [expected] = alone(members(), inputs[:1], config, do_sample=True)
    assert batched(members(), inputs, config, 2, do_sample=True)[0] == expected


class _EndsWith(StoppingCriteria):
    """Stops at a token; sees that a row's own tokens are all it is shown."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids) == 1
        assert any(input_ids[0, : len(prompt)].tolist() == prompt for prompt in self.inputs)
        return input_ids[:, -1] % 4 == 0


def test_processors_and_criteria_see_a_prompt_and_its_text_alone():
    inputs = prompts(10)
    shown = {number: set() for number in range(len(inputs))}

    def allowed(number, ids):
        shown[number].add(tuple(ids[: len(inputs[number])].tolist()))
        return [token for token in range(VOCAB) if (token + len(ids)) % 3]

    kwargs = dict(
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        min_new_tokens=3,
        exponential_decay_length_penalty=(4, 1.2),
        temperature=0.8,
        top_k=9,
        do_sample=True,
        stopping_criteria=[_EndsWith(inputs)],
        stop_strings=["q"],
        tokenizer=tokenizer(),
    )
    config = se.EnsembleConfig(num_assistant_tokens=3)
    one = batched(members(), inputs, config, 1, prefix_allowed_tokens_fn=allowed, **kwargs)
    assert all(prefixes == {tuple(inputs[number])} for number, prefixes in shown.items())
    assert batched(members(), inputs, config, 4, prefix_allowed_tokens_fn=allowed, **kwargs) == one
    kwargs |= dict(do_sample=False, temperature=None, top_k=None)
    assert batched(members(), inputs, config, 4, **kwargs) == alone(members(), inputs, config, **kwargs)


def test_lengths_are_each_prompts_own():
    inputs, kwargs = prompts(), dict(max_new_tokens=None, max_length=14)
    texts = batched(members(), inputs, se.EnsembleConfig(), 3, **kwargs)
    assert texts == alone(members(), inputs, se.EnsembleConfig(), **kwargs)
    assert max(len(prompt) + len(text) for prompt, text in zip(inputs, texts)) == 14
    assert batched(members(), inputs, se.EnsembleConfig(), 3, max_new_tokens=1) == [text[:1] for text in texts]


def test_members_with_prompts_of_their_own():
    model, other = members()
    inputs, config = prompts(6), se.EnsembleConfig(weights=[0.6, 0.4])
    ids, mask = left_padded(prompts(6, seed=1))
    expected = [
        alone([model, se.with_prompt(other, ids[i : i + 1], mask[i : i + 1])], [prompt], config)[0]
        for i, prompt in enumerate(inputs)
    ]
    assert batched([model, se.with_prompt(other, ids, mask)], inputs, config, 2) == expected
    shared = se.with_prompt(other, ids[:1], mask[:1])
    assert batched([model, shared], inputs, config, 2) == alone([model, shared], inputs, config)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_prompts_are_read_in_parts(monkeypatch, family, tokens):
    models, inputs, config = members(family), prompts(8, longest=20), se.EnsembleConfig(num_assistant_tokens=1)
    expected = alone(models, inputs, config)
    monkeypatch.setattr(refill, "PREFILL", tokens)
    widths, read = [], CachedMember._read

    def reading(self, new, end, *rest):
        if len(end) == 1 and self.seen[0] < 0:  # a prompt by itself, not of those that the batch began with
            widths.append(int((end - self.seen).max()))
        return read(self, new, end, *rest)

    monkeypatch.setattr(CachedMember, "_read", reading)
    assert batched(models, inputs, config, 2) == expected
    assert max(widths) == tokens


def test_prompts_that_are_left_of_a_longer_list():
    model, other = members()
    inputs, left = prompts(6), [5, 1, 4]
    ids, mask = left_padded(prompts(6, seed=1))
    config, kwargs = se.EnsembleConfig(), dict(do_sample=True)
    whole = batched([model, se.with_prompt(other, ids, mask)], inputs, config, 2, **kwargs)
    torch.manual_seed(5)
    results = se.generate_batch(
        model, [inputs[i] for i in left], assistant_model=se.with_prompt(other, ids[left], mask[left]), batch_size=2,
        progress_bar=False, numbers=left, **SETTINGS | kwargs,
    )  # fmt: skip
    assert {name: result.generated_tokens for name, result in results.items()} == {
        f"req_{i}": whole[i] for i in sorted(left)
    }
    assert [result.number for result in results.values()] == sorted(left)


def order(models, inputs, batch_size, **kwargs):
    given = dict(assistant_model=models[1:], batch_size=batch_size)
    return [result.number for result in se.generate_as_completed(models[0], inputs, **given, **SETTINGS | kwargs)]


@pytest.mark.parametrize(("family", "waits"), [("llama", False), ("bloom", True)])
def test_a_row_that_has_ended_is_given_the_next_prompt(family, waits):
    inputs = [[9, 10], *[[10 + i, 12] for i in range(6)]]

    def allowed(number, ids):  # the first text is long, the others end at once
        return [20 + len(ids)] if number == 0 else [2]

    found = order(members(family), inputs, 2, prefix_allowed_tokens_fn=allowed)
    assert found == ([1, 0, *range(2, 7)] if waits else [*range(1, 7), 0])


@pytest.mark.parametrize(
    ("family", "cache", "sizes"),
    [("llama", None, [5, 2, 1]), ("gemma3", None, [5, 2, 1]), ("bloom", None, [5, 2, 1]), ("llama", "static", [5])],
)
def test_rows_that_have_ended_are_left_out_when_no_prompts_are_left(monkeypatch, family, cache, sizes):
    models, inputs = members(family), [[9 + i, 10] for i in range(5)]
    ends, found, read = [8, 4, 30, 4, 18], [], CachedMember._read
    kwargs = dict(max_new_tokens=30, do_sample=True, cache_implementation=cache, drafter="prompt_lookup")
    config = se.EnsembleConfig(num_assistant_tokens=1, check_members=False)

    def allowed(number, ids):
        return [2] if len(ids) - 2 == ends[number] - 1 else [*range(10, VOCAB)]

    expected = [batched(models, inputs, config, 1, prefix_allowed_tokens_fn=allowed, **kwargs)]

    def reading(self, *args):
        logits = read(self, *args)
        found.append(len(self.seen))
        assert all(len(layer.keys) == found[-1] for layer in self.cache.layers)
        return logits

    monkeypatch.setattr(CachedMember, "_read", reading)
    expected.append(batched(models, inputs, config, 8, prefix_allowed_tokens_fn=allowed, **kwargs))
    assert expected[0] == expected[1] and list(map(len, expected[0])) == ends
    assert list(dict.fromkeys(found)) == sizes


@pytest.mark.parametrize(
    ("family", "cache", "count"), [("llama", None, 200), ("gemma3", None, 50), ("gemma3", "static", 50)]
)
def test_caches_do_not_grow_with_the_number_of_prompts(monkeypatch, family, cache, count):
    held = {}
    read = CachedMember._read

    def reading(self, *args):
        logits = read(self, *args)
        held.setdefault(len(self.seen), []).append(self._slots.shape[1])
        if isinstance(self.cache, DynamicCache):
            assert all(layer.keys.shape[-2] <= self._slots.shape[1] for layer in self.cache.layers if cache is None)
        return logits

    monkeypatch.setattr(CachedMember, "_read", reading)
    inputs, config = prompts(count, longest=6), se.EnsembleConfig(num_assistant_tokens=1)
    batched(members(family), inputs, config, 5, cache_implementation=cache, max_new_tokens=4)
    longest = max(map(len, inputs)) + 4
    assert len(held[5]) > count / 2 and max(held[5]) <= longest + (32 if cache else max(16, longest // 4) + 8)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_what_a_call_took(monkeypatch, family):
    models, passes, inputs = members(family), [0, 0], prompts(6)
    for i, model in enumerate(models):
        monkeypatch.setattr(model, "forward", _counted(model.forward, passes, i))
    config = se.EnsembleConfig(num_assistant_tokens=2, check_members=False)
    given = dict(
        assistant_model=models[1], ensemble_config=config, batch_size=2, progress_bar=False, drafter="prompt_lookup"
    )
    results = list(se.generate_batch(models[0], inputs, **given, **SETTINGS).values())
    stats = results[0].stats
    assert all(result.stats is stats for result in results)
    assert stats.forward_passes[:2] == passes and len(stats.accepted) == 3
    assert stats.new_tokens == sum(len(result.generated_tokens) for result in results)
    assert 0 < sum(stats.accepted) <= sum(stats.verified) <= sum(stats.proposed)
    assert 0 < sum(stats.member_seconds) <= stats.seconds and "author" not in str(stats)


def _counted(forward, passes, i):
    @functools.wraps(forward)
    def counting(*args, **kwargs):
        passes[i] += 1
        return forward(*args, **kwargs)

    return counting


def test_what_was_given_out_is_kept_when_something_fails():
    inputs = prompts(8)

    class Interrupts(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids[0, : len(inputs[6])].tolist() == inputs[6]:
                raise KeyboardInterrupt
            return torch.tensor([False])

    expected, done = alone(members(), inputs, se.EnsembleConfig()), {}
    with pytest.raises(KeyboardInterrupt):
        given = dict(assistant_model=members()[1:], batch_size=2, stopping_criteria=[Interrupts()])
        for result in se.generate_as_completed(members()[0], inputs, **given, **SETTINGS):
            done[result.number] = result.generated_tokens
    assert len(done) >= 5 and all(expected[number] == text for number, text in done.items())


def test_few_prompts():
    model, other = members()
    assert se.generate_batch(model, [], assistant_model=other, progress_bar=False) == {}
    assert batched(members(), [[9]], se.EnsembleConfig(), 8) == alone(members(), [[9]], se.EnsembleConfig())
    arrays = [np.array([9, 8]), torch.tensor([7])]
    results = se.generate_batch(model, arrays, assistant_model=other, progress_bar=False, **SETTINGS)
    assert [result.prompt_ids for result in results.values()] == [[9, 8], [7]]


class _KeepsState:
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    ("inputs", "kwargs", "error", "said"),
    [
        ("text", {}, TypeError, "list of prompts"),
        (torch.ones(2, 3, dtype=torch.long), {}, TypeError, "list of prompts"),
        ([[9], "text"], {}, TypeError, "Prompt 1 must be a list of token ids"),
        ([[9], [0.5]], {}, TypeError, "Prompt 1 must be"),
        ([[9], []], {}, ValueError, "Prompt 1 is empty"),
        ([[9], [VOCAB]], {}, ValueError, f"Prompt 1 holds token {VOCAB}"),
        ([[9]], dict(batch_size=0), ValueError, "batch_size"),
        ([[9], [8]], dict(numbers=[3]), ValueError, "`numbers` has 1 places, but there are 2"),
        ([[9], [8]], dict(numbers=[3, 3]), ValueError, "each once"),
        ([[9]], dict(numbers=[-1]), ValueError, "from 0 on"),
        ([[9]], dict(assistant_model=None), ValueError, "needs the other members"),
        ([[9]], dict(attention_mask=torch.ones(1, 1)), ValueError, "`attention_mask` is not supported"),
        ([[9]], dict(num_beams=2), ValueError, "num_beams"),
        ([[9]], dict(num_return_sequences=2, do_sample=True), ValueError, "num_return_sequences"),
        ([[9]], dict(do_sample=True, ensemble_config=se.EnsembleConfig(coupling="maximal")), ValueError, "maximal"),
        ([[9]], dict(ensemble_config=se.EnsembleConfig(trace=True)), ValueError, "trace"),
        ([[9]], dict(output_scores=True, return_dict_in_generate=True), ValueError, "output_scores"),
        ([[9]], dict(max_time=5.0), ValueError, "max_time"),
        ([[9], [8, 7, 6, 5]], dict(max_new_tokens=None, max_length=3), ValueError, "max_length"),
        ([[9]], dict(unknown=3), ValueError, "unknown"),
        (
            [[9]],
            dict(
                logits_processor=[_KeepsState()],
                ensemble_config=se.EnsembleConfig(method="product", combine_on="raw_logits"),
            ),
            ValueError,
            "stateless",
        ),
    ],
)
def test_bad_input_raises_before_the_first_pass(monkeypatch, inputs, kwargs, error, said):
    model, other = members()
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("a pass was made"))
    with pytest.raises(error, match=said):
        se.generate_as_completed(model, inputs, **dict(assistant_model=other) | SETTINGS | kwargs)
