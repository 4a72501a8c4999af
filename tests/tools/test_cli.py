"""The console script `hf-spec-ensemble`, and what it prints."""

import io
import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from mixed import TEXTS, saved

import hf_spec_ensemble as se
from hf_spec_ensemble.bench.__main__ import parser as bench_parser
from hf_spec_ensemble.demo import FAMILY
from hf_spec_ensemble.tools import cli, options
from hf_spec_ensemble.tools.arguments import config_of, encode


QUESTION = "Tom has 3 boxes with 12 pencils each. How many pencils has he?"
MEMBERS = ["--members", "reader", "solver", "--dtype", "float32", "--max-new-tokens", "24"]


def text_of(question: str, **config) -> str:
    config = se.EnsembleConfig(speculative=False, **config)
    ensemble = se.hub.Ensemble.load([FAMILY / "reader", FAMILY / "solver"], config, dtype="float32")
    inputs = encode(ensemble.tokenizer, question)
    ids = ensemble.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return ensemble.tokenizer.decode(ids, skip_special_tokens=True)


def test_it_prints_the_text_of_the_ensemble(capsys, tmp_path):
    page = tmp_path / "trace.html"
    cli.main(["generate", QUESTION, *MEMBERS, "--weights", "0.3", "0.7", "--stats", "--trace", str(page)])
    out, err = capsys.readouterr()
    assert out.strip() == text_of(QUESTION, weights=[0.3, 0.7]).strip()
    assert "24 tokens" in err and "reader: " in err
    assert page.read_text().startswith("<!doctype html>") and "proposed by solver" in page.read_text()


def test_the_text_is_shown_in_colours_in_a_terminal(capsys):
    """Here it is no terminal: `tests/trace/test_stream.py` looks at colours."""
    cli.main(["generate", QUESTION, *MEMBERS, "--show"])
    assert capsys.readouterr().out.strip() == text_of(QUESTION).strip()


