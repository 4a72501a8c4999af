"""Which members of a call that share weights run as rows of one pass: all that can, where it is asked for or pays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config import EnsembleConfig
from ..members.adapters import adapters_of, base_of
from ..members.member import Member
from ..members.ranks import Together
from ..members.rows import SharedMember, groups_of, measure, share
from ..notices import warn_once
from ..schedule.acceptance import Acceptance
from ..schedule.roles import Roles
from ..schedule.sharing import seconds_per_token
from ..schedule.simulation import AllSettle, EnoughSettle, OwnerSettles
from ..schedule.turns import Turns
from .call import Call


NONE_SHARED = (
    "`share_passes=True`, but some members take turns as without it: no others share their weights, or they cannot be "
    "rows of one pass. That takes growing caches of keys and values, prompts of text alone, and adapters that PEFT can "
    "mix in a batch; in the standard ensemble also no beams and no samples with coupling maximal."
)


@dataclass(frozen=True)
class Readers:
    """
    What reads for the members, and the models that draft.

    Args:
        groups (`list[list[int]]`, K): The members, by number, that each of the first K readers scores for.
        all (`list[Member | SharedMember]`): The readers, those that draft last.
    """

    groups: list[list[int]]
    all: list[Member | SharedMember]

    @classmethod
    def of(cls, roles: Roles, each: Sequence[Member], shared: dict[tuple[int, ...], SharedMember]) -> "Readers":
        """The members' own, but for those in `shared`, by the numbers of its members."""
        inside = {number for group in shared for number in group}
        groups = sorted([*map(list, shared), *([i] for i in range(roles.members) if i not in inside)])
        made = [shared[tuple(group)] if len(group) > 1 else each[group[0]] for group in groups]
        return cls(groups, [*made, *each[roles.members :]])

    @property
    def numbers(self) -> list[list[int]]:
        """As `groups`, and a number of its own for each model that drafts."""
        members = sum(map(len, self.groups))
        return [*self.groups, *([members + i] for i in range(len(self.all) - len(self.groups)))]

    def shared(self, roles: Roles) -> list[list[int]]:
        """The groups of several members, by their places in the caller's order."""
        return [sorted(roles.order[number] for number in group) for group in self.groups if len(group) > 1]

    @property
    def prompt_tokens_saved(self) -> int:
        """Tokens that members have in common, and that are read once."""
        return sum(reader.saved for reader in self.all if isinstance(reader, SharedMember))

    def weights(self, config: EnsembleConfig) -> list[float]:
        """What the members of each group have together; for a config of the members alone."""
        return [sum(config.weights[i] for i in group) for group in self.groups] if config.weights else []


def may_share(call: Call) -> bool:
    """
    Whether members of a standard ensemble may run as rows of one pass; warns where that was asked for and is not so.

    Not in a beam search, which reorders rows, nor where a seed's text is that of transformers' own draws.
    """
    config, settings = call.config, call.generation_config
    own_draws = settings.do_sample and config.coupling == "maximal"
    bases = {id(base_of(model)) for model in [call.model, *call.assistants]}
    may = not (own_draws or (settings.num_beams or 1) > 1 or call.media or call.synced_gpus or call.running.static)
    may &= not call.model.config.is_encoder_decoder and len(bases) <= len(call.assistants)
    if config.share_passes is True and not may:
        warn_once(NONE_SHARED)
    return may and config.share_passes is not False


def share_passes(
    call: Call,
    roles: Roles,
    each: Sequence[Member],
    learned: Callable[[Readers], Sequence[Acceptance]] | None = None,
) -> Readers:
    """
    Lets members share passes.

    Args:
        each (`Sequence[Member]`): The N members and the model that drafts, which have read nothing yet.
        learned (`Callable`, *optional*): Gives for some readers how often their proposals were kept in earlier calls,
            of each author; needed where there are proposals.
    """
    wanted, shared = call.config.share_passes, {}
    if wanted is not False and call.union is None and not isinstance(call.ranks, Together):
        shared = _shared(call, roles, each[: roles.members])
    apart, together = Readers.of(roles, each, {}), Readers.of(roles, each, shared)
    if wanted is True:
        _warn_of_others(each[: roles.members], together)
        return together
    if not shared:
        return apart
    for group, one in shared.items():
        for number in group:
            measure(each[number], len(call.input_ids))
        measure(one.whole, len(one.whole.prompt))
    return min((together, apart), key=lambda readers: _seconds(call, roles, readers, learned))


