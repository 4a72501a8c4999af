"""Caches that go back: what `Member` does to the layers of transformers' caches."""

import copy
from contextlib import contextmanager

from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from .snapshots import can_read_on, needs_snapshots


def empty_cache(model: PreTrainedModel) -> Cache:
    """As `generate()` would make it."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not model.config.is_encoder_decoder:
        return cache
    return EncoderDecoderCache(cache, DynamicCache(config=model.config.get_text_config(decoder=True)))


def decoder_layers(cache: Cache) -> list:
    """The layers that grow with the text; an encoder's outputs are attended to through others."""
    return cache.self_attention_cache.layers if isinstance(cache, EncoderDecoderCache) else cache.layers


def tokens_held(cache: Cache) -> int:
    """How many tokens a cache has seen; 0 if none of its layers can tell."""
    return max(
        (int(layer.get_seq_length()) for layer in decoder_layers(cache) if hasattr(layer, "get_seq_length")), default=0
    )


def remove_last(layer: DynamicLayer | LinearAttentionLayer, slots: int) -> None:
    """Removes the last slots of a layer, and no others: some layers' own `crop` also cuts to their window."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for i, states in layer.conv_states.items():
            layer.conv_states[i] = states[..., :-slots]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.keys, layer.values = layer.keys[:, :, :-slots], layer.values[:, :, :-slots]
        layer.cumulative_length -= slots
    elif isinstance(layer, DynamicLayer) and layer.is_initialized:
        DynamicLayer.crop(layer, -slots)


def cut_to_window(layer: DynamicSlidingWindowLayer, pending: int) -> None:
    """Removes slots so old that no window reaches them, even after forgetting `pending` tokens."""
    if layer.is_initialized:
        kept = layer.sliding_window - 1 + pending
        layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]


def cut_to_kernel(layer: LinearAttentionLayer, pending: int) -> None:
    """Removes inputs of a convolution so old that its kernel will not reach them, even after forgetting `pending`."""
    for i, states in layer.conv_states.items():
        if states is not None:
            layer.conv_states[i] = states[..., -(layer.conv_kernel_size[i] + pending) :]


@contextmanager
def restored_on_error(cache: Cache | None):
    """
    Leaves a cache as it was given if anything goes wrong, so that the same call may be made again. No tensor is copied:
    layers that can roll back grow by new ones and never write into those they hold. (Static ones do: not for these.)
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
    try:
        yield
    except BaseException:
        for attributes, given in before:
            attributes.clear()
            attributes.update(given)
        raise


def can_roll_back(model: PreTrainedModel, cache: Cache) -> bool:
    """
    Whether `Member.forget` works on this cache: full-attention and sliding-window layers that grow, convolutions over
    the last tokens, and recurrent layers of models that read on from a state.
    """
    layers = decoder_layers(cache)
    grows = isinstance(cache, DynamicCache) or isinstance(getattr(cache, "self_attention_cache", None), DynamicCache)
    known = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)
    return (
        grows
        and (not needs_snapshots(model) or can_read_on(model))
        and all(type(layer) in known or type(layer).__name__ == "DummyLayer" for layer in layers)
    )
