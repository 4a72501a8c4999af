"""Checks before the first forward pass: that members fit together, and that the call is supported."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import CandidateGenerator

from ..compat import forward_parameters, given_cache
from ..config import AUTO, EnsembleConfig
from ..ensemble.processing import in_order_only
from ..members.adapters import AdapterView, adds_virtual_tokens, is_model
from ..members.cache import tokens_held
from ..members.prompts import PromptView, model_of
from ..members.ranks import is_sharded
from ..notices import STANDARD, warn_once
from .drafter import PROMPT_LOOKUP, chosen_drafter, is_named
from .families import PADDING_SHARE, differ
from .suffixes import Suffixes
from .vocabulary import HOW, UNCOMPARED, check_beside


# What vision-language models are given besides text, as far as other models do not know it.
MEDIA = ("pixel_values", "pixel_values_videos", "pixel_values_images", "image_patches", "input_features")


def assistant_list(assistant_models: PreTrainedModel | list[PreTrainedModel] | None) -> list[PreTrainedModel]:
    """
    The assistants as a list, however they were given.

    Raises:
        `ValueError`: if there are none.
    """
    if assistant_models is None:
        raise ValueError(
            "`ensemble_config` needs the other members: pass `assistant_model`, a model or a list of them."
        )
    return list(assistant_models) if isinstance(assistant_models, (list, tuple)) else [assistant_models]


def check_members(
    members: list[PreTrainedModel],
    config: EnsembleConfig,
    drafter: PreTrainedModel | str | CandidateGenerator | None = None,
    tokenizers: list[PreTrainedTokenizerBase] | None = None,
) -> EnsembleConfig:
    """
    Checks that `members` (`[model, *assistant_models]`) can form the ensemble that `config` describes, and that
    `drafter` can propose to it. `tokenizers` are those of the members, where they are at hand.

    Returns:
        `EnsembleConfig`: `config.for_members(...)` of them.

    Raises:
        `TypeError`: if the config or a member is of the wrong type.
        `ValueError`: if the number of members, their kind, their vocabularies or their tokenizers do not fit.
    """
    if not isinstance(config, EnsembleConfig):
        raise TypeError(f"`ensemble_config` must be an EnsembleConfig, but is a {type(config).__name__}: {config!r}.")
    if isinstance(members[0], PromptView):
        raise TypeError(
            f"The main model reads the prompt of the call and has none of its own, but is {members[0]!r}: pass the "
            "model itself."
        )
    members, drafter = [model_of(member) for member in members], model_of(drafter)
    named = [(member, "the main model" if i == 0 else f"assistant model {i}") for i, member in enumerate(members)]
    if is_model(drafter):
        named.append((drafter, "the drafter"))
    elif not is_named(drafter) and not isinstance(drafter, (CandidateGenerator, Suffixes)):
        raise ValueError(
            f"`drafter` must be a model, {AUTO!r}, {PROMPT_LOOKUP!r}, a `Suffixes`, one of transformers' candidate "
            f"generators or None, but is {drafter!r}."
        )
    for member, name in named:
        if not is_model(member):
            raise TypeError(
                f"Every member must be a loaded transformers model, but {name} is a {type(member).__name__}: "
                f"{str(member)[:80]!r}. Load it with AutoModelForCausalLM.from_pretrained first."
            )
        if isinstance(member, AdapterView):
            member.refresh()
        if adds_virtual_tokens(member) and (config.speculative or member is not members[0]):
            raise ValueError(
                f"PEFT prepends virtual tokens to what {name}, a {type(member).__name__}, reads, which an ensemble "
                "does not count: use an adapter that changes layers, like LoRA"
                + (f", or {STANDARD}." if member is members[0] else ".")
            )
        if member.config.is_encoder_decoder != members[0].config.is_encoder_decoder:
            raise ValueError(
                f"Encoder-decoder and decoder-only models cannot form an ensemble, but {name} is a "
                f"{type(member).__name__} and the main model a {type(members[0]).__name__}: use members of one kind."
            )
    if tokenizers is not None:  # no need to look beside the models
        compared = named[1 : len(members)]
        if not differ(members, tokenizers):
            shared_vocabulary(members)
        named = [each for each in named if each not in compared]
    _, shared = shared_vocabulary([member for member, _ in named])
    if not check_beside(named, shared):
        warn_once(UNCOMPARED)
    return config.for_members(len(members), drafters=int(chosen_drafter(drafter, config) is not None))


def shared_vocabulary(members: list[PreTrainedModel]) -> tuple[int, int]:
    """
    The main model's vocabulary size, and the smallest of all members'. If sizes differ only by the padding of one
    tokenizer's vocabulary, warns once.

    Raises:
        `ValueError`: if they differ by more.
    """
    sizes = [member.config.get_text_config().vocab_size for member in members]
    if max(sizes) - min(sizes) > PADDING_SHARE * max(sizes):
        raise ValueError(
            f"The members have different vocabularies, of {sizes} tokens in the order [model, *assistant_models]. An "
            f"ensemble combines the probabilities of the same tokens: use members that share one tokenizer, or {HOW}."
        )
    if max(sizes) != min(sizes):
        warn_once(
            f"The members' vocabularies are padded to different sizes, {sizes}: the ensemble uses the {min(sizes)} "
            "tokens that all of them have. (Make sure that they share one tokenizer.)"
        )
    return sizes[0], min(sizes)


def check_prompt(input_ids: torch.Tensor, members: list[PreTrainedModel]) -> None:
    """
    Checks that all members know the tokens `[B, P]` of the prompt, where their vocabularies are padded differently.

    Raises:
        `ValueError`: naming one that some do not know.
    """
    size, shared = shared_vocabulary(members)
    unknown = input_ids[(input_ids >= shared) & (input_ids < size)] if shared < size else ()
    if len(unknown):
        raise ValueError(
            f"The prompt holds token {int(unknown[0])}, but the smallest of the members' vocabularies has {shared} "
            "tokens: leave out tokens that not all members know."
        )


def check_inputs(given: Mapping[str, Any]) -> None:
    """
    Checks what `generate()` is given to read, before a model's encoder reads it.

    Args:
        given (`Mapping`): By name: `input_ids` or `inputs`, `decoder_input_ids`, and their masks.

    Raises:
        `ValueError`: if there are no tokens, or a mask is not of their shape.
    """
    ids = given.get("inputs") if given.get("input_ids") is None else given["input_ids"]
    continues = given_cache(given) is not None  # `check_call` knows what it holds
    _check_sizes(ids, None if continues else given.get("attention_mask"), "attention_mask")
    _check_sizes(given.get("decoder_input_ids"), given.get("decoder_attention_mask"), "decoder_attention_mask")


def check_call(
    config: EnsembleConfig,
    generation_config: GenerationConfig,
    processors: LogitsProcessorList,
    input_ids: torch.Tensor,
    model_kwargs: dict,
) -> None:
    """
    Checks that this `generate()` call can be decoded as an ensemble.

    Raises:
        `ValueError`: naming the argument, and what to do.
    """
    if config.trace and config.speculative and not generation_config.return_dict_in_generate:
        raise ValueError("`trace=True` needs `return_dict_in_generate=True`: the trace is an attribute of the output.")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, None):
            raise ValueError(f"`{name}=True` is not supported with an ensemble: leave it out.")
    for name in ("assistant_ensemble_weight", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp",
                 "penalty_alpha", "dola_layers", "constraints", "force_words_ids"):  # fmt: skip
        if getattr(generation_config, name, None):
            raise ValueError(
                f"`{name}` ({getattr(generation_config, name)!r}) selects another decoding method and cannot be "
                "combined with `ensemble_config`: leave one of them out."
            )
    if (generation_config.num_beam_groups or 1) > 1:
        raise ValueError(f"`num_beam_groups` ({generation_config.num_beam_groups}) is not supported with an ensemble.")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "`inputs_embeds` is not supported with an ensemble, whose members embed differently: pass ids."
        )
    _check_processors(config, processors)
    _check_cache(generation_config, input_ids, model_kwargs)
    name = "decoder_attention_mask" if model_kwargs.get("encoder_outputs") is not None else "attention_mask"
    mask = model_kwargs.get(name)
    if mask is None:  # of ones alone: `generate()` keeps their number
        mask = torch.empty(len(input_ids), getattr(generation_config, "_mask_length", input_ids.shape[1]))
    _check_sizes(input_ids, mask, name)
    if config.speculative:
        _check_speculative(generation_config, model_kwargs)


def _check_processors(config: EnsembleConfig, processors: LogitsProcessorList) -> None:
    """Those that may not run ahead can be called once for each token only where they see the combination alone."""
    names = in_order_only(processors)
    if not names:
        return
    remedy = (
        "If what it returns depends on its arguments only, and it may be shown any prefix, set `stateless = True` on it"
    )
    if config.combine_on != "raw_logits":
        raise ValueError(
            f"{names[0]} may keep state from call to call, so that it must be called once for each token, in order. "
            f"With combine_on={config.combine_on!r} an ensemble calls processors once for each member: use "
            f"combine_on='raw_logits'. {remedy}."
        )
    if config.speculative:
        warn_once(
            f"{names[0]} may keep state from call to call: it is called once for each token, in order, so that tokens "
            f"are verified one by one, which is slower. {remedy}, and several are verified at once."
        )


def check_sharding(models: list[PreTrainedModel], config: EnsembleConfig, synced_gpus: bool) -> bool:
    """
    Checks that processes with different texts do not wait for each other's passes forever.

    Returns:
        `bool`: Whether the main model's passes go on until all processes have finished (`synced_gpus`).

    Raises:
        `ValueError`: if members are sharded whose passes do not go on.
    """
    sharded = [is_sharded(model) for model in models]
    if (synced_gpus and config.speculative) or any(sharded[1:]) or (config.speculative and any(sharded)):
        raise ValueError(
            "With weights sharded by FSDP or ZeRO-3 (`synced_gpus`) all processes must make the same passes, which an "
            "ensemble does for the main model alone, and only the standard one. Load members whole, tensor-parallel "
            f"(`tp_plan='auto'`), or shard only the main model and use {STANDARD}."
        )
    return synced_gpus or sharded[0]


def check_media(models: list[PreTrainedModel], encoded: dict | None, media: dict, model_kwargs: dict) -> None:
    """
    Checks that the assistants and drafters can be given what the main model is given besides text.

    Args:
        models (`list[PreTrainedModel]`): Those that read the main model's prompt.
        encoded (`dict`, *optional*): What the main model's encoders made of images and videos before the first pass.
        media (`dict`): The inputs of these encoders.
        model_kwargs (`dict`): What the main model's `forward` is given.

    Raises:
        `ValueError`: if a model takes no such inputs, or if they are not known.
    """
    if models and any(value is not None for value in (encoded or {}).values()) and not media:
        raise ValueError(
            "The images or videos reached the ensemble only as encoded by the main model, while the assistants need "
            "their own: call `generate(..., assistant_model=..., ensemble_config=...)` instead of `custom_generate=`."
        )
    given = [*media, *(name for name, value in model_kwargs.items() if name in MEDIA and value is not None)]
    for model in models:
        unknown = [name for name in given if name not in forward_parameters(model)]
        if unknown:
            raise ValueError(
                f"The main model is given `{unknown[0]}`, which a {type(model).__name__} does not take: all members "
                "must read the same inputs. Use assistants of the main model's kind, or leave the images out."
            )


def _check_sizes(ids: Any, mask: Any, name: str) -> None:
    """Of tokens `[B, P]` and their mask, where both are that; a cache that is continued changes neither."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return
    if not ids.numel():
        raise ValueError(
            f"The prompt is empty: its ids have the shape {tuple(ids.shape)}. Give at least one token, as the one that "
            "begins a text."
        )
    if isinstance(mask, torch.Tensor) and mask.shape != ids.shape:
        raise ValueError(
            f"`{name}` must have the shape of the ids, {tuple(ids.shape)}, but has {tuple(mask.shape)}: give 1 for "
            "every token and 0 for padding, those in a cache included."
        )


