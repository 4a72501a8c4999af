"""Makes `generate()` of every transformers model accept `ensemble_config`; changes no model object."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria

from .config import AUTO
from .decoding.call import Call
from .decoding.drafter import chosen_drafter
from .decoding.families import tokenizer_list
from .decoding.method import checked_call, ensemble_decoding
from .decoding.validate import assistant_list, check_inputs, check_members
from .members.adapters import all_locks_of, is_model


_original = None  # GenerationMixin.generate while the integration is enabled


def enable() -> None:
    """
    Makes `model.generate(..., assistant_model=<model or list>, ensemble_config=EnsembleConfig(...))` decode ensembles.
    Importing the package does this; calling it again changes nothing. Calls without `ensemble_config` are unchanged.

    Example:

    >>> import hf_spec_ensemble as se

    >>> se.disable()
    >>> se.enable()
    """
    global _original
    if _original is not None:
        return
    _original = original = GenerationMixin.generate

    @functools.wraps(original)
    def generate(self, *args, **kwargs):
        if kwargs.get("ensemble_config") is None or kwargs.get("custom_generate") is not None:
            if "ensemble_config" in kwargs and kwargs["ensemble_config"] is None:
                del kwargs["ensemble_config"]
            return original(self, *args, **kwargs)
        arguments = _ensemble_arguments(self, original, args, kwargs)
        with all_locks_of(_encoding_members(self, **arguments["custom_generate"].keywords)):
            return original(self, **arguments)

    GenerationMixin.generate = generate


def disable() -> None:
    """Undoes `enable`: `generate()` is transformers' own again. Calling it twice changes nothing."""
    global _original
    if _original is not None:
        GenerationMixin.generate = _original
        _original = None


def _encoding_members(model, assistant_models: list, drafter: Any = None, **_) -> list:
    """The members if they have encoders: these run before decoding begins, with no other member's adapter active."""
    encodes = model.config.is_encoder_decoder or model.config.get_text_config() is not model.config
    return [model, *assistant_models, *([drafter] if is_model(drafter) else [])] if encodes else []


def call_of(model, **kwargs) -> Call:
    """The call that `model.generate(**kwargs)` with an `ensemble_config` would decode, checked; reads no token."""
    generate = _original or GenerationMixin.generate
    return generate(model, **_ensemble_arguments(model, generate, (), kwargs, decode=checked_call))


def _ensemble_arguments(
    model, generate, args: tuple, kwargs: dict[str, Any], decode: Callable = ensemble_decoding
) -> dict[str, Any]:
    """
    The arguments for transformers' own `generate` that make it decode an ensemble, or do what else `decode` does. What
    it does not hand to a `custom_generate` callable is bound to ours: the members, the streamer, and the tokenizer of
    stop strings.
    """
    bound = inspect.signature(generate).bind(model, *args, **kwargs).arguments
    arguments = {name: value for name, value in bound.items() if name not in ("self", "kwargs")} | bound["kwargs"]

    config = arguments.pop("ensemble_config")
    # Some models' own `generate`, Whisper's for one, looks into `assistant_model` and passes on what it does not know
    given = [arguments.pop(name, None) for name in ("assistant_model", "assistant_models")]
    assistants = assistant_list(next((models for models in given if models is not None), None))
    drafter = chosen_drafter(arguments.pop("drafter", AUTO), config)
    tokenizer, theirs = arguments.pop("tokenizer", None), arguments.pop("assistant_tokenizer", None)
    tokenizers = tokenizer_list(tokenizer, theirs, len(assistants))
    check_members([model, *assistants], config, drafter, tokenizers)  # before anything else may go wrong, or take time
    check_inputs(arguments)
    _move_stop_strings(model, arguments, tokenizer)
    arguments["custom_generate"] = functools.partial(
        decode,
        assistant_models=assistants,
        ensemble_config=config,
        drafter=drafter,
        media={
            name: value
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor) and name not in ("inputs", "input_ids")
        },
        tokenizer=tokenizer,
        assistant_tokenizer=theirs,
        streamer=arguments.get("streamer"),
        synced_gpus=bool(arguments.get("synced_gpus")),
    )
    return arguments


def _move_stop_strings(model, arguments: dict[str, Any], tokenizer) -> None:
    """Turns `stop_strings`, wherever they are set, into a stopping criterion: a callable is not given the tokenizer."""
    given = arguments.get("generation_config")
    stop_strings = arguments.get("stop_strings")
    if stop_strings is None and given is not None:
        stop_strings = given.stop_strings
    if stop_strings is None:
        stop_strings = model.generation_config.stop_strings
    if stop_strings is None:
        return
    if tokenizer is None:
        raise ValueError(f"`stop_strings` ({stop_strings!r}) need the `tokenizer`: pass it to `generate`.")
    if given is not None and given.stop_strings is not None:
        arguments["generation_config"] = copy.deepcopy(given)
        arguments["generation_config"].stop_strings = None
    if "stop_strings" in arguments or model.generation_config.stop_strings is not None:
        arguments["stop_strings"] = None
    criterion = StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer)
    arguments["stopping_criteria"] = StoppingCriteriaList([*(arguments.get("stopping_criteria") or []), criterion])
