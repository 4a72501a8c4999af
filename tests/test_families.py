"""Every family of models that users bring: the same text as the standard ensemble, and that as the formulas."""

import functools

import oracle
import pytest
import torch
import transformers
from covering import pairwise
from families import FAMILIES, IN_FLOAT32, MORE_FAMILIES, SPECIAL, VOCAB, members, prompts, tiny

from hf_spec_ensemble import EnsembleConfig


CONFIGS = {  # of three members that accept some proposals and reject others, and what makes rows uneven
    "own": dict(weights=[0.5, 0.3, 0.2], num_assistant_tokens=[2, 1, 3]),
    "lookup": dict(weights=[0.5, 0.3, 0.2]),
}


def generate(models, inputs, config, **kwargs):
    kwargs = dict(max_new_tokens=14, return_dict_in_generate=True, output_scores=True) | kwargs
    torch.manual_seed(3)
    return models[0].generate(**inputs, assistant_model=models[1:], ensemble_config=config, **kwargs)


def assert_same(models, inputs, settings, **kwargs):
    texts = []
    for speculative in (True, False):
        config = EnsembleConfig(**settings, speculative=speculative)
        out = generate(models, inputs, config, **kwargs if speculative else {**kwargs, "drafter": None})
        assert not any(column.isnan().any() for column in out.scores)
        texts.append(out.sequences.tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_standard_is_the_formula(family):
    models, inputs = members(family, 3), prompts(3)
    text, scores = oracle.greedy(models, inputs, "weighted", max_new_tokens=10)
    out = generate(models, inputs, oracle.config_of("weighted", 3, speculative=False), max_new_tokens=10)
    assert out.sequences.tolist() == text.tolist()
    tolerance = 1e-4 if family in IN_FLOAT32 else 1e-5
    torch.testing.assert_close(out.scores[0].double(), scores[0].double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "family,proposals,batch,do_sample",
    pairwise(dict(family=list(MORE_FAMILIES), proposals=list(CONFIGS), batch=[1, 3], do_sample=[False, True])),
)
def test_speculative_is_standard(family, proposals, batch, do_sample):
    kwargs = dict(drafter="prompt_lookup") if proposals == "lookup" else {}
    assert_same(members(family, 3), prompts(batch), CONFIGS[proposals], do_sample=do_sample, **kwargs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("likeness", [0.0, 0.6])
@pytest.mark.parametrize("family", ["xglm", "mpt", "lfm2", "llama4"])
def test_rows_in_step(family, likeness, batch):
    """Models that need rows of the same length, whose rows accept different numbers of proposals."""
    models = members(family, 3, likeness)
    inputs = prompts(batch)
    settings = dict(weights=[0.4, 0.3, 0.3], num_assistant_tokens=[4, 1, 2])
    assert_same(models, inputs, settings, max_new_tokens=24, eos_token_id=[2, 7, 11, 13])
    settings["num_assistant_tokens"] = 3
    assert_same(models, inputs, settings, max_new_tokens=24, do_sample=True, drafter="prompt_lookup")


HOLES = {  # prompts as people give them by mistake, or to hide a part: transformers decodes them
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]],
    "within": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1]],
    "one row": [[1, 1, 0, 1, 1, 1, 0]],
}


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "bloom", "mpt", "lfm2", "llama4"])
def test_tokens_of_a_prompt_that_are_hidden(family, holes):
    """They keep their slots, in which windows are measured, and the cache is handed out as generate() leaves it."""
    models, mask = members(family, 2, 0.6), torch.tensor(HOLES[holes])
    inputs = {"input_ids": prompts(1)["input_ids"] * mask, "attention_mask": mask}
    assert_same(models, inputs, dict(num_assistant_tokens=2), eos_token_id=[VOCAB + 1])
    own = models[0].generate(**inputs, max_new_tokens=14, eos_token_id=[VOCAB + 1], return_dict_in_generate=True)
    out = generate(models, inputs, EnsembleConfig(weights=[1.0, 0.0]), eos_token_id=[VOCAB + 1])
    assert out.sequences.tolist() == own.sequences.tolist()
    if out.past_key_values is not None:
        held = out.past_key_values.get_seq_length()
        assert 7 < held <= own.past_key_values.get_seq_length()
        i = next(i for i, layer in enumerate(out.past_key_values.layers) if hasattr(layer, "keys"))
        mine, theirs = (output.past_key_values.layers[i].keys for output in (out, own))
        if family in ("llama", "bloom", "mpt", "lfm2"):  # others hold a window
            torch.testing.assert_close(mine, theirs[:, :, :held], rtol=0, atol=1e-4)


MIXED = [("llama", "qwen3", "gpt2"), ("gemma3", "bloom", "llama"), ("xglm", "llama", "gpt2"), ("opt", "lfm2", "mpt")]


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("families", MIXED, ids="-".join)
def test_families_mixed_in_one_ensemble(families, batch, do_sample):
    assert set(families) <= {*FAMILIES, *MORE_FAMILIES}
    models = [tiny(family, seed=1) for family in families]
    settings = dict(weights=[0.6, 0.2, 0.2], num_assistant_tokens=2)
    assert_same(models, prompts(batch), settings, do_sample=do_sample)
    assert_same(models, prompts(batch), dict(method="product"), do_sample=do_sample)