def _check_cache(generation_config: GenerationConfig, input_ids: torch.Tensor, model_kwargs: dict) -> None:
    """A cache from an earlier call holds some first tokens of the prompt; the assistants read them again."""
    cache = given_cache(model_kwargs)
    held = 0 if cache is None else tokens_held(cache)
    if not held:
        return
    mask = model_kwargs.get("attention_mask")
    whole = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
    if whole != input_ids.shape[1] or held >= whole:
        raise ValueError(
            f"`past_key_values` holds {held} tokens, but `input_ids` has {input_ids.shape[1]}: an ensemble needs all "
            "tokens of the text, those in the cache and at least one more, since the assistants have not seen them."
        )


def _check_speculative(generation_config: GenerationConfig, model_kwargs: dict) -> None:
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            "A speculative ensemble decodes greedily or by sampling, not with `num_beams` = "
            f"{generation_config.num_beams}: set `num_beams=1`, or decode the standard ensemble with {STANDARD}."
        )
    if not model_kwargs.get("use_cache", True):
        raise ValueError(f"A speculative ensemble needs KV caches: leave out `use_cache=False`, or use {STANDARD}.")
    if generation_config.prefill_chunk_size is not None:
        raise ValueError(
            f"`prefill_chunk_size` ({generation_config.prefill_chunk_size}) is not supported by a speculative "
            f"ensemble: leave it out, or use {STANDARD}."
        )
