"""Model classes that were wrong once, each for a reason of its own: now right, or refused before the first token."""

import pytest
import torch
from families import EOS, PAD, VOCAB
from sweep import CRASH, EQUAL, REFUSED, WRONG, sweep
from sweep_models import WINDOW, build, entries

import hf_spec_ensemble as se
from hf_spec_ensemble.members.check import reading_of
from hf_spec_ensemble.members.uncached import UncachedMember, member_of


ENTRIES = {entry.name: entry for entry in entries()}
STANDARD, SINGLE, BATCHES = ("standard",), ("standard", "fixed", "auto"), ("standard", "fixed", "ragged", "sampled")

# By name: ways that are right, and ways that are refused
CLASSES = {
    "openai-gpt": (BATCHES, ()),  # no cache: reads the whole text each time
    "minimax": (BATCHES, ()),  # a cache of its own
    "reformer": (SINGLE, ("ragged",)),
    "rwkv": (SINGLE, ("ragged",)),  # a state that the standard ensemble lost
    "xlm": ((), BATCHES),  # adds a token of its own to what it is given
    "xlnet": ((), BATCHES),
    "fsmt": ((), BATCHES),  # no causal mask over several decoder tokens
    "prophetnet": ((), ("fixed", "ragged", "sampled")),  # reads one token a pass
    "cpmant": ((), BATCHES),  # caches a prompt of its own
    "blt": ((), BATCHES),
    "gpt_neo": ((*BATCHES, "long"), ()),  # its window counts slots of the cache
    "moshi": (STANDARD, ("fixed", "ragged")),  # its cache has a window, its mask has none
    "dory": (STANDARD, ("fixed",)),  # adds layers to its cache in the first pass
    "git": (STANDARD, ("ragged",)),
    "bamba": (BATCHES, ()),  # reads on from its state, as do the next four
    "qwen3_5_moe_text": (BATCHES, ()),
    "kimi_linear": (SINGLE, ()),
    "bailing_hybrid": (SINGLE, ()),
    "mamba": (STANDARD, ("fixed", "ragged")),  # begins afresh
    "jamba": (STANDARD, ("fixed", "ragged")),
    "deepseek_v32": (STANDARD, ("fixed",)),  # a cache with an index
    "gemma4_text": (BATCHES, ()),  # layers that share keys
    "t5gemma": ((*BATCHES, "static"), ()),
    "t5gemma2": (BATCHES, ("static",)),
    "umt5": (BATCHES, ()),  # distances in slots
    "bart": (BATCHES, ()),  # decoder-only: left padding is wrong in transformers alone
}


@pytest.mark.parametrize("name", CLASSES)
def test_right_or_refused(name):
    right, refused = CLASSES[name]
    report = sweep(ENTRIES[name], (*right, *refused))
    found = {way: result.outcome for way, result in report.ways.items()}
    assert found == dict.fromkeys(right, EQUAL) | dict.fromkeys(refused, REFUSED), (report.ways, report.notes)
    assert not {WRONG, CRASH} & set(found.values())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("speculative", [True, False])
def test_sources_longer_than_the_decoders_window(speculative, batch):
    """transformers gives the cache of the attention to the source the decoder's window."""
    models = [build(ENTRIES["t5gemma"], seed, torch.float64) for seed in range(2)]
    source = torch.randint(3, VOCAB, (batch, 3 * WINDOW), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(source)
    for row in range(1, batch):
        source[row, -4 * row :], mask[row, -4 * row :] = PAD, 0
    config = se.EnsembleConfig(weights=[0.6, 0.4], num_assistant_tokens=[2, 3], speculative=speculative)
    out = models[0].generate(
        source, attention_mask=mask, assistant_models=models[1:], ensemble_config=config, max_new_tokens=12,
        do_sample=False,
    )  # fmt: skip
    for row, text in enumerate(out):
        text = text[: (text == EOS).int().argmax() + 1] if EOS in text else text
        read = dict(input_ids=source[row][mask[row].bool()][None], decoder_input_ids=text[None, :-1], use_cache=False)
        with torch.no_grad():
            r = sum(w * model(**read).logits[0].softmax(-1) for w, model in zip((0.6, 0.4), models))
        assert r.argmax(-1).tolist() == text[1:].tolist()


def test_a_state_that_is_written_to_in_place_is_found(monkeypatch):
    """Copies of states that share their memory would be overwritten."""
    model = build(ENTRIES["kimi_linear"], 0, torch.float64)
    monkeypatch.setattr("hf_spec_ensemble.members.snapshots._copied", dict)
    reading = reading_of(member_of(model, {}, torch.zeros(1, 7, dtype=torch.long)), speculative=True)
    assert "after a roll-back, differently" in reading.fault


def test_without_a_cache_the_whole_text_is_read(caplog):
    model = build(ENTRIES["openai-gpt"], 0, torch.float64)
    member = member_of(model, {}, torch.zeros(1, 7, dtype=torch.long))
    assert isinstance(member, UncachedMember)
    config = se.EnsembleConfig(num_assistant_tokens=2)
    model.generate(torch.tensor([[5, 6, 7]]), assistant_model=model, ensemble_config=config, max_new_tokens=6)
    assert "reads the whole text in every pass" in caplog.text


def test_padding_that_a_model_minds_is_warned_of(caplog):
    one, two = (build(ENTRIES["whisper"], seed, torch.float64) for seed in range(2))
    ids, mask = torch.tensor([[5, 6, 7], [PAD, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    call = dict(assistant_models=[two], ensemble_config=se.EnsembleConfig(), max_new_tokens=4)
    one.generate(ids[:1], attention_mask=mask[:1], **call)
    assert "left-padded" not in caplog.text
    one.generate(ids, attention_mask=mask, **call)
    assert "WhisperForCausalLM gives other logits for left-padded rows" in caplog.text
