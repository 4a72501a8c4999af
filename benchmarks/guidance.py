"""
One model under two prompts (guidance, scale 1.5): how fast the speculative ensemble is, against separate passes of the
two members for every token and against transformers' own `guidance_scale`, in turns, prompt by prompt.

    python benchmarks/guidance.py FOLDER                  FOLDER as for run.sh: the model `base` and rows of the tasks
    python benchmarks/guidance.py FOLDER --num-prompts 2 --max-new-tokens 16
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_spec_ensemble as se
from hf_spec_ensemble.bench.tasks import TASKS, encode


SCALE = 1.5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="base", help="a folder in FOLDER (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.folder / args.model)
    model = AutoModelForCausalLM.from_pretrained(args.folder / args.model, dtype=args.dtype).eval()
    run = dict(max_new_tokens=args.max_new_tokens, do_sample=False)

    def seconds_per_token(prompt: torch.Tensor, **arguments) -> float:
        start = time.perf_counter()
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments, **run)
        return (time.perf_counter() - start) / (ids.shape[1] - prompt.shape[1])

    separate = dict(speculative=False, share_passes=False)
    print("| task | over separate passes | over transformers' guidance_scale |\n|---|---|---|")
    for name in ("gsm8k", "humaneval"):
        lines = (args.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ratios: dict[str, list[float]] = {"separate": [], "transformers": []}
        for i, line in enumerate(lines[: args.num_prompts + 1]):  # the first one warms up
            ids = torch.tensor([encode(TASKS[name], json.loads(line), [], tokenizer, chat=True)])
            negative = {"input_ids": ids[:, -1:]}  # the prompt's last token, as transformers has it by default
            times = {
                "speculative": seconds_per_token(ids, **se.recipes.guidance(model, negative, SCALE)),
                "separate": seconds_per_token(ids, **se.recipes.guidance(model, negative, SCALE, **separate)),
                "transformers": seconds_per_token(ids, guidance_scale=SCALE),
            }
            for other, found in ratios.items():
                if i:
                    found.append(times[other] / times["speculative"])
        print(f"| {name} | " + " | ".join(f"{statistics.median(found):.2f}x" for found in ratios.values()) + " |")


if __name__ == "__main__":
    main()
