"""Threads, interruptions, extreme numbers and long texts: nothing is left behind, nothing grows, nothing is nan."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import oracle
import pytest
import torch
from covering import pairwise
from families import PAD, VOCAB, members, prompts, tiny
from transformers import (
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

import hf_spec_ensemble as se
from hf_spec_ensemble.compat import given_cache
from hf_spec_ensemble.decoding.text import ROOM, Text
from hf_spec_ensemble.decoding.verify import residual_probs, verify_maximal
from hf_spec_ensemble.members.costs import PassCosts
from hf_spec_ensemble.schedule.acceptance import Acceptance


NO_EOS = [VOCAB + 1]
PROMPT = 7  # tokens


def generate(models, inputs, config, **kwargs):
    return models[0].generate(**inputs, assistant_model=models[1:], ensemble_config=config, **kwargs)


# --- Threads --------------------------------------------------------------------------------------------------------


def traces(model) -> dict:
    """All that a call might leave on a model: attributes and hooks of its modules, its configs, its weights."""
    seen = {"config": model.config.to_dict(), "generation_config": model.generation_config.to_dict()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else value
            seen[name, key] = held if isinstance(held, (bool, int, float, str, dict, type(None))) else id(held)
    seen["weights"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return seen


def assert_untouched(before: list[dict], models) -> None:
    for old, model in zip(before, models):
        new = traces(model)
        weights = old.pop("weights"), new.pop("weights")
        assert old == new
        torch.testing.assert_close(*weights, rtol=0, atol=0)


def _calls(drafter):
    """Greedy calls that differ in prompt, batch, method, processors and proposal lengths."""
    names = [name for name, method in oracle.METHODS.items() if 2 in method.members]
    lengths = ["auto", 1, 4, "auto"]
    settings = [dict(), dict(repetition_penalty=1.3), dict(no_repeat_ngram_size=2)]
    for i in range(12):
        config = oracle.config_of(names[i % len(names)], 2, num_assistant_tokens=lengths[i % 4], alternate=i % 5 > 0)
        inputs = prompts((1, 3)[i % 2], seed=i)
        if drafter is not None:  # something to look up
            inputs = {key: torch.cat([value, value[:, -5:], value[:, -5:]], 1) for key, value in inputs.items()}
        yield dict(inputs=inputs, config=config, drafter=drafter, **settings[i % 3])


@pytest.mark.parametrize("drafter", [None, "prompt_lookup"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_eight_threads_give_what_they_give_alone(family, drafter):
    models = copy.deepcopy(members(family, 2))
    before, patched = [traces(model) for model in models], GenerationMixin.generate

    def run(call):
        return generate(models, **call, do_sample=False, max_new_tokens=12).tolist()

    alone = [run(call) for call in _calls(drafter)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(run, _calls(drafter)))
    finally:
        sys.setswitchinterval(interval)
    assert together == alone
    assert GenerationMixin.generate is patched
    assert_untouched(before, models)


def _in_threads(work, count=8):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(work, i) for i in range(count)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)


def test_acceptance_loses_nothing_between_threads():
    acceptance = Acceptance()

    def work(i):
        for _ in range(2000):
            acceptance.add(0.99, kept=True)
            acceptance.fade(0)  # writes all counts, and changes none
            assert 0 <= acceptance.chance(0.99) <= 1
            assert 0 <= acceptance.mean <= 1

    _in_threads(work)
    assert acceptance.evidence == 8 * 2000


def test_costs_can_be_read_while_they_are_measured():
    costs = PassCosts()

    def work(i):
        for width in range(1, 300):
            costs.add(i, width, 1.0)
            assert costs.seconds(i, width) == 1.0
            costs.to_probe(0, 1)
            assert costs.measured(0, 1) in (None, 1.0)

    _in_threads(work)


# --- Interruptions --------------------------------------------------------------------------------------------------


@dataclass
class Fuse:
    """Raises an error the k-th time it is burnt."""

    k: int
    error: type[BaseException]
    burnt: int = 0

    def burn(self, *_):
        self.burnt += 1
        if self.burnt == self.k:
            raise self.error("blown")


@dataclass
class Stream(BaseStreamer):
    fuse: Fuse | None = None
    columns: list = field(default_factory=list)

    def put(self, value):
        if self.fuse is not None:
            self.fuse.burn()
        self.columns.append(value.tolist())

    def end(self):
        pass


class Processor(LogitsProcessor):
    stateless = True

    def __init__(self, fuse):
        self.fuse = fuse

    def __call__(self, input_ids, scores):
        self.fuse.burn()
        return scores


class Criterion(StoppingCriteria):
    def __init__(self, fuse):
        self.fuse = fuse

    def __call__(self, input_ids, scores, **kwargs):
        self.fuse.burn()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _stage(stage, models, fuse, monkeypatch):
    """Lets a stage of a call burn the fuse; gives what `generate` needs for that, and what takes it back."""
    arguments, modules = {}, []
    if stage == "verifying":
        method = oracle.root_mean_square

        def failing(probs):
            fuse.burn()
            return method(probs)

        arguments = dict(ensemble_config=se.EnsembleConfig(method=failing, combine_on="probs", num_assistant_tokens=3))
    elif stage == "proposing":
        propose = se.ensemble.distribution.EnsembleDistribution.proposal
        monkeypatch.setattr(
            se.ensemble.distribution.EnsembleDistribution, "proposal", lambda *args: (fuse.burn(), propose(*args))[1]
        )
    elif stage == "processor":
        arguments = dict(logits_processor=[Processor(fuse)])
    elif stage == "criterion":
        arguments = dict(stopping_criteria=[Criterion(fuse)])
    elif stage == "streamer":
        arguments = dict(streamer=Stream(fuse))
    else:  # inside the main model or the assistant; in the main model half of the layers have written to the cache
        modules = [models[stage == "assistant"].model.layers[-1].self_attn]
    hooks = [module.register_forward_pre_hook(fuse.burn) for module in modules]
    return arguments, hooks


STAGES = ["main model", "assistant", "proposing", "verifying", "processor", "criterion", "streamer"]


@pytest.mark.parametrize(
    "stage,k,error", pairwise(dict(stage=STAGES, k=[1, 2, 5], error=[RuntimeError, KeyboardInterrupt]))
)
def test_an_interrupted_call_can_be_made_again(stage, k, error, monkeypatch):
    """With everything that was given to it, the cache among it; the first failures are those of the prompts' passes."""
    # The window is shorter than the text, so that there are slots which only a roll-back needs
    models = copy.deepcopy(members("gemma3", 2))
    before, patched = [traces(model) for model in models], GenerationMixin.generate
    inputs = prompts(3)
    config = se.EnsembleConfig(
        method=oracle.root_mean_square, combine_on="probs", num_assistant_tokens=3, check_members=False
    )
    call = dict(**inputs, assistant_model=models[1:], do_sample=False, max_new_tokens=10, eos_token_id=NO_EOS)
    text, _ = oracle.greedy(models, inputs, "callable", 10, eos=())

    cache, streamer, fuse = DynamicCache(config=models[0].config), Stream(), Fuse(k, error)
    arguments, hooks = _stage(stage, models, fuse, monkeypatch)
    arguments = dict(ensemble_config=config, streamer=streamer) | arguments
    with pytest.raises(error, match="blown"):
        models[0].generate(**call, **arguments, past_key_values=cache)
    for hook in hooks:
        hook.remove()

    assert GenerationMixin.generate is patched
    assert_untouched(before, models)
    assert cache.get_seq_length() == 0 and not any(layer.is_initialized for layer in cache.layers)
    prompt, *columns = arguments["streamer"].columns or [inputs["input_ids"].tolist()]
    assert prompt == inputs["input_ids"].tolist()
    assert columns == text[:, PROMPT:].T.tolist()[: len(columns)]  # what was streamed is right
    # The very same call, since the fuse has blown, and once more without a cache of the caller's
    again = models[0].generate(**call, **arguments, past_key_values=cache)
    assert again.tolist() == text.tolist()
    assert models[0].generate(**call, ensemble_config=config).tolist() == text.tolist()


