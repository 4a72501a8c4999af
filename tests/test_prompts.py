"""Members with prompts of their own: each reads its prompt and then the same new tokens; one model can be several."""

import copy
import threading
from functools import partial

import oracle
import pytest
import test_vision
import torch
from covering import pairwise
from families import FAMILIES, PAD, VOCAB, members, prompts, tiny
from test_encoder_decoder import members as encoder_decoder_members
from test_sampling import PROMPTS, chi_square_p, counts, draw, small_members
from transformers import CompileConfig
from transformers.generation import RepetitionPenaltyLogitsProcessor

import hf_spec_ensemble as se
from hf_spec_ensemble import recipes
from hf_spec_ensemble.demo import FAMILY
from hf_spec_ensemble.members import runner
from hf_spec_ensemble.members.adapters import lock_of
from hf_spec_ensemble.members.cached import CachedMember
from hf_spec_ensemble.members.costs import pass_costs, remembered
from hf_spec_ensemble.members.prompts import PromptView, leading_padding


BOTH = [True, False]  # speculative or not
LENGTHS = (7, 4, 11)  # of the main model's prompt and the others' own
NEW = 12


def own_prompts(batch: int, n: int = 2, one_for_all: bool = False) -> list:
    """The prompts of n members in the oracle's form: the main model's, and others of different lengths."""
    rows = 1 if one_for_all else batch
    return [prompts(batch), *(prompts(rows, length, seed=length) for length in LENGTHS[1:n])]


def views(model, own) -> list:
    """The model, and members of it with prompts of their own."""
    return [model, *(se.with_prompt(model, **prompt) for prompt in own[1:])]


def generate(models, inputs, config, **kwargs):
    kwargs = dict(max_new_tokens=NEW, do_sample=False) | kwargs
    return models[0].generate(**inputs, assistant_model=models[1:], ensemble_config=config, **kwargs)


def expected(models, own, name, **kwargs):
    """The text by the formulas, without caches; `models` without views."""
    return oracle.greedy(models, own[0], name, NEW, prompts=own, **kwargs)[0].tolist()


# --- The text is that of the formulas -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family,name,batch,way",
    pairwise(
        dict(
            family=list(FAMILIES),
            name=["weighted", "product", "contrastive", "callable"],
            batch=[1, 3],
            way=["standard", "standard, together", "apart", "together", "together, with drafts"],
        )
    ),
)
def test_one_model_under_several_prompts(family, name, batch, way):
    n = 3 if 3 in oracle.METHODS[name].members else 2
    model, own = tiny(family, seed=1), own_prompts(batch, n)
    text = expected([model] * n, own, name)
    assert text != expected([model] * n, own[:1], name)  # prompts matter
    lengths = {} if "standard" in way else dict(num_assistant_tokens=2)
    share = way not in ("standard", "apart")
    config = oracle.config_of(name, n, speculative="standard" not in way, share_passes=share, **lengths)
    drafter = dict(drafter=members(family, 2)[1]) if "drafts" in way else {}
    assert generate(views(model, own), own[0], config, **drafter).tolist() == text


@pytest.mark.parametrize("speculative", BOTH)
def test_as_separate_copies_of_the_model_say(speculative):
    model, own = tiny("llama", seed=1), own_prompts(3, 3)
    config = oracle.config_of("product", 3, speculative=speculative)
    copies = [model, *(se.with_prompt(copy.deepcopy(model), **prompt) for prompt in own[1:])]
    for draws in (dict(do_sample=False), dict(do_sample=True, temperature=0.8, top_k=20)):
        texts = []
        for group in (views(model, own), copies):
            torch.manual_seed(0)
            texts.append(generate(group, own[0], config, **draws).tolist())
        assert texts[0] == texts[1]


