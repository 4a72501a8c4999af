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
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, LlamaForCausalLM

import hf_spec_ensemble as se
from hf_spec_ensemble.bench.curves import measure_curves
from hf_spec_ensemble.members.runner import Running


SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49152),  # SmolLM2
    "1B": (2048, 8192, 16, 32, 8, 128256),  # Llama 3.2
    "8B": (4096, 14336, 32, 32, 8, 128256),  # Llama 3.1
}
PROFILED = 16  # tokens, the prompt's pass among them: profiles are slow
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


def random_model(shape: str, dtype: str, device: str, seed: int = 0) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=True,
        rms_norm_eps=1e-5, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def passes(args: argparse.Namespace) -> list[dict]:
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


def launches(args: argparse.Namespace) -> list[dict]:
    if args.members:
        dtype = getattr(torch, args.dtype)
        models = [
            AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(args.device).eval() for name in args.members
        ]
    else:
        models = [random_model(args.shapes[0], args.dtype, args.device, seed) for seed in range(2)]
    ids = torch.randint(3, 1000, (1, args.prompt)).to(args.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ways = {"eager": {}}
    if args.compiled:
        ways["compiled"] = dict(cache_implementation="static", max_cache_len=args.prompt + args.max_new_tokens)
        se.warmup(models, args.prompt + args.max_new_tokens, widths=args.widths, progress=False)
    rows = []
    print("| passes | ensemble | ms a token | passes a token | launches | graphs | copies | waits | CPU ms outside |")
    print("|---|---|---|---|---|---|---|---|---|")
    for way, static in ways.items():
        for temperature in (0, 1):
            for name, speculative in (("standard", False), ("speculative", True)):
                config = se.EnsembleConfig(speculative=speculative)
                run = dict(
                    **inputs, **static, assistant_model=models[1:], ensemble_config=config, eos_token_id=None,
                    max_new_tokens=args.max_new_tokens, do_sample=temperature > 0, return_dict_in_generate=True,
                )  # fmt: skip
                for seed in range(2):
                    torch.manual_seed(seed)
                    models[0].generate(**run)
                torch.manual_seed(5)
                _synchronize(args.device)
                start = time.perf_counter()
                out = models[0].generate(**run)
                _synchronize(args.device)
                seconds = time.perf_counter() - start
                torch.manual_seed(5)
                with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=False) as profiled:
                    models[0].generate(**run | dict(max_new_tokens=PROFILED))
                    _synchronize(args.device)
                counts = Counter(event.name() for event in profiled.profiler.kineto_results.events())
                tokens = args.max_new_tokens
                stats = getattr(out, "stats", None)
                row = {
                    "way": way, "ensemble": name, "temperature": temperature, "ms": 1000 * seconds / tokens,
                    "passes": sum(stats.forward_passes) / tokens if stats else None,
                    "launches": sum(n for key, n in counts.items() if "LaunchKernel" in key) / PROFILED,
                    "graphs": counts["cudaGraphLaunch"] / PROFILED,
                    "copies": sum(n for key, n in counts.items() if key.startswith("cudaMemcpy")) / PROFILED,
                    "waits": sum(counts[key] for key in WAITS) / PROFILED,
                    "member_ms": 1000 * sum(stats.member_seconds) / tokens if stats else None,
                }  # fmt: skip
                rows.append(row)
                passes = "" if row["passes"] is None else f"{row['passes']:.2f}"
                outside = "" if row["member_ms"] is None else f"{row['ms'] - row['member_ms']:.2f}"
                print(
                    f"| {way} | {name}, T = {temperature} | {row['ms']:.2f} | {passes} | {row['launches']:.0f} | "
                    f"{row['graphs']:.2f} | {row['copies']:.1f} | {row['waits']:.1f} | {outside} |", flush=True,
                )  # fmt: skip
    return rows


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    args = parse_arguments()
    rows = {"passes": passes, "launches": launches}[args.what](args)
    if args.out is not None:
        args.out.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
