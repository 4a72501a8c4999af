"""Members with adapters, also of one base, and quantised members: the ensemble is that of separate, merged models."""

import copy
import functools
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import oracle
import pytest
import torch
from families import PAD, SPECIAL, VOCAB, prompts, tiny
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import hf_spec_ensemble as se
from hf_spec_ensemble.members.adapters import adapters_of, base_of, lock_of
from hf_spec_ensemble.members.costs import PassCosts, pass_costs, remembered


peft = pytest.importorskip("peft")

BOTH = [True, False]  # speculative or not
DRAWS = {"greedy": dict(do_sample=False), "sampled": dict(do_sample=True, temperature=0.8, top_k=20)}
LORA = dict(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
)


def adapted(kind: str, adapters=("maths", "code"), **config):
    """A model with random adapters, the first of them active: PEFT's (`wrapped`), or transformers' own (`native`)."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = copy.deepcopy(tiny("llama"))
        configs = [peft.LoraConfig(**LORA | config) for _ in adapters]
        if kind == "wrapped":
            model = peft.get_peft_model(model, configs[0], adapters[0])
        for name, extra in list(zip(adapters, configs))[kind == "wrapped" :]:
            model.add_adapter(*((name, extra) if kind == "wrapped" else (extra, name)))
    model.set_adapter(adapters[0])
    return model.double().eval()


def tuner_layers(model) -> list:
    return [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]


def alone(model, adapter: str | None):
    """A copy of the model with one adapter merged into its weights, or with none."""
    model = base_of(copy.deepcopy(model))
    for layer in tuner_layers(model):
        if adapter is None:
            layer.enable_adapters(False)
        else:
            layer.set_adapter([adapter])
            layer.merge(adapter_names=[adapter])
    return model


def state(model) -> list:
    """All that switching adapters could change."""
    layers = [module for module in model.modules() if hasattr(module, "active_adapters") and module is not model]
    return [
        [
            (list(layer.active_adapters), layer.disable_adapters)
            for layer in layers
            if hasattr(layer, "merged_adapters")
        ],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        getattr(model, "active_adapter", None) if isinstance(model, peft.PeftModel) else None,
    ]


def generate(model, assistants, batch=1, speculative=True, draw="greedy", seed=0, config=None, **kwargs):
    config = config or dict(num_assistant_tokens=2)
    torch.manual_seed(seed)
    return model.generate(
        **prompts(batch, seed=seed), assistant_model=assistants, max_new_tokens=12, **DRAWS[draw], **kwargs,
        ensemble_config=oracle.config_of("weighted", 1 + len(assistants), speculative=speculative, **config),
    )  # fmt: skip


# --- Members that PEFT has wrapped ------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculative", BOTH)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("batch", [1, 3])
def test_peft_models_are_members(batch, draw, speculative):
    main, other = adapted("wrapped"), adapted("wrapped", ("code", "maths"), r=2)
    copies = [copy.deepcopy(model).merge_and_unload() for model in (main, other)]
    call = dict(batch=batch, draw=draw, speculative=speculative)
    text = generate(main, [other], **call)
    assert text.tolist() == generate(copies[0], copies[1:], **call).tolist()
    assert text.tolist() != generate(base_of(alone(main, None)), copies[1:], **call).tolist(), (
        "the adapter does nothing"
    )


# --- One base, several members ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculative", BOTH)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["wrapped", "native"])
def test_one_base_with_several_adapters_is_several_models(kind, batch, draw, speculative):
    model = adapted(kind)
    copies = [alone(model, name) for name in ("maths", "code", None)]
    views = [se.with_adapter(model, name) for name in ("code", None)]
    before = state(model)
    call = dict(batch=batch, draw=draw, speculative=speculative)
    assert generate(model, views, **call).tolist() == generate(copies[0], copies[1:], **call).tolist()
    assert state(model) == before


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("drafter", [None, "prompt_lookup", "base"])
def test_adapters_mixed_in_a_pass_are_adapters_switched(drafter, batch, draw):
    """As separate models with one adapter merged into each, and as the views say when they take turns."""
    model = adapted("wrapped")
    copies = [alone(model, name) for name in ("maths", "code", None)]
    views = [se.with_adapter(model, name) for name in ("code", None)]
    before = state(model)
    settings = dict(num_assistant_tokens=3)
    call = dict(
        batch=batch, draw=draw, drafter=views[1] if drafter == "base" else drafter, return_dict_in_generate=True
    )
    mixed, switched = (generate(model, views, config=settings | dict(share_passes=share), **call) for share in BOTH)
    assert mixed.stats.shared == [[0, 1, 2]] and switched.stats.shared == []
    assert mixed.stats.forward_passes[0] <= 12 and mixed.stats.forward_passes[1:3] == [0, 0]
    merged = generate(copies[0], copies[1:], config=settings, **call | dict(drafter=None))
    assert mixed.sequences.tolist() == switched.sequences.tolist() == merged.sequences.tolist()
    assert state(model) == before
    assert not any(module._forward_pre_hooks for module in tuner_layers(model))


def test_adapters_mix_in_refilled_rows():
    model, inputs = adapted("native"), [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16]]
    views = [se.with_adapter(model, name) for name in ("maths", "code")]
    texts, stats = [], []
    for share in BOTH:
        config = se.EnsembleConfig(weights=[0.4, 0.35, 0.25], num_assistant_tokens=2, share_passes=share)
        settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=[2, 3, 4, 5, 6])
        results = se.generate_batch(
            model, inputs, assistant_model=views, ensemble_config=config, batch_size=2, progress_bar=False, **settings
        )
        texts.append([result.generated_tokens for result in results.values()])
        stats.append(results["req_0"].stats)
    assert texts[0] == texts[1]
    assert stats[0].shared == [[0, 1, 2]] and stats[0].forward_passes[1:3] == [0, 0] and stats[1].shared == []


def test_prompts_and_adapters_mix_too():
    model = adapted("wrapped")
    own, names = [prompts(3), prompts(3, 4, seed=4), prompts(1, 11, seed=11)], ("maths", "code", None)
    views = [se.with_prompt(se.with_adapter(model, name), **own[i]) for i, name in ((1, "code"), (2, None))]
    config = oracle.config_of("product", 3, share_passes=True)
    call = dict(max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    out = model.generate(**own[0], assistant_model=views, ensemble_config=config, **call)
    text, _ = oracle.greedy([alone(model, name) for name in names], own[0], "product", 10, prompts=own)
    assert out.stats.shared == [[0, 1, 2]] and out.sequences.tolist() == text.tolist()


@pytest.mark.parametrize("why", ["dora", "several active", "a module of its own"])
def test_adapters_that_no_pass_mixes_take_turns(why):
    config = {"dora": dict(use_dora=True), "a module of its own": dict(modules_to_save=["lm_head"])}.get(why, {})
    model = adapted("wrapped", **config)
    if why == "several active":
        model.base_model.set_adapter(["maths", "code"])
    others = [se.with_adapter(model, "code"), se.with_prompt(se.with_adapter(model, "code"), **prompts(1, 4))]
    outs = [
        generate(model, others, config=dict(num_assistant_tokens=2, share_passes=share), return_dict_in_generate=True)
        for share in BOTH
    ]
    assert outs[0].sequences.tolist() == outs[1].sequences.tolist()
    # Those with the same adapter need no mixing
    assert outs[0].stats.shared == ([[0, 1, 2]] if why == "a module of its own" else [[1, 2]])


def test_a_wrong_mixture_of_adapters_is_found_before_it_is_used(monkeypatch):
    model = adapted("wrapped")
    monkeypatch.setattr("hf_spec_ensemble.members.mixed.NO_ADAPTER", "maths")  # rows of the base get an adapter
    views = [se.with_adapter(model, name) for name in ("code", None)]
    out = generate(model, views, config=dict(num_assistant_tokens=2, share_passes=True), return_dict_in_generate=True)
    assert out.stats.shared == []


@pytest.mark.parametrize("speculative", BOTH)
def test_the_standard_ensemble_of_views_is_the_formula(speculative):
    model = adapted("native")
    copies = [alone(model, name) for name in ("maths", "code", None)]
    text, _ = oracle.greedy(copies, prompts(3), "weighted", 12)
    views = [se.with_adapter(model, name) for name in ("code", None)]
    assert generate(model, views, 3, speculative).tolist() == text.tolist()


@pytest.mark.parametrize("kind", ["wrapped", "native"])
def test_a_model_against_its_own_base(kind):
    model = adapted(kind)
    config = se.EnsembleConfig(method="contrastive", contrast=0.5, num_assistant_tokens=2)
    call = dict(**prompts(3), ensemble_config=config, do_sample=False, max_new_tokens=12)
    text = model.generate(assistant_model=se.with_adapter(model, None), **call)
    assert text.tolist() == alone(model, "maths").generate(assistant_model=alone(model, None), **call).tolist()


def test_beam_search():
    model = adapted("wrapped")
    kwargs = dict(speculative=False, num_beams=3)
    text = generate(model, [se.with_adapter(model, "code")], 3, **kwargs)
    assert text.tolist() == generate(alone(model, "maths"), [alone(model, "code")], 3, **kwargs).tolist()


def test_the_processor_used_by_hand():
    model = adapted("wrapped")
    texts = []
    for main, other in ((model, se.with_adapter(model, "code")), (alone(model, "maths"), alone(model, "code"))):
        processor = se.EnsembleLogitsProcessor(main, other, se.EnsembleConfig(weights=[0.5, 0.5]))
        texts.append(main.generate(**prompts(1), logits_processor=[processor], do_sample=False, max_new_tokens=12))
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize("lengths", ["auto", 3])
def test_a_view_as_drafter(lengths):
    model, other = adapted("native"), tiny("llama", seed=3)
    call = dict(
        **prompts(3), assistant_model=other, do_sample=False, max_new_tokens=12, return_dict_in_generate=True,
        ensemble_config=se.EnsembleConfig(num_assistant_tokens=lengths, alternate=False),
    )  # fmt: skip
    out = model.generate(drafter=se.with_adapter(model, None), **call)
    assert out.sequences.tolist() == alone(model, "maths").generate(**call).sequences.tolist()
    assert out.stats.forward_passes[2] > 0


@pytest.mark.parametrize("kind", ["wrapped", "native"])
def test_what_was_active_stays_active(kind):
    """Whatever it was: another adapter, several, none; and flags that training has set."""
    model = adapted(kind)
    assistants = [se.with_adapter(model, name) for name in ("code", None, "maths")]
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(not parameter.requires_grad)
    before = state(model)
    for speculative in BOTH:
        generate(model, assistants, speculative=speculative)
        assert state(model) == before
    disabled = alone(model, None)
    if kind == "wrapped":
        with model.disable_adapter():
            text = generate(model, assistants)
    else:
        model.disable_adapters()
        text = generate(model, assistants)
        assert all(layer.disable_adapters for layer in tuner_layers(model))
        model.enable_adapters()
        model.set_adapter(["code", "maths"])
        generate(model, assistants)
        assert model.active_adapters() == ["code", "maths"]
    copies = [alone(model, name) for name in ("code", None, "maths")] if kind == "wrapped" else assistants
    assert text.tolist() == generate(disabled, copies).tolist()


OTHER_KINDS = {
    "lora with modules to save": lambda: peft.LoraConfig(**LORA | dict(modules_to_save=["lm_head"])),
    "lora with token embeddings": lambda: peft.LoraConfig(**LORA | dict(trainable_token_indices=[5, 6, 7])),
    "dora": lambda: peft.LoraConfig(**LORA | dict(use_dora=True)),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], init_weights=False),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@torch.no_grad()
def test_other_kinds_of_adapters(kind):
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(tiny("llama")), OTHER_KINDS[kind](), "one")
    model.add_adapter("two", OTHER_KINDS[kind]())
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("one", "two")):
            parameter += 0.1 * torch.randn_like(parameter)
    ids = prompts(1)["input_ids"]
    wanted = {}
    for name in ("two", "one"):  # so that "one" is the active one afterwards
        model.set_adapter(name)
        wanted[name] = model(ids).logits
    with model.disable_adapter():
        wanted[None] = model(ids).logits
    assert len({float(logits.sum()) for logits in wanted.values()}) == 3, "the adapters do nothing"
    before = state(model)
    for name in ("two", None, "one"):
        torch.testing.assert_close(se.with_adapter(model, name)(ids).logits, wanted[name], rtol=0, atol=0)
    assert state(model) == before


# --- Leaks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["model", "streamer"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("speculative", BOTH)
def test_an_interruption_restores_the_adapters(speculative, error, source):
    model, switched = adapted("native"), dict(num_assistant_tokens=2, share_passes=False)
    views = [se.with_adapter(model, name) for name in ("code", None)]
    before, text = state(model), generate(model, views, speculative=speculative, config=switched)
    passes = []

    def fail(*_):
        passes.append(model.active_adapters() == ["code"])
        if passes[-1] and len(passes) > 4:
            raise error("from the model")

    class Failing:
        def put(self, _):
            if len(passes) > 4:
                raise error("from the streamer")

        def end(self):
            raise AssertionError

    if source == "model":
        hook, extra = tuner_layers(model)[1].register_forward_hook(fail), {}
    else:
        hook = tuner_layers(model)[1].register_forward_hook(lambda *_: passes.append(True))
        extra = dict(streamer=Failing())
    with pytest.raises(error, match=f"from the {source}"):
        generate(model, views, speculative=speculative, config=switched, **extra)
    hook.remove()
    assert state(model) == before
    in_another_thread = []
    thread = threading.Thread(
        target=lambda: in_another_thread.append(generate(model, views, speculative=speculative, config=switched)),
        daemon=True,
    )
    thread.start()
    thread.join(60)
    assert in_another_thread and torch.equal(in_another_thread[0], text), "the lock was not given back"


@pytest.fixture
def eager_threads():
    """Threads that take turns as often as Python lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(calls, times=3) -> list[list]:
    """What each call gives when it is made several times, each in a thread of its own."""
    got, start, deadline = [[] for _ in calls], threading.Barrier(len(calls)), time.monotonic() + 120

    def run(i):
        start.wait()
        for _ in range(times):
            got[i].append(calls[i]())

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    return got


