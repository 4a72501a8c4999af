"""
What passes cost where the benchmark runs: c(w), the seconds of a model's pass over w tokens in each row.

Measured through the members' own passes, as generation runs them, before what they are to explain: in the middle of a
text, models and widths in turns, so that a machine that gets slower or faster does so for all.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..members.member import Member
from ..members.runner import Running
from ..members.uncached import member_of
from .inputs import lengthened
from .plan import Condition, Plan, short_names
from .records import Record, Records
from .variants import BATCHED, COMPILED, STATIC, Variant


WIDTHS = (1, 2, 3, 4, 6, 8, 16)
ROUNDS, PASSES = 3, 2  # texts begun anew, and passes over each width in each of them


def curve_key(condition: Condition, prefix: str, model: str) -> Record:
    """The key of a model's curve under a condition, over the caches that a prefix of variants stands for."""
    return {
        "kind": "curve",
        "task": condition.task,
        "batch_size": condition.batch_size,
        "prompt_length": condition.prompt_length,
        "variant": prefix,
        "model": model,
    }


def missing_curves(
    plan: Plan, records: Records, condition: Condition, variants: Sequence[Variant]
) -> dict[str, list[str]]:
    """The models whose curves these variants need and the records lack, by prefix."""
    missing: dict[str, list[str]] = {}
    members = plan.member_names(condition.members)
    for prefix in dict.fromkeys(["", *(variant.prefix for variant in variants if variant.prefix != BATCHED)]):
        drafting = [v.drafting_model for v in variants if v.prefix == prefix and v.drafting_model is not None]
        names = dict.fromkeys([*members, *drafting])
        lacking = [name for name in names if curve_key(condition, prefix, name) not in records]
        if lacking:
            missing[prefix] = lacking
    return missing


def running_of(plan: Plan, condition: Condition, prefix: str) -> Running:
    """How passes run in variants with this prefix."""
    if prefix not in (STATIC, COMPILED):
        return Running()
    config = plan.compile_config if prefix == COMPILED else None
    return Running(plan.longest_text(condition), static=True, compile_config=config)


@torch.no_grad()
def measure_curves(
    models: Mapping[str, PreTrainedModel],
    inputs: Mapping[str, torch.Tensor],
    running: Running,
    new_tokens: int,
    longest: int | None = None,
    widths: Sequence[int] = WIDTHS,
) -> dict[str, Record]:
    """
    Medians of several passes of each model over each width.

    Args:
        models (`Mapping[str, PreTrainedModel]`): By name.
        inputs (`Mapping[str, torch.Tensor]`): `input_ids` and `attention_mask`, `[B, P]`.
        running (`Running`): How passes run.
        new_tokens (`int`): Of the texts; passes are measured behind half of them.
        longest (`int`, *optional*): The most tokens that the models have positions for.
        widths (`Sequence[int]`): In tokens, ascending.

    Returns:
        `dict[str, Record]`: For each model its number of `parameters`, `widths`, the `seconds` for each of them,
        `prompt_tokens` and the `prompt_seconds` that a first pass over so many in each row takes.
    """
    inputs = lengthened(inputs, new_tokens // 2, None if longest is None else longest - max(widths))
    prompt, mask = inputs["input_ids"], {"attention_mask": inputs["attention_mask"]}
    ahead = prompt[:, -1:].repeat(1, max(widths)).clamp(max=min(map(_vocabulary, models.values())) - 1)
    taken: dict[tuple[str, int], list[float]] = defaultdict(list)  # 0: the prompt
    nothing = np.zeros(len(prompt), int)
    for _ in range(ROUNDS):
        members = {
            name: member_of(model, mask, _known(prompt, model), running.runner(model, len(prompt)))
            for name, model in models.items()
        }
        for name, member in members.items():
            member.score(ahead, nothing)
            taken[name, 0].append(_last_lap(member))
        for turn in range(PASSES):
            for width in [*widths[turn % len(widths) :], *widths[: turn % len(widths)]]:
                for name, member in members.items():
                    member.score(ahead, nothing + width)
                    taken[name, width].append(_last_lap(member))
                    member.forget(nothing, settled=nothing)
        for member in members.values():
            member.close()
    return {
        name: {
            "parameters": model.num_parameters(),
            "widths": list(widths),
            "seconds": [statistics.median(taken[name, width]) for width in widths],
            "prompt_tokens": prompt.shape[1],
            "prompt_seconds": statistics.median(taken[name, 0]),
        }
        for name, model in models.items()
    }


def _vocabulary(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size


def _known(prompt: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """As many tokens that a model with another tokenizer knows: what a pass costs does not depend on which."""
    return prompt.clamp(max=_vocabulary(model) - 1)


def _last_lap(member: Member) -> float:
    """The seconds of the pass that has just been run."""
    member.stopwatch.wait()
    return member.stopwatch.laps()[-1][1]


def curve_table(curves: Sequence[Record]) -> list[str]:
    """Curves as the lines of a Markdown table: milliseconds, and how many times those of one token."""
    widths = curves[0]["widths"]
    names = dict(zip(models := list(dict.fromkeys(c["model"] for c in curves)), short_names(models)))
    lines = [["model", "task", "batch", *(f"{width} tokens" for width in widths)], ["---"] * (3 + len(widths))]
    for curve in curves:
        task = curve["task"] + ("" if curve["prompt_length"] is None else f", prompt length {curve['prompt_length']}")
        one = curve["seconds"][0]
        cells = [f"{1000 * seconds:.1f} ({seconds / one:.2f})" for seconds in curve["seconds"]]
        lines.append([curve["variant"] + names[curve["model"]], task, str(curve["batch_size"]), *cells])
    return ["| " + " | ".join(cells) + " |" for cells in lines]
