"""Members must share one tokenizer: compared wherever tokenizers or their files are there, and nowhere twice."""

import json
import logging
import shutil
import time

import pytest
import torch
from families import members, prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import hf_spec_ensemble as se
from hf_spec_ensemble import notices
from hf_spec_ensemble.bench.__main__ import main as bench
from hf_spec_ensemble.decoding import vocabulary
from hf_spec_ensemble.demo import FAMILY
from hf_spec_ensemble.hub import Ensemble
from hf_spec_ensemble.tools import cli


READER = FAMILY / "reader"
IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(autouse=True)
def fresh():
    notices.warn_once.cache_clear()
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)  # which the programs set


def variant(folder, change, name="solver"):
    """A copy of an embedded model whose tokenizer file is changed."""
    shutil.copytree(FAMILY / name, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    change(tokenizer)
    file.write_text(json.dumps(tokenizer))
    return folder


def swap(tokenizer):
    """Two tokens of the same vocabulary trade places."""
    vocab = tokenizer["model"]["vocab"]
    by_id = {i: token for token, i in vocab.items()}
    vocab[by_id[700]], vocab[by_id[701]] = 701, 700


def add(tokenizer):
    """A token beyond those of the others."""
    ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": max(ids) + 1, "content": "<|extra|>"})


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return variant(tmp_path_factory.mktemp("models") / "other", swap)


def load(*folders):
    return [AutoModelForCausalLM.from_pretrained(folder, dtype="float32") for folder in folders]


def count_passes(models):
    passes = []
    for model in models:
        model.register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("speculative", [True, False])
def test_generate_refuses_other_tokens_before_the_first_pass(other, speculative):
    model, assistant = load(READER, other)
    passes = count_passes([model, assistant])
    config = se.EnsembleConfig(speculative=speculative)
    with pytest.raises(ValueError, match=r"token 700 is '.+' for the main model \('.*reader'\) and '.+' for assistant"):
        model.generate(IDS, assistant_model=assistant, ensemble_config=config, max_new_tokens=2)
    with pytest.raises(ValueError, match="token 700"):
        model.generate(
            IDS, custom_generate=se.ensemble_decoding, assistant_models=[assistant], ensemble_config=config,
            max_new_tokens=2,
        )  # fmt: skip
    assert passes == []


def test_a_drafter_must_share_it_too(other):
    model, assistant, drafter = load(READER, FAMILY / "solver", other)
    call = dict(assistant_model=assistant, ensemble_config=se.EnsembleConfig(), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"token 700 .* for the drafter \('.*other'\)"):
        model.generate(IDS, drafter=drafter, **call)
    model.generate(IDS, **call)


def test_everything_refuses_what_cannot_be_translated_before_a_weight_is_read(other, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(se.MemberReference, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"token 700 .* the drafter"):
        Ensemble.load([READER, FAMILY / "solver"], se.EnsembleConfig(), drafter=other)
    folder = se.save_ensemble(tmp_path / "saved", [READER, READER], se.EnsembleConfig(), drafter=other)
    with pytest.raises(ValueError, match="token 700"):
        se.load_ensemble(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "How many?", "answer": "#### 5"}) + "\n")
    programs = [
        (cli.main, ["generate", "Hello", "--members", "reader", "solver", "--drafter", str(other)]),
        (bench, ["--members", "reader", "solver", "--compare", f"drafter:{other}", "--data-file", str(rows)]),
    ]
    for main, words in programs:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert "token 700" in (err := capsys.readouterr().err) and "Traceback" not in err


def test_the_harness_scores_them(other):
    pytest.importorskip("lm_eval")
    from hf_spec_ensemble.tools.harness import SpecEnsembleLM

    model = SpecEnsembleLM(members=["reader", str(other)], device="cpu")
    log_probs = model._model_call(IDS)
    assert log_probs.exp().sum(-1).isfinite().all() and (log_probs.exp().sum(-1) < 1 + 1e-4).all()


def test_tokens_beyond_those_of_all_members_may_differ(tmp_path, caplog):
    longer = variant(tmp_path / "longer", add)
    ids = [load(READER, folder)[0] for folder in (READER, longer)]
    with caplog.at_level(logging.WARNING, logger="hf_spec_ensemble"):
        ids[0].generate(IDS, assistant_model=ids[1], ensemble_config=se.EnsembleConfig(), max_new_tokens=2)
        Ensemble.load([READER, longer], se.EnsembleConfig())
    assert caplog.records == []
    one, other = {"a": 0, "<|extra|>": 1}, {"a": 0, "<|other|>": 1}
    assert vocabulary.differences(one, other, 1) == [] != vocabulary.differences(one, other, 2)


