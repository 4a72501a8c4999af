"""
The options of the command line, and what is wrong with those that are given. Imports nothing that takes time: the
console script runs `parse` before it imports torch and transformers.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from ..choices import COMBINE_ON, COUPLINGS, DRAFTERS, METHODS


PROGRAM = "hf-spec-ensemble"
DESCRIPTION = """
Ensembles from the command line.

    hf-spec-ensemble generate "Tom has 3 boxes with 12 pencils each. How many does he have?" --members reader solver
    hf-spec-ensemble generate --ensemble FOLDER --prompts prompts.jsonl --out texts.jsonl
    hf-spec-ensemble generate "Why is the sky blue?" --members ./base ./math --weights 0.6 0.4 --show
    hf-spec-ensemble bench --members ./base ./math --tasks gsm8k
    hf-spec-ensemble eval --model_args members=./base+./math --tasks arc_easy
    hf-spec-ensemble fit --members ./base ./math --data-file rows.jsonl --columns question answer --out FOLDER
    hf-spec-ensemble card FOLDER --members org/base org/math --weights 0.6 0.4

Models are folders or names on the Hub; `reader`, `solver` and `draft` are embedded in the package.
"""
FIT = """
Finds the weights that make the texts of a file most likely, and saves the ensemble with them.

    hf-spec-ensemble fit --members ./base ./math --data-file rows.jsonl --columns question answer --out FOLDER
    hf-spec-ensemble generate --ensemble FOLDER "Tom has 3 boxes with 12 pencils each. How many does he have?"

