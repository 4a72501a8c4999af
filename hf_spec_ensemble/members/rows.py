"""Members that share weights, as rows of one member's passes: the weights are read once for all of them.

Owns how their prompts are laid side by side, and the first tokens that these have in common. Knows nothing of what the
members are combined to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from .adapters import base_of
from .cache import beside, decoder_layers
from .cached import CachedMember
from .check import reading_of
from .costs import ENOUGH, PassCosts, SharedCosts
from .member import Member
from .mixed import MixedAdapters, one_model_for
from .runner import Runner
from .snapshots import needs_snapshots


# Prompt tokens that a pass more must save, over a common beginning or over one member's prompts. A pass over few tokens
# takes as long as this many more in one over many: fewer where arithmetic is slow.
WORTH_A_PASS = {"cpu": 32}
WORTH_A_PASS_ELSEWHERE = 512

MEASURED = (1, 4)  # tokens a row of the passes that are measured before the first decision


def groups_of(members: Sequence[Member]) -> list[list[int]]:
    """
    Which of the members, by number, share weights and could be rows of one pass: groups of two or more.

    Those that can read text alone, left-padded, into growing caches of keys and values, and have read nothing yet.
    """
    groups: dict[int, list[int]] = {}
    for number, member in enumerate(members):
        if _is_plain(member):
            groups.setdefault(id(base_of(member.model)), []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def _is_plain(member: Member) -> bool:
    model = member.model
    return (
        type(member) is CachedMember
        and type(member.runner) is Runner
        and not (model.config.is_encoder_decoder or model.training or needs_snapshots(model))
        and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in decoder_layers(member.cache))
        and not getattr(member.cache, "_is_user_defined", False)
        and bool((member.seen == -member.prompt_length).all())
        and all(value is None for value in member.kwargs.values())
        and bool((np.diff(member.prompt_visible.astype(int), axis=1) >= 0).all())
        and member.counts_what_is_visible
    )


def share(members: Sequence[CachedMember], longest: int, check: bool = True) -> "SharedMember | None":
    """
    One member for several of a group, which do not read any more; `None` where a pass over all of their rows would not
    give what their own passes give.

    Args:
        members (`Sequence[CachedMember]`, G): Of B rows each.
        longest (`int`): Tokens of the longest text.
        check (`bool`): Whether to try how the model reads so many rows (`check.reading_of`).
    """
    model = one_model_for([member.model for member in members])
    if model is None:
        return None
    ids, mask = side_by_side([member.prompt for member in members], [member.prompt_visible for member in members])
    whole = _member(model, ids, mask)
    common, apart = Common(0, 0), False
    worth = WORTH_A_PASS.get(whole.device.type, WORTH_A_PASS_ELSEWHERE)
    if check:
        one = _member(members[0].model, ids, mask)  # a trial has any number of rows, so not of mixed adapters
        reading = reading_of(one, speculative=True, rows=True, padded=not mask.all(), longest=longest)
        whole.minds_hidden_slots |= bool(reading.in_step)
        stricter = len(members[0].prompt) > 1 and whole.in_step and not members[0].in_step
        if reading.fault is not None or reading.unknown is not None or reading.minds_padding or stricter:
            return None
        if not (whole.in_step or whole.windowed):
            padding = ids.numel() - sum(member.prompt.numel() for member in members)
            gained, common_gains = padding - worth * (len(members) - 1), -1
            if not isinstance(model, MixedAdapters):
                common = Common.of(ids, mask, len(members))
                common_gains = common.saved(len(ids)) - worth
            apart = gained >= 0 and gained > common_gains and all(type(x) is DynamicLayer for x in whole.cache.layers)
            if apart or common_gains < 0:
                common = Common(0, 0)
    if common.length:
        whole = _member(model, *common.in_front(ids, mask))
    return SharedMember(whole, members, common, apart)


def side_by_side(prompts: Sequence[torch.Tensor], visible: Sequence[np.ndarray]) -> tuple[torch.Tensor, np.ndarray]:
    """
    Prompts `[B, P_g]` of G members, and which of their tokens are not hidden, as `[G * B, P]`, padded on the left.

    Example:

    >>> import numpy as np
    >>> import torch
    >>> from hf_spec_ensemble.members.rows import side_by_side

    >>> ids, mask = side_by_side([torch.tensor([[3, 4]]), torch.tensor([[5]])], [np.ones((1, 2)), np.ones((1, 1))])
    >>> ids.tolist(), mask.tolist()
    ([[3, 4], [0, 5]], [[True, True], [False, True]])
    """
    longest, device = max(prompt.shape[1] for prompt in prompts), prompts[0].device
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(prompt.to(device), (longest - prompt.shape[1], 0)) for prompt in prompts])
    mask = np.concatenate([np.pad(one, ((0, 0), (longest - one.shape[1], 0))) for one in visible])
    return ids, mask.astype(bool)


@dataclass(frozen=True)
class Common:
    """
    A beginning that prompts have in common.

    Args:
        length (`int`): Its tokens.
        rows (`int`): How many rows it has: one for all, or B if those of a batch begin differently.
    """

    length: int
    rows: int

    @classmethod
    def of(cls, ids: torch.Tensor, mask: np.ndarray, contexts: int) -> "Common":
        """
        The one that saves most tokens. Of every prompt at least the last token is left.

        Args:
            ids (`torch.LongTensor` `[G * B, P]`), mask (`np.ndarray` `[G * B, P]`): Of prompts padded on the left.
            contexts (`int`): G.

        Example:

        >>> import numpy as np
        >>> import torch
        >>> from hf_spec_ensemble.members.rows import Common

        >>> Common.of(torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]]), np.ones((2, 4), bool), contexts=2)
        Common(length=3, rows=1)
        """
        tokens = np.take_along_axis(ids.cpu().numpy(), (~mask).argsort(axis=1, kind="stable"), axis=1)  # from the left
        within = np.arange(ids.shape[1]) < mask.sum(1).min() - 1
        batch = len(ids) // contexts
        by_row = tokens.reshape(contexts, batch, -1)
        found = []
        for rows, alike in ((batch, by_row == by_row[:1]), (1, by_row == by_row[:1, :1])):
            found.append(cls(int((alike.all((0, 1)) & within).cumprod().sum()), rows))
        return max(found, key=lambda common: common.saved(len(ids)))

    def saved(self, rows: int) -> int:
        """How many tokens of so many rows need not be read."""
        return (rows - self.rows) * self.length

    def in_front(self, ids: torch.Tensor, mask: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Prompts as of `side_by_side`, with the common tokens before the padding."""
        place = mask.cumsum(1)
        order = np.where(mask & (place <= self.length), 0, np.where(mask, 2, 1)).argsort(axis=1, kind="stable")
        return ids.gather(1, torch.from_numpy(order).to(ids.device)), np.take_along_axis(mask, order, axis=1)


