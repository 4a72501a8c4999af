"""Member: one model and its KV cache. Scores tokens, forgets them, knows nothing of the other members."""

import inspect
import time
from collections import deque
from collections.abc import Hashable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.candidate_generator import _prepare_token_type_ids

from .padded import columns, window


# Slots that no row needs any more may make up this share of a cache before it is compacted.
COMPACT_AT = 0.25

# What Member passes to the model itself, from its own state.
OWN_KWARGS = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache", "output_logits")


class Stopwatch:
    """
    Adds up seconds between `start` and `stop`; with device events on a GPU, so that measuring waits for nothing.

    `laps()` gives, once, each measurement with the label given to `stop`, those known by now.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: deque[tuple[Hashable, torch.Event, torch.Event]] = deque()
        self._laps: list[tuple[Hashable, float]] = []

    def start(self) -> None:
        self._begin = self._record() if self.on_gpu else time.perf_counter()

    def stop(self, label: Hashable = None) -> None:
        if self.on_gpu:
            self._events.append((label, self._begin, self._record()))
        else:
            self._lap(label, time.perf_counter() - self._begin)

    def laps(self) -> list[tuple[Hashable, float]]:
        while self._events and self._events[0][2].query():
            self._take_event()
        laps, self._laps = self._laps, []
        return laps

    @property
    def seconds(self) -> float:
        while self._events:
            self._events[0][2].synchronize()
            self._take_event()
        return self._seconds

    def _record(self) -> torch.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _take_event(self) -> None:
        label, begin, end = self._events.popleft()
        self._lap(label, begin.elapsed_time(end) / 1000)

    def _lap(self, label: Hashable, seconds: float) -> None:
        self._seconds += seconds
        self._laps.append((label, seconds))


class Member:
    """
    A causal language model, its cache, and how many tokens of each row it has seen.

    Rows of a batch may see and forget different numbers of tokens. A forgotten token, or the padding of a shorter row,
    stays in the cache as a hidden slot, masked out; slots hidden in every row at the end are cropped, and the rest is
    compacted when there is much of it. Sliding-window layers measure distance in slots, so with those a cache is
    compacted before every pass that follows a hidden slot. For one row all this is the ordinary crop.

    Counts of tokens (`seen` and arguments) are numpy integers `[B]` and include a prompt's left padding.

    Args:
        model (`PreTrainedModel`):
            Decoder-only.
        kwargs (`dict`):
            What `generate()` prepared for its `forward`: `attention_mask` and `position_ids` of the prompt, on the
            model's device, perhaps `past_key_values`, and anything else, which is passed on.
        prompt (`torch.LongTensor` `[B, P]`):
            For its shape.
    """

    def __init__(self, model: PreTrainedModel, kwargs: dict[str, Any], prompt: torch.Tensor):
        self.model = model
        self.device = model.device  # which transformers looks up anew each time
        self.kwargs = {key: value for key, value in kwargs.items() if key not in OWN_KWARGS}
        self.cache: Cache = kwargs.get("past_key_values")
        if self.cache is None:
            self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.cache.activate_past_recording()  # sliding-window layers keep what a roll-back may need

        batch, self.prompt_length = prompt.shape
        mask = kwargs.get("attention_mask")
        self.prompt_visible = np.ones(prompt.shape, bool) if mask is None else mask.bool().cpu().numpy()
        self.prompt_positions = self._prompt_positions(kwargs.get("position_ids"))  # [..., B, P]
        self.visible = np.ones((batch, 0), bool)  # [B, S]: the slots that attention may see
        self.seen = np.zeros(batch, int)
        self.settled = np.zeros(batch, int)  # tokens that will never be forgotten

        self.passes = 0
        self.stopwatch = Stopwatch(self.device)
        self._takes_logits_to_keep = model._supports_logits_to_keep()
        self._sliding = [layer for layer in self.cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]

    def score(self, ids: torch.Tensor, end: np.ndarray, width: int = 0) -> torch.Tensor:
        """
        Runs one forward pass over the tokens `ids[b, seen[b]:end[b]]`, the whole prompt among them the first time.

        Args:
            ids (`torch.LongTensor` `[B, >= max(end)]`): The rows' tokens, prompt included.
            end (`np.ndarray` `[B]`): `seen` after the pass. Rows with `end[b] == seen[b]` read nothing.
            width (`int`): Least number of tokens to run over in each row, padded by any tokens, which are forgotten.

        Returns:
            `torch.Tensor` `[B, K, V]`, the model's dtype and device: logits after each token read. Of the prompt's only
            those after its last token are given, so `[b, 0]` predicts token `max(seen[b] + 1, P)`.
        """
        self._tidy()
        count = np.maximum(end - self.seen, 0)
        needed = int(count.max())
        width = max(needed, width)
        index = columns(self.seen, width)  # [B, W]
        real = index < end[:, None]
        first_pass = self.visible.shape[1] == 0
        if first_pass:
            real[:, : self.prompt_length] &= self.prompt_visible
        # Padding behind a row's tokens need not be hidden from them: attention is causal
        ahead = real if first_pass else np.ones_like(real)
        visible = np.concatenate([self.visible, ahead], axis=1)  # [B, S + W]

        chunk = window(ids, self.seen, width).to(self.device)
        kwargs = dict(self.kwargs)
        if kwargs.get("token_type_ids") is not None:
            kwargs = _prepare_token_type_ids(kwargs, visible.shape[1])
        inputs = self.model.prepare_inputs_for_generation(
            chunk,
            past_key_values=self.cache,
            # As in generate(): no mask where there is nothing to hide
            attention_mask=None if visible.all() else torch.from_numpy(visible).long().to(self.device),
            position_ids=self._positions(np.minimum(index, np.maximum(end - 1, 0)[:, None])),
            use_cache=True,
            is_first_iteration=first_pass,
            **kwargs,
        )
        keep = width - (self.prompt_length - 1 if first_pass else 0)
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = keep
        with self._within_windows():
            self.stopwatch.start()
            logits = self.model(**inputs, return_dict=True).logits[:, -keep:]
            self.stopwatch.stop(None if first_pass else width)

        self.visible = np.concatenate([self.visible, real], axis=1)
        self.seen = self.seen + count
        self.passes += 1
        return logits[:, : logits.shape[1] - (width - needed)]

    def _prompt_positions(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """As given or, since the other members need not take the same arguments as the main model, from the mask."""
        module = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # PEFT wraps
        if "position_ids" not in inspect.signature(module.forward).parameters:
            return None
        if given is None:
            given = torch.from_numpy(np.maximum(self.prompt_visible.cumsum(-1) - 1, 0)).to(self.device)
        return given

    def _positions(self, index: np.ndarray) -> torch.Tensor | None:
        """The position ids of tokens `index` `[B, K]`: the prompt's as given, then one after the other."""
        given = self.prompt_positions
        if given is None:
            return None
        beyond = torch.from_numpy(index - (self.prompt_length - 1)).to(given.device)  # [B, K], <= 0 within the prompt
        after = given[..., -1:] + beyond
        if index.min() >= self.prompt_length:
            return after
        within = torch.from_numpy(np.minimum(index, self.prompt_length - 1)).to(given.device)
        return torch.where(beyond <= 0, given.gather(-1, within.expand(*given.shape[:-1], -1)), after)

    def forget(self, length: np.ndarray, settled: np.ndarray) -> None:
        """
        Rolls back: of each row, only the first `length[b]` tokens stay seen.

        Args:
            length (`np.ndarray` `[B]`): May exceed `seen`, then that row forgets nothing.
            settled (`np.ndarray` `[B]`): No later call asks for less than this.
        """
        dropped = np.maximum(self.seen - length, 0)
        self.settled = settled
        if dropped.any():
            from_end = self.visible[:, ::-1].cumsum(1)[:, ::-1]  # 1 for a row's last visible slot
            self.visible = self.visible & (from_end > dropped[:, None])
            self.seen = self.seen - dropped

    def release(self, length: int) -> Cache:
        """The cache, as `generate()` would leave it after `length` tokens or however many all rows have seen."""
        length = min(int(self.seen.min()), length)
        everywhere = np.full_like(self.seen, length)
        self.forget(everywhere, settled=everywhere)
        self._tidy()
        if self.visible.shape[1] != length or self._misaligned():
            self._compact(length)
        for layer in self.cache.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False
        return self.cache

    def reorder(self, rows: torch.Tensor) -> None:
        """Row b continues what row `rows[b]` was (beam search). `rows`: `torch.LongTensor` `[B]`, CPU."""
        self.cache.reorder_cache(rows.to(self.device))
        if self.prompt_positions is not None:
            self.prompt_positions = self.prompt_positions.index_select(-2, rows.to(self.prompt_positions.device))
        rows = rows.numpy()
        self.visible, self.seen, self.settled = self.visible[rows], self.seen[rows], self.settled[rows]
        self.prompt_visible = self.prompt_visible[rows]

    def _tidy(self) -> None:
        """Crops slots that are hidden in every row at the end; compacts if it must or if it pays."""
        slots = self.visible.shape[1]
        if slots == 0:
            return
        in_use = np.flatnonzero(self.visible.any(0))
        unused = slots - 1 - int(in_use[-1]) if len(in_use) else slots
        if unused:
            for layer in self.cache.layers:
                if layer.is_initialized:
                    _remove_last(layer, unused)
            self.visible = self.visible[:, : slots - unused]

        needed = int(self.visible.sum(1).max())
        if self._misaligned() and (self._sliding or slots - unused - needed > max(16, COMPACT_AT * needed)):
            self._compact(needed)
        pending = max(int((self.seen - self.settled).max()), 0)  # a member may lag behind what is settled
        for layer in self._sliding:
            _cut_to_window(layer, pending)

    @contextmanager
    def _within_windows(self):
        """Sets aside slots that only a roll-back may need: transformers 5.17 attends to all that a layer holds."""
        aside = []
        for layer in self._sliding:
            extra = layer.keys.shape[-2] - (layer.sliding_window - 1) if layer.is_initialized else 0
            if extra > 0:
                aside.append((layer, layer.keys[:, :, :extra], layer.values[:, :, :extra]))
                layer.keys, layer.values = layer.keys[:, :, extra:], layer.values[:, :, extra:]
        yield
        for layer, keys, values in aside:
            layer.keys = torch.cat([keys, layer.keys], dim=2)
            layer.values = torch.cat([values, layer.values], dim=2)

    def _misaligned(self) -> bool:
        """Whether some row has a hidden slot behind a visible one."""
        return bool((self.visible[:, :-1] & ~self.visible[:, 1:]).any())

    def _compact(self, length: int) -> None:
        """Moves every row's visible slots to the end, hidden ones before them, and keeps the last `length` slots."""
        order = self.visible.argsort(axis=1, kind="stable")[:, -length:]  # [B, length]
        slots = self.visible.shape[1]
        self.visible = np.take_along_axis(self.visible, order, axis=1)
        for layer in self.cache.layers:
            if not layer.is_initialized:
                continue
            held = layer.keys.shape[-2]  # the last ones of `slots`
            source = torch.from_numpy(np.maximum(order[:, -held:] - (slots - held), 0)).to(layer.keys.device)
            for name in ("keys", "values"):
                states = getattr(layer, name)  # [B, heads, held, D]
                spread = source[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                setattr(layer, name, states.gather(2, spread))
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = length


def _remove_last(layer: DynamicLayer, slots: int) -> None:
    """Removes the last slots of a layer, and no others: a sliding-window layer's own `crop` also cuts to the window."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.keys, layer.values = layer.keys[:, :, :-slots], layer.values[:, :, :-slots]
        layer.cumulative_length -= slots
    else:
        layer.crop(-slots)


def _cut_to_window(layer: DynamicSlidingWindowLayer, pending: int) -> None:
    """Removes slots so old that no window reaches them, even after forgetting `pending` tokens."""
    if layer.is_initialized:
        kept = layer.sliding_window - 1 + pending
        layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]


def can_roll_back(cache: Cache) -> bool:
    """Whether `Member.forget` works on this cache: growing full-attention and sliding-window layers only."""
    return isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or type(layer).__name__ == "DummyLayer"
        for layer in cache.layers
    )
