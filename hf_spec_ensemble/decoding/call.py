"""Call: what one `generate()` call hands to its decoding method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from ..compat import encoded, given_cache, without_cache
from ..config import EnsembleConfig
from ..ensemble.processing import PositionwiseProcessor
from ..ensemble.union import Union
from ..members.adapters import is_model
from ..members.placement import Placed, device_of
from ..members.prompts import Prompt
from ..members.ranks import Ranks
from ..members.runner import Running
from .drawing import Greedy, drawing_rule
from .names import names_of
from .text import Text


OF_TOKENS = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria, StopStringCriteria)  # which look at no scores


@dataclass
class Call:
    """
    A call that was checked. Nothing writes to it.

    Args:
        model, input_ids (`torch.LongTensor` `[B, P]`), logits_processor, stopping_criteria, generation_config,
            synced_gpus, streamer, inputs_tensor, model_kwargs: As `generate()` hands them to its decoding methods.
        assistants (`list[PreTrainedModel]`): The other members.
        prompts (`list[Prompt | None]`): Those that `models` have for their own; `None` for the main model's.
        config (`EnsembleConfig`): Of `for_members`.
        drafter: As `ensemble_decoding` takes it, but not `"auto"`.
        media (`dict[str, torch.Tensor]`): Images and videos that the main model has encoded already, as its caller gave
            them.
        ranks (`Ranks`): The processes that decode together.
        union (`Union`, *optional*): The vocabulary, where members have different tokenizers: `prompts` then has one for
            each assistant.
    """

    model: PreTrainedModel
    input_ids: torch.Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    synced_gpus: bool
    streamer: BaseStreamer | None
    assistants: list[PreTrainedModel]
    prompts: list[Prompt | None]
    config: EnsembleConfig
    drafter: PreTrainedModel | str | CandidateGenerator | None
    inputs_tensor: torch.Tensor | None
    media: dict[str, torch.Tensor]
    ranks: Ranks
    model_kwargs: dict[str, Any]
    union: Union | None

    @property
    def models(self) -> list[PreTrainedModel]:
        """`[model, *assistants]`, and the drafter if that is a model."""
        return [self.model, *self.assistants, *([self.drafter] if is_model(self.drafter) else [])]

    @property
    def names(self) -> list[str]:
        """Of `models`, and of a drafter that is none; each different."""
        drafting = self.drafter is not None and not is_model(self.drafter)
        own = self.prompts if self.union is None else ()  # there every assistant has one
        return names_of([*self.models, *([self.drafter] if drafting else [])], own)

    @property
    def cache(self):
        """The caller's, or what `generate()` made; `None` if there is none."""
        return given_cache(self.model_kwargs)

    @property
    def max_length(self) -> int:
        """Tokens of the longest text, prompt included."""
        return self.stopping_criteria.max_length or self.generation_config.max_length

    @property
    def max_new_tokens(self) -> int:
        """Of the longest text."""
        return self.max_length - self.input_ids.shape[1]

    @property
    def tokens_of_a_row(self) -> int:
        """New tokens that a row may have, in all texts that it serves."""
        return self.max_new_tokens

    @property
    def running(self) -> Running:
        """How passes run."""
        return Running.of(self.generation_config, self.cache, self.max_length, self.input_ids.device)

    @property
    def stop_tokens(self) -> list[int]:
        """Those that end a text."""
        each = (one.eos_token_id.tolist() for one in self.stopping_criteria if isinstance(one, EosTokenCriteria))
        return list(dict.fromkeys(token for tokens in each for token in tokens))

    @property
    def pad_token_id(self) -> int:
        """What follows the end of a row's text; 0 where nothing was named."""
        pad = self.generation_config._pad_token_tensor
        return 0 if pad is None else int(pad)

    @property
    def shows_scores(self) -> bool:
        """Whether scores are seen while the text is made: by stopping criteria that may look at them."""
        return self.returns("scores") and not all(type(criterion) in OF_TOKENS for criterion in self.stopping_criteria)

    def returns(self, name: str) -> bool:
        """Whether the output has `scores`, `logits` or, by `dict`, any names at all."""
        as_dict = self.generation_config.return_dict_in_generate
        return bool(as_dict and (name == "dict" or getattr(self.generation_config, f"output_{name}")))

    @property
    def repeats(self) -> int:
        """How many rows there are for each prompt."""
        return repeats_of(self.generation_config)

    def text(self) -> Text:
        """Of its rows, before the first new token."""
        return Text(self.input_ids.long(), self.max_new_tokens, self.stop_tokens)

    def process(self, text: Text) -> PositionwiseProcessor:
        """What its logits processors do to pending positions of this text."""
        return PositionwiseProcessor(self.logits_processor, pad_token_id=self.pad_token_id)

    def drawing(self, config: EnsembleConfig) -> Greedy:
        """The rule by which it draws, for a config of the members alone."""
        return drawing_rule(self.generation_config.do_sample, config)

    def inputs_of(self, places: Sequence[int]) -> list[tuple[torch.Tensor, dict]]:
        """
        What those at these places among `models` read, none of them the main model: the prompt `[B, P]` and what their
        `forward` is given besides, on their devices.

        Raises:
            `ValueError`: for one that has prompts of its own for another number of rows.
        """
        ids, models, inputs = self.input_ids.long(), self.models, []
        for i in places:
            if (own := self.prompts[i]) is None:
                inputs.append((ids, self._kwargs_of(models[i])))
            else:
                prompt, mask = own.rows(len(ids), self.repeats, device_of(models[i]))
                inputs.append((prompt, {"attention_mask": mask}))
        return inputs

    def longest_of(self, place: int) -> int:
        """Tokens of the longest text of the one at this place among `models`, its prompt included."""
        own = self.prompts[place]
        return self.max_length if own is None else own.length + self.max_new_tokens

    def _kwargs_of(self, model: PreTrainedModel) -> dict:
        """
        What an assistant's `forward` is given, on its device, as transformers' own candidate generator prepares it. It
        encodes with its own encoders what these read.
        """
        assistant = Placed(model)
        input_ids, inputs_tensor, config = self.input_ids, self.inputs_tensor, self.generation_config
        of_main_model = {
            name: value for name, value in without_cache(self.model_kwargs).items() if name != "mm_encoder_outputs"
        }
        if inputs_tensor is not None:
            inputs_tensor = inputs_tensor.repeat_interleave(len(input_ids) // len(inputs_tensor), dim=0)
        kwargs = AssistedCandidateGenerator(input_ids, assistant, config, of_main_model, inputs_tensor).assistant_kwargs
        if self.media:
            _, expanded = assistant._expand_inputs_for_generation(
                expand_size=self.repeats, is_encoder_decoder=False, input_ids=input_ids[:: self.repeats], **self.media
            )
            kwargs |= {name: value.to(assistant.device) for name, value in expanded.items()}
            kwargs = encoded(assistant, kwargs.get("inputs_embeds"), kwargs, None, config)
        return kwargs


def repeats_of(config: GenerationConfig) -> int:
    """How many rows there are for each prompt."""
    return max(config.num_beams or 1, config.num_return_sequences or 1)
