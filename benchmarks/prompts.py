"""
Measures one model as several members: its passes shared, against passes of each member's own.

    python benchmarks/prompts.py --base FOLDER/base --adapters math=FOLDER/lora/math code=FOLDER/lora/code \
        --gsm8k gsm8k.jsonl --humaneval humaneval.jsonl

Four cases, greedy, with and without a drafter: guidance against transformers' own `guidance_scale`, context-aware
decoding over a document, a mixture over four contexts, and a base with two adapters, against adapters that are switched
and against models with an adapter merged into each. For every prompt all ways run in turns. Of each way the median of
the ratios of times is printed, over that of the case's first way, with the least and greatest, how many texts are the
first way's, and the passes for a token. All ways run once before, which takes what is measured or compiled once.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_spec_ensemble as se


DRAFTERS = {"": None, ", prompt lookup": "prompt_lookup"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder or name of the model")
    parser.add_argument("--adapters", nargs="*", default=[], metavar="NAME=FOLDER", help="LoRA adapters of it")
    parser.add_argument("--gsm8k", type=Path, required=True, help="rows of the task, with `question`")
    parser.add_argument("--humaneval", type=Path, required=True, help="rows of the task, with `prompt`")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--num-prompts", type=int, default=10, help="of each task")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--document-tokens", type=int, default=300, help="of the document, and of each context")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


class Ways:
    """Ways to decode the same, by name: functions of a prompt's number that give the output of `generate()`."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.base)
        self.model = AutoModelForCausalLM.from_pretrained(args.base, dtype=args.dtype).eval()
        self.tasks = {"GSM8K": self._rows(args.gsm8k, "question"), "HumanEval": self._rows(args.humaneval, "prompt")}

    def _rows(self, file: Path, field: str) -> list[str]:
        return [json.loads(line)[field] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]

    def prompt(self, text: str) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(text, return_tensors="pt"))

    def document(self, rows: list[str], number: int) -> str:
        """Other rows of the task, as many tokens of them as a document has."""
        others = rows[number + 1 :] + rows[:number]
        ids = self.tokenizer("\n\n".join(others[: 1 + self.args.document_tokens]))["input_ids"]
        return self.tokenizer.decode(ids[: self.args.document_tokens]) + "\n\n"

    def ensembles(self, inputs: dict, recipe: dict, drafters=DRAFTERS, **ways: dict) -> dict[str, Callable]:
        """Named `way` and `way, drafter`: a recipe with other fields of its config."""

        def run(fields: dict, drafter: str | None):
            config = se.EnsembleConfig.from_dict(recipe["ensemble_config"].to_dict() | fields)
            return self.generate(self.model, inputs, **recipe | {"ensemble_config": config}, drafter=drafter)

        return {
            f"{way}{name}": lambda fields=fields, drafter=drafter: run(fields, drafter)
            for way, fields in ways.items()
            for name, drafter in drafters.items()
        }

    def generate(self, model, inputs: dict, **kwargs):
        settings = dict(max_new_tokens=self.args.max_new_tokens, do_sample=False, return_dict_in_generate=True)
        return model.generate(**inputs, **settings, **kwargs)


STANDARD, APART, TOGETHER = dict(speculative=False), dict(share_passes=False), dict(share_passes=True)
AUTO = dict(share_passes="auto")


def guidance(ways: Ways, rows: list[str], number: int) -> dict[str, Callable]:
    """Against the prompt's last tokens, as the paper has it."""
    inputs = ways.prompt(rows[number])
    negative = {name: ids[:, -4:] for name, ids in inputs.items()}
    theirs = dict(guidance_scale=1.5, negative_prompt_ids=negative["input_ids"])
    recipe = se.recipes.guidance(ways.model, negative, scale=1.5)
    return {"transformers": lambda: ways.generate(ways.model, inputs, **theirs)} | ways.ensembles(
        inputs, recipe, apart=APART, together=TOGETHER, auto=AUTO
    )


def context_aware(ways: Ways, rows: list[str], number: int) -> dict[str, Callable]:
    inputs = ways.prompt(ways.document(rows, number) + rows[number])
    recipe = se.recipes.context_aware(ways.model, ways.prompt(rows[number]))
    return ways.ensembles(inputs, recipe, {"": None}, standard=STANDARD) | ways.ensembles(
        inputs, recipe, apart=APART, together=TOGETHER, auto=AUTO
    )


