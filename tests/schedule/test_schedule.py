"""The theory against simulation, and the schedule that chooses its lengths by itself."""

import itertools
import random

import oracle
import pytest
import torch
from families import members, prompts
from simulation import simulate
from test_sampling import p_value, small_members

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.decoding.candidates import EnsembleCandidateGenerator
from hf_spec_ensemble.decoding.drawing import Maximal
from hf_spec_ensemble.members.costs import PassCosts, pass_costs
from hf_spec_ensemble.schedule.acceptance import Acceptance
from hf_spec_ensemble.schedule.auto import Auto, Memory
from hf_spec_ensemble.schedule.theory import best_turns, predict
from hf_spec_ensemble.schedule.turns import Situation, Turns


def always(value):
    return lambda _: value


COSTS = {
    "equal": lambda author, width: 1.0,
    "cheap proposer": lambda author, width: (1.0, 0.2, 0.5)[author] + 0.02 * width,
    "two tokens cost more": lambda author, width: 1.0 if width == 1 else 1.6,
    "every token costs": lambda author, width: float(width),
}


# --- Theory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    "lengths,first,n", [((1, 1), 0, 2), ((1, 4), 1, 2), ((3, 2), 0, 2), ((0, 5), 1, 2), ((0, 0), 0, 2),
                        ((1, 1, 1), 2, 3), ((2, 1, 3), 0, 3), ((1, 1, 2), 0, 2), ((0, 0, 4), 0, 2)],
)  # fmt: skip
def test_predictions_are_what_a_simulation_gives(lengths, first, n, cost):
    """With n < A the last author is a drafter."""
    turns, acceptance = Turns(lengths, first, n), (0.9, 0.6, 0.75)[: len(lengths)]
    predicted = predict(turns, acceptance, COSTS[cost])
    measured = simulate(
        turns, n, [always(0.5)] * len(lengths), lambda author, _: acceptance[author], COSTS[cost], tokens=20_000
    )
    # How much a drafter still has to read when a run begins is not foreseen
    assert measured == pytest.approx(predicted.seconds_per_token, rel=0.02 if n == len(lengths) else 0.06)
    standard = sum(COSTS[cost](member, 1) for member in range(n))
    assert predicted.speedup == pytest.approx(standard / predicted.seconds_per_token)


def test_the_formulas_of_the_paper():
    """Two members of equal cost and acceptance a, one token each: 2 - a passes for a token. n that agree: one pass."""
    for a in (0.0, 0.3, 0.9, 1.0):
        passes = predict(Turns((1, 1), 0, 2), [a, a], COSTS["equal"]).runs_per_token
        assert sum(passes) == pytest.approx(2 - a)
    for n in (2, 3, 5):
        assert predict(Turns((1,) * n, 0, n), [1.0] * n, COSTS["equal"]).speedup == pytest.approx(n)
    assert predict(Turns((0, 0, 0), 0, 3), [0.5] * 3, COSTS["equal"]).speedup == pytest.approx(1)
    # A proposer of cost c and length k: a round costs k c + 1
    plain = predict(Turns((0, 4), 1, 2), [0, 1.0], lambda author, width: (1.0, 0.1)[author])
    assert plain.seconds_per_token == pytest.approx((1 + 0.1 * 5) / 5)


@pytest.mark.parametrize("cost", COSTS)
def test_the_best_lengths_are_never_worse_than_ones_nor_than_the_standard_ensemble(cost):
    ones, none = Turns((1, 1), 0, 2), Turns((0, 0), 0, 2)
    for acceptance in itertools.product((0.05, 0.5, 0.95), repeat=2):
        _, prediction = best_turns(ones, acceptance, COSTS[cost], [True, True])
        for turns in (ones, none):
            assert prediction.seconds_per_token <= predict(turns, acceptance, COSTS[cost]).seconds_per_token * 1.0101
    assert best_turns(ones, [0.05, 0.05], COSTS["every token costs"], [True, True])[0].lengths == (0, 0)
    only_the_second = Turns((0, 1), 1, 2)
    assert best_turns(only_the_second, [0.9, 0.9], COSTS["cheap proposer"], [False, True])[0].lengths[0] == 0


