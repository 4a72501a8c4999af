"""The benchmark: what it asks, scores, measures, keeps and shows. Times are only checked to be there."""

import importlib.util
import json
import re
import socket
import struct
from dataclasses import replace

import pytest
import torch
from mixed import family, saved
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_spec_ensemble import EnsembleConfig
from hf_spec_ensemble.bench import Plan, Records, Settings, measure, report, sandbox, seccomp, summary, tasks
from hf_spec_ensemble.bench import plan as planning
from hf_spec_ensemble.bench.__main__ import main
from hf_spec_ensemble.bench.sandbox import runs
from hf_spec_ensemble.bench.scoring import chosen_letter, fenced, final_number, program, same_code
from hf_spec_ensemble.bench.variants import Variant, kind_of, parse, repeats_standard
from hf_spec_ensemble.demo import FAMILY


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef double(x):\n    """Twice x.\n    >>> double(2)\n    4\n    """\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}
ROWS = {
    "gsm8k": {"question": "Ann has 2 pens and buys 3. How many has she?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
    "mmlu": {"question": "What is 2 + 3?", "subject": "arithmetic", "choices": ["4", "5", "6", "7"], "answer": 1},
    "humaneval": HUMANEVAL,
    "copy": HUMANEVAL,
    "cnn_dailymail": {"article": "A cat sat on a mat.", "highlights": "A cat sat.\nOn a mat.", "id": "0"},
}


def data_file(folder, task, count=3):
    """Rows of a task that differ a little."""
    field = {"mmlu": "question", "gsm8k": "question", "cnn_dailymail": "article"}.get(task, "canonical_solution")
    rows = [ROWS[task] | {field: ROWS[task][field] + "\n" + "# again " * i} for i in range(count)]
    file = folder / f"{task}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def arguments(folder, task="gsm8k", more="", count=3):
    return (
        f"--tasks {task} --data-file {data_file(folder, task, count)} --shots 0 --num-prompts {count} "
        f"--max-new-tokens 8 --device cpu --out {folder / 'out'} {more}"
    ).split()


def lines_of(folder):
    return [json.loads(line) for line in (folder / "out" / "records.jsonl").read_text().splitlines()]


def runs_of(folder):
    return [line for line in lines_of(folder) if line["kind"] == "run"]


# Scores


def test_final_numbers():
    assert final_number("3 + 4 = 7\n#### 7\n\nQuestion: 8") == 7
    assert final_number(r"So it is \boxed{1,024} of 2000") == 1024
    assert final_number("It costs $1,250.50.") == 1250.5
    assert final_number("-3 degrees") == -3
    assert final_number("I do not know") is None


def test_chosen_letters():
    assert chosen_letter("A seems likely, but the answer is (C).") == "C"
    assert chosen_letter("The answer is: **D**") == "D"
    assert chosen_letter("B. Because of A Cat") == "A"  # the last letter on its own
    assert chosen_letter("A man's guess: I don't know") == "A"
    assert chosen_letter("the answer is a matter of taste") is None


def test_gsm8k_scores_the_number():
    task, row = tasks.TASKS["gsm8k"], ROWS["gsm8k"]
    assert task.score(row, "She has 2 + 3 = 5 pens.\n#### 5") == 1
    assert task.score(row, "The result is 5.00\nQuestion: and 6?") == 1
    assert task.score(row, "#### 6") == task.score(row, "") == 0
    assert "<<" not in task.answer(row)


def test_mmlu_scores_the_letter():
    task, row = tasks.TASKS["mmlu"], ROWS["mmlu"]
    assert task.score(row, task.answer(row)) == task.score(row, "B") == 1
    assert task.score(row, "The answer is (A), not B") == task.score(row, "") == 0
    assert "B. 5" in task.question(row)


@pytest.mark.parametrize(
    "answer, score",
    [
        ("    return 2 * x\n\nprint(double(3))\nraise ValueError", 1),  # a continuation, and what comes after it
        ("Here:\n```python\ndef double(x):\n    return x + x\n```\nIt doubles.", 1),
        ("```python\nimport math\ndef double(x):\n    return math.prod([2, x])", 1),  # the fence does not end
        ("```python\ndef double(x):\n    return x * x\n```", 0),
        ("I cannot.", 0),
    ],
)
def test_humaneval_runs_the_tests(answer, score):
    assert tasks.TASKS["humaneval"].score(HUMANEVAL, answer) == score


def test_humaneval_keeps_the_imports_of_the_prompt():
    written = program("```python\ndef double(x):\n    return math.prod([2, x])\n```", HUMANEVAL["prompt"], "double")
    assert written.startswith("import math") and '"""' not in written


def test_copy_scores_the_code_with_the_new_name():
    task = tasks.TASKS["copy"]
    expected = task.edited(HUMANEVAL)
    assert "def new_double(x)" in expected and ">>> new_double(2)" in expected
    assert task.score(HUMANEVAL, f"```python\n{expected}```") == task.score(HUMANEVAL, expected.strip()) == 1
    assert task.score(HUMANEVAL, expected.replace("2 * x", "x * 2")) == 0
    assert task.score(HUMANEVAL, HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]) == 0
    assert expected[:20] not in task.question(HUMANEVAL)
    assert same_code("a  \nb\n\n", "a\nb") and fenced("x") == "x"


