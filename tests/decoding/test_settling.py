"""What settles a token: the owner of a position, or members whose lead the rest cannot change."""

import copy
import math

import numpy as np
import oracle
import pytest
import torch
from families import EOS, members, prompts, tiny
from test_sampling import p_value, small_members

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.decoding import drawing, settling
from hf_spec_ensemble.decoding.verify import exponential_noise, mixture_owners


def generate(models, inputs, config, seed=3, **kwargs):
    kwargs = dict(max_new_tokens=16, min_new_tokens=16, return_dict_in_generate=True) | kwargs
    torch.manual_seed(seed)
    return models[0].generate(**inputs, assistant_model=models[1:], ensemble_config=config, **kwargs)


def both(models, inputs, *, given=None, **kwargs):
    """The same call, speculative and standard."""
    fields = given or {}
    return [
        generate(models, inputs, EnsembleConfig(speculative=speculative, **fields), **kwargs)
        for speculative in (True, False)
    ]


# --- Owners -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_sampled_token_costs_one_pass_for_any_number_of_members(n):
    models = [tiny("llama", seed=i) for i in range(n)]  # that have nothing in common
    out = generate(models, prompts(1), EnsembleConfig(), do_sample=True, drafter=None)
    assert sum(out.stats.forward_passes) == 16


def test_a_token_is_drawn_from_its_owner():
    models = [tiny("llama", seed=i) for i in range(2)]
    config = EnsembleConfig(weights=[0.7, 0.3], trace=True)
    out = generate(models, prompts(1), config, do_sample=True)
    torch.manual_seed(3)
    rule = drawing.Ancestral([0.7, 0.3])
    tokens, position = out.sequences[0], np.arange(16)
    owners = rule.owners(position[None])[0]
    assert 0 < owners.sum() < 16, "not a test of both"
    assert out.stats.owned == [16 - owners.sum(), owners.sum(), 0], "the drafter owns none"
    assert [token.owner for token in out.trace.tokens] == owners.tolist()
    for at in position.tolist():
        logits = models[owners[at]](tokens[None, : 7 + at]).logits[0, -1:]
        assert int(rule.propose(logits.softmax(-1), np.array([at]))) == int(tokens[7 + at])