def test_several_prompts_give_json_lines(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n\nAnn has 2 pens.\n"))
    cli.main(["generate", "--prompts", "-", *MEMBERS, "--drafter", "prompt_lookup"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert lines == [{"prompt": each, "text": text_of(each)} for each in (QUESTION, "Ann has 2 pens.")]


def results(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_texts_are_appended_to_a_file_and_a_second_run_goes_on(capsys, tmp_path):
    asked = [QUESTION, "Ann has 2 pens.", QUESTION, "A book costs 4 €.", "Hello"]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": each, "id": 7}) + "\n\n" for each in asked))
    words = ["generate", "--prompts", str(prompts), *MEMBERS, "--do-sample", "--seed", "3", "--out", str(out)]
    cli.main([*words, "--batch-size", "3"])
    whole = results(out)
    texts = {each["number"]: each["text"] for each in whole}
    assert list(whole[0]) == ["number", "prompt", "text"] and sorted(texts) == [0, 1, 2, 3, 4]
    assert all(asked[each["number"]] == each["prompt"] for each in whole)
    assert texts[0] != texts[2], "samples of the same prompt in other places are the same"

    lines = dict(zip((each["number"] for each in whole), out.read_bytes().splitlines(keepends=True)))
    before = lines[3] + lines[0]
    out.write_bytes(before + lines[1][:-9])  # as of a run that was stopped while it wrote
    cli.main(words)
    assert "2 of 5 prompts are in" in capsys.readouterr().err and out.read_bytes().startswith(before)
    assert {each["number"]: each["text"] for each in results(out)} == texts and len(results(out)) == 5
    cli.main([*words, "--members", "no/model", "is/loaded"])  # nothing is left to do
    assert "5 of 5" in capsys.readouterr().err


def test_what_cannot_share_a_batch_is_decoded_one_by_one(capsys, tmp_path):
    out = tmp_path / "texts.jsonl"
    more = ["--coupling", "maximal", "--do-sample", "--stats"]
    cli.main(["generate", QUESTION, "Hello", *MEMBERS, *more, "--out", str(out)])
    assert "one at a time: with coupling maximal, samples depend" in capsys.readouterr().err
    first, second = results(out)
    assert (first["number"], second["number"]) == (0, 1) and "seconds" in first


def test_members_of_different_families_share_a_batch(capsys, tmp_path):
    names, out = saved((2, 0), tmp_path), tmp_path / "texts.jsonl"
    asked = [*TEXTS, " the answer", "Ann"]
    words = ["--members", *names, "--dtype", "float64", "--max-new-tokens", "8", "--batch-size", "2"]
    cli.main(["generate", *asked, *words, "--out", str(out)])
    assert "one at a time" not in capsys.readouterr().err
    ensemble, texts = se.hub.Ensemble.load(names, se.EnsembleConfig(), dtype="float64"), {}
    for number, prompt in enumerate(asked):
        inputs = ensemble.encode(prompt)
        ids = ensemble.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts[number] = ensemble.tokenizer.decode(ids, skip_special_tokens=True)
    assert {each["number"]: each["text"] for each in results(out)} == texts


def test_several_processes_have_a_share_each(capsys, tmp_path, monkeypatch):
    asked = [QUESTION, "Ann has 2 pens.", "Hello", "A book costs 4 dollars.", QUESTION]
    words = ["generate", *asked, *MEMBERS, "--do-sample", "--stats", "--out"]
    cli.main([*words, str(tmp_path / "one.jsonl")])
    said = capsys.readouterr().err
    assert "tokens, " in said and "reader: " in said and "of the batch" not in said
    for rank in (1, 0):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        cli.main([*words, str(tmp_path / "two.jsonl")])
    shares = [results(tmp_path / name) for name in ("two.jsonl", "two.rank1.jsonl")]
    assert [sorted(each["number"] for each in share) for share in shares] == [[0, 2, 4], [1, 3]]
    for share in shares:
        assert all(each in results(tmp_path / "one.jsonl") for each in share)
    with pytest.raises(SystemExit):
        cli.main(words[:-1])
    assert "several processes need --out" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_ensemble", lambda args: pytest.fail("models are loaded"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    cli.main([*words, str(tmp_path / "two.jsonl")])  # nothing is left for one either
    assert "5 of 5 prompts are in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "prompts, out, message",
    [
        ('{"prompt": "a"}\n{"prompt": 3}\n', "", "--prompts: line 2 of FILE must be an object with a prompt"),
        ('{"prompt": "a"}\nplain\n', "", "--prompts: line 2"),
        ('{"text": "a"}\n', "", "--prompts: line 1"),
        ("", "", "there is nothing to ask"),
        (
            '{"prompt": "a"}\n',
            '{"number": 0, "prompt": "b", "text": ""}\n',
            "results of other prompts: number 0 is 'b'",
        ),
        ('{"prompt": "a"}\n', '{"number": 1, "prompt": "a", "text": ""}\n', "results of other prompts: number 1"),
        ('{"prompt": "a"}\n', "my notes\n", "the last line of OUT is no result"),
        ('{"prompt": "a"}\n', "my notes\n\n", "line 1 of OUT is no result"),
        ('{"prompt": "a"}\n', '{"prompt": "a"}\n', "line 1 of OUT is no result"),
    ],
)
def test_files_are_read_before_models(capsys, tmp_path, monkeypatch, prompts, out, message):
    monkeypatch.setattr(cli, "_ensemble", lambda args: pytest.fail("models are loaded"))
    files = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    for file, text in zip(files, (prompts, out)):
        file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--prompts", str(files[0]), *MEMBERS, "--out", str(files[1])])
    err = capsys.readouterr().err.replace(str(files[0]), "FILE").replace(str(files[1]), "OUT")
    assert stop.value.code == 2 and message in err and err.count("\n") == 1 and files[1].read_text() == out


def test_a_card_is_written_with_its_folder_and_anew(capsys, tmp_path):
    folder = tmp_path / "both"
    with pytest.raises(SystemExit):
        cli.main(["card", str(folder)])
    assert "--members" in capsys.readouterr().err
    cli.main(["card", str(folder), "--members", "reader", "solver", "--weights", "0.6", "0.4", "--drafter", "draft"])
    assert se.EnsembleConfig.from_pretrained(folder).weights == [0.6, 0.4]
    cli.main(["card", str(folder), "--repo-id", "me/both", "--speedup", "1.4x on sums", "--license", "mit"])
    card = (folder / "README.md").read_text()
    assert "1.4x on sums" in card and 'custom_generate="me/both"' in card and "license: mit" in card
    assert "0.6 * softmax(l_1)" in card and "draft" in card
    capsys.readouterr()
    cli.main(["generate", "Hello", "--ensemble", str(folder), "--max-new-tokens", "4"])
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "words, message",
    [
        (["generate", *MEMBERS], "nothing to ask"),
        (["generate", "Hello"], "say which ensemble"),
        (["generate", "Hello", *MEMBERS, "--temperature", "0.5"], "--temperature needs --do-sample"),
        (["generate", "Hello", *MEMBERS, "--weights", "0.5"], "--weights has 1 number, but --members names 2 models"),
        (
            ["generate", "Hello", "--members", "reader"],
            "--members names one model, 'reader', but an ensemble needs two",
        ),
        (["generate", "Hello", *MEMBERS, "--drafter", "prompt-lookup"], "write prompt_lookup"),
        (["generate", "Hello", *MEMBERS, "--trace", "/no/such/dir"], "--trace: no such folder: '/no/such'"),
        (["generate", "Hello", *MEMBERS, "--trace", "/"], "--trace is a file to be written, but '/' is a folder"),
        (["generate", "Hello", *MEMBERS, "--out", "/no/such/file"], "--out: no such folder: '/no/such'"),
        (["generate", "Hello", *MEMBERS, "--out", "/"], "--out is a file to be written, but '/' is a folder"),
        (["generate", "Hello", *MEMBERS, "--out", "x", "--show"], "--show is of a text that is printed"),
        (["generate", "Hello", *MEMBERS, "--batch-size", "0"], "--batch-size must be 1 or more, but is 0"),
        (["generate", "--prompts", "/no/such/file", *MEMBERS], "--prompts: no such file"),
        (["generate", " ", *MEMBERS], "a prompt is empty"),
        (["generate", "Hello", "--ensemble", "a/b", "--weights", "1", "2"], "--weights is what a saved ensemble says"),
        (["generate", "Hello", "--ensemble", "a/b", "--combine-on", "logits"], "--combine-on is what a saved"),
        (["card", "FOLDER", "--dtype", "float32"], "--dtype is what a saved ensemble says itself: leave it out"),
        (["generate", "Hello", "--ensemble", "./nowhere"], "--ensemble: no such folder: './nowhere'"),
        (["card", "FOLDER", "--members", "a/b", "c/d", "e/f", "--method", "contrastive"], "takes two models, but"),
        (["fit", "--members", "reader", "--data-file", "x", "--columns", "y"], "fit: --members names one model"),
        (["bench", "--members", "reader", "solver", "--weights", "1"], "bench: --weights has 1 number"),
        (["eval", "--model_args", "members=reader"], "eval: members names one model, 'reader'"),
        (["eval", "--model_args", "members=reader+solver,weights=1+2+3"], "eval: weights has 3 numbers"),
        (["generate", "a", "b", *MEMBERS, "--trace", "x.html"], "--trace shows one text, but there are 2 prompts"),
        (["generate", "a", "b", *MEMBERS, "--show"], "--show shows one text, but there are 2 prompts"),
        (["generate", "Hello", "--members", "reader", "./nowhere"], "--members: no such folder: './nowhere'"),
    ],
)
def test_errors_are_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


def test_other_commands_go_to_their_programs(capsys, monkeypatch):
    for command, module in (("bench", "bench.__main__"), ("eval", "tools.harness")):
        given = []
        monkeypatch.setattr(f"hf_spec_ensemble.{module}.main", given.append)
        cli.main([command, "--members", "x", "y"])
        cli.main([command, "--members", "x", "--curve", "members"])  # the same one several times
        assert given == [["--members", "x", "y"], ["--members", "x", "--curve", "members"]]


RUN = """
import sys
import hf_spec_ensemble_script
try:
    hf_spec_ensemble_script.main()
finally:
    print([name for name in sys.modules if name.split(".")[0] in ("torch", "transformers", "hf_spec_ensemble")])
"""


@pytest.mark.parametrize(
    "words, code",
    [(["generate", "Hello", "--members", "reader"], 2), (["generate", "--nothing"], 2), (["fit", "--help"], 0)],
)
def test_the_script_says_it_before_it_imports_anything(words, code):
    made = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, timeout=60)
    assert made.returncode == code and "Traceback" not in made.stderr
    assert made.stdout.endswith("[]\n"), "it imports what takes seconds"


def test_every_option_has_a_help_text():
    made = [options.fit_parser(), bench_parser()]
    made += options.parser()._subparsers._group_actions[0].choices.values()
    for parser in made:
        for action in parser._actions:
            assert action.help, f"{parser.prog}: {action.option_strings or action.dest}"


def test_options_that_are_not_given_are_the_defaults_of_the_config():
    args = options.parse(["generate", "Hello", "--members", "reader", "solver"])
    assert config_of(vars(args)) == se.EnsembleConfig()


SCRIPT = list(entry_points(group="console_scripts", name="hf-spec-ensemble"))


@pytest.mark.skipif(not SCRIPT, reason="not installed: pip install -e .")
def test_the_script_is_installed(monkeypatch):
    given = []
    monkeypatch.setattr(cli, "main", given.append)
    monkeypatch.setattr("sys.argv", ["hf-spec-ensemble", "generate", "Hello"])
    assert SCRIPT[0].value == "hf_spec_ensemble_script:main", "installed from an older version: pip install -e ."
    SCRIPT[0].load()()
    assert given == [["generate", "Hello"]]
