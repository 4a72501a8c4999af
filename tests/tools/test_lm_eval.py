"""Ensembles as a model of lm-evaluation-harness, on local tasks."""

import json
from functools import partial

import pytest
import torch
from mixed import TEXTS, saved
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_spec_ensemble as se
from hf_spec_ensemble.demo import FAMILY


pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hf_spec_ensemble.tools import harness
from hf_spec_ensemble.tools.harness import SpecEnsembleLM, main


ROWS = [
    ("Ann has 3 boxes with 12 pens each. How many pens has she?", ["36 pens", "15 pens", "She has 9"]),
    ("Tom had 9 pens and lost 4. How many has he?", ["13", "5 pens", "He had 36 pens"]),
    ("A book costs 4 dollars. How much do 6 books cost?", ["10", "The book costs 4", "24 dollars"]),
]
METHODS = {
    "weighted": dict(weights=[0.7, 0.3]),
    "product": dict(method="product", weights=[1.4, -0.4]),
    "contrastive": dict(method="contrastive", contrast=0.4, plausibility=0.02),
}


@pytest.fixture(scope="module")
def models():
    return [AutoModelForCausalLM.from_pretrained(FAMILY / name, dtype="float32") for name in ("reader", "solver")]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FAMILY / "reader")


@pytest.fixture
def tasks(tmp_path, models, tokenizer):
    """A folder with two tasks; the target of the one that generates is what the standard ensemble says."""
    config = se.EnsembleConfig(weights=[0.7, 0.3], speculative=False)
    with (tmp_path / "rows.jsonl").open("w") as file:
        for question, choices in ROWS:
            inputs = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt")
            ids = models[0].generate(
                **inputs, assistant_model=models[1], ensemble_config=config, max_new_tokens=16, do_sample=False
            )
            answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]).split("\n")[0]
            row = {"question": question, "choices": choices, "label": 0, "answer": answer}
            file.write(json.dumps(row) + "\n")
    head = f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "rows.jsonl"}
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
"""
    (tmp_path / "says.yaml").write_text(
        "task: says\noutput_type: generate_until\n" + head + 'doc_to_target: "{{answer}}"\n'
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 16\nmetric_list:\n  - metric: exact_match\n'
    )
    (tmp_path / "chooses.yaml").write_text(
        "task: chooses\noutput_type: multiple_choice\n" + head + 'doc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\n"
    )
    return tmp_path


def log_likelihood(models, tokenizer, method: str, context: str, continuation: str) -> float:
    """By the formulas, token by token."""
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        one, two = (model(ids).logits[0, :-1].double() for model in models)
    if method == "weighted":
        r = (0.7 * one.softmax(-1) + 0.3 * two.softmax(-1)).log()
    elif method == "product":
        r = (1.4 * one - 0.4 * two).log_softmax(-1)
    else:
        unlikely = one.softmax(-1) < 0.02 * one.softmax(-1).amax(-1, keepdim=True)
        r = (one - 0.4 * two).masked_fill(unlikely, -torch.inf).log_softmax(-1)
    return float(r.gather(-1, ids[0, 1:, None])[start - 1 :].sum())


def requests(rows=ROWS) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (f"Question: {question}\nAnswer:", f" {choice}"), i)
        for i, (question, choices) in enumerate(rows) for choice in choices
    ]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_log_likelihoods_are_the_ensembles_from_one_pass_of_each_member(method, models, tokenizer):
    lm = SpecEnsembleLM(members="reader+solver", dtype="float32", device="cpu", batch_size=2, **METHODS[method])
    passes = [0, 0]
    for i, member in enumerate(lm.members):
        member.register_forward_hook(lambda *args, i=i: passes.__setitem__(i, passes[i] + 1))
    asked = requests()
    scores = lm.loglikelihood(asked, disable_tqdm=True)
    assert passes == [5, 5]  # nine requests, two at a time
    for request, (score, _) in zip(asked, scores):
        assert score == pytest.approx(log_likelihood(models, tokenizer, method, *request.args), rel=1e-4)
    if method == "contrastive":
        assert float("-inf") in [score for score, _ in scores] != [float("-inf")] * 9
    text = Instance("loglikelihood_rolling", {}, (ROWS[0][0],), 0)
    (rolling,) = lm.loglikelihood_rolling([text], disable_tqdm=True)
    assert rolling == pytest.approx(log_likelihood(models, tokenizer, method, "<|end|>", ROWS[0][0]), rel=1e-4)


def test_tasks_are_scored(tasks, models, tokenizer):
    results = simple_evaluate(
        model="hf-spec-ensemble",
        model_args={"members": [str(FAMILY / "reader"), str(FAMILY / "solver")], "weights": [0.7, 0.3],
                    "dtype": "float32"},
        tasks=["says", "chooses"], task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=3, device="cpu", bootstrap_iters=0,
    )  # fmt: skip
    assert results["results"]["says"]["exact_match,none"] == 1.0
    chosen = []
    for question, choices in ROWS:
        context = f"Question: {question}\nAnswer:"
        scores = [log_likelihood(models, tokenizer, "weighted", context, f" {choice}") for choice in choices]
        chosen.append(scores.index(max(scores)) == 0)
    assert results["results"]["chooses"]["acc,none"] == pytest.approx(sum(chosen) / len(chosen))


QUESTIONS = [f"Question: {question}\nAnswer:" for question, _ in ROWS]


def generations(contexts, **settings) -> list[Instance]:
    return [Instance("generate_until", {}, (context, settings), i) for i, context in enumerate(contexts)]


def test_texts_are_those_of_the_harness_for_any_batch_size(models, tokenizer, monkeypatch):
    given = dict(members="reader+solver", dtype="float32", device="cpu", weights="0.7+0.3", max_length=48)
    long = "Ann has 3 boxes. " * 12 + QUESTIONS[0]  # is cut on the left
    asked = [
        *generations([*QUESTIONS, long], until=["\n", " pens"], max_gen_toks=16),
        *generations(QUESTIONS, until=" the", max_gen_toks=24, do_sample=False),
        *generations(["Tom has 9 pens and", "Sums: 1 +"], until=["  "], max_gen_toks=8, repetition_penalty=1.3),
        *generations(["A list:\n"], until=["\n\n"], max_gen_toks=8),  # whose stop string begins in the context
    ]
    lms = [SpecEnsembleLM(**given, batch_size=size) for size in (1, 2)]
    inherited = HFLM.generate_until(lms[0], asked, disable_tqdm=True)
    calls, kept, lengths = [], [], []
    plain = HFLM.generate_until
    monkeypatch.setattr(HFLM, "generate_until", lambda lm, some, *rest: calls.append(some) or plain(lm, some, *rest))
    monkeypatch.setattr(lms[1].cache_hook, "add_partial", lambda *call: kept.append(call))

    def completed(*args, **kwargs):
        for result in se.generate_as_completed(*args, **kwargs):
            lengths.append(len(result.generated_tokens))
            yield result

    monkeypatch.setattr(harness, "generate_as_completed", completed)
    assert lms[0].generate_until(asked, disable_tqdm=True) == inherited
    assert min(lengths) < 8, "stop strings end no text"
    assert lms[1].generate_until(asked, disable_tqdm=True) == inherited
    assert calls == [asked[-1:]] * 2
    assert {(repr(args), text) for _, args, text in kept} == {
        (repr(request.args), text) for request, text in zip(asked, inherited)
    }
    ids = tokenizer(QUESTIONS[1], return_tensors="pt")
    config = se.EnsembleConfig(weights=[0.7, 0.3])
    out = models[0].generate(
        **ids, assistant_model=models[1], ensemble_config=config, max_new_tokens=24, do_sample=False
    )  # fmt: skip
    assert inherited[5] == tokenizer.decode(out[0, ids["input_ids"].shape[1] :]).split(" the")[0]


def test_texts_of_different_families_are_those_of_the_harness(tmp_path, monkeypatch):
    lm = SpecEnsembleLM(members=saved((0, 2), tmp_path), dtype="float64", device="cpu", batch_size=2, max_length=64)
    asked = generations([*TEXTS, "the answer to"], until=["e", " s"], max_gen_toks=8)
    own = HFLM.generate_until(lm, asked, disable_tqdm=True)
    monkeypatch.setattr(HFLM, "generate_until", lambda *_, **__: pytest.fail("they do not share a batch"))
    assert lm.generate_until(asked, disable_tqdm=True) == own and any(own)


def test_samples_of_the_same_context_are_its_places(models):
    lms = [SpecEnsembleLM(members="reader+solver", dtype="float32", device="cpu", batch_size=n) for n in (1, 3)]
    asked, texts = generations([QUESTIONS[0]] * 4, until=["\n"], max_gen_toks=12, do_sample=True, temperature=1.0), []
    for lm in lms:
        torch.manual_seed(3)
        texts.append(lm.generate_until(asked, disable_tqdm=True))
    assert texts[0] == texts[1] and len(set(texts[0])) > 2


def test_a_saved_ensemble_from_the_command_line(tasks, tmp_path, capsys, monkeypatch):
    folder = se.save_ensemble(
        tmp_path / "both", [FAMILY / "reader", FAMILY / "solver"], se.EnsembleConfig(), drafter="prompt_lookup"
    )
    monkeypatch.setattr("sys.argv", [])
    # Reading all that comes with lm_eval takes seconds
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    main(
        ["--model_args", f"ensemble={folder}", "weights=0.7+0.3", "dtype=float32", "--tasks", "says",
         "--include_path", str(tasks), "--device", "cpu"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "hf-spec-ensemble" in out and "|says|" in out.replace(" ", "")
    assert "|exact_match|↑|1|" in out.replace(" ", "")


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "Give one of `members`"),
        ({"members": "reader+solver", "ensemble": "x"}, "Give one of `members`"),
        ({"members": "reader"}, "at least two members"),
        ({"members": "reader+solver", "weights": "0.7/0.3"}, "must be numbers with"),
        ({"members": "reader+./nowhere"}, "a folder or the id"),
    ],
)
def test_bad_arguments_say_what_is_allowed(given, message):
    with pytest.raises(ValueError, match=message):
        SpecEnsembleLM(**given)
