"""`hf-spec-ensemble fit`: reads texts from files, fits weights, and writes the ensemble's folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..config import EnsembleConfig
from ..files import parse_object
from ..fitting import fit
from ..hub import Ensemble, MemberReference, save_ensemble
from ..trace.extras import extra
from .arguments import check_device, default_device, locate
from .options import fit_parser


def main(argv: Sequence[str] | None = None) -> None:
    made = fit_parser()
    args = made.parse_args(sys.argv[1:] if argv is None else argv)
    logging.set_verbosity_error()
    try:
        _run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        made.exit(2, f"{made.prog}: {error}\n")
    except KeyboardInterrupt:
        made.exit(130, "Interrupted before there was a result.\n")


def _run(args: argparse.Namespace) -> None:
    args.device = args.device or default_device()
    check_device(args.device)
    if args.plot:
        _check_plot(args)
    if args.out and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out is to be a folder, but {str(args.out)!r} is a file.")
    if not 0 <= args.memory < float("inf"):
        raise ValueError(f"--memory must be a number of GiB, 0 or more, but is {args.memory}.")
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
        assistant_tokenizer=loaded.assistant_tokenizers,
    )
    print(result)
    if args.out:
        folders = {args.out / name: each for name, each in result.items()} if len(rows) > 1 else {args.out: result}
        for folder, each in folders.items():
            print(f"Written: {save_ensemble(folder, references, each.config)}")
    if args.plot:
        result.plot(args.plot)


def _check_plot(args: argparse.Namespace) -> None:
    extra("matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    if len(args.data_file) > 1 or args.method == "product" or len(args.members) > 3:
        raise ValueError("--plot shows one file's mixture of two or three members, or a contrast: leave it out.")
    kinds = FigureCanvasBase.filetypes
    if args.plot.suffix.removeprefix(".") not in kinds:
        raise ValueError(f"--plot {str(args.plot)!r} must end in one of {sorted(kinds)}, as in fit.png.")
    if not args.plot.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {str(args.plot.absolute().parent)!r} for --plot.")


def _rows(file: Path, limit: int | None = None) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ValueError(f"There is no file {str(file)!r} to read texts from.")
    lines = [(number, line) for number, line in enumerate(file.read_bytes().splitlines(), 1) if line.strip()]
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be >= 1, but is {limit}.")
    return [parse_object(line, f"Line {number} of {file}") for number, line in lines[:limit]]


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