@pytest.mark.parametrize("weights", [[0.7, 0.3, 0.0], [0.0, 0.2, 0.8]])
def test_the_standard_ensemble_counts_the_same_owners(weights):
    """Of members without a weight none, and no passes either."""
    models = [tiny("llama", seed=i) for i in range(3)]
    both = [
        generate(models, prompts(3), EnsembleConfig(weights=weights, speculative=speculative), do_sample=True).stats
        for speculative in (True, False)
    ]
    assert both[0].owned[:3] == both[1].owned and both[0].row_tokens == both[1].row_tokens
    assert sum(both[1].owned) == both[1].new_tokens == sum(both[1].row_tokens)
    assert [bool(owned) for owned in both[1].owned] == [weight > 0 for weight in weights]
    assert both[0].authors[:3] == both[1].authors
    assert [passes > 0 for passes in both[1].forward_passes] == [i == 0 or w > 0 for i, w in enumerate(weights)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("drafter", [None, "prompt_lookup", "model"])
@pytest.mark.parametrize("lengths", ["auto", 1, 4])
def test_the_text_depends_on_the_seed_alone(batch, drafter, lengths):
    models = members("llama", 3)
    given = dict(weights=[0.2, 0.3, 0.5], num_assistant_tokens=lengths)
    kwargs = dict(do_sample=True, eos_token_id=[EOS, 20, 30], min_new_tokens=0)
    if drafter:
        kwargs["drafter"] = tiny("llama", seed=9) if drafter == "model" else drafter
    one, two = both(models, prompts(batch), given=given, **kwargs)
    assert one.sequences.tolist() == two.sequences.tolist()


def test_samples_follow_the_mixture_and_owners_that_stay_are_found_out(monkeypatch):
    """The classic mistake: an owner that stays for two positions, whose first token has told something about it."""
    models, config = small_members(2, likeness=0.0), oracle.config_of("weighted", 2)
    assert p_value(models, 3, config, "weighted") > 1e-3
    owners = drawing.Ancestral.owners
    monkeypatch.setattr(drawing.Ancestral, "owners", lambda self, position: owners(self, position // 2))
    assert p_value(models, 3, config, "weighted") < 1e-9


def test_owners_are_independent_of_tokens_and_of_each_other():
    rows, positions = np.arange(50)[:, None], np.arange(400)[None]
    owners = mixture_owners(7, rows, positions, [0.25, 0.75])
    assert owners.mean() == pytest.approx(0.75, abs=0.01)
    assert np.corrcoef(owners[:, :-1].ravel(), owners[:, 1:].ravel())[0, 1] == pytest.approx(0, abs=0.02)
    assert np.corrcoef(owners[:-1].ravel(), owners[1:].ravel())[0, 1] == pytest.approx(0, abs=0.02)
    noise = exponential_noise(7, *np.broadcast_arrays(rows, positions), 4)[..., 0].numpy()
    assert np.corrcoef(owners.ravel(), noise.ravel())[0, 1] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
def test_owners_have_a_weight(weights):
    owners = mixture_owners(1, np.zeros(2000, int), np.arange(2000), weights)
    assert set(owners.tolist()) == {i for i, weight in enumerate(weights) if weight}


@pytest.mark.parametrize("fields", [dict(method="product"), dict(combine_on="logits"), dict(method="contrastive")])
def test_what_is_no_mixture_of_probabilities_has_no_owners(fields):
    with pytest.raises(ValueError, match="'ancestral' draws from one component of a mixture.* Use 'auto'"):
        EnsembleConfig(coupling="ancestral", **fields)
    assert EnsembleConfig(**fields).for_members(2).coupling == "gumbel"
    assert EnsembleConfig().for_members(2).coupling == "ancestral"


def test_an_owner_that_gives_nothing_is_named():
    models = members("llama", 2)
    broken = copy.deepcopy(models[1])
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"New token \d+ of row 0 has no .*assistant model 1 .* gives nan"):
        generate([models[0], broken], prompts(1), EnsembleConfig(), do_sample=True)


# --- Enough -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("weights", [[0.9, 0.1], [0.6, 0.4], [0.4, 0.35, 0.25]])
@pytest.mark.parametrize("lengths", ["auto", 1, 4])
def test_greedy_text_is_the_standard_ensembles_and_light_members_are_asked_less(batch, weights, lengths):
    models = members("llama", len(weights))
    given = dict(weights=weights, num_assistant_tokens=lengths)
    one, two = both(models, prompts(batch), given=given, do_sample=False)
    assert one.sequences.tolist() == two.sequences.tolist()
    if weights[0] == 0.9 and lengths == 1:
        assert one.stats.forward_passes[1] < 10, "sixteen tokens"


class TiedModel:
    """Two members that give exact ties, whichever is asked first: the later one decides between two tokens."""

    @staticmethod
    def pair():
        models = [copy.deepcopy(tiny("llama", seed=i)) for i in range(2)]
        for model, favourite, share in zip(models, (30, 20), (2 / 3, 1.0)):
            model.lm_head.weight.data.zero_()
            model.lm_head.bias = torch.nn.Parameter(torch.full((model.config.vocab_size,), -1e4).double())
            other = 50 - favourite
            model.lm_head.bias.data[favourite] = math.log(share)
            model.lm_head.bias.data[other] = math.log(1 - share) if share < 1 else -1e4
        return models


def test_a_lead_that_the_rest_can_just_undo_settles_nothing(monkeypatch):
    """Token 30 has half of all weight, and token 20 the other half: the first of equals is 20."""
    models, given = TiedModel.pair(), dict(weights=[0.75, 0.25], num_assistant_tokens=1)
    one, two = both(models, prompts(1), given=given, do_sample=False, eos_token_id=None)
    assert set(two.sequences[0, 7:].tolist()) == {20}
    assert one.sequences.tolist() == two.sequences.tolist()
    monkeypatch.setattr(settling, "ROUNDING", -1.0)  # the classic mistake: a margin of zero, and less
    one, _ = both(models, prompts(1), given=given, do_sample=False, eos_token_id=None)
    assert one.sequences.tolist() != two.sequences.tolist()


# --- Scores that come later ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sample", [True, False])
def test_scores_and_logits_are_complete_at_the_end_and_do_not_change_the_text(batch, sample):
    models = members("llama", 3)
    kwargs = dict(do_sample=sample, eos_token_id=[EOS, 20, 30], min_new_tokens=0)
    one, two = both(models, prompts(batch), output_scores=True, output_logits=True, **kwargs)
    plain, _ = both(models, prompts(batch), **kwargs)
    assert one.sequences.tolist() == two.sequences.tolist() == plain.sequences.tolist()
    for row, length in enumerate((one.sequences[:, 7:] != 0).sum(1).tolist()):
        for name in ("scores", "logits"):
            pair = [torch.stack([column[row] for column in out[name][:length]]).double() for out in (one, two)]
            torch.testing.assert_close(*pair, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["lfm2", "mpt"])
@pytest.mark.parametrize("sample", [True, False])
def test_rows_in_step_that_end_early_have_complete_scores(family, sample):
    models, inputs = members(family, 2, likeness=0.5), prompts(3, 2)
    kwargs = dict(output_scores=True, output_logits=True, max_new_tokens=30, min_new_tokens=0)
    for seed in (2, 3, 8):
        given = dict(do_sample=sample, eos_token_id=[2, 20, 30, 7, 8, 9], seed=seed, **kwargs)
        one, two = both(models, inputs, given=dict(num_assistant_tokens=4), **given)
        assert one.sequences.tolist() == two.sequences.tolist()
        for row, length in enumerate((one.sequences[:, 2:] != 0).sum(1).tolist()):
            for name in ("scores", "logits"):
                pair = [torch.stack([column[row] for column in out[name][:length]]).double() for out in (one, two)]
                torch.testing.assert_close(*pair, rtol=0, atol=1e-5)


def test_a_call_that_shows_scores_follows_one_that_does_not():
    """Rows in step settle tokens in another way then, and what was planned for the one is no plan for the other."""
    models, inputs = members("lfm2", 2), prompts(3)
    kwargs = dict(do_sample=True, max_new_tokens=60, min_new_tokens=60)
    texts = [generate(models, inputs, EnsembleConfig(), output_scores=scores, **kwargs) for scores in (False, True)]
    assert texts[0].sequences.tolist() == texts[1].sequences.tolist()
