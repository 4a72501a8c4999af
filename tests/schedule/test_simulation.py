"""Batches by simulation: against the formulas for one row, and against what the engine does with real passes."""

import pytest
import torch
from families import members, prompts

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.members.stopwatch import Stopwatch
from hf_spec_ensemble.schedule.mixture import predict_mixture
from hf_spec_ensemble.schedule.pace import DEBT, PAUSE, Pace
from hf_spec_ensemble.schedule.simulation import EnoughSettle, OwnerSettles, simulate
from hf_spec_ensemble.schedule.theory import predict
from hf_spec_ensemble.schedule.turns import Turns


def in_proportion(author, width):
    return 0.5 + 0.5 * width


@pytest.mark.parametrize("lengths,first,n", [((1, 1), 0, 2), ((3, 2), 0, 2), ((0, 0), 0, 2), ((2, 1, 3), 0, 3)])
def test_of_one_row_it_says_what_the_formula_does(lengths, first, n):
    turns, acceptance = Turns(lengths, first, n), (0.9, 0.6, 0.75)[: len(lengths)]
    expected = predict(turns, acceptance, in_proportion)
    simulated = simulate(turns, acceptance, in_proportion, [3000])
    assert simulated.seconds_per_token == pytest.approx(expected.seconds_per_token, rel=0.03)
    assert simulated.speedup == pytest.approx(expected.speedup, rel=0.03)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.3, 0.5]])
def test_of_a_mixture_drawn_by_components_too(weights):
    n = len(weights)
    turns = Turns((0,) * n, 0, n)
    expected = predict_mixture(turns, weights, [0.0] * n, in_proportion)
    simulated = simulate(turns, [0.0] * n, in_proportion, [3000], OwnerSettles(weights))
    assert simulated.seconds_per_token == pytest.approx(expected.seconds_per_token, rel=0.03)


def test_members_that_are_enough_save_the_others_passes():
    turns, cost = Turns((0, 0), 0, 2), lambda author, width: 1.0
    runs = [
        sum(simulate(turns, [0, 0], cost, [2000], EnoughSettle([0.7, 0.3], {(True, False): p})).runs_per_token)
        for p in (0.0, 0.8, 1.0)
    ]
    assert runs[0] == 2 and runs[2] == pytest.approx(1, abs=0.01) and runs[1] == pytest.approx(1.2, abs=0.03)


@pytest.mark.parametrize("coupling", ["ancestral", "gumbel"])
@pytest.mark.parametrize("lengths", [[1, 1], [3, 1]])
def test_a_batch_takes_the_passes_that_it_foretells(coupling, lengths):
    models, inputs, batch, steps = members("llama", 2, likeness=0.95), prompts(8), 8, 48
    torch.manual_seed(0)
    config = EnsembleConfig(coupling=coupling, num_assistant_tokens=lengths, check_members=False)
    stats = models[0].generate(
        **inputs, assistant_model=models[1], ensemble_config=config, do_sample=True, max_new_tokens=steps,
        eos_token_id=[10_000], return_dict_in_generate=True,
    ).stats  # fmt: skip
    acceptance = [share or 0.0 for share in stats.acceptance]
    rule = OwnerSettles([0.5, 0.5]) if coupling == "ancestral" else None
    turns = Turns(tuple(lengths), 0, 2)
    runs = [
        sum(simulate(turns, acceptance, in_proportion, [steps] * batch, rule, seed=i).runs_per_token) for i in range(4)
    ]
    assert sum(stats.forward_passes) / steps == pytest.approx(sum(runs) / len(runs), rel=0.1)


def test_speculation_pauses_while_it_falls_behind_and_tries_again():
    pace = Pace()

    def tokens_until(change, seconds):
        for tokens in range(1, 1000):
            pace.ran(seconds)
            pace.advanced(1.0, standard=1.0)
            if pace.pauses == change:
                return tokens
        return None

    assert tokens_until(True, 1.0) is None, "as fast as the standard ensemble"
    lengths = []
    for _ in range(5):
        assert 0.1 * tokens_until(True, 1.1) < DEBT[0] + 0.2
        lengths.append(tokens_until(False, 1.0))
    assert lengths == [min(PAUSE[0] * 2**i, PAUSE[1]) for i in range(5)]
    tokens_until(True, 0.9)
    tokens_until(True, 1.1)
    assert tokens_until(False, 1.0) == PAUSE[0], "begins anew once it has been worth while"
    pace.ran(3.0)
    pace.advanced(1.0, standard=1.0, longest=8)
    assert not pace.pauses, "a long turn is paid for before it brings something"


@pytest.mark.parametrize("temperature,batch,slope", [(1.0, 8, 0.5), (1.0, 16, 0.8), (0.0, 8, 0.8)])
def test_a_batch_loses_next_to_nothing_where_wide_passes_are_dear(temperature, batch, slope, monkeypatch):
    """Passes cost what is given here, whatever they take: what follows from decisions alone."""

    def stop(self, label=None):
        self._lap(label, 1 + slope * (label - 1) if isinstance(label, int) else 0.0)

    monkeypatch.setattr(Stopwatch, "stop", stop)
    steps, models = 48, members("llama", likeness=0.6)
    sampling = dict(do_sample=True, top_k=None) if temperature else {}
    for seed in range(2):  # the first call knows nothing
        torch.manual_seed(seed)
        stats = (
            models[0]
            .generate(
                **prompts(batch, seed=seed),
                assistant_model=models[1],
                ensemble_config=EnsembleConfig(),
                drafter=None,
                max_new_tokens=steps,
                eos_token_id=None,
                return_dict_in_generate=True,
                **sampling,
            )
            .stats
        )
        assert 2 * (steps - 1) / sum(stats.member_seconds) > 0.965


def test_what_is_not_known_does_not_pause():
    pace = Pace()
    for _ in range(100):
        pace.ran(1e9)
        pace.advanced(1.0, standard=None)
    assert not pace.pauses
