"""
Ensembles from the command line.

    hf-spec-ensemble generate "Tom has 3 boxes with 12 pencils each. How many has he?" --members reader solver
    hf-spec-ensemble generate --ensemble FOLDER --prompts prompts.txt > texts.jsonl
    hf-spec-ensemble generate "Why is the sky blue?" --members ./base ./math --weights 0.6 0.4 --trace trace.html
    hf-spec-ensemble bench --members ./base ./math --tasks gsm8k
    hf-spec-ensemble eval --model_args members=./base+./math --tasks arc_easy
    hf-spec-ensemble fit --members ./base ./math --data-file rows.jsonl --columns question answer --out FOLDER
    hf-spec-ensemble card FOLDER --members org/base org/math --weights 0.6 0.4

Models are folders or names on the Hub; `reader`, `solver` and `draft` are embedded in the package.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import TextStreamer, set_seed
from transformers.utils import logging

from ..config import CONFIG_NAME, EnsembleConfig
from ..decoding.drafter import is_named
from ..hub import Ensemble, MemberReference, load_ensemble, save_ensemble
from ..hub.folders import FILES
from ..hub.references import read_ensemble
from ..members.adapters import is_model
from ..trace.html import page_of
from .arguments import add_config_arguments, add_drafter_argument, check_device, config_of, drafter_of, encode, locate


ELSEWHERE = {  # commands with options of their own, and what these need installed
    "bench": ("..bench.__main__", "measure an ensemble (extra `bench`)"),
    "fit": (".fit", "find the weights that make texts most likely, and write the ensemble's folder"),
    "eval": (".harness", "score an ensemble on the tasks of lm-evaluation-harness (extra `lm_eval`)"),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="hf-spec-ensemble", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="decode prompts with an ensemble")
    generate.add_argument("prompt", nargs="*", help="what to ask")
    generate.add_argument("--prompts", type=Path, metavar="FILE", help="more prompts, one a line; - for standard input")
    _add_members(generate, "or: an ensemble that was saved, a folder or a repository on the Hub")
    run = generate.add_argument_group("run")
    run.add_argument("--max-new-tokens", type=int, default=256)
    run.add_argument("--do-sample", action="store_true")
    run.add_argument("--temperature", type=float)
    run.add_argument("--top-p", type=float)
    run.add_argument("--top-k", type=int)
    run.add_argument("--seed", type=int, default=0, help="of samples")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    out = generate.add_argument_group("output: the text as it comes, or for several prompts JSON lines")
    out.add_argument("--stats", action="store_true", help="print what it took, too")
    out.add_argument("--trace", type=Path, metavar="FILE", help="write who proposed what, as an HTML page")

    for name, (_, what) in ELSEWHERE.items():
        commands.add_parser(name, add_help=False, help=what)

    card = commands.add_parser("card", help="write an ensemble's folder for the Hub, or its model card anew")
    card.add_argument("folder", type=Path)
    _add_members(card, None)
    card.add_argument("--license", help='the Hub\'s name of one, as "apache-2.0"')
    card.add_argument("--repo-id", help="where it will be on the Hub, for the card's examples")
    card.add_argument("--speedup", help='measured, for the card: "1.7x on GSM8K (bfloat16, two CPU cores)"')
    return made


def _add_members(command: argparse.ArgumentParser, saved: str | None) -> None:
    command.add_argument("--members", nargs="+", metavar="MODEL", help="the main model first")
    if saved:
        command.add_argument("--ensemble", metavar="FOLDER", help=saved)
    add_drafter_argument(command)
    command.add_argument("--dtype", default="auto", help="of all models (default: as they were saved)")
    add_config_arguments(command)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ELSEWHERE:
        module = importlib.import_module(ELSEWHERE[argv[0]][0], __package__)
        return module.main(argv[1:])
    made = parser()
    args = made.parse_args(argv)
    logging.set_verbosity_error()
    try:
        {"generate": _generate, "card": _card}[args.command](args)
    except (ValueError, OSError) as error:
        made.exit(2, f"{made.prog} {args.command}: {error}\n")
    except KeyboardInterrupt:
        made.exit(130, "Interrupted.\n")


def _generate(args: argparse.Namespace) -> None:
    prompts = [*args.prompt, *(_lines(args.prompts) if args.prompts else [])]
    if not prompts:
        raise ValueError("there is nothing to ask: give a prompt, or --prompts FILE.")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty: say what to ask.")
    check_device(args.device)
    if args.trace and len(prompts) > 1:
        raise ValueError(f"--trace shows one text, but there are {len(prompts)} prompts.")
    ensemble = _ensemble(args)
    if args.trace:
        ensemble.config.trace = True
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if sampling and not args.do_sample:
        raise ValueError(f"--{next(iter(sampling)).replace('_', '-')} needs --do-sample.")
    alone = len(prompts) == 1
    for prompt in tqdm(prompts, disable=alone, unit="prompt"):
        inputs = encode(ensemble.tokenizer, prompt).to(ensemble.model.device)
        set_seed(args.seed)
        out = ensemble.generate(
            **inputs,
            max_new_tokens=args.max_new_tokens,
            do_sample=args.do_sample,
            **sampling,
            return_dict_in_generate=True,
            tokenizer=ensemble.tokenizer,
            streamer=TextStreamer(ensemble.tokenizer, skip_prompt=True, skip_special_tokens=True) if alone else None,
        )
        if not alone:
            text = ensemble.tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            stats = {"passes_per_token": out.stats.passes_per_token, "seconds": out.stats.seconds} if args.stats else {}
            tqdm.write(json.dumps({"prompt": prompt, "text": text, **stats}, ensure_ascii=False))
        elif args.stats:
            shares = ", ".join("-" if share is None else f"{share:.0%}" for share in out.stats.acceptance)
            print(
                f"\n{out.stats.new_tokens} tokens in {out.stats.seconds:.2f} s; forward passes "
                f"{out.stats.forward_passes}, {out.stats.passes_per_token:.2f} a token; acceptance {shares}",
                file=sys.stderr,
            )
        if args.trace:
            args.trace.write_text(page_of(out.trace, title=prompt), encoding="utf-8")


def _card(args: argparse.Namespace) -> None:
    file = args.folder / CONFIG_NAME
    if args.members:
        members, config, drafter = _sources(args)
    elif file.is_file():
        config, members, drafter = read_ensemble(file)
    else:
        raise ValueError(f"{file} does not exist: say which ensemble it is, with --members and the options below it.")
    save_ensemble(args.folder, members, config, drafter, args.repo_id, args.speedup, args.license)
    print(f"Written: {', '.join(str(args.folder / name) for name in FILES)}")


def _sources(args: argparse.Namespace) -> tuple[list[MemberReference], EnsembleConfig, MemberReference | str | None]:
    dtype = None if args.dtype == "auto" else args.dtype
    members = [MemberReference(locate(name), dtype=dtype) for name in args.members]
    drafter = drafter_of(args.drafter)
    if not is_named(drafter):
        drafter = MemberReference(locate(drafter), dtype=dtype)
    return members, config_of(vars(args).copy()), drafter


def _ensemble(args: argparse.Namespace) -> Ensemble:
    if bool(args.members) == bool(args.ensemble):
        raise ValueError("say which ensemble: --members MODEL MODEL, or --ensemble FOLDER.")
    logging.disable_progress_bar()  # of weights, a bar for each model
    ensemble = load_ensemble(args.ensemble) if args.ensemble else Ensemble.load(*_sources(args))
    for model in (ensemble.model, *ensemble.assistant_models, ensemble.drafter):
        if is_model(model):
            model.to(args.device)
    return ensemble


def _lines(file: Path) -> Iterator[str]:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}.") from None
    return (line for line in text.splitlines() if line.strip())


if __name__ == "__main__":
    main()
