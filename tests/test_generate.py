"""`generate(ensemble_config=...)` as its users meet it: what it accepts, returns, streams, refuses and survives."""

import copy
import logging

import oracle
import pytest
import torch
from families import BOS, EOS, PAD, VOCAB, members, prompts, tiny, tokenizer
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput
from transformers.generation.stopping_criteria import ConfidenceCriteria
from transformers.generation.streamers import BaseStreamer

import hf_spec_ensemble as se


WEIGHTS = se.EnsembleConfig(weights=[0.6, 0.4])
GREEDY = dict(do_sample=False, max_new_tokens=12)
BOTH = [True, False]  # speculative or not


def ensemble(speculative=True, **kwargs) -> se.EnsembleConfig:
    return oracle.config_of("weighted", 2, speculative=speculative, **kwargs)


@pytest.fixture
def pair():
    return members("llama", 2)


# --- Forward passes and statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("likeness", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("draw", [dict(do_sample=False), dict(do_sample=True)])
def test_never_more_passes_than_the_standard_ensemble_but_one_at_the_end(likeness, draw):
    main, assistant = members("llama", 2, likeness)
    for seed in range(8):
        passes = []
        for speculative in BOTH:
            torch.manual_seed(seed)
            config = ensemble(speculative, num_assistant_tokens=1, coupling="gumbel")
            out = main.generate(
                **prompts(1, seed=seed), assistant_model=assistant, ensemble_config=config, max_new_tokens=16,
                return_dict_in_generate=True, **draw,
            )  # fmt: skip
            passes.append(out.stats.forward_passes)
        assert all(ours <= standard + 1 for ours, standard in zip(*passes)), (seed, passes)


def test_one_pass_a_token_when_everything_is_accepted():
    """Three equal members with proposal length 1: the table in the documentation of the method."""
    model = tiny()
    out = model.generate(
        **prompts(1), assistant_model=[model, model],
        ensemble_config=se.EnsembleConfig(num_assistant_tokens=1, share_passes=False),
        eos_token_id=VOCAB + 1, do_sample=False, max_new_tokens=20, return_dict_in_generate=True,
    )  # fmt: skip
    assert out.stats.acceptance == [1.0, 1.0, 1.0]
    assert sum(out.stats.forward_passes) == 20 + 2
    assert max(out.stats.forward_passes) - min(out.stats.forward_passes) <= 1


@pytest.mark.parametrize("combine_on", ["probs", "raw_logits"])
@pytest.mark.parametrize("batch", [1, 3])
def test_equal_members_accept_everything_whatever_processors_there_are(batch, combine_on):
    """Proposals are drawn from processed probabilities, as the ensemble is."""
    model = tiny()
    for draw in (dict(do_sample=False), dict(do_sample=True, temperature=0.5, top_k=5)):
        out = model.generate(
            **prompts(batch), assistant_model=model, drafter=None,
            ensemble_config=se.EnsembleConfig(combine_on=combine_on, coupling="gumbel", share_passes=False),
            repetition_penalty=2.0, no_repeat_ngram_size=2, min_new_tokens=20, max_new_tokens=20,
            return_dict_in_generate=True, **draw,
        )  # fmt: skip
        assert out.stats.acceptance == [1.0, 1.0]


@pytest.mark.parametrize("batch", [1, 3])
def test_statistics(pair, batch):
    counted = [0, 0]
    handles = []
    for i, model in enumerate(pair):

        def count(*_, i=i):
            counted[i] += 1

        handles.append(model.register_forward_pre_hook(count))
    for speculative in BOTH:
        counted[:] = 0, 0
        config = ensemble(speculative, num_assistant_tokens=2, check_members=False)
        out = pair[0].generate(
            **prompts(batch), assistant_model=pair[1], ensemble_config=config, return_dict_in_generate=True, **GREEDY
        )
        stats = out.stats
        assert isinstance(out, GenerateDecoderOnlyOutput) and isinstance(out, se.EnsembleDecoderOnlyOutput)
        assert stats.forward_passes == counted
        after_end = (out.sequences[:, 7:] == EOS).cumsum(1)[:, :-1] > 0
        assert stats.new_tokens == out.sequences[:, 7:].numel() - int(after_end.sum())
        assert stats.row_tokens == [out.sequences.shape[1] - 7 - int(ended) for ended in after_end.sum(1)]
        assert stats.passes_per_token_of_a_row == sum(counted) / max(stats.row_tokens)
        assert stats.authors == ["LlamaForCausalLM (0)", "LlamaForCausalLM (1)"]
        assert stats.passes_per_token == sum(counted) / stats.new_tokens
        assert 0 < sum(stats.member_seconds) <= stats.seconds
        assert all(p >= v >= a >= 0 for p, v, a in zip(stats.proposed, stats.verified, stats.accepted))
        assert (sum(stats.accepted) > 0) == speculative
    for handle in handles:
        handle.remove()


