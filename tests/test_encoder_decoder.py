"""Encoder-decoder members: each encodes once, with its own encoder, and the decoders form the ensemble."""

import copy
import functools

import pytest
import torch
from covering import pairwise
from families import BOS, EOS, PAD, SPECIAL, VOCAB, alike, prompts, tiny
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LogitsProcessorList,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_spec_ensemble import EnsembleConfig, EnsembleEncoderDecoderOutput, EnsembleLogitsProcessor, ensemble_decoding


LAYERS = dict(
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    init_std=0.4,
    vocab_size=VOCAB,
    forced_eos_token_id=None,
    decoder_start_token_id=BOS,
    **SPECIAL,
)
T5 = dict(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=VOCAB, initializer_factor=4.0)
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=PAD, **SPECIAL)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**LAYERS, max_position_embeddings=128)),
    "marian": lambda: MarianMTModel(MarianConfig(**LAYERS, max_position_embeddings=128)),
    "whisper": lambda: WhisperForConditionalGeneration(
        WhisperConfig(**LAYERS, num_mel_bins=8, max_source_positions=20, max_target_positions=128)
    ),
}
MEL = dict(bins=8, frames=40)


@functools.cache
def _members(family: str) -> list:
    return alike(MODELS[family], likeness=0.9)


def members(family: str) -> list:
    return list(_members(family))