def test_cnn_dailymail_scores_rouge():
    task, row = tasks.TASKS["cnn_dailymail"], ROWS["cnn_dailymail"]
    assert task.score(row, row["highlights"]) == 1
    assert 0 < task.score(row, "A cat slept.") < 1
    assert task.score(row, "Nothing else") == 0


# The sandbox


def test_the_sandbox_stops_endless_loops_and_waits():
    assert not runs("while True: pass", seconds=1)
    assert not runs("import time\ntime.sleep(60)", seconds=1)


def test_the_sandbox_limits_memory():
    hog = "x = bytearray(600_000_000)"
    assert runs(hog, memory=1 << 30)
    assert not runs(hog, memory=1 << 29)


@pytest.mark.parametrize(
    "attempt",
    [
        "open({file!r}, 'w').write('x')",
        "import os; os.open({file!r}, os.O_WRONLY | os.O_CREAT)",
        "import pathlib; pathlib.Path({file!r}).touch()",
        "import os; os.remove({victim!r})",
        "import shutil; shutil.rmtree({folder!r})",
        "import os; os.system('touch {file}')",
        "import subprocess; subprocess.run(['touch', {file!r}])",
        "import socket; socket.socket()",
        "import ctypes; ctypes.CDLL(None)",
        "import os; os.kill(os.getppid(), 0)",
        "try:\n    open({file!r}, 'w')\nexcept PermissionError:\n    raise SystemExit(0)",
        "import os; os._exit(0)",
    ],
)
def test_the_sandbox_refuses_what_a_puzzle_does_not_need(tmp_path, attempt):
    (tmp_path / "victim").write_text("here")
    names = {"file": str(tmp_path / "new"), "victim": str(tmp_path / "victim"), "folder": str(tmp_path)}
    assert not runs(attempt.format(**names))
    assert [file.name for file in tmp_path.iterdir()] == ["victim"]


ATTACKS = {
    "fork_exec": """
import _posixsubprocess, os, sys
try:
    read, write = os.pipe()
except PermissionError:
    read, write = 0, 1
shell = b"/bin/sh"
_posixsubprocess.fork_exec(
    [shell, b"-c", b"echo x > {file}"], [shell], True, (write,), None, None, -1, -1, -1, -1, -1, -1, read, write,
    True, False, *([] if sys.version_info < (3, 11) else [0]), None, None, None, -1, None,
    *([] if sys.version_info < (3, 11) else [False]),
)
import time
time.sleep(0.5)
""",
    "fork": "import os\nif os.fork() == 0:\n    open({file!r}, 'w').write('x')",
    "a thread": "import _thread\n_thread.start_new_thread(print, ())",
    "a file": "import os\nos.close(os.open({file!r}, os.O_WRONLY | os.O_CREAT))",
    "a folder": "import os\nos.mkdir({file!r})",
    "a link": "import os\nos.symlink('/', {file!r})",
    "removal": "import os\nos.remove({victim!r})",
    "renaming": "import os\nos.rename({victim!r}, {file!r})",
    "cutting": "import os\nos.truncate({victim!r}, 0)",
    "rights": "import os\nos.chmod({victim!r}, 0)",
    "a connection": "import socket\nsocket.create_connection(('127.0.0.1', {port}))",
    "a signal": "import os\nos.kill(os.getppid(), 0)",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
}


