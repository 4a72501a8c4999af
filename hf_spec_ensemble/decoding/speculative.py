"""The speculative ensemble's loop."""

import time

from transformers import (
    PreTrainedModel,
)
from transformers.generation import (
    CandidateGenerator,
    EosTokenCriteria,
)

from ..compat import OUTPUT_CACHE, given_cache
from ..config import EnsembleConfig
from ..ensemble.distribution import EnsembleDistribution
from ..ensemble.processing import PositionwiseProcessor
from ..members.adapters import is_model
from ..members.cache import (
    can_roll_back,
    decoder_layers,
    without_fresh_static_cache,
)
from ..members.check import check_reading
from ..members.costs import PassCosts, remembered
from ..members.member import Member
from ..members.runner import Running
from ..members.uncached import member_of
from ..notices import STANDARD
from ..schedule.acceptance import Acceptance
from ..schedule.auto import Auto, Memory
from ..schedule.led import led
from ..schedule.roles import Roles
from ..schedule.theory import predict
from ..schedule.turns import Schedule, Turns
from ..trace.recorder import NoRecord, Recorder
from .candidates import EnsembleCandidateGenerator
from .drafter import PROMPT_LOOKUP, GeneratorDrafter
from .drawing import drawing_rule
from .names import kept_name, names_of, titles_of
from .output import (
    EnsembleStats,
    Transcript,
    output_class,
)
from .validate import (
    check_prompt,
    shared_vocabulary,
)


def speculative(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, assistants,
    drafter, config, kwargs_of, ranks, model_kwargs,
):  # fmt: skip
    roles = Roles.of(config, [m.num_parameters() for m in [model, *assistants]], drafter is not None)
    models = [model, *assistants, *([drafter] if is_model(drafter) else [])]
    check_prompt(input_ids, [models[i] for i in roles.order[: roles.members]])
    input_ids = input_ids.long()  # as transformers' loops return them, whatever they were
    max_length = stopping_criteria.max_length or generation_config.max_length
    running = Running.of(generation_config, given_cache(model_kwargs), max_length, input_ids.device)
    prepared = [without_fresh_static_cache(model_kwargs), *kwargs_of(models[1:])]
    runners = [running.runner(m, len(input_ids), given_cache(kwargs)) for m, kwargs in zip(models, prepared)]
    authors = [member_of(models[i], prepared[i], input_ids, runners[i]) for i in roles.order if i < len(models)]
    for author in authors:
        _check_roll_back(author)
    if config.check_members:
        check_reading(authors, input_ids, speculative=True, ranks=ranks, longest=max_length)
    members = authors[: roles.members]
    vocabulary = shared_vocabulary([member.model for member in members])
    for author in authors[roles.members :]:
        author.read_as_if_known(vocabulary[0])
    costs = [author.runner.costs for author in authors]
    if len(authors) < len(roles.order):
        authors.append(GeneratorDrafter.of(drafter, len(input_ids), vocabulary[1], max_length))
        costs.append(remembered([model], ("drafter", kept_name(drafter)), PassCosts))
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
            roles.config(config), process, vocabulary, input_ids.device, titles_of(models, roles.order[: roles.members])
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
        names = names_of([*models, *([] if drafter is None or is_model(drafter) else [drafter])])
        trace = recorder.trace(names, roles.order, roles.members, transcript.lengths, seconds, rule)
    return output_class(model)(
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
        kept_name(config.method), tuple(config.weights or ()), config.contrast, config.plausibility, config.combine_on,
        config.coupling, config.alternate, do_sample, batch, kept_name(drafter), authors[0].runner.way,
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
