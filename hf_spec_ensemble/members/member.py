"""Member: one model and its KV cache. Scores tokens, forgets them, knows nothing of the other members."""

from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
from transformers.generation.candidate_generator import _prepare_token_type_ids

from ..compat import CACHE_NAMES, cache_names, forward_parameters, given_cache, without_cache
from ..ensemble.padded import columns, window
from .adapters import lock_of
from .cache import (
    append_slots,
    cut_to_kernel,
    cut_to_window,
    decoder_layers,
    holds_keys,
    pick_slots,
    remove_last,
    tokens_held,
)
from .placement import device_of
from .runner import Runner
from .snapshots import Snapshots, needs_snapshots
from .stopwatch import Stopwatch


# Slots that no row needs any more may make up this share of a cache before it is compacted.
COMPACT_AT = 0.25

# What Member passes to the model itself, from its own state; the mask and the positions are those of the decoder.
OWN_KWARGS = (*CACHE_NAMES, "logits_to_keep", "use_cache", "output_logits")

# A recurrent model reads final tokens in a pass of their own if there are more, so as not to read them again.
READ_AGAIN = 4

# What a slot of a cache holds for its row: nothing, a token, or one that the prompt's mask hides, padding on the left
# among these. Masked slots stay where they are: windows that count slots count them.
EMPTY, SEEN, MASKED = 0, 1, 2


