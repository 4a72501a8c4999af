"""EnsembleConfig: its checks, defaults and JSON."""

import json
import math
import warnings

import pytest
import torch

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.schedule.roles import Roles


@pytest.mark.parametrize(
    "config",
    [
        EnsembleConfig(),
        EnsembleConfig(weights=[0.7, 0.3], combine_on="logits", num_assistant_tokens=4, coupling="gumbel"),
        EnsembleConfig(method="product", weights=[1.0, 0.5, -0.5], num_assistant_tokens=[1, 2, 3], alternate=False),
        EnsembleConfig(method="contrastive", contrast=0.5, plausibility=0.1, speculative=False),
    ],
)
def test_round_trips(config, tmp_path):
    assert EnsembleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path / "new" / "folder")
    assert EnsembleConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert EnsembleConfig.from_pretrained(str(tmp_path / "new" / "folder")) == config


def test_a_callable_does_not_serialise_and_writes_nothing(tmp_path):
    config = EnsembleConfig(method=lambda logits: logits.mean(0))
    with pytest.raises(ValueError, match="callable .* cannot be serialised"):
        config.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_unknown_fields_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="Unknown fields.*'mehtod'"):
        EnsembleConfig.from_dict({"mehtod": "weighted"})
    with pytest.raises(FileNotFoundError, match="ensemble_config.json"):
        EnsembleConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(method="average"), "`method` must be one of .* 'average'"),
        (dict(combine_on="scores"), "`combine_on` must be one of .* 'scores'"),
        (dict(coupling="shared"), "`coupling` must be one of .* 'shared'"),
        (dict(weights=[0.5, math.nan]), "finite numbers.*nan"),
        (dict(weights=[0.5, math.inf]), "finite numbers.*inf"),
        (dict(weights=["a", "b"]), "finite numbers"),
        (dict(weights=[]), "one for each member"),
        (dict(weights=[1.5, -0.5]), "must be >= 0.*-0.5.*method 'product'"),
        (dict(weights=[0.0, 0.0]), "sum > 0"),
        (dict(method="product", weights=[-1.0, 0.0]), "need a positive one"),
        (dict(method="contrastive", weights=[0.5, 0.5]), "not used by method contrastive"),
        (dict(method=lambda x: x[0], weights=[0.5, 0.5]), "not used by method a callable"),
        (dict(num_assistant_tokens=0), "`num_assistant_tokens` must be 'auto', an int >= 1.* 0"),
        (dict(num_assistant_tokens=[1, 0]), r"`num_assistant_tokens` .*\[1, 0\]"),
        (dict(num_assistant_tokens=2.5), "2.5"),
        (dict(num_assistant_tokens=True), "True"),
        (dict(contrast=-0.1), "`contrast` must be .* -0.1"),
        (dict(contrast=math.nan), "`contrast` must be .* nan"),
        (dict(plausibility=1.5), r"`plausibility` must be a number in \[0, 1\].* 1.5"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        EnsembleConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        dict(weights="half"),
        dict(weights=0.5),
        dict(weights=torch.tensor(0.5)),
        dict(alternate=1),
        dict(speculative=None),
    ],
)
def test_bad_types_are_named(fields):
    with pytest.raises(TypeError, match=f"`{next(iter(fields))}` must be"):
        EnsembleConfig(**fields)


@pytest.mark.parametrize(
    "fields,n,message",
    [
        (dict(), 1, "at least two members"),
        (dict(weights=[0.5, 0.5]), 3, "one entry for each member, 3.*has 2"),
        (dict(num_assistant_tokens=[1, 2]), 3, "one entry for each of the 3 members, but has 2"),
        (dict(method="contrastive"), 3, "'contrastive' takes two members.*got 3"),
    ],
)
def test_members_that_do_not_fit(fields, n, message):
    with pytest.raises(ValueError, match=message):
        EnsembleConfig(**fields).for_members(n)


def test_weights_are_normalised_with_a_warning():
    with pytest.warns(UserWarning, match="sum to 4, not to 1"):
        assert EnsembleConfig(weights=[3, 1]).weights == [0.75, 0.25]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EnsembleConfig(weights=[1 / 3] * 3).weights == [1 / 3] * 3
        assert EnsembleConfig(method="product", weights=[3, -1]).weights == [3, -1]


def test_roles():
    sizes = [70, 10, 70]
    assert Roles.of(EnsembleConfig().for_members(3), sizes).lengths(EnsembleConfig()) is None
    for config, drafter, lengths in [
        (EnsembleConfig(num_assistant_tokens=5), False, (1, 5, 1)),
        (EnsembleConfig(num_assistant_tokens=5, alternate=False), False, (0, 5, 0)),
        (EnsembleConfig(num_assistant_tokens=5), True, (1, 1, 1, 5)),
        (EnsembleConfig(num_assistant_tokens=5, alternate=False), True, (0, 0, 0, 5)),
        (EnsembleConfig(num_assistant_tokens=[2, 3, 4]), False, (2, 3, 4)),
        (EnsembleConfig(num_assistant_tokens=[2, 3, 4], weights=[0.5, 0, 0.5]), False, (2, 4, 3)),
    ]:
        assert Roles.of(config, sizes, drafter).lengths(config) == lengths


def test_an_assistant_of_weight_zero_drafts():
    config = EnsembleConfig(weights=[0.5, 0.0, 0.5])
    roles = Roles.of(config, [7, 7, 7])
    assert roles.members == 2 and roles.config(config).weights == [0.5, 0.5]
    assert Roles.of(EnsembleConfig(weights=[0.0, 1.0]), [7, 7]).members == 2, "the main model is always read"


def test_defaults_for_members():
    assert EnsembleConfig().for_members(2).weights == [0.5, 0.5]
    assert EnsembleConfig().num_assistant_tokens == "auto"
    assert EnsembleConfig(method="contrastive").combine_on == "raw_logits"
    assert EnsembleConfig(method="product").combine_on == "raw_logits"