def test_the_cache_that_is_returned_holds_the_text(pair):
    for batch in (1, 3):
        inputs = prompts(batch)
        out = pair[0].generate(
            **inputs, assistant_model=pair[1], ensemble_config=ensemble(num_assistant_tokens=2),
            return_dict_in_generate=True, **GREEDY, eos_token_id=VOCAB + 1,
        )  # fmt: skip
        length = out.past_key_values.get_seq_length()
        assert 7 < length < out.sequences.shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(out.sequences[:, 7:])], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, length:]
        with torch.no_grad():
            cached = pair[0](
                out.sequences[:, length:],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=out.past_key_values,
            ).logits[:, -1]
        for row in range(batch):
            visible = mask[row].bool()
            with torch.no_grad():
                whole = pair[0](out.sequences[row, visible][None], use_cache=False).logits[0, -1]
            torch.testing.assert_close(cached[row], whole)


def test_outputs_only_when_asked_for(pair):
    call = dict(**prompts(1), assistant_model=pair[1], ensemble_config=ensemble(), **GREEDY)
    assert isinstance(pair[0].generate(**call), torch.Tensor)
    out = pair[0].generate(**call, return_dict_in_generate=True)
    assert out.scores is None and out.logits is None
    out = pair[0].generate(**call, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == out.sequences.shape[1] - 7 and out.logits is None
    torch.testing.assert_close(out.scores[0].exp().sum(), torch.tensor(1.0, dtype=torch.float64))


# --- Ways in --------------------------------------------------------------------------------------------------------


def test_a_call_without_a_config_is_untouched(pair):
    plain = dict(**prompts(3), max_new_tokens=8, do_sample=True, return_dict_in_generate=True, output_scores=True)
    outputs = []
    for enabled in (True, False):
        (se.enable if enabled else se.disable)()
        torch.manual_seed(0)
        outputs.append(pair[0].generate(**plain))
    se.enable()
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert all(torch.equal(x, y) for x, y in zip(outputs[0].scores, outputs[1].scores))
    assert type(outputs[0]) is GenerateDecoderOnlyOutput
    torch.manual_seed(0)
    assert torch.equal(pair[0].generate(**plain, ensemble_config=None).sequences, outputs[0].sequences)


def test_assisted_generation_without_a_config_is_untouched(pair):
    texts = []
    for enabled in (True, False):
        (se.enable if enabled else se.disable)()
        torch.manual_seed(0)
        texts.append(pair[0].generate(**prompts(1), assistant_model=pair[1], max_new_tokens=8, do_sample=True).tolist())
    se.enable()
    assert texts[0] == texts[1]


def test_enable_and_disable_are_safe_to_call_twice(pair):
    ours = GenerationMixin.generate
    se.enable()
    assert GenerationMixin.generate is ours
    se.disable()
    se.disable()
    assert GenerationMixin.generate is not ours
    with pytest.raises(ValueError, match="ensemble_config"):
        pair[0].generate(**prompts(1), ensemble_config=ensemble())
    se.enable()
    se.enable()
    se.disable()
    assert not hasattr(GenerationMixin.generate, "__wrapped__") or "ensemble" not in GenerationMixin.generate.__module__
    se.enable()


@pytest.mark.parametrize("speculative", BOTH)
def test_the_plain_callable(pair, speculative):
    config = ensemble(speculative)
    expected = pair[0].generate(**prompts(3), assistant_model=pair[1], ensemble_config=config, **GREEDY)
    se.disable()
    out = pair[0].generate(
        **prompts(3), custom_generate=se.ensemble_decoding, assistant_models=pair[1:], ensemble_config=config, **GREEDY
    )
    se.enable()
    assert torch.equal(out, expected)
    out = pair[0].generate(
        **prompts(3), custom_generate=se.ensemble_decoding, assistant_models=pair[1:], ensemble_config=config, **GREEDY
    )
    assert torch.equal(out, expected)


def test_positional_arguments_and_generation_config(pair):
    inputs = prompts(1)
    expected = pair[0].generate(**inputs, assistant_model=pair[1], ensemble_config=ensemble(), **GREEDY)
    config = GenerationConfig(**GREEDY, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=BOS)
    for args, kwargs in (((inputs["input_ids"], config), {}), ((inputs["input_ids"],), dict(generation_config=config))):
        out = pair[0].generate(*args, assistant_model=pair[1:], ensemble_config=ensemble(), **kwargs)
        assert torch.equal(out, expected)
    assert config.assistant_confidence_threshold == GenerationConfig().assistant_confidence_threshold


@pytest.mark.parametrize("speculative", BOTH)
def test_pipeline(pair, speculative, tmp_path):
    pair[0].save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer())
    call = dict(assistant_model=pair[1], ensemble_config=ensemble(speculative), return_full_text=False, **GREEDY)
    text = pipe("hello", **call)[0]["generated_text"]
    ids = tokenizer()("hello", return_tensors="pt").input_ids
    expected, _ = oracle.greedy(
        [model, pair[1]], dict(input_ids=ids, attention_mask=torch.ones_like(ids)), "weighted", 12
    )
    assert text == tokenizer().decode(expected[0, 5:], skip_special_tokens=True)


