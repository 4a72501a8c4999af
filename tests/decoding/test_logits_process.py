"""EnsembleLogitsProcessor: by hand in any generate() call, and behind EnsembleConfig(speculative=False)."""

import oracle
import pytest
import torch
from families import EOS, PAD, VOCAB, members, prompts, tiny
from transformers.generation import TemperatureLogitsWarper

import hf_spec_ensemble as se


GREEDY = dict(do_sample=False, max_new_tokens=12)


def standard(**kwargs):
    return oracle.config_of("weighted", 2, speculative=False, **kwargs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["weighted", "weighted raw logits", "product", "contrastive"])
def test_greedy_by_hand(name, batch):
    models, inputs = members("llama", 2), prompts(batch)
    expected, _ = oracle.greedy(models, inputs, name, 12)
    processor = se.EnsembleLogitsProcessor(models[0], models[1], oracle.config_of(name, 2))
    for _ in range(2):  # the second call finds the first one's caches
        assert models[0].generate(**inputs, logits_processor=[processor], **GREEDY).tolist() == expected.tolist()


def test_it_can_be_used_for_one_prompt_after_another():
    models = members("llama", 3)
    processor = se.EnsembleLogitsProcessor(models[0], models[1:], oracle.config_of("weighted", 3))
    for seed in range(3):
        for batch in (1, 3):
            inputs = prompts(batch, seed=seed, length=5 + seed)
            expected, _ = oracle.greedy(models, inputs, "weighted", 8)
            out = models[0].generate(**inputs, logits_processor=[processor], do_sample=False, max_new_tokens=8)
            assert out.tolist() == expected.tolist()


def test_it_goes_on_where_an_interrupted_call_or_a_shorter_one_ended():
    """A prompt one token longer than what is cached may use the cache: its text must not show it."""
    models = members("llama", 2)
    processor = se.EnsembleLogitsProcessor(models[0], models[1], oracle.config_of("weighted", 2))
    inputs = prompts(1)
    short = models[0].generate(**inputs, logits_processor=[processor], do_sample=False, max_new_tokens=1)
    again = dict(input_ids=short, attention_mask=torch.ones_like(short))
    expected, _ = oracle.greedy(models, again, "weighted", 6)
    out = models[0].generate(**again, logits_processor=[processor], do_sample=False, max_new_tokens=6)
    assert out.tolist() == expected.tolist()


def test_padding_is_told_by_the_mask_where_the_token_does_not_tell():
    models = members("llama", 2)
    inputs = prompts(3)
    inputs["input_ids"][inputs["attention_mask"] == 0] = EOS  # as tokenizers without a padding token do it
    expected, _ = oracle.greedy(models, inputs, "weighted", 6)
    processor = se.EnsembleLogitsProcessor(
        models[0], models[1], oracle.config_of("weighted", 2), attention_mask=inputs["attention_mask"]
    )
    out = models[0].generate(**inputs, logits_processor=[processor], do_sample=False, max_new_tokens=6)
    assert out.tolist() == expected.tolist()


