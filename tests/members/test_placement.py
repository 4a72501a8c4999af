"""Members of different dtypes, on different devices, spread by accelerate, with vocabularies padded differently."""

import copy
from types import SimpleNamespace

import oracle
import pytest
import torch
from covering import pairwise
from families import EOS, prompts, tiny

import hf_spec_ensemble as se


BOTH = [True, False]  # speculative or not
DRAWS = {
    "greedy": dict(do_sample=False),
    "gumbel": dict(do_sample=True, temperature=0.8, top_k=0),
    "maximal": dict(do_sample=True, temperature=0.8, top_k=0),
}
PROMPT = 7  # tokens of the longest prompt of a batch
NEVER = 999  # a token that no model knows: texts do not end early


def generate(models, inputs, draw="greedy", speculative=True, lengths=3, name="weighted", **kwargs):
    config = oracle.config_of(
        name, len(models), speculative=speculative, num_assistant_tokens=lengths,
        coupling="maximal" if draw == "maximal" else "gumbel",
    )  # fmt: skip
    torch.manual_seed(11)
    return models[0].generate(
        **inputs, assistant_model=models[1:], ensemble_config=config, max_new_tokens=12, return_dict_in_generate=True,
        output_scores=True, eos_token_id=NEVER, pad_token_id=0, **DRAWS[draw], **kwargs,
    )  # fmt: skip


def at_temperature_of(draw):
    return lambda ids, logits: logits.double() / DRAWS[draw].get("temperature", 1.0)


def assert_same_but_for_ties(one, two, tie: float) -> None:
    """Texts agree to where, if anywhere, the best two tokens are as good as equally probable."""
    for row in range(len(one.sequences)):
        pairs = zip(one.sequences[row, PROMPT:].tolist(), two.sequences[row, PROMPT:].tolist())
        at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if at is not None:
            best, second = two.scores[at][row].topk(2).values
            assert best - second < tie, (row, at)


# --- Dtypes -----------------------------------------------------------------------------------------------------------


def in_dtypes(*dtypes):
    return [
        copy.deepcopy(tiny("llama", seed=i, layers=1 + i % 2)).to(getattr(torch, dtype))
        for i, dtype in enumerate(dtypes)
    ]


@pytest.mark.parametrize("name", ["weighted", "product", "callable", "callable raw logits"])
@pytest.mark.parametrize("draw", ["greedy", "gumbel"])
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32", "float32")])
def test_members_in_different_dtypes(dtypes, draw, name):
    models = in_dtypes(*dtypes)
    for batch in (1, 3):
        texts = [generate(models, prompts(batch), draw, speculative, name=name).sequences for speculative in BOTH]
        assert texts[0].tolist() == texts[1].tolist()
    wanted, _ = oracle.greedy([m.double() for m in models], prompts(3), name, 12, eos=())
    if draw == "greedy":
        assert texts[0].tolist() == wanted.tolist()


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16", "float64"), ("bfloat16", "float64"), ("float64", "float16", "bfloat16")]
)
def test_members_in_half_precision_among_others(dtypes, draw):
    """Scores are those of the members in float64, as far as the coarsest of them is; text differs at near-ties only."""
    models = in_dtypes(*dtypes)
    outputs = [generate(models, prompts(3), draw, speculative) for speculative in BOTH]
    if draw == "greedy":
        assert_same_but_for_ties(*outputs, tie=0.1)
    for out in outputs:
        for step, scores in enumerate(out.scores):
            assert scores.dtype in (torch.float32, torch.float64) and not scores.isnan().any()
            if step:
                continue
            log_r = oracle.next_log_probs(models, *prompts(3).values(), "weighted", [at_temperature_of(draw)])
            torch.testing.assert_close(scores.exp().double(), log_r.exp(), rtol=0, atol=0.02)


# --- Devices ----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "the rest on disk": {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu",
                         "model.layers.1": "disk", "model.norm": "cpu", "lm_head": "disk"},
    "the first parameter on disk": {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.layers.0": "disk",
                                    "model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"},
    "all on disk": {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.layers.0": "disk",
                    "model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"},
}  # fmt: skip


