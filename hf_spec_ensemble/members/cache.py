"""Roll-back of caches: what `Member` does to the layers of transformers' caches."""

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ..compat import given_cache, own_cache, without_cache
from .snapshots import needs_snapshots


def empty_cache(model: PreTrainedModel, slots: int | None = None) -> Cache:
    """
    A cache as `generate()` makes it: the model's growing one or, given a number of slots, a static one. In that, layers
    with a sliding window have all these slots too: the mask enforces the window, and a roll-back finds what shifting
    the window would have dropped.
    """
    config = model.config.get_text_config(decoder=True)
    if slots is None:
        cache = decoder_cache(own_cache(model))
    else:
        cache = StaticCache(config=config, max_cache_len=slots)
        cache.layers = [
            StaticLayer(slots) if type(layer) is StaticSlidingWindowLayer else layer for layer in cache.layers
        ]
    return EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache


def keep_whole_source(cache: Cache | None) -> None:
    """
    Lets attention to an encoder's outputs reach all of them: transformers makes that cache, too, with the decoder's
    windows (T5Gemma). Only a cache that holds nothing yet is changed.
    """
    if isinstance(cache, EncoderDecoderCache) and not any(cache.is_updated.values()):
        cache.cross_attention_cache = DynamicCache()


def decoder_cache(cache: Cache | None) -> Cache | None:
    """The part that grows with the text; an encoder's outputs are attended to through another."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def decoder_layers(cache: Cache) -> list:
    """The layers that grow with the text."""
    return decoder_cache(cache).layers


def tokens_held(cache: Cache) -> int:
    """How many tokens a cache has seen; 0 if none of its layers can tell."""
    return max(
        (int(layer.get_seq_length()) for layer in decoder_layers(cache) if hasattr(layer, "get_seq_length")), default=0
    )


def without_fresh_static_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    `generate()` makes static caches for texts that are read token by token, with no room for the padding of passes and
    with sliding windows that cannot go back. Dropping one loses nothing: it holds nothing yet.
    """
    cache = given_cache(kwargs)
    fresh = isinstance(decoder_cache(cache), StaticCache) and not tokens_held(cache)
    if not fresh or getattr(cache, "_is_user_defined", False):
        return kwargs
    return without_cache(kwargs)


def holds_keys(layer: CacheLayerMixin) -> bool:
    """Whether an attention layer holds keys: layers that use another layer's keys stay empty (Gemma 4)."""
    return layer.is_initialized and layer.keys is not None


def remove_last(layers: Sequence[CacheLayerMixin | LinearAttentionLayer], slots: int) -> None:
    """Removes the last slots of layers, and no others: some layers' own `crop` also cuts to their window."""
    for layer in layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for i, states in layer.conv_states.items():
                layer.conv_states[i] = states[..., :-slots]
        if isinstance(layer, DynamicSlidingWindowLayer) and holds_keys(layer):
            layer.keys, layer.values = layer.keys[:, :, :-slots], layer.values[:, :, :-slots]
            layer.cumulative_length -= slots
        elif isinstance(layer, DynamicLayer) and holds_keys(layer):
            DynamicLayer.crop(layer, -slots)
    # What static layers hold beyond their length is hidden by the mask, and overwritten
    lengths = [layer.cumulative_length for layer in layers if isinstance(layer, StaticLayer)]
    if lengths:
        torch._foreach_sub_(lengths, slots)


def append_slots(layer: CacheLayerMixin, slots: int) -> None:
    """Adds slots that hold nothing."""
    if isinstance(layer, (StaticLayer, DynamicSlidingWindowLayer)):
        layer.cumulative_length += slots
    if isinstance(layer, StaticLayer):
        return
    for name in ("keys", "values"):
        states = getattr(layer, name)  # [B, heads, S, D]
        nothing = states.new_zeros(*states.shape[:2], slots, states.shape[3])
        setattr(layer, name, torch.cat([states, nothing], dim=2))


