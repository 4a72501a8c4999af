"""
What a GPU does for a token: the seconds of passes over several tokens, eager and with CUDA graphs, for models of the
sizes of Llama 3 with random weights; and, for members in FOLDER or random ones, the kernels that are launched and the
times that the CPU waits for the GPU.

    python benchmarks/gpu.py passes --shapes 135M 1B 8B --compiled
    python benchmarks/gpu.py launches FOLDER/base FOLDER/math --compiled
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, PreTrainedModel
from transformers.utils import ModelOutput

import hf_spec_ensemble as se
from hf_spec_ensemble.bench.curves import measure_curves
from hf_spec_ensemble.members.runner import Running


SHAPES = {  # hidden and intermediate sizes, layers, heads, heads of keys and values, vocabulary
    "135M": (576, 1536, 30, 9, 3, 49152),  # SmolLM2
    "1B": (2048, 8192, 16, 32, 8, 128256),  # Llama 3.2
    "8B": (4096, 14336, 32, 32, 8, 128256),  # Llama 3.1
}
PROFILED = (1, 17)  # new tokens of two calls, whose difference is counted: profiles are slow
FIGURES = ("ms a token", "passes a token", "launches", "graphs", "copies", "waits", "ms in passes")  # for each token
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["passes", "launches"])
    parser.add_argument("members", nargs="*", help="folders or names; without, two random ones of the first shape")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135M"])
    parser.add_argument("--compiled", action="store_true", help="with CUDA graphs as well")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=200, help="tokens (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="a file for the numbers, as JSON")
    return parser.parse_args()


def random_model(shape: str, dtype: str, device: str, seed: int = 0) -> PreTrainedModel:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=True,
        rms_norm_eps=1e-5, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def measure_passes(args: argparse.Namespace) -> list[dict]:
    rows = []
    print("| shape | batch | passes | " + " | ".join(f"{w} tokens" for w in args.widths) + " |")
    print("|" + "---|" * (3 + len(args.widths)))
    for shape in args.shapes:
        model = random_model(shape, args.dtype, args.device)
        for batch in args.batch_sizes:
            ids = torch.randint(3, 1000, (batch, args.prompt)).to(args.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for way in ["eager", "compiled"] if args.compiled else ["eager"]:
                longest = args.prompt + args.max_new_tokens
                running = Running() if way == "eager" else Running(longest, True, CompileConfig())
                if way == "compiled":
                    start = time.perf_counter()
                    se.warmup([model], longest, batch, widths=args.widths, progress=False)
                    print(f"compiled {shape} in {time.perf_counter() - start:.0f} s", flush=True)
                curve = measure_curves({shape: model}, inputs, running, args.max_new_tokens, widths=args.widths)[shape]
                rows.append({"shape": shape, "batch": batch, "way": way, "dtype": args.dtype} | curve)
                cells = [f"{1000 * s:.2f} ({s / curve['seconds'][0]:.2f})" for s in curve["seconds"]]
                print(f"| {shape} | {batch} | {way} | " + " | ".join(cells) + " |", flush=True)
        del model
        torch.cuda.empty_cache()
    return rows


def count_launches(args: argparse.Namespace) -> list[dict]:
    if args.members:
        dtype = getattr(torch, args.dtype)
        loaded = [AutoModelForCausalLM.from_pretrained(name, dtype=dtype) for name in args.members]
        models = [model.to(args.device).eval() for model in loaded]
    else:
        models = [random_model(args.shapes[0], args.dtype, args.device, seed) for seed in range(2)]
    longest = args.prompt + args.max_new_tokens
    ways = {"eager": {}}
    if args.compiled:
        ways["compiled"] = dict(cache_implementation="static", max_cache_len=longest)
        se.warmup(models, longest, widths=args.widths, progress=False)
    rows = []
    print("| passes | ensemble | " + " | ".join(FIGURES) + " |")
    print("|" + "---|" * (2 + len(FIGURES)))
    for (way, caches), temperature, speculative in product(ways.items(), (0, 1), (False, True)):
        run = partial(
            decode, models, args, **caches, do_sample=temperature > 0,
            ensemble_config=se.EnsembleConfig(speculative=speculative),
        )  # fmt: skip
        for seed in range(2):  # warms up
            run(args.max_new_tokens, seed)
        out, seconds = run(args.max_new_tokens, 5)
        few, more = (launched(partial(run, tokens, 5)) for tokens in PROFILED)
        each = {name: (more[name] - few[name]) / (PROFILED[1] - PROFILED[0]) for name in more}
        name = f"{'speculative' if speculative else 'standard'}, T = {temperature}"
        row = {
            "way": way, "ensemble": name, "ms a token": 1000 * seconds / args.max_new_tokens,
            "passes a token": sum(out.stats.forward_passes) / args.max_new_tokens, **each,
        }  # fmt: skip
        if speculative:  # else transformers' own loop is counted with them
            row["ms in passes"] = 1000 * sum(out.stats.member_seconds) / args.max_new_tokens
        rows.append(row)
        figures = [f"{row[key]:.1f}" if key in row else "" for key in FIGURES]
        print(f"| {way} | {name} | " + " | ".join(figures) + " |", flush=True)
    return rows


def decode(models, args: argparse.Namespace, new_tokens: int, seed: int, **kwargs) -> tuple[ModelOutput, float]:
    """The output, and the seconds that it took."""
    torch.manual_seed(seed)
    ids = torch.randint(3, models[0].config.vocab_size, (1, args.prompt)).to(args.device)
    _synchronize(args.device)
    start = time.perf_counter()
    out = models[0].generate(
        ids, attention_mask=torch.ones_like(ids), assistant_model=models[1:], eos_token_id=None,
        max_new_tokens=new_tokens, return_dict_in_generate=True, **kwargs,
    )  # fmt: skip
    _synchronize(args.device)
    return out, time.perf_counter() - start


def launched(call: Callable[[], object]) -> dict[str, int]:
    """What a call gives the GPU to do: kernels, graphs, copies to and from the CPU, and how often the CPU waits."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=False) as profiled:
        call()
    counts = Counter(event.name() for event in profiled.profiler.kineto_results.events())
    return {
        "launches": sum(n for name, n in counts.items() if "LaunchKernel" in name),
        "graphs": counts["cudaGraphLaunch"],
        "copies": sum(n for name, n in counts.items() if name.startswith(("Memcpy HtoD", "Memcpy DtoH"))),
        "waits": sum(counts[name] for name in WAITS),
    }


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def main() -> None:
    args = parse_arguments()
    rows = {"passes": measure_passes, "launches": count_launches}[args.what](args)
    if args.out is not None:
        args.out.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