Each line of the file is a JSON object. One column holds whole texts or chats. Two columns hold prompts and answers, and
only the answers count. As in `generate`, prompts go through the chat template if there is one. With several files, each
gets its own weights and its own folder, FOLDER/NAME.
"""
ELSEWHERE = {  # commands with options of their own
    "bench": "measure an ensemble (extra `bench`)",
    "fit": "find the weights that make texts most likely, and write the ensemble's folder",
    "eval": "score an ensemble on the tasks of lm-evaluation-harness (extra `lm_eval`)",
}

# Options that say what a saved ensemble says itself, and their defaults
OF_SAVED = dict(
    method="weighted", weights=None, contrast=None, plausibility=None, combine_on=None, coupling=None, dtype="auto",
    drafter="auto",
)  # fmt: skip


def parse(words: Sequence[str]) -> argparse.Namespace:
    """
    Parses a command line; exits with a message of one line, or after help. Of `bench` and `eval`, which have parsers of
    their own, it looks at models and weights alone.

    Example:

    >>> from hf_spec_ensemble.tools.options import parse

    >>> parse(["generate", "Hello", "--members", "reader", "solver"]).members
    ['reader', 'solver']
    """
    command, made = words[0] if words else None, parser()
    if command == "fit":
        args = fit_parser().parse_args(words[1:])
    elif command in ELSEWHERE:
        args = _named(words[1:])
    else:
        args = made.parse_args(words)
    try:
        check(args, command)
    except (ValueError, OSError) as error:
        made.exit(2, f"{PROGRAM} {command}: {error}\n")
    return args


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=PROGRAM, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="decode prompts with an ensemble")
    generate.add_argument("prompt", nargs="*", help="a prompt; several are decoded in batches")
    generate.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="a file of more prompts, one per line or JSON lines with a field `prompt`; - reads standard input",
    )  # fmt: skip
    _add_models(generate, "instead of --members: a saved ensemble, a folder or a repository on the Hub")
    run = generate.add_argument_group("run")
    run.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="the longest text, in tokens (default: %(default)s)",
    )
    run.add_argument("--do-sample", action="store_true", help="sample (default: greedy)")
    run.add_argument("--temperature", type=float, help="with --do-sample: lower is closer to greedy")
    run.add_argument("--top-p", type=float, help="with --do-sample: only the most probable tokens, up to this total")
    run.add_argument("--top-k", type=int, metavar="K", help="with --do-sample: only the K most probable tokens")
    run.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    run.add_argument(
        "--batch-size", type=int, default=8, metavar="N",
        help="prompts decoded together; it does not change the texts (default: %(default)s)",
    )  # fmt: skip
    _add_device(run)
    out = generate.add_argument_group("output: the text as it is written; JSON lines for several prompts")
    out.add_argument(
        "--out", type=Path, metavar="FILE",
        help="append every finished text to this file, as JSON lines; a second run decodes only what is missing",
    )  # fmt: skip
    out.add_argument("--show", action="store_true", help="colour the text by the member that proposed each token")
    out.add_argument("--stats", action="store_true", help="also print passes, acceptance and times")
    out.add_argument("--trace", type=Path, metavar="FILE", help="write an HTML page that shows who proposed each token")

    for name, what in ELSEWHERE.items():
        commands.add_parser(name, add_help=False, help=what)

    card = commands.add_parser(
        "card", help="write an ensemble's folder for the Hub, or rewrite the model card of an existing folder"
    )
    card.add_argument("folder", type=Path, help="the ensemble's folder; created if --members are given")
    _add_models(card, None)
    card.add_argument("--license", help='as the Hub names it, e.g. "apache-2.0"')
    card.add_argument("--repo-id", help="its future name on the Hub, USER/NAME, for the card's examples")
    card.add_argument("--speedup", help='a measured speed-up, for the card: "1.7x on GSM8K (bfloat16, two CPU cores)"')
    return made


def fit_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"{PROGRAM} fit", description=FIT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--members", nargs="+", required=True, metavar="MODEL", help="the main model first")
    made.add_argument("--dtype", default="auto", help="dtype of all models (default: as saved)")
    _add_device(made)
    texts = made.add_argument_group("texts")
    texts.add_argument(
        "--data-file", type=Path, nargs="+", required=True, metavar="FILE", help="JSON lines with the texts"
    )
    texts.add_argument(
        "--columns",
        nargs="+",
        required=True,
        metavar="NAME",
        help="the field of the text, or the fields of prompt and answer",
    )
    texts.add_argument("--limit", type=int, metavar="N", help="read only the first N lines of each file")
    texts.add_argument(
        "--held-out",
        default="0.2",
        metavar="SHARE|FILE",
        help="what is not fitted on: a share, or a file (default: 0.2)",
    )
    texts.add_argument("--no-chat-template", action="store_true", help="join prompt and answer without a chat template")
    texts.add_argument("--max-length", type=int, metavar="N", help="cut texts to N tokens")
    run = made.add_argument_group("fit")
    run.add_argument(
        "--method", choices=METHODS, default="weighted", help="how members are combined (default: weighted)"
    )
    run.add_argument(
        "--plausibility",
        default="0",
        metavar="ALPHA|fit",
        help="for --method contrastive: a number, or the word fit to fit it too (default: 0)",
    )
    run.add_argument("--batch-size", type=int, default=8, help="texts per forward pass (default: %(default)s)")
    run.add_argument(
        "--memory", type=float, default=4.0, metavar="GIB",
        help="memory for the logits that a product or contrast keeps (default: %(default)s)",
    )  # fmt: skip
    run.add_argument("--seed", type=int, default=0, help="seed of the held-out share (default: %(default)s)")
    out = made.add_argument_group("output, besides the report")
    out.add_argument("--out", type=Path, metavar="FOLDER", help="save the fitted ensemble, for `load_ensemble`")
    out.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot the likelihood over the weights, for two or three members"
    )
    return made


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options that say how members are combined and tokens drawn; gives their group, to add more."""
    group = parser.add_argument_group("ensemble (see EnsembleConfig)")
    group.add_argument(
        "--method", choices=METHODS, default="weighted", help="how members are combined (default: %(default)s)"
    )
    group.add_argument("--weights", type=float, nargs="+", help="one for each member (default: equal)")
    group.add_argument(
        "--contrast",
        type=float,
        help="for --method contrastive: how strongly the second member is subtracted (default: 0.1)",
    )
    group.add_argument(
        "--plausibility", type=float,
        help="for --method contrastive: exclude tokens with less than this share of the main model's highest "
        "probability (default: 0)",
    )  # fmt: skip
    group.add_argument("--combine-on", choices=COMBINE_ON, help="what is combined (default: depends on the method)")
    group.add_argument(
        "--coupling",
        choices=COUPLINGS,
        help="the rule that draws tokens and accepts proposals; all are exact (default: auto)",
    )
    return group


