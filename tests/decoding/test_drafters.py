"""Proposers from outside the ensemble: the text stays the ensemble's, whatever they propose."""

import oracle
import pytest
import torch
from families import PAD, VOCAB, members, prompts, tiny
from test_sampling import VOCAB as SMALL
from test_sampling import chi_square_p, counts, p_value, small_members
from transformers.generation import CandidateGenerator

import hf_spec_ensemble as se
from hf_spec_ensemble.decoding.drafter import chosen_drafter


LENGTHS = ["auto", 1, 4]


class Guesses(CandidateGenerator):
    """Proposes up to four random tokens, and with `tells` returns their logits."""

    def __init__(self, vocab=VOCAB, tells=False):
        self.vocab, self.tells = vocab, tells
        self.feedback = []

    def get_candidates(self, input_ids, **kwargs):
        count = int(torch.randint(5, ()))
        logits = torch.randn(1, count, self.vocab)
        tokens = torch.multinomial(logits[0].softmax(-1), 1).T if count else input_ids[:, :0]
        return torch.cat([input_ids, tokens], 1), logits if self.tells else None

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        self.feedback.append((input_ids.shape[1], scores.shape[1] - 1, num_matches))


class Insists(Guesses):
    """Proposes the same token every time, however improbable it is."""

    def __init__(self, count=4):
        super().__init__()
        self.count = count

    def get_candidates(self, input_ids, **kwargs):
        return torch.cat([input_ids, torch.full((1, self.count), 5)], 1), None


def repeating(batch):
    """Prompts whose second half repeats the first, so that there is something to look up."""
    inputs = prompts(batch, length=8)
    return {key: torch.cat([value, value[:, -6:], value[:, -6:]], 1) for key, value in inputs.items()}


def generate(models, inputs, drafter, name="weighted", max_new_tokens=40, **kwargs):
    fields = {key: kwargs.pop(key) for key in list(kwargs) if key in se.EnsembleConfig.__dataclass_fields__}
    return models[0].generate(
        **inputs, assistant_model=models[1:], ensemble_config=oracle.config_of(name, len(models), **fields),
        drafter=drafter, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    "drafter,batch", [("model", 1), ("model", 3), ("prompt_lookup", 1), ("prompt_lookup", 3), ("guesses", 1)]
)
def test_greedy_text_is_the_ensembles(drafter, batch, lengths, alternate):
    models, inputs = members("llama", 2), repeating(batch)
    text, _ = oracle.greedy(models, inputs, "weighted", 40, eos=())
    drafter = {"model": members("llama", 3)[2], "guesses": Guesses()}.get(drafter, drafter)
    out = generate(
        models, inputs, drafter, do_sample=False, eos_token_id=[10_000], num_assistant_tokens=lengths,
        alternate=alternate,
    )  # fmt: skip
    assert out.sequences.tolist() == text.tolist()
    assert len(out.stats.forward_passes) == len(out.stats.acceptance) == 3
    if lengths != "auto":
        assert out.stats.verified[2] > 0
        assert alternate or out.stats.verified[:2] == [0, 0]


@pytest.mark.parametrize("drafter", ["prompt_lookup", "model"])
@pytest.mark.parametrize("coupling", ["maximal", "gumbel"])
def test_samples_follow_the_ensemble(drafter, coupling):
    models = small_members(2)
    config = oracle.config_of("weighted", 2, coupling=coupling, num_assistant_tokens=2)
    drafter = {"model": tiny("llama", seed=9, layers=1, vocab=SMALL).float()}.get(drafter, drafter)
    assert p_value(models, 3, config, "weighted", drafter=drafter) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["maximal", "gumbel"])
@pytest.mark.parametrize("drafter", [Guesses(SMALL), Guesses(SMALL, tells=True), Insists()])
def test_samples_follow_the_ensemble_whatever_a_generator_says(drafter, coupling):
    models = small_members(2)
    config = oracle.config_of("weighted", 2, coupling=coupling, num_assistant_tokens=2)
    torch.manual_seed(0)
    prompt = torch.tensor([[5, 3, 8]])
    texts = []
    for _ in range(400):
        out = models[0].generate(
            prompt, attention_mask=torch.ones_like(prompt), assistant_model=models[1], ensemble_config=config,
            drafter=drafter, do_sample=True, max_new_tokens=2,
        )[0, 3:]  # fmt: skip
        texts.append(torch.nn.functional.pad(out, (0, 2 - len(out)), value=PAD))
    probs = oracle.continuation_probs(models, prompt[0], "weighted", 2)
    assert chi_square_p([counts(torch.stack(texts), 2)], [probs.flatten()]) > 1e-3