def pick_slots(layer: CacheLayerMixin, order: np.ndarray, slots: int) -> None:
    """
    Lets a layer hold slots `order[b]` of what were the first `slots` of row b, in this order.

    Args:
        order (`np.ndarray` `[B, length]`): Each in [0, slots). A layer that holds only the last of them fills the
            others with any values.
    """
    length = order.shape[1]
    held = slots if isinstance(layer, StaticLayer) else layer.keys.shape[-2]
    source = torch.from_numpy(np.maximum(order[:, -held:] - (slots - held), 0)).to(layer.keys.device)
    for name in ("keys", "values"):
        states = getattr(layer, name)  # [B, heads, held or more, D]
        picked = states.gather(2, source[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
        if isinstance(layer, StaticLayer):
            states[:, :, :length] = picked
        else:
            setattr(layer, name, picked)
    if isinstance(layer, StaticLayer):
        layer.cumulative_length.fill_(length)
    elif isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length


def put_last(layer: CacheLayerMixin, row: int, source: CacheLayerMixin, length: int, slots: int) -> None:
    """
    Lets the last of a layer's `slots`, in one row, hold what the last `length` slots of a growing layer of one row do,
    as far as both hold these.
    """
    held = slots if isinstance(layer, StaticLayer) else layer.keys.shape[-2]
    length = min(length, held, source.keys.shape[-2])
    for name in ("keys", "values"):
        getattr(layer, name)[row, :, held - length : held] = getattr(source, name)[0, :, -length:]


def beside(caches: Sequence[Cache], slots: int) -> Cache:
    """
    The first of some growing caches, with the rows of all, one cache's behind the other's: what each holds becomes the
    last of so many slots. The other caches are empty then.
    """
    for layers in zip(*map(decoder_layers, caches)):
        for name in ("keys", "values") if holds_keys(layers[0]) else ():
            rows = [getattr(layer, name) for layer in layers]  # [B, heads, S, D] each
            padded = [torch.nn.functional.pad(each, (0, 0, slots - each.shape[2], 0)) for each in rows]
            setattr(layers[0], name, torch.cat(padded))
            for layer in layers[1:]:
                setattr(layer, name, None)
    return caches[0]


def cut_to_window(layer: DynamicSlidingWindowLayer, pending: int) -> None:
    """Removes slots so old that no window reaches them, even after forgetting `pending` tokens."""
    if holds_keys(layer):
        kept = layer.sliding_window - 1 + pending
        layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]


def cut_to_kernel(layer: LinearAttentionLayer, pending: int) -> None:
    """Removes inputs of a convolution so old that its kernel will not reach them, even after forgetting `pending`."""
    for i, states in layer.conv_states.items():
        if states is not None:
            layer.conv_states[i] = states[..., -(layer.conv_kernel_size[i] + pending) :]


@contextmanager
def recording_as_before(cache: Cache | None):
    """
    Members let layers record what a roll-back may need. At the end they record it or not as before, unless what this
    yields was called.
    """
    layers = [] if cache is None else [layer for layer in decoder_layers(cache) if hasattr(layer, "record_past")]
    before = [(layer, layer.record_past) for layer in layers]
    yield before.clear
    for layer, recorded in before:
        layer.record_past = recorded


@contextmanager
def restored_on_error(cache: Cache | None):
    """
    Leaves a cache as it was given if anything goes wrong, so that the same call may be made again. No keys or values
    are copied: layers that grow do so by new tensors, and static ones write behind what they held.
    """
    caches = [] if cache is None else [cache]
    if isinstance(cache, EncoderDecoderCache):
        caches += [cache.self_attention_cache, cache.cross_attention_cache]
    layers = [layer for one in caches for layer in getattr(one, "layers", ())]
    # Lists and dicts are written to
    before = [
        (vars(thing), {k: copy.copy(v) if isinstance(v, (list, dict)) else v for k, v in vars(thing).items()})
        for thing in (*caches, *layers)
    ]
    lengths = [layer.cumulative_length for layer in layers if isinstance(layer, StaticLayer)]
    held = [length.clone() for length in lengths]
    try:
        yield
    except BaseException:
        for attributes, given in before:
            attributes.clear()
            attributes.update(given)
        for length, before_it in zip(lengths, held):
            length.copy_(before_it)
        raise


def can_roll_back(model: PreTrainedModel, cache: Cache | None) -> bool:
    """
    Whether `Member.forget` works on this cache: full-attention and sliding-window layers that grow, static ones of full
    length, convolutions over the last tokens, and recurrent layers, by copies of their states.
    """
    if cache is None:
        return True  # nothing is kept that would have to go back
    own = decoder_cache(cache)
    if isinstance(own, StaticCache):
        known, works = (StaticLayer,), not needs_snapshots(model)
    else:
        known = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)
        works = isinstance(own, DynamicCache)
    return works and all(type(layer) in known or type(layer).__name__ == "DummyLayer" for layer in own.layers)