def test_everything_streamed_before_a_late_interruption_was_right():
    models, inputs = members("llama", 2), prompts(3)
    text, _ = oracle.greedy(models, inputs, "weighted", 16, eos=())
    streamer, config = Stream(), oracle.config_of("weighted", 2, num_assistant_tokens=3)
    with pytest.raises(RuntimeError, match="blown"):
        generate(
            models, inputs, config, do_sample=False, max_new_tokens=16, eos_token_id=NO_EOS, streamer=streamer,
            stopping_criteria=[Criterion(Fuse(10, RuntimeError))],
        )  # fmt: skip
    assert streamer.columns == [inputs["input_ids"].tolist(), *text[:, PROMPT : PROMPT + 9].T.tolist()]


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_of_the_callers_holds_the_text_afterwards(family, batch, with_config):
    """Also where `generate` returns the ids alone, and where the cache was not told of sliding windows."""
    models, inputs = members(family, 2), prompts(batch)
    cache = DynamicCache(config=models[0].config) if with_config else DynamicCache()
    config = oracle.config_of("weighted", 2, num_assistant_tokens=3)
    text = generate(
        models, inputs, config, do_sample=False, max_new_tokens=16, eos_token_id=NO_EOS, past_key_values=cache
    )
    assert text.tolist() == oracle.greedy(models, inputs, "weighted", 16, eos=())[0].tolist()
    held = cache.get_seq_length()
    assert PROMPT < held < text.shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(text[:, PROMPT:])], 1)
    with torch.no_grad():
        cached = models[0](
            text[:, held:], attention_mask=mask, past_key_values=cache,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, held:],
        ).logits[:, -1]  # fmt: skip
        for row in range(batch):
            whole = models[0](text[row, mask[row].bool()][None], use_cache=False).logits[0, -1]
            torch.testing.assert_close(cached[row], whole)


