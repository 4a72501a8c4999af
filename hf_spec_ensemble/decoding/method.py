"""The decoding method, with the signature of `GenerationMixin._assisted_decoding`: checks the call and decodes it."""

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import (
    CandidateGenerator,
)
from transformers.generation.streamers import BaseStreamer

from ..config import AUTO, EnsembleConfig
from ..members.adapters import is_model
from ..members.cache import (
    keep_whole_source,
    restored_on_error,
)
from ..members.prompts import split
from ..members.ranks import ranks_of
from ..trace import Trace
from .call import Call, repeats_of
from .drafter import chosen_drafter
from .families import check_union, prompts_for, tokenizer_list, union_for
from .output import (
    EnsembleDecoderOnlyOutput,
    EnsembleEncoderDecoderOutput,
)
from .speculative import speculative
from .standard import standard
from .suffixes import Suffixes
from .validate import (
    assistant_list,
    check_call,
    check_media,
    check_members,
    check_sharding,
)


@torch.no_grad()
def ensemble_decoding(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    assistant_models: PreTrainedModel | list[PreTrainedModel] | None = None,
    ensemble_config: EnsembleConfig | None = None,
    drafter: PreTrainedModel | str | Suffixes | CandidateGenerator | None = AUTO,
    inputs_tensor: torch.Tensor | None = None,
    media: dict[str, torch.Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
    **model_kwargs,
) -> EnsembleDecoderOnlyOutput | EnsembleEncoderDecoderOutput | torch.LongTensor:
    r"""
    Decodes an ensemble; a callable for `generate(custom_generate=...)`, and what `ensemble_config=` runs.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, inputs_tensor,
            model_kwargs: As `generate()` hands them to its decoding methods.
        assistant_models (`PreTrainedModel` or `list[PreTrainedModel]`):
            The other members.
        ensemble_config (`EnsembleConfig`, *optional*):
            Defaults to `EnsembleConfig()`.
        drafter (`PreTrainedModel`, `str`, `Suffixes`, `CandidateGenerator` or `None`, defaults to `"auto"`):
            A proposer outside the ensemble: a model with the same tokenizer; `"prompt_lookup"`, copies of the text so
            far; what followed before in the texts that a `Suffixes` has seen, also in earlier calls; or any of
            transformers' candidate generators, for a single row. `"auto"` is a new `Suffixes` for this call where
            `num_assistant_tokens` is `"auto"` and members alternate, else none; `None` is none.
        media (`dict[str, torch.Tensor]`, *optional*):
            The images and videos that `generate()` was given, for the assistants: of the main model's it passes on only
            what its encoders made of them. `generate(ensemble_config=...)` sees to that.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Of the main model, for the text of a trace, and for members with other tokenizers.
        assistant_tokenizer (`PreTrainedTokenizerBase` or a list of them, *optional*):
            Of the other members, where they have tokenizers of their own: one for all, or one for each.

    Returns:
        `torch.LongTensor` `[B, T]`, or with `return_dict_in_generate=True` an `EnsembleDecoderOnlyOutput` or
        `EnsembleEncoderDecoderOutput` (from beam search transformers' own output).

    Raises:
        `TypeError`, `ValueError`: before the first forward pass, if arguments or members do not fit together.

    Example:

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_spec_ensemble import EnsembleConfig, ensemble_decoding

    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> size |= dict(eos_token_id=None, pad_token_id=0)
    >>> one, two = (LlamaForCausalLM(LlamaConfig(**size)) for _ in range(2))
    >>> out = one.generate(
    ...     torch.tensor([[3, 4, 5]]),
    ...     custom_generate=ensemble_decoding,
    ...     assistant_models=[two],
    ...     ensemble_config=EnsembleConfig(),
    ...     max_new_tokens=4,
    ... )
    >>> out.shape
    torch.Size([1, 7])
    """
    call = checked_call(
        model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer,
        assistant_models, ensemble_config, drafter, inputs_tensor, media, tokenizer, assistant_tokenizer,
        **model_kwargs,
    )  # fmt: skip
    call.ranks.share_random_state(input_ids.device)
    keep_whole_source(call.cache)
    decode = speculative if call.config.speculative or call.union is not None else standard
    with restored_on_error(call.cache):
        output = decode(call)
    if tokenizer is not None and isinstance(getattr(output, "trace", None), Trace):  # a tensor has a `trace` too
        output.trace = output.trace.with_tokenizer(call.union or tokenizer)
    return output


def checked_call(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    assistant_models: PreTrainedModel | list[PreTrainedModel] | None = None,
    ensemble_config: EnsembleConfig | None = None,
    drafter: PreTrainedModel | str | Suffixes | CandidateGenerator | None = AUTO,
    inputs_tensor: torch.Tensor | None = None,
    media: dict[str, torch.Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
    **model_kwargs,
) -> Call:
    """What `ensemble_decoding` decodes, whose arguments and errors these are. Nothing is read yet."""
    assistants = assistant_list(assistant_models)
    config = ensemble_config or EnsembleConfig()
    drafter = chosen_drafter(drafter, config)
    tokenizers = tokenizer_list(tokenizer, assistant_tokenizer, len(assistants))
    config = check_members([model, *assistants], config, drafter, tokenizers)
    (*assistants, drafter), own_prompts = split([*assistants, drafter])
    check_call(config, generation_config, logits_processor, input_ids, model_kwargs)
    encoded = model_kwargs.get("mm_encoder_outputs")
    media = {name: value for name, value in (media or {}).items() if encoded and name not in model_kwargs}
    models = [model, *assistants, *([drafter] if is_model(drafter) else [])]
    prompts = [None, *own_prompts][: len(models)]
    union = union_for(models, tokenizers, config, generation_config)
    if union is not None:
        check_union(generation_config, drafter, bool(encoded or media))
        mask, repeats = model_kwargs.get("attention_mask"), repeats_of(generation_config)
        prompts = prompts_for(
            models, tokenizers, prompts, *(x if x is None else x[::repeats] for x in (input_ids, mask))
        )
    check_media([m for m, own in zip(models[1:], prompts[1:]) if own is None], encoded, media, model_kwargs)

    synced_gpus = check_sharding(models, config, synced_gpus)
    return Call(
        model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, assistants,
        prompts, config, drafter, inputs_tensor, media, ranks_of(models), model_kwargs, union,
    )  # fmt: skip
