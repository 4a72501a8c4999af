"""Members with prompts of their own: a model that reads another prompt than the main model, then the same new tokens.

Owns what such a prompt may be. A view only carries it to the call, which takes it apart (`split`): whatever runs or
measures passes, or keeps something for a model, sees the model inside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..notices import warn_once
from .adapters import base_of, is_model


# What configs call the tokens that stand for images and the like, which are given besides text.
MEDIA_TOKENS = tuple(f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index"))


def with_prompt(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **others: Any,
) -> "PromptView":
    r"""
    A model with a prompt of its own, as an assistant or drafter: it reads these tokens and then the new ones, while the
    main model reads what `generate()` is given. So one model can be several members of an ensemble.

    The weights are not copied. Each member has its own cache. Measured costs of passes, and the result of the check of
    members, are shared by all members that are this model. `model` may be the main model itself.

    Logits processors, stopping criteria, `"prompt_lookup"` and the output see the main model's prompt alone. Where
    texts grow beyond what "dynamic" rotary embeddings were made for, these are state that all members share.

    Args:
        model (`PreTrainedModel`, `PeftModel` or what `with_adapter` returns):
            Decoder-only.
        input_ids (`torch.LongTensor` `[B, P]` or `[1, P]`):
            The prompts, padded on the left: a row for each row of the call, before `num_return_sequences` and beams
            multiply these, or one row for all. P need not be the main model's.
        attention_mask (`torch.LongTensor`, *optional*):
            Of the same shape, 0 for padding. By default leading `pad_token_id`s count as padding, unless that is the
            end-of-sequence token too. A mask that hides a last token is read as `generate()` reads it, with a warning:
            the prompt was probably padded on the wrong side.
        others:
            Nothing else is supported; this is for messages. So `**tokenizer(..., return_tensors="pt")` works.

    Returns:
        `PromptView`: Refers to the model and the tensors.

    Raises:
        `TypeError`: if the model is not loaded, or the ids or the mask are not tensors of integers.
        `ValueError`: for an encoder-decoder model, ids that are missing, empty, beyond the vocabulary or stand for
            images, a mask of another shape, and other inputs. The number of rows is checked by `generate()`.

    Example:

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_spec_ensemble import EnsembleConfig, with_prompt

    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> size |= dict(eos_token_id=None, pad_token_id=0)
    >>> model = LlamaForCausalLM(LlamaConfig(**size))
    >>> question, empty = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[5, 6]])

    Context-aware decoding, with alpha = 0.5:

    >>> config = EnsembleConfig(method="product", weights=[1.5, -0.5])
    >>> other = with_prompt(model, input_ids=empty)
    >>> model.generate(question, assistant_model=other, ensemble_config=config, max_new_tokens=4).shape
    torch.Size([1, 8])
    """
    if isinstance(model, PromptView):
        raise ValueError("This model has a prompt of its own already: give `with_prompt` the model itself.")
    if not is_model(model):
        raise TypeError(
            f"`with_prompt` needs a loaded transformers model, but was given a {type(model).__name__}: "
            f"{str(model)[:80]!r}. Load it with AutoModelForCausalLM.from_pretrained first."
        )
    name = type(base_of(model)).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"A {name} is an encoder-decoder model: `with_prompt` is for models that read the prompt and the new "
            "tokens as one text."
        )
    unsupported = [key for key, value in others.items() if value is not None]
    if unsupported:
        raise ValueError(
            f"`with_prompt` was given {unsupported}, but supports `input_ids` and `attention_mask` alone: a prompt of "
            "its own is text. Leave out the others."
        )
    return PromptView(model, Prompt.of(model, input_ids, attention_mask))


@dataclass(frozen=True, eq=False)
class Prompt:
    """
    A prompt of a member's own.

    Args:
        input_ids (`torch.LongTensor` `[R, P]`), attention_mask (`torch.LongTensor` `[R, P]`): R is 1 or the call's B.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, input_ids: Any, attention_mask: Any = None) -> "Prompt":
        """Raises what `with_prompt` says."""
        if input_ids is None:
            raise ValueError('`with_prompt` needs `input_ids`: pass `**tokenizer(text, return_tensors="pt")`.')
        for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            _check_tensor(name, value, optional=name == "attention_mask")
        shape = tuple(input_ids.shape)
        if input_ids.dim() != 2:
            raise ValueError(f"`input_ids` must have the shape [rows, tokens], but have {shape}.")
        if not input_ids.numel():
            raise ValueError(f"The prompt is empty: its ids have the shape {shape}. Give at least one token.")
        _check_ids(model, input_ids)
        if attention_mask is None:
            attention_mask = leading_padding(model, input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of the ids, {shape}, but has {tuple(attention_mask.shape)}: "
                "give 1 for every token and 0 for padding."
            )
        mask = attention_mask.long()
        if (mask.sum(1) == 0).any():
            row = int((mask.sum(1) == 0).long().argmax())
            raise ValueError(f"The prompt of row {row} is empty: `attention_mask` hides all of it.")
        if (mask[:, -1] == 0).any():
            warn_once("A prompt given to `with_prompt` ends in padding: pad on the left (padding_side='left').")
        return cls(input_ids.long(), mask)

    @property
    def length(self) -> int:
        """P."""
        return self.input_ids.shape[1]

    def rows(self, batch: int, repeats: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Ids and mask `[batch, P]`, for a call whose rows were repeated so many times each (beams, sequences).

        Raises:
            `ValueError`: for another number of rows.
        """
        given, wanted = len(self.input_ids), batch // repeats
        if given not in (1, wanted):
            raise ValueError(
                f"`with_prompt` was given {given} prompts, but the call has {wanted} rows: give one for each row, or "
                "one for all."
            )
        each = batch // given
        return tuple(x.repeat_interleave(each, dim=0).to(device) for x in (self.input_ids, self.attention_mask))


class PromptView:
    """
    What `with_prompt` returns: a model, and what it reads before the new tokens.

    Args:
        model (`PreTrainedModel` or `AdapterView`): Whose attributes this has.
        prompt (`Prompt`): Of its own.
    """

    def __init__(self, model: PreTrainedModel, prompt: Prompt):
        self.model = model
        self.prompt = prompt

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "prompt"):  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.model, name)

    def __repr__(self) -> str:
        return f"with_prompt({type(self.model).__name__}, {list(self.prompt.input_ids.shape)})"

    def get_base_model(self) -> PreTrainedModel:
        """The model inside, by the name PEFT gives it; without an adapter too."""
        return base_of(self.model)

    def of_other(self, model: PreTrainedModel) -> "PromptView":
        """This prompt, for another model."""
        return PromptView(model, self.prompt)

    def generate(self, *args, **kwargs):
        raise TypeError(
            f"{self!r} serves as an assistant or drafter, not as the main model: give `model.generate(...)` the main "
            "model's prompt, and the views as `assistant_model`."
        )


def model_of(thing: Any) -> Any:
    """The model inside a view with a prompt; anything else is itself."""
    return thing.model if isinstance(thing, PromptView) else thing


def split(things: Sequence[Any]) -> tuple[list, list[Prompt | None]]:
    """Models, or drafters of other kinds, and their own prompts, where they have one."""
    prompts = [thing.prompt if isinstance(thing, PromptView) else None for thing in things]
    return [model_of(thing) for thing in things], prompts


def leading_padding(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """
    A mask `[B, P]` that hides the padding tokens that rows begin with, if these can be told from the end of a sequence.
    """
    config = model.generation_config
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id is None or config.pad_token_id in eos:
        return torch.ones_like(ids)
    return ((ids != config.pad_token_id).cumsum(1) > 0).long()


def _check_tensor(name: str, value: Any, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"`{name}` must be a tensor, but is a {type(value).__name__}: pass "
            '`**tokenizer(text, return_tensors="pt")`.'
        )
    if name == "input_ids" and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
        raise TypeError(f"`{name}` must hold whole numbers, but its dtype is {value.dtype}.")


def _check_ids(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Tokens that the model knows, and that are text."""
    size = model.config.get_text_config().vocab_size
    unknown = ids[(ids < 0) | (ids >= size)]
    if len(unknown):
        raise ValueError(
            f"The prompt holds token {int(unknown[0])}, but the vocabulary of this {type(base_of(model)).__name__} has "
            f"{size} tokens: use its own tokenizer."
        )
    settings: Mapping[str, Any] = vars(model.config)
    for name in MEDIA_TOKENS:
        token = settings.get(name)
        if isinstance(token, int) and (ids == token).any():
            raise ValueError(
                f"The prompt holds token {token}, the `{name}` of this {type(base_of(model)).__name__}: a prompt of "
                "its own is text, without images or the like. Leave them out."
            )
