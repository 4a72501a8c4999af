"""
Measures one model as several members: its passes shared, against passes of each member's own.

    python benchmarks/prompts.py --base FOLDER/base --adapters math=FOLDER/lora/math code=FOLDER/lora/code \
        --gsm8k gsm8k.jsonl --humaneval humaneval.jsonl

Four cases, greedy: guidance, context-aware decoding over a document, a mixture over four contexts, and a base with two
adapters, which answers a chat. The ways to decode each, all but the first two with and without the default drafter:

- transformers: its own `guidance_scale`; of guidance alone
- separate passes: the standard ensemble, each member by itself (`speculative=False, share_passes=False`)
- taking turns: members propose and verify, in passes of their own (`share_passes=False`)
- one pass: members are rows of one (`share_passes=True`), of adapters also: these are mixed
- auto: what `share_passes="auto"` chooses
- merged: of adapters, models with one merged into each, which take turns

For every prompt all ways run in turns. Of each way the median of the ratios of times is printed, over that of the
case's first way, with the least and greatest, how many texts are the first way's, and the passes for a token; for a
case the lengths of the texts, since short ones say little. All ways run once before, which takes what is measured or
compiled once.
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


DRAFTERS = {"": None, ", drafter": "auto"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder or name of the model")
    parser.add_argument("--adapters", nargs="*", default=[], metavar="NAME=FOLDER", help="LoRA adapters of it")
    parser.add_argument("--gsm8k", type=Path, required=True, help="rows of the task, with `question`")
    parser.add_argument("--humaneval", type=Path, required=True, help="rows of the task, with `prompt`")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="some of these; default: all")
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
        files = {"GSM8K": (args.gsm8k, "question"), "HumanEval": (args.humaneval, "prompt")}
        self.tasks = {task: self._rows(*files[task]) for task in args.tasks}

    def _rows(self, file: Path, field: str) -> list[str]:
        return [json.loads(line)[field] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]

    def prompt(self, text: str, chat: bool = False) -> dict[str, torch.Tensor]:
        if not chat:
            return dict(self.tokenizer(text, return_tensors="pt"))
        messages = [{"role": "user", "content": text}]
        return dict(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        )

    def document(self, rows: list[str], number: int) -> str:
        """Other rows of the task, as many tokens of them as a document has."""
        others = rows[number + 1 :] + rows[:number]
        ids = self.tokenizer("\n\n".join(others[: 1 + self.args.document_tokens]))["input_ids"]
        return self.tokenizer.decode(ids[: self.args.document_tokens]) + "\n\n"

    def ensembles(self, inputs: dict, recipe: dict, model=None) -> dict[str, Callable]:
        """Separate passes, and the others named `way` and `way, drafter`: a recipe with other fields of its config."""

        def run(fields: dict, drafter: str | None):
            config = se.EnsembleConfig.from_dict(recipe["ensemble_config"].to_dict() | fields)
            return self.generate(model or self.model, inputs, **recipe | {"ensemble_config": config}, drafter=drafter)

        return {
            f"{way}{name}": lambda fields=fields, drafter=drafter: run(fields, drafter)
            for way, fields in (SEPARATE | SPECULATIVE).items()
            for name, drafter in (DRAFTERS if way in SPECULATIVE else {"": None}).items()
        }

    def generate(self, model, inputs: dict, **kwargs):
        settings = dict(max_new_tokens=self.args.max_new_tokens, do_sample=False, return_dict_in_generate=True)
        return model.generate(**inputs, **settings, **kwargs)


SEPARATE = {"separate passes": dict(speculative=False, share_passes=False)}
SPECULATIVE = {
    "taking turns": dict(share_passes=False),
    "one pass": dict(share_passes=True),
    "auto": dict(share_passes="auto"),
}
TASKS = ("GSM8K", "HumanEval")


def guidance(ways: Ways, rows: list[str], number: int) -> dict[str, Callable]:
    """Against the prompt's last tokens, as the paper has it."""
    inputs = ways.prompt(rows[number])
    negative = {name: ids[:, -4:] for name, ids in inputs.items()}
    theirs = dict(guidance_scale=1.5, negative_prompt_ids=negative["input_ids"])
    recipe = se.recipes.guidance(ways.model, negative, scale=1.5)
    return {"transformers": lambda: ways.generate(ways.model, inputs, **theirs)} | ways.ensembles(inputs, recipe)


def context_aware(ways: Ways, rows: list[str], number: int) -> dict[str, Callable]:
    inputs = ways.prompt(ways.document(rows, number) + rows[number])
    recipe = se.recipes.context_aware(ways.model, ways.prompt(rows[number]))
    return ways.ensembles(inputs, recipe)


def contexts(ways: Ways, rows: list[str], number: int) -> dict[str, Callable]:
    """Four documents with equal scores, behind the same beginning."""
    texts = [f"Read this.\n\n{ways.document(rows, (number + 7 * i) % len(rows))}{rows[number]}" for i in range(4)]
    first, *others = map(ways.prompt, texts)
    recipe = se.recipes.replug(ways.model, others, [1.0] * 4)
    return ways.ensembles(first, recipe)


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
    inputs, config = ways.prompt(rows[number], chat=True), se.EnsembleConfig()
    views = [se.with_adapter(ways.wrapped, name) for name in (*ways.names[1:], None)]
    main, *others = *ways.merged, ways.model
    adapted = dict(assistant_model=views, ensemble_config=config)
    merged = dict(assistant_model=others, ensemble_config=config)
    return ways.ensembles(inputs, adapted, ways.wrapped) | {
        f"merged{name}": lambda drafter=drafter: ways.generate(main, inputs, **merged, drafter=drafter)
        for name, drafter in DRAFTERS.items()
    }


CASES = {"guidance": guidance, "context-aware": context_aware, "contexts": contexts, "adapters": adapters}


def measured(run: Callable) -> tuple[float, list[int], float, int]:
    """Seconds, the text, and passes for a token and new tokens, where the package tells these."""
    start = time.perf_counter()
    out = run()
    seconds = time.perf_counter() - start
    stats = getattr(out, "stats", None)
    told = (float("nan"), 0) if stats is None else (stats.passes_per_token, stats.row_tokens[0])
    return seconds, out.sequences[0].tolist(), *told


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
            lengths: list[int] = []
            for number in range(-1, min(args.num_prompts, len(rows))):  # the first time nothing is kept
                results = {}
                for name, run in CASES[case](ways, rows, max(number, 0)).items():
                    if args.ways is None or name in args.ways:
                        results[name] = measured(run)
                first = next(iter(results.values()))
                lengths += [max(result[3] for result in results.values())] if number >= 0 else []
                for name, (seconds, new, a_token, _) in results.items() if number >= 0 else ():
                    ratios.setdefault(name, []).append(first[0] / seconds)
                    passes.setdefault(name, []).append(a_token)
                    same[name] = same.get(name, 0) + (new == first[1])
            print(f"  new tokens: {', '.join(map(str, lengths))}")
            for name, values in ratios.items():
                print(
                    f"  {name:28} {statistics.median(values):5.2f}x [{min(values):.2f}, {max(values):.2f}]  "
                    f"{same[name]}/{len(values)} texts alike  {statistics.median(passes[name]):.2f} passes a token",
                    flush=True,
                )


if __name__ == "__main__":
    main()