def sources(family: str, batch: int) -> dict[str, torch.Tensor]:
    """What the encoders read: tokens padded on the right, or speech."""
    if family == "whisper":
        noise = torch.randn(batch, *MEL.values(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return {"input_features": noise}
    inputs = prompts(batch)
    return {name: value.flip(1) for name, value in inputs.items()}


def generate(models, inputs, config, **kwargs):
    torch.manual_seed(3)
    kwargs = dict(max_new_tokens=14, return_dict_in_generate=True, output_scores=True) | kwargs
    return models[0].generate(**inputs, assistant_models=models[1:], ensemble_config=config, **kwargs)


@torch.no_grad()
def greedy_formula(models, inputs, weights, start, steps):
    """Every member reads every row alone, without a cache, for every token."""
    rows = []
    for b in range(len(next(iter(inputs.values())))):
        source = {name: value[b : b + 1] for name, value in inputs.items()}
        if "attention_mask" in source:
            length = int(source["attention_mask"].sum())
            source = {"input_ids": source["input_ids"][:, :length]}
        row = [start]
        while len(row) <= steps and row[-1] != EOS:
            decoder = torch.tensor([row])
            logits = [model(**source, decoder_input_ids=decoder, use_cache=False).logits[0, -1] for model in models]
            row.append(int(sum(w * x.softmax(-1) for w, x in zip(weights, logits)).argmax()))
        rows.append(row + [PAD] * (steps + 1 - len(row)))
    longest = max(len([token for token in row[1:] if token != PAD]) for row in rows) + 1
    return [row[:longest] for row in rows]


FAMILIES = list(MODELS)
WEIGHTS = [0.5, 0.3, 0.2]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_ensembles_are_the_formula(family, batch):
    models, inputs = members(family), sources(family, batch)
    start = models[0].config.decoder_start_token_id
    expected = greedy_formula(models, inputs, WEIGHTS, start, 14)
    for speculative in (True, False):
        out = generate(models, inputs, EnsembleConfig(weights=WEIGHTS, speculative=speculative))
        text = out["sequences"].tolist()
        assert [row + [PAD] * (len(expected[0]) - len(row)) for row in text] == expected


CASES = pairwise(
    dict(
        family=list(FAMILIES),
        settings=[dict(num_assistant_tokens=[3, 1, 2]), dict(method="product"), dict(num_assistant_tokens=4)],
        batch=[1, 3],
        draw=[dict(), dict(do_sample=True, temperature=0.9)],
    )
)


@pytest.mark.parametrize("family,settings,batch,draw", CASES, ids=str)
def test_speculative_is_standard(family, settings, batch, draw):
    models, inputs = members(family), sources(family, batch)
    texts = [
        generate(models, inputs, EnsembleConfig(**settings, speculative=speculative), **draw)["sequences"].tolist()
        for speculative in (True, False)
    ]
    assert texts[0] == texts[1]


def test_it_saves_passes_and_encodes_once():
    models, inputs = members("t5"), sources("t5", 1)
    encoded = [0] * len(models)

    def counter(i):
        def count(*_):
            encoded[i] += 1

        return count

    hooks = [model.get_encoder().register_forward_hook(counter(i)) for i, model in enumerate(models)]
    out = generate(models, inputs, EnsembleConfig(num_assistant_tokens=1), eos_token_id=None, max_new_tokens=30)
    for hook in hooks:
        hook.remove()
    assert isinstance(out, EnsembleEncoderDecoderOutput)
    assert encoded == [1, 1, 1]
    assert sum(out.stats.forward_passes) < 3 * out.stats.new_tokens


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_several_texts_of_a_source(family):
    models, inputs = members(family), sources(family, 2)
    texts = [
        generate(models, inputs, EnsembleConfig(speculative=s), do_sample=True, num_return_sequences=3)["sequences"]
        for s in (True, False)
    ]
    assert texts[0].shape[0] == 6
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_beam_search_is_the_standard_ensemble_s(family):
    """A single member with all the weight searches as it does alone; by hand and by config is the same."""
    models, inputs = members(family), sources(family, 2)
    search = dict(num_beams=3, max_new_tokens=10)
    alone = models[0].generate(**inputs, **search)
    config = EnsembleConfig(weights=[1.0, 0.0, 0.0], speculative=False)
    assert generate(models, inputs, config, **search).sequences.tolist() == alone.tolist()

    config = EnsembleConfig(weights=WEIGHTS, speculative=False)
    by_config = generate(models, inputs, config, **search).sequences
    processor = EnsembleLogitsProcessor(models[0], models[1:], config, encoder_inputs=inputs)
    by_hand = models[0].generate(**inputs, **search, logits_processor=LogitsProcessorList([processor]))
    assert by_hand.tolist() == by_config.tolist()


def test_by_hand_it_needs_the_encoders_inputs():
    models = members("t5")
    with pytest.raises(ValueError, match="encoder_inputs"):
        EnsembleLogitsProcessor(models[0], models[1:], EnsembleConfig())


def test_without_the_switch():
    models, inputs = members("bart"), sources("bart", 3)
    config = EnsembleConfig()
    out = models[0].generate(
        **inputs, custom_generate=ensemble_decoding, assistant_models=models[1:], ensemble_config=config,
        max_new_tokens=14,
    )  # fmt: skip
    assert out.tolist() == generate(models, inputs, config).sequences.tolist()


def test_a_decoder_s_prompt():
    models, inputs = members("t5"), sources("t5", 1)
    prompt = torch.tensor([[PAD, 5, 9, 11]])
    texts = [
        generate(models, inputs, EnsembleConfig(speculative=s), decoder_input_ids=prompt).sequences
        for s in (True, False)
    ]
    assert texts[0].tolist() == texts[1].tolist()
    assert texts[0][:, :4].tolist() == prompt.tolist()


def test_both_kinds_in_one_ensemble_are_refused():
    models = members("t5")
    with pytest.raises(ValueError, match="members of one kind"):
        generate([models[0], tiny("llama")], sources("t5", 1), EnsembleConfig())
    with pytest.raises(ValueError, match="members of one kind"):
        generate([tiny("llama"), models[0]], prompts(1), EnsembleConfig())


def test_the_cache_that_is_returned_continues_the_text():
    models, inputs = members("bart"), sources("bart", 1)
    out = generate(models, inputs, EnsembleConfig(), eos_token_id=None)
    cache, length = out.past_key_values, out.past_key_values.get_seq_length()
    again = copy.deepcopy(models[0])(
        **inputs, decoder_input_ids=out.sequences[:, length:], past_key_values=cache, use_cache=True
    )
    whole = models[0](**inputs, decoder_input_ids=out.sequences, use_cache=False)
    torch.testing.assert_close(again.logits[:, -1], whole.logits[:, -1])