@pytest.mark.parametrize("speculative", BOTH)
def test_different_models_of_which_some_have_their_own(speculative):
    models, own = members("qwen3", 3), own_prompts(3, 3)
    own[1] = None
    group = [models[0], models[1], se.with_prompt(models[2], **own[2])]
    config = oracle.config_of("weighted", 3, speculative=speculative)
    assert generate(group, own[0], config).tolist() == expected(models, own, "weighted")


@pytest.mark.parametrize("speculative", BOTH)
def test_one_prompt_for_all_rows_and_several_sequences_of_each(speculative):
    model = tiny("llama", seed=1)
    config = oracle.config_of("weighted", 3, speculative=speculative)
    own = own_prompts(3, 3, one_for_all=True)
    assert generate(views(model, own), own[0], config).tolist() == expected([model] * 3, own, "weighted")

    own = own_prompts(3, 3)
    torch.manual_seed(1)
    several = generate(views(model, own), own[0], config, do_sample=True, num_return_sequences=2).tolist()
    repeated = [{key: value.repeat_interleave(2, 0) for key, value in prompt.items()} for prompt in own]
    torch.manual_seed(1)
    assert several == generate(views(model, repeated), repeated[0], config, do_sample=True).tolist()


@pytest.mark.parametrize("speculative", BOTH)
def test_processors_see_the_main_models_text_alone(speculative):
    model, own = tiny("llama", seed=1), own_prompts(3)
    config = oracle.config_of("weighted", 2, speculative=speculative)
    text = expected([model] * 2, own, "weighted", processors=[RepetitionPenaltyLogitsProcessor(1.5)])
    assert generate(views(model, own), own[0], config, repetition_penalty=1.5).tolist() == text


@pytest.mark.parametrize("speculative", BOTH)
@pytest.mark.parametrize("lengths", [(1, 9), (9, 1), (1, 1)])
def test_prompts_of_a_single_token(lengths, speculative):
    model = tiny("llama", seed=1)
    own = [prompts(1, max(length, 2), seed=length) for length in lengths]
    own = [{key: value[:, -length:] for key, value in prompt.items()} for prompt, length in zip(own, lengths)]
    config = oracle.config_of("product", 2, speculative=speculative)
    assert generate(views(model, own), own[0], config).tolist() == expected([model] * 2, own, "product")


@pytest.mark.parametrize("family", ["lfm2", "bloom", "gpt_neox"])
def test_models_that_advance_in_step_or_take_no_positions(family):
    model = tiny(family, seed=1)
    own = [{key: value[:, 3:] for key, value in prompts(2, length).items()} for length in (8, 12)]
    assert own[0]["attention_mask"].all()
    own[1]["attention_mask"][:], own[1]["input_ids"][1, 0] = 1, 5
    config = oracle.config_of("weighted", 2, num_assistant_tokens=2)
    assert generate(views(model, own), own[0], config).tolist() == expected([model] * 2, own, "weighted")


@pytest.mark.parametrize("kind", ["model", "assistant of weight zero", "prompt_lookup"])
def test_drafters(kind):
    """One with a prompt of its own proposes more of what the others keep, or less: never another text."""
    model, draft, own = tiny("llama", seed=1), tiny("llama", seed=2, layers=1), own_prompts(3, 3)
    group, config, drafter = views(model, own[:2]), oracle.config_of("weighted", 2), {}
    text = expected([model] * 2, own[:2], "weighted")
    if kind == "model":
        drafter = dict(drafter=se.with_prompt(draft, **own[2]))
    elif kind == "prompt_lookup":
        drafter = dict(drafter=kind)
    else:
        group.append(se.with_prompt(draft, **own[2]))
        config, drafter = se.EnsembleConfig(weights=[*config.weights, 0.0]), dict(drafter=None)
    out = generate(group, own[0], config, **drafter, return_dict_in_generate=True)
    assert out.sequences.tolist() == text
    assert len(out.stats.forward_passes) == 3


