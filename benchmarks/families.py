"""
Measures an ensemble of two models with different tokenizers, in both orders.

    python benchmarks/families.py FOLDER/base FOLDER/gemma --gsm8k gsm8k.jsonl --humaneval humaneval.jsonl

Greedy mixtures of equal weights. Questions of GSM8K go through the chat template of every member. For every prompt the
standard ensemble, the speculative one and transformers' assisted generation with different tokenizers run in turns. The
last one decodes the main model alone, with the other as its assistant: what it is compared in is speed. Medians over
prompts are printed, with the least and the greatest ratio to the standard ensemble's time for a token, how many texts
are the standard ensemble's, acceptance, and the share of time outside passes. All ways run once before.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_spec_ensemble as se


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2, help="folders or names")
    parser.add_argument("--gsm8k", type=Path, required=True, help="rows of the task, with `question`")
    parser.add_argument("--humaneval", type=Path, required=True, help="rows of the task, with `prompt`")
    parser.add_argument("--num-prompts", type=int, default=8, help="of each task")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def rows(file: Path, field: str, count: int) -> list[str]:
    return [json.loads(line)[field] for line in file.read_text(encoding="utf-8").splitlines()[:count]]


def ways(models: list, tokenizers: list, inputs: dict, tokens: int) -> dict:
    """Functions that decode, by name."""
    both = dict(tokenizer=tokenizers[0], assistant_tokenizer=tokenizers[1], max_new_tokens=tokens)
    both |= dict(do_sample=False, return_dict_in_generate=True)

    def ensemble(**fields):
        return models[0].generate(**inputs, **both, ensemble_config=se.EnsembleConfig(**fields))

    return {
        "standard": lambda: ensemble(speculative=False),
        "speculative": ensemble,
        "assisted generation": lambda: models[0].generate(**inputs | {"assistant_model": models[1]}, **both),
    }


def measure(models: list, tokenizers: list, prompts: list, tokens: int) -> list[str]:
    """A line of the table for each way."""
    ratios, outputs, same = {}, {}, {}
    encode = se.Ensemble(models[0], models[1:], se.EnsembleConfig(), tokenizers[0], None, tokenizers[1:]).encode
    for number, prompt in enumerate([prompts[0], *prompts]):
        made, seconds, inputs = {}, {}, encode(prompt)
        for name, run in ways(models, tokenizers, inputs, tokens).items():
            start = time.perf_counter()
            made[name] = run()
            new = made[name].sequences.shape[1] - inputs["input_ids"].shape[1]
            seconds[name] = (time.perf_counter() - start) / max(new, 1)
        if number == 0:
            continue
        for name, out in made.items():
            ratios.setdefault(name, []).append(seconds["standard"] / seconds[name])
            outputs.setdefault(name, []).append(out)
            same.setdefault(name, []).append(out.sequences.tolist() == made["standard"].sequences.tolist())
    return [line(name, ratios[name], same[name], outputs[name]) for name in ratios]


def line(name: str, ratios: list[float], same: list[bool], outputs: list) -> str:
    spread = f"{statistics.median(ratios):.2f}x | {min(ratios):.2f} to {max(ratios):.2f} | {sum(same)} of {len(same)}"
    if not hasattr(outputs[0], "stats"):
        return f"| {name} | {spread} | | | |"
    stats = [out.stats for out in outputs]
    kept = [sum(one.accepted) / sum(one.verified) for one in stats if sum(one.verified)]
    outside = statistics.median(1 - sum(one.member_seconds) / one.seconds for one in stats)
    shown = f"{statistics.median(kept):.0%}" if kept else "-"
    passes = statistics.median(one.passes_per_token for one in stats)
    return f"| {name} | {spread} | {passes:.2f} | {shown} | {outside:.0%} |"


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype).eval() for name in args.models]
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in args.models]
    questions = rows(args.gsm8k, "question", args.num_prompts)
    tasks = {"GSM8K": [[{"role": "user", "content": question}] for question in questions]}
    tasks["HumanEval"] = rows(args.humaneval, "prompt", args.num_prompts)
    print("| | speed | range | same text | passes per token | acceptance | outside passes |\n" + "|---" * 7 + "|")
    for order in ((0, 1), (1, 0)):
        names = [args.models[i].rstrip("/").split("/")[-1] for i in order]
        for task, prompts in tasks.items():
            print(f"| **{' + '.join(names)}, {task}** | | | | | | |")
            made = measure([models[i] for i in order], [tokenizers[i] for i in order], prompts, args.max_new_tokens)
            print("\n".join(made), flush=True)


if __name__ == "__main__":
    main()
