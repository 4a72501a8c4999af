"""What only a GPU has: CUDA graphs, members on several devices, half precision as it is computed there."""

import copy
import os

import oracle
import pytest
import torch
from families import VOCAB, members, prompts, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import hf_spec_ensemble as se


GPU = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif("HF_SPEC_ENSEMBLE_TEST_DEVICE" in os.environ, reason="compares with models on the CPU"),
]

PROMPT = 7  # tokens of the longest prompt of a batch
STATIC = dict(cache_implementation="static", max_cache_len=100)  # with CUDA graphs, unless these are disabled
DRAWS = {
    "greedy": dict(do_sample=False),
    "gumbel": dict(do_sample=True, coupling="gumbel"),
    "maximal": dict(do_sample=True, coupling="maximal"),
    "ancestral": dict(do_sample=True, coupling="ancestral"),
}


def on_gpu(family="llama", n=2, dtype=torch.float64):
    return [copy.deepcopy(model).to(GPU, dtype) for model in members(family, n)]


def generate(models, inputs, draw="greedy", settings=None, **kwargs):
    kwargs = dict(max_new_tokens=20, return_dict_in_generate=True) | DRAWS[draw] | kwargs
    config = se.EnsembleConfig(coupling=kwargs.pop("coupling", "auto"), **settings or {})
    inputs = {name: tensor.to(models[0].device) for name, tensor in inputs.items()}
    torch.manual_seed(3)
    return models[0].generate(**inputs, assistant_model=models[1:], ensemble_config=config, **kwargs)


def texts(*args, **kwargs):
    return generate(*args, **kwargs).sequences.tolist()


def assert_same_but_for_ties(both, length, tie):
    """Texts agree to where, if anywhere, two tokens are about as probable."""
    for row in range(len(both[0].sequences)):
        pairs = zip(*(out.sequences[row, length:].tolist() for out in both))
        at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if at is not None:
            scores, token = both[0].scores[at][row], both[1].sequences[row, length + at]
            assert scores.max() - scores[token] < tie, (row, at)


@pytest.mark.parametrize("name", ["weighted", "product", "contrastive", "callable"])
def test_the_formula(name):
    models, inputs = on_gpu(), prompts(1)
    wanted, _ = oracle.greedy(members("llama", 2), inputs, name, 12)
    for speculative in (True, False):
        out = models[0].generate(
            inputs["input_ids"].to(GPU), assistant_model=models[1:], max_new_tokens=12, do_sample=False,
            ensemble_config=oracle.config_of(name, 2, speculative=speculative),
        )  # fmt: skip
        assert out.tolist() == wanted.tolist()


