"""Models that are wrong in one way, as a new version of transformers or custom code may make them."""

import torch

from hf_spec_ensemble.compat import given_cache, without_cache


def held(inputs):
    cache = given_cache(inputs)
    return 0 if cache is None else cache.get_seq_length()


def ignores_its_cache(forward, inputs):
    """As Llama did in transformers 5.24, when it was given its cache by the name of before."""
    return forward(**without_cache(inputs))


def counts_what_it_forgot(forward, inputs, read=[0]):
    """Its positions go on after a roll-back."""
    length = inputs["input_ids"].shape[1]
    read[0] = length if held(inputs) == 0 else read[0] + length
    first = read[0] - length
    inputs["position_ids"] = torch.arange(first, first + length)[None].expand_as(inputs["input_ids"])
    return forward(**inputs)


def sees_hidden_slots(forward, inputs):
    return forward(**{**inputs, "attention_mask": None})


def drops_a_token(forward, inputs):
    """Its cache loses a token of every pass over several that is not the first."""
    begins = held(inputs) == 0
    out = forward(**inputs)
    if not begins and inputs["input_ids"].shape[1] > 1:
        for layer in given_cache(inputs).layers:
            layer.keys[:, :, -2], layer.values[:, :, -2] = 0.0, 0.0
    return out


def keeps_a_state(forward, inputs, state=[None]):
    """It remembers what it has read outside of its cache."""
    out = forward(**inputs)
    begins = held(inputs) == inputs["input_ids"].shape[1]
    before = torch.zeros_like(out.logits[:, :1]) if begins or state[0] is None else state[0]
    total = before + torch.nn.functional.one_hot(inputs["input_ids"], out.logits.shape[-1]).cumsum(1)
    state[0] = total[:, -1:]
    out.logits = out.logits + total[:, -out.logits.shape[1] :].to(out.logits.dtype)
    return out


def positions_from_slots(forward, inputs):
    first, length = held(inputs), inputs["input_ids"].shape[1]
    inputs["position_ids"] = torch.arange(first, first + length)[None].expand_as(inputs["input_ids"])
    return forward(**inputs)


def window_over_slots(forward, inputs, window=6):
    """Reaches back over so many slots, hidden ones among them."""
    slots = held(inputs) + inputs["input_ids"].shape[1]
    mask = inputs.get("attention_mask")
    mask = torch.ones(len(inputs["input_ids"]), slots, dtype=torch.long) if mask is None else mask.clone()
    if inputs["input_ids"].shape[1] == 1:
        mask[:, :-window] = 0
    return forward(**{**inputs, "attention_mask": mask})


SINGLE = [ignores_its_cache, counts_what_it_forgot, drops_a_token, keeps_a_state]  # wrong for one row already
IN_BATCHES = [sees_hidden_slots, positions_from_slots]  # wrong where there are hidden slots


def broken(model, way):
    """The model, which reads in a wrong way from now on."""
    forward = model.forward

    def wrong(self, *args, **inputs):
        return way(forward, inputs)

    wrong.__signature__ = __import__("inspect").signature(forward)
    model.forward = wrong.__get__(model)
    return model
