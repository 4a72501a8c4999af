"""Members that share weights as rows of one pass: the same texts, fewer passes, one copy of the weights."""

import copy
import json

import oracle
import pytest
import torch
from covering import pairwise
from families import members, prompts, tiny
from test_prompts import NEW, expected, generate, own_prompts, views
from test_sampling import PROMPTS, chi_square_p, counts, draw, small_members

import hf_spec_ensemble as se
from hf_spec_ensemble.members import rows
from hf_spec_ensemble.members.cached import CachedMember
from hf_spec_ensemble.members.costs import PassCosts, pass_costs


TOGETHER, APART = dict(share_passes=True), dict(share_passes=False)
DRAWS = {"greedy": dict(do_sample=False), "sampled": dict(do_sample=True, temperature=0.8, top_k=20)}


def output(models, inputs, config, **kwargs):
    return generate(models, inputs, config, return_dict_in_generate=True, **kwargs)


def long_prompts(batch: int, n: int, common: int, alike: bool = True) -> list:
    """Prompts of n members that begin with the same tokens, those of other rows with others unless they are alike."""
    own = own_prompts(batch, n)
    begin = prompts(1 if alike else batch, common + 1, seed=50)["input_ids"][:, :common].expand(batch, -1)
    begin = begin.masked_fill(begin == 0, 5)
    whole = []
    for prompt in own:
        ids = prompt["input_ids"].masked_fill(prompt["attention_mask"] == 0, 7)
        ids = torch.cat([begin, ids], dim=1)
        whole.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return whole


# --- Exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "drafter,batch,draw,name",
    pairwise(
        dict(
            drafter=[None, "prompt_lookup", "model", "view"],
            batch=[1, 3],
            draw=list(DRAWS),
            name=["weighted", "product", "callable"],
        )
    ),
)
def test_as_members_with_passes_of_their_own(drafter, batch, draw, name):
    """Token for token, also sampled: the same noise. One pass brings a token of each row, a drafter's more."""
    model, draft = members("llama", 2)
    own = own_prompts(batch, 3)
    chosen = {"model": draft, "view": se.with_prompt(draft, **own[2])}.get(drafter, drafter)
    outs = []
    for way in (TOGETHER, APART):
        torch.manual_seed(0)
        config = oracle.config_of(name, 3, num_assistant_tokens=3, **way)
        outs.append(output(views(model, own), own[0], config, drafter=chosen, **DRAWS[draw]))
    one, other = outs
    assert one.sequences.tolist() == other.sequences.tolist()
    assert one.stats.shared == [[0, 1, 2]] and other.stats.shared == []
    assert one.stats.forward_passes[1:3] == [0, 0]
    steps = one.sequences.shape[1] - own[0]["input_ids"].shape[1]
    assert one.stats.forward_passes[0] <= steps
    if (drafter, draw, name) == ("model", "greedy", "weighted"):
        assert one.stats.forward_passes[0] < steps and one.stats.accepted[-1] > 0
    if drafter is None:
        assert one.stats.forward_passes[0] == steps and not any(one.stats.proposed)


@pytest.mark.parametrize("draws,batch", [("greedy", 3), ("sampled", 1)])
@pytest.mark.parametrize("name", ["weighted", "product"])
def test_the_standard_ensemble_shares_too(name, draws, batch):
    """One pass a token instead of three, and the text of separate passes, whatever is returned with it."""
    model, own = copy.deepcopy(tiny("llama", seed=1)), own_prompts(batch, 3)
    returned = dict(output_scores=True, output_logits=True, **DRAWS[draws])
    outs, calls = [], []
    for way in (TOGETHER, APART):
        torch.manual_seed(0)
        config = oracle.config_of(name, 3, speculative=False, check_members=False, **way)
        hook = model.register_forward_hook(lambda *_: calls.append(len(outs)))
        outs.append(output(views(model, own), own[0], config, **returned))
        hook.remove()
    one, other = outs
    assert one.sequences.tolist() == other.sequences.tolist()
    steps = one.sequences.shape[1] - own[0]["input_ids"].shape[1]
    assert (calls.count(0), calls.count(1)) == (steps, 3 * steps)
    assert one.stats.forward_passes == [steps, 0, 0] and one.stats.shared == [[0, 1, 2]]
    assert one.stats.row_tokens == other.stats.row_tokens and one.stats.owned == other.stats.owned
    assert other.stats.shared == [] and other.stats.forward_passes == [steps] * 3
    for kind in ("scores", "logits"):
        for mine, theirs in zip(getattr(one, kind), getattr(other, kind), strict=True):
            torch.testing.assert_close(mine.float(), theirs.float())  # transformers' loop goes by float32