def test_sampling_by_hand_is_sampling_from_the_ensemble():
    """Same seed, same draws from torch's generator: the texts are the standard ensemble's."""
    models, inputs = members("llama", 2), prompts(3)
    processor = se.EnsembleLogitsProcessor(models[0], models[1], oracle.config_of("weighted", 2))
    texts = []
    for extra in (
        dict(logits_processor=[processor]),
        dict(assistant_model=models[1], ensemble_config=standard(coupling="maximal")),
    ):
        torch.manual_seed(0)
        texts.append(models[0].generate(**inputs, do_sample=True, max_new_tokens=10, **extra).tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("name", ["weighted", "contrastive"])
def test_exhaustive_beam_search_finds_the_most_probable_text(name, by_hand):
    """With as many beams as there are prefixes nothing is pruned, so brute force knows the result."""
    models = members("llama", 2, vocab=10)
    inputs = {key: value[:2] for key, value in prompts(3, vocab=10, length=5).items()}
    call = dict(do_sample=False, num_beams=100, max_new_tokens=3, length_penalty=0.0)
    if by_hand:
        processor = se.EnsembleLogitsProcessor(models[0], models[1], oracle.config_of(name, 2))
        call |= dict(logits_processor=[processor])
    else:
        call |= dict(assistant_model=models[1], ensemble_config=oracle.config_of(name, 2, speculative=False))
    out = models[0].generate(**inputs, **call, return_dict_in_generate=True, output_scores=True)
    for row in range(2):
        prompt = inputs["input_ids"][row, inputs["attention_mask"][row].bool()]
        probs = oracle.continuation_probs(models, prompt, name, 3)
        best = int(probs.flatten().argmax())
        found = out.sequences[row, 5:].tolist()
        assert found + [PAD] * (3 - len(found)) == [best // 100, best // 10 % 10, best % 10]
        torch.testing.assert_close(out.sequences_scores[row].double().exp(), probs.max(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_caches_follow_the_beams(family, monkeypatch):
    models, inputs = members(family, 2), prompts(3)
    call = dict(do_sample=False, num_beams=4, num_return_sequences=2, max_new_tokens=12)
    texts = []
    for cached in (True, False):
        processor = se.EnsembleLogitsProcessor(models[0], models[1], oracle.config_of("weighted", 2))
        if not cached:
            monkeypatch.setattr(se.EnsembleLogitsProcessor, "_parents", lambda self, input_ids: None)
        texts.append(models[0].generate(**inputs, **call, logits_processor=[processor]).tolist())
        passes = processor.passes[0]
    assert texts[0] == texts[1]
    assert passes == 12


def test_each_token_costs_one_pass_over_one_token():
    models = members("llama", 2)
    widths = []
    handle = models[1].register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    processor = se.EnsembleLogitsProcessor(models[0], models[1], oracle.config_of("weighted", 2))
    for beams in (1, 3):
        models[0].generate(
            **prompts(2), logits_processor=[processor], num_beams=beams, eos_token_id=VOCAB + 1, **GREEDY
        )
    handle.remove()
    assert widths == 2 * ([7] + [1] * 11)


def test_processors_reach_every_member_behind_a_config_and_the_ensemble_by_hand():
    """Where a temperature sits: on each member (probs), or on the combination."""
    models, inputs = members("llama", 2), prompts(1)
    call = dict(do_sample=True, max_new_tokens=1, return_dict_in_generate=True, output_scores=True, temperature=0.5)
    logits = [m(**inputs).logits[:, -1].double() for m in models]
    warp = TemperatureLogitsWarper(0.5)
    each = sum(w * warp(None, x).softmax(-1) for w, x in zip((0.6, 0.4), logits))
    out = models[0].generate(**inputs, **call, assistant_model=models[1], ensemble_config=standard())
    torch.testing.assert_close(out.scores[0].exp().double(), each, rtol=1e-4, atol=1e-7)
    processor = se.EnsembleLogitsProcessor(models[0], models[1], oracle.config_of("weighted", 2))
    out = models[0].generate(**inputs, **call, logits_processor=[processor])
    together = warp(None, sum(w * x.softmax(-1) for w, x in zip((0.6, 0.4), logits)).log()).softmax(-1)
    torch.testing.assert_close(out.scores[0].softmax(-1).double(), together, rtol=1e-4, atol=1e-7)


def test_beam_search_needs_no_coupling():
    models, texts = members("llama", 2), []
    for coupling in ("maximal", "gumbel"):
        torch.manual_seed(0)
        config = standard(coupling=coupling)
        call = dict(num_beams=2, do_sample=True, max_new_tokens=6)
        texts.append(models[0].generate(**prompts(1), assistant_model=models[1], ensemble_config=config, **call))
    assert texts[0].tolist() == texts[1].tolist()


def test_members_that_do_not_fit_are_refused_when_it_is_made():
    with pytest.raises(ValueError, match="different vocabularies"):
        se.EnsembleLogitsProcessor(tiny(), tiny(vocab=40), se.EnsembleConfig())
    with pytest.raises(ValueError, match="one entry for each member"):
        se.EnsembleLogitsProcessor(tiny(), tiny(), se.EnsembleConfig(weights=[0.5, 0.3, 0.2]))
