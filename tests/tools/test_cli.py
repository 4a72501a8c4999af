"""The console script `hf-spec-ensemble`, and what it prints."""

import io
import json
from importlib.metadata import entry_points

import pytest

import hf_spec_ensemble as se
from hf_spec_ensemble.demo import FAMILY
from hf_spec_ensemble.tools import cli
from hf_spec_ensemble.tools.arguments import encode


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
    assert "24 tokens" in err and "reader: " in err and "accepted" in err
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
        (["generate", "Hello", *MEMBERS, "--weights", "1", "2", "3"], "one entry for each member"),
        (["generate", "a", "b", *MEMBERS, "--trace", "x.html"], "--trace shows one text, but there are 2 prompts"),
        (["generate", "a", "b", *MEMBERS, "--show"], "--show shows one text, but there are 2 prompts"),
        (["generate", "Hello", "--members", "reader", "./nowhere"], "a folder or the id of a repository"),
    ],
)
@pytest.mark.filterwarnings("ignore:`weights` sum")
def test_errors_are_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


def test_other_commands_go_to_their_programs(capsys, monkeypatch):
    for command, module in (("bench", "bench.__main__"), ("eval", "tools.harness")):
        given = []
        monkeypatch.setattr(f"hf_spec_ensemble.{module}.main", given.append)
        cli.main([command, "--members", "x"])
        assert given == [["--members", "x"]]


SCRIPT = list(entry_points(group="console_scripts", name="hf-spec-ensemble"))


@pytest.mark.skipif(not SCRIPT, reason="not installed: pip install -e .")
def test_the_script_is_installed(monkeypatch):
    given = []
    monkeypatch.setattr(cli, "main", given.append)
    monkeypatch.setattr("sys.argv", ["hf-spec-ensemble", "generate", "Hello"])
    assert SCRIPT[0].value == "hf_spec_ensemble_script:main", "installed from an older version: pip install -e ."
    SCRIPT[0].load()()
    assert given == [["generate", "Hello"]]
