"""Samples are distributed as the ensemble, by a chi-square test against brute-force probabilities."""

import copy

import oracle
import pytest
import torch
from covering import pairwise
from families import PAD, members, tiny
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.decoding.candidates import EnsembleCandidateGenerator


VOCAB = 10
DRAWS = 5_000
PROMPTS = [[5, 3, 8], [6], [7, 4]]
SHAPED = dict(temperature=0.7, top_k=8)
WARPERS = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(8)]


def batch(count: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, PROMPTS[:count]))
    rows = [[PAD] * (longest - len(row)) + row for row in PROMPTS[:count]]
    masks = [[0] * (longest - len(row)) + [1] * len(row) for row in PROMPTS[:count]]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def counts(texts: torch.Tensor, length: int = 3) -> torch.Tensor:
    """How often each of the `[V] * length` continuations occurs among `texts` [draws, length]."""
    index = (texts * VOCAB ** torch.arange(length - 1, -1, -1)).sum(1)
    return torch.bincount(index, minlength=VOCAB**length).double()


def chi_square_p(observed: list[torch.Tensor], probs: list[torch.Tensor]) -> float:
    """p-value of all counts together; outcomes of a prompt that are expected less than 5 times are pooled."""
    statistic, freedom = 0.0, 0
    for count, p in zip(observed, probs):
        assert count[p == 0].sum() == 0, "drew what has probability zero"
        expected = p * count.sum()
        rare = expected < 5
        count, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (count, expected))
        count, expected = count[expected > 0], expected[expected > 0]
        statistic += ((count - expected) ** 2 / expected).sum()
        freedom += len(expected) - 1
    return torch.special.gammaincc(torch.tensor(freedom / 2).double(), statistic / 2).item()


def draw(models, inputs, config, draws=DRAWS, length=3, seed=0, **kwargs) -> torch.Tensor:
    """`draws` samples of every prompt: [prompts, draws, length]."""
    torch.manual_seed(seed)
    prompt = inputs["input_ids"]
    out = models[0].generate(
        **inputs, assistant_model=models[1:], ensemble_config=config, do_sample=True, max_new_tokens=length,
        num_return_sequences=draws, **kwargs,
    )[:, prompt.shape[1] :]  # fmt: skip
    out = torch.nn.functional.pad(out, (0, length - out.shape[1]), value=PAD)  # all rows ended early
    return out.view(len(prompt), draws, length)


def p_value(models, prompts, config, name, shaped=False, draws=DRAWS, **kwargs) -> float:
    """Of so many samples of the first `prompts` prompts, in one call."""
    draws = -(-draws // prompts)
    texts = draw(models, batch(prompts), config, draws, **(SHAPED if shaped else {}), **kwargs)
    warpers = WARPERS if shaped else ()
    probs = [oracle.continuation_probs(models, torch.tensor(p), name, 3, warpers).flatten() for p in PROMPTS[:prompts]]
    return chi_square_p([counts(text) for text in texts], probs)


def small_members(n: int, family: str = "llama", likeness: float = 0.9) -> list:
    return [copy.deepcopy(model).float() for model in members(family, n, likeness, vocab=VOCAB)]


def _may_meet(case) -> bool:
    if case.get("coupling_and_shaped", ("",))[0] == "ancestral" and case.get("name", "weighted") != "weighted":
        return False
    return not {"name", "n"} <= set(case) or case["n"] in oracle.METHODS[case["name"]].members


CASES = pairwise(
    dict(
        name=["weighted", "weighted logits", "product", "contrastive", "callable"],
        n=[2, 3],
        prompts=[1, 3],
        alternate=[True, False],
        # Which of a coupling's draws go wrong depends on what is left of the probabilities
        coupling_and_shaped=[(rule, shaped) for rule in ("maximal", "gumbel", "ancestral") for shaped in (False, True)],
    ),
    _may_meet,
)


@pytest.mark.slow
@pytest.mark.parametrize("name,n,prompts,alternate,coupling_and_shaped", CASES)
def test_samples_follow_the_ensemble(name, n, prompts, alternate, coupling_and_shaped):
    models, (coupling, shaped) = small_members(n), coupling_and_shaped
    config = oracle.config_of(name, n, alternate=alternate, coupling=coupling, num_assistant_tokens=2)
    assert p_value(models, prompts, config, name, shaped) > 1e-3


@pytest.mark.parametrize(
    "name,coupling",
    [("weighted", "maximal"), ("weighted", "gumbel"), ("weighted", "ancestral"), ("contrastive", "gumbel")],
)
def test_the_standard_ensemble_follows_it_too(name, coupling):
    models = small_members(2)
    config = oracle.config_of(name, 2, coupling=coupling, speculative=False)
    assert p_value(models, 3, config, name, draws=10_000) > 1e-3


@pytest.mark.parametrize("lengths,n", [(1, 2), ([3, 1], 2), ([1, 2, 1], 3)])
def test_samples_of_different_proposal_lengths(lengths, n):
    models = small_members(n, "gemma3")
    config = oracle.config_of("weighted", n, num_assistant_tokens=lengths, coupling="maximal")
    assert p_value(models, 3, config, "weighted") > 1e-3


@pytest.mark.parametrize("coupling", ["maximal", "gumbel", "ancestral"])
@pytest.mark.parametrize("family", ["lfm2", "mpt"])
def test_samples_of_rows_in_step(family, coupling):
    """Rows are cut to the slowest, those that would end among them: by another's draws, never by their own."""
    config = oracle.config_of("weighted", 2, num_assistant_tokens=2, coupling=coupling)
    assert p_value(small_members(2, family), 1, config, "weighted", draws=10_000) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 3])  # of 2, the second proposal is the text's end; of 3, only EOS is
