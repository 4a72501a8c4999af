"""The speculative ensemble: prepare, loop, report."""

import time

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation import CandidateGenerator

from ..compat import OUTPUT_CACHE, given_cache
from ..ensemble.distribution import EnsembleDistribution
from ..ensemble.processing import PositionwiseProcessor
from ..ensemble.union import Map
from ..members.adapters import is_model
from ..members.cache import can_roll_back, decoder_layers, without_fresh_static_cache
from ..members.check import check_reading
from ..members.costs import PassCosts, remembered
from ..members.member import Member
from ..members.ranks import Together
from ..members.translated import TranslatedMember
from ..members.uncached import member_of
from ..notices import STANDARD
from ..schedule.acceptance import Acceptance
from ..schedule.auto import Auto, Memory
from ..schedule.led import led
from ..schedule.mixture import AutoMixture, predict_mixture
from ..schedule.roles import Roles
from ..schedule.theory import predict
from ..schedule.turns import Schedule, Turns
from ..trace.recorder import NoRecord, Recorder
from .authors import Author, Context, GeneratorAuthor, ModelAuthor
from .call import Call
from .candidates import EnsembleCandidateGenerator
from .drafter import PROMPT_LOOKUP, drafter_for
from .drawing import Ancestral, drawing_rule
from .final_scores import FinalScores
from .names import kept_name, names_of, titles_of
from .output import EnsembleStats, Transcript, output_class
from .settling import All, Enough, Owner, settling_rule
from .suffixes import Suffixes
from .text import Text
from .validate import check_prompt, shared_vocabulary


def speculative(call: Call):
    """Decodes a call; returns what `ensemble_decoding` does."""
    roles = Roles.of(
        call.config, [m.num_parameters() for m in [call.model, *call.assistants]], call.drafter is not None
    )
    candidates_of = _prepare(call, roles)
    final_scores = candidates_of.context.final_scores
    transcript = Transcript(call, final_scores)
    start = time.perf_counter()
    _decode(candidates_of, transcript)
    if final_scores is not None:
        for author in candidates_of.members:
            author.catch_up()
        candidates_of.take_times()
        transcript.take(final_scores)
    return _report(call, roles, candidates_of, transcript, time.perf_counter() - start)


def _decode(candidates_of: EnsembleCandidateGenerator, transcript: Transcript) -> None:
    """The loop."""
    text, drawing = candidates_of.text, candidates_of.context.drawing
    while transcript.unfinished.any():
        # 1. Let members propose and score, until enough of them have scored some position
        candidates = candidates_of.get_candidates()
        # 2. Verify against the ensemble's distribution
        accepted, emitted = drawing.verify(
            candidates.tokens, candidates.q, candidates.r, candidates.proposed, text.final
        )
        # 3. Keep what holds, roll back what was built on what does not
        gained = candidates_of.update_candidate_strategy(emitted, candidates, accepted)
        # 4. Pass on the tokens that all rows have by now; find out which rows go on
        transcript.add(gained, scores=candidates.log_r, logits=candidates.logits)
        transcript.commit(text.ids, text.place(text.final))
        text.retire(transcript.wanted)


