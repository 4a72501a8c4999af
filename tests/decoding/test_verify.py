"""Properties of the verification functions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_spec_ensemble.decoding import verify
from hf_spec_ensemble.decoding.verify import (
    acceptance_probs,
    draw,
    exponential_noise,
    matches_before_mismatch,
    residual_probs,
    verify_match,
    verify_maximal,
)
from hf_spec_ensemble.ensemble.combine import mixture


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(2, 8), st.integers(0, 10_000))


def distributions(*shape, seed, sharpness=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


def drawn(q, seed):
    flat = torch.multinomial(q.flatten(0, 1), 1, generator=torch.Generator().manual_seed(seed))
    return flat.view(q.shape[:2])


def uniforms(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(SHAPES)
def test_the_residual_is_a_distribution_that_completes_r(shape):
    b, k, v, seed = shape
    q, r = distributions(b, k, v, seed=seed), distributions(b, k, v, seed=seed + 1)
    residual = residual_probs(q, r)
    assert (residual >= 0).all()
    torch.testing.assert_close(residual.sum(-1), torch.ones(b, k, dtype=torch.float64))
    # q min(1, r/q) + P(reject) residual = r: what makes the rule exact
    kept = torch.minimum(q, r)
    torch.testing.assert_close(kept + (1 - kept.sum(-1, keepdim=True)) * residual, r)


@given(SHAPES, st.lists(st.floats(0.05, 1), min_size=2, max_size=4))
def test_acceptance_never_drops_below_the_members_weight(shape, weights):
    b, k, v, seed = shape
    weights = torch.tensor(weights, dtype=torch.float64)
    weights = weights / weights.sum()
    members = distributions(len(weights), b, k, v, seed=seed)
    r = mixture(members, weights)
    for q, weight in zip(members, weights):
        every = torch.arange(v).expand(b, k, v)
        probs = torch.stack([acceptance_probs(every[..., x], q, r) for x in range(v)], dim=-1)
        assert (probs >= weight - 1e-12).all()  # token by token
        assert ((q * probs).sum(-1) >= weight - 1e-12).all()


@given(SHAPES)
def test_equal_distributions_accept_everything(shape):
    b, k, v, seed = shape
    r = distributions(b, k, v, seed=seed)
    tokens = drawn(r, seed)
    proposed = np.full(b, k)
    accepted, _ = verify_maximal(tokens, r, r, proposed, uniforms(b, k + 1, seed=seed))
    assert (accepted == k).all()
    target = (r / exponential_noise(seed, np.arange(b)[:, None], np.arange(k), v)).argmax(-1)
    accepted, _ = verify_match(target, target, proposed)
    assert (accepted == k).all()


@given(SHAPES)
def test_disjoint_distributions_accept_nothing(shape):
    b, k, v, seed = shape
    half = torch.arange(v) < v // 2
    q = distributions(b, k, v, seed=seed).masked_fill(~half, 0.0)
    r = distributions(b, k, v, seed=seed + 1).masked_fill(half, 0.0)
    tokens, proposed = drawn(q, seed), np.full(b, k)
    accepted, emitted = verify_maximal(tokens, q, r, proposed, uniforms(b, k + 1, seed=seed))
    assert (accepted == 0).all() and not half[emitted].any()
    accepted, emitted = verify_match(tokens, r.argmax(-1), proposed)
    assert (accepted == 0).all() and not half[emitted].any()


@given(SHAPES)
def test_batches_equal_their_rows(shape):
    b, k, v, seed = shape
    q, r = distributions(b, k, v, seed=seed), distributions(b, k, v, seed=seed + 1, sharpness=1.0)
    tokens, u = drawn(q, seed), uniforms(b, k + 1, seed=seed)
    proposed = np.arange(b) % (k + 1)
    accepted, _ = verify_maximal(tokens, q, r, proposed, u)
    target = (r / exponential_noise(seed, np.arange(b)[:, None], np.arange(k), v)).argmax(-1)
    shared = verify_match(tokens, target, proposed)
    for row in range(b):
        one = slice(row, row + 1)
        alone, _ = verify_maximal(tokens[one], q[one], r[one], proposed[one], u[one])
        assert alone == accepted[row]
        alone = verify_match(tokens[one], target[one], proposed[one])
        assert [x.item() for x in alone] == [x[row].item() for x in shared]


def test_the_rejection_rule_draws_from_r():
    """Token by token over many rows: the accepted and the replaced ones together are distributed as r."""
    rows, v = 200_000, 6
    q, r = distributions(v, seed=1), distributions(v, seed=2)
    torch.manual_seed(0)
    tokens = torch.multinomial(q, rows, replacement=True)[:, None]
    wide = [x.expand(rows, 1, v) for x in (q, r)]
    accepted, emitted = verify_maximal(tokens, *wide, np.ones(rows, int), uniforms(rows, 2, seed=1))
    got = torch.where(accepted == 1, tokens[:, 0], emitted)
    frequency = torch.bincount(got, minlength=v) / rows
    torch.testing.assert_close(frequency.double(), r, rtol=0, atol=0.005)
    assert accepted.double().mean() == pytest.approx(torch.minimum(q, r).sum().item(), abs=0.005)


def test_without_a_proposal_the_draw_is_from_r():
    """Whatever q holds at such a position."""
    rows = 2000
    q = torch.tensor([0.97, 0.01, 0.01, 0.01]).double().expand(rows, 1, 4)
    r = torch.tensor([0.5, 0.5, 0.0, 0.0]).double().expand(rows, 1, 4)
    tokens, nothing = torch.zeros(rows, 1, dtype=torch.long), np.zeros(rows, int)
    torch.manual_seed(0)
    accepted, emitted = verify_maximal(tokens, q, r, nothing, torch.rand(rows, 2, dtype=torch.float64))
    assert (accepted == 0).all()
    assert 0.45 < (emitted == 0).double().mean() < 0.55 and (emitted < 2).all()


def test_matches_stop_at_the_first_mismatch_and_at_the_last_proposal():
    match = torch.tensor([[True, False, True], [True, True, True], [False, True, True]])
    assert matches_before_mismatch(match, np.array([3, 2, 3])).tolist() == [1, 2, 0]


@given(SHAPES, st.floats(0, 1, exclude_max=True))
def test_inversion_draws_the_token_that_the_cumulative_probability_says(shape, u):
    b, _, v, seed = shape
    probs = distributions(b, v, seed=seed)
    probs[:, seed % v] = 0.0
    total = probs.cumsum(-1)
    for row, token in enumerate(draw(probs, torch.full((b,), u, dtype=torch.float64)).tolist()):
        assert probs[row, token] > 0
        below = total[row, token - 1] if token else 0.0
        assert below <= u * total[row, -1] + 1e-12 and u * total[row, -1] <= total[row, token] + 1e-12


def test_inversion_at_the_edges():
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    probs = torch.tensor([0.0, 1e-30, 0.3, 0.7, 1e-30, 0.0]).expand(2, 6)
    assert draw(probs, u).tolist()[0] == 1 and draw(probs, u).tolist()[1] in (3, 4)
    assert draw(torch.tensor([[0.0, 1.0, 0.0]]).expand(2, 3), u).tolist() == [1, 1]


def test_noise_depends_on_seed_row_position_and_token_alone(monkeypatch):
    whole = exponential_noise(7, np.arange(3)[:, None], np.arange(4), 11)
    assert whole.shape == (3, 4, 11)
    assert torch.equal(whole[2, 3], exponential_noise(7, np.array([2]), np.array([3]), 11)[0])
    assert torch.equal(whole[..., :5], exponential_noise(7, np.arange(3)[:, None], np.arange(4), 5))
    assert not torch.equal(whole, exponential_noise(8, np.arange(3)[:, None], np.arange(4), 11))
    monkeypatch.setattr(verify, "IN_CACHE", 4)  # in parts of a vocabulary
    assert torch.allclose(whole, exponential_noise(7, np.arange(3)[:, None], np.arange(4), 11), rtol=1e-6)
    assert whole.flatten().unique().numel() == whole.numel()


def test_noise_is_standard_exponential():
    """Kolmogorov-Smirnov distance from 1 - exp(-x), and no correlation between neighbouring positions."""
    noise = exponential_noise(0, np.zeros(1000, int), np.arange(1000), 100).flatten()
    expected = torch.arange(1, len(noise) + 1) / len(noise)
    assert (1 - (-noise.sort().values).exp() - expected).abs().max() < 0.006
    grid = noise.view(1000, 100)
    for one, two in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):
        assert torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1].abs() < 0.02
