"""
Measures what a speculative ensemble of given members gains, against the standard ensemble, each member alone, and
transformers' own assisted generation, on tasks.

    python -m hf_spec_ensemble.bench
    python -m hf_spec_ensemble.bench --members ./base ./math --tasks gsm8k mmlu --temperatures 0 1 --num-prompts 32
    python -m hf_spec_ensemble.bench --members ./large ./small --method contrastive --compare standard fixed:5 auto
    python -m hf_spec_ensemble.bench --curve batch
    python -m hf_spec_ensemble.bench --compare auto compiled:standard compiled:auto --freeze
    python -m hf_spec_ensemble.bench --tasks copy --data-file copy=humaneval.jsonl --compare auto drafter:prompt_lookup

The folder --out gets every measurement as JSON lines as it is made (the same command continues after an interrupt, and
more tasks, variants or prompts may be added), a table in Markdown, and plots.

Several processes share the prompts; each GPU runs one process. Each writes a file of its own in --out, and the
last one to end the table and plots:

    accelerate launch --multi_gpu --num_processes 2 -m hf_spec_ensemble.bench
    torchrun --nproc-per-node 2 -m hf_spec_ensemble.bench
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from ..tools.arguments import config_of
from ..tools.options import add_config_arguments
from ..tools.processes import Process, launch_notes
from .dtypes import dtype_note, settle_dtype
from .measure import Bench, environment
from .plan import CURVES, Plan, Settings
from .records import Records
from .report import write_report
from .tasks import TASKS
from .variants import NAMES


def parser() -> argparse.ArgumentParser:
    default = Settings()
    made = argparse.ArgumentParser(
        prog="python -m hf_spec_ensemble.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--members", nargs="+", default=default.members, metavar="MODEL",
        help="folders or names on the Hub, the main model first; reader, solver and draft are embedded (default: "
        "reader solver)",
    )  # fmt: skip
    add_config_arguments(made)
    what = made.add_argument_group("what is measured")
    what.add_argument(
        "--tasks", nargs="+", default=default.tasks, metavar="TASK", help=f"one or more of {', '.join(TASKS)}"
    )
    what.add_argument(
        "--data-file", nargs="+", default=[], metavar="[TASK=]FILE", help="JSON lines instead of the Hub's data sets"
    )
    what.add_argument("--compare", nargs="+", metavar="NAME", help=f"what is compared: {NAMES}")
    what.add_argument("--temperatures", type=float, nargs="+", default=default.temperatures, help="0 means greedy")
    what.add_argument(
        "--batch-sizes", type=int, nargs="+", default=default.batch_sizes, help="prompts decoded together"
    )
    what.add_argument(
        "--max-new-tokens",
        type=int,
        default=default.max_new_tokens,
        help="the longest text, in tokens (default: %(default)s)",
    )
    what.add_argument(
        "--num-prompts", type=int, default=default.num_prompts, help="prompts of each task (default: %(default)s)"
    )
    what.add_argument(
        "--repeats", type=int, default=default.repeats, help="measurements of each text (default: %(default)s)"
    )
    what.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=default.seeds,
        help="seeds of sampled texts; prompts have different ones",
    )
    what.add_argument("--shots", type=int, help="examples before a question (default: the task's)")
    what.add_argument("--no-chat-template", dest="chat", action="store_false", help="prompts in plain text")
    what.add_argument("--curve", choices=tuple(CURVES), help="vary this, and draw speed-up and tokens/s against it")
    what.add_argument("--values", type=int, nargs="+", help="the values of the curve (each curve has defaults)")
    what.add_argument(
        "--run-model-code", action="store_true",
        help="run the code that models write, to score humaneval: in a subprocess with limits, on Linux without the "
        "means to write files, start processes or open connections; it may read your files",
    )  # fmt: skip
    where = made.add_argument_group("where")
    where.add_argument(
        "--dtype", default=default.dtype,
        help="as torch names it, or auto: the one of float32 and bfloat16 in which the standard ensemble is faster "
        "(default: %(default)s)",
    )  # fmt: skip
    where.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="a device of torch (default: %(default)s)",
    )
    where.add_argument("--threads", type=int, help="threads of torch on the CPU")
    where.add_argument(
        "--freeze", action="store_true",
        help="compiled passes with weights packed for them: faster on a CPU, twice the memory",
    )  # fmt: skip
    where.add_argument("--out", type=Path, default=default.out, help="folder of the results (default: %(default)s)")
    return made


def settings_of(args: argparse.Namespace) -> Settings:
    """
    Raises:
        `ValueError`: if the options do not form a config, or the task of a file is not clear.
    """
    given = dict(vars(args))
    config = config_of(given)
    files = {}
    for entry in given.pop("data_file"):
        task, separator, file = entry.partition("=")
        if not separator and len(args.tasks) > 1:
            raise ValueError(f"--data-file {entry}: with several tasks, say whose it is: TASK={entry}.")
        files[task if separator else args.tasks[0]] = file if separator else entry
    return Settings(config=config, data_files=files, **given)


def main(argv: list[str] | None = None) -> None:
    made = parser()
    args = made.parse_args(argv)
    logging.disable_progress_bar()  # of loading weights: the benchmark has its own
    logging.set_verbosity_error()
    if args.threads is not None and args.threads >= 1:
        torch.set_num_threads(args.threads)
    try:
        process = Process.of(os.environ)
        args.device = process.device(args.device)
        plan = Plan(settings_of(args))
        timed = settle_dtype(plan, process)
        header = {"settings": plan.settings.pinned(), "environment": environment(plan.settings)}
        bench = Bench(plan, Records(plan.settings.out, header, process.rank), process)
    except (ValueError, OSError) as error:
        made.error(str(error))
    if not process.leads and not bench.count_missing(process.rank):
        return  # a process that measures reports, and the leading one if none does
    if timed is not None:
        bench.records.add(timed)
        print(dtype_note(timed))
    for note in [*plan.notes, *launch_notes(os.environ)] if process.leads else ():
        print(note)
    try:
        bench.run()
    except (ValueError, OSError) as error:
        sys.exit(f"{made.prog}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"Interrupted. What was measured is in {plan.settings.out}; the same command continues.")
    _report(bench)


def _report(bench: Bench) -> None:
    """Writes the report if all is measured. With several processes, that is so for the last one to end."""
    if missing := bench.count_missing():
        print(
            f"Process {bench.process.rank} has measured its share. {missing} measurements of other processes are not "
            "there yet. The last process to end writes the report. Should one be lost, run the same command again: it "
            "measures what is missing, and writes the report."
        )
        return
    files = write_report(bench.records, bench.settings.out, bench.plan.notes)
    print(files[0].read_text(encoding="utf-8"))
    print(f"Written: {', '.join(map(str, [*bench.records.parts, *files]))}")


if __name__ == "__main__":
    main()
