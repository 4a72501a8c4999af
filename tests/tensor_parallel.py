"""Decodes with tensor-parallel members; what `test_ranks.py` runs in several processes, and in one.

    torchrun --nproc-per-node 2 tests/tensor_parallel.py FILE
    python tests/tensor_parallel.py FILE

Every process writes `FILE.RANK`, JSON: by case, the text and what was done for it.
"""

import json
import os
import random
import sys
import time

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

import hf_spec_ensemble as se
from hf_spec_ensemble.demo import FAMILY


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
PROMPTS = torch.tensor([[5, 60, 7, 81], [43, 6, 99, 12]])
CASES = {
    "greedy": dict(rows=1, do_sample=False, max_new_tokens=40),
    "sampled": dict(rows=1, do_sample=True, max_new_tokens=40),
    "maximal": dict(
        rows=2, do_sample=True, max_new_tokens=12, config=dict(coupling="maximal", num_assistant_tokens=2)
    ),
    "short": dict(rows=1, do_sample=True, max_new_tokens=16),
    "batch": dict(rows=2, do_sample=True, max_new_tokens=12),
    "drafted": dict(rows=1, do_sample=False, max_new_tokens=12, drafter="prompt_lookup"),
    "static": dict(rows=2, do_sample=False, max_new_tokens=12, cache_implementation="static"),
    "standard": dict(rows=1, do_sample=True, max_new_tokens=8, config=dict(speculative=False)),
}  # fmt: skip


class Late(StoppingCriteria):
    """Ends a text at a time that each process measures for itself."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    def __call__(self, input_ids, scores, **kwargs):
        done = time.perf_counter() > self.end and input_ids.shape[1] > 20
        return torch.full((len(input_ids),), done)


def load(name: str, sharded: bool):
    spread = dict(tp_plan="auto") if sharded and WORLD > 1 else {}
    return AutoModelForCausalLM.from_pretrained(FAMILY / name, dtype=torch.float64, **spread).eval()


def decode(models, rows: int, config: dict | None = None, **kwargs) -> list[list[int]]:
    torch.manual_seed(7 + RANK)  # the first process's is what counts
    return (
        models[0]
        .generate(
            PROMPTS[:rows],
            attention_mask=torch.ones_like(PROMPTS[:rows]),
            assistant_model=models[1:],
            ensemble_config=se.EnsembleConfig(**config or {}),
            eos_token_id=None,
            pad_token_id=0,
            **kwargs,
        )
        .tolist()
    )


def results() -> dict[str, list[list[int]]]:
    """Texts by layout of the members and case. What a clock ends is there only with several processes."""
    found = {}
    for layout, sharded, cases in (("both", (True, True), list(CASES)), ("one", (False, True), ["short"])):
        models = [load(name, parallel) for name, parallel in zip(("reader", "solver"), sharded)]
        if WORLD > 1:  # measured times differ by process
            for model in models:
                model.register_forward_pre_hook(lambda *_: time.sleep(RANK * random.random() * 0.002))
        for name in cases:
            found[f"{layout} {name}"] = decode(models, **CASES[name])
        if WORLD > 1:
            slow = StoppingCriteriaList([Late(0.4 + 0.4 * RANK)])
            found[f"{layout} stopped"] = decode(models, rows=1, max_new_tokens=640, stopping_criteria=slow)
    return found


if __name__ == "__main__":
    with open(f"{sys.argv[1]}.{RANK}", "w") as out:
        json.dump(results(), out)