# --- What is measured ---------------------------------------------------------------------------------------------


def test_costs_between_and_beyond_what_was_measured():
    costs = PassCosts()
    assert costs.measured(1, 1) is None and costs.seconds(1, 3) is None
    for width, seconds in ((1, 1.0), (4, 4.0), (8, 2.0)):
        costs.add(1, width, seconds)
    assert [costs.measured(1, width) for width in (1, 2, 4, 6, 8, 20)] == [1.0, 2.0, 4.0, 3.0, 2.0, 2.0]
    assert costs.padded(1, 4) == costs.padded(1, 3) == 8 and costs.padded(1, 1) == 1
    assert costs.seconds(1, 4) == 2.0
    assert costs.measured(2, 1) is None, "another batch size"


def test_costs_are_not_misled_by_single_disturbances():
    costs = PassCosts()
    for seconds in (1.0, 9.0, 1.1, 1.0, 7.0):
        costs.add(1, 1, seconds)
    assert costs.measured(1, 1) == 1.0


def test_every_probed_width_is_measured_and_measured_again_when_that_is_long_ago():
    costs, probed = PassCosts(), []
    while (width := costs.to_probe(1, 2)) is not None:
        probed.append(width)
        costs.add(1, width, 1.0)
    assert probed == [2, 2, 4, 4, 8, 8]
    for _ in range(300):
        costs.add(1, 2, 1.0)
    assert costs.to_probe(1, 2) == 4


def test_acceptance_fades_to_where_it_started():
    acceptance = Acceptance()
    start = acceptance.mean
    for _ in range(50):
        acceptance.add(0.5, kept=False)
    assert acceptance.mean < 0.1 and acceptance.chance(0.5) < 0.1 < acceptance.chance(0.99) + 0.1
    acceptance.fade(5000)
    assert acceptance.mean == pytest.approx(start, abs=0.01) and acceptance.evidence < 0.01


# --- The schedule that chooses its lengths ------------------------------------------------------------------------


def auto(cost, authors, n, first=0, may=None) -> Auto:
    """Told, as if measured, what passes cost."""
    costs = [PassCosts() for _ in range(authors)]
    for author, table in enumerate(costs):
        table.measured = lambda batch, width, author=author: cost(author, width)
        table.to_probe = lambda batch, width: None
    return Auto(Memory([Acceptance() for _ in range(authors)]), costs, 1, n, may or [True] * authors, first)


CONFIDENCES = [0.1, 0.5, 0.85, 0.99]
TOLD = [lambda rng: rng.choice(CONFIDENCES)] * 3


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("chances", [(0.9, 0.9), (0.97, 0.5), (0.3, 0.3), (0.6, 0.95)])
@pytest.mark.parametrize("informative", [False, True])
def test_it_is_as_fast_as_the_best_fixed_lengths(chances, cost, informative):
    """Within 5 %, and never slower than the standard ensemble; faster where confidence says what will be kept."""

    def chance(author, confidence):
        spread = 0.8 * (confidence - 0.61) if informative else 0.0  # 0.61: the mean confidence
        return min(max(chances[author] + spread, 0.0), 1.0)

    # To fixed lengths, only the mean matters
    means = [sum(chance(author, told) for told in CONFIDENCES) / len(CONFIDENCES) for author in (0, 1)]
    fixed = {
        lengths: predict(Turns(lengths, first, 2), means, COSTS[cost]).seconds_per_token
        for lengths in ((0, 0), (1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2), (0, 4)) for first in (0, 1)
    }  # fmt: skip
    chosen = simulate(auto(COSTS[cost], 2, 2, first=1), 2, TOLD[:2], chance, COSTS[cost], tokens=8_000)
    assert chosen < 1.05 * min(fixed.values())
    assert chosen < 1.03 * fixed[0, 0]


