"""Checks that a model reads correctly in all ways that an ensemble uses: on a few tokens, before its first use.

A speculative ensemble reads several tokens in one pass, takes some back, and leaves hidden slots in the caches of
batches. Whether that gives the logits of the plain text depends on a model's code, its cache and its masks. No list of
models can guarantee it. So a few tokens are read in these ways, and the logits are compared.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from ..notices import STANDARD, warn_once
from .adapters import lock_of
from .costs import remembered
from .member import Member
from .placement import device_of
from .ranks import Ranks
from .runner import Runner, StaticRunner
from .snapshots import needs_snapshots
from .uncached import UncachedMember, member_of


PROMPT = 4  # tokens: no fewer than the kernels of convolutions usually have
AFTER_PROMPT = 4  # tokens that are read in several ways
TRIES = 3  # texts that must all differ: rounding can send a token to another expert of a mixture of experts
SLOTS = 16  # of a static cache
# Slots that are put between tokens, to see whether distances count them: at least, and as many as a window at most
FAR, FARTHEST = 64, 4096

# Rotary embeddings whose frequencies depend on the longest position that a pass reads.
DYNAMIC, LONG = "dynamic", "longrope"

# Windows in tokens, by the names of what holds them, and what they are narrowed to.
NARROWED, NARROW = ("sliding_window", "attention_chunk_size"), 3

# Root mean square of the logits' differences, over their spread, that rounding does not explain. Models of 135M
# parameters that read well differ by 5e-6 in float32, 0.01 in float16 and 0.06 in bfloat16, and by 0.3 where
# activations are rounded to 8 bits; the same models made wrong on purpose (tests/broken.py) by 0.2 to 5.
TOLERANCE_IN_FLOAT32, TOLERANCE, TOLERANCE_IF_QUANTISED = 1e-3, 0.1, 0.4
TOLERANCE_WITHOUT_CACHE = 0.05  # at least: some models compute in other ways then


@dataclass(frozen=True)
class Reading:
    """
    How a model reads.

    Args:
        fault (`str`, *optional*): Why it cannot be a member; `None` if it can.
        in_step (`bool`, *optional*): Whether hidden slots disturb it, so that all rows of a batch must have seen
            equally many tokens; `None` if that was not tried.
        minds_padding (`bool`): Whether padding on the left changes its logits, as it does then in `generate()` too.
        unknown (`str`, *optional*): Why nothing could be tried.
    """

    fault: str | None = None
    in_step: bool | None = None
    minds_padding: bool = False
    unknown: str | None = None


def check_reading(
    members: Sequence[Member], speculative: bool, ranks: Ranks, new_tokens: int | Sequence[int] | None = None
) -> None:
    """
    Finds out how members read that have read nothing yet, and sets them up accordingly; warns once of what a user
    should know.

    Args:
        members (`Sequence[Member]`): Drafters among them.
        speculative (`bool`): Whether they will read several tokens at once and take some back.
        ranks (`Ranks`): The processes that decode together.
        new_tokens (`int` or a list of N, *optional*): Of the longest text, in each member's own tokens.

    Raises:
        `ValueError`: naming a model that fails, what was found, and what to do.
    """
    each = new_tokens if isinstance(new_tokens, Sequence) else [new_tokens] * len(members)
    for member, new in zip(members, each):
        rows = len(member.prompt) > 1
        longest = None if new is None else member.prompt_length + new
        _check_positions(member, longest, speculative)
        padded = not member.prompt_visible.all()
        reading = ranks.agree_on(reading_of(member, speculative, rows, padded, longest))
        name = type(member.model).__name__
        if reading.fault is not None:
            raise ValueError(
                f"The model {name} cannot be a member here: it {reading.fault}. Its texts would be wrong: "
                f"{_instead_of(member, speculative, rows, padded)}. (EnsembleConfig(check_members=False) leaves this "
                "check out.)"
            )
        if member.cache is None and reading.minds_padding:
            raise ValueError(
                f"The model {name} does not use transformers' caches, and padding changes its logits: give prompts of "
                "equal length, or one prompt at a time."
            )
        if reading.unknown is not None:
            warn_once(f"How the model {name} reads was not checked: {reading.unknown}. Its texts may be inexact.")
        if member.cache is None:
            warn_once(f"The model {name} takes none of transformers' caches: it reads the whole text in every pass.")
        if reading.minds_padding:
            warn_once(
                f"The model {name} gives other logits for left-padded rows than for the same rows alone, in "
                "transformers itself. Texts of a padded batch are the standard ensemble's, not those of single prompts."
            )
        if reading.in_step:
            member.minds_hidden_slots = True


def _instead_of(member: Member, speculative: bool, rows: bool, padded: bool) -> str:
    """What to do where a model cannot read as it would have to."""
    if padded and reading_of(member, speculative, rows).fault is None:
        return "give prompts of equal length, or one prompt at a time"
    if speculative and reading_of(member, speculative=False).fault is None:
        return f"use other members, or {STANDARD}"
    return "use other members"


def _check_positions(member: Member, longest: int | None, speculative: bool) -> None:
    """Raises for rotary embeddings that change within the text: what was read before would have to be read again."""
    kind, limit = _rope(member.model)
    crosses = kind is not None and longest is not None and longest > limit
    if not crosses or (kind == DYNAMIC and not speculative) or (kind == LONG and member.prompt_length > limit):
        return
    standard = f", or use {STANDARD}" if kind == DYNAMIC else ""
    raise ValueError(
        f"The rotary embeddings of {type(member.model).__name__} (rope_type {kind!r}) change when a text gets longer "
        f"than {limit} tokens, and this one may have {longest}: set `max_new_tokens` so that it stays within{standard}."
    )


def reading_of(
    member: Member, speculative: bool, rows: bool = False, padded: bool = False, longest: int | None = None
) -> Reading:
    """
    How a model reads. It is tried once in a process for each model object, kind of cache and kind of call; a model that
    was refused, or could not be checked, is tried again.

    It takes three passes over a few tokens, eagerly. There are more for recurrent models and static caches, and where
    something differs. Neither the random state nor anything that is measured or kept for the model changes.

    Args:
        member (`Member`): Has the model, what encoders made of a source, and a runner, which says the kind of cache.
        speculative (`bool`): As for `check_reading`.
        rows (`bool`): Whether there are several rows, and so hidden slots.
        padded (`bool`): Whether a row begins with padding.
        longest (`int`, *optional*): Tokens of the longest text, which a window may not reach over.
    """
    rows, padded = rows and speculative, padded and speculative  # else a row is read as `generate()` reads it
    model = member.model
    gap = _gap(model, longest) if rows else 0
    state = model.training, model.dtype, getattr(model.config, "_attn_implementation", None)
    kind = member.runner.slots is not None, member.prompt_length > 1, speculative, rows, padded, gap, *state
    kept: dict[tuple, Reading] = remembered([model], "readings", dict)
    reading = kept.get(kind) or _Trial(member, rows, padded, gap).reading(speculative)
    if reading.fault is None and reading.unknown is None:
        kept[kind] = reading
    return reading


class _CannotRead(Exception):
    """Reading the prompt raised an error."""


class _Trial:
    """Reads a few tokens in several ways; arguments as for `reading_of`."""

    def __init__(self, member: Member, rows: bool = False, padded: bool = False, gap: int = FAR):
        self.gap = gap
        self.model = model = member.model
        self.static = member.runner.slots is not None
        self.rows = 1 + rows
        self.padded = rows and padded
        own = member.prompt_length if member.model.config.is_encoder_decoder else PROMPT
        self.prompt_length = min(own, PROMPT) + self.padded
        self.kwargs = _source(model, member.kwargs, self.rows)
        self.tolerance = tolerance_of(model)
        self.padding = 0.0  # the difference that padding makes
        self.has_read = False
        self.error = ""

    def reading(self, speculative: bool) -> Reading:
        """The result of the trials."""
        device = device_of(self.model)
        devices = [device] if device.type == "cuda" else []
        # Only dropout draws; elsewhere other threads may be drawing
        with torch.no_grad(), torch.random.fork_rng(devices, enabled=self.model.training):
            try:
                reading = self._reading(speculative)
            except _CannotRead as error:
                return self._unread(error)
        if reading.fault is not None and self.model.training:
            return Reading(unknown="it is in training mode; call `model.eval()`")
        return replace(reading, minds_padding=self.padding > self.tolerance)

    def _unread(self, error: "_CannotRead") -> Reading:
        """Whether the prompt could not be read because of the cache, or at all: the call may give more to read."""
        try:
            self._uncached(self._text(0))
        except Exception:  # whatever a model's own code raises
            return Reading(unknown=f"reading a prompt raised {error}")
        return Reading(f"reads no prompt into a {'static' if self.static else 'growing'} cache: {error}")

    def _reading(self, speculative: bool) -> Reading:
        if not speculative:
            self.tolerance = max(self.tolerance, TOLERANCE_WITHOUT_CACHE)
            return Reading(self._fault(self._one_by_one, "one token after the other differently from the whole text"))
        self.model = _with_narrow_windows(self.model)
        if self.rows > 1 and not self._new(self._text(0), self.static).in_step:
            # First in a cache that grows, where there is room to move tokens apart
            ways = [partial(self._with_hidden_slots, static=static) for static in sorted({False, self.static})]
            if all(self._least(way) <= self.tolerance for way in ways):
                return Reading(in_step=False)
        what = "several tokens at once, or after a roll-back, differently from one at a time"
        return Reading(self._fault(self._after_roll_back, what), in_step=True if self.rows > 1 else None)

    def _fault(self, way: Callable[[torch.Tensor], Iterator[float]], what: str) -> str | None:
        least = self._least(way)
        if least <= self.tolerance:
            return None
        if least < np.inf:
            return f"reads {what} (its logits differ by {least:.1g} of their spread)"
        return f"reads {what}: {self.error}"

    def _least(self, way: Callable[[torch.Tensor], Iterator[float]]) -> float:
        """
        The difference that a way of reading makes, in the text where it makes least; infinite if it raises an error.
        """
        least = np.inf
        for number in range(TRIES):
            least = min(least, self._difference_in(way, number))
            if least <= self.tolerance:
                break
        return least

    def _difference_in(self, way: Callable[[torch.Tensor], Iterator[float]], number: int) -> float:
        try:
            return max(way(self._text(number)))
        except torch.OutOfMemoryError:
            raise
        except _CannotRead as error:
            if not self.has_read:
                raise
            self.error = str(error)
        except Exception as error:  # whatever a model's own code raises
            self.error = _in_short(error)
        return np.inf

    def _one_by_one(self, text: torch.Tensor) -> Iterator[float]:
        """As the standard ensemble reads."""
        try:
            whole = self._uncached(text)
        except Exception as error:
            raise _CannotRead(_in_short(error)) from error
        member, _ = self._begin(text, self.static, end=0)
        for end in (1, 2):
            yield difference(self._score(member, text, end), whole[:, [end]])

    def _after_roll_back(self, text: torch.Tensor) -> Iterator[float]:
        """Several tokens at once and then one, after others were forgotten, in all rows alike."""
        member, whole = self._begin(text, self.static)
        kept = self._all(1)
        if self.static:
            _, whole = self._begin(text, static=False)
        if needs_snapshots(self.model):  # it has read the prompt by itself, for a state to go back to
            _, whole = self._begin(text, self.static, settled=AFTER_PROMPT)
            yield from self._in_pieces(member, whole, text, kept)  # passes over one token may write to states in place
        yield from self._in_pieces(member, whole, text, kept)

    def _with_hidden_slots(self, text: torch.Tensor, static: bool = False) -> Iterator[float]:
        """The same in rows that forget and read different numbers of tokens: hidden slots lie between visible ones."""
        member, whole = self._begin(text, static)
        if static:
            _, whole = self._begin(text, static=False)
        gap = 0 if member.windowed else self.gap
        return self._in_pieces(member, whole, text, np.array([2, 1]), gap)

    def _in_pieces(
        self, member: Member, whole: torch.Tensor, text: torch.Tensor, kept: np.ndarray, gap: int = 0
    ) -> Iterator[float]:
        """
        Goes back to the first `kept[b]` tokens behind the prompt of each row and reads the others again, the last one
        by itself behind a gap of so many slots.
        """
        member.forget(kept, self._all(0))
        for end in (AFTER_PROMPT - 1, AFTER_PROMPT):
            if end == AFTER_PROMPT:
                member.insert_masked(gap)
            seen, logits = member.seen, self._score(member, text, end)
            for row, first in enumerate(seen):
                wanted = whole[row, first + 1 : end + 1]
                yield difference(logits[row, : len(wanted)], wanted)

    def _uncached(self, text: torch.Tensor) -> torch.Tensor:
        """The logits `[rows, K, V]` behind the prompt and every later token, without a cache."""
        member = UncachedMember(self.model, self.kwargs, text[:, : self.prompt_length])
        return self._score(member, text, AFTER_PROMPT)

    def _new(self, text: torch.Tensor, static: bool) -> Member:
        """A member that has read nothing."""
        prompt = text[:, : self.prompt_length]
        kwargs = dict(self.kwargs)
        if self.padded:
            name = "decoder_attention_mask" if self.model.config.is_encoder_decoder else "attention_mask"
            kwargs[name] = torch.ones_like(prompt)
            kwargs[name][1, 0] = 0
        runner = StaticRunner(self.model, SLOTS) if static else Runner(self.model)
        return member_of(self.model, kwargs, prompt, runner)

    def _begin(
        self, text: torch.Tensor, static: bool, end: int = AFTER_PROMPT, settled: int | None = None
    ) -> tuple[Member, torch.Tensor]:
        """A member that has read `end` tokens behind the prompt, and its logits `[rows, K, V]` from there on."""
        try:
            member = self._new(text, static)
            if settled is not None:
                member.settled = self._all(settled)
            logits = self._score(member, text, end)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _CannotRead(_in_short(error)) from error
        self.has_read = True
        if self.padded and end == AFTER_PROMPT:
            self.padding = difference(logits[1, 1:], logits[0, :-1])
        return member, logits

    def _text(self, number: int) -> torch.Tensor:
        """Tokens `[rows, T]` from all over the vocabulary, but no special ones; the rows are alike but for padding."""
        config = self.model.config.get_text_config(decoder=True)
        special = set(_numbers_in(self.model.config, "_token_id", "_token_index"))
        ordinary = [token for token in range(min(config.vocab_size, 2**16)) if token not in special] or [0]
        golden = 0.6180339887
        length = self.prompt_length + AFTER_PROMPT
        places = [(1 + number * length + i) * golden % 1 for i in range(length)]
        row = [ordinary[int(place * len(ordinary))] for place in places]
        rows = [row, [ordinary[0], *row[:-1]] if self.padded else row][: self.rows]
        return torch.tensor(rows, device=device_of(self.model))

    def _score(self, member: Member, text: torch.Tensor, end: int) -> torch.Tensor:
        return member.score(text[:, self.prompt_length :], self._all(end))

    def _all(self, length: int) -> np.ndarray:
        return np.full(self.rows, length)


def _source(model: PreTrainedModel, kwargs: dict[str, Any], rows: int) -> dict[str, Any]:
    """What an encoder-decoder model's decoder attends to: the call's first row, in so many rows."""
    encoded = kwargs.get("encoder_outputs")
    if not model.config.is_encoder_decoder or encoded is None:
        return {}
    source = {"encoder_outputs": copy.copy(encoded) if isinstance(encoded, ModelOutput) else BaseModelOutput()}
    source["encoder_outputs"]["last_hidden_state"] = _repeated(encoded[0], rows)
    if kwargs.get("attention_mask") is not None:
        source["attention_mask"] = _repeated(kwargs["attention_mask"], rows)
    return source


def _repeated(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return tensor[:1].expand(rows, *tensor.shape[1:]).contiguous()


def tolerance_of(model: PreTrainedModel) -> float:
    """What rounding may explain where the model computes."""
    if getattr(model, "hf_quantizer", None) is not None:
        return TOLERANCE_IF_QUANTISED
    fast = device_of(model).type != "cpu"  # matrices may be multiplied in less than the dtype's precision there
    return TOLERANCE if fast or model.dtype not in (torch.float32, torch.float64) else TOLERANCE_IN_FLOAT32


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference of logits `[..., V]` over their spread, where it is greatest."""
    got, wanted = got.double(), wanted.double()
    known = wanted.isfinite()  # the padding of a vocabulary may be -inf
    if not torch.equal(known, got.isfinite()):
        return np.inf
    apart = torch.where(known, got - wanted, 0.0).square().mean(-1).sqrt()
    spread = torch.where(known, wanted, 0.0).std(-1)
    return float((apart / spread.clamp(min=torch.finfo(torch.float64).tiny)).max())