class Member:
    """
    A language model, its cache, and how many tokens of each row it has seen. Of an encoder-decoder model, the decoder:
    the encoder's outputs are among `kwargs`.

    Rows of a batch may see and forget different numbers of tokens. A forgotten token, or the padding of a shorter row,
    stays in the cache as a hidden slot, masked out; slots hidden in every row at the end are cropped, and the rest is
    compacted when there is much of it. Sliding-window layers measure distance in slots, so with those a cache is
    compacted before every pass that follows a hidden slot. Models that cannot do with hidden slots at all want rows
    that have seen equally many tokens (`in_step`). For one row all this is the ordinary crop. A recurrent state goes
    back to a copy made before a pass, and the model reads again what it has to keep.

    Counts of tokens (`seen` and arguments) are numpy integers `[B]` and include a prompt's left padding.

    Args:
        model (`PreTrainedModel`):
            Decoder-only or encoder-decoder.
        kwargs (`dict`):
            What `generate()` prepared for its `forward`: `attention_mask` and `position_ids` of the prompt (with an
            encoder `decoder_attention_mask` and `decoder_position_ids`), on the model's device, perhaps
            a cache, and anything else, which is passed on. That cache may hold the first tokens of the prompt.
        prompt (`torch.LongTensor` `[B, P]`):
            For its shape.
        runner (`Runner`, *optional*):
            How its passes run; by default eagerly, over a cache that grows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kwargs: dict[str, Any],
        prompt: torch.Tensor,
        runner: Runner | None = None,
    ):
        self._begin(model, kwargs, prompt, runner or Runner(model))
        self._prepared_cache_name, self._cache_name = cache_names(model)
        self.cache: Cache | None = given_cache(kwargs)
        self._owns_cache = self.cache is None
        if self.cache is None:
            self.cache = self.runner.new_cache()
        self.cache.activate_past_recording()  # sliding-window layers keep what a roll-back may need
        self._look_at_layers()

        held = tokens_held(self.cache)
        self._slots = self._prompt_slots(0, held)  # [B, S]
        self.seen = np.full(len(prompt), held)
        self.settled = self.seen  # tokens that will never be forgotten

        self._snapshots = Snapshots(self._linear) if needs_snapshots(model) else None
        # A cache made without the model's config holds all tokens in every layer, behind the same masks
        own_layers = decoder_layers(Runner(model).new_cache())
        self.windowed = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in own_layers)
        # Whether hidden slots disturb it. The check of models finds out; without it, those that take no positions
        self.minds_hidden_slots = self.prompt_positions is None

    def _look_at_layers(self) -> None:
        """Sorts the cache's layers. Some models add layers in their first pass."""
        self._layers = decoder_layers(self.cache)
        self._sliding = [layer for layer in self._layers if isinstance(layer, DynamicSlidingWindowLayer)]
        self._linear = [layer for layer in self._layers if isinstance(layer, LinearAttentionCacheLayerMixin)]

    def _begin(self, model: PreTrainedModel, kwargs: dict[str, Any], prompt: torch.Tensor, runner: Runner) -> None:
        """Sets what does not depend on a cache."""
        self.model = model
        self.runner = runner
        self.device = device_of(model)
        decoder = "decoder_" if model.config.is_encoder_decoder else ""
        self._mask_name, self._positions_name = f"{decoder}attention_mask", f"{decoder}position_ids"
        own = (*OWN_KWARGS, self._mask_name, self._positions_name)
        self.kwargs = {key: value for key, value in kwargs.items() if key not in own}
        self.prompt_length = prompt.shape[1]
        mask = kwargs.get(self._mask_name)
        self.prompt_visible = np.ones(prompt.shape, bool) if mask is None else mask.bool().cpu().numpy()
        self.prompt_positions = self._prompt_positions(kwargs.get(self._positions_name))  # [..., B, P]
        self._takes_logits_to_keep = model._supports_logits_to_keep()
        self.passes = 0
        self._last_token: int | None = None
        self._lock = lock_of(model)
        self.stopwatch = Stopwatch(self.device)

    @property
    def in_step(self) -> bool:
        """
        Whether all rows must have seen equally many tokens before a pass, because hidden slots would disturb them: the
        model counts slots instead of taking positions, say, or its layers keep a state of what they have read.
        """
        return self.minds_hidden_slots or bool(self._linear)

    @property
    def visible(self) -> np.ndarray:
        """The slots `[B, S]` that attention may see."""
        return self._slots == SEEN

    def read_as_if_known(self, vocab_size: int) -> None:
        """
        Lets a drafter with a smaller vocabulary than this read the tokens it lacks as its last one, which is padding
        too: what it proposes then may be worse, and the text is the members'.
        """
        own = self.model.config.get_text_config().vocab_size
        if own < vocab_size:
            self._last_token = own - 1

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
        if self._snapshots is None:
            return self._read(ids, end, width)
        final = np.minimum(end, max(int(self.settled.max()), self.prompt_length))
        if (final == end).all():
            return self._read(ids, end)
        apart = [self._read(ids, final)] if self.passes == 0 or (final - self.seen).max() > READ_AGAIN else []
        self._snapshots.take(int(self.seen.max()))
        return torch.cat([*apart, self._read(ids, end)], dim=1)

    def _read(self, ids: torch.Tensor, end: np.ndarray, width: int = 0) -> torch.Tensor:
        """A forward pass; see `score`."""
        first_pass = self.passes == 0
        count = np.maximum(end - self.seen, 0)
        needed = int(count.max())
        width = max(needed, width)
        if not first_pass:
            width = self.runner.width(width)
        self._tidy(room=width)
        index = columns(self.seen, width)  # [B, W]
        real = index < end[:, None]
        held = self._slots.shape[1]
        new = np.where(real, SEEN, EMPTY).astype(np.int8)
        if first_pass:
            new[:, : self.prompt_length - held] = self._prompt_slots(held, self.prompt_length)
        # Padding behind a row's tokens need not be hidden from them: attention is causal
        ahead = new == SEEN if first_pass else np.ones_like(real)
        visible = np.concatenate([self.visible, ahead], axis=1)  # [B, S + W]

        inputs = self._inputs(
            window(ids, self.seen, width),
            visible,
            positions=np.minimum(index, np.maximum(end - 1, 0)[:, None]),
            masked=not first_pass and self.runner.slots is not None,  # graphs are for one kind of inputs
            use_cache=True,
            is_first_iteration=first_pass,
            **{self._prepared_cache_name: self.cache},
        )
        if inputs.get(self._cache_name) is not self.cache:  # by another name, or dropped for long texts (Phi-3)
            inputs = {**without_cache(inputs), self._cache_name: self.cache}
        keep = width - (self.prompt_length - 1 - held if first_pass else 0)
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = keep
        with self._lock, self._within_windows():
            self.stopwatch.start()
            logits, as_usual = self.runner.run(inputs, 0 if first_pass else width)
            self.stopwatch.stop(width if as_usual else None)
        logits = logits[:, -keep:]
        if first_pass:
            self._look_at_layers()

        self._slots = np.concatenate([self._slots, new], axis=1)
        self.seen = self.seen + count
        self.passes += 1
        return logits[:, : logits.shape[1] - (width - needed)]

    def _prompt_slots(self, first: int, end: int) -> np.ndarray:
        return np.where(self.prompt_visible[:, first:end], SEEN, MASKED).astype(np.int8)

    def _inputs(
        self, chunk: torch.Tensor, visible: np.ndarray, positions: np.ndarray, masked: bool, **more
    ) -> dict[str, Any]:
        """
        What `forward` is given to read the tokens `chunk` `[B, W]`, of which these are the `positions` `[B, W]` in the
        text, where these slots are `visible` `[B, S + W]`. As in `generate()` there is no mask where it would hide
        nothing, unless it must be `masked`.
        """
        chunk = chunk.to(self.device)
        if self._last_token is not None:
            chunk = chunk.clamp(max=self._last_token)
        kwargs = dict(self.kwargs)
        if kwargs.get("token_type_ids") is not None:
            kwargs = _prepare_token_type_ids(kwargs, visible.shape[1])
        unmasked = visible.all() and not masked
        kwargs[self._mask_name] = None if unmasked else torch.from_numpy(visible).long().to(self.device)
        kwargs[self._positions_name] = self._positions(positions)
        return self.model.prepare_inputs_for_generation(chunk, **kwargs, **more)

    def _prompt_positions(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """As given or, since the other members need not take the same arguments as the main model, from the mask."""
        if not self._takes(self._positions_name):
            return None
        if given is None:
            given = torch.from_numpy(np.maximum(self.prompt_visible.cumsum(-1) - 1, 0)).to(self.device)
        return given

    def _takes(self, argument: str) -> bool:
        """Whether the model's `forward` does."""
        return argument in forward_parameters(self.model)

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
        if self._snapshots is not None:
            if dropped.any():
                dropped = np.maximum(self.seen - self._snapshots.restore(int(length.min())), 0)
            self._snapshots.forget_before(int(settled.min()))
        if dropped.any():
            from_end = (self._slots != EMPTY)[:, ::-1].cumsum(1)[:, ::-1]  # 1 for a row's last token
            self._slots = np.where(from_end <= dropped[:, None], EMPTY, self._slots)
            self.seen = self.seen - dropped

    def insert_masked(self, slots: int) -> None:
        """Puts so many masked slots behind all that was read, if the cache has layers of full attention only."""
        if slots and all(type(layer) is DynamicLayer for layer in self._layers):
            for layer in filter(holds_keys, self._layers):
                append_slots(layer, slots)
            self._slots = np.pad(self._slots, ((0, 0), (0, slots)), constant_values=MASKED)

    def release(self, length: int, copied: bool = True) -> Cache | None:
        """
        The cache, as `generate()` would leave it after `length` tokens or however many all rows have seen; `None` where
        rows ended at different lengths and layers cannot go back so far. One that will serve other calls is `copied`,
        unless nobody wants it.
        """
        length = min(int(self.seen.min()), length)
        if self._linear and (self.settled > length).any():
            return None
        everywhere = np.full_like(self.seen, length)
        self.forget(everywhere, settled=everywhere)
        length = int(self.seen.min())
        self._tidy()
        if self._slots.shape[1] != length or self._misaligned():
            if self._linear:  # states of convolutions cannot be compacted
                return None
            self._compact(length)
        for layer in self._layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False
        return self.runner.released(self.cache) if copied and self._owns_cache else self.cache

    def close(self) -> None:
        """Nothing will be asked of this member any more; its cache may serve another."""
        if self._owns_cache:
            self.runner.take_back(self.cache)

    def reorder(self, rows: torch.Tensor) -> None:
        """Row b continues what row `rows[b]` was (beam search). `rows`: `torch.LongTensor` `[B]`, CPU."""
        self.cache.reorder_cache(rows.to(self.device))
        self._reorder_prompt(rows)
        rows = rows.numpy()
        self._slots, self.seen, self.settled = self._slots[rows], self.seen[rows], self.settled[rows]

    def _reorder_prompt(self, rows: torch.Tensor) -> None:
        if self.prompt_positions is not None:
            self.prompt_positions = self.prompt_positions.index_select(-2, rows.to(self.prompt_positions.device))
        self.prompt_visible = self.prompt_visible[rows.numpy()]

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
        if (full or pays) and not self._linear and self._misaligned():
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