def test_a_cold_start_takes_lengths_of_one():
    schedule = auto(COSTS["equal"], 2, 2)
    assert schedule.turns.lengths == (1, 1) and schedule.memory.plan is None
    simulate(schedule, 2, TOLD[:2], lambda author, confidence: 0.9, COSTS["equal"], tokens=100)
    assert schedule.memory.plan is not None


def test_it_hands_over_where_the_next_token_would_be_rejected():
    """A cheap proposer goes on while it is sure, and stops where it is not."""
    schedule = auto(COSTS["cheap proposer"], 2, 2, first=1)
    simulate(schedule, 2, TOLD[:2], lambda author, confidence: confidence, COSTS["cheap proposer"], tokens=3000)
    sure, unsure = (Situation(1, 1, lag=[[2], [1]], pending=[[(1, confidence)]]) for confidence in (0.99, 0.1))
    assert schedule.next(sure) == (1, 2)
    assert schedule.next(unsure) == (0, 1)


def test_members_that_may_not_propose_do_not():
    schedule = auto(COSTS["equal"], 2, 2, may=[False, True])
    simulate(schedule, 2, TOLD[:2], lambda author, confidence: 0.99, COSTS["equal"], tokens=200)
    assert not schedule.proposes(Situation(0, 1, lag=[[0], [1]], pending=[[]]), [0.99])
    assert schedule.turns.lengths[0] == 0


# --- In the engine ------------------------------------------------------------------------------------------------


@pytest.fixture
def dice(monkeypatch):
    """Every decision is taken at random; gives those taken."""
    rng, patience, taken = random.Random(0), random.Random(1), set()

    def proposes(self, situation, confidence):
        taken.add(decision := rng.random() < 0.7)
        return decision

    def next_(self, situation):
        turns = self.turns
        goes_on = turns.may_go_on(situation) and rng.random() < 0.5
        return (situation.current, situation.turn + 1) if goes_on else turns.hand_over(situation)

    for name, decide in (("proposes", proposes), ("next", next_), ("width", lambda *args: rng.choice([0, 3]))):
        monkeypatch.setattr(Auto, name, decide)
    monkeypatch.setattr(Auto, "patient", property(lambda self: patience.random() < 0.3))
    return taken


@pytest.fixture
def told_costs(monkeypatch):
    """Costs at which some proposals pay and others don't; gives the decisions taken."""
    taken = set()
    monkeypatch.setattr(PassCosts, "measured", lambda self, batch, width: 1.0 if width == 1 else 1.6)
    monkeypatch.setattr(PassCosts, "to_probe", lambda self, batch, width: None)
    proposes = Auto.proposes
    monkeypatch.setattr(Auto, "proposes", lambda *args: taken.add(decision := proposes(*args)) or decision)
    return taken


@pytest.mark.parametrize("coupling", ["maximal", "gumbel"])
@pytest.mark.parametrize("prompts_", [1, 3])
@pytest.mark.parametrize("n", [2, 3])
def test_samples_follow_the_ensemble_whatever_is_decided(dice, n, prompts_, coupling):
    models = small_members(n)
    config = oracle.config_of("weighted", n, coupling=coupling)
    assert config.num_assistant_tokens == "auto"
    assert p_value(models, prompts_, config, "weighted") > 1e-3
    assert dice == {True, False}


@pytest.mark.slow
def test_samples_follow_the_ensemble_as_it_decides(told_costs, monkeypatch):
    """One row in a call, so that decisions follow the confidence of its proposals."""
    models = small_members(2)
    monkeypatch.setattr("test_sampling.draw", _one_by_one)
    assert p_value(models, 1, oracle.config_of("weighted", 2, coupling="maximal"), "weighted") > 1e-3
    assert told_costs >= {0, 1}


