"""
Weights from the command line: an ensemble's folder, with those that make the texts of a file most likely.

    hf-spec-ensemble fit --members ./base ./math --data-file rows.jsonl --columns question answer --out FOLDER
    hf-spec-ensemble generate --ensemble FOLDER "Tom has 3 boxes with 12 pencils each. How many has he?"

Each line of the file is a JSON object. One column has whole texts or chats; two have prompts and answers, of which the
answers count. As in `generate`, prompts go through the chat template if there is one. With several files, each gets
weights and a folder of its own, FOLDER/NAME.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..config import METHODS, EnsembleConfig
from ..files import parse_object
from ..fitting import fit
from ..hub import Ensemble, MemberReference, save_ensemble
from ..trace.extras import extra
from .arguments import check_device, locate


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="hf-spec-ensemble fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--members", nargs="+", required=True, metavar="MODEL", help="the main model first")
    made.add_argument("--dtype", default="auto", help="of all models (default: as they were saved)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    texts = made.add_argument_group("texts")
    texts.add_argument("--data-file", type=Path, nargs="+", required=True, metavar="FILE", help="JSON lines")
    texts.add_argument("--columns", nargs="+", required=True, metavar="NAME", help="a column, or prompts and answers")
    texts.add_argument("--limit", type=int, metavar="N", help="of each file, the first N lines alone")
    texts.add_argument(
        "--held-out", default="0.2", metavar="SHARE|FILE", help="not fitted on: a share, or another file (default: 0.2)"
    )
    texts.add_argument("--no-chat-template", action="store_true", help="prompt and answer one after the other")
    texts.add_argument("--max-length", type=int, metavar="N", help="cut texts to N tokens")
    run = made.add_argument_group("fit")
    run.add_argument("--method", choices=METHODS, default="weighted")
    run.add_argument("--plausibility", default="0", metavar="ALPHA|fit", help="of contrastive decoding (default: 0)")
    run.add_argument("--batch-size", type=int, default=8)
    run.add_argument("--memory", type=float, default=4.0, metavar="GIB", help="for what a product or contrast keeps")
    run.add_argument("--seed", type=int, default=0)
    out = made.add_argument_group("output: the report, and")
    out.add_argument("--out", type=Path, metavar="FOLDER", help="the ensemble, for `load_ensemble`")
    out.add_argument(
        "--plot", type=Path, metavar="FILE", help="the likelihood over the weights, of two or three members"
    )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = parser()
    args = made.parse_args(sys.argv[1:] if argv is None else argv)
    logging.set_verbosity_error()
    try:
        _run(args)
    except (ValueError, OSError, ImportError) as error:
        made.exit(2, f"{made.prog}: {error}\n")
    except KeyboardInterrupt:
        made.exit(130, "Interrupted before there was a result.\n")


def _run(args: argparse.Namespace) -> None:
    check_device(args.device)
    if args.plot:
        extra("matplotlib")
        if len(args.data_file) > 1 or args.method == "product":
            raise ValueError("--plot shows one file's mixture or contrast: leave it out.")
    names = [file.stem for file in args.data_file]
    if len(set(names)) < len(names):
        raise ValueError(f"Several --data-file have the same name: {names}. Rename one.")
    rows = {name: _rows(file, args.limit) for name, file in zip(names, args.data_file)}
    held_out = _number(args.held_out)
    dtype = None if args.dtype == "auto" else args.dtype
    references = [MemberReference(locate(name), dtype=dtype) for name in args.members]
    logging.disable_progress_bar()  # of weights, a bar for each model
    loaded = Ensemble.load(references, EnsembleConfig(method=args.method))
    result = fit(
        [member.to(args.device) for member in (loaded.model, *loaded.assistant_models)],
        rows if len(rows) > 1 else rows[names[0]],
        loaded.tokenizer,
        method=args.method,
        plausibility=args.plausibility if args.plausibility == "fit" else _parsed(args.plausibility, "--plausibility"),
        held_out=_rows(Path(args.held_out)) if held_out is None else held_out,
        columns=args.columns,
        chat_template=len(args.columns) == 2 and not args.no_chat_template and bool(loaded.tokenizer.chat_template),
        max_length=args.max_length,
        batch_size=args.batch_size,
        memory=round(args.memory * 2**30),
        seed=args.seed,
    )
    print(result)
    if args.plot:
        result.plot(args.plot)
    if args.out:
        folders = {args.out / name: each for name, each in result.items()} if len(rows) > 1 else {args.out: result}
        for folder, each in folders.items():
            print(f"Written: {save_ensemble(folder, references, each.config)}")


def _rows(file: Path, limit: int | None = None) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ValueError(f"There is no file {str(file)!r} to read texts from.")
    lines = file.read_bytes().splitlines()
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be >= 1, but is {limit}.")
    return [parse_object(line, f"Line {number} of {file}") for number, line in enumerate(lines[:limit], 1)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _parsed(text: str, option: str) -> float:
    number = _number(text)
    if number is None:
        raise ValueError(f"{option} must be a number or 'fit', but is {text!r}.")
    return number