@pytest.mark.skipif(not sandbox.enforced(), reason="this kernel, or what runs on it, filters no calls for us")
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("hook", [True, False])
def test_the_kernel_refuses_what_python_does_not_notice(tmp_path, attack, hook):
    (tmp_path / "victim").write_text("here")
    mode = (tmp_path / "victim").stat().st_mode
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"file": str(tmp_path / "new"), "victim": str(tmp_path / "victim"), "port": server.getsockname()[1]}
        attack = re.sub(r"\{(\w+)(!r)?\}", lambda m: repr(names[m[1]]) if m[2] else str(names[m[1]]), attack)
        runner = sandbox.LIMITS + (sandbox.HOOK if hook else "") + sandbox.RUN
        assert not sandbox._run(attack, runner, sandbox.filter_for())
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [file.name for file in tmp_path.iterdir()] == ["victim"]
    assert (tmp_path / "victim").read_text() == "here" and (tmp_path / "victim").stat().st_mode == mode


def test_where_the_kernel_does_not_filter_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "filter_for", lambda: None)
    unknown = sandbox.enforced.__wrapped__  # without what is remembered of this process
    monkeypatch.setattr(sandbox, "enforced", unknown)
    monkeypatch.setattr(planning, "enforced", unknown)
    assert not sandbox.enforced()
    assert runs("assert True") and not runs(f"open({str(tmp_path / 'new')!r}, 'w')")
    main(arguments(tmp_path, task="humaneval", more="--compare auto --run-model-code", count=1))
    out = capsys.readouterr().out
    assert out.startswith("The kernel does not confine") and not (tmp_path / "new").exists()


def test_a_filter_that_python_cannot_live_with_is_not_set(monkeypatch):
    nothing_allowed = struct.pack("<HBBI", seccomp.RETURN, 0, 0, seccomp.REFUSE)
    monkeypatch.setattr(sandbox, "filter_for", lambda: nothing_allowed)
    monkeypatch.setattr(sandbox, "enforced", sandbox.enforced.__wrapped__)
    assert not sandbox.enforced() and runs("assert True")


@pytest.mark.parametrize("code", ["x = '\ud800'", "x = 1\0", "\ufeffx ="])
def test_code_that_is_no_text_is_wrong(code):
    assert runs(code) is False
    assert tasks.TASKS["humaneval"].score(HUMANEVAL, f"```python\n{code}\n```") == 0


def test_the_sandbox_lets_files_be_read_and_modules_imported():
    program = "import json, os, random, time, datetime, decimal, unittest, dataclasses, asyncio, tempfile, typing"
    program += f"\nassert open({__file__!r}).read() and os.listdir('/') and os.path.isfile({__file__!r})"
    program += "\ntime.sleep(0.01); random.random(); datetime.datetime.now(); os.getcwd()\nhash(''), id(1)"
    assert runs(program)


def test_the_sandbox_lets_ordinary_programs_run():
    assert runs("import math, re, collections, hashlib\nprint('x' * 100_000)\nassert math.gcd(4, 6) == 2")


# Tasks


