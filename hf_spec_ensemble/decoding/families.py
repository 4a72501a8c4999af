"""Members of different families: whether their tokenizers differ, the union of these, and a prompt for each member."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import CandidateGenerator

from ..config import EnsembleConfig
from ..ensemble.padded import left_padded
from ..ensemble.spelling import special_ids, spelling_of
from ..ensemble.union import Union, Vocabulary, union_of
from ..members.prompts import Prompt
from ..notices import warn_once
from .vocabulary import differences, kept_tokens


# Vocabularies of one tokenizer that are padded to different sizes differ by less than this share (Qwen2.5: 0.1 %).
PADDING_SHARE = 0.02


def tokenizer_list(tokenizer: Any, assistant_tokenizer: Any, assistants: int) -> list[PreTrainedTokenizerBase] | None:
    """
    The members' tokenizers, the main model's first; `None` if none are given for assistants.

    Args:
        tokenizer: The main model's.
        assistant_tokenizer: One for all assistants or a list with one for each; `None` for one that has the main's.
        assistants (`int`): How many there are.

    Raises:
        `ValueError`, `TypeError`: if there are too few, or what is given is none.
    """
    if assistant_tokenizer is None:
        return None
    if tokenizer is None:
        raise ValueError(
            "`assistant_tokenizer` is given without `tokenizer`: pass the main model's, to tell which"
            " tokens are the same."
        )
    given = (
        assistant_tokenizer if isinstance(assistant_tokenizer, (list, tuple)) else [assistant_tokenizer] * assistants
    )
    if len(given) != assistants:
        raise ValueError(
            f"`assistant_tokenizer` has {len(given)} entries for {assistants} assistant models: give one for each, in "
            "their order (None for one with the main model's)."
        )
    tokenizers = [tokenizer, *(tokenizer if each is None else each for each in given)]
    for each in tokenizers:
        if not isinstance(each, PreTrainedTokenizerBase):
            raise TypeError(
                f"A tokenizer must be one of transformers', but is a {type(each).__name__}: {str(each)[:80]!r}."
            )
    return tokenizers


def differ(models: Sequence[PreTrainedModel], tokenizers: Sequence[PreTrainedTokenizerBase]) -> bool:
    """Whether members need a union: ids stand for different tokens, or vocabularies differ by more than padding."""
    sizes = [_size(model) for model in models]
    if max(sizes) - min(sizes) > PADDING_SHARE * max(sizes):
        return True
    main, *others = tokenizers
    return any(other is not main and _tokens_differ(main, other, min(sizes)) for other in others)


_found: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer -> other -> what was compared, and the result


def _tokens_differ(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, size: int) -> bool:
    """Whether ids below `size` stand for different tokens; found out once."""
    kept, compared = _found.setdefault(one, WeakKeyDictionary()), (len(one), len(other), size)
    if other not in kept or kept[other][0] != compared:
        kept[other] = compared, bool(differences(kept_tokens(one), kept_tokens(other), size))
    return kept[other][1]


def union_for(
    models: Sequence[PreTrainedModel],
    tokenizers: Sequence[PreTrainedTokenizerBase] | None,
    config: EnsembleConfig,
    generation_config: GenerationConfig,
) -> Union | None:
    """
    The vocabulary of members with different tokenizers; `None` where these are the same.

    Args:
        models (`list[PreTrainedModel]`): `[model, *assistant_models]`, and the drafter if that is a model.
        tokenizers (`list[PreTrainedTokenizerBase]`, *optional*): Of the members, as `tokenizer_list` gives them.
        config (`EnsembleConfig`): Of the members.
        generation_config (`GenerationConfig`): Says which tokens end a text.

    Raises:
        `ValueError`: for tokenizers whose tokens' bytes are not known, and models that read more than text.
    """
    if tokenizers is None or not differ(models[: len(tokenizers)], tokenizers):
        return None
    for model in models:
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"A {type(model).__name__} is an encoder-decoder model: members with different tokenizers must be "
                "decoder-only. Use members that share one tokenizer."
            )
    drafting = {i for i, weight in enumerate(config.weights or ()) if i and weight == 0}
    drafting |= set(range(len(tokenizers), len(models)))
    every = [*tokenizers, *[tokenizers[0]] * (len(models) - len(tokenizers))]
    sizes = [_size(model) for model in models]
    vocabularies = [
        Vocabulary(spelling_of(tokenizer, size), size, _ends(tokenizer, generation_config if i == 0 else model))
        for i, (model, tokenizer, size) in enumerate(zip(models, every, sizes))
    ]
    return union_of(tuple(vocabularies), only_common=not config.is_mixture, drafting=frozenset(drafting))


def check_union(generation_config: GenerationConfig, drafter: Any, media: bool) -> None:
    """
    Checks that a call can be decoded over a union.

    Raises:
        `ValueError`: naming the argument, and what to do.
    """
    of_union = "members with different tokenizers"
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(f"`num_beams` ({generation_config.num_beams}) is not supported for {of_union}: set it to 1.")
    if generation_config.cache_implementation is not None:
        raise ValueError(
            f"`cache_implementation` ({generation_config.cache_implementation!r}) is not supported for {of_union}, "
            "whose texts have different lengths: leave it out."
        )
    if isinstance(drafter, CandidateGenerator):
        raise ValueError(
            f"A {type(drafter).__name__} as `drafter` is not supported for {of_union}: use 'prompt_lookup' or a "
            "`Suffixes`."
        )
    if media:
        raise ValueError(f"Images and the like are not supported for {of_union}: leave them out.")


def prompts_for(
    models: Sequence[PreTrainedModel],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    own: Sequence[Prompt | None],
    ids: torch.Tensor,
    mask: torch.Tensor | None,
) -> list[Prompt | None]:
    """
    A prompt for every assistant: its own, or the text of the main model's in its own tokens, behind the one that begins
    a text where its tokenizer puts one. Special tokens of the main model's prompt are left out.

    Args:
        models (`list[PreTrainedModel]`, N), tokenizers (`list`, N): The members.
        own (`list[Prompt | None]`, N or more): Those given with `with_prompt`; of drafters, behind them, as they are.
        ids (`torch.LongTensor` `[B, P]`), mask (`torch.LongTensor` `[B, P]`, *optional*): The main model's.

    Raises:
        `ValueError`: for a text that is empty in a member's tokens.
    """
    main, prompts, texts = tokenizers[0], list(own), None
    for i in range(1, len(tokenizers)):
        if prompts[i] is None:
            texts = _texts(main, ids, mask) if texts is None else texts
            prompts[i] = _encoded(models[i], tokenizers[i], texts)
    return prompts


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What a member reads of a text that goes on: the token that begins it, if there is one, but none that ends it."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[dict]) -> list[int]:
    """A prompt, or messages by the chat template; without one their texts are read, with blank lines between."""
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt)
    if tokenizer.chat_template is None:
        return text_ids(tokenizer, "\n\n".join(message["content"] for message in prompt))
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def _texts(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, mask: torch.Tensor | None) -> list[str]:
    visible = torch.ones_like(ids).bool() if mask is None else mask.bool()
    special, texts = special_ids(tokenizer), []
    for row, seen in zip(ids.cpu(), visible.cpu()):
        tokens = row[seen].tolist()
        if special.intersection(tokens[1:]):
            warn_once(
                "The prompt holds special tokens, as those of a chat template, which other families do not know: they "
                "read its text without them. `Ensemble.encode` and `with_prompt` give each member a prompt of its own."
            )
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


def _encoded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Prompt:
    rows = [text_ids(tokenizer, text) for text in texts]
    if not all(rows):
        raise ValueError(
            f"The prompt {texts[rows.index([])]!r} is empty in the tokens of a {type(model).__name__}, whose tokenizer "
            "puts no token before a text: give it one with `with_prompt`."
        )
    return Prompt.of(model, *left_padded(rows))


def _ends(tokenizer: PreTrainedTokenizerBase, source: GenerationConfig | PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a text, first the one that stands for all: the tokenizer's, if it does."""
    own = tokenizer.eos_token_id
    of_call = isinstance(source, GenerationConfig)
    given = (source if of_call else source.generation_config).eos_token_id
    found = given if isinstance(given, list) else [] if given is None else [given]
    if not of_call and own is not None:
        found = [*found, own]
    if own is not None and (own in found or not found):
        found = [own, *found]
    return tuple(dict.fromkeys(found))


def _size(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size