def add_drafter_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--drafter`, for `drafter_of`."""
    parser.add_argument(
        "--drafter",
        default="auto",
        help="proposes tokens without being a member: a model, `prompt_lookup` (copies from the prompt), `auto` "
        "(copies what followed earlier in the text, if proposal lengths are automatic), `none` (default: %(default)s)",
    )


def _add_models(command: argparse.ArgumentParser, saved: str | None) -> None:
    command.add_argument("--members", nargs="+", metavar="MODEL", help="two or more models, the main model first")
    if saved:
        command.add_argument("--ensemble", metavar="FOLDER", help=saved)
    add_drafter_argument(command)
    command.add_argument("--dtype", default="auto", help="dtype of all models (default: as saved)")
    add_config_arguments(command)


def _add_device(group) -> None:
    group.add_argument("--device", help="a device of torch, e.g. cpu or cuda:1 (default: cuda if available)")


def _named(words: Sequence[str]) -> argparse.Namespace:
    """Models and weights in a command line of another parser, `--model_args` among it."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--members", "--weights", "--model_args", "-a"):
        made.add_argument(option, nargs="*", default=[])
    for option in ("--method", "--ensemble", "--drafter", "--curve"):
        made.add_argument(option)
    try:
        args, _ = made.parse_known_args(words)
    except argparse.ArgumentError:  # the command itself says what is wrong
        return argparse.Namespace()
    for entry in re.split(r"[,\s]", " ".join([*args.model_args, *args.a])):
        key, _, value = entry.partition("=")
        if key in ("members", "weights"):
            setattr(args, key, value.split("+"))
        elif key in ("method", "ensemble", "drafter"):
            setattr(args, key, value)
    return args


def check(args: argparse.Namespace, command: str | None) -> None:
    """
    Raises:
        `ValueError`: for what cannot be meant, in the words of the command line.
    """
    given = vars(args)
    prefix = "" if command == "eval" else "--"  # there they are among the model's arguments
    members, ensemble, drafter = (given.get(name) for name in ("members", "ensemble", "drafter"))
    for option, names in (("members", members), ("ensemble", [ensemble]), ("drafter", [drafter])):
        for name in names or []:
            if name and name.startswith((".", "/", "~")) and not Path(name).is_dir():  # no repository's name does
                raise ValueError(f"{prefix}{option}: no such folder: {name!r}.")
    if given.get("curve"):  # members take part as often as it wants
        return
    if members and len(members) < 2:
        raise ValueError(
            f"{prefix}members names one model, {members[0]!r}, but an ensemble needs two or more, the main model first."
        )
    weights, method = given.get("weights"), given.get("method")
    if members and weights and len(weights) != len(members):
        raise ValueError(
            f"{prefix}weights has {_so_many(weights, 'number')}, but {prefix}members names "
            f"{_so_many(members, 'model')}: give one for each, in the same order."
        )
    if members and method == "contrastive" and len(members) != 2:
        raise ValueError(f"{prefix}method contrastive takes two models, but {prefix}members names {len(members)}.")
    spelled = drafter and drafter.lower().replace("-", "_")
    if spelled in DRAFTERS and drafter != spelled:
        raise ValueError(f"{prefix}drafter {drafter!r} is not known: write {spelled}.")
    if command == "generate":
        _check_generate(args)
    if command in ("generate", "card") and not members:
        _check_saved(args)


def _check_generate(args: argparse.Namespace) -> None:
    if not args.prompt and not args.prompts:
        raise ValueError("there is nothing to ask: give a prompt, or --prompts FILE.")
    if args.prompts and str(args.prompts) != "-" and not args.prompts.is_file():
        raise ValueError(f"--prompts: no such file: {str(args.prompts)!r}.")
    if not all(prompt.strip() for prompt in args.prompt):
        raise ValueError("a prompt is empty: say what to ask.")
    if bool(args.members) == bool(args.ensemble):
        raise ValueError("say which ensemble: --members MODEL MODEL, or --ensemble FOLDER.")
    for option in ("trace", "show"):
        if getattr(args, option) and len(args.prompt) > 1:
            raise ValueError(f"--{option} shows one text, but there are {len(args.prompt)} prompts.")
        if getattr(args, option) and args.out:
            raise ValueError(f"--{option} is of a text that is printed: leave out --out.")
    for option in ("trace", "out"):
        file = getattr(args, option)
        if file and file.is_dir():
            raise ValueError(f"--{option} is a file to be written, but {str(file)!r} is a folder.")
        if file and not file.parent.is_dir():
            raise ValueError(f"--{option}: no such folder: {str(file.parent)!r}.")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be 1 or more, but is {args.batch_size}.")
    for name in ("temperature", "top_p", "top_k"):
        if getattr(args, name) is not None and not args.do_sample:
            raise ValueError(f"--{name.replace('_', '-')} needs --do-sample.")


def _check_saved(args: argparse.Namespace) -> None:
    """Raises for an option that says what a saved ensemble says."""
    for name, default in OF_SAVED.items():
        if getattr(args, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is what a saved ensemble says itself: leave it out, or give --members.")


def _so_many(things: Sequence, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