@pytest.mark.parametrize("speculative", BOTH)
def test_several_sequences_for_each_prompt(pair, speculative):
    call = dict(assistant_model=pair[1], do_sample=True, max_new_tokens=6, num_return_sequences=4)
    texts = pair[0].generate(**prompts(3), ensemble_config=ensemble(speculative), **call)
    assert texts.shape == (12, 13)
    assert texts[:, :7].tolist() == prompts(3)["input_ids"].repeat_interleave(4, 0).tolist()
    assert len({tuple(row) for row in texts[:4].tolist()}) > 1


def test_a_users_processor_sees_right_prefixes(pair):
    """One that depends on the prefix, and on how long it is, though positions are scored out of order."""

    class Alternating(LogitsProcessor):
        stateless = True

        def __call__(self, input_ids, scores):
            token = torch.arange(scores.shape[1])
            banned = (token % 2 == input_ids.shape[1] % 2) | (token[None] % 5 == input_ids[:, -1:] % 5)
            return scores.masked_fill(banned, -torch.inf)

    call = dict(**prompts(3), assistant_model=pair[1], logits_processor=[Alternating()], **GREEDY)
    texts = [pair[0].generate(**call, ensemble_config=ensemble(s, num_assistant_tokens=3)).tolist() for s in BOTH]
    assert texts[0] == texts[1]


# --- Streaming and stopping -----------------------------------------------------------------------------------------


class Collector(BaseStreamer):
    def __init__(self, fail_after=None, error=RuntimeError):
        self.received, self.ended, self.fail_after, self.error = [], False, fail_after, error

    def put(self, value):
        if self.fail_after is not None and len(self.received) >= self.fail_after:
            raise self.error("from the streamer")
        self.received.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("batch", [1, 3])
def test_streamers_get_every_token_in_order(pair, batch):
    streams = []
    for speculative in BOTH:
        streamer = Collector()
        out = pair[0].generate(
            **prompts(batch), assistant_model=pair[1], ensemble_config=ensemble(speculative, num_assistant_tokens=3),
            streamer=streamer, **GREEDY,
        )  # fmt: skip
        assert streamer.ended
        assert streamer.received[1:] == out[:, 7:].T.tolist()
        streams.append(streamer.received)
    assert streams[0] == streams[1]


@pytest.mark.parametrize("batch", [1, 3])
def test_stopping_criteria_see_what_the_standard_ensemble_shows_them(pair, batch):
    class Watch(StoppingCriteria):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append((input_ids.tolist(), len(scores)))
            return (input_ids[:, 7:] % 5 == 4).any(1)

    calls = []
    for speculative in BOTH:
        watch = Watch()
        out = pair[0].generate(
            **prompts(batch), assistant_model=pair[1], ensemble_config=ensemble(speculative, num_assistant_tokens=3),
            stopping_criteria=[watch], return_dict_in_generate=True, output_scores=True, do_sample=False,
            max_new_tokens=25,
        )  # fmt: skip
        calls.append((watch.seen, out.sequences.tolist()))
    assert calls[0] == calls[1]
    assert out.sequences.shape[1] < 7 + 25, "not a test of stopping"