# --- Numbers --------------------------------------------------------------------------------------------------------

DRAWS = {
    "greedy": (dict(do_sample=False), "gumbel"),
    "gumbel": (dict(do_sample=True), "gumbel"),
    "maximal": (dict(do_sample=True), "maximal"),
}
PAIRS = [name for name, method in oracle.METHODS.items() if 2 in method.members]


def assert_sound(models, name, draw, same_as_standard=True, **kwargs):
    """The call ends; its tokens are possible and its scores distributions; its text is the standard ensemble's."""
    sampling, coupling = DRAWS[draw]
    arguments = dict(max_new_tokens=8, eos_token_id=NO_EOS, return_dict_in_generate=True, output_scores=True)
    arguments |= sampling | kwargs
    outputs = []
    for speculative in (True, False):
        config = oracle.config_of(name, 2, num_assistant_tokens=3, coupling=coupling, speculative=speculative,
                                  share_passes=False)  # fmt: skip
        torch.manual_seed(0)
        outputs.append(out := generate(models, prompts(2), config, **arguments))
        assert out.sequences.shape[1] == PROMPT + 8
        for column, token in zip(out.scores, out.sequences[:, PROMPT:].T):
            assert not column.isnan().any()
            torch.testing.assert_close(column.double().exp().sum(-1), torch.ones(len(token), dtype=torch.float64),
                                       rtol=0, atol=1e-4)  # fmt: skip
            assert (column.gather(1, token[:, None]) > -torch.inf).all()
    if same_as_standard and draw != "maximal":
        assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()
    return outputs[0]


@pytest.mark.parametrize(
    "dtype,name,draw", pairwise(dict(dtype=[torch.float16, torch.bfloat16], name=PAIRS, draw=list(DRAWS)))
)
def test_half_precision(dtype, name, draw):
    models = [copy.deepcopy(model).to(dtype) for model in members("llama", 2)]
    assert_sound(models, name, draw, same_as_standard=False, temperature=0.9, top_p=0.95)


def _with_logits(model, change):
    """A copy whose logits go through `change`."""
    model = copy.deepcopy(model)
    model.lm_head.register_forward_hook(lambda module, args, logits: change(logits))
    return model


def _banning(tokens):
    return lambda logits: logits.index_fill(-1, torch.tensor(list(tokens), dtype=torch.long), -torch.inf)


BANNED = {
    "the same": (range(0, 20), range(0, 20)),
    "one member's": (range(0), range(10, 45)),
    "some of each": (range(0, 20), range(10, 30)),
    "all but one": (range(0, 49), range(0, 49)),
    "all between them": (range(0, 25), range(25, 50)),
}


