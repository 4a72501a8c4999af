"""
Measures refilled rows against batches that wait for their longest text.

    python benchmarks/batches.py FOLDER/base FOLDER/math --gsm8k gsm8k.jsonl --humaneval humaneval.jsonl --out FILE

Greedy mixtures of equal weights, through the chat template; texts end where the models end them. Four ways, the
standard and the speculative ensemble, each waiting and refilled, decode one chunk of a task's rows after the other, in
turns. Each chunk is one call of `generate_batch`, or a call of `generate()` for each batch. Every measurement is
appended to the file; the same command goes on where it was interrupted. All ways decode one batch before, not measured.

Printed are the time in all, tokens per second, the speed over the same method in waiting batches, texts equal to those
of the first way, forward passes per token, and the shares of time outside passes and in wide passes, over more than 20
tokens a row: those over prompts, and over long drafts. Lengths alone bound what refilling brings: the steps that rows
take in waiting batches for each token, `B * sum(longest of each batch) / sum(lengths)`, stand beside the task's name.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_spec_ensemble as se
from hf_spec_ensemble.ensemble.padded import left_padded


WAYS = ("standard waiting", "standard refilled", "speculative waiting", "speculative refilled")
WARM_UP = 24  # new tokens
WIDE = 20  # tokens in a row of a pass; wider ones read prompts, or verify long drafts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2, help="folders or names")
    parser.add_argument("--gsm8k", type=Path, required=True, help="rows of the task, with `question`")
    parser.add_argument("--humaneval", type=Path, required=True, help="rows of the task, with `prompt`")
    parser.add_argument("--tasks", nargs="+", default=["GSM8K", "HumanEval"], choices=["GSM8K", "HumanEval"])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--rows", type=int, default=64, help="of each task")
    parser.add_argument("--chunk", type=int, default=64, help="rows that one way decodes before it is another's turn")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, to which measurements are appended")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no measurement after so long")
    return parser.parse_args()


class Ways:
    """The four ways, as functions of prompts that give texts and the number of forward passes."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.models = [AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype).eval() for name in args.models]
        self.tokenizer = AutoTokenizer.from_pretrained(args.models[0])
        self.ends = self.models[0].generation_config.eos_token_id
        self.ends = self.ends if isinstance(self.ends, list) else [self.ends]
        self._passes: list[tuple[int, float]] = []  # tokens a row, seconds
        for model in self.models:
            model.register_forward_pre_hook(self._begin)
            model.register_forward_hook(self._end, with_kwargs=True)

    def _begin(self, *_) -> None:
        self._start = time.perf_counter()

    def _end(self, model, args, kwargs, output) -> None:
        self._passes.append((kwargs["input_ids"].shape[1], time.perf_counter() - self._start))

    def prompts(self, file: Path, field: str) -> list[list[int]]:
        lines = file.read_text(encoding="utf-8").splitlines()[: self.args.rows]
        chats = [[{"role": "user", "content": json.loads(line)[field]}] for line in lines]
        return [self.tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]

    def decode(self, way: str, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """The texts, with the tokens that end them."""
        method, rows = way.split()
        settings = dict(
            assistant_model=self.models[1],
            ensemble_config=se.EnsembleConfig(speculative=method == "speculative"),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        if rows == "refilled":
            results = se.generate_batch(
                self.models[0], prompts, batch_size=self.args.batch_size, progress_bar=False, **settings
            )
            return [result.generated_tokens for result in results.values()]
        texts, size = [], self.args.batch_size
        for batch in (prompts[at : at + size] for at in range(0, len(prompts), size)):
            ids, mask = left_padded(batch)
            out = self.models[0].generate(ids, attention_mask=mask, **settings)
            texts += map(self._until_end, out[:, ids.shape[1] :].tolist())
        return texts

    def _until_end(self, row: list[int]) -> list[int]:
        return next((row[: i + 1] for i, token in enumerate(row) if token in self.ends), row)

    def measured(self, way: str, prompts: list[list[int]]) -> dict:
        self._passes.clear()
        start = time.perf_counter()
        texts = self.decode(way, prompts, self.args.max_new_tokens)
        return {
            "seconds": time.perf_counter() - start,
            "passes": len(self._passes),
            "in_passes": sum(seconds for _, seconds in self._passes),
            "in_wide": sum(seconds for width, seconds in self._passes if width > WIDE),
            "texts": texts,
        }


def measure(args: argparse.Namespace, records: dict[tuple, dict]) -> None:
    """Measures what the records lack, till time is over."""
    start, ways = time.perf_counter(), Ways(args)
    warmed = set()
    files = {"GSM8K": (args.gsm8k, "question"), "HumanEval": (args.humaneval, "prompt")}
    for task in args.tasks:
        prompts = ways.prompts(*files[task])
        for number, at in enumerate(range(0, len(prompts), args.chunk)):
            turn = number % len(args.ways)
            for way in [*args.ways[turn:], *args.ways[:turn]]:
                key = {"task": task, "way": way, "at": at}
                if tuple(key.values()) in records:
                    continue
                if time.perf_counter() - start > args.seconds:
                    return
                if way not in warmed:
                    ways.decode(way, prompts[: args.batch_size], WARM_UP)
                    warmed.add(way)
                record = key | {"threads": torch.get_num_threads()} | ways.measured(way, prompts[at : at + args.chunk])
                with args.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                records[tuple(key.values())] = record


def read(file: Path) -> dict[tuple, dict]:
    lines = file.read_text().splitlines() if file.exists() else []
    found = map(json.loads, lines)
    return {(record["task"], record["way"], record["at"]): record for record in found}


def report(args: argparse.Namespace, records: dict[tuple, dict]) -> list[str]:
    """A table of the chunks that all ways have decoded."""
    head = "| | seconds | tokens/s | speed over waiting | same text | passes per token | outside passes | wide passes |"
    lines = [head, "|---" * 8 + "|"]
    for task in args.tasks:
        chunks = sorted({at for name, _, at in records if name == task})
        chunks = [at for at in chunks if all((task, way, at) in records for way in args.ways)]
        if not chunks:
            continue
        of_way: dict[str, list[dict]] = {way: [records[task, way, at] for at in chunks] for way in args.ways}
        total = {way: sum(record["seconds"] for record in of_way[way]) for way in args.ways}
        first = [text for record in of_way[args.ways[0]] for text in record["texts"]]
        lengths, size = list(map(len, first)), args.batch_size
        longest = sum(size * max(lengths[at : at + size]) for at in range(0, len(lengths), size))
        ratio = f"{longest / sum(lengths):.2f} steps of a row per token in waiting batches"
        lines.append(f"| **{task}**, {len(lengths)} rows, {sum(lengths)} tokens, {ratio} | | | | | | | |")
        for way in args.ways:
            texts = [text for record in of_way[way] for text in record["texts"]]
            tokens, passes = sum(map(len, texts)), sum(record["passes"] for record in of_way[way])
            waiting = total.get(f"{way.split()[0]} waiting")
            same = sum(a == b for a, b in zip(texts, first))
            speed = f"{waiting / total[way]:.2f}x" if waiting else ""
            cells = [way, f"{total[way]:.0f}", f"{tokens / total[way]:.1f}", speed, f"{same} of {len(first)}"]
            inside, wide = (sum(one[name] for one in of_way[way]) / total[way] for name in ("in_passes", "in_wide"))
            cells += [f"{passes / tokens:.2f}", f"{1 - inside:.0%}", f"{wide:.0%}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    records = read(args.out)
    measure(args, records)
    print("\n".join(report(args, records)))


if __name__ == "__main__":
    main()
