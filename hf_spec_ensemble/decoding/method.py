"""The decoding methods, on the contract of `GenerationMixin._assisted_decoding`: the speculative ensemble's loop, and
the standard ensemble through transformers' own loops."""

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation import (
    CandidateGenerator,
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
    LogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from ..compat import OUTPUT_CACHE, given_cache, without_cache
from ..config import AUTO, EnsembleConfig
from ..ensemble.distribution import EnsembleDistribution
from ..ensemble.processing import PositionwiseProcessor
from ..members.adapters import all_locks_of, is_model
from ..members.cache import (
    can_roll_back,
    decoder_cache,
    decoder_layers,
    keep_whole_source,
    restored_on_error,
    tokens_held,
)
from ..members.check import check_reading
from ..members.costs import PassCosts, remembered
from ..members.member import Member
from ..members.ranks import Ranks, ranks_of
from ..members.runner import Running, Stepper
from ..members.uncached import member_of
from ..notices import STANDARD, warn_once
from ..schedule.acceptance import Acceptance
from ..schedule.auto import Auto, Memory
from ..schedule.led import led
from ..schedule.roles import Roles
from ..schedule.theory import predict
from ..schedule.turns import Schedule, Turns
from ..trace import Trace
from ..trace.recorder import NoRecord, Recorder
from .candidates import EnsembleCandidateGenerator, assistant_kwargs
from .drafter import PROMPT_LOOKUP, GeneratorDrafter
from .drawing import Gumbel, drawing_rule
from .logits_process import EnsembleLogitsProcessor
from .output import (
    EnsembleDecoderOnlyOutput,
    EnsembleEncoderDecoderOutput,
    EnsembleStats,
    Transcript,
    pads_finished_rows,
)
from .validate import (
    assistant_list,
    check_call,
    check_media,
    check_members,
    check_prompt,
    check_sharding,
    shared_vocabulary,
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
    drafter: PreTrainedModel | str | CandidateGenerator | None = None,
    inputs_tensor: torch.Tensor | None = None,
    media: dict[str, torch.Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
        drafter (`PreTrainedModel`, `"prompt_lookup"` or `CandidateGenerator`, *optional*):
            Proposes, and is no part of the ensemble: a model with the same tokenizer; copies from the text so far; or
            any of transformers' candidate generators, for a single row.
        media (`dict[str, torch.Tensor]`, *optional*):
            The images and videos that `generate()` was given, for the assistants: of the main model's it passes on only
            what its encoders made of them. `generate(ensemble_config=...)` sees to that.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Of the members, for the text of a trace.

    Returns:
        `torch.LongTensor` `[B, T]`, or with `return_dict_in_generate=True` an `EnsembleDecoderOnlyOutput` or
        `EnsembleEncoderDecoderOutput` (from beam search transformers' own output).

    Raises:
        `TypeError`, `ValueError`: before the first forward pass, for anything that does not fit together.

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
    assistants = assistant_list(assistant_models)
    config = check_members([model, *assistants], ensemble_config or EnsembleConfig(), drafter)
    check_call(config, generation_config, logits_processor, input_ids, model_kwargs)
    encoded = model_kwargs.get("mm_encoder_outputs")
    media = {name: value for name, value in (media or {}).items() if encoded and name not in model_kwargs}
    models = [model, *assistants, *([drafter] if is_model(drafter) else [])]
    check_media(models[1:], encoded, media, model_kwargs)

    def kwargs_of(models: list[PreTrainedModel]) -> list[dict]:
        return assistant_kwargs(models, input_ids, generation_config, model_kwargs, inputs_tensor, media)

    synced_gpus = check_sharding(models, config, synced_gpus)
    ranks = ranks_of(models)
    ranks.share_random_state(input_ids.device)
    keep_whole_source(given_cache(model_kwargs))
    decode = _speculative if config.speculative else _standard
    with restored_on_error(given_cache(model_kwargs)):
        output = decode(
            model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, assistants,
            drafter, config, kwargs_of, ranks, model_kwargs,
        )  # fmt: skip
    if tokenizer is not None and isinstance(getattr(output, "trace", None), Trace):  # a tensor has a `trace` too
        output.trace = output.trace.with_tokenizer(tokenizer)
    return output


def _speculative(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, assistants,
    drafter, config, kwargs_of, ranks, model_kwargs,
):  # fmt: skip
    roles = Roles.of(config, [m.num_parameters() for m in [model, *assistants]], drafter is not None)
    models = [model, *assistants, *([drafter] if is_model(drafter) else [])]
    check_prompt(input_ids, [models[i] for i in roles.order[: roles.members]])
    input_ids = input_ids.long()  # as transformers' loops return them, whatever they were
    max_length = stopping_criteria.max_length or generation_config.max_length
    running = Running.of(generation_config, given_cache(model_kwargs), max_length, input_ids.device)
    prepared = [_without_fresh_static_cache(model_kwargs), *kwargs_of(models[1:])]
    runners = [running.runner(m, len(input_ids), given_cache(kwargs)) for m, kwargs in zip(models, prepared)]
    authors = [member_of(models[i], prepared[i], input_ids, runners[i]) for i in roles.order if i < len(models)]
    for author in authors:
        _check_roll_back(author)
    if config.check_members:
        check_reading(authors, input_ids, speculative=True, ranks=ranks)
    members = authors[: roles.members]
    vocabulary = shared_vocabulary([member.model for member in members])
    for author in authors[roles.members :]:
        author.read_as_if_known(vocabulary[0])
    costs = [author.runner.costs for author in authors]
    if len(authors) < len(roles.order):
        authors.append(GeneratorDrafter.of(drafter, len(input_ids), vocabulary[1], max_length))
        costs.append(remembered([model], ("drafter", _name(drafter)), PassCosts))
    schedule = _schedule(config, roles, authors, costs, drafter, len(input_ids), generation_config.do_sample)
    pad = generation_config._pad_token_tensor
    has_eos = any(isinstance(criterion, EosTokenCriteria) for criterion in stopping_criteria)
    output_dict = generation_config.return_dict_in_generate
    output_scores = bool(output_dict and generation_config.output_scores)
    output_logits = bool(output_dict and generation_config.output_logits)

    process = PositionwiseProcessor(logits_processor, pad_token_id=0 if pad is None else int(pad))
    recorder = Recorder(input_ids, len(models)) if config.trace else NoRecord()
    candidates_of = EnsembleCandidateGenerator(
        members,
        authors[roles.members :],
        input_ids,
        EnsembleDistribution(
            roles.config(config), process, vocabulary, input_ids.device, _titles(models, roles.order[: roles.members])
        ),
        drawing_rule(generation_config.do_sample, config.coupling),
        led(schedule, ranks),
        costs,
        max_length=max_length,
        stop_tokens=generation_config._eos_token_tensor.tolist() if has_eos else (),
        keep_scores=output_scores,
        keep_logits=output_logits,
        recorder=recorder,
        ranks=ranks,
    )
    transcript = Transcript(input_ids, stopping_criteria, streamer, pad, output_scores, output_logits, ranks)
    prompt_length = input_ids.shape[1]

    start = time.perf_counter()
    while transcript.unfinished.any():
        # 1. Let members propose and score, until every member has scored some position
        candidates = candidates_of.get_candidates()
        # 2. Verify against the ensemble's distribution
        position = candidates_of.verified - prompt_length
        accepted, emitted = candidates_of.drawing.verify(
            candidates.tokens, candidates.q, candidates.r, candidates.proposed, position
        )
        # 3. Keep what holds, roll back what was built on what does not
        gained = candidates_of.update_candidate_strategy(emitted, candidates, accepted)
        # 4. Pass on the tokens that all rows have by now; find out which rows go on
        transcript.add(gained, scores=candidates.log_r, logits=candidates.logits)
        transcript.commit(candidates_of.ids, candidates_of.verified)
        candidates_of.retire(transcript.wanted)

    seconds = time.perf_counter() - start
    # Perhaps the caller's, so to be left in order also where it is not part of the output
    cache = members[0].release(transcript.sequences.shape[1] - 1, copied=output_dict)
    for author in candidates_of.models:
        author.close()
    if streamer is not None:
        streamer.end()
    if not output_dict:
        return transcript.sequences
    stats = EnsembleStats(
        new_tokens=int(transcript.lengths.sum()),
        forward_passes=roles.in_callers_order(author.passes for author in authors),
        proposed=roles.in_callers_order(candidates_of.proposed),
        verified=roles.in_callers_order(candidates_of.judged),
        accepted=roles.in_callers_order(candidates_of.accepted),
        member_seconds=roles.in_callers_order(author.stopwatch.seconds for author in authors),
        seconds=seconds,
        predicted_speedup=_predicted_speedup(schedule.turns, candidates_of, transcript.sequences.shape),
    )
    trace = None
    if config.trace:
        candidates_of.take_all_times()
        rule = config.coupling if generation_config.do_sample else "greedy"
        names = _names([*models, *([] if drafter is None or is_model(drafter) else [drafter])])
        trace = recorder.trace(names, roles.order, roles.members, transcript.lengths, seconds, rule)
    return _output_class(model)(
        sequences=transcript.sequences,
        scores=transcript.scores,
        logits=transcript.logits,
        stats=stats,
        trace=trace,
        **{OUTPUT_CACHE: cache},
    )


def _check_roll_back(author: Member) -> None:
    if can_roll_back(author.model, author.cache):
        return
    layers = sorted({type(layer).__name__ for layer in decoder_layers(author.cache)})
    own = type(author.cache) is type(author.runner.new_cache())
    raise ValueError(
        f"A speculative ensemble takes back rejected tokens, which the cache of a {type(author.model).__name__} cannot "
        f"({type(author.cache).__name__} with {layers}): use {'' if own else 'the default cache, or '}{STANDARD}."
    )


def _without_fresh_static_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    `generate()` makes static caches for texts that are read token by token, with no room for the padding of passes and
    with sliding windows that cannot go back. Nothing is lost with one: it has no memory yet.
    """
    cache = given_cache(kwargs)
    fresh = isinstance(decoder_cache(cache), StaticCache) and not tokens_held(cache)
    if not fresh or getattr(cache, "_is_user_defined", False):
        return kwargs
    return without_cache(kwargs)


def _output_class(model: PreTrainedModel) -> type:
    return EnsembleEncoderDecoderOutput if model.config.is_encoder_decoder else EnsembleDecoderOnlyOutput


def _name(thing: Any) -> str | None:
    """What measurements of a drafter or a method are kept under, without keeping it; a model's are its own."""
    return thing if isinstance(thing, str) or thing is None else getattr(thing, "__qualname__", type(thing).__name__)


def _names(authors: list) -> list[str]:
    """What a person calls models and drafters, each different."""
    names = [getattr(getattr(author, "config", None), "_name_or_path", None) or _name(author) for author in authors]
    names = [name.rstrip("/").split("/")[-1] for name in names]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _titles(models: list[PreTrainedModel], members: Sequence[int]) -> list[str]:
    """What errors call these members, given by their places in `[model, *assistant_models]`."""
    places = ["the main model" if i == 0 else f"assistant model {i}" for i in members]
    paths = [getattr(models[i].config, "_name_or_path", None) for i in members]
    return [
        f"{place} ({type(models[i]).__name__}{f' {path!r}' if path else ''})"
        for place, i, path in zip(places, members, paths)
    ]


def _schedule(
    config: EnsembleConfig,
    roles: Roles,
    authors: list[Member | GeneratorDrafter],
    costs: list[PassCosts],
    drafter: PreTrainedModel | str | CandidateGenerator | None,
    batch: int,
    do_sample: bool,
) -> Schedule:
    at_once = len(authors) - 1 if isinstance(authors[-1], GeneratorDrafter) else None
    lengths = roles.lengths(config)
    if lengths is not None:
        return Turns(lengths, roles.first, roles.members, at_once)
    ensemble = (
        _name(config.method), tuple(config.weights or ()), config.contrast, config.plausibility, config.combine_on,
        config.coupling, config.alternate, do_sample, batch, _name(drafter), authors[0].runner.way,
    )  # fmt: skip
    models = [author.model for author in authors if isinstance(author, Member)]
    memory = remembered(models, ensemble, lambda: Memory([Acceptance() for _ in authors]))
    may_propose, watches = roles.may_propose(config), drafter == PROMPT_LOOKUP
    return Auto(memory, costs, batch, roles.members, may_propose, roles.first, at_once, watches)


def _predicted_speedup(turns: Turns, candidates_of: EnsembleCandidateGenerator, shape: tuple[int, int]) -> float | None:
    """What `theory.predict` expects of these lengths for texts `[B, T]`, from their acceptance and the costs."""
    batch, steps = shape[0], shape[1] - candidates_of.prompt_length
    costs, judged, kept = candidates_of.costs, candidates_of.judged, candidates_of.accepted
    if any(costs[i].measured(batch, 1) is None for i in range(len(costs)) if i < turns.members or turns.lengths[i]):
        return None
    acceptance = [kept[i] / judged[i] if judged[i] else 0.0 for i in range(len(costs))]
    expected = predict(turns, acceptance, lambda author, width: costs[author].seconds(batch, width) or 0.0)
    speculative, prompt = steps * expected.seconds_per_token, candidates_of.prompt_seconds
    return (prompt + expected.speedup * speculative) / (prompt + speculative)


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


def _standard(
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
    titles = _titles([model, *assistants], roles.order[: roles.members])
    config = replace(config, num_assistant_tokens=AUTO)  # plays no role, and need not fit the members that are left
    if roles.members > 1:  # the others have no weight
        config = roles.config(config)
        assistants = [[model, *assistants][i] for i in roles.order[1 : roles.members]]
    check_prompt(input_ids, [model, *assistants])
    max_length = stopping_criteria.max_length or generation_config.max_length
    running = Running.of(generation_config, given_cache(model_kwargs), max_length, input_ids.device)
    stepper = None
    if running.compile_config is not None and beams == 1:
        given = given_cache(_without_fresh_static_cache(model_kwargs))
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
    return _output_class(model)(**output, stats=stats)