@pytest.mark.parametrize("banned,name,draw", pairwise(dict(banned=list(BANNED), name=PAIRS, draw=list(DRAWS))))
def test_heads_that_rule_out_tokens(banned, name, draw):
    models = [_with_logits(model, _banning(tokens)) for model, tokens in zip(members("llama", 2), BANNED[banned])]
    out = assert_sound(models, name, draw)
    by_all = set(BANNED[banned][0]) & set(BANNED[banned][1])
    assert not by_all & set(out.sequences[:, PROMPT:].flatten().tolist())


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", PAIRS)
def test_a_processor_that_leaves_one_token(name, draw):
    class OneToken(LogitsProcessor):
        stateless = True

        def __call__(self, input_ids, scores):
            keep = (input_ids.shape[1] * 7) % VOCAB
            return scores.masked_fill(torch.arange(scores.shape[1]) != keep, -torch.inf)

    out = assert_sound(members("llama", 2), name, draw, logits_processor=[OneToken()])
    assert out.sequences[0, PROMPT:].tolist() == [(length * 7) % VOCAB for length in range(PROMPT, PROMPT + 8)]


@pytest.mark.parametrize("likeness,name,draw", pairwise(dict(likeness=[0.0, 0.9], name=PAIRS, draw=list(DRAWS))))
def test_one_token_with_all_the_mass(likeness, name, draw):
    """softmax gives exactly 0 and 1: q is 0 where r is not, and the residual is all of r."""
    models = [_with_logits(model, lambda logits: 1e6 * logits) for model in members("llama", 2, likeness)]
    assert_sound(models, name, draw)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", ["weighted", "weighted raw logits", "product probs", "callable"])