def _prepare(call: Call, roles: Roles) -> EnsembleCandidateGenerator:
    models, config = call.models, call.config
    if call.union is None:
        check_prompt(call.input_ids, [models[i] for i in roles.order[: roles.members]])
    input_ids = call.input_ids.long()  # as transformers' loops return them, whatever they were
    readers = _members(call, roles)
    members = readers[: roles.members]
    if call.union is None:
        vocabulary = shared_vocabulary([member.model for member in members])
        for drafter in readers[roles.members :]:
            drafter.read_as_if_known(vocabulary[0])
    else:
        vocabulary = call.union.width, call.union.width
    distribution = EnsembleDistribution(
        roles.config(config),
        PositionwiseProcessor(call.logits_processor, pad_token_id=call.pad_token_id),
        vocabulary,
        input_ids.device,
        titles_of(models, roles.order[: roles.members]),
        call.union and call.union.common,
    )
    drawing = drawing_rule(call.generation_config.do_sample, distribution.config)
    wanted = call.returns("scores"), call.returns("logits")
    in_step = len(input_ids) > 1 and any(reader.in_step for reader in readers)
    # Rows in step could not read at the end, each for itself, what they have not read
    complete = call.shows_scores or (in_step and any(wanted)) or not config.speculative
    # Whether a lead is enough may depend on the last bits, which differ between processes
    complete |= isinstance(call.ranks, Together) and not call.generation_config.do_sample
    settling = settling_rule(drawing, distribution.config, len(input_ids), complete)
    late = any(wanted) and not settling.complete
    context = Context(
        Text(input_ids, call.max_new_tokens, call.stop_tokens),
        distribution,
        drawing,
        Recorder(input_ids) if config.trace else NoRecord(),
        call.ranks,
        in_step=in_step,
        final_scores=FinalScores(len(input_ids), distribution.config.weights, *wanted) if late else None,
    )
    authors: list[Author] = [
        ModelAuthor(i, context, reader, keeps_logits=i == 0 and call.returns("logits"))
        for i, reader in enumerate(readers)
    ]
    if len(authors) < len(roles.order):
        drafter = drafter_for(call.drafter, members[0], vocabulary[1], call.max_length)
        dtype = torch.promote_types(members[0].model.dtype, torch.float32)
        costs = remembered([call.model], ("drafter", kept_name(call.drafter)), PassCosts)
        authors.append(GeneratorAuthor(len(authors), context, drafter, costs, dtype))
    schedule = led(_schedule(call, roles, authors, settling), call.ranks)
    return EnsembleCandidateGenerator(context, authors, roles.members, schedule, settling, wanted[0] and not late)


def _members(call: Call, roles: Roles) -> list[Member]:
    """The members and the model that drafts, in the order of authors, checked."""
    models, running = call.models, call.running
    of_main_model = call.input_ids.long(), without_fresh_static_cache(call.model_kwargs)
    prepared = [of_main_model, *call.inputs_of(range(1, len(models)))]
    runners = [
        running.runner(model, len(ids), given_cache(kwargs), call.longest_of(i))
        for i, (model, (ids, kwargs)) in enumerate(zip(models, prepared))
    ]
    readers = [
        member_of(models[i], kwargs, ids, runners[i])
        for i, (ids, kwargs) in ((i, prepared[i]) for i in roles.order if i < len(models))
    ]
    for reader in readers:
        _check_roll_back(reader)
    if call.config.check_members:
        check_reading(readers, speculative=True, ranks=call.ranks, new_tokens=call.max_new_tokens)
    if call.union is None:
        return readers
    places = [i for i in roles.order if i < len(models)]
    return [_translated(reader, call.union.maps[i]) for reader, i in zip(readers, places)]


def _translated(member: Member, way: Map) -> Member:
    if way.is_identity:
        return member
    if member.in_step and len(member.prompt) > 1:
        raise ValueError(
            f"A {type(member.model).__name__} wants all rows of a batch to be equally long, which they are not for "
            "members with different tokenizers: give one prompt at a time."
        )
    return TranslatedMember(member, way)


def _check_roll_back(member: Member) -> None:
    if can_roll_back(member.model, member.cache):
        return
    layers = sorted({type(layer).__name__ for layer in decoder_layers(member.cache)})
    own = type(member.cache) is type(member.runner.new_cache())
    raise ValueError(
        f"A speculative ensemble takes back rejected tokens, which the cache of a {type(member.model).__name__} cannot "
        f"({type(member.cache).__name__} with {layers}): use {'' if own else 'the default cache, or '}{STANDARD}."
    )


def _schedule(call: Call, roles: Roles, authors: list[Author], settling: All | Owner | Enough) -> Schedule:
    config, batch = call.config, len(call.input_ids)
    models = [author.member for author in authors if isinstance(author, ModelAuthor)]
    at_once = len(models) if len(models) < len(authors) else None
    if not config.speculative:
        return Turns((0,) * len(authors), roles.first, roles.members, at_once)
    lengths = roles.lengths(config)
    if lengths is not None:
        return Turns(lengths, roles.first, roles.members, at_once)
    ensemble = (
        kept_name(config.method), tuple(config.weights or ()), config.contrast, config.plausibility, config.combine_on,
        config.coupling, config.alternate, call.generation_config.do_sample, batch, kept_name(call.drafter),
        models[0].runner.way, tuple(own is not None for own in call.prompts), type(settling), call.union is not None,
    )  # fmt: skip
    memory = remembered([member.model for member in models], ensemble, lambda: Memory([Acceptance() for _ in authors]))
    costs = [author.costs for author in authors]
    may_propose = roles.may_propose(config)
    watches = call.drafter == PROMPT_LOOKUP or isinstance(call.drafter, Suffixes)  # which cost next to nothing
    arguments = memory, costs, batch, roles.members, may_propose, roles.first, at_once, watches
    if isinstance(settling, Owner):
        return AutoMixture(*arguments, weights=roles.config(config).weights)
    return Auto(*arguments)


