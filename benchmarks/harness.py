"""
Measures lm_eval's texts in refilled rows against the harness's own batches, and against one text at a time.

    python benchmarks/harness.py FOLDER/base FOLDER/math --gsm8k gsm8k.jsonl --rows 100 --max-new-tokens 128

Greedy mixtures of equal weights, by the speculative ensemble, on rows of a local file: each question as plain text, and
the last number of the text as its answer. Each way is one run of the harness; the first one is repeated before, with a
batch of rows, and not measured. Of each way it prints seconds, the score, and texts equal to those of the first way.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from hf_spec_ensemble.tools.harness import SpecEnsembleLM


WAYS = ("refilled", "waiting", "one by one")
TASK = """
task: rows
output_type: generate_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer.split('### ')[-1].strip()}}}}"
generation_kwargs: {{until: ["Question:"], max_gen_toks: {tokens}, do_sample: false}}
filter_list:
  - name: last
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: [",", "\\\\$", "\\\\.$"]}}
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or names")
    parser.add_argument("--gsm8k", type=Path, required=True, help="rows of the task, with `question` and `answer`")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


class Waiting(SpecEnsembleLM):
    """In the harness's own batches."""

    def _can_share(self, context, settings):
        return False


def run(args: argparse.Namespace, way: str, limit: int | None = None) -> tuple[float, float, list[str]]:
    """Seconds, score and texts."""
    kind = Waiting if way == "waiting" else SpecEnsembleLM
    size = 1 if way == "one by one" else args.batch_size
    lm = kind(members="+".join(args.models), dtype=args.dtype, device="cpu", batch_size=size)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        rows.write_text("\n".join(args.gsm8k.read_text(encoding="utf-8").splitlines()[: args.rows]), encoding="utf-8")
        Path(folder, "rows.yaml").write_text(TASK.format(file=rows, tokens=args.max_new_tokens))
        tasks = TaskManager(include_path=folder, include_defaults=False)
        start = time.perf_counter()
        out = simple_evaluate(lm, tasks=["rows"], task_manager=tasks, limit=limit, bootstrap_iters=0)
        seconds = time.perf_counter() - start
    samples = sorted(out["samples"]["rows"], key=lambda sample: sample["doc_id"])
    return seconds, float(out["results"]["rows"]["exact_match,last"]), [sample["resps"][0][0] for sample in samples]


def main() -> None:
    args = arguments()
    logging.disable(logging.WARNING)
    if args.threads:
        torch.set_num_threads(args.threads)
    run(args, args.ways[0], limit=args.batch_size)
    first = None
    print("| | seconds | score | same text |\n" + "|---" * 4 + "|")
    for way in args.ways:
        seconds, score, texts = run(args, way)
        first = first or texts
        same = sum(a == b for a, b in zip(texts, first))
        print(f"| {way} | {seconds:.0f} | {score:.3f} | {same} of {len(texts)} |", flush=True)


if __name__ == "__main__":
    main()
