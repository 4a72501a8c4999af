"""From records to limits: the speed-up that the measured curves and the measured acceptance allow a variant."""

import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

from ..config import EnsembleConfig
from ..members.costs import PassCosts
from ..schedule.auto import WIDEST
from ..schedule.limit import limit
from ..schedule.roles import Roles
from ..schedule.simulation import AllSettle, EnoughSettle, OwnerSettles
from .curves import curve_key
from .plan import Condition
from .records import Record, Records
from .variants import BATCHED, Variant, is_speculative, parse


def limit_of(records: Records, condition: Condition, variant: str, runs: Sequence[Record]) -> float | None:
    """
    The limit of a variant's speed-up over the standard ensemble: the best schedule's by `schedule.limit`, for the
    acceptance in these runs and the curves in the records, where both ensembles read the prompt once and spend no time
    outside their passes.

    Args:
        records (`Records`): With the curves.
        condition (`Condition`), variant (`str`): Of the runs.
        runs (`Sequence[Record]`): At least one.

    Returns:
        `float`, or `None` for what is no speculative ensemble or refills rows, and where there are no curves.
    """
    if not is_speculative(variant) or variant.startswith(BATCHED) or not records.of_kind("curve"):
        return None
    settings = records.header["settings"]
    members = [settings["members"][i % len(settings["members"])] for i in range(condition.members)]
    own = _parsed(variant, condition, settings["config"])
    readers = [*members, *([own.drafting_model] if own.drafting_model is not None else [])]
    standard, speculative = _curves(records, condition, "", members), _curves(records, condition, own.prefix, readers)
    if standard is None or speculative is None:
        return None
    prompt = statistics.mean(max(run["prompt_tokens"]) for run in runs)
    steps = statistics.mean(max(map(len, run["tokens"])) for run in runs) - 1  # the prompt's passes give one token

    def seconds(curves: Sequence[Record], per_token: float) -> float:
        return sum(c["prompt_seconds"] * prompt / c["prompt_tokens"] for c in curves) + steps * per_token

    each = seconds(standard, sum(curve["seconds"][0] for curve in standard))
    return each / seconds(speculative, _seconds_per_token(own, condition, speculative, runs))


def _parsed(name: str, condition: Condition, config: dict[str, Any]) -> Variant:
    made = parse(name, condition.members, EnsembleConfig.from_dict(config), condition.batch_size, condition.temperature)
    return made[0]


def _curves(records: Records, condition: Condition, prefix: str, models: Sequence[str]) -> list[Record] | None:
    keys = [curve_key(condition, prefix, model) for model in models]
    return [records[key] for key in keys] if all(key in records for key in keys) else None


def _seconds_per_token(variant: Variant, condition: Condition, curves: Sequence[Record], runs: Sequence[Record]):
    """The best schedule's."""
    verified, accepted, passes, taken = (
        [sum(column) for column in zip(*(run[name] for run in runs))]
        for name in ("verified", "accepted", "forward_passes", "member_seconds")
    )
    config = variant.config.for_members(condition.members)
    has_drafter = len(verified) > condition.members
    sizes = [curve["parameters"] for curve in curves[: condition.members]]
    roles = Roles.of(config, sizes, has_drafter)
    at_once = len(verified) - 1 if has_drafter and len(curves) == condition.members else None
    tables = [_table(curve) for curve in curves]
    if at_once is not None:
        tables.append([taken[at_once] / max(passes[at_once], 1)] * (WIDEST + 1))
    tables = [tables[i] for i in roles.order]
    tried = [verified[i] for i in roles.order]
    rule = _rule(roles.config(config), roles.members, condition, runs)
    best = [
        limit(
            acceptance=[accepted[i] / verified[i] if verified[i] else 0.0 for i in roles.order],
            cost=lambda author, width: tables[author][min(width, WIDEST)],
            rule=rule,
            may_propose=[may and bool(count) for may, count in zip(roles.may_propose(config), tried)],
            at_once=at_once,
            drafted=1.0 if at_once is None else min(verified[at_once] / sum(run["new_tokens"] for run in runs), 1.0),
            lengths=lengths,
        ).seconds_per_token
        for lengths in _row_lengths(condition, runs)
    ]
    return statistics.mean(best)


def _rule(config: EnsembleConfig, members: int, condition: Condition, runs: Sequence[Record]):
    """What settles a token."""
    if condition.temperature > 0:
        return OwnerSettles(config.weights) if config.coupling == "ancestral" else AllSettle(members)
    early = [run["settled_early"] for run in runs if run.get("settled_early") is not None]
    if not early:
        return AllSettle(members)
    some = product((False, True), repeat=members)
    heavy = [have for have in some if sum(w for w, has in zip(config.weights, have) if has) > 0.5]
    return EnoughSettle(config.weights, dict.fromkeys(heavy, statistics.mean(early)))


def _row_lengths(condition: Condition, runs: Sequence[Record]) -> list[list[int]]:
    """Tokens of each row: of every batch, and one row's for all runs."""
    if condition.batch_size > 1:
        return [list(map(len, run["tokens"])) for run in runs]
    return [[round(statistics.mean(len(tokens) for run in runs for tokens in run["tokens"]))]]


def _table(curve: Record) -> list[float]:
    """c(w) by w; padded where that is cheaper, as the package does."""
    costs = PassCosts()
    for width, seconds in zip(curve["widths"], curve["seconds"]):
        costs.add(1, width, seconds)
    return [costs.seconds(1, max(width, 1)) for width in range(WIDEST + 1)]
