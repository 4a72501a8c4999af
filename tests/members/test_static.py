"""Static caches and compiled passes: the same text as with caches that grow, memory that stays, graphs that suffice."""

import copy
import shutil
import threading

import pytest
import torch
from covering import pairwise
from families import FAMILIES, MORE_FAMILIES, NEWER, members, prompts, tiny
from test_cached_prefix import go_on
from test_encoder_decoder import members as encoder_decoder_members
from test_encoder_decoder import sources
from transformers import CompileConfig, LogitsProcessor, StaticCache
from transformers.cache_utils import StaticLayer

import hf_spec_ensemble as se
from hf_spec_ensemble.members.cached import COMPACT_AT
from hf_spec_ensemble.members.costs import PassCosts, pass_costs
from hf_spec_ensemble.members.runner import SETTLED, WIDTHS, CompiledRunner


REFUSED = {"falcon_alibi": "ALiBi", "lfm2": "takes back rejected tokens"}
UNEVEN = dict(weights=[0.5, 0.3, 0.2], num_assistant_tokens=[2, 1, 3])

compiled_shapes: list[tuple[int, ...]] = []


def counting(graph, inputs):
    """A backend that only notes what it is given to compile."""
    compiled_shapes.append(
        next(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.long)
    )
    return graph.forward


COUNTED = CompileConfig(backend=counting, mode=None, fullgraph=True)
STATIC = dict(cache_implementation="static")
COMPILED = dict(**STATIC, compile_config=COUNTED)


@pytest.fixture
def fresh():
    """Models that nothing was compiled for."""
    compiled_shapes.clear()
    torch._dynamo.reset()
    return lambda family="llama", n=2, likeness=0.9: copy.deepcopy(members(family, n, likeness))


def generate(models, inputs, settings=UNEVEN, **kwargs):
    kwargs = dict(max_new_tokens=20, return_dict_in_generate=True) | kwargs
    torch.manual_seed(3)
    return models[0].generate(
        **inputs, assistant_model=models[1:], ensemble_config=se.EnsembleConfig(**settings), **kwargs
    )


def assert_same(models, inputs, settings=UNEVEN, ways=(STATIC,), **kwargs):
    expected = generate(models, inputs, settings, **kwargs).sequences.tolist()
    for way in ways:
        assert generate(models, inputs, settings, **kwargs, **way).sequences.tolist() == expected


@pytest.mark.parametrize("batch, do_sample", [(1, False), (3, True)], ids=["greedy", "sampled batch"])
@pytest.mark.parametrize(
    "family", [family for family in (*FAMILIES, *MORE_FAMILIES) if family not in (*REFUSED, *NEWER)]
)
def test_static_is_growing(family, batch, do_sample):
    assert_same(members(family, 3), prompts(batch), do_sample=do_sample)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_go_back_is_refused(family):
    for models in ([tiny(family), tiny("llama")], [tiny("llama"), tiny(family)]):
        with pytest.raises(ValueError, match=REFUSED[family]):
            generate(models, prompts(1), {}, **STATIC)


