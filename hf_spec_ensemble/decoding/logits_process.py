"""EnsembleLogitsProcessor: the standard ensemble, every member token by token, as an ordinary LogitsProcessor."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..compat import encoded
from ..config import EnsembleConfig
from ..ensemble.distribution import EnsembleDistribution
from ..ensemble.processing import PositionwiseProcessor
from ..members.check import check_reading
from ..members.member import Member
from ..members.placement import device_of
from ..members.prompts import leading_padding, split
from ..members.ranks import Ranks
from ..members.runner import Running
from ..members.stopwatch import Stopwatch
from ..members.uncached import member_of
from .call import Call
from .validate import assistant_list, check_members, shared_vocabulary


class EnsembleLogitsProcessor(LogitsProcessor):
    r"""
    Replaces the scores of the model that generates by the ensemble's log-probabilities, in any `generate()` call:
    greedy, sampling and beam search, several prompts in a batch, one call after another.

    Used by hand in `logits_processor=`, it runs after transformers' penalties and before its temperature, top-k and the
    like: it sees *penalised* scores of the main model and the assistants' raw logits, and what follows is applied to
    the ensemble. For penalties and temperature that reach every member alike, pass
    `ensemble_config=EnsembleConfig(speculative=False)` to `generate()` instead, which uses this class.

    The assistants' KV caches follow the calls: a step that adds one token to each row runs one pass over it, beams are
    reordered, and anything else (a new prompt) starts with empty caches.

    Assistants with prompts of their own (`with_prompt`) read these, and then what follows the prompt of the first step.
    Their rows are those of one call, so make a processor for each.

    Args:
        model (`PreTrainedModel`):
            The model whose `generate()` this is for.
        assistant_models (`PreTrainedModel` or `list[PreTrainedModel]`):
            The other members.
        ensemble_config (`EnsembleConfig`):
            How to combine. Its `speculative`, `coupling`, `alternate` and `num_assistant_tokens` are ignored.
        attention_mask (`torch.LongTensor` `[B, P]`, *optional*):
            Of the prompts. If not given, leading `pad_token_id`s of a row count as padding, as long as that is not the
            end-of-sequence token too.
        encoder_inputs (`dict[str, torch.Tensor]`, *optional*):
            Of encoder-decoder models, and only of these: what the encoders read, as passed to `generate()`.

    Raises:
        `TypeError`, `ValueError`: if the members, or `encoder_inputs`, do not fit together.

    Example:

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_spec_ensemble import EnsembleConfig, EnsembleLogitsProcessor

    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> size |= dict(eos_token_id=None, pad_token_id=0)
    >>> one, two = (LlamaForCausalLM(LlamaConfig(**size)) for _ in range(2))
    >>> processor = EnsembleLogitsProcessor(one, two, EnsembleConfig(weights=[0.5, 0.5]))
    >>> prompt = torch.tensor([[3, 4, 5]])
    >>> one.generate(prompt, logits_processor=[processor], num_beams=2, max_new_tokens=4, do_sample=False).shape
    torch.Size([1, 7])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        assistant_models: PreTrainedModel | list[PreTrainedModel],
        ensemble_config: EnsembleConfig,
        attention_mask: torch.Tensor | None = None,
        encoder_inputs: dict[str, torch.Tensor] | None = None,
    ):
        given = assistant_list(assistant_models)
        config = check_members([model, *given], ensemble_config)
        self.assistants, self.prompts = split(given)
        models = [model, *self.assistants]
        self.model = model
        self.attention_mask = attention_mask
        self.encoder_inputs = encoder_inputs
        if (encoder_inputs is not None) != model.config.is_encoder_decoder:
            raise ValueError(
                "`encoder_inputs` are what encoder-decoder models encode, as passed to `generate()`: they must be "
                f"given for these and only these, but the main model is a {type(model).__name__} and they are "
                f"{'not ' if encoder_inputs is None else ''}given."
            )
        self.distribution = EnsembleDistribution(
            config, PositionwiseProcessor(LogitsProcessorList()), shared_vocabulary(models), device_of(model)
        )
        self.assistant_inputs: list[tuple[torch.Tensor, dict]] | None = None  # of the call, if there is one
        self.longest: list[int | None] = [None] * len(self.assistants)  # tokens of their texts
        self.running, self.ranks = Running(), Ranks()
        self.normalize = False
        self.form = "log_probs"
        self.members: list[Member] = []
        self.passes = [0] * len(self.assistants)
        self._stopwatches: list[list[Stopwatch]] = [[] for _ in self.assistants]
        self._previous: torch.Tensor | None = None  # [B, T]: the tokens that the caches hold
        self._ready_for: torch.Tensor | None = None  # [B, P]: the prompts of members that have read nothing yet
        self._prompt_length = 0
        self._last: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])  # scores and evidence of the last call

    @classmethod
    def for_call(
        cls,
        call: Call,
        places: Sequence[int],
        config: EnsembleConfig,
        form: str,
        names: list[str],
    ) -> "EnsembleLogitsProcessor":
        """
        The processor behind `EnsembleConfig(speculative=False)`: it gets raw scores and applies the call's processors
        itself, to every member or to the combination as `combine_on` says.

        Args:
            call (`Call`): Whose logits processors, caches and processes it uses.
            places (`Sequence[int]`): Of the assistants that have a weight, among `call.models`.
            config (`EnsembleConfig`): Of these and the main model.
            form (`str`): Of what it returns, as for `EnsembleDistribution.target`.
            names (`list[str]`, N): What errors call the members.
        """
        none = {} if call.model.config.is_encoder_decoder else None  # the call has what encoders made of it
        processor = cls(call.model, [call.models[i] for i in places], config, encoder_inputs=none)
        processor.prompts = [call.prompts[i] for i in places]
        beams = (call.generation_config.num_beams or 1) > 1
        processor.distribution.process = PositionwiseProcessor(call.logits_processor, beams=beams)
        processor.distribution.names = names
        processor.assistant_inputs = call.inputs_of(places)
        processor.longest = [call.longest_of(i) for i in places]
        processor.running, processor.ranks = call.running, call.ranks
        processor.normalize = beams  # a beam search passes on log-probabilities, not logits
        processor.form = form
        return processor

    @property
    def seconds(self) -> list[float]:
        """Spent inside the assistants' forward passes, by assistant."""
        return [sum(stopwatch.seconds for stopwatch in stopwatches) for stopwatches in self._stopwatches]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.LongTensor` `[B, T]`): All tokens so far.
            scores (`torch.Tensor` `[B, V]`): The main model's for the next token.

        Returns:
            `torch.Tensor` `[B, V]`: log r.
        """
        self.distribution.device = scores.device  # the main model may be spread over several
        self._follow(input_ids)
        new = input_ids[:, self._prompt_length :]
        end = np.full(len(input_ids), new.shape[1])
        logits = [scores[:, None]]  # [B, 1, V] each
        for i, member in enumerate(self.members):
            logits.append(member.score(new, end)[:, -1:])
            self.passes[i] += 1
            member.settled = end  # nothing is ever forgotten
        self._previous = input_ids
        aligned = [self.distribution.align(x) for x in logits]
        if self.normalize:
            aligned = [x.log_softmax(-1) for x in aligned]
        position = (input_ids, end + self._prompt_length, np.ones_like(end))
        scores = [self.distribution.scores(x, *position) for x in aligned]
        evidence = [self.distribution.evidence_of(x) for x in scores]
        self._last = scores, evidence
        return self.ranks.agree(self.distribution.target(evidence, *position, self.form)[:, 0])

    def try_members(self, input_ids: torch.Tensor) -> None:
        """
        Makes the assistants ready, and finds out how they read, before the main model's first forward pass.

        Raises:
            `ValueError`: naming one that cannot read token by token.
        """
        self._begin(input_ids)

    def evidence_of(self, members: np.ndarray) -> torch.Tensor:
        """What member `members[b]` gave for row b in the last call, `[B, V]`."""
        _, evidence = self._last
        return torch.stack([evidence[member][row, 0] for row, member in enumerate(members.tolist())])

    def fault(self, row: int, place: str) -> ValueError:
        """The error for a row whose scores are not a distribution; arguments as for `EnsembleDistribution.fault`."""
        scores, evidence = ([one[row, 0] for one in last] for last in self._last)
        return self.distribution.fault(row, [float(one.amax()) for one in scores], evidence, place)

    def close(self) -> None:
        """Ends the current texts; their caches may be used for others."""
        for member in self.members:
            member.close()
        self.members, self._previous, self._ready_for, self._last = [], None, None, ([], [])

    def _follow(self, input_ids: torch.Tensor) -> None:
        """Makes the caches hold `input_ids[:, :-1]`, or be empty."""
        if self._ready_for is not None and torch.equal(self._ready_for, input_ids):
            self._ready_for = None
            return
        parents = self._parents(input_ids)
        if parents is None:
            self._begin(input_ids[:, : self._prompt_length] if self._goes_back(input_ids) else input_ids)
            self._ready_for = None
        elif (parents != torch.arange(len(parents))).any():
            for member in self.members:
                member.reorder(parents)

    def _begin(self, input_ids: torch.Tensor) -> None:
        """Makes members that have these prompts to read."""
        self.close()
        self._ready_for, self._prompt_length = input_ids, input_ids.shape[1]
        self.members = [
            member_of(model, kwargs, prompt, self.running.runner(model, len(prompt), longest=longest))
            for model, (prompt, kwargs), longest in zip(self.assistants, self._inputs(input_ids), self.longest)
        ]
        if self.distribution.config.check_members:
            longest = self.running.max_length
            new_tokens = None if longest is None else longest - self._prompt_length
            check_reading(self.members, False, self.ranks, new_tokens)
        for stopwatches, member in zip(self._stopwatches, self.members):
            stopwatches.append(member.stopwatch)

    def _goes_back(self, input_ids: torch.Tensor) -> bool:
        """Whether the rows are those of the last call again, with no more tokens behind the same prompts."""
        previous, prompt = self._previous, self._prompt_length
        return (
            previous is not None
            and len(previous) == len(input_ids)
            and prompt < input_ids.shape[1] <= previous.shape[1]
            and torch.equal(previous[:, :prompt], input_ids[:, :prompt])
        )

    def _parents(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """For each row the cached row `[B]` that it continues by one token; `None` if there is one that has none."""
        previous = self._previous
        if previous is None or previous.shape != input_ids[:, :-1].shape:
            return None
        previous, current = previous.cpu(), input_ids[:, :-1].cpu()
        rows = torch.arange(len(current))
        if torch.equal(previous, current):
            return rows
        # Numbers for the different texts, as their padding hides them and behind what prompts members have of their
        # own, then a cached row for each number
        behind = [torch.from_numpy(member.visible).long() for member in self.members]
        behind += [member.prompt.cpu() for member, own in zip(self.members, self.prompts) if own is not None]
        _, number = torch.cat([torch.cat([previous, *behind], 1), torch.cat([current, *behind], 1)]).unique(
            dim=0, return_inverse=True
        )
        cached = torch.full((len(number),), -1)
        cached[number[: len(rows)]] = rows
        parents = cached[number[len(rows) :]]
        return None if (parents < 0).any() else parents

    def _inputs(self, input_ids: torch.Tensor) -> list[tuple[torch.Tensor, dict]]:
        """The assistants' prompts `[B, P]`, and what they are given besides."""
        if self.assistant_inputs is not None:
            return self.assistant_inputs
        rows = len(input_ids)
        if self.encoder_inputs is not None:
            return [(input_ids, self._encoded(model, rows)) for model in self.assistants]
        mask = self.attention_mask
        if mask is None or mask.shape[1] != input_ids.shape[1]:
            mask = leading_padding(self.model, input_ids)
        mask = mask.repeat_interleave(rows // len(mask), dim=0)
        inputs = []
        for model, own in zip(self.assistants, self.prompts):
            repeats = 1 if own is None or rows % len(own.input_ids) else rows // len(own.input_ids)
            ids, seen = (input_ids, mask) if own is None else own.rows(rows, repeats, device_of(model))
            inputs.append((ids, {"attention_mask": seen.to(device_of(model))}))
        return inputs

    def _encoded(self, model: PreTrainedModel, rows: int) -> dict:
        """What an assistant's decoder is given besides tokens, for so many rows."""
        given = {name: value.to(device_of(model)) for name, value in self.encoder_inputs.items()}
        tensor, name, kwargs = model._prepare_model_inputs(None, None, given)
        kwargs = encoded(model, tensor, kwargs, name, model.generation_config)
        return model._expand_inputs_for_generation(rows // len(tensor), is_encoder_decoder=True, **kwargs)[1]
