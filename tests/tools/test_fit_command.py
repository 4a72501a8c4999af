"""`hf-spec-ensemble fit`: a folder that is loaded, and the report."""

import json

import pytest

import hf_spec_ensemble as se
from hf_spec_ensemble.tools import cli


QUESTIONS = [
    {"question": f"Tom has {i} pens and buys {i} more.", "answer": f"He has {i} + {i} = {2 * i} pens."}
    for i in range(20)
]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in QUESTIONS) + "\n\n")
    return file


MEMBERS = ["--members", "reader", "solver", "--dtype", "float32", "--columns", "question", "answer"]


def test_the_command_writes_a_folder_that_is_loaded(rows, tmp_path, capsys):
    folder, picture = tmp_path / "both", tmp_path / "both.png"
    cli.main(["fit", *MEMBERS, "--data-file", str(rows), "--out", str(folder), "--plot", str(picture)])
    out = capsys.readouterr().out
    ensemble = se.load_ensemble(folder)
    models = [ensemble.model, *ensemble.assistant_models]
    chat = bool(ensemble.tokenizer.chat_template)
    direct = se.fit(models, QUESTIONS, ensemble.tokenizer, columns=("question", "answer"), chat_template=chat)
    assert ensemble.config == direct.config and str(direct) in out and picture.exists()
    inputs = ensemble.tokenizer("Tom has 3 pens.", return_tensors="pt")
    assert ensemble.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]


def test_the_command_fits_several_files(rows, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(rows.read_text().splitlines()[:12]))
    files, folder = ["--data-file", str(rows), str(other)], tmp_path / "both"
    cli.main(["fit", *MEMBERS, *files, "--held-out", str(rows), "--method", "product", "--out", str(folder)])
    assert "best member" in capsys.readouterr().out
    weights = [se.EnsembleConfig.from_pretrained(folder / name).weights for name in ("rows", "other")]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data-file", "nowhere.jsonl"], "no file 'nowhere.jsonl'"),
        (["--data-file", "ROWS", "--columns", "question", "reply"], "Text 0 has no 'reply'"),
        (["--data-file", "ROWS", "--plausibility", "some"], "--plausibility must be"),
        (["--data-file", "ROWS", "--method", "product", "--plot", "x.png"], "--plot shows"),
        (["--data-file", "ROWS", "ROWS"], "the same name"),
        (["--data-file", "ROWS", "--plot", "x.xyz"], "must end in one of"),
        (["--data-file", "ROWS", "--plot", "nowhere/x.png"], "There is no folder"),
        (["--data-file", "ROWS", "--members", *["reader"] * 4, "--plot", "x.png"], "of two or three members"),
        (["--data-file", "ROWS", "--out", "ROWS"], "--out is to be a folder"),
        (["--data-file", "ROWS", "--memory", "nan"], "--memory must be"),
        (["--data-file", "NUMBERS"], "Text 0"),
    ],
)
def test_errors_of_the_command_are_one_line(rows, tmp_path, capsys, words, said):
    files = {"ROWS": rows, "NUMBERS": tmp_path / "numbers.jsonl"}
    files["NUMBERS"].write_text(json.dumps({"question": 1, "answer": 2}))
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *MEMBERS, *(str(files.get(word, word)) for word in words)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.strip().count("\n") == 0
