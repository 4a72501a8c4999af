"""What passes cost, the limit that follows, the faster dtype, and the loop that is the plainest rival."""

from collections import Counter
from itertools import product

import pytest
import torch
from families import tiny
from test_bench import arguments, lines_of, runs_of
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList

from hf_spec_ensemble import EnsembleConfig, Suffixes
from hf_spec_ensemble.bench import Records, curves, dtypes, measure, plots, summary
from hf_spec_ensemble.bench.__main__ import main
from hf_spec_ensemble.bench.loop import ancestral_loop
from hf_spec_ensemble.bench.variants import parse
from hf_spec_ensemble.demo import FAMILY
from hf_spec_ensemble.members.runner import Running


# What passes cost


def prompts(rows, length):
    return {"input_ids": torch.full((rows, length), 5), "attention_mask": torch.ones(rows, length, dtype=torch.long)}


def test_passes_are_measured_as_generation_runs_them_in_turns():
    models = {name: AutoModelForCausalLM.from_pretrained(FAMILY / name) for name in ("reader", "solver")}
    seen = []
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda _, args, given, name=name: seen.append((name, *given["input_ids"].shape)), with_kwargs=True
        )
    made = curves.measure_curves(models, prompts(2, 10), Running(), new_tokens=6, widths=(1, 3))
    count = Counter(seen)
    for name, curve in made.items():
        assert curve["widths"] == [1, 3] and len(curve["seconds"]) == 2 and min(curve["seconds"]) > 0
        assert curve["prompt_tokens"] == 13 and curve["prompt_seconds"] > 0
        assert curve["parameters"] == models[name].num_parameters()
        passes = curves.ROUNDS * curves.PASSES
        assert [count[name, 2, width] for width in (13, 1, 3)] == [curves.ROUNDS, passes, passes]
    assert all(one[0] != other[0] for one, other in zip(seen[::2], seen[1::2])), "models take turns"
    assert [width for _, _, width in seen[2:10]] == [1, 1, 3, 3, 3, 3, 1, 1], "and so do widths"


def test_a_curve_keeps_within_the_positions_that_models_have():
    model = tiny("gpt2", 1)  # 128 positions
    made = curves.measure_curves({"one": model}, prompts(1, 120), Running(), new_tokens=20, longest=128, widths=(1, 8))
    assert made["one"]["prompt_tokens"] == 120


def test_medians_are_taken(monkeypatch):
    laps = iter([9.0, 1.0, 2.0, 90.0, 60.0, 3.0, 8.0, 4.0, 5.0])  # a prompt and two passes, three times
    monkeypatch.setattr(curves, "_last_lap", lambda member: next(laps))
    made = curves.measure_curves({"one": tiny("llama", 1)}, prompts(1, 4), Running(), new_tokens=2, widths=(1,))
    assert made["one"]["seconds"] == [3.5] and made["one"]["prompt_seconds"] == 9


# Limits


def run_of(variant, group=0, **more):
    base = dict(kind="run", task="gsm8k", temperature=0.0, batch_size=1, members=2, prompt_length=None, seed=0)
    base |= dict(variant=variant, group=group, repeat=0, prompt_tokens=[10], tokens=[list(range(11))], new_tokens=11)
    base |= dict(scores=None, seconds=11.0, loop_seconds=11.0, forward_passes=[11, 11], member_seconds=[5.0, 5.0])
    return base | more


def limits_of(folder, runs, config=None, costs=(1.0, 1.0), prompt_seconds=0.0, prefixes=("",)):
    """The limits that the summaries of these records give, by variant; a pass costs the same for every width."""
    config = (config or EnsembleConfig()).to_dict()
    records = Records(folder, {"settings": {"config": config, "members": ["a", "b"]}})
    for prefix, (name, seconds) in product(prefixes, zip("abc", costs)):
        key = dict(
            kind="curve", task="gsm8k", batch_size=runs[0]["batch_size"], prompt_length=None, variant=prefix, model=name
        )
        seconds /= 2 if prefix else 1
        curve = dict(widths=[1, 2, 8], seconds=[seconds] * 3, parameters=5, prompt_tokens=20)
        records.add(key | curve | dict(prompt_seconds=prompt_seconds))
    for run in [*runs, *(run | {"variant": "standard", "seconds": 11.0} for run in runs)]:
        records.add(run)
    return {s.variant: (s.limit, s.reached) for s in summary.summarise(records)}