def with_encoder():
    """An encoder-decoder model whose adapters change the encoder too."""
    torch.manual_seed(0)
    size = dict(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=VOCAB, initializer_factor=4.0)
    model = T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=PAD, **SPECIAL)).double()
    lora = LORA | dict(target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    for name in ("code", "maths"):
        model.add_adapter(peft.LoraConfig(**lora), name)
    return model.double().eval()


@pytest.mark.slow
@pytest.mark.parametrize("speculative", BOTH)
def test_views_of_encoder_decoder_models(speculative, eager_threads):
    """Every member encodes with its own adapter, in eight threads too."""
    model = with_encoder()
    views = [[se.with_adapter(model, name) for name in names] for names in (("code",), (None,), ("maths", "code"))]
    calls = [
        functools.partial(generate, model, assistants, batch, speculative)
        for assistants in (*views, [tiny_t5()])
        for batch in (1, 3)
    ]
    wanted = [call().tolist() for call in calls]
    for names, text in zip((("code",), (None,), ("maths", "code")), wanted[::2]):
        copies = [alone(model, name) for name in ("maths", *names)]
        assert text == generate(copies[0], copies[1:], 1, speculative).tolist()
    assert in_threads([lambda call=call: call().tolist() for call in calls]) == [[text] * 3 for text in wanted]


def tiny_t5():
    return alone(with_encoder(), None)


def test_forward_passes_of_views_in_threads_do_not_leak(eager_threads):
    model, ids = adapted("native"), prompts(1)["input_ids"]
    views = [se.with_adapter(model, name) for name in ("maths", "code", None, "code")]

    @torch.no_grad()
    def logits(view):
        return view(ids).logits.tolist()

    wanted = [[logits(view)] * 20 for view in views]
    assert in_threads([functools.partial(logits, view) for view in views], times=20) == wanted


@pytest.mark.parametrize("speculative", BOTH)
def test_the_first_view_of_a_model_waits_for_its_pass(speculative):
    """Another thread makes and runs it in the middle of a call, whose members had no view of it."""
    model, other, main, switched = adapted("wrapped"), tiny("llama", seed=5), threading.get_ident(), []
    wanted = generate(model, [other], speculative=speculative)
    model = adapted("wrapped")
    passes, threads, inside, over = iter(range(1000)), [], threading.Event(), threading.Event()

    def begin(*_):
        if threading.get_ident() != main:
            inside.set()
            over.wait(1)
        elif next(passes) == 5:
            threads.append(threading.Thread(target=lambda: se.with_adapter(model, None)(prompts(1)["input_ids"])))
            threads[0].start()
            inside.wait(0.3)

    def end(*_):
        if threading.get_ident() == main:
            switched.append(tuner_layers(model)[0].disable_adapters)

    base_of(model).model.layers[0].register_forward_pre_hook(begin)
    base_of(model).model.layers[-1].register_forward_hook(end)
    assert generate(model, [other], speculative=speculative).tolist() == wanted.tolist() and not any(switched)
    over.set()
    threads[0].join(60)


def test_the_main_models_adapters_are_not_read_while_a_view_runs():
    """They would be taken for the view's, and a shared pass would have them for the whole text."""
    model = adapted("wrapped")
    view = se.with_adapter(model, "code")
    running = threading.Event()

    def hold():
        with lock_of(model), view._active():
            running.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert running.wait(60)
    assert adapters_of(model) == ("maths",)
    thread.join()


def test_eight_threads_do_not_leak(eager_threads):
    """All with the same base as main model, and different adapters as assistants."""
    model, other = adapted("wrapped"), adapted("native")
    view, of_other = functools.partial(se.with_adapter, model), functools.partial(se.with_adapter, other)
    calls = [
        dict(model=model, assistants=[view("code")], batch=1),
        dict(model=model, assistants=[view(None)], batch=3),
        dict(model=model, assistants=[view(None), view("code")], speculative=False),
        dict(model=model, assistants=[of_other("code"), view("maths")]),
        dict(model=other, assistants=[view("code"), of_other(None)], speculative=False),
        dict(model=model, assistants=[of_other(None), view("code")], speculative=False),
        dict(model=other, assistants=[of_other("code")], config=dict(num_assistant_tokens="auto")),
        dict(model=model, assistants=[tiny("llama", seed=5)], batch=3),  # no view, but its base has some
    ]  # fmt: skip
    wanted = [generate(seed=i, **call).tolist() for i, call in enumerate(calls)]
    before = [state(model), state(other)]
    got = in_threads([lambda i=i: generate(seed=i, **calls[i]).tolist() for i in range(len(calls))])
    assert got == [[text] * 3 for text in wanted]
    assert [state(model), state(other)] == before


def test_models_with_adapters_have_a_lock():
    """Before there is a view too: another thread may make the first one in the middle of a call."""
    model = adapted("native")
    assert not isinstance(lock_of(model), nullcontext) and lock_of(model) is lock_of(se.with_adapter(model, "code"))
    assert isinstance(lock_of(tiny("llama")), nullcontext)


# --- Views as objects -------------------------------------------------------------------------------------------------


def test_views_of_the_same_adapter_are_equal_and_share_their_measurements():
    model = adapted("wrapped")
    maths, code, base = (se.with_adapter(model, name) for name in ("maths", "code", None))
    assert maths == se.with_adapter(model, "maths") == se.with_adapter(base_of(model), "maths")
    assert len({maths, code, base, model, se.with_adapter(model, "code")}) == 4
    assert maths != se.with_adapter(adapted("wrapped"), "maths")
    costs = pass_costs(maths)
    assert pass_costs(se.with_adapter(model, "maths")) is costs
    assert len({id(pass_costs(m)) for m in (maths, code, base, base_of(model))}) == 4
    memory = remembered([base_of(model), code], "key", PassCosts)
    assert remembered([base_of(model), se.with_adapter(model, "code")], "key", PassCosts) is memory
    assert remembered([base_of(model), base], "key", PassCosts) is not memory
    assert remembered([code, base_of(model)], "key", PassCosts) is not memory


def test_measurements_of_views_live_as_long_as_the_model():
    model = adapted("native")
    generate(model, [se.with_adapter(model, "code")], config=dict(num_assistant_tokens="auto"))
    assert pass_costs(se.with_adapter(model, "code")).measured(1, 1) is not None
    assert pass_costs(se.with_adapter(model, "maths")).measured(1, 1) is None


@pytest.mark.parametrize("kind", ["wrapped", "native"])
def test_adapters_may_come_and_go_after_a_view_was_made(kind):
    model = adapted(kind)
    view = se.with_adapter(model, "code")
    more = peft.LoraConfig(**LORA | dict(target_modules=["o_proj"]))
    model.add_adapter(*(("more", more) if kind == "wrapped" else (more, "more")))
    model.double()
    model.set_adapter("more")
    copies = [alone(model, "more"), alone(model, "code")]
    assert generate(model, [view]).tolist() == generate(copies[0], copies[1:]).tolist()
    ids = prompts(1)["input_ids"]
    another = peft.LoraConfig(**LORA | dict(target_modules=["k_proj"]))
    model.add_adapter(*(("another", another) if kind == "wrapped" else (another, "another")))
    model.double()
    model.set_adapter("another")
    torch.testing.assert_close(view(ids).logits, copies[1](ids).logits)
    model.delete_adapter("code")
    with pytest.raises(ValueError, match=r"no adapter 'code': its adapters are \['another', 'maths', 'more'\]"):
        generate(model, [view])


# --- What is refused --------------------------------------------------------------------------------------------------


def test_refused_when_made():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapter 'maths': it has none"):
        se.with_adapter(tiny("llama"), "maths")
    with pytest.raises(ValueError, match="no adapter None: it has none"):
        se.with_adapter(tiny("llama"), None)
    with pytest.raises(ValueError, match=r"no adapter 'math': its adapters are \['code', 'maths'\]"):
        se.with_adapter(adapted("wrapped"), "math")
    merged = adapted("wrapped")
    merged.merge_adapter(["maths"])
    with pytest.raises(ValueError, match=r"\['maths'\] are merged into the weights.*unmerge_adapter"):
        se.with_adapter(merged, "code")


def test_a_view_is_no_main_model():
    model = adapted("wrapped")
    with pytest.raises(TypeError, match="serves as an assistant or drafter"):
        generate(se.with_adapter(model, "code"), [model])


def virtual(config):
    return peft.get_peft_model(copy.deepcopy(tiny("llama")), config(num_virtual_tokens=3, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
@pytest.mark.parametrize("where", ["main", "assistant", "drafter", "view"])
def test_virtual_tokens_are_refused(where, config):
    model, other = virtual(config), tiny("llama", seed=1)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was made"))
    if where == "view":
        with pytest.raises(ValueError, match="adds to the prompt or the cache"):
            se.with_adapter(model, "default")
        return
    main, assistant, extra = (other, model, {}) if where == "assistant" else (model, other, {})
    if where == "drafter":
        main, extra = tiny("llama"), dict(drafter=model)
    with pytest.raises(ValueError, match="virtual tokens.*speculative=False" if where == "main" else "virtual tokens"):
        generate(main, [assistant], **extra)


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_the_main_model_of_a_standard_ensemble_may_have_virtual_tokens(config):
    model = virtual(config).double().eval()
    ensemble = se.EnsembleConfig(speculative=False, weights=[1 - 1e-9, 1e-9])
    call = dict(**prompts(1), do_sample=False, max_new_tokens=8)
    text = model.generate(assistant_model=tiny("llama", seed=1), ensemble_config=ensemble, **call)
    assert text.tolist() == model.generate(**call).tolist()


@pytest.mark.slow
def test_peft_is_imported_only_where_it_is_used():
    code = "import sys, hf_spec_ensemble; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- Quantised members ------------------------------------------------------------------------------------------------


def single(seed: int):
    """In float32, of a size that quantisation knows how to handle."""
    return copy.deepcopy(tiny("llama", seed=seed)).float()


def torchao_int8(seed, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = single(seed)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def torchao_loaded(seed, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    single(seed).save_pretrained(tmp_path / str(seed))
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / str(seed), quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


def bitsandbytes_int8(seed, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    single(seed).save_pretrained(tmp_path / str(seed))
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / str(seed), quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32,
        device_map="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("quantised", [torchao_int8, torchao_loaded, bitsandbytes_int8])
@pytest.mark.parametrize("which", ["main", "assistant", "both"])
def test_quantised_members(which, quantised, tmp_path):
    """Where texts differ at all, it begins where the best two tokens are as good as equally probable."""
    plain = [single(0), single(1)]
    models = [
        quantised(i, tmp_path) if which in ("both", name) else plain[i] for i, name in enumerate(("main", "assistant"))
    ]
    for batch in (1, 3):
        outputs = [
            generate(models[0], models[1:], batch, speculative, return_dict_in_generate=True, output_scores=True)
            for speculative in BOTH
        ]
        # bitsandbytes rounds activations, and looks for outliers among all tokens of a pass
        assert_same_but_for_ties(*outputs, tie=0.1 if quantised is bitsandbytes_int8 else 1e-3)
    ids = prompts(1)["input_ids"]
    with torch.no_grad():
        assert not all(torch.equal(m(ids).logits, p(ids).logits) for m, p in zip(models, plain)), "not quantised"


def assert_same_but_for_ties(one, two, tie: float, prompt_length: int = 7) -> None:
    for row in range(len(one.sequences)):
        pairs = zip(one.sequences[row, prompt_length:].tolist(), two.sequences[row, prompt_length:].tolist())
        at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if at is not None:
            best, second = two.scores[at][row].topk(2).values
            assert best - second < tie, (row, at)