def test_a_standard_ensemble_that_stays_apart_draws_as_it_would(monkeypatch):
    """What is tried before the decision costs no random numbers, and leaves the caller's cache as it was."""
    model, own, texts = tiny("gemma3", seed=1), own_prompts(2, 2), []
    monkeypatch.setattr(
        "hf_spec_ensemble.decoding.sharing._seconds", lambda call, roles, readers, learned: -len(readers.groups)
    )
    for share in ("auto", False):
        torch.manual_seed(0)
        config = oracle.config_of("weighted", 2, speculative=False, share_passes=share)
        out = output(views(model, own), own[0], config, **DRAWS["sampled"])
        assert not out.stats.shared
        assert not any(getattr(layer, "record_past", False) for layer in out.past_key_values.layers)
        texts.append(out.sequences.tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("why", ["beams", "coupling maximal"])
def test_what_a_standard_ensemble_does_not_share(why):
    model, own = tiny("llama", seed=1), own_prompts(1, 2)
    kwargs = dict(num_beams=2) if why == "beams" else dict(do_sample=True)
    coupling = {} if why == "beams" else dict(coupling="maximal")
    said, texts = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_spec_ensemble.decoding.sharing.warn_once", said.append)
        for share in (True, False):
            torch.manual_seed(0)
            config = oracle.config_of("weighted", 2, speculative=False, share_passes=share, **coupling)
            texts.append(generate(views(model, own), own[0], config, **kwargs).tolist())
    assert texts[0] == texts[1] and len(said) == 1 and "take turns" in said[0]


def test_the_same_model_twice():
    model, inputs = tiny("llama", seed=1), prompts(3)
    config = oracle.config_of("weighted", 2, share_passes=True)
    out = output([model, model], inputs, config)
    assert out.stats.shared == [[0, 1]]
    assert out.sequences.tolist() == expected([model] * 2, [inputs], "weighted")


@pytest.mark.parametrize(
    "name,batch,order",
    pairwise(dict(name=["weighted", "product"], batch=[1, 3], order=["group first", "group last", "between", "two"])),
)
def test_groups_among_other_members(name, batch, order):
    """A group proposes too, where members outside have to score what follows."""
    one, two = members("qwen3", 2)
    models = {
        "group first": [one, one, two], "group last": [one, two, two], "between": [one, two, one],
        "two": [one, two, one, two],
    }[order]  # fmt: skip
    own = [*own_prompts(batch, 3), prompts(batch, 5, seed=3)]
    own = own[: len(models)]
    group = [models[0], *(se.with_prompt(model, **prompt) for model, prompt in zip(models[1:], own[1:]))]
    out = output(group, own[0], oracle.config_of(name, len(models), share_passes=True, num_assistant_tokens=2))
    assert out.sequences.tolist() == expected(models, own, name)
    shared = {"group first": [[0, 1]], "group last": [[1, 2]], "between": [[0, 2]], "two": [[0, 2], [1, 3]]}[order]
    assert out.stats.shared == shared
    assert sum(out.stats.proposed) > 0
    assert all(not out.stats.forward_passes[i] for other in shared for i in other[1:])


def test_a_member_of_weight_zero_drafts_for_a_group():
    model, draft = members("llama", 2)
    own = own_prompts(3, 2)
    config = se.EnsembleConfig(weights=[0.6, 0.4, 0.0], share_passes=True, num_assistant_tokens=2)
    out = output([*views(model, own), draft], own[0], config)
    assert out.sequences.tolist() == expected([model] * 2, own, "weighted") and out.stats.accepted[2] > 0


@pytest.mark.parametrize("family", ["bloom", "gpt_neox", "lfm2"])
def test_models_that_count_slots_or_keep_a_state(family):
    """Share where padding changes nothing, else take turns; the text is right in any case."""
    model = tiny(family, seed=1)
    own = [{key: value[:, 3:] for key, value in prompts(2, length).items()} for length in (8, 12)]
    own[1]["attention_mask"][:], own[1]["input_ids"][1, 0] = 1, 5
    config = oracle.config_of("weighted", 2, num_assistant_tokens=2, share_passes=True)
    assert generate(views(model, own), own[0], config).tolist() == expected([model] * 2, own, "weighted")


@pytest.mark.parametrize("draws", list(DRAWS))
def test_scores_logits_and_the_cache_are_those_of_separate_members(draws):
    model, own = tiny("llama", seed=1), own_prompts(3, 3)
    returned = dict(output_scores=True, output_logits=True, **DRAWS[draws])
    outs = []
    for way in (TOGETHER, APART):
        torch.manual_seed(1)
        outs.append(output(views(model, own), own[0], oracle.config_of("weighted", 3, **way), **returned))
    one, other = outs
    for name in ("scores", "logits"):
        for mine, theirs in zip(getattr(one, name), getattr(other, name), strict=True):
            torch.testing.assert_close(mine, theirs)
    held = one.past_key_values.get_seq_length()
    for mine, theirs in zip(one.past_key_values.layers, other.past_key_values.layers, strict=True):
        hidden = own[0]["attention_mask"] == 0
        for a, b in ((mine.keys, theirs.keys[:, :, :held]), (mine.values, theirs.values[:, :, :held])):
            assert a.shape == (3, 2, held, 8)
            for row in range(3):
                seen = int(hidden[row].sum())
                torch.testing.assert_close(a[row, :, seen:], b[row, :, seen:])


@pytest.mark.parametrize(
    "name,coupling,kind,draws",
    [
        ("weighted", "ancestral", "one group", 8_000),
        ("product", "gumbel", "one group", 8_000),
        ("product", "maximal", "with drafts", 5_000),
        ("weighted", "maximal", "two groups", 5_000),
        ("weighted", "ancestral", "two groups", 5_000),
    ],
)
def test_samples_follow_the_ensemble(name, coupling, kind, draws):
    model, other = small_members(2)
    own = [torch.tensor(prompt) for prompt in PROMPTS]
    models = [model, model, other if kind == "two groups" else model]
    group = [model, *(se.with_prompt(one, prompt[None]) for one, prompt in zip(models[1:], own[1:]))]
    config = oracle.config_of(name, 3, coupling=coupling, num_assistant_tokens=2, share_passes=True)
    inputs = {"input_ids": own[0][None], "attention_mask": torch.ones(1, len(own[0]), dtype=int)}
    texts = draw(group, inputs, config, draws, **(dict(drafter=other) if kind == "with drafts" else {}))
    probs, wrong = (oracle.continuation_probs(models, own[0], name, 3, prompts=given).flatten() for given in (own, ()))
    assert chi_square_p([counts(texts[0])], [probs]) > 1e-3
    assert chi_square_p([counts(texts[0])], [wrong]) < 1e-9


def test_a_trace_has_the_passes_of_a_group_under_its_first_member():
    model, own = tiny("llama", seed=1), long_prompts(2, 3, common=40)
    config = oracle.config_of("weighted", 3, share_passes=True, trace=True)
    out = output(views(model, own), own[0], config, drafter="prompt_lookup", do_sample=True)
    assert out.trace.forward_passes == sum(out.stats.forward_passes) == out.stats.forward_passes[0]
    assert {run.author for run in out.trace.passes if run.tokens} == {0}
    assert {token.owner for token in out.trace.tokens} <= {0, 1, 2}
    assert json.loads(out.trace.to_json())["authors"][3] == "prompt_lookup"
    assert out.stats.owned[3] == 0 and sum(out.stats.owned) == out.stats.new_tokens


# --- What prompts have in common ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_common_beginning_is_read_once(family, batch, alike):
    model, own, read = copy.deepcopy(tiny(family, seed=1)), long_prompts(batch, 3, common=40, alike=alike), []
    text = expected([model] * 3, own, "weighted")
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    out = output(views(model, own), own[0], oracle.config_of("weighted", 3, share_passes=True))
    hook.remove()
    assert out.sequences.tolist() == text
    begins = 1 if alike else batch
    assert out.stats.prompt_tokens_saved == (3 * batch - begins) * 40
    assert begins * 40 in read and 3 * batch * 11 in read  # then the rest, padded to the longest
    prompt, config = go_on(out, own[0]), oracle.config_of("weighted", 3, **APART)
    again = output(views(model, own), prompt, config, past_key_values=out.past_key_values)
    assert again.sequences.tolist() == output(views(model, own), prompt, config).sequences.tolist()


def go_on(out, inputs):
    """The text of a call and one more token, as the prompt of another one."""
    ids = torch.nn.functional.pad(out.sequences, (0, 1), value=9)
    more = torch.ones(len(ids), ids.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], more], dim=1)}