def test_the_limit_is_the_theorys_for_curves_and_acceptance(tmp_path):
    greedy = run_of("auto", verified=[20, 20], accepted=[18, 18], seconds=6.0)
    assert limits_of(tmp_path / "1", [greedy])["auto"][0] == pytest.approx(2 / 1.1)
    assert limits_of(tmp_path / "2", [greedy])["standard"] == (None, None)
    sampled = run_of("auto", verified=[20, 20], accepted=[5, 5], temperature=1.0, seconds=6.0)
    found, reached = limits_of(tmp_path / "3", [sampled])["auto"]
    assert found == pytest.approx(2) and reached == pytest.approx(11 / 6 / 2)
    gumbel = limits_of(tmp_path / "4", [sampled], EnsembleConfig(coupling="gumbel"))
    assert gumbel["auto"][0] == pytest.approx(2 / 1.75)


def test_batches_and_early_settling_are_simulated(tmp_path):
    config = EnsembleConfig(weights=[0.7, 0.3])
    texts = dict(tokens=[list(range(101))] * 2, prompt_tokens=[10, 10], new_tokens=202, batch_size=2)
    row = run_of("auto", verified=[0, 0], accepted=[0, 0], tokens=texts["tokens"][:1], new_tokens=101)
    early = limits_of(tmp_path / "1", [row | {"settled_early": 0.8}], config)["auto"][0]
    assert early == pytest.approx(2 / 1.2, rel=0.1) and limits_of(tmp_path / "2", [row], config)["auto"][0] == 1
    agreed = run_of("auto", verified=[200, 200], accepted=[120, 120])
    one, batch = (
        limits_of(tmp_path / name, [run], EnsembleConfig(method="product"))["auto"][0]
        for name, run in (("3", agreed), ("4", agreed | texts))
    )
    assert 1 < batch < one, "rows wait for each other"


def test_the_prompt_is_read_once_by_both(tmp_path):
    sampled = run_of("auto", verified=[20, 20], accepted=[5, 5], temperature=1.0)
    # Two members take 4 / 2 seconds each for 10 tokens of 20; then 10 tokens at 2 seconds, or at 1
    assert limits_of(tmp_path, [sampled], prompt_seconds=4.0)["auto"][0] == pytest.approx((4 + 20) / (4 + 10))


def test_static_and_compiled_passes_have_curves_of_their_own(tmp_path):
    sampled = run_of("compiled:auto", verified=[20, 20], accepted=[5, 5], temperature=1.0)
    assert limits_of(tmp_path / "1", [sampled], prefixes=("", "compiled:"))["compiled:auto"][0] == pytest.approx(4)
    assert limits_of(tmp_path / "2", [sampled])["compiled:auto"] == (None, None)


def test_a_drafter_without_a_model_costs_what_its_calls_took(tmp_path):
    more = dict(verified=[10, 10, 11], accepted=[9, 9, 11], forward_passes=[5, 5, 10])
    free = run_of("auto", **more, member_seconds=[5.0, 5.0, 0.0])
    dear = run_of("auto", **more, member_seconds=[5.0, 5.0, 500.0])
    free, dear = (limits_of(tmp_path / str(i), [run])["auto"][0] for i, run in enumerate((free, dear)))
    assert free > 5 and dear == pytest.approx(2 / 1.1), "it is left out where it costs too much"


def test_a_member_of_no_weight_drafts(tmp_path):
    run = run_of("auto", verified=[1, 100], accepted=[0, 95])
    config = EnsembleConfig(weights=[1.0, 0.0])
    cheap = limits_of(tmp_path / "1", [run], config, costs=(1.0, 0.01))["auto"][0]
    assert 1.01 * cheap > 5 and limits_of(tmp_path / "2", [run], config)["auto"][0] < 2.1