def test_rows_come_from_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, configuration, split):
        asked.append((path, configuration, split))
        return datasets.Dataset.from_list([ROWS["gsm8k"] | {"question": f"{split} {i}"} for i in range(5)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, examples = tasks.load_rows("gsm8k", 2, 1, None)
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    assert [row["question"] for row in rows + examples] == ["test 0", "test 1", "train 0"]
    assert {name: task.hub[0] for name, task in tasks.TASKS.items()} == {
        "gsm8k": "openai/gsm8k", "humaneval": "openai/openai_humaneval", "mmlu": "cais/mmlu",
        "cnn_dailymail": "abisee/cnn_dailymail", "copy": "openai/openai_humaneval",
    }  # fmt: skip


def test_examples_of_a_file_are_not_measured(tmp_path):
    rows, examples = tasks.load_rows("gsm8k", 10, 2, str(data_file(tmp_path, "gsm8k", 5)))
    assert len(rows) == 3 and len(examples) == 2
    assert not any(example in rows for example in examples)


def test_prompts_with_and_without_a_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "reader")
    task, row = tasks.TASKS["gsm8k"], ROWS["gsm8k"]
    for chat in (True, False):
        ids = tasks.encode(task, row, [row], tokenizer, chat)
        text = tokenizer.decode(ids)
        assert text.count(row["question"]) == 2 and text.count("#### 5") == 1 and text.endswith("Answer:")
    ids = tasks.encode(tasks.TASKS["humaneval"], HUMANEVAL, [], tokenizer, False)
    assert tokenizer.decode(ids).strip() == HUMANEVAL["prompt"].strip()


# Variants


def test_names_stand_for_configs():
    config = EnsembleConfig(weights=[0.7, 0.3])
    assert [v.alone for v in parse("members", 3, EnsembleConfig())] == [0, 1, 2]
    assert not parse("standard", 2, config)[0].config.speculative
    assert parse("auto", 2, config)[0].config == config
    assert parse("fixed:4", 2, config)[0].config == replace(config, num_assistant_tokens=4)
    assert parse("no-alternate", 2, config)[0].config == replace(config, alternate=False)
    assert parse("no-alternate:3", 2, config)[0].config == replace(config, alternate=False, num_assistant_tokens=3)
    assert parse("assisted:3", 2, config) and parse("ensemble-weight:3", 2, config)[0].weight == 0.7
    for name, members, made in (("assisted:3", 2, 4), ("ensemble-weight:3", 3, 1)):
        assert isinstance(parse(name, members, EnsembleConfig(), made), str)
    assert isinstance(parse("ensemble-weight:3", 2, EnsembleConfig(method="contrastive")), str)
    assert isinstance(parse("ensemble-weight:3", 2, EnsembleConfig(weights=[1.0, 0.0])), str)


def test_drafters_reach_generate():
    models = ["main", "other"]
    (variant,) = parse("drafter:prompt_lookup", 2, EnsembleConfig())
    assert variant.arguments(models, {})[1]["drafter"] == "prompt_lookup" and variant.drafting_model is None
    (variant,) = parse("drafter:some/folder", 2, EnsembleConfig())
    assert variant.arguments(models, {"some/folder": "loaded"})[1]["drafter"] == "loaded"
    assert variant.drafting_model == "some/folder"


def test_prefixes_go_in_front_of_ensembles():
    config = EnsembleConfig()
    for prefix in ("static:", "compiled:", "batched:"):
        for name in ("standard", "auto", "no-alternate", "no-alternate:3", "fixed:4", "fixed:1,2", "drafter:some:1"):
            (plain,), (variant,) = parse(name, 2, config), parse(prefix + name, 2, config)
            assert variant == replace(plain, name=prefix + name, prefix=prefix)
            assert kind_of(variant.name) == kind_of(name) and repeats_standard(variant.name)
    assert not repeats_standard("standard") and not repeats_standard("member:0")
    assert summary.label("compiled:drafter:some/folder", ["a", "b"]) == "compiled:drafter:folder"
    assert summary.label("compiled:fixed:1", ["a", "b"]) == "compiled:fixed:1"


@pytest.mark.parametrize("name", ["members", "assisted:3", "ensemble-weight:3", "static:standard", "", "faster"])
def test_prefixes_go_in_front_of_nothing_else(name):
    with pytest.raises(ValueError, match=f"'compiled:{name}': compiled: goes in front of .* standard, auto, "):
        parse(f"compiled:{name}", 2, EnsembleConfig())


@pytest.mark.parametrize("name", ["faster", "fixed", "fixed:0", "fixed:a", "fixed:1,2,3", "assisted:1,2", "drafter:"])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="lengths|nothing to compare|num_assistant_tokens|proposal length"):
        parse(name, 2, EnsembleConfig())


