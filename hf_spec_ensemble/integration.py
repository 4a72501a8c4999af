"""Makes `generate()` of every transformers model accept `ensemble_config`; touches no model object."""

import copy
import functools
import inspect
from typing import Any

from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria

from .decoding import ensemble_decoding
from .validate import assistant_list, check_members


_original = None  # GenerationMixin.generate while the integration is enabled


def enable() -> None:
    """
    Makes `model.generate(..., assistant_model=<model or list>, ensemble_config=EnsembleConfig(...))` decode ensembles.
    Importing the package does this; calling it again changes nothing. Calls without `ensemble_config` are untouched.

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
        return original(self, **_ensemble_arguments(self, original, args, kwargs))

    GenerationMixin.generate = generate


def disable() -> None:
    """Undoes `enable`; calling it again changes nothing."""
    global _original
    if _original is not None:
        GenerationMixin.generate = _original
        _original = None


def _ensemble_arguments(model, generate, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    The arguments for transformers' own `generate` that make it decode an ensemble. What it does not hand to a
    `custom_generate` callable is bound to ours: the members, the streamer, and the tokenizer of stop strings.
    """
    bound = inspect.signature(generate).bind(model, *args, **kwargs).arguments
    arguments = {name: value for name, value in bound.items() if name not in ("self", "kwargs")} | bound["kwargs"]

    config = arguments.pop("ensemble_config")
    assistants = assistant_list(arguments.pop("assistant_model", None))
    drafter = arguments.pop("drafter", None)
    check_members([model, *assistants], config, drafter)  # before anything else may go wrong, or take time
    if arguments.pop("assistant_tokenizer", None) is not None:
        raise ValueError("`assistant_tokenizer` is not supported with `ensemble_config`: members share one tokenizer.")

    _move_stop_strings(model, arguments)
    arguments["custom_generate"] = functools.partial(
        ensemble_decoding,
        assistant_models=assistants,
        ensemble_config=config,
        drafter=drafter,
        streamer=arguments.get("streamer"),
        synced_gpus=bool(arguments.get("synced_gpus")),
    )
    return arguments


def _move_stop_strings(model, arguments: dict[str, Any]) -> None:
    """Turns `stop_strings`, wherever they are set, into a stopping criterion: a callable is not given the tokenizer."""
    tokenizer = arguments.pop("tokenizer", None)
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