@pytest.mark.parametrize("kwargs", [
    dict(repetition_penalty=1.3, do_sample=True, top_k=7), dict(eos_token_id=[2, 7, 11, 13]), dict(max_new_tokens=1),
    dict(drafter="prompt_lookup"), dict(num_return_sequences=2, do_sample=True), dict(max_cache_len=100),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("settings", [{}, UNEVEN, dict(speculative=False), dict(coupling="maximal", **UNEVEN)], ids=str)
def test_whatever_else_is_asked(settings, kwargs):
    if "drafter" in kwargs and "weights" in settings:
        settings = settings | {"num_assistant_tokens": 2}
    assert_same(members("llama", 3), prompts(2), settings, **kwargs)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("speculative", [True, False])
def test_encoder_decoder(family, speculative):
    models, inputs = encoder_decoder_members(family), sources(family, 2)
    assert_same(models, inputs, dict(num_assistant_tokens=[2, 1, 3], speculative=speculative))
    with pytest.raises(ValueError, match="encoder-decoder"):
        generate(models, inputs, {}, **COMPILED)


def test_beams_of_the_standard_ensemble():
    settings = dict(speculative=False)
    assert_same(members("llama", 2), prompts(2), settings, ways=(STATIC, COMPILED), num_beams=3, do_sample=False)


@pytest.mark.parametrize("compact_at", [COMPACT_AT, 10.0], ids=["where it pays", "where it must"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_memory_is_allocated_once(family, compact_at, monkeypatch):
    """Rows that accept little leave hidden slots behind, for which a static cache has no room."""
    monkeypatch.setattr("hf_spec_ensemble.members.cached.COMPACT_AT", compact_at)
    allocated, models = [], members(family, 2, likeness=0.0)
    initialize = StaticLayer.lazy_initialization
    monkeypatch.setattr(
        StaticLayer, "lazy_initialization",
        lambda layer, keys, values: (allocated.append(layer.max_cache_len), initialize(layer, keys, values)),
    )  # fmt: skip
    inputs = prompts(3)
    kwargs = dict(max_new_tokens=90, eos_token_id=None, do_sample=True)
    assert_same(models, inputs, dict(num_assistant_tokens=[6, 6], check_members=False), **kwargs)
    layers = sum(model.config.num_hidden_layers for model in models)
    assert allocated == [inputs["input_ids"].shape[1] + 90 + WIDTHS[-1]] * layers


CONTINUED = pairwise(dict(way=["static", "compiled"], speculative=[True, False], batch=[1, 3], do_sample=[False, True]))


@pytest.mark.parametrize("way,speculative,batch,do_sample", CONTINUED)
def test_a_second_call_continues(way, speculative, batch, do_sample):
    way = {"static": STATIC, "compiled": COMPILED}[way]
    models, inputs = members("llama", 2), prompts(batch)
    settings = dict(num_assistant_tokens=2, speculative=speculative)
    first = generate(models, inputs, settings, eos_token_id=None, max_cache_len=100, **way)
    cache, prompt = first.past_key_values, go_on(first, inputs)
    assert isinstance(cache, StaticCache)
    assert 0 < int(cache.get_seq_length()) < prompt["input_ids"].shape[1]
    expected = generate(models, prompt, settings, do_sample=do_sample).sequences.tolist()
    generate(models, inputs, settings, do_sample=True, max_cache_len=100, **way)  # writes into no cache handed out
    if speculative:
        again = generate(models, prompt, settings, do_sample=do_sample, past_key_values=cache)
        assert again.sequences.tolist() == expected
        assert again.past_key_values is cache


def test_a_static_cache_must_have_room():
    models, inputs = members("llama", 2), prompts(1)
    for slots in (30, 59):
        with pytest.raises(ValueError, match=rf"{slots} slots.*max_cache_len=60"):
            generate(
                models, inputs, {}, past_key_values=StaticCache(models[0].config, max_cache_len=slots),
                max_new_tokens=60 - WIDTHS[-1] - inputs["input_ids"].shape[1],
            )  # fmt: skip
    cache = StaticCache(models[0].config, max_cache_len=60)
    out = generate(models, inputs, {}, past_key_values=cache, max_new_tokens=60 - WIDTHS[-1] - 7)
    assert out.past_key_values is cache


@pytest.mark.parametrize("speculative", [True, False])
def test_offloaded_static_caches_are_refused(speculative):
    models = members("llama", 2)
    cache = StaticCache(models[0].config, max_cache_len=100)
    cache.offloading = True  # making such a cache takes a GPU
    with pytest.raises(ValueError, match="offloaded are not supported"):
        generate(models, prompts(1), dict(speculative=speculative), past_key_values=cache)


def test_a_shifting_window_is_refused():
    models = members("gemma3", 2)
    cache = StaticCache(models[0].config, max_cache_len=100)  # transformers' own shifts
    with pytest.raises(ValueError, match="takes back rejected tokens"):
        generate(models, prompts(1), {}, past_key_values=cache)


class Breaks(LogitsProcessor):
    """Fails after some calls."""

    stateless = True

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, input_ids, scores):
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("broken")
        return scores


@pytest.mark.parametrize("calls", [0, 1, 9])
def test_a_cache_is_left_as_it_was_given(calls):
    models, inputs = members("llama", 2), prompts(1)
    first = generate(models, inputs, {}, eos_token_id=None, max_cache_len=100, **STATIC)
    cache, prompt = first.past_key_values, go_on(first, inputs)
    held = int(cache.get_seq_length())
    with pytest.raises(RuntimeError, match="broken"):
        generate(models, prompt, {}, past_key_values=cache, logits_processor=[Breaks(calls)])
    assert int(cache.get_seq_length()) == held
    expected = generate(models, prompt, {}).sequences.tolist()
    assert generate(models, prompt, {}, past_key_values=cache).sequences.tolist() == expected


# --- Compiled passes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_compiled_after_warming_up(fresh, capsys):
    """Whatever is accepted, in texts of any length: one graph for each width."""
    models = fresh()
    seconds = se.warmup(models, max_length=60, batch_size=2, compile_config=COUNTED)
    said = capsys.readouterr().out
    assert "Compiling 12 passes: 2 members, each over 1, 2, 4, 8, 16, 32 tokens, 2 rows" in said
    assert len(seconds) == 2 and min(seconds) > 0
    assert sorted(compiled_shapes) == sorted(2 * [(2, width) for width in WIDTHS])
    for seed, (lengths, new_tokens) in enumerate([([1, 1], 30), ([5, 2], 40), ("auto", 53), ([12, 1], 7)]):
        settings = dict(num_assistant_tokens=lengths)
        kwargs = dict(max_new_tokens=new_tokens, do_sample=bool(seed % 2))
        assert_same(models, prompts(2, seed=seed), settings, (COMPILED,), **kwargs)
    assert_same(models, prompts(2), {}, (COMPILED,), drafter="prompt_lookup", max_new_tokens=40)
    assert_same(models, prompts(2), dict(speculative=False), (COMPILED,), max_new_tokens=30)
    assert len(compiled_shapes) == 2 * len(WIDTHS)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "bloom"])
def test_nor_for_windows_and_alibi(family, fresh):
    """Their masks depend on how long the text is. Of two widths, which suffice if no member lags."""
    models = fresh(family)
    se.warmup(models, max_length=40, batch_size=2, compile_config=COUNTED, widths=[1, 2], progress=False)
    compiled = sorted(compiled_shapes)
    assert compiled == sorted(2 * [(2, 1), (2, 2)])
    for new_tokens, do_sample in ((3, False), (33, True)):
        settings = dict(method="product", num_assistant_tokens=1)
        assert_same(models, prompts(2), settings, (COMPILED,), max_new_tokens=new_tokens, do_sample=do_sample)
    assert sorted(compiled_shapes) == compiled


def test_longer_texts_and_other_batches_compile_anew(fresh):
    models = fresh()
    se.warmup(models, max_length=60, compile_config=COUNTED, widths=[1, 2], progress=False)
    settings, counts = dict(num_assistant_tokens=1), [len(compiled_shapes)]
    for batch, kwargs in ((1, {}), (1, dict(max_cache_len=300)), (1, {}), (3, {})):
        generate(models, prompts(batch), settings, **COMPILED, **kwargs)
        counts.append(len(compiled_shapes))
    assert counts[0] == counts[1] == 4 and counts[2] == counts[3] > 4
    assert {rows for rows, _ in compiled_shapes[counts[3] :]} == {3}


def test_each_width_waits_for_its_turn_without_warming_up(fresh):
    models = fresh()
    assert_same(models, prompts(1), dict(num_assistant_tokens=1), (COMPILED,))
    assert set(compiled_shapes) == {(1, 1), (1, 2)}


@pytest.mark.slow
def test_a_model_is_compiled_for_as_many_shapes_as_are_asked_for(fresh):
    """torch gives up on code that it has compiled eight times."""
    models = fresh()
    for batch in range(1, 10):
        se.warmup(models[1:], 20, batch_size=batch, compile_config=COUNTED, widths=[1], progress=False)
        assert (batch, 1) in compiled_shapes


def test_caches_serve_later_calls(fresh, monkeypatch):
    models, allocated = fresh(), []
    initialize = StaticLayer.lazy_initialization
    monkeypatch.setattr(
        StaticLayer, "lazy_initialization",
        lambda layer, keys, values: (allocated.append(layer), initialize(layer, keys, values)),
    )  # fmt: skip
    settings = dict(num_assistant_tokens=1, check_members=False)
    out = generate(models, prompts(1), settings, **COMPILED)
    first = len(allocated)
    assert first == sum(model.config.num_hidden_layers for model in models)
    kept = [layer.keys.clone() for layer in out.past_key_values.layers]
    for seed in range(3):
        generate(models, prompts(1, seed=seed), settings | dict(speculative=seed > 0), **COMPILED)
    assert len(allocated) == first
    for layer, keys in zip(out.past_key_values.layers, kept):
        assert torch.equal(layer.keys, keys)


def test_no_compiling_is_taken_for_a_passes_time(fresh, monkeypatch):
    models, taken = fresh(), []
    add = PassCosts.add
    monkeypatch.setattr(
        PassCosts, "add", lambda costs, batch, width, s: (taken.append(width), add(costs, batch, width, s))
    )
    settings, runs = dict(num_assistant_tokens=1), []
    run = CompiledRunner.run
    monkeypatch.setattr(
        CompiledRunner, "run", lambda self, x, width: (runs.append((self.model, width)), run(self, x, width))[1]
    )
    generate(models, prompts(1), settings, eos_token_id=None, **COMPILED)
    compiled = [(id(model), width) for model, width in runs if width]
    settled = {key: compiled.count(key) - SETTLED for key in set(compiled)}
    assert len(taken) == sum(max(count, 0) for count in settled.values())
    assert pass_costs(models[0]).measured(1, 1) is None  # those of passes over growing caches


def test_costs_of_passes_that_are_padded():
    costs = PassCosts(widths=(1, 2, 4))
    for width, seconds in ((1, 1.0), (2, 2.0), (4, 3.0)):
        costs.add(1, width, seconds)
    assert [costs.measured(1, width) for width in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, 3.0]


def test_threads_share_compiled_models(fresh):
    models = fresh()
    settings = dict(num_assistant_tokens=1)
    expected = [generate(models, prompts(1, seed=i), settings, do_sample=False).sequences.tolist() for i in range(2)]
    got = [None] * 2

    def work(i):
        got[i] = generate(models, prompts(1, seed=i), settings, do_sample=False, **COMPILED).sequences.tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_what_cannot_be_compiled_is_refused():
    models = members("llama", 2)
    with pytest.raises(ValueError, match="compile_config.*cache_implementation='static'"):
        generate(models, prompts(1), {}, compile_config=COUNTED)
    with pytest.raises(ValueError, match="MptForCausalLM cannot be compiled.*disable_compile"):
        generate([models[0], tiny("mpt")], prompts(1), {}, **COMPILED)
    assert_same([models[0], tiny("mpt")], prompts(1), {}, ({**COMPILED, "disable_compile": True},))
    with pytest.raises(ValueError, match=r"`widths` must be of.*\(3,\)"):
        se.warmup(models, max_length=20, widths=[3])
    with pytest.raises(TypeError, match="loaded transformers models"):
        se.warmup(["llama"], max_length=20)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("options", [dict(), dict(mode=None, options={"freezing": True})], ids=["plain", "frozen"])
def test_with_inductor(options, fresh):
    fresh()
    # Of one layer each: what is compiled for one serves the other
    models = [copy.deepcopy(tiny("llama", seed=seed, layers=1)) for seed in range(2)]
    config = CompileConfig(**options)
    se.warmup(models, max_length=60, compile_config=config, widths=[1, 2], progress=False)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs
    for do_sample in (False, True):
        way = dict(**STATIC, compile_config=config)
        fields = dict(method="product", num_assistant_tokens=1)  # no member lags, so that two widths suffice
        assert_same(models, prompts(1), fields, (way,), do_sample=do_sample)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