def test_assisted_generation_gets_its_length_for_a_while():
    models = [AutoModelForCausalLM.from_pretrained(FAMILY / name) for name in ("reader", "draft")]
    before = models[1].generation_config.to_dict()
    with parse("assisted:3", 2, EnsembleConfig())[0].prepared(models):
        config = models[1].generation_config
        assert (config.num_assistant_tokens, config.num_assistant_tokens_schedule) == (3, "constant")
    assert models[1].generation_config.to_dict() == before


# Statistics


def test_the_bootstrap_interval():
    assert summary.interval([2.0]) == summary.Interval(2.0, 2.0, 2.0)
    # Of 0, ..., 10 a resample's median is at most k with the probability that Binomial(11, (k + 1) / 11) is at least 6:
    # 0.005 for k = 1 and 0.036 for k = 2, so that the 2.5 % quantile is 2, and by symmetry the other one 8
    assert summary.interval(range(11)) == summary.Interval(5.0, 2.0, 8.0)
    assert summary.interval([1, 2, 9]) == summary.interval([1, 2, 9])


def test_ratios_are_of_pairs_and_medians_of_repeats(tmp_path):
    settings = {"config": {"coupling": "maximal"}, "members": ["a"], "max_new_tokens": 20, "dtype": "x", "curve": None}
    records = Records(tmp_path, {"settings": settings, "environment": {}})
    base = dict(kind="run", task="gsm8k", temperature=0.0, batch_size=1, members=2, prompt_length=None, seed=0)
    base |= dict(forward_passes=[10, 10], member_seconds=[0.5, 0.25], scores=[1.0], tokens=[[1, 2]], loop_seconds=1.0)
    seconds = {  # by variant: of prompts, of repeats
        "standard": [[2.0, 4.0, 6.0], [3.0, 3.0, 3.0]],
        "auto": [[1.0, 1.0, 1.0], [1.0, 1.0, 2.0]],
    }
    for variant, groups in seconds.items():
        for group, repeats in enumerate(groups):
            for repeat, time in enumerate(repeats):
                # The variant's texts are half as long, so that its times for a token are twice as much
                own = dict(variant=variant, group=group, repeat=repeat, seconds=time)
                expected = {"predicted_speedup": 2.0} if variant == "auto" else {}
                records.add(base | own | expected | dict(new_tokens=20 if variant == "standard" else 10))
    standard, auto = summary.summarise(records)
    assert standard.speedup.median == 1 and standard.overhead is None
    assert auto.speedup.median == pytest.approx((2.0 + 1.5) / 2)
    assert auto.overhead == pytest.approx(0.25) and auto.passes == [1, 1] and auto.score == 1
    assert auto.identical == (6, 6)
    text = report.markdown(records)
    assert "measured for:\n\n- auto, gsm8k, T 0, batch 1, members 2: 1.75 measured, 2.00 predicted, with 25%" in text


# From the command line


