"""Members with different tokenizers: texts are those of the ensemble over the union, by its definition."""

import copy

import numpy as np
import pytest
import torch
from mixed import TEXTS, Definition, family
from transformers import LlamaForCausalLM, StoppingCriteriaList, StopStringCriteria, TextStreamer

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.decoding.writing import Writer
from hf_spec_ensemble.ensemble.spelling import spelling_of
from hf_spec_ensemble.ensemble.union import Vocabulary, union_of
from hf_spec_ensemble.members.translated import TranslatedMember
from hf_spec_ensemble.members.uncached import member_of


ORDERS = [(0, 2), (2, 0), (0, 1, 2), (2, 1, 0)]
WEIGHTS = {2: [0.6, 0.4], 3: [0.5, 0.3, 0.2]}
SIGNED = {2: [1.5, -0.5], 3: [1.0, 0.7, -0.7]}


def weighted(probs):
    return torch.einsum("n,nbw->bw", torch.tensor(WEIGHTS[len(probs)]).double(), probs)


def product(probs):
    return torch.einsum("n,nbw->bw", torch.tensor(SIGNED[len(probs)]).double(), probs.log()).softmax(-1)


def contrastive(probs):
    scores = probs[0].log() - 0.4 * probs[1].log()
    plausible = probs[0] >= 0.1 * probs[0].amax(-1, keepdim=True)
    return torch.where(plausible, scores, -torch.inf).softmax(-1)


def root_mean_square(probs):
    return probs.square().mean(0).sqrt()


METHODS = {
    "weighted": (weighted, False, lambda n: dict(weights=WEIGHTS[n])),
    "product": (product, True, lambda n: dict(method="product", weights=SIGNED[n])),
    "contrastive": (contrastive, True, lambda n: dict(method="contrastive", contrast=0.4, plausibility=0.1)),
    "callable": (
        lambda probs: root_mean_square(probs) / root_mean_square(probs).sum(-1, keepdim=True),
        True,
        lambda n: dict(method=root_mean_square, combine_on="probs"),
    ),
}


def encoded(tokenizer, texts):
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def generate(order, texts, name, **kwargs):
    models, tokenizers = family(order)
    config = METHODS[name][2](len(order))
    ours = {key: kwargs.pop(key) for key in EnsembleConfig.__dataclass_fields__ if key in kwargs}
    inputs = encoded(tokenizers[0], texts)
    out = models[0].generate(
        **inputs, assistant_model=models[1:], tokenizer=tokenizers[0], assistant_tokenizer=tokenizers[1:],
        ensemble_config=EnsembleConfig(**config, **ours), **dict(max_new_tokens=12) | kwargs,
    )  # fmt: skip
    return out, inputs["input_ids"].shape[1]


def new_tokens(sequences, length, order):
    tokenizer = family(order)[1][0]
    rows = []
    for row in sequences[:, length:].tolist():
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        while end and row[end - 1] == tokenizer.pad_token_id:
            end -= 1
        rows.append(row[:end])
    return rows


def definition(order, name):
    mix, common, _ = METHODS[name]
    return Definition(*family(order), mix, common)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", METHODS)
def test_greedy_text_is_the_definitions(name, order, batch):
    if name == "contrastive" and len(order) > 2:
        pytest.skip("takes two members")
    wanted = [definition(order, name).greedy(text, 12) for text in TEXTS[:batch]]
    for more in (dict(num_assistant_tokens=3), dict(speculative=False), {}):
        out, length = generate(order, TEXTS[:batch], name, do_sample=False, **more)
        assert new_tokens(out, length, order) == wanted


@pytest.mark.parametrize("order", [(0, 2), (2, 0)])
def test_stop_strings_and_streamers_follow_what_is_written(order, capsys):
    tokenizer, by_definition = family(order)[1][0], definition(order, "weighted")
    for prompt in TEXTS:
        names = by_definition.greedy_names(prompt, 12)
        written = [by_definition.written(names[: n + 1]) for n in range(len(names))]
        texts = [tokenizer.decode(ids) for ids in written]
        later = [c for c in texts[-1] if c.isascii() and c.isalpha() and c not in texts[0]]
        if later:
            break
    stop = later[0]  # somewhere in a token that is not the first
    expected = next(ids for ids, text in zip(written, texts) if stop in text)
    for more in ({}, dict(speculative=False)):
        out, length = generate(order, [prompt], "weighted", do_sample=False, stop_strings=stop, **more)
        assert out[0, length:].tolist() == expected
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        out, length = generate(order, [prompt], "weighted", do_sample=False, streamer=streamer, **more)
        assert capsys.readouterr().out == tokenizer.decode(out[0, length:]) + "\n"
        assert out[0, length:].tolist() == written[-1]