@pytest.mark.parametrize("family,common", [("gemma3", 40), ("llama", 5)])
def test_a_common_beginning_that_is_read_with_the_rest(family, common):
    """Sliding windows count the padding behind it; and a short one is not worth a pass."""
    model, own = tiny(family, seed=1), long_prompts(2, 3, common)
    out = output(views(model, own), own[0], oracle.config_of("product", 3, share_passes=True))
    assert out.sequences.tolist() == expected([model] * 3, own, "product")
    assert out.stats.shared == [[0, 1, 2]] and out.stats.prompt_tokens_saved == 0


def test_a_second_call_goes_on_from_the_cache_of_a_shared_pass():
    """The main model's prompt is shorter than the longest, and its rows are padded."""
    model, own = tiny("llama", seed=1), own_prompts(3, 3)
    first = output(views(model, own), own[0], oracle.config_of("weighted", 3, share_passes=True), eos_token_id=None)
    prompt = go_on(first, own[0])
    config = oracle.config_of("weighted", 3, share_passes=False)
    cached = output(views(model, own), prompt, config, past_key_values=copy.deepcopy(first.past_key_values))
    assert cached.sequences.tolist() == output(views(model, own), prompt, config).sequences.tolist()
    config = oracle.config_of("weighted", 3, share_passes=True)
    out = output(views(model, own), prompt, config, past_key_values=first.past_key_values)
    assert out.sequences.tolist() == cached.sequences.tolist()
    assert out.stats.shared == [[1, 2]]  # a caller's cache is the main model's alone


