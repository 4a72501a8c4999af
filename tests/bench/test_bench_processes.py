"""The benchmark in several processes: each measures its share, a folder of parts is read as one, nothing is lost."""

import json
import os
import subprocess
import sys

import pytest
from test_bench import arguments

from hf_spec_ensemble.bench import Records, measure, plots
from hf_spec_ensemble.bench.__main__ import main
from hf_spec_ensemble.tools.processes import Process, launch_notes


def launcher(rank, world):
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}


@pytest.fixture
def run_as(monkeypatch, capsys):
    """Runs the benchmark in this process as one of several, and returns what it prints."""

    def run(given, rank=0, world=1):
        for name, value in launcher(rank, world).items():
            monkeypatch.setenv(name, value)
        main(given)
        return capsys.readouterr().out

    return run


def lines_in(part):
    return [json.loads(line) for line in part.read_text().splitlines()]


def runs_in(part):
    """And where their texts part; without what passes cost, which every process measures for itself."""
    return [line for line in lines_in(part) if line["kind"] in ("run", "divergence")]


def write(part, lines, more=""):
    part.write_text("".join(json.dumps(line) + "\n" for line in lines) + more)


def test_launchers_tell_who_a_process_is(tmp_path, run_as, capsys):
    assert Process.of(launcher(1, 2)) == Process(1, 2, 1)
    assert Process.of({"PATH": "/bin"}) == Process(0, 1, 0)
    assert Process().leads and not Process(1, 2).leads
    for rank, world in ((2, 2), (1, 1), ("one", 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"RANK={rank}, WORLD_SIZE={world}"):
            Process.of(launcher(rank, world))
    with pytest.raises(SystemExit):
        run_as(arguments(tmp_path), 2, 2)
    assert "RANK must be below WORLD_SIZE" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_accelerate_starts_one_process_on_cpus_and_does_not_say_so():
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    assert "add --multi_gpu" in launch_notes(launched)[0]
    assert launch_notes(launched | launcher(0, 2)) == launch_notes({"ACCELERATE_MIXED_PRECISION": "no"}) == []


def test_each_takes_a_gpu_of_its_own():
    assert Process(3, 4, 1).device("cuda") == "cuda:1"
    assert Process(3, 4, 1).device("cuda:0") == "cuda:0" and Process(3, 4, 1).device("cpu") == "cpu"
    assert Process().device("cuda") == "cuda"


def test_parts_are_read_together_as_far_as_they_are_written(tmp_path):
    header, part = {"settings": {"dtype": "float32"}}, tmp_path / "records.rank1.jsonl"
    one, two = Records(tmp_path, header), Records(tmp_path, header, rank=1)
    two.add({"kind": "run", "group": 1, "seconds": 2.0})
    one.add({"kind": "run", "group": 0, "seconds": 1.0})
    one.add({"kind": "run", "group": 1, "seconds": 3.0})
    with part.open("a") as lines:
        lines.write('{"kind": "ru')  # the process was lost here
    two.read()
    for records in (two, Records(tmp_path, header, rank=2)):
        assert sorted(record["group"] for record in records.of_kind("run")) == [0, 1]
        assert records[{"kind": "run", "group": 1}]["seconds"] == 3, "all take the same of two"
    assert part.read_text().endswith('"ru'), "who reads leaves parts as they are"
    Records(tmp_path, header, rank=1).add({"kind": "run", "group": 3})
    assert [line.get("group") for line in lines_in(part)] == [None, 1, 3]
    with pytest.raises(ValueError, match=r"records\.jsonl holds .* settings.dtype was 'float32' and is now 'b'"):
        Records(tmp_path, {"settings": {"dtype": "b"}})


@pytest.mark.slow
def test_shares_make_a_whole_and_the_last_process_reports(tmp_path, run_as, monkeypatch):
    given, out = arguments(tmp_path, more="--compare fixed:1 auto", count=4), tmp_path / "out"
    said = run_as(given, 1, 2)
    assert "6 measurements of other processes are not there yet" in said and "same command again" in said
    assert not (out / "table.md").exists()
    said = run_as(given, 0, 2)
    table = (out / "table.md").read_text()
    assert table in said and "Measured by up to 2 processes at once" in table

    parts = {name: lines_in(out / name) for name in ("records.jsonl", "records.rank1.jsonl")}
    shares = [[(line["group"], line["variant"]) for line in runs_in(out / name)] for name in parts]
    variants = ("standard", "fixed:1", "auto")
    for rank, share in enumerate(shares):  # all variants of a prompt, each once
        assert sorted(share) == sorted((group, name) for group in (rank, rank + 2) for name in variants)

    # All is there: nothing is loaded or measured, with any number of processes, and one reports
    monkeypatch.setattr(measure.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert run_as(given, 1, 2) == "" and table in run_as(given, 0, 3)
    header, *records = parts["records.jsonl"] + parts["records.rank1.jsonl"][1:]
    (out / "records.jsonl").unlink()
    write(out / "records.rank1.jsonl", [header, *reversed(records)])
    assert table in run_as(given), "the same in whatever files and order the records are"

    def fails(*_):
        raise OSError("disk full")

    before = sorted(out.iterdir())
    monkeypatch.setattr(plots, "plot", fails)
    (out / "table.md").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        run_as(given)
    assert (out / "table.md").read_text() == "old" and sorted(out.iterdir()) == before, "whole or not at all"


@pytest.mark.slow
def test_what_lost_processes_left_is_made_by_the_same_command(tmp_path, run_as):
    given, out = arguments(tmp_path, more="--compare auto", count=3), tmp_path / "out"
    for rank in (1, 2):  # the first of three never comes
        run_as(given, rank, 3)
    one, two = out / "records.rank1.jsonl", out / "records.rank2.jsonl"
    cut = lines_in(one)[:4]  # the header, what two models' passes cost, and a run
    write(one, cut, more='{"kind": "run", "task": "gs')  # it was killed on its second measurement
    changed = lines_in(two)
    own = next(line for line in changed if line.get("variant") == "auto")
    own["tokens"][0][2] += 1  # a text that leaves the standard ensemble's, so that a gap is missing
    write(two, changed)

    assert "| T | method" in run_as(given)
    assert one.read_text().startswith("".join(json.dumps(line) + "\n" for line in cut)) and lines_in(two) == changed
    made = sorted((line["kind"], line["group"]) for line in runs_in(out / "records.jsonl"))
    assert made == [("divergence", 2), ("run", 0), ("run", 0), ("run", 1)]


@pytest.mark.slow
def test_a_launcher_starts_them(tmp_path):
    given = arguments(tmp_path, more="--compare auto", count=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*command, "-m", "hf_spec_ensemble.bench", *given], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "table.md").is_file() and "Written: " in ran.stdout
    parts = [runs_in(tmp_path / "out" / name) for name in ("records.jsonl", "records.rank1.jsonl")]
    assert [[line["group"] for line in part] for part in parts] == [[0, 0], [1, 1]]
