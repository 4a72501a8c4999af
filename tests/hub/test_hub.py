"""Ensembles as folders and repositories: saved, loaded, pushed, and run by transformers alone."""

import ast
import copy
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from fake_hub import COMMIT, fake_hub
from families import tiny
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_spec_ensemble as se
from hf_spec_ensemble import hub
from hf_spec_ensemble.demo import FAMILY
from hf_spec_ensemble.hub import card as cards
from hf_spec_ensemble.hub import references


MEMBERS = [FAMILY / "reader", FAMILY / "solver"]
CONFIG = dict(weights=[0.7, 0.3], num_assistant_tokens=[1, 2])
PROMPT = "Question: Tom had 9 pens.\nAnswer:"  # what the ensemble says here is none of its members' text


@pytest.fixture(scope="module")
def expected() -> str:
    """What the ensemble says, decoded by hand."""
    tokenizer = AutoTokenizer.from_pretrained(MEMBERS[0])
    one, two = (AutoModelForCausalLM.from_pretrained(name) for name in MEMBERS)
    config = se.EnsembleConfig(**CONFIG, speculative=False)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = one.generate(**inputs, assistant_model=two, ensemble_config=config, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(ids[0])


def python(program: str, folder: Path, **environment: str) -> str:
    """What a program prints in a process of its own, with caches of its own."""
    environment |= {
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=folder, env=os.environ | environment, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


needs_installation = pytest.mark.skipif(
    not any(importlib.metadata.distributions(name="hf_spec_ensemble")),
    reason="transformers looks for installed packages: pip install -e .",
)


# --- Folders ------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path, expected):
    config = se.EnsembleConfig(**CONFIG)
    folder = se.save_ensemble(tmp_path / "both", MEMBERS, config)
    assert se.EnsembleConfig.from_pretrained(folder) == config
    ensemble = se.load_ensemble(folder)
    assert ensemble.config == config and ensemble.drafter == "auto" and len(ensemble.assistant_models) == 1
    assert not ensemble.model.training
    ids = ensemble.generate(**ensemble.tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=24, do_sample=False)
    assert ensemble.tokenizer.decode(ids[0]) == expected
    other = se.EnsembleConfig(method="contrastive", contrast=2.0)
    ids = ensemble.generate(
        **ensemble.tokenizer(PROMPT, return_tensors="pt"), ensemble_config=other, max_new_tokens=24, do_sample=False
    )
    assert ensemble.tokenizer.decode(ids[0]) != expected, "a config given with the call wins"


def test_members_keep_their_dtype_and_drafters_come_along(tmp_path):
    members = [se.MemberReference(str(MEMBERS[0]), dtype="bfloat16"), AutoModelForCausalLM.from_pretrained(MEMBERS[1])]
    folder = se.save_ensemble(tmp_path, members, se.EnsembleConfig(), drafter=FAMILY / "draft")
    ensemble = se.load_ensemble(folder)
    assert ensemble.model.dtype == torch.bfloat16 and ensemble.assistant_models[0].dtype == members[1].dtype
    assert ensemble.drafter.num_parameters() < ensemble.model.num_parameters()
    assert se.load_ensemble(folder, dtype="float64").assistant_models[0].dtype == torch.float64
    for named in ("prompt_lookup", None):
        folder = se.save_ensemble(tmp_path, members, se.EnsembleConfig(), drafter=named)
        assert se.load_ensemble(folder).drafter == named


@pytest.mark.parametrize(
    "members, config, message",
    [
        (MEMBERS, dict(weights=[0.2, 0.3, 0.5]), "one entry for each member, 2"),
        (MEMBERS[:1], {}, "at least two members"),
        (MEMBERS, dict(method=lambda logits: logits[0]), "cannot be serialised"),
        (["./not/there", *MEMBERS], {}, "a folder or the id of a repository on the Hub, but is './not/there'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, members, config, message):
    with pytest.raises(ValueError, match=message):
        se.save_ensemble(tmp_path / "new", members, se.EnsembleConfig(**config))
    assert not (tmp_path / "new").exists()


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"a torch.dtype, as 'bfloat16', but is 'half-ish'"):
        se.MemberReference("org/model", dtype="half-ish")
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(FAMILY / "draft").config)
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match="save_pretrained"):
        se.save_ensemble(tmp_path, [model, model], se.EnsembleConfig())
    with pytest.raises(FileNotFoundError, match="neither a folder nor a repository"):
        se.load_ensemble(tmp_path / "not" / "there")
    se.EnsembleConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no members"):
        se.load_ensemble(tmp_path)
    entry = {**se.EnsembleConfig().to_dict(), "members": [{"name": str(name)} for name in MEMBERS]}
    with pytest.raises(ValueError, match="names its members"):
        hub.generate_with(entry, model, assistant_model=model)


def test_the_card_says_what_it_is_and_names_no_folder_of_this_machine_on_the_hub():
    members = ["org/base", se.MemberReference("org/math", revision="v2", dtype="bfloat16")]
    config = se.EnsembleConfig(weights=[0.7, 0.3])
    card = se.ensemble_card(members, config, "org/draft", "me/both", speedup="1.7x on sums", licence="mit")
    assert card.data.base_model == ["org/base", "org/math"] and card.data.license == "mit"
    assert card.data.library_name == "transformers" and "custom_generate" in card.data.tags
    text = str(card)
    assert "0.7 * softmax(l_1) + 0.3 * softmax(l_2)" in text and "1.7x on sums" in text and "| v2 | bfloat16 |" in text
    assert "org/draft" in text and 'custom_generate="me/both"' in text and "## Speed" in text
    proxy = se.EnsembleConfig(method="product", weights=[1, 1, -1])
    assert "softmax(1 * l_1 + 1 * l_2 - 1 * l_3)" in str(se.ensemble_card(["a/b", "a/c", "a/d"], proxy))
    contrast = se.EnsembleConfig(method="contrastive", contrast=0.3, plausibility=0.1)
    assert "softmax(l_1 - 0.3 * l_2); tokens under 0.1" in str(se.ensemble_card(["a/b", "a/c"], contrast))
    assert str(FAMILY) not in str(card)


AWKWARD = [
    'a "quoted" name',
    "it's",
    "back\\slash",
    "`code` and [a](b) | c <b> & *d* _e_",
    "two\nlines\n```\nprint('run')",
    '"); import os; os.abort(); ("',
    "{braces} {main} %s",
    "--- ünïcode \u2028 😀",
    os.fsdecode(b"no text \xff"),
]


@pytest.mark.parametrize("name", AWKWARD)
def test_names_are_escaped_in_the_card_and_its_examples(tmp_path, name):
    folder = tmp_path / name
    (folder / "saved").mkdir(parents=True)
    members = [se.MemberReference(str(folder), revision=name), str(folder / "saved")]
    saved = se.save_ensemble(tmp_path / "saved", members, se.EnsembleConfig(), repo_id=name, licence=name)
    card = (saved / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    given = set()
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call):
                values = [*node.args, *(keyword.value for keyword in node.keywords)]
                given |= {value.value for value in values if isinstance(value, ast.Constant)}
    assert {f"USER/{folder.name}", name} <= given
    assert str(tmp_path) not in card
    rows = [line for line in card.splitlines() if line.startswith("| l_")]
    assert len(rows) == 2 and all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert [line for line in card.splitlines() if line.startswith("# ")] == [
        f"# {cards._markdown(name.split('/')[-1])}"
    ]
    assert not re.search(r"(?<!\\)[<`]", rows[0]) and ModelCard(card).data.license == cards._text(name)
    entry = runpy.run_path(str(saved / "custom_generate" / "generate.py"))["ENSEMBLE"]
    assert entry["members"][0]["name"] == str(folder) and entry["members"][0]["revision"] == name
    assert references.read_ensemble(saved / "ensemble_config.json")[1][0] == members[0]


# --- transformers alone, and the card's examples --------------------------------------------------------------------


ALONE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

folder, main, prompt = FOLDER, MAIN, PROMPT
tokenizer = AutoTokenizer.from_pretrained(main)
model = AutoModelForCausalLM.from_pretrained(main)
inputs = tokenizer(prompt, return_tensors="pt")
assert "hf_spec_ensemble" not in sys.modules
call = dict(custom_generate=folder, trust_remote_code=True, max_new_tokens=24)
print(repr(tokenizer.decode(model.generate(**inputs, **call, do_sample=False)[0])))

from hf_spec_ensemble import hub
from hf_spec_ensemble.hub import folders
loaded = folders._loaded_once.cache_info().misses
class Streamer:
    tokens = 0
    def put(self, ids):
        self.tokens += ids.numel()
    def end(self):
        pass
streamer = Streamer()
out = model.generate(**inputs, **call, do_sample=False, streamer=streamer, return_dict_in_generate=True)
assert streamer.tokens == out.sequences.shape[1] and sum(out.stats.forward_passes) < 48
assert folders._loaded_once.cache_info().misses == loaded == 1
stopped = model.generate(**inputs, **call, do_sample=False, stop_strings=["10"], tokenizer=tokenizer)
print(repr(tokenizer.decode(stopped[0])))
samples = []
for _ in range(2):
    set_seed(1)
    samples.append(model.generate(**inputs, **call, do_sample=True).tolist())
assert samples[0] == samples[1]
"""


@needs_installation
def test_transformers_alone_runs_the_folder(tmp_path, expected):
    folder = se.save_ensemble(tmp_path / "both", MEMBERS, se.EnsembleConfig(**CONFIG))
    given = f"FOLDER, MAIN, PROMPT = {str(folder)!r}, {str(MEMBERS[0])!r}, {PROMPT!r}\n"
    greedy, stopped = python(given + ALONE, tmp_path).splitlines()
    assert greedy == repr(expected)
    new = expected.removeprefix(PROMPT)
    assert eval(stopped).removeprefix(PROMPT) == (new[: new.index("10") + 2])


@needs_installation
def test_the_examples_of_the_card_run_when_they_are_pasted(tmp_path):
    with fake_hub() as there:
        for name in ("reader", "solver"):
            there.files[f"tiny/{name}"] = {file.name: file.read_bytes() for file in (FAMILY / name).iterdir()}
        se.push_ensemble(
            "me/both",
            ["tiny/reader", "tiny/solver"],
            se.EnsembleConfig(**CONFIG),
            endpoint=there.endpoint,
            token="hf_x",
        )
        card = there.files["me/both"]["README.md"].decode()
        blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        assert len(blocks) == 2 and "Not on the Hub" not in card
        said = python("\nprint('---')\n".join(blocks), tmp_path, HF_ENDPOINT=there.endpoint).split("---\n")
    assert len(said) == 2 and said[0].startswith("Question: What is 2 + 3?") and said[0] == said[1]


def test_the_card_of_a_folder_says_what_is_not_on_the_hub(tmp_path):
    members = [MEMBERS[0], "org/math"]
    folder = se.save_ensemble(tmp_path / "both", members, se.EnsembleConfig(), drafter=FAMILY / "draft")
    card = (folder / "README.md").read_text()
    assert 'custom_generate="USER/both"' in card and 'load_ensemble("USER/both")' in card
    assert 'AutoModelForCausalLM.from_pretrained("USER/reader"' in card
    assert "**Not on the Hub yet:** reader, draft." in card
    assert str(tmp_path) not in card and str(FAMILY) not in card


def test_adapters_are_not_left_out_without_a_word(tmp_path):
    base = copy.deepcopy(tiny("llama"))
    base.config._name_or_path = str(MEMBERS[0])
    base.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), "german")
    for member in (base, se.with_adapter(base, "german")):
        with pytest.raises(ValueError, match="has an adapter, which its name does not say"):
            se.save_ensemble(tmp_path / "both", [member, MEMBERS[1]], se.EnsembleConfig())
    assert not (tmp_path / "both").exists()
    se.save_ensemble(tmp_path / "both", [se.with_adapter(base, None), MEMBERS[1]], se.EnsembleConfig())


# --- The Hub ------------------------------------------------------------------------------------------------------


@needs_installation
def test_an_ensemble_goes_to_the_hub_and_comes_back(tmp_path, expected):
    config = se.EnsembleConfig(**CONFIG)
    with fake_hub() as there:
        for name in ("reader", "solver"):
            there.files[f"tiny/{name}"] = {file.name: file.read_bytes() for file in (FAMILY / name).iterdir()}
        url = se.push_ensemble(
            "me/both", ["tiny/reader", "tiny/solver"], config, private=True, token="hf_x", endpoint=there.endpoint,
        )  # fmt: skip
        assert url == f"{there.endpoint}/me/both/commit/{COMMIT}" and there.made[0].get(
            "visibility", there.made[0].get("private")
        ) in ("private", True)
        files = there.files["me/both"]
        assert set(files) == {"README.md", "ensemble_config.json", "custom_generate/generate.py",
                              "custom_generate/requirements.txt"}  # fmt: skip
        entry = json.loads(files["ensemble_config.json"])
        assert [member["name"] for member in entry["members"]] == ["tiny/reader", "tiny/solver"]
        assert b"base_model:\n- tiny/reader\n- tiny/solver" in files["README.md"]

        program = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("tiny/reader")
model = AutoModelForCausalLM.from_pretrained("tiny/reader")
inputs = tokenizer({PROMPT!r}, return_tensors="pt")
call = dict(max_new_tokens=24, do_sample=False)
ids = model.generate(**inputs, custom_generate="me/both", trust_remote_code=True, **call)
print(repr(tokenizer.decode(ids[0])))
import hf_spec_ensemble as se
assert se.EnsembleConfig.from_pretrained("me/both").weights == [0.7, 0.3]
ensemble = se.load_ensemble("me/both")
print(repr(tokenizer.decode(ensemble.generate(**inputs, **call)[0])))
saved = se.save_ensemble("again", [ensemble.model, *ensemble.assistant_models], ensemble.config)
print((saved / "ensemble_config.json").read_text())
"""
        remote, loaded, again = python(program, tmp_path, HF_ENDPOINT=there.endpoint).split("\n", 2)
        assert remote == loaded == repr(expected)
        assert json.loads(again)["members"][0] == {"name": "tiny/reader", "revision": None, "dtype": "float16"}


def test_members_that_only_this_machine_has_are_not_pushed():
    with fake_hub() as there:
        with pytest.raises(ValueError, match="push the models first"):
            se.push_ensemble("me/both", MEMBERS, se.EnsembleConfig(), endpoint=there.endpoint)
        assert there.asked == []
