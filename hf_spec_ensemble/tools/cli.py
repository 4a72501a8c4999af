"""Ensembles from the command line: what its commands do. `options` has what they are given."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from tqdm.auto import tqdm
from transformers import TextStreamer, set_seed
from transformers.utils import logging

from ..batches import generate_as_completed
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
from .processes import Process, parts_of
from .results import Result, in_order, read_prompts, read_results, write_results


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
    prompts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts else [])]
    if not prompts:
        raise ValueError(f"there is nothing to ask: {args.prompts} has no prompts.")
    args.device = args.device or default_device()
    check_device(args.device)
    for option in ("trace", "show"):
        if getattr(args, option) and len(prompts) > 1:
            raise ValueError(f"--{option} shows one text, but there are {len(prompts)} prompts.")
    if len(prompts) > 1 or args.out:
        _many(args, prompts)
    else:
        _one(args, prompts[0])


def _one(args: argparse.Namespace, prompt: str) -> None:
    """Prints a text as it comes."""
    ensemble = _ensemble(args)
    if args.trace:
        ensemble.config.trace = True
    streamer = TraceStreamer if args.show else TextStreamer
    streamer = streamer(ensemble.tokenizer, skip_prompt=True, skip_special_tokens=True)
    set_seed(args.seed)
    inputs = ensemble.encode(_asked(ensemble, prompt))
    out = ensemble.generate(**inputs, **_settings(args, ensemble), return_dict_in_generate=True, streamer=streamer)
    if args.stats:
        print(f"\n{out.stats}", file=sys.stderr)
    if args.trace:
        args.trace.write_text(page_of(out.trace, title=prompt), encoding="utf-8")


def _many(args: argparse.Namespace, prompts: list[str]) -> None:
    """Writes JSON lines, to a file as texts are done, or prints them in the order of the prompts."""
    process = Process.of(os.environ)
    args.device = process.device(args.device)
    if process.world > 1 and not args.out:
        raise ValueError("several processes need --out: each writes its share to a file of its own.")
    own = args.out and process.part(args.out)
    done, size = read_results(own, prompts) if own else (set(), 0)
    for part in parts_of(args.out) if args.out else ():
        done |= read_results(part, prompts)[0]
    if done and process.leads:
        print(f"{len(done)} of {len(prompts)} prompts are in {args.out} already: skipped.", file=sys.stderr)
    left = [n for n in range(len(prompts)) if n not in done and process.rank_of(n) == process.rank]
    if not left:
        return
    ensemble = _ensemble(args)
    ensemble.config.trace = False
    reason = _apart(args, ensemble)
    if reason:
        print(f"Prompts are decoded one at a time: {reason}.", file=sys.stderr)
    texts = (_in_turn if reason else _together)(args, ensemble, prompts, left)
    with closing(texts):
        results = tqdm(texts, total=len(left), unit="prompt")
        if args.out:
            return write_results(own, size, results)
        for result in in_order(results):
            del result["number"]
            tqdm.write(json.dumps(result, ensure_ascii=False))


def _apart(args: argparse.Namespace, ensemble: Ensemble) -> str | None:
    """Why prompts cannot share a batch, if so."""
    if ensemble.model.config.is_encoder_decoder:
        return "the members are encoder-decoder models"
    if args.do_sample and ensemble.config.coupling == "maximal":
        return "with coupling maximal, samples depend on what shares the batch"
    return None


def _together(
    args: argparse.Namespace, ensemble: Ensemble, prompts: list[str], numbers: list[int]
) -> Iterator[Result]:  # fmt: skip
    """The results of the prompts with these numbers, as they are done."""
    set_seed(args.seed)
    inputs = ensemble.encode([_asked(ensemble, prompts[number]) for number in numbers])
    texts = generate_as_completed(
        ensemble.model,
        [ids[mask.bool()].tolist() for ids, mask in zip(inputs.pop("input_ids"), inputs.pop("attention_mask"))],
        inputs.get("assistant_model", ensemble.assistant_models),
        ensemble.config,
        assistant_tokenizer=ensemble.assistant_tokenizers,
        batch_size=args.batch_size,
        drafter=ensemble.drafter,
        numbers=numbers,
        **_settings(args, ensemble),
    )
    with closing(texts):
        for done in texts:
            text = ensemble.tokenizer.decode(done.generated_tokens, skip_special_tokens=True)
            yield {"number": done.number, "prompt": prompts[done.number], "text": text}
    if args.stats:
        print(done.stats, file=sys.stderr)


def _in_turn(
    args: argparse.Namespace, ensemble: Ensemble, prompts: list[str], numbers: list[int]
) -> Iterator[Result]:  # fmt: skip
    """As `_together`, by a `generate()` call for each."""
    for number in numbers:
        inputs = ensemble.encode(_asked(ensemble, prompts[number]))
        set_seed(args.seed + number)
        out = ensemble.generate(**inputs, **_settings(args, ensemble), return_dict_in_generate=True)
        start = 0 if ensemble.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        text = ensemble.tokenizer.decode(out.sequences[0, start:], skip_special_tokens=True)
        stats = {"passes_per_token": out.stats.passes_per_token, "seconds": out.stats.seconds} if args.stats else {}
        yield {"number": number, "prompt": prompts[number], "text": text, **stats}


def _asked(ensemble: Ensemble, prompt: str) -> str | list[dict]:
    """A prompt as a chat, if the main model has a template for one."""
    return [{"role": "user", "content": prompt}] if ensemble.tokenizer.chat_template is not None else prompt


def _settings(args: argparse.Namespace, ensemble: Ensemble) -> dict[str, Any]:
    """Of each text, for `generate()`."""
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    settings = dict(max_new_tokens=args.max_new_tokens, do_sample=args.do_sample, tokenizer=ensemble.tokenizer)
    return settings | sampling


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


if __name__ == "__main__":
    main()