# --- Memory ---------------------------------------------------------------------------------------------------------


def test_contexts_cost_caches_and_no_weights(monkeypatch):
    model, own, held = copy.deepcopy(tiny("llama", seed=1)), own_prompts(2, 3), []
    close = CachedMember.close
    monkeypatch.setattr(CachedMember, "close", lambda member: (held.append(member), close(member)))
    before = {parameter.data_ptr() for parameter in model.parameters()}
    config = oracle.config_of("weighted", 3, share_passes=True, num_assistant_tokens=1)
    generate(views(model, own), own[0], config, eos_token_id=None)
    assert {parameter.data_ptr() for parameter in model.parameters()} == before
    (member,) = held
    assert member.model is model
    longest = max(len(prompt["input_ids"][0]) for prompt in own) + NEW - 1
    assert {tuple(layer.keys.shape) for layer in member.cache.layers} == {(3 * 2, 2, longest, 8)}


# --- Who decides ----------------------------------------------------------------------------------------------------


def told(model, batch: int, one_by_one: float, together: float) -> None:
    """Lets the model's passes cost so much, those of one member's rows and those of two members'."""
    for many, seconds in ((batch, one_by_one), (2 * batch, together)):
        for width in (1, 2, 4, 8, 16):
            for _ in range(9):
                pass_costs(model).add(many, width, seconds)