def test_a_drafter_reads_its_own_prompt():
    """The main model, which drafts for another ensemble under the prompt that this has: all it proposes is right."""
    model, own = tiny("llama", seed=1), own_prompts(1)
    config = se.EnsembleConfig(method="product", weights=[1e-9, 1.0], alternate=False, num_assistant_tokens=4)
    alike, other = (se.with_prompt(model, **prompt) for prompt in (own[1], own[0]))
    rates = []
    for drafter in (alike, other):
        out = generate(views(model, own), own[0], config, drafter=drafter, return_dict_in_generate=True)
        rates.append(out.stats.acceptance[-1])
    assert rates[0] == 1.0 > rates[1]


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["maximal", "gumbel"])
@pytest.mark.parametrize("name", ["weighted", "product"])
def test_samples_follow_the_ensemble(name, coupling):
    model = small_members(1)[0]
    own = [torch.tensor(prompt) for prompt in PROMPTS]
    group = [model, *(se.with_prompt(model, prompt[None]) for prompt in own[1:])]
    config = oracle.config_of(name, 3, coupling=coupling, num_assistant_tokens=2)
    inputs = {"input_ids": own[0][None], "attention_mask": torch.ones(1, len(own[0]), dtype=int)}
    texts = draw(group, inputs, config, draws=10_000)  # members agree: a wrong residual is hard to see
    probs, wrong = (
        oracle.continuation_probs([model] * 3, own[0], name, 3, prompts=given).flatten() for given in (own, ())
    )
    observed = [counts(texts[0])]
    assert chi_square_p(observed, [probs]) > 1e-3
    assert chi_square_p(observed, [wrong]) < 1e-9


# --- Ways to run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculative", BOTH)
@pytest.mark.parametrize("compiled", [False, True])
def test_static_caches_have_room_for_a_longer_prompt(compiled, speculative):
    model, own = copy.deepcopy(tiny("llama", seed=1)), own_prompts(3, 3)
    own[2] = prompts(3, 60, seed=5)
    text = expected([model] * 3, own, "weighted")
    config = oracle.config_of("weighted", 3, speculative=speculative)
    way = dict(cache_implementation="static")
    if compiled:
        way["compile_config"] = CompileConfig(backend="eager", mode=None)
    for _ in range(2):  # the second call finds the first one's graphs and caches
        assert generate(views(model, own), own[0], config, **way).tolist() == text


def test_slots_suffice_for_a_members_own_text(monkeypatch):
    monkeypatch.setattr(runner, "WIDTHS", (1,))
    running = runner.Running(max_length=20, static=True)
    model = tiny("llama")
    assert [running.runner(model, 1, longest=longest).slots for longest in (None, 10, 50)] == [21, 21, 51]


@pytest.mark.parametrize("by_hand", BOTH)
@pytest.mark.parametrize("own_rows", ["each", "one", "alike"])
def test_beams(own_rows, by_hand):
    """Each beam's caches follow it, also where rows read the same main prompt and different ones of their own."""
    model, own = tiny("llama", seed=1), own_prompts(3, 2, one_for_all=own_rows == "one")
    if own_rows == "alike":
        own[0] = {key: value[:1].repeat(3, 1) for key, value in own[0].items()}
    group, search = views(model, own), dict(num_beams=3, do_sample=False, max_new_tokens=6)

    def searched(models, inputs):
        config = oracle.config_of("weighted raw logits", 2, speculative=False)
        if not by_hand:
            return generate(models, inputs, config, **search)
        processor = se.EnsembleLogitsProcessor(models[0], models[1:], config)
        return models[0].generate(**inputs, logits_processor=[processor], **search)

    together = searched(group, own[0])
    for row in range(3):
        alone = [{key: value[row % len(value)][None] for key, value in prompt.items()} for prompt in own]
        alone = [{key: value[:, prompt["attention_mask"][0].bool()] for key, value in prompt.items()}
                 for prompt in alone]  # fmt: skip
        wanted = searched(views(model, alone), alone[0])[0, alone[0]["input_ids"].shape[1] :].tolist()
        got = together[row, own[0]["input_ids"].shape[1] :].tolist()
        assert got[: len(wanted)] == wanted and not any(got[len(wanted) :])