def _shared(call: Call, roles: Roles, members: Sequence[Member]) -> dict[tuple[int, ...], SharedMember]:
    """What could run as rows of one pass, by the numbers of its members."""
    found, groups = {}, groups_of(members)
    while groups:
        group = groups.pop()
        longest = max(call.longest_of(roles.order[number]) for number in group)
        one = share([members[number] for number in group], longest, call.config.check_members)
        if one is not None:
            found[tuple(group)] = one
            continue
        alike: dict[tuple[str, ...] | None, list[int]] = {}  # by adapters, if no pass mixes them
        for number in group:
            alike.setdefault(adapters_of(members[number].model), []).append(number)
        groups += [part for part in alike.values() if 1 < len(part) < len(group)]
    return found


def _warn_of_others(members: Sequence[Member], readers: Readers) -> None:
    bases = [base_of(member.model) for member in members]
    alone = [group[0] for group in readers.groups if len(group) == 1]
    others = [i for i in alone if sum(base is bases[i] for base in bases) > 1]
    if others or len(alone) == len(members):
        warn_once(NONE_SHARED)


def _seconds(
    call: Call, roles: Roles, readers: Readers, learned: Callable[[Readers], Sequence[Acceptance]] | None
) -> float:
    """
    What is expected of prompts and of as many new tokens as there may be. Who drafts at an unknown cost is taken to be
    idle.
    """
    config, batch, seats = roles.config(call.config), len(call.input_ids), roles.sharing(readers.groups)
    lengths, may_propose = seats.lengths(config), seats.may_propose(config)
    if not config.speculative:
        lengths = (0,) * len(seats.order)
    at_once = len(readers.all) if len(readers.all) < len(seats.order) else None
    known = [at_once == author or _cost(readers, author, batch, 1) is not None for author in range(len(seats.order))]
    may_propose = tuple(may and is_known for may, is_known in zip(may_propose, known))
    dearest = max(filter(None, (_cost(readers, author, batch, 1) for author in range(len(readers.all)))))

    def cost(author: int, width: int) -> float:
        return 0.0 if author == at_once else _cost(readers, author, batch, width) or dearest

    ones = tuple(int(may) for may in may_propose) if lengths is None else lengths
    prompts = sum(_prompt_cost(one, batch) or dearest for one in readers.all[: seats.members])
    return prompts + call.tokens_of_a_row * seconds_per_token(
        Turns(ones, seats.first, seats.members, at_once),
        may_propose if lengths is None else None,
        [0.0] * len(seats.order) if learned is None else [one.mean for one in learned(readers)],
        cost,
        _rule(call, readers, config),
        batch,
    )


def _rule(call: Call, readers: Readers, config: EnsembleConfig) -> AllSettle | OwnerSettles | EnoughSettle:
    if not (config.speculative and config.is_mixture) or call.shows_scores:
        return AllSettle(len(readers.groups))
    if not call.generation_config.do_sample:
        return EnoughSettle(readers.weights(config), {})
    return OwnerSettles(readers.weights(config)) if config.coupling == "ancestral" else AllSettle(len(readers.groups))


def _prompt_cost(reader: Member | SharedMember, batch: int) -> float | None:
    if not isinstance(reader, SharedMember) or reader.prompt_readers == [reader.whole]:
        return reader.costs.seconds(batch, reader.prompt_length)
    seconds = [own.costs.seconds(batch, own.prompt_length) for own in reader.prompt_readers]
    return None if None in seconds else sum(seconds)


def _cost(readers: Readers, author: int, batch: int, width: int) -> float | None:
    return readers.all[author].costs.seconds(batch, width) if author < len(readers.all) else None