def spread(model, layout, folder):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(copy.deepcopy(model), LAYOUTS[layout], offload_dir=folder, main_device="cpu")


SPREAD = pairwise(
    dict(layout=list(LAYOUTS), which=["main", "assistant", "drafter"], batch=[1, 3], draw=["greedy", "gumbel"])
)


@pytest.mark.parametrize("layout,which,batch,draw", SPREAD)
def test_a_member_spread_over_memory_and_disk(layout, which, batch, draw, tmp_path):
    models = [tiny("llama", seed=seed) for seed in range(3)]
    placed = [
        spread(model, layout, tmp_path) if which == role else model
        for role, model in zip(("main", "assistant", "drafter"), models)
    ]
    wanted = generate(models[:2], prompts(batch), draw, speculative=False).sequences
    got = generate(placed[:2], prompts(batch), draw, drafter=placed[2]).sequences
    assert got.tolist() == wanted.tolist()
    if which != "drafter":
        assert generate(placed[:2], prompts(batch), draw, speculative=False).sequences.tolist() == wanted.tolist()


def test_a_model_loaded_with_a_device_map(tmp_path):
    pytest.importorskip("accelerate")
    models = [tiny("llama", seed=seed) for seed in range(2)]
    models[1].save_pretrained(tmp_path / "model")
    layout = LAYOUTS["the first parameter on disk"]
    loaded = type(models[1]).from_pretrained(
        tmp_path / "model", device_map=layout, offload_folder=tmp_path / "offload", dtype=torch.float64
    )
    texts = [generate(pair, prompts(3)).sequences.tolist() for pair in (models, [models[0], loaded], models)]
    assert texts[0] == texts[1]


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("draw", ["greedy", "gumbel"])
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cpu", "cuda"), ("cuda", "cuda")])
def test_members_on_different_devices(devices, draw):
    models = [tiny("llama", seed=seed) for seed in range(len(devices))]
    placed = [copy.deepcopy(model).to(device) for model, device in zip(models, devices)]
    drafter = copy.deepcopy(tiny("llama", seed=5)).to("cuda")
    for batch in (1, 3):
        inputs = {key: value.to(devices[0]) for key, value in prompts(batch).items()}
        wanted = generate(models, prompts(batch), draw, speculative=False).sequences.tolist()
        for speculative in BOTH:
            assert generate(placed, inputs, draw, speculative).sequences.tolist() == wanted
        assert generate(placed, inputs, draw, drafter=drafter).sequences.tolist() == wanted
        assert generate(placed, inputs, draw, drafter="prompt_lookup").sequences.tolist() == wanted
        assert generate(placed, inputs, draw, lengths="auto").sequences.tolist() == wanted