def test_a_model_that_drafts_has_a_curve(tmp_path):
    run = run_of("drafter:c", verified=[1, 1, 100], accepted=[0, 0, 95])
    run |= dict(forward_passes=[1, 1, 1], member_seconds=[1.0, 1.0, 1.0])
    cheap = limits_of(tmp_path / "1", [run], costs=(1.0, 1.0, 0.01))["drafter:c"][0]
    assert cheap > 4 and limits_of(tmp_path / "2", [run])["drafter:c"] == (None, None)


# From the command line


def test_curves_and_limits_are_recorded_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "plot", lambda *_: [])
    given = "--temperatures 0 1 --compare auto drafter:suffixes loop ensemble-weight:2 static:auto"
    main(arguments(tmp_path, more=given, count=1))
    out = capsys.readouterr().out
    assert out.count("loop is left out: it samples mixtures") == 2, "as a note, and in the report"
    found = [line for line in lines_of(tmp_path) if line["kind"] == "curve"]
    assert {(line["variant"], line["model"]) for line in found} == set(product(["", "static:"], ["reader", "solver"]))
    assert len(found) == 4, "temperatures share them"
    assert all(line["widths"] == list(curves.WIDTHS) for line in found)
    places = [i for i, line in enumerate(lines_of(tmp_path)) if line["kind"] == "curve"]
    assert max(places) < min(i for i, line in enumerate(lines_of(tmp_path)) if line["kind"] == "run")

    table = (tmp_path / "out" / "table.md").read_text()
    assert (
        "## What passes cost" in table and "| static:solver | gsm8k | 1 |" in table and "Limit: the speed-up" in table
    )
    assert out.count("| model | task | batch | 1 tokens | 2 tokens |") >= 2, "shown when measured, and in the report"
    head, *rows = [
        line.split(" | ") for line in table.splitlines() if line.startswith(("| method", "| auto", "| loop"))
    ]
    limit, reached = head.index("limit"), head.index("reached")
    of_auto = [row for row in rows if row[0] == "| auto"]
    assert len(of_auto) == 2 and all(float(row[limit]) > 0 and row[reached].endswith("%") for row in of_auto)
    assert [row[limit] for row in rows if row[0].startswith("| loop")] == ["-"]
    for record in runs_of(tmp_path):
        if record["variant"] == "loop":
            assert record["temperature"] == 1 and sum(record["forward_passes"]) == record["new_tokens"]

    monkeypatch.setattr(curves, "measure_curves", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(measure, "measure_curves", curves.measure_curves)
    main(arguments(tmp_path, more=given + " fixed:1", count=1))


# The dtype


def test_the_faster_dtype_is_taken_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "plot", lambda *_: [])
    monkeypatch.setattr(dtypes, "time_dtypes", lambda plan: {"float32": 0.3, "bfloat16": 0.2})
    main(arguments(tmp_path, more="--compare auto --dtype auto", count=1))
    assert lines_of(tmp_path)[0]["settings"]["dtype"] == "bfloat16"
    said = "bfloat16 was measured to be 1.50 times as fast as float32"
    assert said in (tmp_path / "out" / "table.md").read_text() and capsys.readouterr().out.startswith(said)
    monkeypatch.setattr(dtypes, "time_dtypes", lambda plan: pytest.fail("measured again"))
    main(arguments(tmp_path, more="--compare fixed:1 --dtype auto", count=1))  # more of the same
    assert lines_of(tmp_path)[0]["settings"]["dtype"] == "bfloat16" and said in capsys.readouterr().out


def test_both_dtypes_are_timed(tmp_path, monkeypatch):
    timed, asked = [], []
    monkeypatch.setattr(plots, "plot", lambda *_: [])
    whole = dtypes.measure_curves
    monkeypatch.setattr(
        dtypes, "measure_curves", lambda models, *x, **y: asked.append(models) or whole(models, *x, **y)
    )
    monkeypatch.setattr(
        dtypes, "time_dtypes", lambda plan, time=dtypes.time_dtypes: timed.append(time(plan)) or timed[0]
    )
    main(arguments(tmp_path, more="--compare fixed:1 --dtype auto", count=1))
    assert timed[0].keys() == {"float32", "bfloat16"} and min(timed[0].values()) > 0
    assert {(name[0], str(model.dtype)) for name, model in asked[0].items()} == {
        ("float32", "torch.float32"),
        ("bfloat16", "torch.bfloat16"),
    }
    (record,) = [line for line in lines_of(tmp_path) if line["kind"] == "dtype"]
    assert record["seconds"] == timed[0]
    assert lines_of(tmp_path)[0]["settings"]["dtype"] == min(timed[0], key=timed[0].get)