def test_a_run_writes_records_table_and_plots(tmp_path, capsys):
    names = "members no-alternate fixed:2 auto assisted:3 ensemble-weight:3"
    main(arguments(tmp_path, more=f"--compare {names} --temperatures 0 1 --seeds 0 1 --repeats 2", count=1))
    header, records = lines_of(tmp_path)[0], runs_of(tmp_path)
    assert header["environment"].keys() >= {"torch", "transformers", "hf_spec_ensemble", "device", "threads"}
    assert header["settings"]["dtype"] == "float32"
    assert len(records) == 8 * 2 * (1 + 2)  # variants, repeats, seeds of T = 0 and T = 1

    first = {record["variant"]: record for record in reversed(records)}
    assert all(record["seconds"] > 0 and record["new_tokens"] == len(record["tokens"][0]) for record in records)
    assert first["member:0"]["forward_passes"] == [first["member:0"]["new_tokens"], 0]
    assert sum(first["assisted:3"]["forward_passes"]) > 0 and "verified" not in first["assisted:3"]
    assert [len(first[name]["verified"]) for name in ("fixed:2", "auto")] == [2, 3], "the text drafts by default"
    assert first["auto"]["scores"][0] in (0, 1)
    greedy = [record for record in records if record["temperature"] == 0 and record["group"] == 0]
    texts = {record["variant"]: record["tokens"] for record in greedy}
    assert texts["auto"] == texts["fixed:2"] == texts["no-alternate"] == texts["standard"]
    begin = [record["variant"] for record in greedy if record["repeat"] == 0]
    assert begin != [record["variant"] for record in greedy if record["repeat"] == 1], "the order rotates"
    repeats = [r["tokens"] for r in records if r["temperature"] == 1 and r["variant"] == "auto" and r["group"] == 0]
    assert repeats[:2] == repeats[2:], "a repeat measures the text of its seed again"

    table = (tmp_path / "out" / "table.md").read_text()
    for said in (
        "| T | method | gsm8k |",
        "1 prompt.",
        "reader alone",
        "assisted:3 ¹",
        "identical (2)",
        "exact match",
        "threads",
    ):
        assert said in table
    assert table in capsys.readouterr().out
    for name in ("speedup", "acceptance", "time"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("task", ["mmlu", "humaneval", "copy", "cnn_dailymail"])
def test_every_task_runs(tmp_path, capsys, task):
    more = "--compare auto assisted:2 --batch-sizes 2 --run-model-code"
    main(arguments(tmp_path, task=task, more=more, count=2))
    assert "assisted:2 is left out with batches of 2" in capsys.readouterr().out
    standard, auto = runs_of(tmp_path)
    assert (standard["variant"], auto["variant"]) == ("standard", "auto")
    assert len(auto["scores"]) == len(auto["tokens"]) == 2 and auto["tokens"] == standard["tokens"]


def test_code_runs_only_with_leave(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "runs", lambda *_: pytest.fail("ran code"))
    main(arguments(tmp_path, task="humaneval", more="--compare auto", count=1))
    assert "--run-model-code" in capsys.readouterr().out
    assert all(record["scores"] is None for record in runs_of(tmp_path))


@pytest.mark.parametrize(
    "curve, values, column",
    [
        ("members", "2 3", "| T | method | members 2 | members 3 |"),
        ("batch", "1 2", "| T | method | batch 1 | batch 2 |"),
        ("prompt-length", "32 64 1024", "| T | method | prompt length 32 | prompt length 64 |"),
        ("proposal-length", "1 3", "| 0 | fixed:3 |"),
    ],
)
def test_curves(tmp_path, capsys, curve, values, column):
    main(arguments(tmp_path, more=f"--curve {curve} --values {values}", count=2))
    out = capsys.readouterr().out
    assert column in out
    assert ("Prompts of 1024 tokens are left out" in out) == (curve == "prompt-length")
    assert ("they take part several times" in out) == (curve == "members")
    assert (tmp_path / "out" / f"curve-{curve}.png").read_bytes().startswith(b"\x89PNG")
    lengths = {length for record in runs_of(tmp_path) for length in record["prompt_tokens"]}
    assert curve != "prompt-length" or lengths == {32, 64}


def test_refilled_rows_are_one_call(tmp_path, monkeypatch, capsys):
    calls, whole = [], measure.generate_batch

    def called(model, prompts, **kwargs):
        calls.append((len(prompts), kwargs["batch_size"], kwargs["numbers"]))
        return whole(model, prompts, **kwargs)

    monkeypatch.setattr(measure, "generate_batch", called)
    names = "batched:auto batched:standard"
    main(arguments(tmp_path, more=f"--compare {names} --batch-sizes 2 --temperatures 0 1", count=5))
    assert [call for call in calls if call[0] > 2] == [(4, 2, [0, 1, 2, 3])] * 4  # but for those that warm up
    records = {(r["variant"], r["group"]): r for r in runs_of(tmp_path) if r["temperature"] == 0}
    assert len(records) == 6
    for (_, group), record in records.items():
        assert record["tokens"] == records["standard", group]["tokens"] and record["seconds"] > 0
    of_auto = [records["batched:auto", group] for group in (0, 1)]
    assert of_auto[0]["seconds"] / of_auto[0]["new_tokens"] == pytest.approx(
        of_auto[1]["seconds"] / of_auto[1]["new_tokens"]
    )
    table = (tmp_path / "out" / "table.md").read_text()
    assert "batched:auto ¹" in table and "identical (4)" in table and "divided among them by their tokens" in table
    reason = parse("batched:auto", 2, EnsembleConfig(coupling="maximal"), 2, 1.0)
    assert reason.startswith("with coupling maximal")


def test_prompts_that_are_cut_do_not_end_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(measure.Bench, "_ends", list(range(200)))  # tokens that would soon end every text
    main(arguments(tmp_path, more="--curve prompt-length --values 32", count=2))
    assert {len(tokens) for record in runs_of(tmp_path) for tokens in record["tokens"]} == {8}


def test_an_interrupted_run_is_continued(tmp_path, monkeypatch):
    given = arguments(tmp_path, more="--compare auto fixed:2")
    measured = []
    whole = measure.Bench._measure

    def interrupted(self, *unit):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(unit)
        return whole(self, *unit)

    monkeypatch.setattr(measure.Bench, "_measure", interrupted)
    with pytest.raises(SystemExit, match="the same command continues"):
        main(given)
    before = runs_of(tmp_path)
    assert len(before) == 4
    with (tmp_path / "out" / "records.jsonl").open("a") as file:
        file.write('{"kind": "run", "task": "gs')  # a line that was being written

    monkeypatch.setattr(measure.Bench, "_measure", whole)
    main(given)
    after = runs_of(tmp_path)
    assert after[:4] == before and len(after) == 9
    assert len({(record["variant"], record["group"]) for record in after}) == 9

    monkeypatch.setattr(measure.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    main(given)  # all is there: nothing is loaded or measured
    assert runs_of(tmp_path) == after


def test_more_variants_may_be_added_but_no_other_settings(tmp_path, capsys):
    main(arguments(tmp_path, more="--compare auto", count=2))
    before = runs_of(tmp_path)
    main(arguments(tmp_path, more="--compare fixed:1", count=2))
    assert runs_of(tmp_path)[: len(before)] == before
    assert {record["variant"] for record in runs_of(tmp_path)} == {"standard", "auto", "fixed:1"}
    everything = lines_of(tmp_path)
    for more, said in (
        ("--weights 0.6 0.4", "settings.config.weights was None and is now [0.6, 0.4]"),
        ("--max-new-tokens 9", "settings.max_new_tokens was 8 and is now 9"),
    ):
        with pytest.raises(SystemExit):
            main(arguments(tmp_path, more=f"--compare auto {more}", count=2))
        assert said in capsys.readouterr().err
    file = data_file(tmp_path, "gsm8k", 2)
    given = arguments(tmp_path, more="--compare auto", count=2)
    file.write_text(file.read_text().replace("pens", "cats"))
    with pytest.raises(SystemExit):
        main(given)
    assert "is not the one in" in capsys.readouterr().err
    assert lines_of(tmp_path) == everything


def test_divergence_is_found_and_measured(tmp_path, monkeypatch, capsys):
    def another_ensemble(name, members, config, *more):
        if name == "auto":
            return [Variant("auto", config=replace(config, weights=[0.0, 1.0]))]
        return parse(name, members, config, *more)

    monkeypatch.setattr(planning, "parse", another_ensemble)
    main(arguments(tmp_path, more="--compare auto fixed:1 --batch-sizes 3 --max-new-tokens 32"))
    found = [line for line in lines_of(tmp_path) if line["kind"] == "divergence"]
    assert found and {line["variant"] for line in found} == {"auto"}
    assert f"{3 - len(found)} of 3 identical, gap at most" in (tmp_path / "out" / "table.md").read_text()
    assert "identical (3)" in capsys.readouterr().out  # fixed:1

    texts = {record["variant"]: record["tokens"] for record in runs_of(tmp_path)}
    models = [AutoModelForCausalLM.from_pretrained(FAMILY / name, dtype="float32") for name in ("reader", "solver")]
    data = {"gsm8k": str(tmp_path / "gsm8k.jsonl")}
    plan = Plan(Settings(data_files=data, shots=0, num_prompts=3, batch_sizes=[3], max_new_tokens=32))
    (group,) = plan.groups(plan.conditions[0])
    for line in found:
        position, expected = line["position"], texts["standard"][line["row"]]
        assert expected[:position] == texts["auto"][line["row"]][:position]
        assert expected[position] != texts["auto"][line["row"]][position]
        ids = torch.tensor([[*group.prompts[line["row"]], *expected[:position]]])
        with torch.no_grad():
            r = sum(model(ids).logits[0, -1].softmax(-1) for model in models) / 2
        first, second = r.log().topk(2).values.tolist()
        assert line["gap"] == pytest.approx(first - second, abs=1e-4)


@pytest.mark.parametrize(
    "more, said",
    [
        ("--members reader", "at least two members"),
        ("--members reader ./nowhere", "There is no folder './nowhere'"),
        ("--method contrastive --members reader solver draft", "takes two members"),
        ("--weights 0.2 0.3 0.5", "one entry for each member"),
        ("--contrast -1", "`contrast`"),
        ("--tasks chess", "There is no task 'chess'"),
        ("--compare faster", "'faster' is nothing to compare"),
        ("--compare fixed:1,2,3", "num_assistant_tokens"),
        ("--compare compiled:members", "goes in front of what decodes the ensemble"),
        ("--compare auto static:auto --freeze", "--freeze is about compiled passes"),
        ("--temperatures -1", "--temperatures must be >= 0"),
        ("--num-prompts 0", "--num-prompts must be at least 1"),
        ("--batch-sizes 4", "A batch of 4 needs as many prompts"),
        ("--values 1 2", "--values are those of a --curve"),
        ("--dtype int8", "--dtype must be a floating type"),
        ("--device toaster", "--device toaster"),
        ("--device cuda:99", "torch has no such device here"),
        ("--max-new-tokens 2000", "exceeds the 1024"),
        ("--tasks gsm8k mmlu", "say whose it is"),
        ("--data-file nowhere.jsonl", "There is no file 'nowhere.jsonl'"),
        ("--data-file README.md", "is not JSON"),
        ("--shots 3", "too few for 3 examples"),
    ],
)
def test_bad_input_is_one_error_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.setattr(measure.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "README.md").write_text("# Not rows")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path, more=more))
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert said in errors.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *x: None if name == "matplotlib" else found(name, *x))
    with pytest.raises(SystemExit):
        main(arguments(tmp_path))
    assert "This needs matplotlib: pip install 'hf_spec_ensemble[bench]'" in capsys.readouterr().err