def test_exhaustive_beam_search_finds_the_most_probable_text():
    model = small_members(1)[0].double()
    own = [torch.tensor([5, 3, 4]), torch.tensor([6])]
    probs = oracle.continuation_probs([model] * 2, own[0], "weighted", 3, prompts=own)
    config = oracle.config_of("weighted", 2, speculative=False)
    group, inputs = [model, se.with_prompt(model, own[1][None])], {"input_ids": own[0][None]}
    search = dict(num_beams=len(probs) ** 2, length_penalty=0.0, early_stopping=False, max_new_tokens=3)
    text = generate(group, inputs, config, **search)[0, 3:].tolist()
    assert probs[tuple(text + [PAD] * (3 - len(text)))] == probs.max()


def test_by_hand_and_again_and_in_transformers_assisted_loop():
    """Assisted decoding shows processors shorter texts again, behind the same prompt."""
    model, own = tiny("llama", seed=1), own_prompts(1, 3)
    text = expected([model] * 3, own, "product")
    config = oracle.config_of("product", 3)
    processor = se.EnsembleLogitsProcessor(model, views(model, own)[1:], config)
    settings = dict(do_sample=False, max_new_tokens=NEW, logits_processor=[processor])
    for _ in range(2):
        assert model.generate(**own[0], **settings).tolist() == text
    assistant = tiny("llama", seed=2, layers=1)
    assert model.generate(**own[0], **settings, assistant_model=assistant).tolist() == text


@pytest.mark.parametrize("speculative", BOTH)
def test_adapters_have_prompts_too(speculative):
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(tiny("llama", seed=1))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False), "maths")
    model.double().eval()
    own = own_prompts(3)
    config = oracle.config_of("product", 2, speculative=speculative)
    texts = []
    for name in ("maths", None):
        either = (se.with_prompt(se.with_adapter(model, name), **own[1]),
                  se.with_adapter(se.with_prompt(model, **own[1]), name))  # fmt: skip
        assert lock_of(either[0]) is lock_of(model)
        one, two = (generate([model, view], own[0], config).tolist() for view in either)
        assert one == two
        texts.append(one)
    assert texts[0] == generate(views(model, own), own[0], config).tolist() != texts[1]  # "maths" is active