def test_identical_members_keep_every_proposal(name, draw, dtype):
    """r equals q up to rounding. The residual is then zero, or rounding noise."""
    model = copy.deepcopy(tiny()).to(dtype)
    out = assert_sound([model, model], name, draw, same_as_standard=dtype == torch.float64)
    # In bfloat16 the members' passes round differently, if they read different numbers of tokens
    assert dtype == torch.bfloat16 or out.stats.acceptance == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_residual_that_rounds_to_nothing_is_r(dtype):
    torch.manual_seed(0)
    r = torch.randn(200, VOCAB).softmax(-1).to(dtype)
    r[:100, : VOCAB // 2] = 0
    assert torch.equal(residual_probs(r, r), r)
    q = torch.nextafter(r, torch.ones_like(r))  # more everywhere, by the last bit
    assert torch.equal(residual_probs(q, r), r)
    # The least u for which a proposal of probability r / q = 1 - eps is rejected: what replaces it is possible
    tokens = r.argmax(-1, keepdim=True)
    last = torch.full((200, 2), 1 - 2.0**-53, dtype=torch.float64)
    _, emitted = verify_maximal(tokens, q[:, None], r[:, None], np.ones(200, int), last)
    assert (r.gather(1, emitted[:, None]) > 0).all()


def test_residuals_in_half_precision_are_those_of_single_precision():
    """Members in bfloat16 are verified in float32: q and r differ by less than bfloat16 can tell, without bias."""
    main = copy.deepcopy(tiny()).to(torch.bfloat16)
    config = se.EnsembleConfig(weights=[0.5, 0.5], num_assistant_tokens=1, coupling="maximal")
    inputs = {key: value.repeat(4000, 1) for key, value in prompts(1).items()}
    torch.manual_seed(0)
    out = generate(
        [main, tiny(seed=1)], inputs, config, do_sample=True, max_new_tokens=1, eos_token_id=NO_EOS,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    wanted = out.scores[0][0].double().exp()
    got = torch.bincount(out.sequences[:, -1], minlength=VOCAB) / 4000
    assert (got - wanted).abs().max() < 5 * (0.25 / 4000) ** 0.5
    assert out.scores[0].dtype in (torch.float32, torch.float64)


# --- Long texts -----------------------------------------------------------------------------------------------------


def unrelated(n: int, length: int) -> list:
    """Models of one layer that share nothing, for long texts."""
    made = []
    for seed in range(n):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=length, initializer_range=0.3, pad_token_id=PAD, eos_token_id=None,
            )  # fmt: skip
            made.append(LlamaForCausalLM(config).eval())
    return made


def watched(models, config, batch, new_tokens):
    """Passes made by the time of each column; of every pass the slots before it and the longest row's tokens."""
    columns, held = [], []

    def note(module, args, kwargs):
        held.append((given_cache(kwargs).get_seq_length(), int(kwargs["position_ids"].max()) + 1))

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            columns.append(len(held))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    hooks = [model.register_forward_pre_hook(note, with_kwargs=True) for model in models]
    out = generate(
        models, prompts(batch), config, do_sample=False, max_new_tokens=new_tokens, stopping_criteria=[Watch()],
        return_dict_in_generate=True,
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    return np.array(columns), np.array(held), out


@pytest.mark.parametrize("new_tokens", [300, pytest.param(1200, marks=pytest.mark.slow)])
def test_a_long_text_of_members_that_disagree(new_tokens):
    """Three rows that lose proposals at different places: caches grow with the text only, and passes a token do not."""
    models = unrelated(2, 2 * new_tokens)
    config = oracle.config_of("weighted", 2, num_assistant_tokens=[3, 2], check_members=False)
    passes, held, out = watched(models, config, batch=3, new_tokens=new_tokens)
    assert out.stats.verified[1] - out.stats.accepted[1] > new_tokens / 5, "not a test of rejections"
    slots, longest = held.T
    assert (slots < 1.25 * longest + 30).all()
    third = new_tokens // 3
    assert 0.75 < (passes[-1] - passes[-1 - third]) / (passes[third] - passes[0]) < 1.25


@pytest.fixture
def room(monkeypatch):
    """How many tokens a row the calls made room for, each time a round ended."""
    sizes, retire = [], Text.retire

    def note(self, wanted):
        sizes.append(self.ids.shape[1])
        retire(self, wanted)

    monkeypatch.setattr(Text, "retire", note)
    return sizes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("drafter", [None, "prompt_lookup"])
def test_room_is_made_for_the_text_and_not_for_the_longest_allowed(batch, drafter, room):
    models, inputs = members("llama", 2), prompts(batch)
    call = dict(ensemble_config=se.EnsembleConfig(num_assistant_tokens=3, trace=True), drafter=drafter)
    eos = list(range(2, VOCAB, 4))
    call |= dict(assistant_model=models[1:], do_sample=False, eos_token_id=eos, return_dict_in_generate=True)
    text = models[0].generate(**inputs, **call, max_new_tokens=60).sequences
    assert text.shape[1] < PROMPT + 60, "not a test of texts that end"
    room.clear()
    assert models[0].generate(**inputs, **call, max_new_tokens=10**9).sequences.tolist() == text.tolist()
    assert max(room) <= ROOM


class LongEnough(StoppingCriteria):
    """A length that the engine does not know of."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_room_grows_with_the_text(room):
    new_tokens = 2 * ROOM + 50
    models = unrelated(2, 2 * new_tokens)
    texts = []
    for longest in (PROMPT + new_tokens, 10**9):
        criteria = [LongEnough(PROMPT + new_tokens)]
        config = oracle.config_of("weighted", 2, num_assistant_tokens=[3, 2])
        out = generate(models, prompts(3), config, do_sample=False, max_length=longest, stopping_criteria=criteria)
        texts.append(out.tolist())
    assert texts[0] == texts[1] and len(texts[0][0]) == PROMPT + new_tokens
    assert len(set(room)) <= 6 and max(room) <= 3 * (PROMPT + new_tokens)


# --- Types of prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("draw", [dict(do_sample=False), dict(do_sample=True)], ids=str)
def test_prompts_of_32_bits(draw, batch):
    """transformers decodes them, and returns 64 bits."""
    models, inputs = members("llama", 2, likeness=0.6), prompts(batch)
    narrow = inputs | {"input_ids": inputs["input_ids"].int()}
    texts = []
    for given, speculative, drafter in (
        (narrow, True, None), (narrow, True, "prompt_lookup"), (narrow, False, None), (inputs, False, None),
    ):  # fmt: skip
        torch.manual_seed(0)
        config = se.EnsembleConfig(num_assistant_tokens=2, speculative=speculative)
        texts.append(generate(models, given, config, drafter=drafter, max_new_tokens=8, **draw))
    assert narrow["input_ids"].dtype == torch.int32
    for text in texts:
        assert text.dtype == torch.int64 and text.tolist() == texts[-1].tolist()