@pytest.mark.parametrize("together,shares", [(1.1, True), (4.0, False)])
@pytest.mark.parametrize("name,draws", [("product", "greedy"), ("weighted", "sampled"), ("weighted", "greedy")])
def test_auto_goes_by_what_passes_cost(name, draws, together, shares):
    """A sampled mixture takes one pass of its owner a token, so that its rows together must cost less than one."""
    model, own = copy.deepcopy(tiny("llama", seed=1)), own_prompts(1, 2)
    told(model, 1, 1.0, 0.9 if shares and (name, draws) == ("weighted", "sampled") else together)
    out = output(views(model, own), own[0], oracle.config_of(name, 2), **DRAWS[draws])
    assert out.stats.shared == ([[0, 1]] if shares else [])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["group", "among others", "standard"])
def test_prompts_of_unequal_length_are_read_apart(family, batch, kind):
    """Their caches are laid side by side: no token of padding is read but within a member's own rows."""
    model, other, read = copy.deepcopy(tiny(family, seed=1)), tiny(family, seed=2), []
    own = [prompts(batch), prompts(batch, 70, seed=5), prompts(1, 5, seed=3)]
    models, group = [model] * 3, views(model, own)
    if kind == "among others":  # the other model's proposals may be there before the prompts are read
        models, group = [model, model, other], [*group[:2], se.with_prompt(other, **own[2])]
    fields = dict(speculative=False) if kind == "standard" else dict(num_assistant_tokens=2)
    config = oracle.config_of("product", 3, share_passes=True, **fields)
    output(group, own[0], config, max_new_tokens=1)  # which tries how the model reads
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    out = output(group, own[0], config)
    hook.remove()
    assert out.sequences.tolist() == expected(models, own, "product")
    shared = 2 if kind == "among others" else 3
    assert out.stats.shared == [list(range(shared))]
    assert read[:shared] == [batch * length for length in (7, 70, 5)[:shared]] and max(read) == batch * 70
    prompt, config = go_on(out, own[0]), oracle.config_of("product", 3, **APART)
    again = output(group, prompt, config, past_key_values=out.past_key_values)
    assert again.sequences.tolist() == output(group, prompt, config).sequences.tolist()


@pytest.mark.parametrize("alike", [True, False])
def test_auto_learns_how_often_proposals_are_kept(alike, monkeypatch):
    """Of a first call nothing is known. Members whose proposals mostly fall share passes in a later one."""
    model, own = copy.deepcopy(tiny("llama", seed=1)), own_prompts(1, 2)
    own[1] = own[0] if alike else own[1]
    told(model, 1, 1.0, 1.5)
    monkeypatch.setattr(PassCosts, "add", lambda *_: None)  # so that the costs stay those
    config = se.EnsembleConfig(method="product", weights=[3.0, -2.0])
    shared = []
    for _ in range(4):
        out = output(views(model, own), own[0], config, drafter=None, eos_token_id=[10_000])
        shared.append(out.stats.shared)
    assert shared[0] == [] and shared[-1] == ([] if alike else [[0, 1]])