class SharedMember:
    """
    Several members as rows of one: row g * B + b of that is row b of the g-th. To who runs it a member of B rows, but
    that `score` gives the logits of G * B, and `release` the first member's cache.

    State: the whole's, the number B of rows, and whether the readers of prompts or of the common beginning have read.

    Args:
        whole (`CachedMember`): Of G * B rows, which has read nothing.
        members (`Sequence[CachedMember]`, G): Those that it stands for.
        common (`Common`): What the whole's prompts have in front, to be read first; perhaps nothing.
        apart (`bool`): Whether each member's prompts are read in a pass of their own, since they differ in length. The
            caches are laid side by side then.
    """

    def __init__(self, whole: CachedMember, members: Sequence[CachedMember], common: Common, apart: bool = False):
        self.whole, self.members, self.common = whole, members, common
        self.contexts, self.batch = len(members), len(members[0].prompt)
        self.model, self.runner, self.stopwatch = whole.model, whole.runner, whole.stopwatch
        self.costs = SharedCosts(whole.costs, [member.costs for member in members])
        self.prompt_length = whole.prompt_length
        self.saved = common.saved(len(whole.prompt))  # tokens of the prompts that are not read
        self._first_prompt_length = members[0].prompt_length
        self._passes = 0  # over what is common, or over prompts apart
        own = [_member(member.model, member.prompt, member.prompt_visible) for member in members if apart]
        self.prompt_readers: list[CachedMember] = own or [whole]
        for reader in own:
            reader.stopwatch = self.stopwatch

    @property
    def passes(self) -> int:
        """Forward passes so far."""
        return self._passes + self.whole.passes

    @property
    def seen(self) -> np.ndarray:
        """As of a `Member` of B rows."""
        return self.whole.seen[: self.batch]

    @property
    def in_step(self) -> bool:
        """As of a `Member`."""
        return self.whole.in_step

    @property
    def can_refill(self) -> bool:
        """As of a `Member`."""
        return self.whole.can_refill

    @property
    def can_keep_rows(self) -> bool:
        """As of a `Member`; not before its first pass, since how prompts are read is laid out for all rows."""
        return self.passes > 0 and self.whole.can_keep_rows

    def score(self, new: torch.Tensor, end: np.ndarray, width: int = 0, skip: int = 0) -> torch.Tensor:
        """As `Member.score` for B rows, but that the result is `[G * B, K - skip, V]`."""
        if not self.passes and self.prompt_readers[0] is not self.whole:
            return self._begin_apart(new, end, width)[:, skip:]
        if not self.passes and self.common.length:
            self._read_what_is_common()
        return self.whole.score(new.repeat(self.contexts, 1), np.tile(end, self.contexts), width, skip)

    def forget(self, length: np.ndarray, settled: np.ndarray) -> None:
        """As `Member.forget`."""
        self.whole.forget(np.tile(length, self.contexts), np.tile(settled, self.contexts))

    def prefill(self, prompt: torch.Tensor, mask: torch.Tensor, part: int = 0) -> Member:
        """As `Member.prefill`, of the member with this number: each has its own prompt, and perhaps adapter."""
        reader = self.members[part].prefill(prompt, mask)
        reader.stopwatch = self.stopwatch
        return reader

    def refill(self, row: int, reader: Member, part: int = 0) -> None:
        """As `Member.refill`: a row continues when all of the members have been given what they read for it."""
        self.whole.refill(part * self.batch + row, reader)

    def reorder(self, rows: torch.Tensor) -> None:
        """As `Member.reorder`."""
        self.whole.reorder(torch.cat([part * self.batch + rows for part in range(self.contexts)]))
        self.batch = len(rows)

    def release(self, length: int, copied: bool = True) -> Cache | None:
        """As `Member.release`, of the first member. None that a caller gave is among these."""
        if not copied:
            return None
        self.whole.narrow(self.batch, self._first_prompt_length)
        return self.whole.release(length)

    def close(self) -> None:
        """As `Member.close`."""
        self.whole.close()

    def _begin_apart(self, new: torch.Tensor, end: np.ndarray, width: int) -> torch.Tensor:
        """The first pass over each member's prompts, and one over new tokens if there are any."""
        readers, self.prompt_readers = self.prompt_readers, [self.whole]
        logits = torch.cat([reader.score(new[:, :0], np.zeros_like(end))[:, -1:] for reader in readers])
        self._passes = len(readers)
        self.whole.begin_with(beside([reader.cache for reader in readers], self.prompt_length))
        if end.any():
            logits = torch.cat([logits, self.score(new, end, width)], dim=1)
        return logits

    def _read_what_is_common(self) -> None:
        rows, whole = self.common.rows, self.whole
        ids = whole.prompt[:rows, : self.common.length]
        reader = CachedMember(whole.model, {}, ids, whole.runner)
        reader.stopwatch = self.stopwatch
        reader.score(ids[:, :0], np.zeros(rows, int))
        index = torch.arange(rows, device=whole.device).repeat(len(whole.prompt) // rows)
        reader.cache.batch_select_indices(index)
        whole.begin_with(reader.cache)
        self._passes = reader.passes


def measure(member: Member, rows: int) -> None:
    """
    Lets passes over so many rows be measured that were not yet: some short ones, over tokens without a meaning.

    Args:
        member (`Member`): Whose model is measured; it does not change.
    """
    costs: PassCosts = member.runner.costs
    widths = [width for width in MEASURED if not costs.is_known(rows, width)]
    if not widths:
        return
    ids = torch.full((rows, max(MEASURED)), int(member.prompt[0, -1]), device=member.device)
    nothing, trial = np.zeros(rows, int), CachedMember(member.model, {}, ids, Runner(member.model))
    trial.score(ids[:, :0], nothing)
    for width in widths:
        for _ in range(ENOUGH):
            trial.score(ids, nothing + width)
            trial.forget(nothing, settled=nothing)
    trial.stopwatch.wait()
    for width, seconds in trial.stopwatch.laps():
        if width is not None:
            costs.add(rows, width, seconds)


def _member(model, ids: torch.Tensor, mask: np.ndarray) -> CachedMember:
    given = torch.from_numpy(mask).long()
    return CachedMember(model, {"attention_mask": given}, ids, Runner(model))
