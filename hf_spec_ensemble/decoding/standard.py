"""The standard ensemble, through transformers' own loops."""

import copy
import time
from dataclasses import replace
from functools import partial

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
from ..ensemble.processing import PositionwiseProcessor
from ..members.adapters import all_locks_of
from ..members.cache import (
    without_fresh_static_cache,
)
from ..members.ranks import Ranks
from ..members.runner import Running, Stepper
from ..notices import warn_once
from ..schedule.roles import Roles
from .drawing import Gumbel
from .logits_process import EnsembleLogitsProcessor
from .names import titles_of
from .output import (
    EnsembleStats,
    output_class,
    pads_finished_rows,
)
from .validate import (
    check_prompt,
)


class _SharedNoise(LogitsProcessor):
    """Divides probabilities by the positions' noise, so that the argmax is the draw; keeps the log-probabilities."""

    def __init__(self, prompt_length: int, keep: bool):
        self.drawing = Gumbel()
        self.prompt_length = prompt_length
        self.keep = keep
        self.log_probs: tuple[torch.Tensor, ...] = ()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        if self.keep:
            self.log_probs += (scores,)
        position = np.full(len(input_ids), input_ids.shape[1] - self.prompt_length)
        drawn = self.drawing.propose(scores.exp(), position)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


class _Soundness(LogitsProcessor):
    """Notes in which rows the ensemble gives no distribution; there any token is drawn, and `_Criteria` raises."""

    def __init__(self, ensemble: EnsembleLogitsProcessor):
        self.ensemble = ensemble
        self.lost: torch.Tensor | None = None  # [B]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        self.lost = self.ensemble.distribution.sound() == 0
        return scores.masked_fill(self.lost[:, None], 0.0)  # `torch.multinomial` takes no nan


class _Criteria(StoppingCriteriaList):
    """
    The stopping criteria, counting the tokens of rows that have not stopped; shown no noise in the scores. Raises where
    a token was drawn from no distribution, which comes with the count, in one transfer.
    """

    def __init__(self, criteria: StoppingCriteriaList, soundness: _Soundness, noise: _SharedNoise | None, ranks: Ranks):
        super().__init__(criteria)
        self.soundness = soundness
        self.noise = noise
        self.ranks = ranks
        self.steps = 0
        self.new_tokens = 0
        self.unfinished: torch.Tensor | None = None  # [B]

    def __call__(self, input_ids, scores, **kwargs):
        self.steps += 1
        wanted = torch.ones_like(input_ids[:, 0], dtype=torch.bool)
        if self.unfinished is not None and pads_finished_rows(self):
            wanted = self.unfinished
        lost = self.ranks.agree(self.soundness.lost.to(wanted.device) & wanted)
        count, any_lost, row = torch.stack([wanted.sum(), lost.sum(), lost.long().argmax()]).tolist()
        if any_lost:
            raise self.soundness.ensemble.fault(row, f"New token {self.steps} of row {row}")
        if scores is not None and self.noise is not None:
            scores = self.noise.log_probs
        done = self.ranks.agree(super().__call__(input_ids, scores, **kwargs))
        self.new_tokens += count
        self.unfinished = ~done if self.unfinished is None else self.unfinished & ~done
        return done


class _BeamCriteria(StoppingCriteriaList):
    """The stopping criteria of a beam search, which by itself would go on from nan. Beams without a token just end."""

    def __init__(self, criteria: StoppingCriteriaList, ensemble: EnsembleLogitsProcessor):
        super().__init__(criteria)
        self.ensemble = ensemble
        self.steps = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.steps += 1
        lost = self.ensemble.distribution.peak[:, 0].isnan()
        any_lost, row = torch.stack([lost.sum(), lost.long().argmax()]).tolist()
        if any_lost:
            raise self.ensemble.fault(row, f"New token {self.steps} of beam {row}")
        return super().__call__(input_ids, scores, **kwargs)


def standard(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, assistants,
    drafter, config, kwargs_of, ranks, model_kwargs,
):  # fmt: skip
    if config.trace:
        warn_once("`trace=True` records what a speculative ensemble does; the standard ensemble leaves no trace.")
    beams = generation_config.num_beams or 1
    shares_noise = generation_config.do_sample and config.coupling == "gumbel" and beams == 1
    if drafter is not None:
        warn_once("`drafter` is not used by the standard ensemble (EnsembleConfig(speculative=False)).")
    roles = Roles.of(config, [m.num_parameters() for m in [model, *assistants]])
    titles = titles_of([model, *assistants], roles.order[: roles.members])
    config = replace(config, num_assistant_tokens=AUTO)  # plays no role, and need not fit the members that are left
    if roles.members > 1:  # the others have no weight
        config = roles.config(config)
        assistants = [[model, *assistants][i] for i in roles.order[1 : roles.members]]
    check_prompt(input_ids, [model, *assistants])
    max_length = stopping_criteria.max_length or generation_config.max_length
    running = Running.of(generation_config, given_cache(model_kwargs), max_length, input_ids.device)
    stepper = None
    if running.compile_config is not None and beams == 1:
        given = given_cache(without_fresh_static_cache(model_kwargs))
        stepper = Stepper(running.runner(model, len(input_ids), given), given)
        model_kwargs = {**without_cache(model_kwargs), OUTPUT_CACHE: stepper.cache}
    ensemble = EnsembleLogitsProcessor.for_generate(
        model,
        assistants,
        config,
        process=PositionwiseProcessor(logits_processor, beams=beams > 1),
        assistant_kwargs=kwargs_of(assistants),
        running=running,
        ranks=ranks,
        normalize=beams > 1,
        names=titles,
        form="log_probs" if beams > 1 or generation_config.do_sample or generation_config.output_scores else "scores",
    )
    ensemble.check_members(input_ids)
    soundness = _Soundness(ensemble)
    processors = LogitsProcessorList([ensemble] if beams > 1 else [ensemble, soundness])
    noise = None
    if shares_noise:
        noise = _SharedNoise(input_ids.shape[1], keep=bool(generation_config.output_scores))
        processors.append(noise)
        generation_config = copy.copy(generation_config)
        generation_config.do_sample = False  # the draw is an argmax now

    if beams > 1:
        criteria = _BeamCriteria(stopping_criteria, ensemble)
    else:
        criteria = _Criteria(stopping_criteria, soundness, noise, ranks)
    start = time.perf_counter()
    arguments = dict(
        logits_processor=processors,
        stopping_criteria=criteria,
        generation_config=generation_config,
        synced_gpus=synced_gpus,
        **model_kwargs,
    )
    with all_locks_of([model, *assistants]):
        if beams > 1:
            return model._beam_search(input_ids, **arguments)
        sample = model._sample if stepper is None else partial(model._sample.__func__, stepper)
        output = sample(input_ids, streamer=streamer, **arguments)
    ensemble.close()
    if stepper is not None:
        stepper.finish(output)
    if not isinstance(output, (GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput)):
        return output
    if shares_noise and output.scores is not None:
        output["scores"] = noise.log_probs
    seconds = time.perf_counter() - start
    steps, inside = ensemble.passes[0], ensemble.seconds
    stats = EnsembleStats(
        new_tokens=criteria.new_tokens,
        forward_passes=[steps, *ensemble.passes],
        proposed=[0] * (1 + len(assistants)),
        verified=[0] * (1 + len(assistants)),
        accepted=[0] * (1 + len(assistants)),
        seconds=seconds,
        member_seconds=[seconds - sum(inside), *inside],
    )
    return output_class(model)(**output, stats=stats)