def test_samples_of_four_rows_in_step_drawn_one_call_at_a_time(length):
    """In a large batch some row always loses its first proposal; among four, rows also go on together, or alone."""
    models = small_members(2, "lfm2", likeness=0.0)
    config = oracle.config_of("weighted", 2, num_assistant_tokens=2, coupling="maximal")
    torch.manual_seed(0)
    prompt = torch.tensor(PROMPTS[:1])
    texts = []
    for _ in range(1500):
        out = models[0].generate(
            prompt, attention_mask=torch.ones_like(prompt), assistant_model=models[1:], ensemble_config=config,
            do_sample=True, max_new_tokens=length, num_return_sequences=4,
        )[:, prompt.shape[1] :]  # fmt: skip
        texts.append(torch.nn.functional.pad(out, (0, length - out.shape[1]), value=PAD))
    probs = oracle.continuation_probs(models, prompt[0], "weighted", length)
    assert chi_square_p([counts(torch.cat(texts), length)], [probs.flatten()]) > 1e-3


@pytest.mark.slow
def test_single_prompts_drawn_one_call_at_a_time():
    models = small_members(2, likeness=0.0)  # of members that agree, few draws would not tell a wrong residual
    config = oracle.config_of("weighted", 2, coupling="maximal")
    torch.manual_seed(0)
    prompt = batch(1)
    texts = []
    for _ in range(1000):
        out = models[0].generate(
            **prompt, assistant_model=models[1:], ensemble_config=config, do_sample=True, max_new_tokens=2
        )[0, prompt["input_ids"].shape[1] :]
        texts.append(torch.nn.functional.pad(out, (0, 2 - len(out)), value=PAD))
    probs = oracle.continuation_probs(models, torch.tensor(PROMPTS[0]), "weighted", 2)
    assert chi_square_p([counts(torch.stack(texts), 2)], [probs.flatten()]) > 1e-3


def test_the_same_seed_gives_the_same_text():
    """With "maximal" for fixed proposal lengths only, since measured times decide otherwise."""
    models = small_members(2)
    for config in (EnsembleConfig(num_assistant_tokens=2, coupling="maximal"), EnsembleConfig()):
        one, two, other = (draw(models, batch(3), config, draws=5, seed=seed) for seed in (1, 1, 2))
        assert one.tolist() == two.tolist() != other.tolist()


def test_sampling_leaves_the_state_of_the_generator_to_the_seed_alone():
    """With shared noise one number is drawn from torch's generator for a call, whatever the proposals."""
    models = small_members(2)
    after = set()
    for speculative in (True, False):
        draw(models, batch(3), EnsembleConfig(coupling="gumbel", speculative=speculative), draws=5)
        after.add(torch.rand(()).item())
    assert len(after) == 1


# --- The test has the power to tell -------------------------------------------------------------------------------


def _different():
    """Two members that disagree, with a proposer whose bonus token comes from the main model."""
    return [tiny("llama", seed=3, vocab=VOCAB), tiny("llama", seed=4, layers=1, vocab=VOCAB)]


def test_it_fails_for_a_kept_bonus_token(monkeypatch):
    """The classic mistake: the verifier's token after an accepted run is kept, though it comes from one member."""
    collect = EnsembleCandidateGenerator._collect

    def keep_bonus(self, proposed, drawable):
        candidates = collect(self, proposed, drawable)
        for row, proposals in enumerate(self.text.pending):
            for j, (author, _) in enumerate(proposals[: int(proposed[row])]):
                if author == 0:
                    candidates.r[row, j] = candidates.q[row, j]  # so that it is always accepted
        return candidates

    models = _different()
    config = oracle.config_of("weighted", 2, num_assistant_tokens=1, coupling="maximal")
    assert p_value(models, 3, config, "weighted") > 1e-3
    monkeypatch.setattr(EnsembleCandidateGenerator, "_collect", keep_bonus)
    assert p_value(models, 3, config, "weighted") < 1e-9


@pytest.mark.slow
def test_it_fails_for_the_assistant_ensemble_weight_of_transformers():
    models = _different()
    main, assistant = models
    prompt = torch.tensor(PROMPTS[:1])
    torch.manual_seed(0)
    texts = []
    for _ in range(500):
        out = main.generate(
            prompt, attention_mask=torch.ones_like(prompt), assistant_model=assistant, assistant_ensemble_weight=0.4,
            do_sample=True, max_new_tokens=2, top_k=0, num_assistant_tokens=1,
        )[0, prompt.shape[1] :]  # fmt: skip
        texts.append(torch.nn.functional.pad(out, (0, 2 - len(out)), value=PAD))
    probs = oracle.continuation_probs(models, torch.tensor(PROMPTS[0]), "weighted", 2)
    assert chi_square_p([counts(torch.stack(texts), 2)], [probs.flatten()]) < 1e-9
