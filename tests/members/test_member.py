"""Member: whatever is scored, forgotten and compacted, its logits are those of the whole prefix."""

import random

import numpy as np
import pytest
import torch
from families import FAMILIES, PAD, VOCAB, prompts, tiny
from transformers import DynamicCache, StaticCache

from hf_spec_ensemble.members.cache import can_roll_back, empty_cache
from hf_spec_ensemble.members.cached import CachedMember


@torch.no_grad()
def alone(model, ids, mask):
    """Logits after every visible token of one row, without a cache."""
    return model(ids[mask.bool()][None], use_cache=False).logits[0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_after_any_history_are_those_of_the_whole_prefix(family, batch):
    model, inputs = tiny(family), prompts(batch)
    choice = random.Random(1)
    ids = torch.cat([inputs["input_ids"], torch.full((batch, 100), PAD)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(batch, 100, dtype=torch.long)], 1)
    member = CachedMember(model, {"attention_mask": inputs["attention_mask"]}, inputs["input_ids"])
    settled = np.zeros(batch, int)
    new = ids[:, 7:]
    for _ in range(40):
        end = np.maximum(member.seen, 0)
        for row in range(batch):
            fresh = choice.choice([0, 1, 1, 2, 4] if batch > 1 else [1, 2, 4])
            fresh = min(fresh, new.shape[1] - int(end[row]))
            new[row, end[row] : end[row] + fresh] = torch.randint(VOCAB, (fresh,))
            end[row] += fresh
        if not (end > member.seen).any():
            continue
        before = member.seen.copy()
        logits = member.score(new, end, width=choice.choice([0, 5]))  # padded or not
        assert member.seen.tolist() == end.tolist()
        for row in range(batch):
            first = max(int(before[row]), -1)  # of the prompt, only what follows its last token
            wanted = alone(model, ids[row, : 7 + end[row]], mask[row, : 7 + end[row]])[first - end[row] :]
            tolerance = 1e-4 if family == "mixtral" else 1e-9
            got = logits[row, : len(wanted)]
            if end[row] > before[row]:
                torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
        keep = np.array([choice.randint(int(s), int(e)) for s, e in zip(settled, member.seen)])
        settled = np.array([choice.randint(int(s), int(k)) for s, k in zip(settled, keep)])
        member.forget(keep, settled)
        assert member.seen.tolist() == keep.tolist()


def test_the_cache_of_a_single_row_is_cropped_and_holds_no_hidden_slots():
    model, inputs = tiny(), prompts(1)
    new = torch.randint(3, VOCAB, (1, 20))
    member = CachedMember(model, {}, inputs["input_ids"])
    with torch.no_grad():
        member.score(new, np.array([5]))
        member.forget(np.array([2]), np.array([2]))
        member.score(new, np.array([3]), width=4)
    assert member.cache.get_seq_length() == 13, "padded"
    member._tidy()
    assert member.cache.get_seq_length() == 10
    assert member.visible.all()


def test_hidden_slots_stay_few():
    """Rows that never agree on what is rejected: the cache must not grow with the number of rejections."""
    model, inputs = tiny(), prompts(3)
    new = torch.randint(3, VOCAB, (3, 120))
    member = CachedMember(model, {}, inputs["input_ids"])
    with torch.no_grad():
        for step in range(60):
            end = np.maximum(member.seen, 0) + 4
            member.score(new, end)
            keep = end - np.array([[1, 3, 3], [3, 1, 3], [3, 3, 1]])[step % 3]
            member.forget(keep, keep)
    longest = 7 + int(member.seen.max())
    assert member.cache.get_seq_length() < 1.5 * longest + 24


def test_which_caches_roll_back():
    model, sliding = tiny(), tiny("gemma3")
    assert can_roll_back(model, DynamicCache(config=model.config))
    assert can_roll_back(sliding, DynamicCache(config=sliding.config))
    assert can_roll_back(model, StaticCache(config=model.config, max_cache_len=8))
    assert can_roll_back(sliding, empty_cache(sliding, 8))
    assert not can_roll_back(sliding, StaticCache(config=sliding.config, max_cache_len=8))
