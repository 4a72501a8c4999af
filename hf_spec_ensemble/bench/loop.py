"""The plainest rival: a mixture sampled by its components, without any scheduling."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from ..compat import cache_names
from ..decoding.drawing import Ancestral


@torch.no_grad()
def ancestral_loop(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    assistant_models: Sequence[PreTrainedModel],
    weights: Sequence[float],
    **model_kwargs,
) -> GenerateDecoderOnlyOutput:
    """
    Samples r = sum_i w_i p_i token by token: draws an owner i ~ w, lets it read what it has not read, and draws the
    token from p_i. A decoding method for `generate(custom_generate=ancestral_loop)`.

    The owners are those that the ensemble has after the same seed: which members read when is a good part of what a
    short text costs, and would otherwise differ by chance.

    Args:
        assistant_models (`Sequence[PreTrainedModel]`): The other members, decoder-only, with the main model's
            vocabulary.
        weights (`Sequence[float]`, N): With a sum of one, the main model's first.
        The others as `generate()` hands them to its decoding methods; `input_ids` `[1, P]`.

    Returns:
        `GenerateDecoderOnlyOutput`, its `sequences` `[1, T]`.

    Example:

    >>> import torch
    >>> from hf_spec_ensemble.bench.loop import ancestral_loop
    >>> from transformers import LlamaConfig, LlamaForCausalLM

    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> size |= dict(eos_token_id=None, pad_token_id=0)
    >>> one, two = (LlamaForCausalLM(LlamaConfig(**size)).eval() for _ in range(2))
    >>> rival = dict(custom_generate=ancestral_loop, assistant_models=[two], weights=[0.5, 0.5])
    >>> one.generate(torch.tensor([[3, 4, 5]]), **rival, do_sample=True, max_new_tokens=4).sequences.shape
    torch.Size([1, 7])
    """
    members = [model, *assistant_models]
    caches, read = [DynamicCache(config=member.config) for member in members], [0] * len(members)
    owners, prompt, ended = Ancestral(weights), input_ids.shape[1], False
    while not ended:
        (owner,) = owners.owners(np.array([input_ids.shape[1] - prompt])).tolist()
        cache = {cache_names(members[owner])[1]: caches[owner]}
        logits = members[owner](input_ids[:, read[owner] :], **cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        read[owner] = input_ids.shape[1]
        probs = logits_processor(input_ids, logits.float()).softmax(-1)
        input_ids = torch.cat([input_ids, torch.multinomial(probs, 1)], dim=1)
        ended = bool(stopping_criteria(input_ids, None).all())
    return GenerateDecoderOnlyOutput(sequences=input_ids)