@pytest.mark.parametrize("draw", ["greedy", "gumbel", "ancestral"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_seed_gives_the_text_that_it_gives_on_a_cpu(batch, draw):
    """If the global generator of the GPU is not asked: a seed is drawn from the CPU's."""
    for speculative in (True, False):
        settings = dict(speculative=speculative)
        wanted = texts(members("llama", 3), prompts(batch), draw, settings)
        assert texts(on_gpu(n=3), prompts(batch), draw, settings) == wanted


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("batch", [1, 3])
def test_cuda_graphs(batch, draw):
    """Calls after the first: graphs are recorded, and then replayed."""
    models, settings = on_gpu(), dict(num_assistant_tokens=3)  # with which samples are coupled maximally depends on it
    wanted = texts(models, prompts(batch), draw, settings)
    for _ in range(3):
        assert texts(models, prompts(batch), draw, settings, **STATIC) == wanted
    assert texts(models, prompts(batch), draw, settings, **STATIC, disable_compile=True) == wanted


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_cuda_graphs_of_other_families(family):
    models, settings = on_gpu(family, 3), dict(weights=[0.5, 0.3, 0.2], num_assistant_tokens=[2, 1, 3])
    wanted = texts(models, prompts(2), settings=settings)
    for _ in range(2):
        assert texts(models, prompts(2), settings=settings, **STATIC) == wanted


@pytest.mark.parametrize("speculative", [True, False])
def test_refilled_rows(speculative):
    models, config = on_gpu(), se.EnsembleConfig(speculative=speculative)
    seconds = se.warmup(models, max_length=100, batch_size=2, widths=[1, 2, 4], progress=False)
    assert len(seconds) == 2
    ids = prompts(1, length=40)["input_ids"][0].tolist()
    queue = [ids[:7], ids[7:10], ids[10:15], ids[15:24], ids[24:28]]
    kwargs = dict(
        assistant_model=models[1:], ensemble_config=config, batch_size=2, progress_bar=False, max_new_tokens=12,
        do_sample=False,
    )  # fmt: skip
    for way in ({}, STATIC):
        results = se.generate_batch(models[0], queue, **kwargs, **way)
        for prompt, result in zip(queue, results.values()):
            alone = texts(models, {"input_ids": torch.tensor([prompt])}, max_new_tokens=12)
            assert result.generated_tokens == alone[0][len(prompt) :]


def test_a_second_call_continues_over_cuda_graphs():
    models, inputs = on_gpu(), prompts(1)
    first = generate(models, inputs, eos_token_id=None, **STATIC)
    longer = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    wanted = texts(models, longer)
    generate(models, inputs, "gumbel", **STATIC)  # writes into no cache that was handed out
    assert texts(models, longer, past_key_values=first.past_key_values) == wanted


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("order", [(GPU, "cpu"), ("cpu", GPU)], ids=["first", "last"])
def test_one_member_on_the_gpu(order, draw):
    models = [model.to(device) for model, device in zip(on_gpu(), order)]
    for batch in (1, 3):
        for speculative in (True, False):
            settings = dict(speculative=speculative)
            got = texts(models, prompts(batch), draw, settings)
            if draw != "maximal":
                assert got == texts(members(), prompts(batch), draw, settings)
            assert len(got) == batch  # which is all that a maximal coupling can be asked for
    if draw != "maximal":
        for drafter in ("prompt_lookup", on_gpu()[0], members()[0]):
            assert texts(models, prompts(1), draw, drafter=drafter) == texts(members(), prompts(1), draw)


def test_a_member_spread_over_the_gpu_and_memory():
    accelerate = pytest.importorskip("accelerate")
    layout = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.1", "model.norm"], GPU)
    layout |= {"model.layers.0": "cpu", "lm_head": "cpu"}
    models = on_gpu()
    spread = accelerate.dispatch_model(copy.deepcopy(models[0]), layout, main_device=GPU)
    for first, second in ((0, 1), (1, 0)):
        some = [models[0], models[1]], [spread, models[1]]
        wanted, got = (texts([pair[first], pair[second]], prompts(2)) for pair in some)
        assert got == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", [{}, STATIC], ids=["growing", "CUDA graphs"])
def test_other_dtypes_differ_at_ties_only(way, dtype):
    models, kwargs = on_gpu(dtype=dtype), dict(output_scores=True, eos_token_id=VOCAB - 1, **way)
    both = [generate(models, prompts(3), settings=dict(speculative=one), **kwargs) for one in (True, False)]
    assert_same_but_for_ties(both, PROMPT, {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype])


@pytest.mark.parametrize("way", [{}, STATIC | dict(max_cache_len=300)], ids=["growing", "CUDA graphs"])
def test_sizes_that_fused_attention_takes(way):
    """Unlike those of the tiny models; long padded prompts, several tokens in a pass."""
    size = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    size |= dict(num_key_value_heads=2, initializer_range=0.1, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    models = [LlamaForCausalLM(LlamaConfig(**size)).to(GPU, torch.bfloat16).eval() for _ in range(2)]
    inputs, settings = prompts(3, length=200, vocab=512), dict(num_assistant_tokens=5)
    both = [
        generate(
            models, inputs, settings=settings | dict(speculative=one), output_scores=True, max_new_tokens=40, **way
        )
        for one in (True, False)
    ]
    assert_same_but_for_ties(both, 200, 0.1)


def test_fitted_weights_are_those_of_a_cpu():
    rows = ["".join(chr(97 + token % 26) for token in row) for row in prompts(10, length=60)["input_ids"].tolist()]
    there, here = (
        se.fit(models, rows, tokenizer=tokenizer(), progress=False).config.weights
        for models in (on_gpu(), members("llama", 2))
    )
    assert there == pytest.approx(here, abs=1e-3)
