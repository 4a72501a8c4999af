"""The standard ensemble, through transformers' own loops unless members share passes: prepare, loop, report."""

import copy
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
    LogitsProcessor,
)

from ..compat import OUTPUT_CACHE, given_cache, without_cache
from ..config import AUTO
from ..members.adapters import all_locks_of
from ..members.cache import without_fresh_static_cache
from ..members.ranks import Ranks
from ..members.runner import Stepper
from ..notices import warn_once
from ..schedule.roles import Roles
from .call import Call
from .drawing import Ancestral, Gumbel, drawing_rule, owned
from .logits_process import EnsembleLogitsProcessor
from .names import titles_of
from .output import EnsembleStats, output_class, pads_finished_rows
from .speculative import standard_together
from .validate import check_prompt


class _SharedNoise(LogitsProcessor):
    """Puts all probability on the token that is drawn with the positions' noise; keeps the log-probabilities."""

    def __init__(self, drawing: Gumbel, ensemble: EnsembleLogitsProcessor, prompt_length: int, keep: bool):
        self.drawing, self.ensemble = drawing, ensemble
        self.prompt_length = prompt_length
        self.keep = keep
        self.log_probs: tuple[torch.Tensor, ...] = ()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        if self.keep:
            self.log_probs += (scores,)
        position = np.full(len(input_ids), input_ids.shape[1] - self.prompt_length)
        if isinstance(self.drawing, Ancestral):
            probs = self.ensemble.evidence_of(self.drawing.owners(position)).to(scores.device)
        else:
            probs = scores.exp()
        drawn = self.drawing.propose(probs, position)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


class _Soundness(LogitsProcessor):
    """Notes the rows without a distribution; any token is drawn there, and the criteria raise the error."""

    def __init__(self, ensemble: EnsembleLogitsProcessor):
        self.ensemble = ensemble
        self.lost: torch.Tensor | None = None  # [B]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        self.lost = self.ensemble.distribution.sound() == 0
        return scores.masked_fill(self.lost[:, None], 0.0)  # `torch.multinomial` takes no nan