# --- Models that keep a state of all that they have read ---------------------------------------------------------

SIZE = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, **SPECIAL)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=32)
EXPERTS = dict(num_experts=2, num_experts_per_tok=1)
MAMBA2 = dict(
    mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=8
)  # fmt: skip
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
RECURRENT = {  # by model type: the names of the classes, and settings
    "mamba": ("Mamba", "Mamba", dict(state_size=4)),
    "mamba2": ("Mamba2", "Mamba2", dict(state_size=8, num_heads=8, head_dim=8, n_groups=1, expand=2, chunk_size=8)),
    "jamba": (
        "Jamba",
        "Jamba",
        dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, **HEADS, **EXPERTS),
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        "GraniteMoeHybrid",
        dict(
            layer_types=["mamba", "attention"], num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=16,
            **HEADS, **MAMBA2,
        ),
    ),
    "nemotron_h": (
        "NemotronH",
        "NemotronH",
        dict(
            hybrid_override_pattern="M*", mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1,
            chunk_size=8, head_dim=8, **HEADS,
        ),
    ),
    "olmo_hybrid": ("OlmoHybrid", "OlmoHybrid", HEADS | LINEAR),
    "qwen3_next": (
        "Qwen3Next",
        "Qwen3Next",
        dict(head_dim=8, moe_intermediate_size=16, shared_expert_intermediate_size=16, **HEADS, **LINEAR, **EXPERTS),
    ),
    "qwen3_5_text": ("Qwen3_5Text", "Qwen3_5", dict(head_dim=8, **HEADS, **LINEAR)),
}  # fmt: skip


@functools.cache
def recurrent(family):
    config, model, settings = RECURRENT[family]
    config = getattr(transformers, f"{config}Config")(**SIZE, **settings)
    assert config.model_type == family
    models = []
    for seed in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models.append(getattr(transformers, f"{model}ForCausalLM")(config).eval())
    with torch.no_grad():
        for parameter in (p for model in models for p in model.parameters()):
            parameter.mul_(3.0)  # else they say one thing all the time
    return models


# These begin afresh, or read on in another way, where they read several tokens behind others
CANNOT_READ_ON = ("mamba", "jamba")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_members_of_the_standard_ensemble(family, batch):
    models, inputs = recurrent(family), prompts(batch)
    for assistant in (models[1], tiny("llama")):
        for own, alone in ((1.0, models[0]), (0.0, assistant)):
            config = EnsembleConfig(weights=[own, 1.0 - own], speculative=False)
            out = generate([models[0], assistant], inputs, config, do_sample=False)
            assert out.sequences.tolist() == alone.generate(**inputs, max_new_tokens=14).tolist()


@pytest.mark.parametrize("family", CANNOT_READ_ON)
def test_recurrent_members_that_cannot_read_on_are_refused(family):
    stateful, attentive = recurrent(family)[0], tiny("llama")
    for models in ([stateful, attentive], [attentive, stateful]):
        with pytest.raises(ValueError, match=r"reads several tokens at once.*speculative=False"):
            generate(models, prompts(1), EnsembleConfig())


READ_ON = pairwise(
    dict(
        family=[family for family in RECURRENT if family not in CANNOT_READ_ON],
        settings=[dict(weights=[0.5, 0.4, 0.1], num_assistant_tokens=[2, 3, 1]), dict(num_assistant_tokens=1)],
        batch=[1, 3],
        draw=[dict(), dict(do_sample=True), dict(eos_token_id=[2, 7, 11, 13])],
    )
)


@pytest.mark.parametrize("family,settings,batch,draw", READ_ON, ids=str)
def test_recurrent_members_read_on(family, settings, batch, draw):
    """Proposals are rejected and accepted; states go back, several times to the same place."""
    models = [*recurrent(family), tiny("llama")]
    assert_same(models, prompts(batch), settings, max_new_tokens=24, **draw)


@pytest.mark.parametrize("family", ["mamba2", "qwen3_next"])
@pytest.mark.parametrize("draw", [dict(do_sample=False), dict(do_sample=True)])
def test_scores_of_recurrent_members_count_every_member_once(family, draw):
    """They go back farther than they must, and read final tokens again."""
    models = recurrent(family)
    call = dict(draw, max_new_tokens=20, eos_token_id=None, output_scores=True, return_dict_in_generate=True)
    outs = []
    for speculative in (True, False):
        torch.manual_seed(3)
        config = EnsembleConfig(weights=[0.8, 0.2], num_assistant_tokens=3, speculative=speculative)
        outs.append(models[0].generate(**prompts(1), assistant_model=models[1], ensemble_config=config, **call))
    assert outs[0].sequences.tolist() == outs[1].sequences.tolist()
    for one, two in zip(outs[0].scores, outs[1].scores):
        torch.testing.assert_close(one.exp(), two.exp(), rtol=1e-4, atol=1e-5)
