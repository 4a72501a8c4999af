"""`--dtype auto`: the dtype in which the standard ensemble is faster here."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ..files import parse_object
from ..members.runner import Running
from ..tools.arguments import locate
from ..tools.processes import Process
from .curves import measure_curves
from .inputs import batch_of
from .plan import AUTO, Plan
from .records import Record


TRIED = ("float32", "bfloat16")


def settle_dtype(plan: Plan, process: Process) -> Record | None:
    """
    Puts a dtype in the place of `"auto"` in a plan's settings: that of the records in its folder or, where there are
    none, the faster one.

    Returns:
        `dict`, *optional*: A record of what was measured, if anything was.

    Raises:
        `ValueError`: if several processes would have to measure alike.
    """
    settings = plan.settings
    if settings.dtype != AUTO:
        return None
    if recorded := _recorded(settings.out):
        settings.dtype = recorded
        return None
    if process.world > 1:
        raise ValueError(
            f"--dtype auto: processes may measure differently, and there are {process.world} of them. Name the dtype."
        )
    seconds = time_dtypes(plan)
    settings.dtype = min(seconds, key=seconds.get)
    return {"kind": "dtype", "seconds": seconds}


def time_dtypes(plan: Plan) -> dict[str, float]:
    """Seconds of one pass over one token of every member, by dtype: medians of a few, the dtypes in turns."""
    condition = plan.conditions[0]
    names = plan.member_names(condition.members)
    models = {
        (dtype, name): AutoModelForCausalLM.from_pretrained(locate(name), dtype=getattr(torch, dtype))
        .to(plan.settings.device)
        .eval()
        for dtype in TRIED
        for name in dict.fromkeys(names)
    }
    inputs = batch_of(plan.groups(condition)[0].prompts, plan.tokenizer.pad_token_id or 0, plan.settings.device)
    curves = measure_curves(models, inputs, Running(), plan.settings.max_new_tokens, plan.longest, widths=(1,))
    return {dtype: sum(curves[dtype, name]["seconds"][0] for name in names) for dtype in TRIED}


def dtype_note(record: Record) -> str:
    """
    What was found, in words.

    >>> from hf_spec_ensemble.bench.dtypes import dtype_note

    >>> dtype_note({"seconds": {"float32": 0.06, "bfloat16": 0.04}})
    'bfloat16 was measured to be 1.50 times as fast as float32 (40.0 and 60.0 ms for a token of the standard ensemble).'
    """
    (faster, least), (slower, most) = sorted(record["seconds"].items(), key=lambda pair: pair[1])
    return (
        f"{faster} was measured to be {most / least:.2f} times as fast as {slower} ({1000 * least:.1f} and "
        f"{1000 * most:.1f} ms for a token of the standard ensemble)."
    )


def _recorded(folder: Path) -> str | None:
    """The dtype of the records in a folder; `None` if there are none."""
    for part in sorted(folder.glob("records*.jsonl")):
        with part.open("rb") as lines:
            header = lines.readline()
        if header.endswith(b"\n"):
            return parse_object(header, f"Line 1 of {part}").get("settings", {}).get("dtype")
    return None
