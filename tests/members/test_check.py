"""Models that read in a wrong way are found before the first token, and those that read correctly are accepted."""

import copy
import threading

import broken
import oracle
import pytest
import torch
from families import FAMILIES, IN_FLOAT32, MORE_FAMILIES, NEWER, SPECIAL, alike, members, prompts, tiny
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import hf_spec_ensemble as se
from hf_spec_ensemble.members.check import reading_of
from hf_spec_ensemble.members.runner import Runner, StaticRunner
from hf_spec_ensemble.members.uncached import member_of


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def generate(models, batch=1, speculative=True, **kwargs):
    config = se.EnsembleConfig(speculative=speculative, num_assistant_tokens=[3, 2], **kwargs)
    return (
        models[0]
        .generate(
            **prompts(batch), assistant_model=models[1:], ensemble_config=config, max_new_tokens=12, do_sample=False
        )
        .tolist()
    )


def fresh(model, runner=None):
    return member_of(model, {}, prompts(1)["input_ids"], runner)


def pair(way, where=1):
    models = copy.deepcopy(members("llama", 2))
    models[where].config.window_size = 16
    models[where] = broken.broken(models[where], way)
    return models


@pytest.mark.parametrize("where", [0, 1], ids=["main model", "assistant"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("way", broken.ALWAYS)
def test_a_model_that_reads_in_a_wrong_way_is_refused(way, batch, where):
    models, tokens = pair(way, where), []
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be a member here: it reads .* differently"):
        models[0].generate(
            **prompts(batch), assistant_model=models[1:], ensemble_config=se.EnsembleConfig(), max_new_tokens=9,
            stopping_criteria=[lambda ids, scores: tokens.append(ids) or torch.zeros(len(ids), dtype=torch.bool)],
        )  # fmt: skip
    assert not tokens
    assert generate(models, batch, check_members=False), "the switch"


def test_an_assistant_that_forgets_is_found_by_the_standard_ensemble_too():
    with pytest.raises(ValueError, match=r"one token after the other .* use other members\. "):
        generate(pair(broken.ignores_its_cache), speculative=False)


@pytest.mark.parametrize("way", broken.WITH_HIDDEN_SLOTS)
def test_what_hidden_slots_disturb_goes_in_step(way):
    """Rows of equal length, which need no hidden slots, are right: that is what the standard ensemble gives."""
    models = pair(way)
    inputs = {"input_ids": torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(1))}
    texts = []
    for speculative in (True, False):
        config = se.EnsembleConfig(speculative=speculative, num_assistant_tokens=[3, 2], weights=[0.3, 0.7])
        call = dict(assistant_model=models[1], ensemble_config=config, max_new_tokens=24, do_sample=False)
        texts.append(models[0].generate(**inputs, attention_mask=inputs["input_ids"].ge(0).long(), **call).tolist())
    found = [reading_of(fresh(model), speculative=True, rows=True) for model in models]
    assert [reading.in_step for reading in found] == [False, True]
    if way is not broken.windows_count_slots:  # that one reads several tokens in another way as well
        assert texts[0] == texts[1]


NOT_STATIC = ("lfm2", "falcon_alibi", *NEWER)  # refused before, or not in the oldest transformers
NOT_IN_FLOAT64 = (*IN_FLOAT32, "xglm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_no_false_alarms(family, dtype):
    if dtype == torch.float64 and family in NOT_IN_FLOAT64:
        pytest.skip("transformers runs it in float32 only")
    model = copy.deepcopy(tiny(family)).to(dtype)
    for static in (False, True) if family not in NOT_STATIC else (False,):
        runner = StaticRunner(model, 64) if static else Runner(model)
        for speculative in (True, False):
            for rows in (False, True):
                reading = reading_of(fresh(model, runner), speculative, rows, padded=rows)
                assert reading.fault is None and reading.unknown is None, (reading, static, speculative, rows)


def test_it_disturbs_nothing():
    """Neither the random state, where dropout draws, nor what is counted and recorded."""
    models = copy.deepcopy(members("llama", 2))
    before = torch.get_rng_state()
    for dropout in (False, True):
        for model in models:
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = 0.5 * dropout
            model.train(dropout)
            reading = reading_of(fresh(model), speculative=True, rows=True)
            assert (reading.unknown is not None) == dropout
        assert torch.equal(before, torch.get_rng_state())
    for model in models:
        model.eval()
    config = se.EnsembleConfig(num_assistant_tokens=1, trace=True)
    out = models[0].generate(
        **prompts(1), assistant_model=models[1:], ensemble_config=config, max_new_tokens=4, return_dict_in_generate=True
    )
    assert sum(out.stats.forward_passes) == len(out.trace.passes) <= 8


def test_other_threads_may_draw_meanwhile():
    drawn, done = [], threading.Event()

    def draw():
        while not done.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(5):
            reading_of(fresh(copy.deepcopy(tiny("gemma3"))), speculative=True)
    finally:
        done.set()
        thread.join()
    assert len(set(drawn)) == len(drawn)


def test_what_is_not_known_is_tried_again():
    model = copy.deepcopy(tiny("llama")).train()
    broken.broken(model, broken.counts_what_it_forgot)
    assert reading_of(fresh(model), speculative=True).unknown is not None
    assert reading_of(fresh(model.eval()), speculative=True).fault is not None
    del model.forward
    assert reading_of(fresh(model), speculative=True).fault is None


PHI = dict(num_key_value_heads=2, original_max_position_embeddings=12, max_position_embeddings=128)
DYNAMIC = dict(rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4), max_position_embeddings=12)
LONG = dict(
    PHI, rope_parameters=dict(
        rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, rope_theta=1e4,
        original_max_position_embeddings=12,
    ),
)  # fmt: skip


def phi(config_class=Phi3Config, model_class=Phi3ForCausalLM, **settings):
    size = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2)
    return alike(lambda: model_class(config_class(**size, initializer_range=0.3, **SPECIAL, **settings)), 2, 0.8)


