"""What `generate()` takes besides: each of its features gives what it gives with the standard ensemble."""

import threading

import oracle
import pytest
import torch
from covering import pairwise
from families import BOS, EOS, PAD, members, prompts, tiny, tokenizer
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkDetector,
    WatermarkingConfig,
)
from transformers.generation import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
)

from hf_spec_ensemble import EnsembleConfig


PROMPT, NEW = 7, 16
LENGTHS = [2, 1, 3]


def ensemble(speculative=True, **kwargs):
    return EnsembleConfig(
        **dict(weights=[0.5, 0.3, 0.2], num_assistant_tokens=LENGTHS, speculative=speculative) | kwargs
    )


def generate(models, inputs, config, **kwargs):
    torch.manual_seed(3)
    kwargs = dict(max_new_tokens=NEW, return_dict_in_generate=True) | kwargs
    return models[0].generate(**inputs, assistant_model=models[1:], ensemble_config=config, **kwargs)


def even_after_odd(row, ids):
    return list(range(3 + int(ids[-1]) % 2, 50, 2)) + ([EOS] if len(ids) > 14 else [])


WATERMARK = WatermarkingConfig(bias=2.0, context_width=1)
FEATURES = {  # what generate() is given, and the same processors for the oracle
    "prefix_allowed_tokens_fn": (
        dict(prefix_allowed_tokens_fn=even_after_odd),
        lambda: [PrefixConstrainedLogitsProcessor(even_after_odd, 1)],
    ),
    "bad_words_ids": (
        dict(bad_words_ids=[[22], [17, 22], [34, 48]]),
        lambda: [NoBadWordsLogitsProcessor([[22], [17, 22], [34, 48]], EOS)],
    ),
    "sequence_bias": (
        dict(sequence_bias=[[[22], -4.0], [[34, 48], 3.0]]),
        lambda: [SequenceBiasLogitsProcessor([[[22], -4.0], [[34, 48], 3.0]])],
    ),
    "suppress_tokens": (
        dict(suppress_tokens=[22, 34], begin_suppress_tokens=[48]),
        lambda: [SuppressTokensLogitsProcessor([22, 34]), SuppressTokensAtBeginLogitsProcessor([48], PROMPT)],
    ),
    "forced_eos_token_id": (
        dict(forced_eos_token_id=EOS),
        lambda: [ForcedEOSTokenLogitsProcessor(PROMPT + NEW, EOS)],
    ),
    "forced_bos_token_id": (dict(forced_bos_token_id=9), lambda: [ForcedBOSTokenLogitsProcessor(9)]),
    "watermark": (dict(watermarking_config=WATERMARK), lambda: [WatermarkLogitsProcessor(50, "cpu", bias=2.0)]),
}


@pytest.mark.parametrize(
    "feature,name,batch", pairwise(dict(feature=list(FEATURES), name=["weighted", "product"], batch=[1, 3]))
)
def test_processors_are_the_formula(feature, name, batch):
    models, inputs = members("llama", 3), prompts(batch)
    arguments, processors = FEATURES[feature]
    text, _ = oracle.greedy(models, inputs, name, max_new_tokens=NEW, processors=processors())
    for speculative in (True, False):
        config = oracle.config_of(name, 3, num_assistant_tokens=LENGTHS, speculative=speculative)
        assert generate(models, inputs, config, **arguments).sequences.tolist() == text.tolist()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("feature", FEATURES)
def test_processors_with_shared_noise(feature, batch):
    models, inputs = members("llama", 3), prompts(batch)
    arguments, _ = FEATURES[feature]
    one, two = (generate(models, inputs, ensemble(s), do_sample=True, **arguments) for s in (True, False))
    assert one.sequences.tolist() == two.sequences.tolist()


def test_a_watermark_is_found():
    models, inputs = members("llama", 3), prompts(3)
    call = dict(do_sample=True, max_new_tokens=60, eos_token_id=None)
    detector = WatermarkDetector(model_config=models[0].config, device="cpu", watermarking_config=WATERMARK)
    marked = generate(models, inputs, ensemble(), watermarking_config=WATERMARK, **call).sequences[:, PROMPT:]
    plain = generate(models, inputs, ensemble(), **call).sequences[:, PROMPT:]
    assert detector(marked).all()
    assert not detector(plain).all()


@pytest.mark.parametrize("speculative", [True, False])
def test_a_text_streamer_prints_the_text(speculative, capsys):
    models, inputs = members("llama", 3), prompts(1)
    streamer = TextStreamer(tokenizer(), skip_prompt=True)
    out = generate(models, inputs, ensemble(speculative), streamer=streamer)
    assert capsys.readouterr().out.rstrip("\n") == tokenizer().decode(out.sequences[0, PROMPT:])