@pytest.mark.parametrize("drafter", [None, "prompt_lookup"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_shared_noise_gives_the_same_text_with_any_drafter(drafter, lengths):
    models, inputs = members("llama", 2), repeating(3)
    texts = set()
    for one in (None, drafter, members("llama", 3)[2]):
        torch.manual_seed(2)
        out = generate(
            models, inputs, one, do_sample=True, coupling="gumbel", num_assistant_tokens=lengths, eos_token_id=[10_000]
        )
        texts.add(str(out.sequences.tolist()))
    assert len(texts) == 1


@pytest.mark.parametrize("name", ["weighted", "product"])
@pytest.mark.parametrize("speculative", [True, False])
def test_an_assistant_of_weight_zero_changes_nothing_and_need_not_verify(name, speculative):
    models, inputs = members("llama", 3), prompts(3)
    call = dict(do_sample=False, eos_token_id=[10_000], max_new_tokens=30, return_dict_in_generate=True)
    with_it = se.EnsembleConfig(method=name, weights=[0.6, 0.0, 0.4], num_assistant_tokens=2, speculative=speculative)
    out = models[0].generate(**inputs, assistant_model=models[1:], ensemble_config=with_it, **call)
    without = se.EnsembleConfig(method=name, weights=[0.6, 0.4], speculative=False)
    text = models[0].generate(**inputs, assistant_model=models[2], ensemble_config=without, **call)
    assert out.sequences.tolist() == text.sequences.tolist()
    if speculative:
        assert out.stats.proposed[1] > 0
    else:
        assert out.stats.forward_passes == [30, 0, 30]


def test_a_copied_text_takes_few_passes():
    """A model that has learnt to repeat its prompt would; here the ensemble is told to, by a processor."""
    models, inputs = members("llama", 2), prompts(1, length=30)
    prompt = inputs["input_ids"][0].tolist()

    def copy(row, ids):
        return [prompt[(len(ids) - 30) % 30]]

    call = dict(do_sample=False, eos_token_id=[10_000], prefix_allowed_tokens_fn=copy, max_new_tokens=120)
    alone = generate(models, inputs, None, **call).stats
    copied = generate(models, inputs, "prompt_lookup", num_assistant_tokens=8, **call).stats
    assert sum(copied.forward_passes[:2]) < 0.5 * sum(alone.forward_passes)
    assert copied.acceptance[2] > 0.9


@pytest.mark.parametrize("given", [{}, dict(num_assistant_tokens=2), dict(alternate=False), dict(speculative=False)])
def test_the_text_drafts_by_default_where_lengths_choose_themselves(given):
    models, call = members("llama", 2), dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    call |= dict(assistant_model=models[1], ensemble_config=se.EnsembleConfig(**given))
    out = models[0].generate(**repeating(1), **call)
    assert len(out.stats.proposed) == (2 if given else 3)
    assert len(models[0].generate(**repeating(1), drafter=None, **call).stats.proposed) == 2


def test_by_default_calls_do_not_learn_from_each_other():
    config = se.EnsembleConfig()
    assert chosen_drafter("auto", config) is not chosen_drafter("auto", config)


def test_a_generator_is_told_what_became_of_its_proposals():
    models, drafter = members("llama", 2), Guesses()
    stats = generate(models, prompts(1), drafter, do_sample=False, num_assistant_tokens=4, eos_token_id=[10_000]).stats
    assert sum(kept for _, _, kept in drafter.feedback) == stats.accepted[2]
    assert all(0 <= kept <= proposed for _, proposed, kept in drafter.feedback)


def test_a_generator_stops_at_the_end_and_at_the_longest_text_allowed():
    models, inputs = members("llama", 2), prompts(1)

    def five(row, ids):
        return [5]

    out = generate(
        models, inputs, Insists(50), do_sample=False, prefix_allowed_tokens_fn=five, num_assistant_tokens=16,
        max_new_tokens=9, eos_token_id=[10_000],
    )  # fmt: skip
    assert out.sequences[0, 7:].tolist() == [5] * 9
    out = generate(models, inputs, Insists(50), do_sample=False, prefix_allowed_tokens_fn=five, eos_token_id=5)
    assert out.sequences[0, 7:].tolist() == [5]


@pytest.mark.parametrize(
    "drafter,batch,kwargs,message",
    [
        ("lookup", 1, {}, "`drafter` must be a model, 'auto', 'prompt_lookup', .* 'lookup'"),
        (Guesses(), 3, {}, "one row"),
        (tiny("llama", vocab=30), 1, {}, "different vocabularies"),
        ("prompt_lookup", 1, dict(num_assistant_tokens=[1, 1]), "2 members and the drafter, but has 2"),
    ],
)
def test_bad_drafters_are_refused(drafter, batch, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(members("llama", 2), prompts(batch), drafter, **kwargs)


@pytest.mark.parametrize("draw", [dict(do_sample=False), dict(do_sample=True)])
@pytest.mark.parametrize("prompts_", [1, 3])
def test_suffixes_draft_and_remember_earlier_calls(prompts_, draw):
    models, inputs, suffixes = members("llama", 2), prompts(prompts_), se.Suffixes()
    kwargs = dict(max_new_tokens=30, return_dict_in_generate=True, **draw)
    outputs = []
    for drafter in (None, suffixes, suffixes):
        config = se.EnsembleConfig(weights=[0.6, 0.4], speculative=drafter is not None, num_assistant_tokens=4)
        torch.manual_seed(1)
        call = dict(assistant_model=models[1:], ensemble_config=config, **kwargs)
        outputs.append(models[0].generate(**inputs, **call, **({} if drafter is None else {"drafter": drafter})))
    standard, first, second = outputs
    assert standard.sequences.tolist() == first.sequences.tolist() == second.sequences.tolist()
    # The second call is about a text that the first one has seen
    assert second.stats.accepted[-1] > first.stats.accepted[-1] and second.stats.accepted[-1] > 10 * prompts_


def test_suffixes_learn_final_tokens_only():
    """What was proposed and rejected is not part of any text, nor is the prompt's padding."""
    models, inputs, suffixes = members("llama", 2, likeness=0.0), prompts(3), se.Suffixes()
    learnt = []
    text = suffixes.text

    def watched(prompt):
        learnt.append(list(prompt))
        made, number = text(prompt), len(learnt) - 1
        extend = made.extend
        made.extend = lambda tokens: (learnt[number].extend(tokens), extend(tokens))
        return made

    suffixes.text = watched
    out = models[0].generate(
        **inputs, assistant_model=models[1], ensemble_config=se.EnsembleConfig(), drafter=suffixes, max_new_tokens=20,
        min_new_tokens=20, do_sample=False,
    )  # fmt: skip
    for row, mask, known in zip(out.tolist(), inputs["attention_mask"].tolist(), learnt):
        visible = row[mask.index(1) :]
        assert known[: len(visible)] == visible


@pytest.mark.parametrize("coupling", ["ancestral", "gumbel"])
@pytest.mark.parametrize("kind", ["model", "generator", "weight zero"])
def test_a_drafter_of_unknown_cost_is_tried(kind, coupling):
    """Or it would never be known what it brings."""
    models, drafter = members("llama", 2, 0.9), {"model": tiny("llama", seed=7), "generator": Insists(2)}.get(kind)
    weights = [0.5, 0.5]
    if kind == "weight zero":
        models, weights = [*models, tiny("llama", seed=7)], [0.5, 0.5, 0.0]
    config = se.EnsembleConfig(weights=weights, coupling=coupling)
    call = dict(do_sample=True, max_new_tokens=60, eos_token_id=None, return_dict_in_generate=True, drafter=drafter)
    out = models[0].generate(**prompts(1), assistant_model=models[1:], ensemble_config=config, **call)
    assert out.stats.proposed[2] > 0
