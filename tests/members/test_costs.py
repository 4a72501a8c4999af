"""What is kept for models goes with them, and is no other model's."""

import copy
import gc
import weakref

import torch
from families import prompts, tiny

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.members import costs
from hf_spec_ensemble.members.costs import remembered
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
