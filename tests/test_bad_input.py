"""Files, names and prompts that are wrong: one message that names them, before anything else happens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import members, prompts
from test_encoder_decoder import members as encoder_decoders
from transformers import DynamicCache

import hf_spec_ensemble as se
from hf_spec_ensemble.bench import Records
from hf_spec_ensemble.bench.__main__ import main as bench
from hf_spec_ensemble.demo import FAMILY
from hf_spec_ensemble.hub import Ensemble
from hf_spec_ensemble.tools import cli


MEMBERS = [{"name": str(FAMILY / "reader")}, {"name": str(FAMILY / "solver")}]
BAD_FILES = {
    "a list": "[]",
    "a number": "5",
    "null": "null",
    "text": '"members"',
    "nothing": "",
    "not JSON": "{",
    "not text": b"\xff\xfe{}",
    "nested": "[" * 100_000,
    "nested weights": '{"weights": [[0.5], [0.5]], "members": []}',
    "deep weights": '{"weights": ' + "[" * 900 + "]" * 900 + "}",
    "infinite weights": '{"weights": [1e400, 1], "members": []}',
    "huge weights": '{"weights": [1' + "0" * 400 + ", 1]}",
    "too long a number": '{"weights": [1' + "0" * 5000 + ", 1]}",
    "weights whose sum overflows": '{"weights": [1e308, 1e308]}',
    "a number for weights": '{"weights": 5}',
    "an object for weights": '{"weights": {"a": 1}}',
    "a number for a flag": '{"speculative": 1}',
    "a list for a method": '{"method": ["weighted"]}',
    "an unknown field": '{"mehtod": "weighted"}',
}
BAD_MEMBERS = {
    "members that are no list": {"members": 5},
    "members that are an object": {"members": {"name": "a"}},
    "members that are text": {"members": "reader"},
    "a member that is no object": {"members": ["reader", "solver"]},
    "a member without a name": {"members": [{}, {}]},
    "a name that is no text": {"members": [{"name": 5}, {"name": 6}]},
    "a name with a zero": {"members": [{"name": "a\0b"}, {"name": "b"}]},
    "an unknown key": {"members": [{"name": "a/b", "size": 5}, {"name": "a/c"}]},
    "a revision that is no text": {"members": [{"name": "a/b", "revision": 5}, {"name": "a/c"}]},
    "a dtype that is no text": {"members": [{"name": "a/b", "dtype": 5}, {"name": "a/c"}]},
    "one member": {"members": MEMBERS[:1]},
    "a drafter that is a number": {"members": MEMBERS, "drafter": 5},
    "a drafter that is a name": {"members": MEMBERS, "drafter": "solver"},
    "a drafter without a name": {"members": MEMBERS, "drafter": {}},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "saved").mkdir()
    return tmp_path / "saved"


def write(folder, text):
    text = text if isinstance(text, bytes) else text.encode()
    (folder / "ensemble_config.json").write_bytes(text)


def error_of(capsys, main, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    return err.splitlines()[-1]


# --- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", BAD_FILES.values(), ids=BAD_FILES)
def test_a_config_that_is_none_is_refused_by_its_files_name(folder, capsys, text):
    write(folder, text)
    for load in (se.EnsembleConfig.from_pretrained, se.load_ensemble):
        with pytest.raises(ValueError, match="ensemble_config.json") as error:
            load(folder)
        assert str(folder) in str(error.value) and len(str(error.value)) < 2000
    assert str(folder) in error_of(capsys, cli.main, "generate", "Hello", "--ensemble", str(folder))
    assert str(folder) in error_of(capsys, cli.main, "card", str(folder))


@pytest.mark.parametrize("fields", BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_members_that_are_none_are_refused_by_their_files_name(folder, capsys, fields):
    write(folder, json.dumps(fields))
    with pytest.raises(ValueError, match="ensemble_config.json"):
        se.load_ensemble(folder)
    assert str(folder) in error_of(capsys, cli.main, "generate", "Hello", "--ensemble", str(folder))
    assert str(folder) in error_of(capsys, cli.main, "card", str(folder))


@pytest.mark.parametrize("line", ["[]", "5", "null", '{"variant": "auto"}', '{"kind": "run", "seed": [1]}',
                                  "[" * 100_000])  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_records_that_are_no_objects(tmp_path, line, first):
    file = tmp_path / "records.jsonl"
    header = json.dumps({"kind": "header", "settings": {}})
    file.write_text(f"{line}\n" if first else f"{header}\n{line}\n")
    with pytest.raises(ValueError, match="records.jsonl"):
        Records(tmp_path, {"settings": {}})


@pytest.mark.parametrize("row", ["[]", "5", "null", "[" * 100_000, '{"question": 5, "answer": 5}'])
def test_rows_that_are_no_objects(tmp_path, capsys, row):
    file = tmp_path / "rows.jsonl"
    file.write_text(row + "\n")
    assert "Line 1 of" in error_of(capsys, bench, "--data-file", str(file), "--shots", "0", "--out", str(tmp_path))


def test_rows_that_are_no_text(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xff\xfe")
    assert str(file) in error_of(capsys, bench, "--data-file", str(file), "--shots", "0", "--out", str(tmp_path))


# --- Arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [["a", "b"], 5, None, {}, b"name"])
def test_an_ensemble_is_loaded_by_name(name):
    for load in (se.load_ensemble, se.EnsembleConfig.from_pretrained):
        with pytest.raises(TypeError, match="a folder or the id of a repository on the Hub, but is"):
            load(name)


@pytest.mark.parametrize("members", ["reader", None, 5, [5, 6], [None, None], [["a"], ["b"]]])
def test_members_are_named(members):
    for load in (Ensemble.load, lambda *given: se.ensemble_card(*given)):
        with pytest.raises(TypeError, match="member"):
            load(members, se.EnsembleConfig())


@pytest.mark.parametrize("config", [None, {"method": "weighted"}, "weighted"])
def test_a_config_is_one(tmp_path, config):
    with pytest.raises(TypeError, match="must be an EnsembleConfig"):
        se.save_ensemble(tmp_path / "new", ["a/b", "a/c"], config)


@pytest.mark.parametrize("given", [dict(name=5), dict(name="a/b", revision=5), dict(name="a/b", dtype=5)])
def test_references_are_text(given):
    with pytest.raises((TypeError, ValueError), match="must be"):
        se.MemberReference(**given)


@pytest.mark.parametrize("weights", [[10**400, 1], [1e308, 1e308], [[0.5], [0.5]], [None, 1]])
def test_weights_are_numbers_that_can_be_added(weights):
    with pytest.raises(ValueError, match="`weights`"):
        se.EnsembleConfig(weights=weights)


# --- The command line -----------------------------------------------------------------------------------------------


def test_an_empty_prompt(tmp_path, capsys):
    for prompt in ("", "  \n"):
        assert "empty" in error_of(capsys, cli.main, "generate", prompt, "--members", "reader", "solver")
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xff\xfe")
    words = ("--members", "reader", "solver", "--prompts", str(file))
    assert str(file) in error_of(capsys, cli.main, "generate", *words)


def test_the_harness_is_given_an_empty_prompt():
    pytest.importorskip("lm_eval")
    from hf_spec_ensemble.tools.harness import SpecEnsembleLM

    lm = SpecEnsembleLM(members="reader+solver", device="cpu")
    with pytest.raises(ValueError, match="empty"):
        lm._model_generate(torch.zeros(1, 0, dtype=torch.long), max_length=4, stop=["\n"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(se.MemberReference, "load", lambda *_, **__: pytest.fail("loaded"))
    given = ("--members", "reader", "solver", "--device")
    for device in ("cuda", "cuda:7", "toaster"):
        for main, command in ((cli.main, ("generate", "Hello")), (bench, ())):
            assert f"--device {device}" in error_of(capsys, main, *command, *given, device)


@pytest.mark.parametrize(
    "given", ["ensemble={folder}", "members=reader+solver --device cuda:99", "members=reader+./nowhere"]
)
def test_eval_shows_no_traceback(folder, capsys, monkeypatch, given):
    tasks = pytest.importorskip("lm_eval.tasks")
    arc = dict(include_path=str(Path(tasks.__file__).parent / "arc"), include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", lambda manager=tasks.TaskManager, **given: manager(**given | arc))
    monkeypatch.setattr("logging.raiseExceptions", False)  # lm_eval keeps the streams of earlier tests
    monkeypatch.setattr("sys.argv", ["hf-spec-ensemble"])
    write(folder, "[]")
    words = ["eval", "--tasks", "arc_easy", "--model_args", *given.format(folder=folder).split()]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    said = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in said.err + said.out


SCRIPT = [sys.executable, str(Path(__file__).parents[1] / "hf_spec_ensemble_script.py")]


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "Hello", "--members", "reader", "./nowhere"],
        ["generate", "Hello", "--ensemble=./nowhere"],
        ["generate", "Hello", "--members", "reader", "solver", "--drafter", "/nowhere/at/all"],
        ["bench", "--members", "~/nowhere-at-all", "reader"],
        ["eval", "--model_args", "members=reader+./nowhere", "weights=0.5+0.5"],
        ["eval", "--model_args", "ensemble=./nowhere,dtype=float32"],
        ["card", "new", "--members", "reader", "../nowhere/at/all"],
    ],
)
def test_a_folder_that_is_not_there_is_said_before_anything_is_imported(tmp_path, words):
    program = [SCRIPT[0], "-X", "importtime", *SCRIPT[1:]]
    ran = subprocess.run([*program, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    lines = ran.stderr.splitlines()
    imported = [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]
    assert not {"torch", "transformers", "hf_spec_ensemble"} & set(imported)
    (said,) = [line for line in lines if not line.startswith("import time:")]
    assert ran.returncode == 2 and "no such folder" in said and "nowhere" in said


# --- Calls ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    return members("llama", 2)


def refused(models, message, speculative, **call):
    passes = []
    hooks = [module.register_forward_pre_hook(lambda *_: passes.append(1)) for m in models for module in m.modules()]
    mask = call.get("attention_mask")
    one_row = mask is not None and len(mask) != len(call.get("input_ids")) and bool((mask == 1).all())  # is dropped
    given = dict(ensemble_config=se.EnsembleConfig(speculative=speculative), max_new_tokens=2) | call
    try:
        with pytest.raises(ValueError, match=message):
            models[0].generate(assistant_model=models[1], **given)
        if not one_row:
            with pytest.raises((ValueError, IndexError)):
                models[0].generate(custom_generate=se.ensemble_decoding, assistant_models=models[1:], **given)
    finally:
        for hook in hooks:
            hook.remove()
    return len(passes)


@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("shape", [(1, 0), (2, 0), (0, 3)])
def test_an_empty_prompt_is_refused(pair, speculative, shape):
    ids = torch.zeros(shape, dtype=torch.long)
    for call in (dict(input_ids=ids), dict(inputs=ids), dict(input_ids=ids, attention_mask=torch.ones(shape))):
        assert refused(pair, "empty", speculative, **call) == 0


@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("shape", [(2, 5), (2, 9), (1, 7), (3, 7), (7,)])
@pytest.mark.parametrize("ones", [True, False])
def test_a_mask_of_another_size_is_refused(pair, speculative, shape, ones):
    mask = torch.ones(shape, dtype=torch.long)
    if not ones:
        mask[..., 0] = 0
    ids = prompts(2, 7)["input_ids"]
    assert refused(pair, "attention_mask.*7", speculative, input_ids=ids, attention_mask=mask) == 0


@pytest.mark.parametrize("speculative", [True, False])
def test_a_mask_that_fits_is_taken_with_a_cache_too(pair, speculative):
    inputs = prompts(1, 7)
    config = se.EnsembleConfig(speculative=speculative)
    whole = pair[0].generate(**inputs, assistant_model=pair[1], ensemble_config=config, max_new_tokens=3)
    cache = DynamicCache()
    with torch.no_grad():
        pair[0](inputs["input_ids"][:, :4], past_key_values=cache)
    again = pair[0].generate(
        **inputs, past_key_values=cache, assistant_model=pair[1], ensemble_config=config, max_new_tokens=3
    )
    assert torch.equal(whole, again)
    with torch.no_grad():
        cache = DynamicCache()
        pair[0](inputs["input_ids"][:, :4], past_key_values=cache)
    short = inputs | {"attention_mask": inputs["attention_mask"][:, :3]}
    assert refused(pair, "`input_ids` has 7", speculative, past_key_values=cache, **short) == 0


@pytest.mark.parametrize("speculative", [True, False])
def test_an_encoders_mask_is_checked_too(speculative):
    models = encoder_decoders("t5")
    ids = torch.tensor([[5, 6, 7, 1]])
    short = dict(input_ids=ids, attention_mask=torch.ones(1, 3, dtype=torch.long))
    passes = []
    models[0].get_encoder().register_forward_hook(lambda *_: passes.append(1))
    config = se.EnsembleConfig(speculative=speculative)
    call = dict(assistant_model=models[1], ensemble_config=config, max_new_tokens=2)
    with pytest.raises(ValueError, match="attention_mask"):
        models[0].generate(**short, **call)
    with pytest.raises(ValueError, match="empty"):
        models[0].generate(input_ids=ids[:, :0], **call)
    with pytest.raises(ValueError, match="decoder_attention_mask"):
        models[0].generate(
            ids, decoder_input_ids=torch.tensor([[0, 5]]), decoder_attention_mask=torch.ones(1, 4), **call
        )
    assert passes == []
    models[0].generate(ids, attention_mask=torch.ones_like(ids), **call)
