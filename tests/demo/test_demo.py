"""The embedded family, and the demo as it is run from the command line."""

import pytest
import torch
from families import members, tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_spec_ensemble as se
from hf_spec_ensemble.demo import FAMILY, train
from hf_spec_ensemble.demo.__main__ import main


MODELS = ("reader", "solver", "draft")


def test_the_family_is_small_and_of_one_tokenizer():
    assert sum(file.stat().st_size for file in FAMILY.rglob("*") if file.is_file()) < 8e6
    vocabularies = [AutoTokenizer.from_pretrained(FAMILY / name).get_vocab() for name in MODELS]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
    sizes = [AutoModelForCausalLM.from_pretrained(FAMILY / name).num_parameters() for name in MODELS]
    assert sizes[0] == sizes[1] > 4 * sizes[2]
    reader, solver = (load_file(FAMILY / name / "model.safetensors") for name in MODELS[:2])
    assert any((reader[key] != solver[key]).any() for key in reader)


@pytest.mark.parametrize("assistants", [["solver"], ["solver", "draft"]])
def test_the_family_decodes_identically_in_float32(assistants):
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "reader")
    models = [AutoModelForCausalLM.from_pretrained(FAMILY / n, dtype=torch.float32) for n in ["reader", *assistants]]
    prompts = ["Question: Ann has 3 boxes with 12 pens each.", "Question: A train goes 60 miles in 2 hours. How fast"]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    texts = [
        models[0].generate(
            **inputs, assistant_model=models[1:], ensemble_config=se.EnsembleConfig(speculative=s), max_new_tokens=40
        )
        for s in (True, False)
    ]
    assert texts[0].tolist() == texts[1].tolist()


def test_the_demo_shows_both_ensembles(capsys):
    main(["--max-new-tokens", "24", "--repeats", "1"])
    out = capsys.readouterr().out
    assert "only there to run" in out
    for said in ("Tokens: identical", "forward passes of reader", "acceptance of solver's", "Speed ratio:"):
        assert said in out


def test_the_demo_takes_folders_and_the_config(capsys, tmp_path):
    for i, model in enumerate(members("llama", 3)):
        model.save_pretrained(tmp_path / str(i))
        tokenizer().save_pretrained(tmp_path / str(i))
    arguments = (
        f"hello --model {tmp_path}/0 --assistant-model {tmp_path}/1 --assistant-model {tmp_path}/2 --method product "
        "--weights 1 1 -1 --num-assistant-tokens 1 1 2 --no-alternate --do-sample --coupling gumbel "
        "--max-new-tokens 8 --repeats 1"
    )
    main(arguments.split())
    out = capsys.readouterr().out
    assert "only there to run" not in out
    assert "Prompt: hello" in out and "Tokens: identical" in out and "forward passes of 2" in out


@pytest.mark.slow
def test_the_family_can_be_trained(tmp_path, monkeypatch):
    rows = [
        f'{{"question": "What is {a} and {a}?", "answer": "{a}+{a}=<<{a}+{a}={2 * a}>>{2 * a}."}}' for a in range(200)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(train, "CONTEXT", 16)
    monkeypatch.setattr(train, "BATCH", 2)
    train.main(["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "family"), "--steps", "4"])
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "family" / name)
        chat = AutoTokenizer.from_pretrained(tmp_path / "family" / name).apply_chat_template(
            [{"role": "user", "content": "What is 2 and 2?"}], add_generation_prompt=True, tokenize=False
        )
        assert chat == "Question: What is 2 and 2?\nAnswer:"
        assert model.config.vocab_size <= 2048
