"""Ensembles from the command line: what its commands do. `options` has what they are given."""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TextStreamer, set_seed
from transformers.utils import logging

from ..config import CONFIG_NAME, EnsembleConfig
from ..decoding.drafter import is_named
from ..hub import Ensemble, MemberReference, load_ensemble, save_ensemble
from ..hub.folders import FILES
from ..hub.references import read_ensemble
from ..members.adapters import is_model
from ..trace import TraceStreamer
from ..trace.html import page_of
from . import options
from .arguments import check_device, config_of, default_device, drafter_of, locate


PROGRAMS = {"bench": "..bench.__main__", "fit": ".fit", "eval": ".harness"}  # commands with modules of their own


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = options.parse(argv)
    if argv[0] in PROGRAMS:
        return importlib.import_module(PROGRAMS[argv[0]], __package__).main(argv[1:])
    logging.set_verbosity_error()
    try:
        {"generate": _generate, "card": _card}[args.command](args)
    except (ValueError, OSError) as error:
        sys.exit(_said(f"{options.PROGRAM} {args.command}: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_said("Interrupted.", 130))


def _said(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _generate(args: argparse.Namespace) -> None:
    prompts = [*args.prompt, *(_lines(args.prompts) if args.prompts else [])]
    if not prompts:
        raise ValueError(f"there is nothing to ask: {args.prompts} has no prompts.")
    args.device = args.device or default_device()
    check_device(args.device)
    for option in ("trace", "show"):
        if getattr(args, option) and len(prompts) > 1:
            raise ValueError(f"--{option} shows one text, but there are {len(prompts)} prompts.")
    ensemble = _ensemble(args)
    if args.trace:
        ensemble.config.trace = True
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    alone, streamer = len(prompts) == 1, TraceStreamer if args.show else TextStreamer
    for prompt in tqdm(prompts, disable=alone, unit="prompt"):
        chat = ensemble.tokenizer.chat_template is not None
        inputs = ensemble.encode([{"role": "user", "content": prompt}] if chat else prompt)
        set_seed(args.seed)
        out = ensemble.generate(
            **inputs,
            max_new_tokens=args.max_new_tokens,
            do_sample=args.do_sample,
            **sampling,
            return_dict_in_generate=True,
            tokenizer=ensemble.tokenizer,
            streamer=streamer(ensemble.tokenizer, skip_prompt=True, skip_special_tokens=True) if alone else None,
        )
        if not alone:
            text = ensemble.tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            stats = {"passes_per_token": out.stats.passes_per_token, "seconds": out.stats.seconds} if args.stats else {}
            tqdm.write(json.dumps({"prompt": prompt, "text": text, **stats}, ensure_ascii=False))
        elif args.stats:
            print(f"\n{out.stats}", file=sys.stderr)
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
    local = [each.short_name for each in members if each.is_local]
    if local:
        print(f"Not ready for the Hub: {', '.join(local)} are folders of this machine. Push them, and name them.")


def _sources(args: argparse.Namespace) -> tuple[list[MemberReference], EnsembleConfig, MemberReference | str | None]:
    dtype = None if args.dtype == "auto" else args.dtype
    members = [MemberReference(locate(name), dtype=dtype) for name in args.members]
    drafter = drafter_of(args.drafter)
    if not is_named(drafter):
        drafter = MemberReference(locate(drafter), dtype=dtype)
    return members, config_of(vars(args).copy()), drafter


def _ensemble(args: argparse.Namespace) -> Ensemble:
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
