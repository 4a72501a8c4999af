"""Models that read in a wrong way, as a new version of transformers or custom code may make them."""

import inspect

import torch

from hf_spec_ensemble.compat import given_cache, without_cache


def held(inputs):
    cache = given_cache(inputs)
    return 0 if cache is None else cache.get_seq_length()


def _positions(inputs, first):
    ids = inputs["input_ids"]
    return torch.arange(first, first + ids.shape[1])[None].expand_as(ids)


def ignores_its_cache(model, forward, inputs):
    """As Llama did in transformers 5.24, when it was given its cache by its former name."""
    return forward(**without_cache(inputs))


def counts_what_it_forgot(model, forward, inputs):
    """Its positions go on after a roll-back."""
    first = 0 if held(inputs) == 0 else model.read
    model.read = first + inputs["input_ids"].shape[1]
    return forward(**inputs | {"position_ids": _positions(inputs, first)})


def drops_a_token(model, forward, inputs):
    """Its cache loses a token of every pass over several that is not the first."""
    begins = held(inputs) == 0
    out = forward(**inputs)
    if not begins and inputs["input_ids"].shape[1] > 1:
        for layer in given_cache(inputs).layers:
            layer.keys[:, :, -2], layer.values[:, :, -2] = 0.0, 0.0
    return out


def keeps_a_state(model, forward, inputs):
    """It remembers outside of its cache what it has read."""
    begins = held(inputs) == 0
    out = forward(**inputs)
    read = (inputs["input_ids"] % 7).cumsum(1)
    read = read if begins else read + model.read
    model.read = read[:, -1:]
    state = read[:, -out.logits.shape[1] :, None] * torch.arange(out.logits.shape[-1]).cos()
    out.logits = out.logits + 0.1 * out.logits.std() * state.to(out.logits.dtype)
    return out


def sees_hidden_slots(model, forward, inputs):
    mask = inputs.get("attention_mask")
    return forward(**inputs | {"attention_mask": None if mask is None else torch.ones_like(mask)})


def positions_from_slots(model, forward, inputs):
    return forward(**inputs | {"position_ids": _positions(inputs, held(inputs))})


def windows_count_slots(model, forward, inputs):
    """It sees so many slots back, hidden ones among them; its config says so, and its cache does not."""
    slots = held(inputs) + inputs["input_ids"].shape[1]
    mask = inputs.get("attention_mask")
    mask = torch.ones(len(inputs["input_ids"]), slots, dtype=torch.long) if mask is None else mask.clone()
    if inputs["input_ids"].shape[1] == 1:
        mask[:, : -model.config.window_size] = 0
    return forward(**inputs | {"attention_mask": mask})


def forbids_tokens(model, forward, inputs):
    """It gives some tokens no chance where it reads several behind others."""
    begins = held(inputs) == 0
    out = forward(**inputs)
    if not begins and inputs["input_ids"].shape[1] > 1:
        out.logits = out.logits.clone()
        out.logits[..., 3:25] = -torch.inf
    return out


ALWAYS = [
    ignores_its_cache,
    counts_what_it_forgot,
    drops_a_token,
    keeps_a_state,
    forbids_tokens,
]  # for single rows as well
WITH_HIDDEN_SLOTS = [sees_hidden_slots, positions_from_slots, windows_count_slots]


def broken(model, way):
    """The model, which reads in this wrong way from now on."""
    forward = model.forward

    def wrong(*args, **inputs):
        return way(model, forward, inputs)

    wrong.__signature__ = inspect.signature(forward)
    model.forward = wrong
    return model