def test_what_cannot_be_compared_is_said_once(caplog, tmp_path):
    bare = tmp_path / "bare"
    load(FAMILY / "solver")[0].save_pretrained(bare)
    model, assistant = load(READER, bare)
    with caplog.at_level(logging.WARNING, logger="hf_spec_ensemble"):
        for models in ((model, assistant), members("llama", 2)):
            inputs = prompts(1)
            config = se.EnsembleConfig()
            models[0].generate(**inputs, assistant_model=models[1], ensemble_config=config, max_new_tokens=2)
        Ensemble.load([READER, bare], se.EnsembleConfig())
    (said,) = [record.message for record in caplog.records if "tokenizer" in record.message]
    assert "could not be compared" in said and len(said) < 200


def test_the_same_model_and_folder_need_no_comparison(monkeypatch, caplog):
    monkeypatch.setattr(vocabulary, "_tokens_in", lambda *_: pytest.fail("read"))
    model, same = load(READER, READER)
    with caplog.at_level(logging.WARNING, logger="hf_spec_ensemble"):
        model.generate(IDS, assistant_model=same, ensemble_config=se.EnsembleConfig(), max_new_tokens=2)
        (tiny,) = members("llama", 1)
        tiny.generate(IDS, assistant_model=tiny, ensemble_config=se.EnsembleConfig(), max_new_tokens=2)
    assert caplog.records == []


def test_files_are_read_once(other, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(vocabulary, "_tokens_in", lambda name, _: read.append(name) or {"a": 0})
    copied = variant(tmp_path / "copied", add)  # other files, so that their bytes do not settle it
    model, assistant = load(READER, copied)
    for _ in range(3):
        model.generate(IDS, assistant_model=assistant, ensemble_config=se.EnsembleConfig(), max_new_tokens=2)
    assert len(read) == 2


def test_a_broken_tokenizer_file_is_no_error(tmp_path, caplog):
    for text in ("{", "[]", '{"model": 5}', '{"model": {"vocab": [1]}, "added_tokens": [7]}', "[" * 100_000):
        folder = tmp_path / str(len(text))
        shutil.copytree(FAMILY / "solver", folder)
        (folder / "tokenizer.json").write_text(text)
        model, assistant = load(READER, folder)
        notices.warn_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_spec_ensemble"):
            model.generate(IDS, assistant_model=assistant, ensemble_config=se.EnsembleConfig(), max_new_tokens=2)
        assert "could not be compared" in caplog.text


@pytest.mark.parametrize("name", [5, "a\0b", "x" * 5000, "/nowhere", "org/nowhere", "~", [1]])
def test_models_of_any_name_decode(name, caplog, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, assistant = load(READER, FAMILY / "solver")
    assistant.config._name_or_path = name
    with caplog.at_level(logging.WARNING, logger="hf_spec_ensemble"):
        model.generate(IDS, assistant_model=assistant, ensemble_config=se.EnsembleConfig(), max_new_tokens=2)
    assert "could not be compared" in caplog.text


def test_a_large_vocabulary_is_compared_quickly():
    one = {f"token {i}": i for i in range(150_000)}
    other = one | {"token 7": 149_999, "token 149999": 7}
    start = time.process_time()
    assert vocabulary.differences(one, dict(one), 150_000) == []
    assert vocabulary.differences(one, other, 150_000)[0][0] == 7
    assert time.process_time() - start < 5  # it takes a tenth of a second; in quadratic time, hours


def test_an_unigram_vocabulary_is_read(tmp_path):
    from tokenizers import Tokenizer, models

    for name, tokens in (("one", ["<unk>", "a", "b"]), ("two", ["<unk>", "b", "a"])):
        made = Tokenizer(models.Unigram([(token, 0.0) for token in tokens], 0))
        PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / name)
    found = [vocabulary._tokens_in(str(tmp_path / name), None) for name in ("one", "two")]
    assert vocabulary.differences(*found, 3) == [(1, "a", "b"), (2, "b", "a")]
    assert found[0] == AutoTokenizer.from_pretrained(tmp_path / "one").get_vocab()