def test_processes_do_not_choose_a_dtype_each_for_itself(tmp_path, monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, more="--compare auto --dtype auto", count=2))
    assert "Name the dtype" in capsys.readouterr().err and not (tmp_path / "out").exists()


# Names


def test_drafters_by_name():
    def drafter(name, **more):
        return parse(name, 2, EnsembleConfig(), **more)[0].arguments(["a", "b"], {})[1].get("drafter", "default")

    assert drafter("auto") == "default", "what generate() does by itself"
    assert drafter("drafter:none") is None and drafter("fixed:3") is None and drafter("no-alternate") is None
    assert isinstance(one := drafter("drafter:suffixes"), Suffixes) and one is not drafter("drafter:suffixes")
    assert all(parse(f"drafter:{x}", 2, EnsembleConfig())[0].drafting_model is None for x in ("none", "suffixes"))


@pytest.mark.parametrize(
    "more", [dict(temperature=0.0), dict(temperature=1.0, batch_size=2), dict(temperature=1.0, method="product")]
)
def test_the_loop_is_for_sampled_mixtures(more):
    config = EnsembleConfig(method=more.pop("method", "weighted"))
    assert isinstance(parse("loop", 2, config, **more), str)
    assert parse("loop", 3, EnsembleConfig(), temperature=1.0)[0].loop == [1 / 3] * 3


# The loop


def test_the_loop_samples_the_mixture():
    """Two tokens, against their probabilities; owners that stayed for two would show in pairs."""
    torch.manual_seed(0)
    models = [tiny("llama", seed, layers=1, vocab=4) for seed in (3, 4)]
    prompt, weights, temperature = torch.tensor([[1, 2, 3]]), [0.5, 0.5], 1.25

    def r(ids):
        with torch.no_grad():
            probs = [(model(ids).logits[0, -1].float() / temperature).softmax(-1) for model in models]
        return sum(w * p for w, p in zip(weights, probs))

    expected = torch.stack([r(prompt)[x] * r(torch.tensor([[1, 2, 3, x]])) for x in range(4)]).flatten()
    given = (
        LogitsProcessorList([TemperatureLogitsWarper(temperature)]),
        StoppingCriteriaList([MaxLengthCriteria(5)]),
        GenerationConfig(),
    )
    count, texts = torch.zeros(16), 800
    for _ in range(texts):
        sequence = ancestral_loop(models[0], prompt, *given, assistant_models=models[1:], weights=weights).sequences
        count[4 * sequence[0, 3] + sequence[0, 4]] += 1
    wanted = texts * expected
    assert ((count - wanted) ** 2 / wanted).sum() < 37.7  # 15 degrees of freedom: once in a thousand


def test_the_loop_reads_every_token_once():
    models, widths = [tiny("llama", seed) for seed in (1, 2)], [[], []]
    hooks = [
        model.register_forward_pre_hook(
            lambda _, args, given, i=i: widths[i].append(args[0].shape[1]), with_kwargs=True
        )
        for i, model in enumerate(models)
    ]
    rival = dict(custom_generate=ancestral_loop, assistant_models=models[1:], weights=[0.5, 0.5])
    call = dict(inputs=torch.tensor([[5, 6, 7]]), do_sample=True, max_new_tokens=12, eos_token_id=None)
    torch.manual_seed(0)
    out = models[0].generate(**call, **rival)
    for hook in hooks:
        hook.remove()
    read = [sum(each) for each in widths]
    assert out.sequences.shape == (1, 15)
    assert max(read) == 14 and min(read) <= 14
    torch.manual_seed(0)
    ensemble = models[0].generate(
        **call, assistant_model=models[1:], ensemble_config=EnsembleConfig(), return_dict_in_generate=True
    )
    assert [len(each) for each in widths] == ensemble.stats.owned[:2], "the same members draw in both"
