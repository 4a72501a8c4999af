"""
Random configurations, prompts, processors and ends of text: the ensemble gives what its formula says, or a documented
error before the first forward pass.

`RANDOM_CONFIGS` is the number of examples (60 by default) and `RANDOM_CONFIGS_SEED` an integer to draw others than the
default's, the same for every run; for a long search, in several processes if need be:

    RANDOM_CONFIGS=2000 RANDOM_CONFIGS_SEED=1 python -m pytest tests/test_random_configs.py
"""

import inspect
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import oracle
import pytest
import torch
from families import EOS, PAD, VOCAB, members, tiny
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

import hf_spec_ensemble as se


EXAMPLES = int(os.environ.get("RANDOM_CONFIGS", 60))
SEED = int(os.environ.get("RANDOM_CONFIGS_SEED", 0))

# In float64; with experts that are chosen in float32, what nearly ties would be no bug
ARCHITECTURES = ["llama", "qwen3", "gpt2", "opt", "gemma3"]
ENDS = {"never": [VOCAB + 1], "one": [EOS], "often": list(range(2, VOCAB, 4)), "at once": list(range(3, VOCAB))}
# Whether `generate` in this version of transformers does not penalise padding for being repeated
PENALTY = inspect.signature(RepetitionPenaltyLogitsProcessor.__init__).parameters["prompt_ignore_length"]
SPARES_PADDING = "Tensor" in str(PENALTY.annotation)
CALLABLES = {"root mean square": oracle.root_mean_square, "maximum": lambda members: members.amax(0)}


