"""`fit` as a whole, on tiny models in float64, against sums that are worked out text by text."""

import copy
import functools
import math

import pytest
import torch
from families import members, tiny, tokenizer

import hf_spec_ensemble as se
from hf_spec_ensemble.fitting.passes import Reading
from hf_spec_ensemble.fitting.texts import Text


TOKENIZER = tokenizer()
NAMES = TOKENIZER.convert_ids_to_tokens(range(50))
fit = functools.partial(se.fit, tokenizer=TOKENIZER, progress=False)


@functools.cache
def unlike(n: int = 2) -> list:
    return [tiny(seed=seed) for seed in range(n)]


def next_probs(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits[:, -1].softmax(-1)


@functools.cache
@torch.no_grad()
def sampled(weights: tuple[float, ...], count: int = 60, length: int = 30) -> list[str]:
    """Texts that a mixture of `unlike` writes, after two random letters."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 49, (count, 2), generator=generator)
    for _ in range(length):
        probs = sum(weight * next_probs(model, ids) for weight, model in zip(weights, unlike(len(weights))))
        probs[:, [0, 1, 2, 49]] = 0  # none of the special tokens
        ids = torch.cat([ids, torch.multinomial(probs, 1, generator=generator)], 1)
    return ["".join(NAMES[i] for i in row) for row in ids.tolist()]


def pairs(count: int = 24, skip: int = 0) -> list[tuple[str, str]]:
    """Prompts and answers of different lengths, as `unlike` writes them."""
    made = []
    for number, text in enumerate(sampled((0.6, 0.4))[skip : skip + count]):
        prompt = 2 + number % 3
        made.append((text[:prompt], text[prompt : prompt + 4 + number % 7]))
    return made


@torch.no_grad()
def answers_logits(models, pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[N, t, V]` and tokens of one answer: by a pass of the text alone, token by token."""
    first, ids = len(pair[0]), torch.tensor([TOKENIZER(pair[0] + pair[1])["input_ids"]])
    logits = [[model(ids[:, :end]).logits[0, -1] for end in range(first, ids.shape[1])] for model in models]
    return torch.stack([torch.stack(each) for each in logits]), ids[0, first:]


def nats_of(models, some, config) -> tuple[float, int]:
    """Of answers, in all, and their tokens, by the formulas of the ensembles."""
    total, count = 0.0, 0
    for pair in some:
        logits, tokens = answers_logits(models, pair)
        if config.method == "weighted":
            r = sum(weight * each.softmax(-1) for weight, each in zip(config.weights, logits))
        elif config.method == "product":
            r = sum(weight * each for weight, each in zip(config.weights, logits)).softmax(-1)
        else:
            r = (logits[0] - config.contrast * logits[1]).softmax(-1)
        total -= float(r.gather(1, tokens[:, None]).log().sum())
        count += len(tokens)
    return total, count


@pytest.mark.parametrize("known", [(0.7, 0.3), (0.2, 0.5, 0.3)])
def test_known_weights_are_recovered_from_texts(known):
    result = fit(unlike(len(known)), sampled(known), held_out=0.1)
    assert result.config.weights == pytest.approx(known, abs=0.05)
    assert not any(gain.is_noise for gain in result.gains if gain.over != "uniform")


@pytest.mark.parametrize("method", ["weighted", "product", "contrastive"])
def test_the_report_is_that_of_the_held_out_texts(method):
    models, texts, out = unlike(2), pairs(), pairs(9, skip=24)
    result = fit(models, texts, method=method, held_out=out)
    plain = se.EnsembleConfig(method=method).for_members(2)
    alone = [se.EnsembleConfig(weights=weights) for weights in ([1.0, 0.0], [0.0, 1.0])]
    size = sum(len(answer) for _, answer in out)
    for row, config in zip(result.rows, [*alone, plain, result.config], strict=True):
        nats, count = nats_of(models, out, config)
        assert row.nats.value == pytest.approx(nats / count, abs=1e-9)
        assert row.perplexity == pytest.approx(math.exp(nats / count), abs=1e-6)
        assert row.bits_per_byte == pytest.approx(nats / math.log(2) / size, abs=1e-9)
        assert row.nats.low <= row.nats.value <= row.nats.high
    assert (result.held_out.texts, result.held_out.tokens) == (9, size)
    # No weights beside the fitted ones make the fitted texts more likely: of convex objectives, none at all
    best = nats_of(models, texts, result.config)[0]
    for other in neighbours(result.config):
        assert nats_of(models, texts, other)[0] > best - 1e-4


def neighbours(config):
    fields = config.to_dict()
    if config.method == "contrastive":
        return [se.EnsembleConfig.from_dict(fields | {"contrast": config.contrast + 0.01})]
    a, b = config.weights
    moved = [[a + 0.01, b - 0.01], [a - 0.01, b + 0.01]] + ([[a + 0.01, b]] if config.method == "product" else [])
    return [se.EnsembleConfig.from_dict(fields | {"weights": weights}) for weights in moved if a > 0.02 and b > 0.02]


def test_only_answers_count():
    """What stands in the prompts changes what members say of the answers, and is not itself scored."""
    models, texts = unlike(2), pairs()
    result = fit(models, texts, held_out=texts)
    assert result.fitted_on.tokens == sum(len(answer) for _, answer in texts)
    whole = fit(models, [prompt + answer for prompt, answer in texts], held_out=texts)
    assert whole.fitted_on.tokens == sum(len(prompt + answer) - 1 for prompt, answer in texts)
    assert whole.config.weights != result.config.weights


@pytest.mark.parametrize("method", ["weighted", "product"])
def test_batches_of_any_size_give_the_same(method):
    models, texts = unlike(3), pairs()
    first = fit(models, texts, method=method, batch_size=1)
    for size in (3, 8, 100):
        other = fit(models, texts, method=method, batch_size=size)
        assert other.config.weights == pytest.approx(first.config.weights, abs=2e-4)
        for row, same in zip(other.rows[:3], first.rows):
            assert list(row.nats) == pytest.approx(list(same.nats), abs=1e-9)


def test_every_member_reads_every_text_once_unless_memory_lacks(monkeypatch, caplog):
    read = []
    logits = Reading._logits
    monkeypatch.setattr(Reading, "_logits", lambda self, *args: read.append(args) or logits(self, *args))
    models, texts = unlike(2), pairs()
    fit(models, texts, batch_size=100)
    assert len(read) == 2 * 2  # members, and parts
    read.clear()
    kept = fit(models, texts, method="product", batch_size=100)
    assert len(read) == 2 * 2 and "do not fit" not in caplog.text
    read.clear()
    again = fit(models, texts, method="product", batch_size=100, memory=1)
    assert again.config == kept.config and "do not fit into `memory`" in caplog.text
    assert len(read) == 2 * (2 + len(again.points) + 1)  # the held-out part once more for the report


@pytest.mark.parametrize("method", ["weighted", "product"])
def test_an_interruption_keeps_what_was_read(monkeypatch, method):
    logits, calls = Reading._logits, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 21:  # after ten batches, of two members
            raise KeyboardInterrupt
        return logits(self, *args)

    monkeypatch.setattr(Reading, "_logits", interrupted)
    models, texts = unlike(2), pairs(40)
    result = fit(models, texts, method=method, batch_size=2)
    assert result.interrupted and "interrupted" in str(result)
    assert result.fitted_on.texts + result.held_out.texts == 20
    calls[:] = [None] * 20  # at once
    with pytest.raises(KeyboardInterrupt):
        fit(models, texts, method=method, batch_size=2)


def test_an_interruption_keeps_the_sets_that_were_fitted(monkeypatch):
    logits, read = Reading._logits, []

    def interrupted(self, *args):
        read.append(args)
        if len(read) > 4:  # two parts of one set, two members
            raise KeyboardInterrupt
        return logits(self, *args)

    monkeypatch.setattr(Reading, "_logits", interrupted)
    with pytest.warns(UserWarning, match=r"Interrupted: \['two'\] were not fitted"):
        results = fit(unlike(2), {"one": pairs(), "two": pairs()}, batch_size=100)
    assert list(results) == ["one"] and not results["one"].interrupted


def test_several_sets_have_weights_each():
    models = unlike(2)
    sets = {"one": sampled((0.7, 0.3)), "two": pairs()}
    results = fit(models, sets, held_out={"one": 0.1, "two": 0.3})
    assert list(results) == ["one", "two"]
    for name, share in (("one", 0.1), ("two", 0.3)):
        assert results[name] == fit(models, sets[name], held_out=share)
    table = str(results)
    assert "one " in table and results["two"].numbers in table and "best member" in table
    with pytest.raises(ValueError, match="has nothing for 'two'"):
        fit(models, sets, held_out={"one": 0.1})


def test_what_is_no_gain_is_said():
    model = tiny(seed=3)
    noise = fit([model, model], sampled((0.7, 0.3))[:12])
    assert [gain.is_noise for gain in noise.gains] == [True, True]
    assert "the gain over uniform is within noise" in str(noise)
    assert "too few to rely on" in str(noise)
    other = fit(unlike(2), sampled((1.0, 0.0)), held_out=sampled((0.0, 1.0))[:12])
    assert "fitted is worse than LlamaForCausalLM (1) on the held-out texts" in str(other)
    useless = fit(unlike(2), sampled((1.0, 0.0)))
    assert useless.config.weights[1] < 0.03
    if useless.config.weights[1] == 0:
        assert "LlamaForCausalLM (1) has the weight 0: it only drafts" in str(useless)


def test_a_cut_that_forbids_what_was_written_is_said():
    models, texts = unlike(2), pairs()
    result = fit(models, texts, method="contrastive", plausibility=0.9)
    assert math.isinf(result.rows[-1].nats.value) and "impossible" in str(result)
    result = fit(models, texts, method="contrastive", plausibility="fit", held_out=texts)
    assert 0 < result.config.plausibility < 0.9 and math.isfinite(result.rows[-1].nats.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "sum"}, "`method` must be one of"),
        ({"method": torch.mean}, "A callable .* has no weights to fit"),
        ({"plausibility": 0.1}, "`plausibility` .0.1. is of method 'contrastive'"),
        ({"method": "contrastive", "plausibility": 2}, "`plausibility` must be a number in"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"held_out": 1.0}, "`held_out` must be a share"),
        ({"texts": []}, "no texts"),
        ({"texts": {}}, "at least one set"),
        ({"texts": ["ab" * 100, "ab"]}, "Text 0 has 200 tokens, but the members have 128 positions"),
        ({"members": [tiny(), tiny(vocab=60)]}, "different vocabularies"),
        ({"members": [tiny()]}, "at least two members"),
        ({"members": [tiny(), copy.deepcopy(tiny(seed=1)).train()]}, "Member 2, a LlamaForCausalLM, is in training"),
        ({"members": [tiny(), tiny(seed=1), tiny(seed=2)], "method": "contrastive"}, "takes two members"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_pass(monkeypatch, options, said):
    monkeypatch.setattr(Reading, "_logits", None)
    given = {"members": unlike(2), "texts": pairs()} | options
    with pytest.raises((ValueError, TypeError), match=said):
        fit(given.pop("members"), given.pop("texts"), **given)


def test_texts_that_no_member_knows_are_refused_by_a_product():
    generator = torch.Generator().manual_seed(0)
    texts = ["".join(NAMES[i] for i in torch.randint(3, 49, (30,), generator=generator).tolist()) for _ in range(10)]
    with pytest.raises(ValueError, match="less likely than random tokens"):
        fit(unlike(2), texts, method="product")


def test_padding_of_the_vocabulary_is_left_out():
    wide = tiny(vocab=51)
    models = [wide, tiny()]
    texts = pairs()
    result = fit(models, texts, held_out=texts)
    ids = torch.tensor([TOKENIZER("".join(texts[0]))["input_ids"]])
    reading = Reading(models, 50, [Text(tuple(ids[0].tolist()), 3, 1)], [])
    reading.run(progress=False)
    expected = wide(ids).logits[0, 2:-1, :50].log_softmax(-1).gather(1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(reading.log_probs(held_out=False)[0], expected.detach())
    assert len(result.rows) == 4


def test_plots_of_two_and_three_members(tmp_path):
    for n, method in ((2, "weighted"), (3, "weighted"), (2, "contrastive")):
        file = tmp_path / f"{n}-{method}.png"
        fit(unlike(n), pairs(), method=method).plot(file)
        assert file.stat().st_size > 5000
    with pytest.raises(ValueError, match="there is no plot"):
        fit(unlike(2), pairs(), method="product").plot()


def test_fitted_weights_decode():
    models = members()
    config = fit(models, pairs()).config
    ids = torch.tensor([[3, 4, 5]])
    out = models[0].generate(ids, assistant_model=models[1], ensemble_config=config, max_new_tokens=5, do_sample=False)
    assert out.shape[1] <= 8


def test_members_may_be_called_like_the_rows_of_the_report():
    models = [tiny(seed=3), tiny(seed=4)]
    for model, name in zip(models, ("runs/fitted", "runs/uniform")):
        model.config._name_or_path = name
    result = fit(models, sampled((0.7, 0.3))[:12])
    assert [row.name for row in result.rows] == ["fitted (member)", "uniform (member)", "uniform", "fitted"]


def test_a_member_has_no_prompt_of_its_own():
    model = tiny(seed=3)
    with pytest.raises(ValueError, match="without `with_prompt`"):
        fit([model, se.with_prompt(model, torch.tensor([[5, 6]]))], sampled((0.7, 0.3))[:12])
