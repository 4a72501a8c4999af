"""Vision-language members: all read the same images, each with its own encoder, while they read the prompt."""

import functools

import pytest
import torch
from families import PAD, SPECIAL, VOCAB, alike, prompts, tiny
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from hf_spec_ensemble import EnsembleConfig, ensemble_decoding


IMAGE = VOCAB - 1  # the token that stands for a part of an image
SIDE, PATCH = 16, 8
PARTS = (SIDE // PATCH) ** 2
SIZE = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2)
VISION = SIZE | dict(image_size=SIDE, patch_size=PATCH, num_hidden_layers=1)
TEXT = SIZE | dict(
    vocab_size=VOCAB, num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.3, **SPECIAL
)


def _llava():
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**TEXT),
            vision_config=CLIPVisionConfig(**VISION),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            image_seq_length=PARTS,
        )
    )


def _gemma3():
    text = Gemma3TextConfig(
        **TEXT, sliding_window=5, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    )
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=SiglipVisionConfig(**VISION),
            image_token_id=IMAGE,
            mm_tokens_per_image=PARTS,
            boi_token_id=VOCAB - 2,
            eoi_token_id=VOCAB - 3,
        )
    )


MODELS = {"llava": _llava, "gemma3": _gemma3}


@functools.cache
def _members(family: str) -> list:
    return alike(MODELS[family], likeness=0.8)


def members(family: str) -> list:
    return list(_members(family))


def inputs_of(family: str, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """An image in front of every prompt, padding before it."""
    text = prompts(batch, vocab=VOCAB - 3)
    ids = torch.cat([torch.full((batch, PARTS), IMAGE), text["input_ids"]], dim=1)
    mask = torch.cat([torch.ones(batch, PARTS, dtype=torch.long), text["attention_mask"]], dim=1)
    for row in range(batch):  # padding to the left of the image
        padding = int((text["attention_mask"][row] == 0).sum())
        ids[row] = torch.cat([torch.full((padding,), PAD), ids[row, :PARTS], text["input_ids"][row, padding:]])
        mask[row] = (torch.arange(len(ids[row])) >= padding).long()
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


def generate(models, inputs, config, **kwargs):
    torch.manual_seed(3)
    kwargs = dict(max_new_tokens=14, return_dict_in_generate=True) | kwargs
    return models[0].generate(**inputs, assistant_model=models[1:], ensemble_config=config, **kwargs)


@torch.no_grad()
def greedy_formula(models, inputs, steps):
    """Every member reads the image and the text of every row, alone and without a cache, for every token."""
    rows = []
    for b in range(len(inputs["input_ids"])):
        seen = inputs["attention_mask"][b].bool()
        ids = inputs["input_ids"][b][seen][None]
        for _ in range(steps):
            more = {"token_type_ids": (ids == IMAGE).long()} if "token_type_ids" in inputs else {}
            probs = [
                m(ids, pixel_values=inputs["pixel_values"][b : b + 1], use_cache=False, **more)
                .logits[0, -1]
                .softmax(-1)
                for m in models
            ]
            ids = torch.cat([ids, sum(probs).argmax()[None, None]], dim=1)
        rows.append(ids[0, -steps:].tolist())
    return rows


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", MODELS)
def test_both_ensembles_are_the_formula(family, batch):
    models, inputs = members(family), inputs_of(family, batch)
    expected = greedy_formula(models, inputs, 10)
    for speculative in (True, False):
        config = EnsembleConfig(speculative=speculative)
        out = generate(models, inputs, config, max_new_tokens=10, eos_token_id=None)
        assert out.sequences[:, -10:].tolist() == expected


@pytest.mark.parametrize("draw", [dict(), dict(do_sample=True)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", MODELS)
def test_speculative_is_standard(family, batch, draw):
    models, inputs = members(family), inputs_of(family, batch)
    for settings in (dict(num_assistant_tokens=[3, 1, 2]), dict(weights=[0.5, 0.5, 0.0])):
        texts = [
            generate(models, inputs, EnsembleConfig(**settings, speculative=s), **draw).sequences.tolist()
            for s in (True, False)
        ]
        assert texts[0] == texts[1]


def test_the_image_matters_to_the_assistants():
    """Main model and assistants see different pictures if the encoders' outputs are passed on, the same if not."""
    models = members("llava")
    config = EnsembleConfig(weights=[0.0, 1.0, 0.0], speculative=False)
    inputs = inputs_of("llava", 1)
    alone = models[1].generate(**inputs, max_new_tokens=10)
    assert generate(models, inputs, config, max_new_tokens=10).sequences.tolist() == alone.tolist()
    other = inputs | {"pixel_values": -3 * inputs["pixel_values"]}
    assert models[1].generate(**other, max_new_tokens=10).tolist() != alone.tolist()


@pytest.mark.parametrize("family", MODELS)
def test_several_texts_of_an_image(family):
    models, inputs = members(family), inputs_of(family, 2)
    texts = [
        generate(models, inputs, EnsembleConfig(speculative=s), do_sample=True, num_return_sequences=2).sequences
        for s in (True, False)
    ]
    assert texts[0].shape[0] == 4
    assert texts[0].tolist() == texts[1].tolist()


def test_text_only_assistants_are_refused_before_the_first_pass():
    model, assistant = members("llava")[0], tiny("llama")
    passes = []
    hook = model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    for speculative in (True, False):
        with pytest.raises(ValueError, match="pixel_values"):
            generate([model, assistant], inputs_of("llava", 1), EnsembleConfig(speculative=speculative))
    hook.remove()
    assert not passes
    text = prompts(1, vocab=VOCAB - 3)
    generate([model, assistant], text, EnsembleConfig())  # without an image they may


def test_custom_generate_cannot_pass_on_images():
    models, inputs = members("llava"), inputs_of("llava", 1)
    call = dict(custom_generate=ensemble_decoding, assistant_models=models[1:], max_new_tokens=4)
    try:
        out = models[0].generate(**inputs, **call)
    except ValueError as error:
        assert "ensemble_config" in str(error)
    else:  # where the main model's encoders run in its first pass
        assert out.tolist() == generate(models, inputs, EnsembleConfig(), max_new_tokens=4).sequences.tolist()
