"""CachedMember: a member with one of transformers' caches, which reads every token once and rolls back."""

from contextlib import contextmanager

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from ..compat import cache_names, given_cache, without_cache
from ..ensemble.padded import columns, window
from .cache import (
    append_slots,
    cut_to_kernel,
    cut_to_window,
    decoder_layers,
    holds_keys,
    pick_slots,
    put_last,
    remove_last,
    tokens_held,
)
from .member import Member
from .runner import WIDTHS, Runner
from .snapshots import Snapshots, needs_snapshots


# Slots that no row needs any more may make up this share of a cache before it is compacted.
COMPACT_AT = 0.25

# A recurrent model reads final tokens in a pass of their own if there are more, so as not to read them again.
READ_AGAIN = 4

# What a slot of a cache holds for its row: nothing, a token, or one that the prompt's mask hides, padding on the left
# among these. Masked slots stay where they are: windows that count slots count them.
EMPTY, SEEN, MASKED = 0, 1, 2


class CachedMember(Member):
    """
    A model and its cache.

    A forgotten token, or the padding of a shorter row, stays in the cache as a hidden slot, masked out; slots hidden in
    every row at the end are cropped, and the rest is compacted when there is much of it. Sliding-window layers measure
    distance in slots, so with those a cache is compacted before every pass that follows a hidden slot. Models that
    cannot do with hidden slots at all want rows that have seen equally many tokens (`in_step`). For one row all this is
    the ordinary crop. A recurrent state goes back to a copy made before a pass, and the model reads again what it has
    to keep.

    State: the cache, and what its slots hold (`_slots`), written here alone. Arguments as for `Member`.
    """

    def __init__(self, model, kwargs, prompt, runner=None):
        super().__init__(model, kwargs, prompt, runner)
        self._prepared_cache_name, self._cache_name = cache_names(model)
        self.cache: Cache | None = given_cache(kwargs)
        self._owns_cache = self.cache is None
        self.begin_with(self.runner.new_cache() if self.cache is None else self.cache)
        self._snapshots = Snapshots(self._linear) if needs_snapshots(model) else None
        # Other caches may hold all tokens in every layer, behind the same masks
        own = self._owns_cache and self.runner.slots is None
        layers = self._layers if own else decoder_layers(Runner(model).new_cache())
        self.windowed = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
        # The check of models finds out; without it, those that take no positions
        self.minds_hidden_slots = self._prompt_positions is None

    def begin_with(self, cache: Cache) -> None:
        """Takes a cache, which may hold the first tokens of the prompt. It has read none so far."""
        self.cache = cache
        self.cache.activate_past_recording()  # sliding-window layers keep what a roll-back may need
        self._look_at_layers()
        held = tokens_held(self.cache)
        self._slots = self._prompt_slots(0, held)  # [B, S]
        self.seen = self.settled = self.seen + held

    def _look_at_layers(self) -> None:
        """Sorts the cache's layers. Some models add layers in their first pass."""
        self._layers = decoder_layers(self.cache)
        self._sliding = [layer for layer in self._layers if isinstance(layer, DynamicSlidingWindowLayer)]
        self._linear = [layer for layer in self._layers if isinstance(layer, LinearAttentionCacheLayerMixin)]

    @property
    def in_step(self) -> bool:
        """
        As `Member`: because hidden slots would disturb the others. The model counts slots instead of taking positions,
        say, or its layers keep a state of what they have read.
        """
        return self.minds_hidden_slots or bool(self._linear)

    @property
    def can_refill(self):
        kinds = DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
        return not self.in_step and all(type(layer) in kinds or not holds_keys(layer) for layer in self._layers)

    @property
    def can_keep_rows(self):
        return self._snapshots is None and not self._linear and self.runner.slots is None

    @property
    def visible(self):
        return self._slots == SEEN

    def score(self, new, end, width=0, skip=0):
        if self._snapshots is not None:
            return self._read_apart(new, end)[:, skip:]
        if self.runner.slots is None or self.seen[0] < 0 or int((end - self.seen).max()) <= WIDTHS[-1]:
            return self._read(new, end, width, skip)
        # One row lags far while another may be near its end: there are slots for no more than these at once
        parts = []
        while (self.seen < end).any():
            parts.append(self._read(new, np.minimum(end, self.seen + WIDTHS[-1])))
        return torch.cat(parts, dim=1)[:, skip:]

    def _read_apart(self, new: torch.Tensor, end: np.ndarray) -> torch.Tensor:
        """A recurrent model's passes; see `score`."""
        final = np.minimum(end, max(int(self.settled.max()), 0))
        if (final == end).all():
            return self._read(new, end)
        apart = [self._read(new, final)] if self.passes == 0 or (final - self.seen).max() > READ_AGAIN else []
        self._snapshots.take(int(self.seen.max()))
        return torch.cat([*apart, self._read(new, end)], dim=1)

    def _read(self, new: torch.Tensor, end: np.ndarray, width: int = 0, skip: int = 0) -> torch.Tensor:
        """A forward pass; see `score`."""
        of_prompt = bool(self.seen[0] < 0)
        count = np.maximum(end - self.seen, 0)
        needed = int(count.max())
        width = max(needed, width)
        if not of_prompt:
            width = self.runner.width(width)
        self._tidy(room=width)
        index = columns(self.seen, width)  # [B, W]
        real = index < end[:, None]
        slots = np.where(real, SEEN, EMPTY).astype(np.int8)
        if of_prompt:
            unread = min(-int(self.seen[0]), width)  # tokens of the prompt
            first = self.prompt_length + int(self.seen[0])
            slots[:, :unread] = self._prompt_slots(first, first + unread)
            tokens = window(self._text(new, max(int(end.max()), 0)), self.seen + self.prompt_length, width)
        else:
            tokens = window(new, self.seen, width)
        # Padding behind a row's tokens need not be hidden from them: attention is causal
        ahead = slots == SEEN if of_prompt else np.ones_like(real)
        visible = np.concatenate([self.visible, ahead], axis=1)  # [B, S + W]

        inputs = self._inputs(
            tokens,
            visible,
            positions=np.minimum(index, (end - 1)[:, None]),
            masked=not of_prompt and self.runner.slots is not None,  # graphs are for one kind of inputs
            use_cache=True,
            is_first_iteration=of_prompt,
            **{self._prepared_cache_name: self.cache},
        )
        if inputs.get(self._cache_name) is not self.cache:  # by another name, or dropped for long texts (Phi-3)
            inputs = {**without_cache(inputs), self._cache_name: self.cache}
        keep = width - (unread - 1 if of_prompt else 0)
        left_out = 0 if self.runner.shapes_fixed else skip
        keep -= left_out
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = keep
        with self._lock, self._within_windows():
            self.stopwatch.start()
            logits, as_usual = self.runner.run(inputs, 0 if of_prompt else width)
            self.stopwatch.stop(width if as_usual else None)
        logits = logits[:, -keep:]
        if of_prompt:
            self._look_at_layers()

        self._slots = np.concatenate([self._slots, slots], axis=1)
        self.seen = self.seen + count
        self.passes += 1
        return logits[:, skip - left_out : logits.shape[1] - (width - needed)]

    def _prompt_slots(self, first: int, end: int) -> np.ndarray:
        return np.where(self.prompt_visible[:, first:end], SEEN, MASKED).astype(np.int8)

    def forget(self, length, settled):
        dropped = np.maximum(self.seen - length, 0)
        self.settled = settled
        if self._snapshots is not None:
            if dropped.any():
                dropped = np.maximum(self.seen - self._snapshots.restore(int(length.min())), 0)
            self._snapshots.forget_before(int(settled.min()))
        if dropped.any():
            from_end = (self._slots != EMPTY)[:, ::-1].cumsum(1)[:, ::-1]  # 1 for a row's last token
            self._slots = np.where(from_end <= dropped[:, None], EMPTY, self._slots)
            self.seen = self.seen - dropped

    def insert_masked(self, slots):
        if slots and all(type(layer) is DynamicLayer for layer in self._layers):
            for layer in filter(holds_keys, self._layers):
                append_slots(layer, slots)
            self._slots = np.pad(self._slots, ((0, 0), (0, slots)), constant_values=MASKED)

    def narrow(self, rows: int, prompt_length: int) -> None:
        """
        Goes on with its first rows alone, whose prompts have no more than so many tokens when hidden ones are left out.
        """
        self.reorder(torch.arange(rows))
        left_out, slots = self.prompt_length - prompt_length, self._slots.shape[1]
        order = (self._slots == SEEN).argsort(axis=1, kind="stable")[:, left_out:]
        for layer in filter(holds_keys, self._layers):
            pick_slots(layer, order, slots)
        self._slots = np.take_along_axis(self._slots, order, axis=1)
        self.prompt = self.prompt[:, left_out:]

    def prefill(self, prompt, mask, part=0):
        reader = CachedMember(self.model, {**self.kwargs, self._mask_name: mask}, prompt)
        reader.stopwatch, reader._last_token = self.stopwatch, self._last_token
        return reader

    def refill(self, row, reader, part=0):
        here = np.arange(len(self.seen)) == row
        self._slots = np.where(here[:, None], EMPTY, self._slots).astype(np.int8)
        self._tidy()
        length = reader._slots.shape[1] - int((reader._slots[0] == SEEN).argmax())  # but for padding on the left
        missing = max(length - self._slots.shape[1], 0)
        self._slots = np.pad(self._slots, ((0, 0), (0, missing)), constant_values=EMPTY)
        for layer, source in zip(self._layers, reader._layers):
            if holds_keys(layer):
                append_slots(layer, missing)
                put_last(layer, row, source, length, self._slots.shape[1])
        self._slots[row, -length:] = reader._slots[0, -length:]
        if self._prompt_positions is not None:  # of which only the last is looked at any more
            self._prompt_positions = self._prompt_positions.clone()
            self._prompt_positions[..., row, -1] = reader._prompt_positions[..., 0, -1]
        self.seen, self.settled = (np.where(here, 0, count) for count in (self.seen, self.settled))
        self.passes += reader.passes

    def release(self, length, copied=True):
        length = min(int(self.seen.min()), length)
        if self._linear and (self.settled > length).any():
            return None
        everywhere = np.full_like(self.seen, length)
        self.forget(everywhere, settled=everywhere)
        length = int(self.seen.min())
        self._tidy()
        held = self.prompt_length + length
        if self._slots.shape[1] != held or self._misaligned():
            if self._linear:  # states of convolutions cannot be compacted
                return None
            self._compact(held)
        for layer in self._layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False
        return self.runner.released(self.cache) if copied and self._owns_cache else self.cache

    def close(self):
        if self._owns_cache:
            self.runner.take_back(self.cache)

    def reorder(self, rows):
        super().reorder(rows)
        self.cache.reorder_cache(rows.to(self.device))
        self._slots = self._slots[rows.numpy()]

    def _tidy(self, room: int = 0) -> None:
        """
        Crops slots at the end that no row has a token in; compacts if it must, as it may to make room for so many
        slots, or if it pays.
        """
        slots = self._slots.shape[1]
        if slots == 0:
            return
        in_use = np.flatnonzero(self._slots.any(0))
        unused = slots - 1 - int(in_use[-1]) if len(in_use) else slots
        if unused:
            remove_last([x for x in self._layers if self._snapshots is None or x not in self._linear], unused)
            self._slots = self._slots[:, : slots - unused]

        needed = int((self._slots != EMPTY).sum(1).max())
        full = self.runner.slots is not None and slots - unused + room > self.runner.slots
        pays = self.windowed or slots - unused - needed > max(16, COMPACT_AT * needed)
        gains = slots - unused > needed or self._misaligned()
        if (full or pays) and not self._linear and gains:
            self._compact(needed)
        pending = max(int((self.seen - self.settled).max()), 0)  # a member may lag behind what is settled
        for layer in self._sliding:
            cut_to_window(layer, pending)
        for layer in self._linear:
            cut_to_kernel(layer, pending)

    @contextmanager
    def _within_windows(self):
        """Sets aside slots that only a roll-back may need: transformers 5.17 attends to all that a layer holds."""
        aside = []
        for layer in self._sliding:
            extra = layer.keys.shape[-2] - (layer.sliding_window - 1) if holds_keys(layer) else 0
            if extra > 0:
                aside.append((layer, layer.keys[:, :, :extra], layer.values[:, :, :extra]))
                layer.keys, layer.values = layer.keys[:, :, extra:], layer.values[:, :, extra:]
        try:
            yield
        finally:
            for layer, keys, values in aside:
                layer.keys = torch.cat([keys, layer.keys], dim=2)
                layer.values = torch.cat([values, layer.values], dim=2)

    def _misaligned(self) -> bool:
        """Whether some row has a slot without a token behind one with a token."""
        return bool(((self._slots[:, :-1] != EMPTY) & (self._slots[:, 1:] == EMPTY)).any())

    def _compact(self, length: int) -> None:
        """Moves every row's empty slots before the others, and keeps the last `length` slots."""
        order = (self._slots != EMPTY).argsort(axis=1, kind="stable")[:, -length:]  # [B, length]
        slots = self._slots.shape[1]
        self._slots = np.take_along_axis(self._slots, order, axis=1)
        for layer in self._layers:
            if holds_keys(layer):
                pick_slots(layer, order, slots)