@pytest.mark.parametrize("where", ["argument", "generation_config", "model"])
def test_stop_strings_wherever_they_are_set(pair, where):
    model = copy.deepcopy(pair[0])
    given = {"argument": dict(stop_strings=["Hx"]), "generation_config": {}, "model": {}}[where]
    if where == "generation_config":
        given = dict(generation_config=copy.deepcopy(model.generation_config))
        given["generation_config"].stop_strings = ["Hx"]
    if where == "model":
        model.generation_config.stop_strings = ["Hx"]
    call = dict(
        **prompts(1), assistant_model=pair[1], do_sample=False, max_new_tokens=100, tokenizer=tokenizer(), **given
    )
    texts = [model.generate(**call, ensemble_config=ensemble(speculative)) for speculative in BOTH]
    assert texts[0].tolist() == texts[1].tolist()
    assert tokenizer().decode(texts[0][0, 7:]).endswith("Hx")
    assert model.generation_config.stop_strings == (["Hx"] if where == "model" else None)
    call.pop("tokenizer")
    with pytest.raises(ValueError, match="need the `tokenizer`"):
        model.generate(**call, ensemble_config=ensemble())


def test_max_time_stops(pair):
    call = dict(assistant_model=pair[1], ensemble_config=ensemble(), do_sample=False, max_new_tokens=100)
    assert pair[0].generate(**prompts(1), **call, max_time=1e-6).shape[1] < 107


# --- Interruptions --------------------------------------------------------------------------------------------------


class Failing(StoppingCriteria):
    def __init__(self, error):
        self.error = error

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= 10:
            raise self.error("from the criterion")
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("speculative", BOTH)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("source", ["streamer", "criterion", "model"])
def test_an_interruption_leaves_everything_usable(pair, source, error, speculative):
    call = dict(**prompts(3), assistant_model=pair[1], ensemble_config=ensemble(speculative), **GREEDY)
    settings = [copy.deepcopy(model.generation_config.to_dict()) for model in pair]
    before = pair[0].generate(**call)
    patched, hooks = GenerationMixin.generate, []
    extra = {}
    if source == "streamer":
        extra = dict(streamer=Collector(fail_after=4, error=error))
    elif source == "criterion":
        extra = dict(stopping_criteria=[Failing(error)])
    else:
        passes = []

        def fail(*_):
            passes.append(1)
            if len(passes) == 4:
                raise error("from the model")

        hooks.append(pair[1].register_forward_hook(fail))
    with pytest.raises(error, match="from the"):
        pair[0].generate(**call, **extra)
    for hook in hooks:
        hook.remove()
    assert GenerationMixin.generate is patched
    assert torch.equal(pair[0].generate(**call), before)
    assert [model.generation_config.to_dict() for model in pair] == settings


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_forward(pair):
    def forbid(*_):
        raise AssertionError("a forward pass was made")

    handles = [model.register_forward_pre_hook(forbid) for model in pair]
    yield
    for handle in handles:
        handle.remove()


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4))


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, state_size=4))