@pytest.mark.parametrize("draw", [dict(), dict(do_sample=True)], ids=["greedy", "sampled"])
def test_a_text_iterator_in_another_thread(draw):
    models, inputs = members("llama", 3), prompts(1)
    expected = generate(models, inputs, ensemble(False), **draw)
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=generate, args=(models, inputs, ensemble()), kwargs=dict(streamer=streamer, **draw)
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer().decode(expected.sequences[0, PROMPT:])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("draw", [dict(), dict(do_sample=True, temperature=0.8)], ids=["greedy", "sampled"])
def test_transition_scores(draw, batch):
    models, inputs = members("llama", 3), prompts(batch)
    scores = []
    for speculative in (True, False):
        out = generate(models, inputs, ensemble(speculative), output_scores=True, output_logits=True, **draw)
        scores.append(models[0].compute_transition_scores(out.sequences, out.scores, normalize_logits=False))
        assert scores[-1].isfinite().all()
        if not draw:
            _, log_r = oracle.greedy(models, inputs, HALF, max_new_tokens=NEW)
            for column, formula, tokens in zip(scores[-1].T, log_r, out.sequences[:, PROMPT:].T):
                going = tokens != PAD
                expected = formula.gather(1, tokens[:, None])[:, 0]
                torch.testing.assert_close(column[going].double(), expected[going].double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores[0].double(), scores[1].double(), rtol=0, atol=1e-5)


HALF = oracle.Method(
    lambda n: dict(weights=[0.5, 0.3, 0.2]),
    lambda logits, process: sum(w * process(x).softmax(-1) for w, x in zip([0.5, 0.3, 0.2], logits)).log(),
)


@pytest.mark.parametrize("speculative", [True, False])
def test_the_main_model_rules(speculative):
    """What assistants would do by themselves, stored in their generation configs, plays no role."""
    models, inputs = [tiny(seed=i) for i in range(2)], prompts(3)
    config = EnsembleConfig(speculative=speculative, num_assistant_tokens=2)
    before = generate(models, inputs, config)
    stored = models[1].generation_config
    models[1].generation_config = GenerationConfig(
        eos_token_id=[int(before.sequences[0, 9])], pad_token_id=40, bos_token_id=41, suppress_tokens=[22, 34, 48],
        do_sample=True, temperature=0.3, max_length=9, num_beams=2, repetition_penalty=2.0, forced_bos_token_id=5,
    )  # fmt: skip
    try:
        after = generate(models, inputs, config)
    finally:
        models[1].generation_config = stored
    assert after.sequences.tolist() == before.sequences.tolist()


@pytest.mark.parametrize("speculative", [True, False])
def test_settings_stored_with_the_main_model(speculative):
    models, inputs = members("llama", 2), prompts(3)
    config = EnsembleConfig(speculative=speculative)
    settings = dict(
        suppress_tokens=[22, 34], repetition_penalty=1.3, eos_token_id=[EOS, 11, 13], pad_token_id=PAD,
        bos_token_id=BOS,
        max_new_tokens=NEW,
    )  # fmt: skip
    given = generate(models, inputs, config, **settings)
    stored = models[0].generation_config
    models[0].generation_config = GenerationConfig(**settings)
    try:
        kept = generate(models, inputs, config, max_new_tokens=NEW)
    finally:
        models[0].generation_config = stored
    assert kept.sequences.tolist() == given.sequences.tolist()
    assert given.sequences.tolist() != generate(models, inputs, config).sequences.tolist()


@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("lengths", [dict(min_length=PROMPT + 12), dict(min_new_tokens=12)], ids=str)
def test_a_least_length(lengths, speculative):
    models, inputs = members("llama", 3), prompts(3)
    ends = list(range(2, 50, 3))
    short = generate(models, inputs, ensemble(speculative), eos_token_id=ends)
    assert short.sequences.shape[1] < PROMPT + 12
    out = generate(models, inputs, ensemble(speculative), eos_token_id=ends, **lengths).sequences[:, PROMPT:]
    assert not torch.isin(out[:, :12], torch.tensor([*ends, PAD])).any()
    expected = generate(models, inputs, ensemble(not speculative), eos_token_id=ends, **lengths)
    assert out.tolist() == expected.sequences[:, PROMPT:].tolist()


@pytest.mark.parametrize("speculative", [True, False])
def test_classifier_free_guidance(speculative):
    """It has its own cache and runs the main model without the prompt, once for each token, in order."""
    models, inputs = members("llama", 2), prompts(1)
    config = EnsembleConfig(method="product", speculative=speculative)
    out = generate(models, inputs, config, guidance_scale=1.5)
    guided = LogitsProcessorList([UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, models[0])])
    text, _ = oracle.greedy(models, inputs, SUM, max_new_tokens=NEW, processors=guided)
    assert out.sequences.tolist() == text.tolist()
    with pytest.raises(ValueError, match=r"UnbatchedClassifierFree.* may keep state.*combine_on='raw_logits'"):
        generate(models, inputs, EnsembleConfig(), guidance_scale=1.5)


SUM = oracle.Method(
    lambda n: dict(method="product"), lambda logits, process: process(logits.mean(0)).log_softmax(-1), members=(2,)
)


@pytest.mark.parametrize("speculative", [True, False])
def test_embeddings_as_a_prompt_are_refused(speculative):
    models, inputs = members("llama", 2), prompts(1)
    embeds = models[0].get_input_embeddings()(inputs["input_ids"]).detach()
    with pytest.raises(ValueError, match="`inputs_embeds` is not supported.*pass ids"):
        generate(models, dict(inputs_embeds=embeds), EnsembleConfig(speculative=speculative))
