"""The benchmark's variants over static caches and with compiled passes."""

from collections import Counter
from functools import partial

import pytest
from test_bench import arguments, lines_of, runs_of
from transformers import CompileConfig

from hf_spec_ensemble.bench import Plan, Settings, measure
from hf_spec_ensemble.bench.__main__ import main, parser, settings_of
from hf_spec_ensemble.members.runner import Graphs
from hf_spec_ensemble.members.warmup import warmup


@pytest.fixture
def seen(monkeypatch):
    """
    What generations are asked for and which passes are compiled ones, by variant. Tracing alone, of a few layers: that
    is quicker.
    """
    load = partial(measure.AutoModelForCausalLM.from_pretrained, num_hidden_layers=1)
    monkeypatch.setattr(measure.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(Plan, "compile_config", CompileConfig(backend="eager", mode=None))
    seen = {"passes": Counter(), "lengths": set(), "measured": ""}
    whole, caches, run = measure.Bench._measure, measure.Bench._caches, Graphs.run

    def measured(self, condition, variant, *rest):
        seen["measured"] = variant.name
        try:
            return whole(self, condition, variant, *rest)
        finally:
            seen["measured"] = ""

    def asked(self, condition, variant):
        given = caches(self, condition, variant)
        assert bool(given) == bool(variant.prefix)
        assert not given or given.get("disable_compile", False) == (variant.prefix == "static:")
        seen["lengths"] |= {given["max_cache_len"]} if given else set()
        return given

    def counted(self, *inputs):
        seen["passes"][seen["measured"]] += 1
        return run(self, *inputs)

    monkeypatch.setattr(measure.Bench, "_measure", measured)
    monkeypatch.setattr(measure.Bench, "_caches", asked)
    monkeypatch.setattr(Graphs, "run", counted)
    monkeypatch.setattr(measure, "warmup", partial(warmup, widths=(1, 2)))
    return seen


@pytest.mark.slow
def test_compiled_and_static_variants_are_measured(tmp_path, capsys, seen):
    names = "auto compiled:auto static:fixed:1,1 compiled:standard compiled:drafter:draft"
    main(arguments(tmp_path, more=f"--compare {names}", count=2))
    out = capsys.readouterr().out
    texts = {}
    for record in runs_of(tmp_path):
        texts.setdefault(record["group"], {})[record["variant"]] = record["tokens"]
    assert [set(of_group) for of_group in texts.values()] == [{"standard", *names.split()}] * 2
    assert all(tokens == of_group["standard"] for of_group in texts.values() for tokens in of_group.values())
    assert out.count("| identical (2) |") == 5, "all but the standard ensemble are compared with it"

    prompts = [length for record in runs_of(tmp_path) for length in record["prompt_tokens"]]
    assert len(set(prompts)) == 2 and seen["lengths"] == {max(prompts) + 8}
    compiled = {name for name in names.split() if name.startswith("compiled:")}
    assert set(seen["passes"]) - {""} == compiled, "no others' passes are"

    warmups = [line for line in lines_of(tmp_path) if line["kind"] == "warmup"]
    assert {line["variant"] for line in warmups} == compiled
    lengths = {line["variant"]: len(line["member_seconds"]) for line in warmups}
    assert lengths["compiled:auto"] == 2 and lengths["compiled:drafter:draft"] == 3
    assert all(line["seconds"] == sum(line["member_seconds"]) > 0 for line in warmups)
    assert f"- Compiling took {sum(line['seconds'] for line in warmups):.0f} s" in out

    main(arguments(tmp_path, more="--compare compiled:auto", count=3))  # one more: compiled again, recorded once
    assert [line for line in lines_of(tmp_path) if line["kind"] == "warmup"] == warmups
    assert len(runs_of(tmp_path)) == 2 * 6 + 2


def test_freezing_is_a_setting(tmp_path):
    given = parser().parse_args(arguments(tmp_path, more="--compare compiled:auto --freeze"))
    plan = Plan(settings_of(given))
    assert plan.compile_config.to_dict()["options"] == {"freezing": True} and plan.compile_config.mode is None
    assert plan.settings.pinned()["freeze"] is True and Settings().pinned()["freeze"] is False
    given.freeze = False
    given.method = "weighted"
    assert Plan(settings_of(given)).compile_config.to_dict() == CompileConfig().to_dict()


def test_a_curve_gives_lengths_to_prefixed_names(tmp_path):
    more = "--compare compiled:fixed static:no-alternate auto --curve proposal-length --values 1 3"
    plan = Plan(settings_of(parser().parse_args(arguments(tmp_path, more=more))))
    names = [variant.name for variant in plan.variants(plan.conditions[0])]
    expected = ["compiled:fixed:1", "compiled:fixed:3", "static:no-alternate:1", "static:no-alternate:3", "auto"]
    assert names == ["standard", *expected]


def test_caches_are_as_long_as_the_prompts_of_a_point(tmp_path):
    more = "--compare static:auto --curve prompt-length --values 32 64"
    plan = Plan(settings_of(parser().parse_args(arguments(tmp_path, more=more))))
    assert [plan.longest_text(condition) for condition in plan.conditions] == [40, 72]
