"""The tokenizers of an ensemble's members: loaded, compared, and what each makes of a prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..decoding.families import PADDING_SHARE, prompt_ids
from ..decoding.vocabulary import UNCOMPARED, check_tokens, differences, tokens_of
from ..ensemble.padded import left_padded
from ..notices import warn_once
from .references import MemberReference


Tokenizers = tuple[PreTrainedTokenizerBase, list[PreTrainedTokenizerBase] | None]


def tokenizers_of(
    members: Sequence[MemberReference], drafter: MemberReference | str | None, access: dict[str, Any]
) -> Tokenizers:
    """
    The main model's tokenizer, and those of the assistants if one of them has another; else `None`.

    Raises:
        `ValueError`: for a drafter with another tokenizer than the main model.
        `OSError`: if the main model has none.
    """
    main, *others = found = [_load(each, access, needed=i == 0) for i, each in enumerate(members)]
    sizes = [_size(each, access) for each in members]
    tokens = [tokenizer and tokens_of(tokenizer) for tokenizer in found]
    differs = [
        bool(one and tokens[0] and differences(tokens[0], one, min(sizes)))
        or (tokenizer is not None and max(sizes[0], size) * (1 - PADDING_SHARE) > min(sizes[0], size))
        for tokenizer, one, size in zip(others, tokens[1:], sizes[1:])
    ]
    named = [(tokens[0], f"the main model ({members[0].name!r})")]
    named += [(one, "") for one in tokens[1:] if one is None]
    if isinstance(drafter, MemberReference):
        tokenizer = _load(drafter, access, needed=False)
        named.append((tokenizer and tokens_of(tokenizer), f"the drafter ({drafter.name!r})"))
        sizes.append(_size(drafter, access))
    if not check_tokens(named, min(sizes)):
        warn_once(UNCOMPARED)
    return main, [tokenizer or main for tokenizer in others] if any(differs) else None


def encoded(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | list[dict]]) -> dict[str, torch.Tensor]:
    """
    Ids and mask `[B, P]` of prompts, padded on the left. Messages go through the chat template; without one their texts
    are read, with blank lines between.
    """
    ids, mask = left_padded([prompt_ids(tokenizer, prompt) for prompt in prompts], pad=tokenizer.pad_token_id or 0)
    return {"input_ids": ids, "attention_mask": mask}


def _load(member: MemberReference, access: dict[str, Any], needed: bool) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(member.name, revision=member.revision or "main", **access)
    except (OSError, ValueError):
        if needed:
            raise
        return None  # a folder of weights alone


def _size(member: MemberReference, access: dict[str, Any]) -> int:
    config = AutoConfig.from_pretrained(member.name, revision=member.revision or "main", **access)
    return config.get_text_config().vocab_size