@on_gpu
@pytest.mark.parametrize("which", [0, 1])
def test_a_member_spread_over_a_gpu_and_memory(which, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    models = [tiny("llama", seed=seed) for seed in range(2)]
    placed = [copy.deepcopy(model).to("cuda") for model in models]
    for layout in (
        {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers": 0, "model.norm": "cpu", "lm_head": "cpu"},
        {"model.embed_tokens": "cpu", "model.rotary_emb": 0, "model.layers": 0, "model.norm": 0, "lm_head": 0},
        {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers": "cpu", "model.norm": 0, "lm_head": "disk"},
    ):
        placed[which] = accelerate.dispatch_model(copy.deepcopy(models[which]), layout, offload_dir=tmp_path)
        for batch in (1, 3):
            inputs = {key: value.cuda() for key, value in prompts(batch).items()}
            wanted = generate(models, prompts(batch), speculative=False).sequences.tolist()
            for speculative in BOTH:
                assert generate(placed, inputs, speculative=speculative).sequences.tolist() == wanted


# --- Vocabularies padded to different sizes ---------------------------------------------------------------------------


SHARED = 200  # tokens that the smallest of these models knows
SIZES = [(203, 200), (200, 203), (203, 200, 201), (200, 203, 201), (201, 203, 200)]


def padded(vocab: int, seed: int):
    """A model that would say the tokens beyond those all share: two of three times if nothing kept it from that."""
    model = copy.deepcopy(tiny("llama", seed=seed, layers=1 + seed % 2, vocab=vocab))
    with torch.no_grad():
        model.lm_head.weight[SHARED:] *= 8
    return model


def cut(model):
    """The model as it is for the oracle: it knows the shared tokens only."""
    return lambda ids, use_cache: SimpleNamespace(logits=model(ids, use_cache=use_cache).logits[..., :SHARED])


CUT = pairwise(dict(sizes=SIZES, drafter=[None, 199, 203, "prompt_lookup"], draw=list(DRAWS), batch=[1, 3]))


@pytest.mark.parametrize("sizes,drafter,draw,batch", CUT, ids=str)
def test_vocabularies_are_cut_to_the_tokens_that_all_members_know(sizes, drafter, draw, batch):
    """Whatever is drawn, every token's distribution is the formula's on the text before it."""
    models = [padded(vocab, seed) for seed, vocab in enumerate(sizes)]
    extra = {} if drafter is None else dict(drafter=padded(drafter, 7) if isinstance(drafter, int) else drafter)
    inputs = prompts(batch, vocab=SHARED)
    outputs = [generate(models, inputs, draw, speculative, **(extra if speculative else {})) for speculative in BOTH]
    if draw != "maximal":
        assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()
    for out in outputs:
        assert out.sequences.max() < SHARED
        mask = inputs["attention_mask"]
        for step in range(0, 12, 4):
            ids = out.sequences[:, : PROMPT + step]
            seen = torch.cat([mask, mask.new_ones(batch, step)], 1)
            log_r = oracle.next_log_probs([cut(m) for m in models], ids, seen, "weighted", [at_temperature_of(draw)])
            scores = out.scores[step]
            assert scores.shape == (batch, sizes[0]) and (scores[:, SHARED:] == -torch.inf).all()
            torch.testing.assert_close(scores[:, :SHARED].double(), log_r, rtol=0, atol=1e-5)


def test_the_models_of_these_tests_would_say_padding():
    models = [padded(vocab, seed) for seed, vocab in enumerate((203, 201))]
    said = [m.generate(**prompts(3, vocab=SHARED), do_sample=False, max_new_tokens=20) for m in models]
    assert all((text >= SHARED).any() for text in said)


@pytest.mark.parametrize("speculative", BOTH)
def test_prompts_of_tokens_that_not_all_members_know_are_refused(speculative):
    models = [padded(203, 0), padded(200, 1)]
    for model in models:
        model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was made"))
    inputs = prompts(3, vocab=SHARED)
    inputs["input_ids"][2, 6] = 202
    with pytest.raises(ValueError, match="The prompt holds token 202, but the smallest .* has 200 tokens"):
        generate(models, inputs, speculative=speculative)


def test_a_drafter_need_not_know_all_tokens_of_the_prompt():
    models, inputs = [padded(203, 0), padded(203, 1)], prompts(3, vocab=SHARED)
    inputs["input_ids"][2, 6] = 202
    wanted = generate(models, inputs, speculative=False).sequences
    for call in (dict(drafter=padded(199, 2)), dict(drafter="prompt_lookup")):
        assert generate(models, inputs, **call).sequences.tolist() == wanted.tolist()


def test_an_end_that_only_some_members_know_is_never_drawn():
    """The main model's end-of-text token is in its padding: members that lack it give it no probability."""
    models = [padded(203, 0), padded(200, 1)]
    config = se.EnsembleConfig(num_assistant_tokens=2)
    out = models[0].generate(
        **prompts(1, vocab=SHARED), assistant_model=models[1], ensemble_config=config, eos_token_id=[EOS, 202],
        do_sample=False, max_new_tokens=12,
    )  # fmt: skip
    assert (out < SHARED).all()
