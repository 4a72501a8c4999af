"""The ensemble's distribution: its formulas are tested in test_exactness.py, its edges here."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.ensemble.combine import combine, exclude_implausible, weighted_sum, works_on_probs
from hf_spec_ensemble.ensemble.distribution import EnsembleDistribution
from hf_spec_ensemble.ensemble.processing import PositionwiseProcessor


INF = torch.inf


def members(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("combine_on", ["probs", "logits", "raw_logits"])
@pytest.mark.parametrize("method", ["weighted", "product", "contrastive"])
@given(seed=st.integers(0, 1000), share=st.floats(0, 0.9))
def test_removed_tokens_never_turn_into_nan(method, combine_on, seed, share):
    """As after top-k: each member keeps one token at least, and what they keep need not overlap."""
    scores = members(2, 3, 8, seed=seed)
    removed = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < share
    removed.scatter_(-1, scores.argmax(-1, keepdim=True), False)
    config = EnsembleConfig(method=method, combine_on=combine_on, plausibility=0.1).for_members(2)
    scores = scores.masked_fill(removed, -INF)
    r = combine(scores.softmax(-1), config) if works_on_probs(config) else combine(scores, config).softmax(-1)
    assert not r.isnan().any()
    torch.testing.assert_close(r.sum(-1), torch.ones(3, dtype=torch.float64))
    if method == "contrastive":
        assert (r[removed[0]] == 0).all(), "what the expert removes stays removed"
    else:
        assert (r[removed.all(0)] == 0).all()


def test_members_that_keep_nothing_in_common_leave_the_heaviest_ones_tokens():
    scores = torch.tensor([[0.0, 1.0, -INF, -INF], [-INF, -INF, 2.0, 0.0]])
    assert (weighted_sum(scores, [0.7, 0.3]) > -INF).tolist() == [True, True, False, False]
    assert (weighted_sum(scores, [0.3, 0.7]) > -INF).tolist() == [False, False, True, True]


def test_what_an_amateur_removes_gains_no_more_than_its_worst_kept_token():
    scores = torch.tensor([[0.0, 0.0, 0.0], [3.0, 1.0, -INF]])
    assert weighted_sum(scores, [1.0, -1.0]).tolist() == [-3.0, -1.0, -1.0]


def test_a_member_of_weight_zero_has_no_say():
    scores = torch.tensor([[0.0, 1.0], [-INF, 5.0]])
    assert weighted_sum(scores, [1.0, 0.0]).tolist() == [0.0, 1.0]
    mixed = combine(scores.softmax(-1), EnsembleConfig(weights=[1.0, 0.0]))
    torch.testing.assert_close(mixed, scores[0].softmax(-1))


def test_the_plausibility_cut():
    expert = torch.tensor([0.6, 0.31, 0.29, 0.1]).log()
    assert (exclude_implausible(torch.zeros(4), expert, 0.5) == 0).tolist() == [True, True, False, False]
    assert (exclude_implausible(torch.zeros(4), expert, 0.0) == 0).all()
    assert (exclude_implausible(torch.zeros(4), expert, 1.0) == 0).tolist() == [True, False, False, False]


@pytest.mark.parametrize("returned", [lambda x: x, lambda x: x[0, ..., :1], lambda x: None])
def test_a_callable_that_returns_another_shape_is_told_so(returned):
    with pytest.raises(ValueError, match=r"must map the members' stacked tensors \(2, 3, 8\)"):
        combine(members(2, 3, 8), EnsembleConfig(method=returned))


def test_a_callable_on_probs_gets_probabilities_and_need_not_normalise():
    seen = []

    def total(probs):
        seen.append(probs)
        return probs.sum(0)

    config = EnsembleConfig(method=total, combine_on="probs")
    distribution = EnsembleDistribution(config, PositionwiseProcessor(LogitsProcessorList()), (8, 8), "cpu")
    one = np.ones(3, int)
    position = (torch.zeros(3, 4, dtype=torch.long), 3 * one, one)
    evidence = [distribution.evidence(logits, *position) for logits in members(2, 3, 1, 8)]
    r = distribution.target(evidence, *position, "probs")
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 3, 1, dtype=torch.float64))
    torch.testing.assert_close(r, members(2, 3, 1, 8).softmax(-1).mean(0))
