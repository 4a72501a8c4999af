"""What the package needs of transformers beyond its documented interface: checked at import, and what differs between
versions under one name."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from pkgutil import resolve_name
from typing import Any

import torch
import transformers
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode


logger = logging.getLogger(__name__)


TESTED = ("5.17", "5.24")  # the lowest and the newest version that the tests ran on

# What a model's `forward` calls its cache: the first since 5.24, the last two in older versions and in custom code.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")

# What `generate()` calls to let a model's encoders run: newer versions by the first name, older ones by the second.
ENCODE = ("_maybe_prepare_encoder_kwargs_for_generation", "_prepare_encoder_decoder_kwargs_for_generation")

# By class, module or function: its attributes; of a function, its parameters and the attributes that it sets or reads.
HOOKS: dict[str, tuple[str, ...]] = {
    "transformers:GenerationMixin": (
        "_sample",
        "_beam_search",
        "_supports_logits_to_keep",
        "_prepare_model_inputs",
        " or ".join(ENCODE),
        "_expand_inputs_for_generation",
        "prepare_inputs_for_generation",
        "_valid_auto_compile_criteria",
        "_prepare_cache_for_generation",
    ),
    "transformers:GenerationMixin.generate": ("custom_generate",),
    "transformers:GenerationMixin.prepare_inputs_for_generation": (" or ".join(CACHE_NAMES),),
    "transformers:GenerationMixin._prepare_special_tokens": ("_eos_token_tensor", "_pad_token_tensor"),
    "transformers:PreTrainedModel": ("_is_stateful", "_can_compile_fullgraph", "get_compiled_call"),
    "transformers:Cache": ("activate_past_recording", "reorder_cache"),
    "transformers.cache_utils:DynamicLayer": ("crop",),
    "transformers.cache_utils:CacheLayerMixin.__init__": ("is_initialized",),
    "transformers.cache_utils:StaticLayer.__init__": ("cumulative_length",),
    "transformers.cache_utils": ("LinearAttentionLayer", "StaticSlidingWindowLayer"),
    "transformers.cache_utils:DynamicSlidingWindowLayer.__init__": (
        "sliding_window",
        "cumulative_length",
        "record_past",
    ),
    "transformers.cache_utils:LinearAttentionCacheLayerMixin.__init__": ("conv_states", "conv_kernel_size"),
    "transformers:EncoderDecoderCache.__init__": ("self_attention_cache", "cross_attention_cache"),
    "transformers.generation:AssistedCandidateGenerator.__init__": ("assistant_kwargs",),
    "transformers.generation:GenerateDecoderOnlyOutput": (" or ".join(CACHE_NAMES),),
    "transformers.generation:CandidateGenerator": ("get_candidates", "update_candidate_strategy"),
    "transformers.generation.candidate_generator": ("_prepare_token_type_ids",),
    "transformers.generation:PrefixConstrainedLogitsProcessor.__init__": ("_prefix_allowed_tokens_fn", "_num_beams"),
}


# What outputs of `generate()` call the cache.
OUTPUT_CACHE = next(
    (name for name in CACHE_NAMES if name in inspect.signature(GenerateDecoderOnlyOutput).parameters), None
)


def forward_parameters(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """Of the model's `forward`, also inside what PEFT or `torch.compile` made of it."""
    module = getattr(model, "_orig_mod", model)
    module = module.get_base_model() if hasattr(module, "get_base_model") else module
    return inspect.signature(module.forward).parameters


def cache_names(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """
    What `generate()` calls the model's cache when it prepares inputs, and what the model's `forward` calls it: `None`
    if that takes none, or by a name of its own.
    """
    forward = next((name for name in CACHE_NAMES if name in forward_parameters(model)), None)
    # Up to 5.23 Mamba is told apart everywhere; some models' own preparation takes a cache among `**kwargs`
    prepares = "cache_params" if forward == "cache_params" else OUTPUT_CACHE
    return prepares, forward


def given_cache(kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a `forward` or of a decoding method, whatever its name."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def own_cache(model: PreTrainedModel) -> Cache | None:
    """A growing cache as `generate()` makes it for the model; `None` if it takes none of transformers' caches."""
    if cache_names(model)[1] is None:
        return None
    prepared: dict[str, Any] = {}
    settings = GenerationConfig(use_cache=True)
    model._prepare_cache_for_generation(settings, prepared, GenerationMode.GREEDY_SEARCH, 1, 1)
    return given_cache(prepared)


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """These arguments but for a cache."""
    return {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}


def missing(hooks: Mapping[str, tuple[str, ...]] = HOOKS) -> Iterator[str]:
    """Those of the hooks that the installed transformers does not have, by their full names."""
    for path, names in hooks.items():
        try:
            has = _names_in(resolve_name(path))
        except (ImportError, AttributeError):
            has = frozenset()
        yield from (f"{path.replace(':', '.')}: {name}" for name in names if has.isdisjoint(name.split(" or ")))


def _names_in(thing: object) -> frozenset[str]:
    if not inspect.isfunction(thing):
        return frozenset(dir(thing))
    code = inspect.unwrap(thing).__code__
    return frozenset((*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], *code.co_names))


def check() -> None:
    """
    Warns of a version of transformers that is newer than those tested.

    Raises:
        `ImportError`: if the installed transformers lacks something, with the versions that do not.
    """
    lacking = list(missing())
    lowest, newest = TESTED
    above = above_tested()
    if lacking:
        raise ImportError(
            f"hf_spec_ensemble does not work with transformers {transformers.__version__}, which has no longer, or not "
            f"yet, what it builds on:\n  {chr(10).join(lacking)}\nIt is tested with transformers {lowest} to {newest}. "
            f'To get one: pip install "transformers>={lowest},<{above}"'
        )
    if _numbers(transformers.__version__) >= _numbers(above):
        logger.warning(
            f"hf_spec_ensemble is tested with transformers {lowest} to {newest}; this is {transformers.__version__}. "
            "Every model is still checked before its first use. To get a version that is tested: "
            f'pip install "transformers>={lowest},<{above}"'
        )


def above_tested() -> str:
    """The first minor version that was not tested."""
    major, minor = _numbers(TESTED[1])
    return f"{major}.{minor + 1}"


def _numbers(version: str) -> tuple[int, int]:
    """Major and minor."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def encoded(
    model: PreTrainedModel,
    inputs_tensor: torch.Tensor,
    kwargs: dict[str, Any],
    input_name: str | None,
    generation_config: GenerationConfig,
) -> dict[str, Any]:
    """`kwargs` and, of a model with encoders, what these make of `inputs_tensor` and `kwargs`; as `generate()` does."""
    encode = getattr(model, ENCODE[0], None)
    if encode is None and not model.config.is_encoder_decoder:
        return kwargs  # older versions let the first forward pass encode images
    return (encode or getattr(model, ENCODE[1]))(inputs_tensor, kwargs, input_name, generation_config)


check()
