"""
The console script `hf-spec-ensemble`: says at once which folder is not there, then runs `hf_spec_ensemble.cli`.

Apart from the package, since importing anything of that takes the seconds of importing torch and transformers.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path


def folders(words: list[str]) -> Iterator[str]:
    """The models and ensembles in a command line that can only be folders: no repository's name begins so."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--members", "--model_args", "-a"):
        parser.add_argument(option, nargs="*", default=[])
    for option in ("--ensemble", "--drafter"):
        parser.add_argument(option)
    given, _ = parser.parse_known_args(words)
    named = [*given.members, given.ensemble, given.drafter]
    for entry in re.split(r"[,\s]", " ".join([*given.model_args, *given.a])):
        key, _, value = entry.partition("=")
        named += value.split("+") if key in ("members", "ensemble", "drafter") else []
    return (name for name in named if name and name.startswith((".", "/", "~")))


def main() -> None:
    words = sys.argv[1:]
    try:
        missing = next((name for name in folders(words) if not Path(name).is_dir()), None)
    except (argparse.ArgumentError, OSError):  # the command itself says what is wrong
        missing = None
    if missing is not None:
        print(f"hf-spec-ensemble {words[0]}: no such folder: {missing!r}", file=sys.stderr)
        sys.exit(2)

    from hf_spec_ensemble.tools.cli import main as command

    command(words)


if __name__ == "__main__":
    main()