@dataclass
class Case:
    """One call of `generate`."""

    families: list[str]  # of the members and the drafter
    likeness: float | None  # of members of one family; None for unrelated ones
    fields: dict  # of the EnsembleConfig
    drafter: str | None
    prompt: list[list[int]]
    padding: list[int]  # on the left of each row
    draw: dict
    processors: dict
    end: str
    max_new_tokens: int
    cache: str | None  # implementation
    seed: int

    @property
    def n(self) -> int:
        return len(self.families) - 1

    @property
    def eos(self) -> list[int]:
        return ENDS[self.end]

    def models(self) -> list:
        if self.likeness is not None:
            return members(self.families[0], len(self.families), self.likeness)
        return [tiny(family, seed=i, layers=1 + i % 2) for i, family in enumerate(self.families)]

    def inputs(self) -> dict[str, torch.Tensor]:
        ids = torch.tensor(self.prompt)
        mask = (torch.arange(ids.shape[1]) >= torch.tensor(self.padding)[:, None]).long()
        return {"input_ids": ids * mask + PAD * (1 - mask), "attention_mask": mask}

    def refused(self) -> bool:
        """Whether the documentation says that this raises."""
        weights, method = self.fields.get("weights"), self.fields["method"]
        lengths = self.fields["num_assistant_tokens"]
        return (
            (method == "contrastive" and self.n != 2)
            or (method == "weighted" and weights is not None and sum(weights) == 0)
            or (method == "product" and weights is not None and max(weights) <= 0)
            or (weights is not None and len(weights) != self.n)
            or (isinstance(lengths, list) and len(lengths) != self.n + (self.drafter is not None))
        )

    def config(self, **kwargs) -> se.EnsembleConfig:
        fields = dict(self.fields)
        fields["method"] = CALLABLES.get(fields["method"], fields["method"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`weights` sum to")
            return se.EnsembleConfig(**fields | kwargs)

    def generate(self, **kwargs):
        models = self.models()
        torch.manual_seed(self.seed)
        return models[0].generate(
            **self.inputs(), assistant_model=models[1 : self.n], ensemble_config=self.config(**kwargs),
            drafter=models[-1] if self.drafter == "model" else self.drafter, max_new_tokens=self.max_new_tokens,
            eos_token_id=self.eos, return_dict_in_generate=True, output_scores=True, cache_implementation=self.cache,
            **self.draw, **self.processors,
        )  # fmt: skip

    def processor_list(self) -> list:
        eos = torch.tensor(self.eos)
        unpenalised = dict(prompt_ignore_length=torch.tensor(self.padding)) if SPARES_PADDING else {}
        make = {
            "repetition_penalty": lambda penalty: RepetitionPenaltyLogitsProcessor(penalty, **unpenalised),
            "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
            "bad_words_ids": lambda words: NoBadWordsLogitsProcessor(words, eos),
            "min_new_tokens": lambda n: MinNewTokensLengthLogitsProcessor(len(self.prompt[0]), n, eos),
        }
        return [make[name](value) for name, value in self.processors.items()]

    def formula(self) -> oracle.Method:
        """log r as documented; where processors rule out a token, all members lose it."""
        fields, n = self.fields, self.n
        weights = fields.get("weights") or [1 / n] * n
        if fields["method"] == "weighted":
            weights = [weight / sum(weights) for weight in weights]
        on = fields["combine_on"] or ("probs" if fields["method"] == "weighted" else "raw_logits")

        def linear(terms, factors):
            gone = torch.stack(list(terms)).isinf().any(0)
            return sum(w * t.masked_fill(gone, 0.0) for w, t in zip(factors, terms)).masked_fill(gone, -torch.inf)

        def combined(terms, plausibility):
            if fields["method"] in CALLABLES:
                return CALLABLES[fields["method"]](torch.stack(list(terms)))
            if fields["method"] != "contrastive":
                return linear(terms, weights)
            scores, expert = linear(terms, [1.0, -fields["contrast"]]), terms[0].softmax(-1)
            return scores.masked_fill(expert < plausibility * expert.amax(-1, keepdim=True), -torch.inf)

        def log_r(logits, process):
            cut = fields.get("plausibility", 0.0)
            if on == "raw_logits":
                scores, uncut = process(combined(logits, cut)), process(combined(logits, 0.0))
                nothing = (scores == -torch.inf).all(-1, keepdim=True)
                return torch.where(nothing, uncut, scores).log_softmax(-1)
            processed = [process(x) for x in logits]
            if on == "probs" and fields["method"] in ("weighted", *CALLABLES):
                scores = combined([x.softmax(-1) for x in processed], cut)
                return (scores / scores.sum(-1, keepdim=True)).log()
            return combined(processed, cut).log_softmax(-1)

        return oracle.Method(lambda n: {}, log_r)


@st.composite
def cases(draw) -> Case:
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    n, batch = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    method = pick("weighted", "product", "contrastive", *CALLABLES)
    fields = dict(method=method, combine_on=pick(None, *se.config.COMBINE_ON))
    if method == "root mean square" and fields["combine_on"] == "logits":
        fields["combine_on"] = "probs"  # the square of -inf, a removed token's, is no logit
    if method == "contrastive":
        n = pick(2, 2, 2, 2, 2, 3)
        fields |= dict(contrast=pick(0.0, 0.1, 0.5, 1.0), plausibility=pick(0.0, 0.1, 1.0))
    if method == "weighted":
        fields["weights"] = draw(
            st.none() | st.lists(st.sampled_from([0.0, 0.0, 0.2, 1.0, 3.0]), min_size=n, max_size=n)
        )
    if method == "product":
        weight = st.sampled_from([-1.0, -0.5, 0.0, 0.0, 0.3, 1.0, 1.5])
        fields["weights"] = draw(st.none() | st.lists(weight, min_size=n, max_size=n))
    drafter = pick(None, None, "prompt_lookup", "model")
    each = st.lists(st.integers(1, 4), min_size=n, max_size=n + (drafter is not None))
    fields["num_assistant_tokens"] = draw(st.just("auto") | st.integers(1, 6) | each)
    fields |= dict(alternate=pick(True, True, False), coupling=pick("gumbel", "gumbel", "maximal"))

    likeness = pick(0.0, 0.9, 0.9, 1.0, None)
    weights = fields.get("weights") or []
    if likeness == 1.0 and (fields.get("contrast") == 1.0 or (method == "product" and weights and sum(weights) == 0)):
        likeness = 0.9  # equal members that cancel out leave nothing but ties
    family = pick(*ARCHITECTURES)
    families = [family] * (n + 1) if likeness is not None else [pick(*ARCHITECTURES) for _ in range(n + 1)]
    length = pick(1, 2, 3, 7, 12)
    # Few different tokens, so that there is something to look up and to penalise
    tokens = st.lists(st.integers(3, pick(6, VOCAB - 1)), min_size=length, max_size=length)
    processors = {
        "repetition_penalty": pick(None, None, 1.3, 0.8),
        "no_repeat_ngram_size": pick(None, None, 2, 3),
        "bad_words_ids": pick(None, None, [[5]], [[7], [8, 9], [10, 11, 12]]),
        "min_new_tokens": pick(None, None, 1, 3),
    }
    sampled = dict(
        do_sample=True, temperature=pick(0.3, 1.0, 1.7), top_k=pick(0, 0, 1, 5), top_p=pick(1.0, 1.0, 0.5, 0.9)
    )
    max_new_tokens = pick(1, 2, 3, 8, 16)
    if max_new_tokens < 3:
        processors["min_new_tokens"] = pick(None, 1)
    return Case(
        families, likeness, fields, drafter,
        prompt=[draw(tokens) for _ in range(batch)],
        padding=[draw(st.integers(0, length - 1)) if batch > 1 else 0 for _ in range(batch)],
        draw=pick(dict(do_sample=False), sampled),
        processors={name: value for name, value in processors.items() if value is not None},
        end=pick("never", "one", "often", "at once"), max_new_tokens=max_new_tokens,
        cache=pick(None, "static"), seed=draw(st.integers(0, 9)),
    )  # fmt: skip


@contextmanager
def at_most(passes: int, models):
    """Fails instead of hanging."""
    made = [0]

    def count(*_):
        made[0] += 1
        assert made[0] <= passes, f"more than {passes} forward passes"

    hooks = [model.register_forward_pre_hook(count) for model in {id(model): model for model in models}.values()]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()


def check(case: Case) -> None:
    models = case.models()
    steps = case.max_new_tokens
    # A round settles a token in every row at least; in it each member and a drafter that goes on may run a few times
    with at_most((steps + 1) * (case.n + 1) * 8, models) as made:
        if case.refused():
            with pytest.raises((ValueError, TypeError)):
                case.generate()
            assert not made[0]
            return
        out = case.generate()

    length = len(case.prompt[0])
    new = out.sequences[:, length:]
    assert 1 <= new.shape[1] <= steps and len(out.scores) == new.shape[1]
    assert ((new >= 0) & (new < VOCAB)).all()
    ended = torch.zeros(len(new), dtype=torch.bool)
    for column, token in zip(out.scores, new.T):
        assert not column.isnan().any()
        assert (token[ended] == PAD).all()
        assert (column.gather(1, token[:, None])[~ended] > -torch.inf).all()
        ended |= torch.isin(token, torch.tensor(case.eos))
    assert new.shape[1] == steps or ended.all()

    if not case.draw["do_sample"]:
        text, _ = oracle.greedy(
            models[: case.n], case.inputs(), case.formula(), steps, case.processor_list(), tuple(case.eos)
        )
        assert out.sequences.tolist() == text.tolist()
        assert case.generate(speculative=False).sequences.tolist() == text.tolist()
    elif case.fields["coupling"] == "gumbel":
        assert out.sequences.tolist() == case.generate(speculative=False).sequences.tolist()


@seed(SEED)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(cases())
def test_a_random_call_is_the_formula_or_a_documented_error(case):
    check(case)