def contexts(ways: Ways, rows: list[str], number: int) -> dict[str, Callable]:
    """Four documents with equal scores, behind the same beginning."""
    texts = [f"Read this.\n\n{ways.document(rows, (number + 7 * i) % len(rows))}{rows[number]}" for i in range(4)]
    first, *others = map(ways.prompt, texts)
    recipe = se.recipes.replug(ways.model, others, [1.0] * 4)
    return ways.ensembles(first, recipe, {"": None}, standard=STANDARD) | ways.ensembles(
        first, recipe, apart=APART, together=TOGETHER, auto=AUTO
    )


def adapters(ways: Ways, rows: list[str], number: int) -> dict[str, Callable]:
    """Base and adapters: switched, mixed in a pass, and as separate models."""
    import peft

    if not hasattr(ways, "adapted"):
        pairs = [entry.split("=", 1) for entry in ways.args.adapters]
        ways.merged = []
        for name, folder in pairs:
            alone = peft.PeftModel.from_pretrained(copy.deepcopy(ways.model), folder, adapter_name=name)
            ways.merged.append(alone.merge_and_unload().eval())
        ways.adapted = copy.deepcopy(ways.model)
        wrapped = peft.PeftModel.from_pretrained(ways.adapted, pairs[0][1], adapter_name=pairs[0][0])
        for name, folder in pairs[1:]:
            wrapped.load_adapter(folder, adapter_name=name)
        ways.wrapped, ways.names = wrapped.eval(), [name for name, _ in pairs]
    inputs, n = ways.prompt(rows[number]), 1 + len(ways.names)
    views = [se.with_adapter(ways.wrapped, name) for name in (*ways.names[1:], None)]

    def run(model, assistants, drafter, **fields):
        weights = [1 / n] * n
        config = se.EnsembleConfig(weights=weights, **fields)
        return ways.generate(model, inputs, assistant_model=assistants, ensemble_config=config, drafter=drafter)

    merged = [*ways.merged, ways.model]
    found = {}
    for name, drafter in DRAFTERS.items():
        found[f"switched{name}"] = lambda d=drafter: run(ways.wrapped, views, d, **APART)
        found[f"merged{name}"] = lambda d=drafter: run(merged[0], merged[1:], d)
        found[f"mixed{name}"] = lambda d=drafter: run(ways.wrapped, views, d, **TOGETHER)
        found[f"auto{name}"] = lambda d=drafter: run(ways.wrapped, views, d, **AUTO)
    return found


CASES = {"guidance": guidance, "context-aware": context_aware, "contexts": contexts, "adapters": adapters}


def measured(run: Callable) -> tuple[float, list[int], float]:
    """Seconds, the text, which is of one length in all ways that give the same, and passes for a token."""
    start = time.perf_counter()
    out = run()
    seconds = time.perf_counter() - start
    stats = getattr(out, "stats", None)
    return seconds, out.sequences[0].tolist(), float("nan") if stats is None else stats.passes_per_token


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    ways = Ways(args)
    for case in args.cases:
        if case == "adapters" and not args.adapters:
            print("adapters: left out, since no --adapters are given")
            continue
        for task, rows in ways.tasks.items():
            print(f"\n{case}, {task}, {args.dtype}, {args.max_new_tokens} new tokens")
            ratios: dict[str, list[float]] = {}
            passes: dict[str, list[float]] = {}
            same: dict[str, int] = {}
            for number in range(-1, min(args.num_prompts, len(rows))):  # the first time nothing is kept
                results = {}
                for name, run in CASES[case](ways, rows, max(number, 0)).items():
                    results[name] = measured(run)
                first = next(iter(results.values()))
                for name, (seconds, new, a_token) in results.items() if number >= 0 else ():
                    ratios.setdefault(name, []).append(first[0] / seconds)
                    passes.setdefault(name, []).append(a_token)
                    same[name] = same.get(name, 0) + (new == first[1])
            for name, values in ratios.items():
                print(
                    f"  {name:28} {statistics.median(values):5.2f}x [{min(values):.2f}, {max(values):.2f}]  "
                    f"{same[name]}/{len(values)} texts alike  {statistics.median(passes[name]):.2f} passes a token",
                    flush=True,
                )


if __name__ == "__main__":
    main()