def test_rows_that_lack_a_field(tmp_path, capsys):
    given = arguments(tmp_path)
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "What?"}\n')
    with pytest.raises(SystemExit):
        main(given)
    assert "Line 1 of" in (said := capsys.readouterr().err) and "lacks ['answer']" in said


def test_members_with_different_tokenizers(tmp_path, capsys):
    names = saved((2, 0), tmp_path)
    given = f"--members {' '.join(names)} --dtype float64 --compare members auto loop"
    main(arguments(tmp_path, more=given, count=2))
    made = {(line["variant"], line["group"]): line for line in runs_of(tmp_path)}
    assert {name for name, _ in made} == {"standard", "auto", "member:0", "member:1"}
    task, tokenizers = tasks.TASKS["gsm8k"], family((2, 0))[1]
    models = [AutoModelForCausalLM.from_pretrained(name, dtype="float64") for name in names]
    for group in range(2):
        text = task.continuation(json.loads((tmp_path / "gsm8k.jsonl").read_text().splitlines()[group]))
        inputs = tokenizers[0](text, return_tensors="pt")
        both = dict(assistant_model=models[1], tokenizer=tokenizers[0], assistant_tokenizer=tokenizers[1])
        call = dict(input_ids=inputs["input_ids"], max_new_tokens=8, do_sample=False)
        expected = models[0].generate(**call, **both, ensemble_config=EnsembleConfig())
        for name in ("standard", "auto"):
            assert made[name, group]["tokens"] == [expected[0, inputs["input_ids"].shape[1] :].tolist()]
        alone = tokenizers[1](text, return_tensors="pt")["input_ids"]
        own = models[1].generate(alone, max_new_tokens=8, do_sample=False)[0, alone.shape[1] :].tolist()
        assert made["member:1", group]["tokens"] == [own]
    assert "different tokenizers" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, more=f"--members {' '.join(names)} --compare static:auto"))
    assert "neither static caches nor refilled rows" in capsys.readouterr().err