REFUSED = {
    "no assistant": (dict(assistant_model=None), ValueError, "needs the other members"),
    "no config object": (dict(ensemble_config={"method": "weighted"}), TypeError, "must be an EnsembleConfig"),
    "a name for a model": (dict(assistant_model="gpt2"), TypeError, "must be a loaded transformers model.*'gpt2'"),
    "weights": (
        dict(ensemble_config=se.EnsembleConfig(weights=[0.5, 0.3, 0.2])),
        ValueError,
        "one entry for each member",
    ),
    "contrastive": (
        dict(ensemble_config=se.EnsembleConfig(method="contrastive"), assistant_model=[tiny(), tiny()]),
        ValueError,
        "takes two members",
    ),
    "vocabularies": (dict(assistant_model=tiny(vocab=40)), ValueError, r"different vocabularies, of \[50, 40\]"),
    "encoder-decoder": (dict(assistant_model=t5()), ValueError, "members of one kind"),
    "beams": (dict(num_beams=3), ValueError, "`num_beams` = 3.*speculative=False"),
    "attentions": (dict(output_attentions=True, return_dict_in_generate=True), ValueError, "`output_attentions=True`"),
    "hidden states": (
        dict(output_hidden_states=True, return_dict_in_generate=True),
        ValueError,
        "`output_hidden_states=True`",
    ),
    "no cache": (dict(use_cache=False), ValueError, "leave out `use_cache=False`"),
    "other method": (
        dict(prompt_lookup_num_tokens=3),
        ValueError,
        "`prompt_lookup_num_tokens` .*another decoding method",
    ),
    "assistant weight": (dict(assistant_ensemble_weight=0.5), ValueError, "`assistant_ensemble_weight`"),
    "tokenizer": (dict(assistant_tokenizer=tokenizer()), ValueError, "`assistant_tokenizer` is given without"),
    "stateful processor": (dict(guidance_scale=1.5), ValueError, "may keep state from call to call"),
    "prefill chunks": (dict(prefill_chunk_size=2), ValueError, "`prefill_chunk_size`"),
    "misspelt argument": (dict(max_new_tokenz=3), ValueError, "max_new_tokenz"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_forward_pass(pair, no_forward, case):
    kwargs, error, message = REFUSED[case]
    call = dict(assistant_model=pair[1], ensemble_config=se.EnsembleConfig(), **GREEDY) | kwargs
    with pytest.raises(error, match=message):
        pair[0].generate(**prompts(1), **call)


@pytest.mark.parametrize("speculative", BOTH)
def test_vocabularies_padded_to_different_sizes(speculative, caplog):
    """The shared range is used; the padding of one member is never generated; it is said once."""
    main, assistant = (tiny("llama", seed=seed, vocab=vocab) for seed, vocab in ((0, 152), (1, 150)))
    cut = copy.deepcopy(main)
    cut.resize_token_embeddings(150)
    inputs = prompts(3)
    config = ensemble(speculative, num_assistant_tokens=2)
    with caplog.at_level(logging.WARNING, logger="hf_spec_ensemble"):
        for models in ([main, assistant], [assistant, main]):
            texts = [
                m[0].generate(**inputs, assistant_model=m[1:], ensemble_config=config, **GREEDY).tolist()
                for m in (models, [cut if m is main else m for m in models])
            ]
            assert texts[0] == texts[1]
    said = [record.message for record in caplog.records if "padded to different sizes" in record.message]
    assert len(said) == len(set(said)) and all("152" in text and "150" in text for text in said)


def test_right_padding_warns_as_in_transformers(pair, caplog):
    inputs = {key: value.flip(1) for key, value in prompts(3).items()}
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING, logger="transformers"):
        pair[0].generate(**inputs, assistant_model=pair[1], ensemble_config=ensemble(), **GREEDY)
    assert any("right-padding was detected" in record.message for record in caplog.records)


@pytest.mark.parametrize("eos", [None, 3])
@pytest.mark.parametrize("speculative", BOTH)
def test_a_criterion_of_the_callers_ends_texts(pair, speculative, eos):
    """In place of that of the config, as `generate()` has it."""
    call = dict(assistant_model=pair[1], max_new_tokens=12, do_sample=False, pad_token_id=PAD)
    free = pair[0].generate(**prompts(1), **call, ensemble_config=WEIGHTS, eos_token_id=None)[0, 7:].tolist()
    end = next(token for token in free[3:] if token != eos)
    config = ensemble(speculative)
    wanted = free[: free.index(end) + 1]
    call |= dict(stopping_criteria=[EosTokenCriteria(end)], eos_token_id=eos, ensemble_config=config)
    assert pair[0].generate(**prompts(1), **call)[0, 7:].tolist() == wanted
    results = se.generate_batch(pair[0], prompts(1)["input_ids"].tolist(), progress_bar=False, **call)
    assert results["req_0"].generated_tokens == wanted


@pytest.mark.parametrize("speculative", BOTH)
def test_criteria_of_transformers_may_look_at_scores(pair, speculative):
    call = dict(GREEDY, output_scores=True, return_dict_in_generate=True, eos_token_id=None)
    texts = [
        pair[0].generate(
            **prompts(1), **call, assistant_model=pair[1], ensemble_config=ensemble(each),
            stopping_criteria=[ConfidenceCriteria(0.02)],
        ).sequences.tolist()
        for each in (speculative, False)
    ]  # fmt: skip
    assert texts[0] == texts[1]