@pytest.mark.parametrize("drafter", [None, "model", "prompt_lookup"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_text_is_the_same_whatever_is_decided(dice, batch, drafter):
    models, inputs = members("llama", 3), prompts(batch)
    text, _ = oracle.greedy(models, inputs, "weighted", 60, eos=())
    drafter = members("llama", 4)[3] if drafter == "model" else drafter
    for _ in range(3):
        out = models[0].generate(
            **inputs, assistant_model=models[1:], ensemble_config=oracle.config_of("weighted", 3), do_sample=False,
            max_new_tokens=60, eos_token_id=[10_000], drafter=drafter,
        )  # fmt: skip
        assert out.tolist() == text.tolist()


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_text_is_the_same_as_it_decides(told_costs, batch):
    models, inputs = members("llama", 2, likeness=0.8), prompts(batch)
    text, _ = oracle.greedy(models, inputs, "weighted", 100, eos=())
    out = models[0].generate(
        **inputs, assistant_model=models[1:], ensemble_config=oracle.config_of("weighted", 2), do_sample=False,
        max_new_tokens=100, eos_token_id=[10_000],
    )  # fmt: skip
    assert out.tolist() == text.tolist()
    assert told_costs >= {0, 1}


@pytest.mark.slow
def test_the_chi_square_test_fails_where_a_decision_sees_the_token(monkeypatch):
    """Dropping some tokens after they were drawn, and then drawing from r, is a bias."""
    drawn = []
    propose = Maximal.propose
    monkeypatch.setattr(Maximal, "propose", lambda *args: drawn.append(propose(*args)) or drawn[-1])
    monkeypatch.setattr(Turns, "proposes", lambda self, situation, confidence: bool((drawn[-1] > 4).all()))
    models = small_members(2)
    config = oracle.config_of("weighted", 2, num_assistant_tokens=1, coupling="maximal")
    # One row in a call, since the decision is taken for all rows together
    monkeypatch.setattr("test_sampling.draw", _one_by_one)
    assert p_value(models, 1, config, "weighted") < 1e-9


def _one_by_one(models, inputs, config, draws, length=3, **kwargs):
    torch.manual_seed(0)
    length_of_prompt = inputs["input_ids"].shape[1]
    texts = [
        models[0].generate(
            **inputs, assistant_model=models[1:], ensemble_config=config, do_sample=True, max_new_tokens=length
        )[0, length_of_prompt:]
        for _ in range(800)
    ]
    return torch.stack([torch.nn.functional.pad(text, (0, length - len(text))) for text in texts])[None]


def test_with_shared_noise_the_text_depends_on_the_seed_alone(monkeypatch):
    """Not on how long passes take."""
    rng = random.Random(1)
    times = (  # as the scheduler sees it, of either member's pass
        lambda member, width: 1.0,
        lambda member, width: float(width),
        lambda member, width: (1.0, 0.05)[member],
        lambda member, width: rng.choice([1.0, 1.0, 50.0]),  # one that is delayed, now and then, by a lot
    )
    inputs, add = prompts(3), PassCosts.add
    monkeypatch.setattr("hf_spec_ensemble.schedule.auto.PLANNING_SHARE", float("inf"))  # or it may plan too rarely
    texts, passes = set(), set()
    for seconds in times:
        models = members("llama", 2)
        member = {id(pass_costs(model)): i for i, model in enumerate(models)}

        def told(self, batch, width, measured, member=member, seconds=seconds):
            is_member = id(self) in member  # or the drafter
            add(self, batch, width, seconds(member[id(self)], width) if is_member else measured)

        monkeypatch.setattr(PassCosts, "add", told)
        torch.manual_seed(5)
        out = models[0].generate(
            **inputs, assistant_model=models[1], ensemble_config=EnsembleConfig(coupling="gumbel"), do_sample=True,
            max_new_tokens=150, eos_token_id=[10_000], return_dict_in_generate=True,
        )  # fmt: skip
        texts.add(str(out.sequences.tolist()))
        passes.add(tuple(out.stats.forward_passes))
    assert len(texts) == 1 and len(passes) > 1


def test_what_was_learnt_is_kept_between_calls_of_the_same_members(monkeypatch):
    models, inputs = members("llama", 2, likeness=0.95), prompts(1)
    call = dict(max_new_tokens=40, do_sample=False, eos_token_id=[10_000], return_dict_in_generate=True)
    plans = []
    get_candidates = EnsembleCandidateGenerator.get_candidates
    monkeypatch.setattr(
        EnsembleCandidateGenerator,
        "get_candidates",
        lambda self: plans.append(self.schedule.memory.plan) or get_candidates(self),
    )
    models[0].generate(**inputs, assistant_model=models[1], ensemble_config=EnsembleConfig(), **call)
    assert plans[0] is None and plans[-1] is not None
    first_call = len(plans)
    models[0].generate(**inputs, assistant_model=models[1], ensemble_config=EnsembleConfig(), **call)
    assert plans[first_call] is not None


def in_batch(cost, batch) -> Auto:
    """A schedule for two members that agree, in a batch, whose passes have been measured."""
    costs = [PassCosts() for _ in range(2)]
    for table in costs:
        for width in (1, 1, 2, 2, 4, 4, 8, 8):
            table.add(batch, width, cost(width))
    memory = Memory([Acceptance() for _ in costs], passes=100, seconds=100.0, pass_seconds=100.0)
    for one in memory.acceptance:
        for i in range(100):
            one.add(0.9, i % 10 > 0)
    made = Auto(memory, costs, batch, 2, [True, True], 0)
    made.advanced(1, 1)
    return made


@pytest.mark.parametrize("batch", [1, 8])
def test_a_batch_decodes_as_the_standard_ensemble_where_wide_passes_cost_in_proportion(batch):
    assert not in_batch(lambda width: 1.0, batch).patient
    dear = in_batch(lambda width: float(width), batch)
    assert (dear.patient == (batch > 1) and dear.turns.lengths == (0, 0)) or dear.patient


def test_wider_passes_are_measured_for_a_small_share_of_the_time_only():
    costs = [PassCosts(), PassCosts()]
    schedule = Auto(Memory([Acceptance(), Acceptance()]), costs, 1, 2, [True, True], 0)
    useful = spent = 0.0
    for i in range(400):
        needed = 1 if i < 8 else 1 + i % 2
        width = schedule.width(i % 2, needed)
        assert width >= needed
        costs[i % 2].add(1, width, float(width))
        schedule.ran(i % 2, float(width), width)
        useful, spent = useful + needed, spent + width
    assert 1.0 < spent / useful < 1.03


def test_what_single_tokens_cost_is_measured_where_wider_passes_are_cheaper():
    """Else that would be stale for ever, and a schedule that waits for it would propose nothing any more."""
    costs = [PassCosts(), PassCosts()]
    for table in costs:
        for width in (1, 1, 2, 2, 4, 4, 8, 8):
            table.add(1, width, 1.0 if width == 1 else 0.9)
    schedule = Auto(Memory([Acceptance(), Acceptance()]), costs, 1, 2, [True, True], 0)
    assert schedule.width(0, 1) == 2 and not schedule.patient
    for _ in range(1000):
        for table in costs:
            table.add(1, 2, 0.9)
    assert schedule.patient and schedule.width(0, 1) == 1


def test_a_plan_needs_no_costs_of_authors_that_propose_nothing():
    memory = Memory([Acceptance() for _ in range(3)], passes=100, seconds=100.0, pass_seconds=100.0)
    costs = [PassCosts() for _ in range(3)]
    for table in costs[:2]:
        for width in (1, 1, 2, 2, 4, 4):
            table.add(1, width, 1.0)
    for _ in range(100):
        memory.acceptance[0].add(0.9, True)
    schedule = Auto(memory, costs, 1, 2, [True, True, False], 0)
    schedule.advanced(1, 1)
    assert memory.plan is not None