@pytest.mark.parametrize("length", [7, 12, 13, 20])
@pytest.mark.parametrize("speculative", [True, False])
def test_prompts_longer_than_the_original_context(length, speculative):
    """Phi-3 drops the cache that it is given for these."""
    if NEWER and not speculative:
        pytest.skip("older versions of transformers lose the main model's cache themselves")
    models = phi(**PHI)
    ids = torch.randint(3, 50, (1, length), generator=torch.Generator().manual_seed(length))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    text, _ = oracle.greedy(models, inputs, "weighted", 12, eos=())
    config = oracle.config_of("weighted", 2, speculative=speculative, num_assistant_tokens=[3, 2])
    out = models[0].generate(
        **inputs, assistant_model=models[1:], ensemble_config=config, max_new_tokens=12, eos_token_id=None,
        do_sample=False,
    )  # fmt: skip
    assert out.tolist() == text.tolist()


@pytest.mark.parametrize("kind, speculative", [("dynamic", True), ("longrope", True), ("longrope", False)])
def test_embeddings_that_change_with_the_length_are_refused(kind, speculative):
    dynamic = dict(config_class=LlamaConfig, model_class=LlamaForCausalLM, **DYNAMIC)
    models = phi(**(dynamic if kind == "dynamic" else LONG))
    config = se.EnsembleConfig(speculative=speculative)
    call = dict(assistant_model=models[1:], ensemble_config=config, do_sample=False)
    with pytest.raises(ValueError, match=rf"{kind}.*longer than 12 tokens, and this one may have 27"):
        models[0].generate(**prompts(1), **call, max_new_tokens=20)
    assert models[0].generate(**prompts(1), **call, max_new_tokens=5).shape[1] <= 12


def test_a_compiled_module_keeps_its_cache(caplog):
    one, two = members("llama", 2)
    call = dict(ensemble_config=se.EnsembleConfig(), max_new_tokens=6, do_sample=False)
    expected = one.generate(**prompts(1), assistant_model=two, **call)
    compiled = torch.compile(copy.deepcopy(two), backend="eager")
    assert torch.equal(one.generate(**prompts(1), assistant_model=compiled, **call), expected)
    assert "whole text" not in caplog.text


def test_a_model_is_checked_once(monkeypatch):
    models, passes = copy.deepcopy(members("llama", 2)), []
    for model in models:
        model.register_forward_pre_hook(lambda *_: passes.append(1))
    counts = []
    for _ in range(2):
        passes.clear()
        generate(models)
        counts.append(len(passes))
    assert counts[0] == counts[1] + 2 * 3


def test_a_model_in_training_mode_is_not_refused(caplog):
    models = copy.deepcopy(members("gpt2", 2))
    models[1].config.attn_pdrop = 0.5
    for module in models[1].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    models[1].train()
    generate(models)
    assert "training mode" in caplog.text and "model.eval()" in caplog.text