class _Criteria(StoppingCriteriaList):
    """
    The stopping criteria, which first raise an error if a row's next token has no distribution.

    State: steps so far.
    """

    unit = "row"

    def __init__(self, criteria: StoppingCriteriaList, ensemble: EnsembleLogitsProcessor):
        super().__init__(criteria)
        self.ensemble = ensemble
        self.steps = 0

    def _lost(self, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `[B]` that are lost, and those `[B]` whose tokens count."""
        raise NotImplementedError

    def _step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Notes one more step; raises if a row is lost. Says which rows' `[B]` tokens count."""
        self.steps += 1
        lost, wanted = self._lost(torch.ones_like(input_ids[:, 0], dtype=torch.bool))
        any_lost, row = torch.stack([lost.sum(), lost.long().argmax()]).tolist()
        if any_lost:
            raise self.ensemble.fault(row, f"New token {self.steps} of {self.unit} {row}")
        return wanted


class _TokenCriteria(_Criteria):
    """
    For greedy decoding and sampling: counts the tokens of rows that have not stopped, and sees scores without noise.
    A token drawn from something that is not a distribution is detected here.
    """

    def __init__(self, criteria: StoppingCriteriaList, soundness: _Soundness, noise: _SharedNoise | None, ranks: Ranks):
        super().__init__(criteria, soundness.ensemble)
        self.soundness, self.noise, self.ranks = soundness, noise, ranks
        self.lengths: torch.Tensor | int = 0  # [B]: tokens of the texts so far
        self.unfinished: torch.Tensor | None = None  # [B]

    def _lost(self, wanted):
        if self.unfinished is not None and pads_finished_rows(self):
            wanted = self.unfinished
        return self.ranks.agree(self.soundness.lost.to(wanted.device) & wanted), wanted

    def __call__(self, input_ids, scores, **kwargs):
        wanted = self._step(input_ids)
        if scores is not None and self.noise is not None:
            scores = self.noise.log_probs
        done = self.ranks.agree(super().__call__(input_ids, scores, **kwargs))
        self.lengths = self.lengths + wanted.long()
        self.unfinished = ~done if self.unfinished is None else self.unfinished & ~done
        return done


class _BeamCriteria(_Criteria):
    """For a beam search, which would otherwise continue after nan. Beams without a token end."""

    unit = "beam"

    def _lost(self, wanted):
        return self.ensemble.distribution.peak[:, 0].isnan(), wanted

    def __call__(self, input_ids, scores, **kwargs):
        self._step(input_ids)
        return super().__call__(input_ids, scores, **kwargs)


def standard(call: Call):
    """Decodes a call; returns what `ensemble_decoding` does."""
    if call.config.trace:
        warn_once("`trace=True` records what a speculative ensemble does; the standard ensemble records none.")
    if call.drafter is not None:
        warn_once("`drafter` is not used by the standard ensemble (EnsembleConfig(speculative=False)).")
    if (output := standard_together(call)) is not None:
        return output
    beams = (call.generation_config.num_beams or 1) > 1
    places = _places(call)
    ensemble = _ensemble(call, places, beams)
    ensemble.try_members(call.input_ids)
    start = time.perf_counter()
    if beams:
        criteria = _BeamCriteria(call.stopping_criteria, ensemble)
        with all_locks_of([call.model, *ensemble.assistants]):
            return call.model._beam_search(call.input_ids, **_arguments(call, criteria, [ensemble]))
    soundness = _Soundness(ensemble)
    noise = _noise(call, ensemble)
    criteria = _TokenCriteria(call.stopping_criteria, soundness, noise, call.ranks)
    output = _sample(call, criteria, [ensemble, soundness, *([noise] if noise else [])])
    if isinstance(output, (GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput)):
        if noise is not None and output.scores is not None:
            output["scores"] = noise.log_probs
        stats = _stats(call, places, criteria, time.perf_counter() - start)
        return output_class(call.model)(**output, stats=stats)
    return output


def _places(call: Call) -> list[int]:
    """The members that have a weight, among `call.models`; all, if it is only one."""
    roles = _roles(call)
    return list(roles.order[: roles.members] if roles.members > 1 else range(1 + len(call.assistants)))


def _roles(call: Call) -> Roles:
    return Roles.of(call.config, [model.num_parameters() for model in [call.model, *call.assistants]])


def _ensemble(call: Call, places: list[int], beams: bool) -> EnsembleLogitsProcessor:
    """The processor that combines these members."""
    roles = _roles(call)
    config = replace(call.config, num_assistant_tokens=AUTO)  # plays no role, and need not fit the members left
    if roles.members > 1:
        config = roles.config(config)
    check_prompt(call.input_ids, [call.models[i] for i in places])
    samples = call.generation_config.do_sample or call.generation_config.output_scores
    return EnsembleLogitsProcessor.for_call(
        call,
        places[1:],
        config,
        form="log_probs" if beams or samples else "scores",
        names=titles_of(call.models, roles.order[: roles.members]),
    )


def _noise(call: Call, ensemble: EnsembleLogitsProcessor) -> _SharedNoise | None:
    drawing = drawing_rule(call.generation_config.do_sample, ensemble.distribution.config)
    if not isinstance(drawing, Gumbel):
        return None
    keep = bool(call.generation_config.output_scores)
    return _SharedNoise(drawing, ensemble, call.input_ids.shape[1], keep)


def _arguments(call: Call, criteria: StoppingCriteriaList, processors: list[LogitsProcessor]) -> dict[str, Any]:
    """Of transformers' own loops."""
    return dict(
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=criteria,
        generation_config=call.generation_config,
        synced_gpus=call.synced_gpus,
        **call.model_kwargs,
    )


def _sample(call: Call, criteria: _TokenCriteria, processors: list[LogitsProcessor]):
    """transformers' loop for greedy decoding and sampling, over compiled passes if the call asks for these."""
    arguments, stepper, ensemble = _arguments(call, criteria, processors), None, criteria.ensemble
    if criteria.noise is not None:
        arguments["generation_config"] = copy.copy(call.generation_config)
        arguments["generation_config"].do_sample = False  # the draw is an argmax now
    if call.running.compile_config is not None:
        given = given_cache(without_fresh_static_cache(call.model_kwargs))
        stepper = Stepper(call.running.runner(call.model, len(call.input_ids), given), given)
        arguments = {**without_cache(arguments), OUTPUT_CACHE: stepper.cache}
    sample = call.model._sample if stepper is None else partial(call.model._sample.__func__, stepper)
    with all_locks_of([call.model, *ensemble.assistants]):
        output = sample(call.input_ids, streamer=call.streamer, **arguments)
    ensemble.close()
    if stepper is not None:
        stepper.finish(output)
    return output


def _stats(call: Call, places: list[int], criteria: _TokenCriteria, seconds: float) -> EnsembleStats:
    """Of the members, in the caller's order; those without a weight did nothing."""
    ensemble, members = criteria.ensemble, 1 + len(call.assistants)
    lengths = criteria.lengths.cpu().numpy()

    def of_members(values: list) -> list:
        by_place = dict(zip(places, values))
        return [by_place.get(i, 0) for i in range(members)]

    drawing = criteria.noise and criteria.noise.drawing
    inside, nothing, owners = ensemble.seconds, [0] * members, []
    if isinstance(drawing, Ancestral):
        of_rows = drawing.owners(np.arange(criteria.steps)[None].repeat(len(lengths), axis=0))
        owners = of_members(owned(of_rows, lengths, len(places)))
    return EnsembleStats(
        new_tokens=int(lengths.sum()),
        forward_passes=of_members([ensemble.passes[0], *ensemble.passes]),
        proposed=nothing,
        verified=list(nothing),
        accepted=list(nothing),
        seconds=seconds,
        member_seconds=of_members([seconds - sum(inside), *inside]),
        owned=owners,
        row_tokens=lengths.tolist(),
        authors=call.names[:members],
    )
