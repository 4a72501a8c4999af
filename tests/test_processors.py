"""Processors of a user: which prefixes they are shown, how often, and what happens where they leave no token."""

import random

import pytest
import torch
from families import EOS, PAD, members, prompts

from hf_spec_ensemble import EnsembleConfig


PROMPT, NEW = 7, 14
DRAWS = {"greedy": dict(), "sampled": dict(do_sample=True)}


def generate(models, inputs, config, **kwargs):
    torch.manual_seed(3)
    kwargs = dict(max_new_tokens=NEW, return_dict_in_generate=True) | kwargs
    return models[0].generate(**inputs, assistant_model=models[1:], ensemble_config=config, **kwargs)


# --- prefix_allowed_tokens_fn ---------------------------------------------------------------------------------------


def branches(path):
    """What may follow a path in an endless trie over few tokens, so that lookups in the prompt find some."""
    few = random.Random(str(path)).sample(range(3, 12), 4)
    return [*few, EOS] if len(path) > 5 else few


class Trie:
    """Fails on any prefix of a row but its prompt and what it has allowed; where a text has ended, there is padding."""

    def __init__(self, inputs):
        self.prompts = inputs["input_ids"].tolist()
        self.calls = 0

    def __call__(self, batch_id, ids):
        self.calls += 1
        prompt, path = ids[:PROMPT].tolist(), ids[PROMPT:].tolist()
        assert prompt == self.prompts[batch_id], "the prefix of another row"
        for j, token in enumerate(path):
            if token == EOS:
                assert set(path[j + 1 :]) <= {PAD}
                return [PAD]
            if token not in branches(path[:j]):
                raise KeyError(f"{path[: j + 1]} was never allowed")
        return branches(path)


@pytest.mark.parametrize("drafter", [None, "prompt_lookup"])
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("combine_on", ["probs", "logits", "raw_logits"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("likeness", [0.3, 0.9])
def test_a_trie_sees_only_what_it_allowed(likeness, batch, combine_on, draw, drafter):
    models, inputs = members("llama", 3, likeness), prompts(batch, vocab=12)
    texts = []
    for speculative in (True, False):
        config = EnsembleConfig(combine_on=combine_on, speculative=speculative, num_assistant_tokens=2)
        arguments = dict(prefix_allowed_tokens_fn=Trie(inputs), drafter=drafter if speculative else None)
        texts.append(generate(models, inputs, config, **arguments, **DRAWS[draw]).sequences)
    assert texts[0].tolist() == texts[1].tolist()


def test_a_trie_with_several_texts_for_each_prompt():
    models, inputs = members("llama", 3, 0.3), prompts(2, vocab=12)
    call = dict(do_sample=True, num_return_sequences=3)
    texts = [
        generate(models, inputs, EnsembleConfig(speculative=s), prefix_allowed_tokens_fn=Trie(inputs), **call).sequences
        for s in (True, False)
    ]
    assert texts[0].tolist() == texts[1].tolist() and len(texts[0]) == 6


def test_a_token_forced_after_the_trie_is_kept():
    """It is not the trie's, and yet what follows it is shown to the trie, as in the standard ensemble."""
    models, inputs = members("llama", 2), prompts(1, length=1, vocab=12)

    def one_of_two(batch_id, ids):
        return [3 + int(ids[-1]) % 7, 4 + int(ids[-1]) % 7]

    texts = []
    for speculative in (True, False):
        config = EnsembleConfig(speculative=speculative, num_assistant_tokens=3)
        given = dict(prefix_allowed_tokens_fn=one_of_two, forced_bos_token_id=11)
        texts.append(generate(models, inputs, config, **given, drafter="prompt_lookup" if speculative else None))
    assert texts[0].sequences.tolist() == texts[1].sequences.tolist()
    assert texts[0].sequences[0, 1] == 11
