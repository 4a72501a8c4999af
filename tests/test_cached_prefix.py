"""A cache that an earlier call has filled: the main model goes on from it, the assistants read the text again."""

import pytest
import torch
from covering import pairwise
from families import members, prompts
from transformers import DynamicCache

from hf_spec_ensemble import EnsembleConfig


def generate(models, inputs, config=None, **kwargs):
    kwargs = dict(max_new_tokens=12, return_dict_in_generate=True) | kwargs
    torch.manual_seed(3)
    return models[0].generate(
        **inputs, assistant_model=models[1:], ensemble_config=config or EnsembleConfig(num_assistant_tokens=2), **kwargs
    )


def go_on(out, inputs, tail=3):
    """The text of a first call and some more tokens, as the prompt of a second one."""
    more = prompts(len(out.sequences), tail + 1, seed=7)["input_ids"][:, -tail:]
    ids = torch.cat([out.sequences, more], dim=1)
    new = torch.ones(len(ids), ids.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], new], dim=1)}


@pytest.mark.parametrize(
    "family,speculative,batch,do_sample",
    pairwise(
        dict(
            family=["llama", "gpt2", "opt", "gemma3"], speculative=[True, False], batch=[1, 3], do_sample=[False, True]
        )
    ),
)
def test_a_second_call_continues(family, speculative, batch, do_sample):
    models, inputs = members(family, 3), prompts(batch)
    config = EnsembleConfig(num_assistant_tokens=2, speculative=speculative)
    first = generate(models, inputs, config, eos_token_id=None)
    cache, prompt = first.past_key_values, go_on(first, inputs)
    assert 0 < cache.get_seq_length() < prompt["input_ids"].shape[1]
    afresh = generate(models, prompt, config, do_sample=do_sample)
    cached = generate(models, prompt, config, do_sample=do_sample, past_key_values=cache)
    assert cached.sequences.tolist() == afresh.sequences.tolist()


def test_the_main_model_reads_the_rest_only():
    models, inputs = members("llama", 2), prompts(1)
    first = generate(models, inputs, eos_token_id=None)
    prompt, read = go_on(first, inputs), []
    rest = prompt["input_ids"].shape[1] - first.past_key_values.get_seq_length()
    hook = models[0].model.embed_tokens.register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    config = EnsembleConfig(num_assistant_tokens=1)
    generate(models, prompt, config, past_key_values=first.past_key_values)
    hook.remove()
    assert rest <= read[0] <= rest + 1  # and perhaps the first proposal


def test_a_cache_of_plain_generate():
    models, inputs = members("llama", 2), prompts(3)
    cache = DynamicCache(config=models[0].config)
    models[0].generate(**inputs, past_key_values=cache, max_new_tokens=2)
    cache.crop(-(cache.get_seq_length() - inputs["input_ids"].shape[1] + 2))
    assert (
        generate(models, inputs, past_key_values=cache).sequences.tolist()
        == generate(models, inputs).sequences.tolist()
    )


@pytest.mark.parametrize("speculative", [True, False])
def test_the_assistants_need_the_tokens_in_the_cache(speculative):
    models, inputs = members("llama", 2), prompts(1)
    first = generate(models, inputs, eos_token_id=None)
    prompt = go_on(first, inputs)
    new = prompt["input_ids"][:, first.past_key_values.get_seq_length() :]
    config = EnsembleConfig(speculative=speculative)
    for wrong in (prompt | {"input_ids": new}, inputs):
        with pytest.raises(ValueError, match="past_key_values.*all tokens"):
            generate(models, wrong, config, past_key_values=first.past_key_values)
