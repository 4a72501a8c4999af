"""The benchmark in several processes: each measures its share, nothing is lost, all is merged once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_bench import arguments, lines_of, runs_of

from hf_spec_ensemble.bench import Records, measure, processes
from hf_spec_ensemble.bench.__main__ import main
from hf_spec_ensemble.bench.processes import Heartbeat, Process, Watch, launch_notes, part_of, parts_of
from hf_spec_ensemble.bench.records import key_of


HEADER = {"settings": {"dtype": "float32"}}
DIES = """
whole, made = measure.Bench._measure, []
def measured(self, *unit):
    if len(made) == 3:
        with self.records.file.open("a") as file:
            file.write('{"kind": "run", "task": "gs')  # a line that was being written
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(unit)
    return whole(self, *unit)
measure.Bench._measure = measured
"""


def launcher(rank, world):
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}


def start(given, rank, world=2, first=""):
    """A process of the benchmark, as a launcher starts it."""
    imports = "import os, signal\nfrom hf_spec_ensemble.bench import __main__, measure"
    environment = os.environ | launcher(rank, world) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"{imports}\n{first}\n__main__.main({given!r})"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def as_process(monkeypatch):
    """Runs the benchmark in this process, as one of several."""

    def run(given, rank, world):
        for name, value in launcher(rank, world).items():
            monkeypatch.setenv(name, value)
        main(given)

    return run


def keys_of(folder):
    return [key_of(record) for record in lines_of(folder)[1:]]


def parts_in(folder):
    return [file.name for file in parts_of(folder / "out" / "records.jsonl")]


def written(file):
    """The whole lines of a file of records, without the header."""
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")]


# Who they are


def test_launchers_tell_who_a_process_is():
    assert Process.of(launcher(1, 2)) == Process(1, 2, 1)
    assert Process.of({"PATH": "/bin"}) == Process(0, 1, 0)
    assert Process().leads and not Process(1, 2).leads
    for rank, world in ((2, 2), (1, 1), ("one", 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"RANK={rank}, WORLD_SIZE={world}"):
            Process.of(launcher(rank, world))


def test_accelerate_starts_one_process_on_cpus_and_does_not_say_so():
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    assert "add --multi_gpu" in launch_notes(launched)[0]
    assert launch_notes(launched | launcher(0, 2)) == launch_notes({"ACCELERATE_MIXED_PRECISION": "no"}) == []


def test_each_takes_a_gpu_of_its_own():
    assert Process(3, 4, 1).device("cuda") == "cuda:1"
    assert Process(3, 4, 1).device("cuda:0") == "cuda:0" and Process(3, 4, 1).device("cpu") == "cpu"
    assert Process().device("cuda") == "cuda"


def test_a_process_lives_as_long_as_it_touches_its_part(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(processes, "BEAT", 0.01)
    file = part_of(tmp_path / "records.jsonl", 1)
    file.write_text("")
    os.utime(file, (0, 0))  # of an earlier run
    watch = Watch(tmp_path / "records.jsonl", range(1, 3))
    now[0] = processes.SILENCE + 1
    assert watch.is_lost(2), "it never began"
    with Heartbeat(file):
        while not file.stat().st_mtime:
            pass
        assert not watch.is_lost(1)
    watch.is_lost(1)
    now[0] += processes.SILENCE - 1
    assert not watch.is_lost(1)
    now[0] += 2
    assert watch.is_lost(1)
    file.unlink()
    with Heartbeat(file):
        pass
    assert not file.exists(), "a part that was merged does not come back"


# Their files


def test_parts_are_read_as_far_as_they_are_written_and_left_as_they_are(tmp_path):
    file = tmp_path / "records.jsonl"
    worker = Records(part_of(file, 1), HEADER)
    worker.add({"kind": "run", "group": 1, "seconds": 1.0})
    with worker.file.open("a") as lines:
        lines.write('{"kind": "ru')
    before = worker.file.read_bytes()
    records = Records(file, HEADER)
    records.take_in(parts_of(file))
    assert records[{"kind": "run", "group": 1}]["seconds"] == 1 and worker.file.read_bytes() == before
    assert not file.exists()
    with pytest.raises(ValueError, match=r"records\.rank1\.jsonl holds .* settings.dtype was 'float32' and is now 'b'"):
        Records(file, {"settings": {"dtype": "b"}}).take_in(parts_of(file))
    worker = Records(part_of(file, 1), HEADER)  # the process itself goes on after its last whole line
    worker.add({"kind": "run", "group": 3})
    assert [record["group"] for record in written(worker.file)] == [1, 3]


def test_merging_is_all_or_nothing(tmp_path, monkeypatch):
    file = tmp_path / "records.jsonl"
    records, worker = Records(file, HEADER), Records(part_of(file, 1), HEADER)
    records.add({"kind": "run", "group": 0, "seconds": 1.0})
    for group in (0, 1):
        worker.add({"kind": "run", "group": group, "seconds": 2.0})
    before = file.read_bytes()
    records.take_in(parts_of(file))

    def fails(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="disk full"):
            records.merge(parts_of(file))
    assert file.read_bytes() == before and len(written(worker.file)) == 2

    records.merge(parts_of(file))
    assert [(record["group"], record["seconds"]) for record in written(file)] == [(0, 1), (1, 2)]
    assert list(tmp_path.iterdir()) == [file]
    worker.add({"kind": "run", "group": 3})  # it was taken for lost and is not: its part is a file of records again
    records.take_in(parts_of(file))
    assert {"kind": "run", "group": 3} in records


# Their work


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path, monkeypatch, capsys):
    (tmp_path / "one").mkdir()
    main(arguments(tmp_path / "one", more="--compare auto --temperatures 0 1", count=4))
    capsys.readouterr()
    (tmp_path / "two").mkdir()
    given = arguments(tmp_path / "two", more="--compare auto --temperatures 0 1", count=4)
    both = [start(given, rank) for rank in (0, 1)]
    (out, errors), (silence, progress) = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], errors + progress

    assert sorted(keys_of(tmp_path / "two")) == sorted(keys_of(tmp_path / "one"))
    assert len(set(keys_of(tmp_path / "two"))) == len(keys_of(tmp_path / "two")) == 16
    runs = runs_of(tmp_path / "two")
    texts = [{key_of(record): record["tokens"] for record in made} for made in (runs, runs_of(tmp_path / "one"))]
    assert texts[0] == texts[1]
    shares = [record["group"] % 2 for record in runs]
    assert shares == [0] * 8 + [1] * 8, "one share after the other"
    assert [record["variant"] for record in runs[:4]] == ["standard", "auto", "auto", "standard"], "the order rotates"
    assert all(record["processes"] == 2 for record in runs) and parts_in(tmp_path / "two") == []

    table = (tmp_path / "two" / "out" / "table.md").read_text()
    assert out.count("# Speculative ensemble: benchmark") == 1 and table in out and silence == ""
    assert "Measured by up to 2 processes at once" in table and "was lost" not in table
    assert "Measured by" not in (tmp_path / "one" / "out" / "table.md").read_text()
    assert "process 0: gsm8k" in errors and "process 1: gsm8k" in progress

    before = lines_of(tmp_path / "two")
    monkeypatch.setattr(measure.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for rank in (1, 0):  # all is there: nothing is loaded or measured, no part is made
        for name, value in launcher(rank, 2).items():
            monkeypatch.setenv(name, value)
        main(given)
        assert parts_in(tmp_path / "two") == []
    assert lines_of(tmp_path / "two") == before


@pytest.mark.slow
def test_what_a_killed_process_wrote_is_kept_and_the_rest_made_by_the_first(tmp_path, monkeypatch, capsys, as_process):
    given = arguments(tmp_path, more="--compare auto fixed:1", count=4)
    worker = start(given, 1, first=DIES)
    worker.communicate(timeout=300)
    assert worker.returncode == -signal.SIGKILL
    kept = written(tmp_path / "out" / "records.rank1.jsonl")
    assert len(kept) == 3 and not (tmp_path / "out" / "records.jsonl").exists()

    monkeypatch.setattr(processes, "SILENCE", 0.01)
    as_process(given, 0, 2)
    assert len(keys_of(tmp_path)) == len(set(keys_of(tmp_path))) == 4 * 3 and parts_in(tmp_path) == []
    assert all(record in lines_of(tmp_path) for record in kept)
    assert "Process 1 was lost: process 0 made 3 of its measurements." in capsys.readouterr().out


def test_the_first_waits_for_the_others(tmp_path, monkeypatch, capsys, as_process):
    given = arguments(tmp_path, more="--compare auto", count=2)
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            as_process(given, 1, 2)

    monkeypatch.setattr(measure, "time", SimpleNamespace(sleep=sleep, perf_counter=time.perf_counter))
    as_process(given, 0, 2)
    assert len(waited) == 2 and "was lost" not in capsys.readouterr().out
    assert [record["group"] for record in runs_of(tmp_path)] == [0, 0, 1, 1]


def test_a_process_that_has_finished_is_not_lost(tmp_path, monkeypatch, capsys, as_process):
    given = arguments(tmp_path, more="--compare auto", count=2)
    as_process(given, 1, 2)
    monkeypatch.setattr(processes, "SILENCE", 0.01)
    as_process(given, 0, 2)
    assert len(keys_of(tmp_path)) == 4 and "was lost" not in capsys.readouterr().out


@pytest.mark.slow
def test_another_number_of_processes_goes_on(tmp_path, monkeypatch, capsys, as_process):
    given = arguments(tmp_path, more="--compare auto", count=5)
    for rank in (1, 2):
        as_process(given, rank, 3)  # the first of them never comes
    assert parts_in(tmp_path) == ["records.rank1.jsonl", "records.rank2.jsonl"]
    kept = [record for name in parts_in(tmp_path) for record in written(tmp_path / "out" / name)]
    assert sorted({record["group"] for record in kept}) == [1, 2, 4]
    assert capsys.readouterr().out == ""

    made = []
    whole = measure.Bench._measure
    monkeypatch.setattr(measure.Bench, "_measure", lambda self, *unit: made.append(unit) or whole(self, *unit))
    as_process(given, 1, 2)  # groups 1 and 3
    assert [unit[2].index for unit in made] == [3, 3]
    as_process(given, 0, 1)
    assert {unit[2].index for unit in made} == {0, 3} and len(made) == 4
    assert len(set(keys_of(tmp_path))) == len(keys_of(tmp_path)) == 10 and parts_in(tmp_path) == []
    assert all(record in lines_of(tmp_path) for record in kept)


@pytest.mark.slow
def test_the_gaps_of_a_lost_process_are_measured_too(tmp_path, monkeypatch, as_process):
    given = arguments(tmp_path, more="--compare auto", count=2)
    whole = measure.Bench._measure

    def another(self, condition, variant, *rest):
        """Texts of one variant that are not the standard ensemble's."""
        record = whole(self, condition, variant, *rest)
        return record if variant.name == "standard" else record | {"tokens": [[0, *record["tokens"][0]]]}

    monkeypatch.setattr(measure.Bench, "_measure", another)
    with monkeypatch.context() as patch:
        patch.setattr(measure.Bench, "_compare", lambda *_: None)  # it is lost before
        as_process(given, 1, 2)
    monkeypatch.setattr(processes, "SILENCE", 0.01)
    as_process(given, 0, 2)
    assert [line["group"] for line in lines_of(tmp_path) if line["kind"] == "divergence"] == [0, 1]


def test_a_process_that_is_none_is_one_error(tmp_path, monkeypatch, capsys):
    for name, value in launcher(2, 2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(arguments(tmp_path))
    assert "RANK must be below WORLD_SIZE" in capsys.readouterr().err
    assert not Path(tmp_path / "out").exists()