@pytest.mark.parametrize("new_tokens,shares", [(1, False), (60, True)])
def test_padding_of_a_short_prompt_is_counted(new_tokens, shares):
    """Together, two tokens are read as thirty are; apart, every new token takes two passes."""
    model = copy.deepcopy(tiny("llama", seed=1))
    for count in (1, 2):
        for width in (1, 2, 4, 8, 16):
            for _ in range(9):
                pass_costs(model).add(count, width, 0.5 + 0.05 * count * width)
    inputs, short = prompts(1, length=30), torch.tensor([[5, 6]])
    config = se.EnsembleConfig(method="product", weights=[1.5, -0.5])
    out = model.generate(
        **inputs, assistant_model=se.with_prompt(model, input_ids=short), ensemble_config=config, drafter=None,
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=[10_000], return_dict_in_generate=True,
    )  # fmt: skip
    assert out.stats.shared == ([[0, 1]] if shares else [])


def test_costs_are_measured_before_the_first_decision_alone():
    model, own, shapes = copy.deepcopy(tiny("llama", seed=1)), own_prompts(1, 3), []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: shapes.append(tuple(args[0].shape)))
    config = oracle.config_of("weighted", 3)
    counted = []
    for _ in range(2):
        shapes.clear()
        out = output(views(model, own), own[0], config)
        counted.append(len(shapes) - sum(out.stats.forward_passes))
    hook.remove()
    assert counted[0] > counted[1] == 0
    assert pass_costs(model).is_known(1, 1) and pass_costs(model).is_known(3, 1)


def test_measuring_draws_nothing_and_changes_no_text():
    own, texts = own_prompts(1, 2), []
    for share in ("auto", True, False):
        model = copy.deepcopy(tiny("llama", seed=1))
        torch.manual_seed(3)
        texts.append(generate(views(model, own), own[0], oracle.config_of("product", 2, share_passes=share),
                              do_sample=True).tolist())  # fmt: skip
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("why", ["static caches", "no weights in common", "a position that is none of the mask's"])
def test_what_cannot_share_takes_turns_and_says_so_where_it_was_asked_to(why):
    one, two = members("llama", 2)
    own, kwargs = own_prompts(1, 2), {}
    group = views(one, own)
    if why == "static caches":
        kwargs = dict(cache_implementation="static")
    elif why == "no weights in common":
        group = [one, se.with_prompt(two, **own[1])]
    else:
        own[0]["position_ids"] = 3 + torch.arange(own[0]["input_ids"].shape[1])[None]
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_spec_ensemble.decoding.sharing.warn_once", said.append)
        outs = [output(group, own[0], oracle.config_of("weighted", 2, share_passes=share), **kwargs)
                for share in (True, "auto", False)]  # fmt: skip
    assert all(out.stats.shared == [] for out in outs)
    assert len({tuple(out.sequences[0].tolist()) for out in outs}) == 1
    assert len(said) == 1 and "take turns" in said[0]


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_the_setting_is_checked_and_saved(value):
    with pytest.raises(ValueError, match=f"`share_passes` must be 'auto', True or False, but is {value!r}"):
        se.EnsembleConfig(share_passes=value)
    config = se.EnsembleConfig(share_passes=True)
    assert se.EnsembleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# --- Parts ----------------------------------------------------------------------------------------------------------


def test_the_common_beginning_that_saves_most():
    ids = torch.tensor([[0, 3, 4, 5, 6], [3, 4, 5, 6, 9], [0, 3, 4, 5, 7], [3, 4, 5, 6, 8]])  # G = 2, B = 2
    mask = (ids != 0).numpy()
    assert rows.Common.of(ids, mask, contexts=2) == rows.Common(3, 1)
    ids = torch.tensor([[3, 4, 5, 6], [8, 4, 5, 6], [3, 4, 5, 7], [8, 4, 5, 7]])
    common = rows.Common.of(ids, (ids != 0).numpy(), contexts=2)
    assert common == rows.Common(3, 2) and common.saved(4) == 6
    ids = torch.tensor([[0, 3, 4], [3, 4, 4]])
    front, mask = rows.Common(1, 1).in_front(ids, (ids != 0).numpy())
    assert front.tolist() == [[3, 0, 4], [3, 4, 4]] and mask.tolist() == [[True, False, True], [True] * 3]
