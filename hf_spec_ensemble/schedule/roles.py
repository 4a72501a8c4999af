"""Which models form the ensemble and which only propose, and the order in which the engine numbers them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import AUTO, EnsembleConfig


@dataclass(frozen=True)
class Roles:
    """
    The authors of proposals, renumbered so that the members come first.

    A caller's order is `[model, *assistant_models]`, then a `drafter` if there is one. An assistant of weight zero
    drafts: it is not part of r, so no position waits for its scores.

    Args:
        order (`tuple[int, ...]`, A): The caller's index of each author.
        members (`int`): N, how many authors form r.
        first (`int`): The member that begins: the one with the fewest parameters.
        proposer (`int`): The author that proposes where roles do not alternate: a drafter, or the first member.

    Example:

    >>> from hf_spec_ensemble import EnsembleConfig
    >>> from hf_spec_ensemble.schedule.roles import Roles

    >>> roles = Roles.of(EnsembleConfig(weights=[0.5, 0.0, 0.5]), sizes=[70, 10, 70])
    >>> roles.order, roles.members, roles.first, roles.proposer
    ((0, 2, 1), 2, 0, 2)
    """

    order: tuple[int, ...]
    members: int
    first: int
    proposer: int

    @classmethod
    def of(cls, config: EnsembleConfig, sizes: Sequence[int], drafter: bool = False) -> "Roles":
        """
        Args:
            config (`EnsembleConfig`): With its weights filled in.
            sizes (`Sequence[int]`): Numbers of parameters of `[model, *assistant_models]`.
            drafter (`bool`): Whether there is a drafter besides these.
        """
        n = len(sizes)
        drafting = [i for i in range(1, n) if config.weights is not None and config.weights[i] == 0]
        members = [i for i in range(n) if i not in drafting]
        order = (*members, *drafting, *([n] if drafter else []))
        first = min(range(len(members)), key=lambda i: sizes[members[i]])
        return cls(order, len(members), first, len(order) - 1 if len(order) > len(members) else first)

    def sharing(self, groups: Sequence[Sequence[int]]) -> "Roles":
        """
        The roles where some members share passes, and so are one author, called by the first of them.

        Args:
            groups (`Sequence[Sequence[int]]`, K): Members by number, each in one group, in the order of the first ones.

        Example:

        >>> from hf_spec_ensemble.schedule.roles import Roles

        >>> roles = Roles(order=(0, 1, 2, 3), members=3, first=2, proposer=3)
        >>> roles.sharing([[0, 2], [1]])
        Roles(order=(0, 1, 3), members=2, first=0, proposer=2)
        """
        leading = [group[0] for group in groups]
        order = [self.order[author] for author in (*leading, *range(self.members, len(self.order)))]
        by_member = {member: k for k, group in enumerate(groups) for member in group}
        fewer = self.members - len(groups)
        proposer = by_member.get(self.proposer, self.proposer - fewer)
        return Roles(tuple(order), len(groups), by_member[self.first], proposer)

    def config(self, config: EnsembleConfig) -> EnsembleConfig:
        """The config of the members alone."""
        if config.weights is None or self.members == len(config.weights):
            return config
        return replace(config, weights=[config.weights[i] for i in self.order[: self.members]])

    def may_propose(self, config: EnsembleConfig) -> tuple[bool, ...]:
        """Which authors may propose, A."""
        return tuple(config.alternate or author == self.proposer for author in range(len(self.order)))

    def lengths(self, config: EnsembleConfig) -> tuple[int, ...] | None:
        """Proposal lengths of the authors, A, 0 for those that may not propose; `None` for automatic lengths."""
        given = config.num_assistant_tokens
        if given == AUTO:
            return None
        if isinstance(given, int):
            lengths = [given if author == self.proposer else 1 for author in range(len(self.order))]
        else:
            lengths = [given[i] for i in self.order]
        return tuple(length * may for length, may in zip(lengths, self.may_propose(config)))