def _report(
    call: Call, roles: Roles, candidates_of: EnsembleCandidateGenerator, transcript: Transcript, seconds: float
):
    authors = candidates_of.authors
    as_dict = call.returns("dict")
    # Perhaps the caller's, so to be left in order also where it is not part of the output
    cache = authors[0].member.release(transcript.new_tokens - 1, copied=as_dict)
    for author in authors:
        author.close()
    if call.streamer is not None:
        call.streamer.end()
    if not as_dict:
        return transcript.written

    def of_authors(name: str) -> list:
        return roles.in_callers_order(getattr(author, name) for author in authors)

    owners = _owners(candidates_of, transcript)
    stats = EnsembleStats(
        new_tokens=int(transcript.lengths.sum()),
        forward_passes=of_authors("passes"),
        proposed=of_authors("proposed"),
        verified=of_authors("verified"),
        accepted=of_authors("accepted"),
        member_seconds=of_authors("seconds"),
        seconds=seconds,
        owned=_owned(roles, owners, transcript),
        predicted_speedup=_predicted_speedup(candidates_of, transcript),
    )
    return output_class(call.model)(
        sequences=transcript.written,
        scores=transcript.scores,
        logits=transcript.logits,
        stats=stats,
        trace=_trace(call, roles, candidates_of, transcript, seconds, owners) if call.config.trace else None,
        **{OUTPUT_CACHE: cache},
    )


def _trace(
    call: Call,
    roles: Roles,
    candidates_of: EnsembleCandidateGenerator,
    transcript: Transcript,
    seconds: float,
    owners: np.ndarray | None,
):
    candidates_of.take_times(wait=True)
    rule = call.config.coupling if call.generation_config.do_sample else "greedy"
    drafter: list[PreTrainedModel | str | CandidateGenerator] = [call.drafter] * (
        call.drafter is not None and not is_model(call.drafter)
    )
    names = names_of([*call.models, *drafter], call.prompts)
    recorder = candidates_of.context.recorder
    return recorder.trace(names, roles.order, roles.members, transcript.lengths, seconds, rule, owners)


def _owners(candidates_of: EnsembleCandidateGenerator, transcript: Transcript) -> np.ndarray | None:
    """The authors `[B, T]` that the new tokens were drawn from, where each was drawn from one."""
    drawing, batch = candidates_of.context.drawing, len(transcript.sequences)
    if not isinstance(drawing, Ancestral):
        return None
    return drawing.owners(np.arange(transcript.new_tokens)[None].repeat(batch, axis=0))


def _owned(roles: Roles, owners: np.ndarray | None, transcript: Transcript) -> list[int]:
    """How many tokens of the texts each author owns."""
    if owners is None:
        return []
    real = np.arange(transcript.new_tokens) < transcript.lengths[:, None]
    return roles.in_callers_order(np.bincount(owners[real], minlength=len(roles.order)).tolist())


def _predicted_speedup(candidates_of: EnsembleCandidateGenerator, transcript: Transcript) -> float | None:
    """What `theory.predict` expects of these lengths for these texts, from their acceptance and the costs."""
    batch, steps = len(transcript.sequences), transcript.new_tokens

    def cost(i: int, width: int) -> float:
        return authors[i].costs.seconds(batch, width) or 0.0

    authors, turns = candidates_of.authors, candidates_of.schedule.turns
    needed = (author for i, author in enumerate(authors) if i < turns.members or turns.lengths[i])
    if any(author.costs.measured(batch, 1) is None for author in needed):
        return None
    acceptance = [author.accepted / author.verified if author.verified else 0.0 for author in authors]
    if isinstance(candidates_of.settling, Owner):
        expected = predict_mixture(turns, candidates_of.context.drawing.weights, acceptance, cost)
    else:
        expected = predict(turns, acceptance, cost)
    speculative, prompt = steps * expected.seconds_per_token, sum(author.prompt_seconds for author in authors)
    return (prompt + expected.speedup * speculative) / (prompt + speculative)