def _with_narrow_windows(model: PreTrainedModel) -> PreTrainedModel:
    """
    A copy of the model with the same weights whose sliding windows are so narrow that a few tokens reach beyond them;
    the model itself if it has none, or cannot be copied so: weights that are quantised, offloaded or spread are held in
    more places, and a `forward` that was replaced by a function would still be the model's.
    """
    elsewhere = any(getattr(model, name, None) for name in ("hf_quantizer", "hf_device_map", "_device_mesh"))
    modules = list(model.modules())
    elsewhere = elsewhere or any(hasattr(module, "_hf_hook") for module in modules)
    replaced = any(isinstance(vars(module).get("forward"), FunctionType) for module in modules)
    if elsewhere or replaced or not any(_numbers_in(model.config, *NARROWED)):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        with lock_of(model):  # or what passes in other threads have set is copied too
            narrow = copy.deepcopy(model, shared)
    except Exception:  # what a model's own code raises
        return model
    for thing in (*_configs_in(narrow.config), *narrow.modules()):
        for name, value in vars(thing).items():
            if name.endswith(NARROWED) and type(value) is int and value > NARROW:
                setattr(thing, name, NARROW)
    return narrow


def _gap(model: PreTrainedModel, longest: int | None) -> int:
    """A number of slots that the config's widest window does not reach across, if texts can be that long."""
    config = model.config.get_text_config(decoder=True)
    reach = min(FARTHEST, longest or FARTHEST)
    return max((n for n in _numbers_in(config, "window", "window_size", "chunk_size") if n < reach), default=FAR)


def _rope(model: PreTrainedModel) -> tuple[str | None, int]:
    """The kind of rotary embeddings that change with the text's length, if any, and beyond how many tokens."""
    config = model.config.get_text_config(decoder=True)
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for one in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        kind = one.get("rope_type", one.get("type"))
        if kind in (DYNAMIC, LONG):
            limit = getattr(config, "max_position_embeddings", 0)
            if kind == LONG:
                limit = one.get("original_max_position_embeddings") or getattr(
                    config, "original_max_position_embeddings", limit
                )
            return kind, limit
    return None, 0


def _numbers_in(config: PretrainedConfig, *endings: str) -> Iterator[int]:
    """The whole numbers under names with such endings, in a config and those inside."""
    for one in _configs_in(config):
        for name, value in vars(one).items():
            if name.endswith(endings):
                yield from (n for n in (value if isinstance(value, list) else [value]) if type(n) is int)


def _configs_in(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config and those inside."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _configs_in(value)


def _in_short(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
