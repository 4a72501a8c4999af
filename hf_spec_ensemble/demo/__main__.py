"""
Decodes one prompt with the standard and with the speculative ensemble, in turns, and shows both side by side.

    python -m hf_spec_ensemble.demo
    python -m hf_spec_ensemble.demo "Jacob is 24 years now. His brother Tony is half Jacob's age. How old is Tony?"
    python -m hf_spec_ensemble.demo --assistant-model solver --assistant-model draft --do-sample
    python -m hf_spec_ensemble.demo --model ./base --assistant-model ./math --weights 0.6 0.4

Models are local folders or names on the Hub. `reader`, `solver` and `draft` are embedded in the package. They are only
there to run without a download: most of their answers are wrong.
"""

import argparse
import statistics
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging

from .. import EnsembleConfig, EnsembleDecoderOnlyOutput
from ..config import AUTO
from ..decoding.drafter import chosen_drafter, is_named
from ..decoding.names import EARLIER_TEXT
from ..tools.arguments import config_of, drafter_of, encode, locate
from ..tools.options import add_config_arguments, add_drafter_argument
from . import FAMILY


# Of GSM8K's training set, which the embedded models were trained on; they answer it correctly.
PROMPT = (
    "A package of candy has 3 servings with 120 calories each.  John eats half the package.  How many calories did he "
    "eat?"
)
NOTE = "The embedded models are only there to run without a download: most of their answers are wrong."


def parse_arguments(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hf_spec_ensemble.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", nargs="?", default=PROMPT, help="the prompt (default: a question of GSM8K)")
    parser.add_argument("--model", default="reader", help="the main model (default: %(default)s)")
    parser.add_argument("--assistant-model", action="append", help="another member; may be repeated (default: solver)")
    add_drafter_argument(parser)
    config = add_config_arguments(parser)
    config.add_argument(
        "--num-assistant-tokens",
        type=int,
        nargs="+",
        metavar="K",
        help="tokens that a member proposes in a turn: one number, or one for each member (default: chosen from "
        "measured costs)",
    )
    config.add_argument(
        "--no-alternate", dest="alternate", action="store_false",
        help="only the drafter proposes, or without one the smallest member (default: members alternate)",
    )  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument("--max-new-tokens", type=int, default=128, help="the longest text (default: %(default)s)")
    run.add_argument("--do-sample", action="store_true", help="sample (default: greedy)")
    run.add_argument("--temperature", type=float, default=1.0, help="with --do-sample (default: %(default)s)")
    run.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    run.add_argument("--repeats", type=int, default=5, help="pairs of runs; times are medians (default: %(default)s)")
    run.add_argument("--dtype", default="float32", help="dtype of all models (default: %(default)s)")
    run.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="a device of torch (default: %(default)s)",
    )
    return parser.parse_args(args)


def run(models: list[PreTrainedModel], drafter, inputs, config: EnsembleConfig, args) -> EnsembleDecoderOnlyOutput:
    set_seed(args.seed)
    sampling = dict(do_sample=True, temperature=args.temperature) if args.do_sample else dict(do_sample=False)
    return models[0].generate(
        **inputs,
        assistant_model=models[1:],
        ensemble_config=config,
        drafter=drafter if config.speculative else None,
        max_new_tokens=args.max_new_tokens,
        return_dict_in_generate=True,
        **sampling,
    )


def report(names: list[str], texts: dict[str, str], outputs: dict[str, list], args) -> str:
    """The two decodings as text: what they say, whether that is the same, and what they cost."""
    standard, speculative = (outputs[name][-1] for name in ("standard", "speculative"))
    ratios = [a.stats.seconds / b.stats.seconds for a, b in zip(outputs["standard"], outputs["speculative"])]
    same = torch.equal(standard.sequences, speculative.sequences)
    embedded = {folder.name for folder in FAMILY.iterdir()}
    lines = [f"Prompt: {args.prompt}", *([NOTE] if embedded & set(names) else []), ""]
    if same:
        lines += [f"Both:\n{texts['speculative']}", "", "Tokens: identical"]
    else:
        lines += [f"Standard:\n{texts['standard']}", "", f"Speculative:\n{texts['speculative']}", ""]
        drawn = args.do_sample and args.coupling == "maximal"
        lines += [
            "Tokens: not identical; both are draws from the same distribution (--coupling auto draws the same text)"
            if drawn
            else "Tokens: NOT identical"
        ]
    rows = [("new tokens", "{:.0f}", lambda s: s.new_tokens)]
    for i, name in enumerate(names):
        rows.append((f"forward passes of {name}", "{:.0f}", lambda s, i=i: _entry(s.forward_passes, i)))
    rows.append(("forward passes per token", "{:.2f}", lambda s: s.passes_per_token))
    for i, name in enumerate(names):
        rows.append((f"acceptance of {name}'s proposals", "{:.0%}", lambda s, i=i: _entry(s.acceptance, i)))
    width = max(len(label) for label, *_ in rows) + 2
    lines += ["", f"{'':{width}}{'standard':>12}{'speculative':>13}"]
    for label, form, value in rows:
        pair = [value(out.stats) for out in (standard, speculative)]
        shown = ["-" if x is None else form.format(x) for x in pair]
        lines.append(f"{label:{width}}{shown[0]:>12}{shown[1]:>13}")
    medians = [statistics.median(o.stats.seconds for o in outputs[name]) for name in ("standard", "speculative")]
    lines.append(f"{'seconds (median)':{width}}{medians[0]:>12.2f}{medians[1]:>13.2f}")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    lines += ["", f"Speed ratio: {statistics.median(ratios):.2f}x (median of {len(ratios)} pairs of runs, {spread})"]
    return "\n".join(lines)


def _entry(by_author: list, i: int):
    """The standard ensemble has no drafter."""
    return by_author[i] if i < len(by_author) else None


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    names = [args.model, *(args.assistant_model or ["solver"])]
    lengths = args.num_assistant_tokens or [AUTO]
    config = config_of(
        vars(args).copy(),
        num_assistant_tokens=lengths[0] if len(lengths) == 1 else lengths,
        alternate=args.alternate,
    )
    logging.disable_progress_bar()

    def load(name: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(locate(name), dtype=args.dtype).to(args.device).eval()

    models, drafter = [load(name) for name in names], drafter_of(args.drafter)
    if chosen_drafter(drafter, config) is not None:
        names.append(f"{EARLIER_TEXT if drafter == AUTO else drafter} (drafter)")
    drafter = drafter if is_named(drafter) else load(drafter)
    tokenizer = AutoTokenizer.from_pretrained(locate(args.model))
    inputs = encode(tokenizer, args.prompt).to(args.device)

    configs = {"standard": replace(config, speculative=False), "speculative": config}
    outputs: dict[str, list] = {name: [] for name in configs}
    for repeat in range(args.repeats + 1):
        for name, one in configs.items():
            out = run(models, drafter, inputs, one, args)
            if repeat > 0:  # the first runs warm up
                outputs[name].append(out)
    prompt_length = inputs["input_ids"].shape[1]
    texts = {
        name: tokenizer.decode(out[-1].sequences[0, prompt_length:], skip_special_tokens=True).strip()
        for name, out in outputs.items()
    }
    print(report([name.rstrip("/").split("/")[-1] for name in names], texts, outputs, args))


if __name__ == "__main__":
    main()