def test_several_threads_share_a_model():
    model, own = tiny("llama", seed=1), own_prompts(3, 3)
    text, config, texts = expected([model] * 3, own, "weighted"), oracle.config_of("weighted", 3), []
    threads = [
        threading.Thread(target=lambda: texts.append(generate(views(model, own), own[0], config).tolist()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert texts == [text] * 3


@pytest.mark.parametrize("family", test_vision.MODELS)
@pytest.mark.parametrize("speculative", BOTH)
def test_a_member_that_does_not_see_the_image(family, speculative):
    """As in visual contrastive decoding: the main model reads an image and the question, the other the question."""
    model, blind = test_vision.members(family)[0], prompts(1, 5)
    inputs = test_vision.inputs_of(family, 1)
    config = oracle.config_of("product", 2, speculative=speculative)
    copies = [model, se.with_prompt(copy.deepcopy(model), **blind)]
    returned = dict(return_dict_in_generate=True, output_scores=True)
    one, two, seeing = (
        generate(group, inputs, config, **returned) for group in (views(model, [None, blind]), copies, [model, model])
    )
    assert one.sequences.tolist() == two.sequences.tolist()
    assert not torch.allclose(one.scores[0], seeing.scores[0])


# --- What members share, and what they have of their own ------------------------------------------------------------


@pytest.mark.parametrize("speculative", BOTH)
def test_weights_are_one_and_caches_as_many_as_contexts(speculative, monkeypatch):
    """Nothing is copied but caches, of which every member has one that is as long as its own text."""
    model, own, held = copy.deepcopy(tiny("llama", seed=1)), own_prompts(1, 3), []
    close = CachedMember.close

    def closing(member):
        held.append(member)
        close(member)

    monkeypatch.setattr(CachedMember, "close", closing)
    before = {parameter.data_ptr() for parameter in model.parameters()}
    group = views(model, own)
    config = oracle.config_of("weighted", 3, speculative=speculative, share_passes=False)
    generate(group, own[0], config, eos_token_id=None)
    assert {parameter.data_ptr() for parameter in model.parameters()} == before
    assert all(view.model is model for view in group[1:])
    assert all(member.model is model for member in held)
    caches = {id(member.cache): member.cache for member in held}
    assert len(caches) == len(held) == (3 if speculative else 2)  # the main model's is `generate()`'s there
    keys = {layer.keys.data_ptr() for cache in caches.values() for layer in cache.layers}
    assert len(keys) == len(held) * model.config.num_hidden_layers
    assert {member.prompt_length for member in held} == {len(p["input_ids"][0]) for p in own[-len(held) :]}


def test_costs_and_readings_are_the_models(monkeypatch):
    model, own = copy.deepcopy(tiny("llama", seed=1)), own_prompts(1, 3)
    config = oracle.config_of("weighted", 3, num_assistant_tokens=1, share_passes=False)
    generate(views(model, own), own[0], config)
    assert pass_costs(model).measured(1, 1) is not None
    readings = remembered([model], "readings", dict)
    assert len(readings) == 1
    generate(views(model, own), own[0], config)
    assert len(readings) == 1


def test_the_trace_names_members_with_prompts():
    model, own = tiny("llama", seed=1), own_prompts(1, 3)
    config = oracle.config_of("weighted", 3, trace=True)
    out = generate(views(model, own), own[0], config, drafter=None, return_dict_in_generate=True)
    names = out.trace.authors
    assert len(set(names)) == 3 and [("own prompt" in name) for name in names] == [False, True, True]
    assert out.trace.prompts[0] == own[0]["input_ids"][0, -len(out.trace.prompts[0]) :].tolist()


# --- Recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family,scale,speculative",
    pairwise(dict(family=["llama", "gpt2", "gemma3"], scale=[0.5, 1.5, 3.0], speculative=BOTH)),
)
def test_guidance_is_that_of_transformers(family, scale, speculative):
    model, negative = tiny(family, seed=1), prompts(1, 4, seed=9)
    texts = set()
    for seed in range(4):
        inputs, settings = prompts(1, seed=seed), dict(do_sample=False, max_new_tokens=20)
        theirs = model.generate(
            **inputs, **settings, guidance_scale=scale, negative_prompt_ids=negative["input_ids"], use_cache=True
        )
        recipe = recipes.guidance(model, negative, scale, speculative=speculative)
        assert model.generate(**inputs, **settings, **recipe).tolist() == theirs.tolist()
        texts.add(tuple(theirs[0].tolist()) == tuple(model.generate(**inputs, **settings)[0].tolist()))
    assert False in texts  # guidance matters


def test_recipes_are_their_formulas():
    model, other, third = members("llama", 3)
    own = own_prompts(1, 3)
    others = own[1:]
    log_softmax = torch.log_softmax

    def text(recipe, log_r, models, given):
        method = oracle.Method(None, lambda logits, process: process(log_r(logits)))
        wanted = oracle.greedy(models, own[0], method, NEW, prompts=given)[0].tolist()
        assert model.generate(**own[0], **recipe, max_new_tokens=NEW, do_sample=False).tolist() == wanted

    pair, trio = [model] * 2, [model] * 3
    guided = recipes.guidance(model, others[0], 2.0)
    text(guided, lambda x: log_softmax(x[1] + 2.0 * (x[0] - x[1]), -1), pair, own[:2])
    aware = recipes.context_aware(model, others[0], alpha=0.7)
    text(aware, lambda x: log_softmax(1.7 * x[0] - 0.7 * x[1], -1), pair, own[:2])
    retrieved = recipes.replug(model, others, [2.0, 1.0, 0.5], temperature=0.5)
    weights = (torch.tensor([2.0, 1.0, 0.5]).double() / 0.5).softmax(0)[:, None, None]
    text(retrieved, lambda x: (weights * x.softmax(-1)).sum(0).log(), trio, own)
    text(recipes.prompt_ensemble(model, others), lambda x: x.softmax(-1).mean(0).log(), trio, own)
    product = recipes.prompt_ensemble(model, others, method="product")
    text(product, lambda x: log_softmax(x.mean(0), -1), trio, own)
    tuned = recipes.proxy_tuning(other, third)
    text(tuned, lambda x: log_softmax(x[0] + x[1] - x[2], -1), [model, other, third], ())


def test_recipes_take_settings_and_say_what_is_wrong():
    model, own = tiny("llama"), own_prompts(1, 3)
    config = recipes.guidance(model, own[1], speculative=False, check_members=False)["ensemble_config"]
    assert not config.speculative and not config.check_members
    with pytest.raises(ValueError, match="one entry for the main model's document and one for each of the 2"):
        recipes.replug(model, own[1:], [1.0, 2.0])
    with pytest.raises(ValueError, match="`temperature` must be above 0, but is 0"):
        recipes.replug(model, own[1:], [1.0, 2.0, 3.0], temperature=0)
    for recipe in (recipes.prompt_ensemble, partial(recipes.replug, scores=[1.0, 2.0])):
        with pytest.raises(TypeError, match=r"must be a list of prompts, but is one prompt: give `\[prompt\]`"):
            recipe(model, own[1])


# --- Errors ---------------------------------------------------------------------------------------------------------


IDS = torch.tensor([[3, 4, 5]])
WRONG = {
    "no ids": (dict(), ValueError, "needs `input_ids`"),
    "a list": (dict(input_ids=[[3, 4]]), TypeError, "must be a tensor, but is a list"),
    "floats": (dict(input_ids=torch.tensor([[3.0]])), TypeError, "whole numbers, but its dtype is torch.float32"),
    "one row without its dimension": (dict(input_ids=IDS[0]), ValueError, r"\[rows, tokens\], but have \(3,\)"),
    "nothing": (dict(input_ids=IDS[:, :0]), ValueError, r"is empty: its ids have the shape \(1, 0\)"),
    "all hidden": (dict(input_ids=IDS, attention_mask=0 * IDS), ValueError, "prompt of row 0 is empty"),
    "a short mask": (dict(input_ids=IDS, attention_mask=IDS[:, 1:]), ValueError, r"\(1, 3\), but has \(1, 2\)"),
    "a mask that is none": (dict(input_ids=IDS, attention_mask=[[1]]), TypeError, "`attention_mask` must be a tensor"),
    "an unknown token": (dict(input_ids=IDS + VOCAB), ValueError, f"holds token {3 + VOCAB}, but .* {VOCAB} tokens"),
    "a negative token": (dict(input_ids=-IDS), ValueError, "holds token -3"),
    "images": (dict(input_ids=IDS, pixel_values=torch.ones(1)), ValueError, "pixel_values.* `input_ids` and"),
}


@pytest.mark.parametrize("case", WRONG)
def test_prompts_that_are_none(case):
    given, kind, said = WRONG[case]
    with pytest.raises(kind, match=said):
        se.with_prompt(tiny("llama"), **given)


def test_models_that_have_no_prompts_of_their_own():
    with pytest.raises(TypeError, match="loaded transformers model, but was given a str: 'gpt2'"):
        se.with_prompt("gpt2", IDS)
    with pytest.raises(ValueError, match="is an encoder-decoder model"):
        se.with_prompt(encoder_decoder_members("t5")[0], IDS)
    with pytest.raises(ValueError, match="has a prompt of its own already"):
        se.with_prompt(se.with_prompt(tiny("llama"), IDS), IDS)
    model = test_vision.members("llava")[0]
    with pytest.raises(ValueError, match=f"holds token {test_vision.IMAGE}, the `image_token_i"):
        se.with_prompt(model, IDS * 0 + test_vision.IMAGE)
    se.with_prompt(tiny("llama"), IDS, pixel_values=None)


@pytest.mark.parametrize("speculative", BOTH)
def test_the_number_of_rows_is_checked_before_the_first_pass(speculative):
    model, inputs = copy.deepcopy(tiny("llama")), prompts(4)
    model.register_forward_pre_hook(lambda *_: pytest.fail("there was a pass"))
    config = se.EnsembleConfig(speculative=speculative)
    for kwargs in ({}, dict(num_return_sequences=2, do_sample=True)):
        for role in ("assistant_model", "drafter"):
            if role == "drafter" and not speculative:
                continue
            view = se.with_prompt(model, **prompts(2))
            roles = dict(assistant_model=model) | {role: view}
            with pytest.raises(ValueError, match="was given 2 prompts, but the call has 4 rows"):
                model.generate(**inputs, **roles, ensemble_config=config, max_new_tokens=2, **kwargs)


def test_by_hand_the_number_of_rows_must_divide():
    model = tiny("llama")
    processor = se.EnsembleLogitsProcessor(model, se.with_prompt(model, **prompts(2)), se.EnsembleConfig())
    with pytest.raises(ValueError, match="was given 2 prompts, but the call has 3 rows"):
        model.generate(**prompts(3), logits_processor=[processor], max_new_tokens=2)


def test_a_view_is_no_main_model():
    model = tiny("llama")
    view = se.with_prompt(model, IDS)
    with pytest.raises(TypeError, match="serves as an assistant or drafter, not as the main model"):
        view.generate(IDS, assistant_model=model, ensemble_config=se.EnsembleConfig())
    with pytest.raises(TypeError, match="The main model reads the prompt of the call"):
        se.EnsembleLogitsProcessor(view, model, se.EnsembleConfig())


def test_a_view_is_not_saved(tmp_path):
    members = [FAMILY / "reader", se.with_prompt(tiny("llama"), IDS)]
    with pytest.raises(ValueError, match="has a prompt of its own, which belongs to a call and is not saved"):
        se.save_ensemble(tmp_path / "new", members, se.EnsembleConfig())
    assert not (tmp_path / "new").exists()


def test_a_view_is_copied_as_it_is():
    view = copy.deepcopy(se.with_prompt(tiny("llama"), IDS))
    assert isinstance(view, PromptView) and view.prompt.input_ids.tolist() == IDS.tolist()


@pytest.mark.parametrize("speculative", BOTH)
def test_padding_on_the_wrong_side_is_read_as_generate_reads_it(speculative, caplog):
    """With its warning. The other has nearly no weight, so that the text is the one of this prompt alone."""
    model = tiny("llama", seed=1)
    right = dict(input_ids=torch.tensor([[5, 6, PAD]]), attention_mask=torch.tensor([[1, 1, 0]]))
    alone = model.generate(**right, do_sample=False, max_new_tokens=NEW)[0, 3:].tolist()
    config = se.EnsembleConfig(method="product", weights=[1e-9, 1.0], speculative=speculative)
    group = [model, se.with_prompt(model, **right)]
    assert "pad on the left" in caplog.text
    assert generate(group, prompts(1), config)[0, 7:].tolist() == alone


def test_padding_is_told_from_the_tokens_where_there_is_no_mask():
    model = tiny("llama")
    ids = torch.tensor([[PAD, PAD, 5, PAD], [3, 4, 5, 6]])
    assert leading_padding(model, ids).tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert se.with_prompt(model, ids).prompt.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
