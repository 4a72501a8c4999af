"""What is kept for models goes with them, and is no other model's."""

import copy
import gc
import weakref

import pytest
import torch
from families import members, prompts, tiny

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.members import costs
from hf_spec_ensemble.members.costs import PassCosts, remembered
from hf_spec_ensemble.members.stopwatch import Stopwatch
from hf_spec_ensemble.schedule.acceptance import Acceptance


class Something:
    """That a weak reference can refer to."""


def test_a_new_assistant_inherits_nothing_of_a_dead_one():
    """Memory that is freed is used again at once, for the next model too."""
    main, addresses, kept = tiny(), set(), []
    for i in range(80):
        assistant = torch.nn.Linear(1, 1)
        addresses.add(id(assistant))
        value = remembered([main, assistant], "a test", lambda i=i: [i])
        assert value == [i]
        assert remembered([main, assistant], "a test", list) is value
        kept.append(value)
        del assistant
    assert len(addresses) < 80, "not a test of ids that are used again"


def test_nothing_is_kept_longer_than_any_of_the_models():
    models = [torch.nn.Linear(1, 1) for _ in range(3)]
    for dies in range(3):
        value = remembered(models, "a test", Something)
        alone = remembered([models[(dies + 1) % 3]], "a test", Something)
        gone, stays = weakref.ref(value), weakref.ref(alone)
        del value, alone
        assert gone() is not None
        models[dies] = torch.nn.Linear(1, 1)
        gc.collect()
        assert gone() is None
        assert stays() is not None


def test_the_order_and_the_number_of_models_count():
    one, two = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    lists = [[one], [two], [one, two], [two, one], [one, one], [one, one, two]]
    values = [remembered(models, "a test", Acceptance) for models in lists]
    assert len(set(map(id, values))) == len(lists)
    assert all(remembered(models, "a test", Acceptance) is value for models, value in zip(lists, values))


def test_calls_keep_no_assistant_alive():
    """And leave nothing behind when it has gone."""
    main, inputs = copy.deepcopy(tiny()), prompts(2)
    for draw in (dict(), dict(do_sample=True)):
        assistant = copy.deepcopy(tiny(seed=1))
        main.generate(
            **inputs, assistant_model=assistant, ensemble_config=EnsembleConfig(), max_new_tokens=4, **draw
        )  # fmt: skip
        gone = weakref.ref(assistant)
        assert len(costs._memory.longer[main].longer) == 1
        del assistant
        gc.collect()
        assert gone() is None
        assert len(costs._memory.longer[main].longer) == 0


# --- The first pass of a shape ------------------------------------------------------------------------------------


def test_a_first_measurement_that_cannot_be_is_not_believed():
    known = PassCosts()
    known.add(1, 2, 9.0)
    assert known.measured(1, 2) == 9.0, "nothing else is known"
    for _ in range(2):
        known.add(1, 1, 1.0)
    assert known.measured(1, 2) == 1.0 and known.widest(1) == 1
    known.add(1, 2, 1.25)
    assert known.measured(1, 2) == 1.25 and known.measured(1, 3) == 1.5 and known.widest(1) == 2
    known.add(1, 4, 2.75)
    assert known.measured(1, 4) == 2.75, "in proportion to the nearest, and a little more"
    known.add(1, 8, 99.0)
    assert known.measured(1, 8) == 1.25


@pytest.mark.parametrize("batch,draw", [(1, "greedy"), (1, "gumbel"), (4, "gumbel")])
def test_the_first_pass_of_a_shape_may_take_long(draw, batch, monkeypatch):
    """As on a GPU, where it loads kernels: speculation does not pause for it."""
    config = EnsembleConfig(coupling="gumbel", check_members=False)
    calls, new = 3, 60

    def passes(first: float) -> int:
        """Of all calls, where the first pass of each width takes so much longer."""
        seen, made, models = set(), 0, copy.deepcopy(members("llama", 2, likeness=0.98))

        def stop(stopwatch, width=None):
            stopwatch._lap(width, (1.0 if width == 1 else 1.2) + (first if width not in seen else 0.0))
            seen.add(width)

        monkeypatch.setattr(Stopwatch, "stop", stop)
        for seed in range(calls):
            torch.manual_seed(seed)
            out = models[0].generate(
                **prompts(batch), assistant_model=models[1], ensemble_config=config, drafter=None, max_new_tokens=new,
                eos_token_id=None, do_sample=draw == "gumbel", return_dict_in_generate=True,
            )  # fmt: skip
            made += sum(out.stats.forward_passes)
        return made

    normal = passes(first=0.0)
    assert normal < 0.85 * calls * 2 * new
    assert passes(first=15.0) < 1.08 * normal
