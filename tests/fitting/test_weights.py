"""The maths of weights: against grids, finite differences and known mixtures. No models."""

import pytest
import torch

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.ensemble.combine import combine
from hf_spec_ensemble.fitting.call import _rounded
from hf_spec_ensemble.fitting.linear import (
    GONE,
    Block,
    Objective,
    contrast_weight,
    greatest_plausibility,
    product_weights,
    score,
)
from hf_spec_ensemble.fitting.mixture import mixture_log_probs, mixture_weights


def random_block(n=2, tokens=300, vocab=12, seed=0, weights=None) -> Block:
    """Tokens drawn from a product of the members, with these weights, or from the first member."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(n, tokens, vocab, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1)
    weights = [1.0] + [0.0] * (n - 1) if weights is None else weights
    drawn_from = torch.einsum("n,ntv->tv", torch.tensor(weights, dtype=torch.float64), log_probs).softmax(-1)
    return Block(log_probs, torch.multinomial(drawn_from, 1, generator=generator)[:, 0])


def of_tokens(block: Block) -> torch.Tensor:
    return block.log_probs.gather(2, block.tokens.expand(len(block.log_probs), -1)[..., None])[..., 0]


def objective_of(*blocks: Block, **options) -> Objective:
    return Objective(lambda: blocks, **options)


@pytest.mark.parametrize("known", [(0.5, 0.5), (0.9, 0.1), (0.6, 0.3, 0.1)])
def test_a_mixture_is_recovered_from_its_texts(known):
    n, tokens = len(known), 20_000
    block = random_block(n, tokens)
    generator = torch.Generator().manual_seed(7)
    mixed = torch.einsum("n,ntv->tv", torch.tensor(known, dtype=torch.float64), block.log_probs.exp())
    drawn = torch.multinomial(mixed, 1, generator=generator)[:, 0]
    found = mixture_weights(of_tokens(Block(block.log_probs, drawn)))
    assert found.tolist() == pytest.approx(known, abs=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_a_mixture_agrees_with_a_grid(seed):
    log_probs = of_tokens(random_block(2, 200, seed=seed, weights=[0.5, 0.5]))
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    likelihood = mixture_log_probs(log_probs, torch.stack([grid, 1 - grid], 1)).mean(1)
    found = mixture_weights(log_probs)
    assert float(found[0]) == pytest.approx(float(grid[likelihood.argmax()]), abs=0.002)
    assert mixture_log_probs(log_probs, found).mean() >= likelihood.max() - 1e-8


def test_a_member_that_is_no_use_has_the_weight_zero():
    block = random_block(3, 2000)
    log_probs = of_tokens(block)
    log_probs[2] = log_probs[0] - 0.5
    found = mixture_weights(log_probs)
    assert found[2] < 1e-4 and found.sum() == pytest.approx(1)


def test_a_token_that_some_members_make_impossible_is_no_harm():
    log_probs = torch.tensor([[0.5, 0.0], [0.5, 0.5]]).log()
    assert mixture_weights(log_probs).isfinite().all()
    with pytest.raises(ValueError, match="under all members"):
        mixture_weights(torch.tensor([[0.5, 0.0], [0.5, 0.0]]).log())


@pytest.mark.parametrize("plausibility", [0.0, 0.2])
def test_slopes_are_the_derivatives(plausibility):
    block = random_block(3, 100)
    weights = torch.tensor([0.7, 0.6, -0.4], dtype=torch.float64)
    scores = score(block, weights, plausibility)
    for i in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[i] = 1e-6
        above, below = score(block, weights + step, plausibility), score(block, weights - step, plausibility)
        kept = scores.log_probs > -torch.inf
        expected = (above.log_probs - below.log_probs)[kept] / 2e-6
        torch.testing.assert_close(scores.slopes[kept, i], expected, atol=1e-7, rtol=1e-6)
        assert not scores.slopes[~kept].any() and bool((~kept).any()) == (plausibility > 0)


@pytest.mark.parametrize("known", [(0.5, 0.5), (0.9, 0.4), (1.1, -0.3)])
def test_a_product_agrees_with_a_grid_and_is_recovered(known):
    block = random_block(2, 1500, weights=known)
    found = product_weights(objective_of(block), 2)
    assert found.tolist() == pytest.approx(known, abs=0.15)
    objective = objective_of(block)
    for shift in (-0.01, 0.0, 0.01):  # convex: no better point beside it, so none anywhere
        for other in (-0.01, 0.0, 0.01):
            objective(found + torch.tensor([shift, other], dtype=torch.float64))
    assert (objective.best - found).abs().max() < 1e-12
    coarse = objective_of(block)
    for first in torch.linspace(0, 1.5, 11):
        for second in torch.linspace(-0.5, 1, 11):
            coarse(torch.tensor([first, second], dtype=torch.float64))
    assert (coarse.best - found).abs().max() <= 0.15


@pytest.mark.parametrize("known", [0.0, 0.3, 1.2])
def test_a_contrast_agrees_with_a_grid(known):
    block = random_block(2, 1000, weights=[1.0, -known])
    found = contrast_weight(objective_of(block))
    grid = objective_of(block)
    for contrast in torch.linspace(0, 2, 201):
        grid(torch.tensor([1.0, -contrast], dtype=torch.float64))
    assert found == pytest.approx(abs(float(grid.best[1])), abs=0.01)
    assert found == pytest.approx(known, abs=0.2)


def test_a_contrast_that_helps_not_is_zero():
    block = random_block(2, 500, weights=[1.0, 0.5])
    assert contrast_weight(objective_of(block)) == 0


def test_the_greatest_plausibility_cuts_nothing_and_more_would():
    block = random_block(2, 200)
    alpha = greatest_plausibility([block])
    weights = torch.tensor([1.0, -0.3], dtype=torch.float64)
    kept, cut = score(block, weights, alpha), score(block, weights, alpha * 1.01)
    assert kept.log_probs.isfinite().all() and not cut.log_probs.isfinite().all()
    assert kept.log_probs.mean() > score(block, weights).log_probs.mean()


def test_blocks_of_any_size_give_the_same():
    block = random_block(3, 150, weights=[0.5, 0.4, 0.3])
    whole = product_weights(objective_of(block), 3)
    for size in (1, 7, 64, 100):
        parts = [Block(block.log_probs[:, i : i + size], block.tokens[i : i + size]) for i in range(0, 150, size)]
        torch.testing.assert_close(product_weights(objective_of(*parts), 3), whole, atol=1e-9, rtol=0)


def test_an_interrupted_search_gives_the_best_so_far():
    block = random_block(2, 300, weights=[0.9, 0.4])

    def blocks():
        if len(objective.points) == 4:
            raise KeyboardInterrupt
        return [block]

    objective = Objective(blocks)
    found = product_weights(objective, 2)
    assert objective.interrupted and len(objective.points) == 4
    assert tuple(found.tolist()) == min(objective.points, key=lambda point: point[1])[0]


@pytest.mark.parametrize("weights", [(1.0, -0.5), (1.0, -1.5), (0.5, -0.5), (-0.2, 1.0), (0.7, 0.6)])
@pytest.mark.parametrize("lacking", [(0, 1), (0,), (1,)])
def test_what_a_member_removes_counts_as_in_decoding(weights, lacking):
    block = random_block(2, 20)
    tokens = block.tokens.clamp(max=9)
    for member in lacking:
        block.log_probs[member, :, 10:] = -torch.inf
    log_probs = block.log_probs.log_softmax(-1)
    fitted = score(Block(log_probs.clamp(min=GONE), tokens), torch.tensor(weights, dtype=torch.float64)).log_probs
    decoded = combine(log_probs, EnsembleConfig(method="product", weights=list(weights))).log_softmax(-1)
    torch.testing.assert_close(fitted, decoded.gather(1, tokens[:, None])[:, 0])


def test_a_weight_that_a_token_needs_is_not_rounded_to_zero():
    log_probs = torch.tensor([[-1.0], [-6.0], [-6.0]], dtype=torch.float64).repeat(1, 30_000)
    log_probs[0, 7] = -torch.inf
    log_probs[2, 7] = -9.0
    weights = _rounded(mixture_weights(log_probs), log_probs)
    assert sum(weights) == pytest.approx(1) and min(weights) == 0.0 and weights[1] == 1e-4
    assert mixture_log_probs(log_probs, torch.tensor(weights)).mean() > -1.1


def test_rounding_to_half_precision_cuts_no_token():
    for seed in range(20):
        block = random_block(2, 50, seed=seed)
        kept = Block((block.log_probs * 3).log_softmax(-1).half(), block.tokens)
        expert = (block.log_probs[0] * 3).log_softmax(-1)
        there = expert.gather(1, block.tokens[:, None])[:, 0]
        assert (there - expert.amax(-1)).min().exp() >= greatest_plausibility([kept])
