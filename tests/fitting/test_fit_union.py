"""`fit` for members with different tokenizers, against the definition of their ensemble, text by text."""

import math

import pytest
import torch
from mixed import TEXTS, Definition, family

import hf_spec_ensemble as se
from hf_spec_ensemble.fitting.texts import texts_of


PAIRS = [
    ("The answer to the question is", " naïve façade, the answer 12"),
    ("Ann has 5 €", " or three boxes of pens €5"),
    ("Größe and 🙂", " question 🙃"),
    ("Question: how many", " пens?\nAnswer: thirty six"),
]


def named(definition: Definition, i: int, text: str) -> tuple:
    """The tokens of a text, without a prompt, as the definition names them."""
    names = {token: name for name, tokens in definition.own[i].items() for token in tokens}
    return tuple(names[t] for t in definition.tokenizers[i].encode(text, add_special_tokens=False))


def split_up(definition: Definition, name: bytes) -> list[bytes]:
    """A string in those of the definition, the longest first."""
    parts = []
    while name:
        parts.append(next(name[:end] for end in range(len(name), 0, -1) if name[:end] in definition.place))
        name = name[len(parts[-1]) :]
    return parts


@torch.no_grad()
def alone(definition: Definition, i: int, prompt: list[int], names: tuple) -> float:
    """Nats of a text under one member, which reads its own tokens for what it lacks."""
    nats, ids, own = 0.0, list(prompt), definition.own[i]
    known = [token for tokens in own.values() for token in tokens]
    for name in names:
        for token in definition.reads(i, name):
            probs = definition.models[i](torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1)
            nats -= float((probs[own[name]].sum() / probs[known].sum() if name in own else probs[token]).log())
            ids.append(token)
    return nats


@pytest.mark.parametrize("order", [(0, 2), (2, 0), (1, 0, 2)])
@pytest.mark.parametrize("method", ["weighted", "product"])
def test_texts_are_as_likely_as_the_definition_says(method, order):
    models, tokenizers = family(order)
    result = se.fit(
        models, PAIRS, tokenizers[0], method, held_out=PAIRS, batch_size=3, progress=False,
        assistant_tokenizer=tokenizers[1:],
    )  # fmt: skip
    common, n = method == "product", len(order)
    size = sum(len(answer.encode()) for _, answer in PAIRS)
    *members, uniform, fitted = (row.bits_per_byte * size * math.log(2) for row in result.rows)
    for weights, nats in (([1 / n] * n, uniform), (result.config.weights, fitted)):
        weights = torch.tensor(weights, dtype=torch.float64)

        def mix(probs, weights=weights):
            mixed = torch.einsum("n,nbw->bw", weights, probs.log() if common else probs)
            return mixed.softmax(-1) if common else mixed

        definition, expected = Definition(models, tokenizers, mix, common), 0.0
        for prompt, answer in PAIRS:
            names = named(definition, 0, answer)
            names = tuple(part for name in names for part in split_up(definition, name)) if common else names
            r = definition.following(definition.prompts(prompt), [names[:j] for j in range(len(names))])
            expected -= sum(float(row[definition.place[name]].log()) for row, name in zip(r, names))
        assert nats == pytest.approx(expected, abs=1e-5 if common else 1e-9)
    if not common:
        lacking = 0
        for i, nats in enumerate(members):
            parts = [(tokenizers[i](prompt)["input_ids"], named(definition, 0, answer)) for prompt, answer in PAIRS]
            lacking += sum(name not in definition.own[i] for _, names in parts for name in names)
            assert nats == pytest.approx(sum(alone(definition, i, *part) for part in parts), abs=1e-9)
        assert lacking


def test_texts_without_prompts_and_those_that_cannot_be_read():
    models, tokenizers = family((0, 2))
    both = dict(tokenizer=tokenizers[0], assistant_tokenizer=tokenizers[1], progress=False)
    result = se.fit(models, TEXTS, held_out=TEXTS, **both)
    assert sum(result.config.weights) == pytest.approx(1) and math.isfinite(result.rows[1].nats.value)
    with pytest.raises(ValueError, match="different vocabularies|different tokenizers"):
        se.fit(models, TEXTS, tokenizers[0])


@pytest.mark.parametrize("text", ["数学の問題です。", "🙂🙃 ok", "Привет, мир!"])
def test_what_counts_does_not_begin_within_a_character(text):
    _, (one, other) = family((0, 2))
    read = texts_of([text], one, others=[other])[0]
    before = one.decode(read.ids[: read.first], skip_special_tokens=True)
    assert "\ufffd" not in before and before and text.startswith(before)
    assert other.decode(read.prompts[0], skip_special_tokens=True).strip() == before