def test_a_stop_string_may_end_within_what_one_token_is_written_as():
    tokenizer, theirs = family((0, 2))[1]
    union = union_of(tuple(Vocabulary(spelling_of(t), len(t), (t.eos_token_id,)) for t in (tokenizer, theirs)))
    for token in range(union.main_width, union.width):
        ids, text = union.maps[0].read(token), union.strings[token].decode(errors="replace")
        begins, ends = text.strip()[:1], tokenizer.decode(ids[-1:])
        if begins.isalpha() and text.isascii() and begins not in ends and len(ids) > 1:
            break
    assert begins not in ends and len(ids) > 1
    for stop, stops in ((begins, True), ("is" + text[: text.index(begins) + 1], True), (ends[-1], True), ("#", False)):
        writer = Writer(union.maps[0], torch.tensor([tokenizer.encode("It is")]), tokenizer.pad_token_id)
        writer.put(torch.tensor([token]), [True])
        criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
        assert writer.asked(criteria, writer.sequences(), None).tolist() == [stops]


def test_a_token_may_be_four_of_another_member():
    """A member reads them in one pass, and takes them back as one."""
    models, (tokenizer, theirs) = family((2, 0))
    spellings = [spelling_of(each) for each in (tokenizer, theirs)]
    own = [Vocabulary(s, len(t), (t.eos_token_id,)) for s, t in zip(spellings, (tokenizer, theirs))]
    way = union_of(tuple(own)).maps[1]
    long = next(u for u in range(len(tokenizer)) if len(way.read(u)) == 4)
    after = tokenizer.encode(" the answer", add_special_tokens=False)
    prompt = torch.tensor([theirs.encode("Ann has")])
    member = TranslatedMember(member_of(models[1], {"attention_mask": torch.ones_like(prompt)}, prompt), way)

    def score(new, end):
        return member.score(torch.tensor([new]), np.array([end]))[0]

    def expected(*texts):
        rows = [torch.tensor([[*prompt[0].tolist(), *(t for u in text for t in way.read(u))]]) for text in texts]
        return torch.stack([way.logits(models[1](row).logits[0, -1]) for row in rows])

    with torch.no_grad():
        text = [after[0], long, *after]
        assert torch.allclose(score(text, 3), expected(*(text[:n] for n in range(4))))
        assert member.seen.tolist() == [3] and member.passes == 1
        member.forget(np.array([1]), np.array([1]))
        other = [after[0], after[0], long, long]
        assert torch.allclose(score(other, 4), expected(*(other[:n] for n in range(2, 5))))
        member.forget(np.array([3]), np.array([2]))
        assert torch.allclose(score(other, 4), expected(other))


def test_rotary_embeddings_may_change_earlier_than_texts_in_the_unions_tokens_grow():
    models, tokenizers = family((2, 0))
    config = copy.deepcopy(models[1].config)
    config.rope_parameters = dict(rope_type="dynamic", factor=4.0, rope_theta=1e4)
    config.max_position_embeddings = len(tokenizers[1](TEXTS[0])["input_ids"]) + 4
    dynamic = LlamaForCausalLM(config).double().eval()
    call = dict(tokenizer=tokenizers[0], assistant_tokenizer=tokenizers[1], ensemble_config=EnsembleConfig())
    with pytest.raises(ValueError, match="dynamic.*change when a text gets longer"):
        models[0].generate(**encoded(tokenizers[0], TEXTS[:1]), assistant_model=dynamic, max_new_tokens=4, **call)


# --- Samples ------------------------------------------------------------------------------------------------------

DRAWS = 4_000
LEAST = 5 / DRAWS  # outcomes that are expected less often are pooled


def chi_square_p(order, name, prompts, definition_=None, **kwargs) -> float:
    """Of texts of three tokens, in the main model's ids, against the definition."""
    draws = -(-DRAWS // prompts)
    torch.manual_seed(0)
    out, length = generate(
        order, TEXTS[:prompts], name, do_sample=True, top_k=0, max_new_tokens=3, num_return_sequences=draws, **kwargs
    )
    drawn = new_tokens(out, length, order)
    statistic, freedom = 0.0, 0
    for i, text in enumerate(TEXTS[:prompts]):
        probs = (definition_ or definition(order, name)).likely(text, 3, LEAST * prompts)
        probs = {key: p for key, p in probs.items() if p >= LEAST * prompts}
        counts = dict.fromkeys(probs, 0)
        for row in drawn[i * draws : (i + 1) * draws]:
            if tuple(row) in counts:
                counts[tuple(row)] += 1
        pairs = [(counts[key], p * draws) for key, p in probs.items()]
        pairs.append((draws - sum(counts.values()), draws * (1 - sum(probs.values()))))
        assert len(pairs) > 20
        statistic += sum((count - expected) ** 2 / expected for count, expected in pairs)
        freedom += len(pairs) - 1
    return torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2)).item()


SAMPLES = [
    ("weighted", (0, 2), 1, dict(coupling="maximal", num_assistant_tokens=2)),
    ("weighted", (2, 1, 0), 3, {}),  # ancestral
    ("product", (2, 0), 1, {}),  # gumbel
    ("product", (0, 1, 2), 3, dict(coupling="maximal", num_assistant_tokens=2)),
]


@pytest.mark.parametrize("name,order,prompts,kwargs", SAMPLES)
def test_samples_follow_the_definition(name, order, prompts, kwargs):
    assert chi_square_p(order, name, prompts, **kwargs) > 1e-3
