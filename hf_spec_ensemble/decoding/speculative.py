"""The speculative ensemble: prepare, loop, report. Also the standard one, where its members share passes."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ..compat import OUTPUT_CACHE, given_cache
from ..config import AUTO
from ..ensemble.distribution import EnsembleDistribution
from ..ensemble.union import Map
from ..members.cache import can_roll_back, decoder_layers, recording_as_before, without_fresh_static_cache
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
from ..schedule.mixture import AutoMixture
from ..schedule.roles import Roles
from ..schedule.turns import Schedule, Turns
from ..trace import Mark
from ..trace.recorder import NoRecord, Recorder
from .authors import Author, GeneratorAuthor, ModelAuthor
from .call import Call
from .candidates import EnsembleCandidateGenerator
from .drafter import PROMPT_LOOKUP, drafter_for
from .drawing import Ancestral, owned
from .expected import expected_speedup
from .final_scores import FinalScores
from .names import kept_name, titles_of
from .output import EnsembleStats, Transcript, output_class
from .requests import Rows
from .scores import Context, MemberScores
from .settling import All, Enough, Owner, settling_rule
from .sharing import Readers, may_share, share_passes
from .suffixes import Suffixes
from .text import Text
from .validate import check_prompt, shared_vocabulary


def speculative(call: Call):
    """Decodes a call; returns what `ensemble_decoding` does."""
    return _decoded(call, *prepare(call))


def standard_together(call: Call):
    """
    Decodes a standard ensemble whose members share passes: one that proposes nothing. `None`, and nothing is drawn or
    read, where no members can share, or where separate passes are expected to be faster.
    """
    if not may_share(call):
        return None
    places = range(1 + len(call.assistants))
    config = replace(call.config, trace=False, num_assistant_tokens=AUTO)  # neither plays a role
    call = replace(call, config=config, drafter=None, prompts=[call.prompts[i] for i in places])
    roles = _roles(call)
    check_prompt(call.input_ids, [call.models[i] for i in roles.order])
    with recording_as_before(call.cache) as keep:
        each = _members(call, roles, reads_ahead=False)
        readers = share_passes(call, roles, each)
        if readers.shared(roles):
            keep()
    return _decoded(call, *prepare(call, roles, each, readers)) if readers.shared(roles) else None


def _decoded(call: Call, roles: Roles, readers: Readers, candidates_of: EnsembleCandidateGenerator):
    final_scores = candidates_of.context.final_scores
    transcript = Transcript(call, final_scores, _teller(call, roles, candidates_of.text))
    start = time.perf_counter()
    for _ in rounds(candidates_of, transcript):
        pass
    if final_scores is not None:
        for author in candidates_of.readers:
            author.catch_up()
        candidates_of.take_times()
        transcript.take(final_scores)
    return _report(call, roles, readers, candidates_of, transcript, time.perf_counter() - start)


def _teller(call: Call, roles: Roles, text: Text) -> Callable[[int], None] | None:
    """What tells the streamer how the tokens at a position came about, if it has a method for that."""
    if not hasattr(call.streamer, "put_marks"):
        return None
    names = call.names

    def mark(fates: list[tuple[int | None, bool]], position: int) -> Mark | None:
        if position >= len(fates):
            return None
        author, kept = fates[position]
        if author is None:
            return Mark("drawn")
        number = roles.order[author]
        return Mark("accepted" if kept else "corrected", number, names[number])

    return lambda position: call.streamer.put_marks([mark(fates, position) for fates in text.fates])


def rounds(candidates_of: EnsembleCandidateGenerator, transcript: Transcript | Rows) -> Iterator[None]:
    """The loop. Between its rounds rows may be refilled."""
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
        yield


def prepare(
    call: Call, roles: Roles | None = None, each: list[Member] | None = None, readers: Readers | None = None
) -> tuple[Roles, Readers, EnsembleCandidateGenerator]:
    """
    What a call is decoded with, checked. Not `speculative`, it is the standard ensemble: nothing is proposed.

    Args:
        roles, each, readers: If they are known already.
    """
    models, config = call.models, call.config
    roles = roles or _roles(call)
    if call.union is None:
        check_prompt(call.input_ids, [models[i] for i in roles.order[: roles.members]])
    input_ids = call.input_ids.long()  # as transformers' loops return them, whatever they were
    each = each or _members(call, roles)
    members = each[: roles.members]
    if call.union is None:
        vocabulary = shared_vocabulary([member.model for member in members])
        for drafter in each[roles.members :]:
            drafter.read_as_if_known(vocabulary[0])
    else:
        vocabulary = call.union.width, call.union.width
    text = call.text()
    distribution = EnsembleDistribution(
        roles.config(config),
        call.process(text),
        vocabulary,
        input_ids.device,
        titles_of(models, roles.order[: roles.members]),
        call.union and call.union.common,
    )
    drawing = call.drawing(distribution.config)
    wanted = call.returns("scores"), call.returns("logits")
    in_step = len(input_ids) > 1 and any(member.in_step for member in each)
    # Rows in step could not read at the end, each for itself, what they have not read
    complete = call.shows_scores or (in_step and any(wanted)) or not config.speculative
    # Whether a lead is enough may depend on the last bits, which differ between processes
    complete |= isinstance(call.ranks, Together) and not call.generation_config.do_sample
    settling = settling_rule(drawing, distribution.config, len(input_ids), complete)
    late = any(wanted) and not settling.complete
    context = Context(
        text,
        distribution,
        drawing,
        Recorder(input_ids) if config.trace else NoRecord(),
        call.ranks,
        in_step=in_step,
        final_scores=FinalScores(len(input_ids), distribution.config.weights, *wanted) if late else None,
    )
    if readers is None:

        def learned(some: Readers) -> list[Acceptance]:
            return _memory(call, roles, some, settling, len(input_ids)).acceptance

        readers = share_passes(call, roles, each, learned)
    seats = roles.sharing(readers.groups)
    authors: list[Author] = []
    for reader, numbers in zip(readers.all, readers.numbers):
        scores = [MemberScores(i, context, reader, keeps_logits=i == 0 and call.returns("logits")) for i in numbers]
        authors.append(ModelAuthor(len(authors), context, reader, scores))
    if len(authors) < len(seats.order):
        drafter = drafter_for(call.drafter, members[0], vocabulary[1], call.max_length)
        dtype = torch.promote_types(members[0].model.dtype, torch.float32)
        costs = remembered([call.model], ("drafter", kept_name(call.drafter)), PassCosts)
        authors.append(GeneratorAuthor(len(authors), context, drafter, costs, dtype))

    def schedule_for(batch: int) -> Schedule:
        return led(_schedule(call, seats, authors, settling, readers, batch), call.ranks)

    keeps_scores = wanted[0] and not late
    candidates_of = EnsembleCandidateGenerator(context, authors, seats.members, schedule_for, settling, keeps_scores)
    return roles, readers, candidates_of


def _roles(call: Call) -> Roles:
    """Of all authors; of the members alone where nothing is proposed."""
    sizes = [model.num_parameters() for model in [call.model, *call.assistants]]
    roles = Roles.of(call.config, sizes, call.drafter is not None)
    return roles if call.config.speculative else replace(roles, order=roles.order[: roles.members])


def _members(call: Call, roles: Roles, reads_ahead: bool = True) -> list[Member]:
    """
    The members and the model that drafts, in the order of authors, checked; if they read ahead, also for reading
    several tokens at once and for going back.
    """
    models, running = call.models, call.running
    of_main_model = call.input_ids.long(), without_fresh_static_cache(call.model_kwargs)
    prepared = [of_main_model, *call.inputs_of(range(1, len(models)))]
    runners = [
        running.runner(model, len(ids), given_cache(kwargs), call.longest_of(i))
        for i, (model, (ids, kwargs)) in enumerate(zip(models, prepared))
    ]
    places = [i for i in roles.order if i < len(models)]
    readers = [member_of(models[i], kwargs, ids, runners[i]) for i, (ids, kwargs) in ((i, prepared[i]) for i in places)]
    for reader in readers if call.config.speculative else ():
        _check_roll_back(reader)
    ways = None if call.union is None else [call.union.maps[i] for i in places]
    if call.config.check_members:
        each = [1] * len(places) if ways is None else [way.most for way in ways]  # own tokens of one that is new
        most = [
            call.longest_of(i) - reader.prompt_length + call.max_new_tokens * (n - 1)
            for i, reader, n in zip(places, readers, each)
        ]
        check_reading(readers, speculative=reads_ahead, ranks=call.ranks, new_tokens=most)
    return readers if ways is None else [_translated(reader, way) for reader, way in zip(readers, ways)]


def _translated(member: Member, way: Map) -> Member:
    if way.is_identity:
        return member
    if member.in_step and len(member.prompt) > 1:
        raise ValueError(
            f"A {type(member.model).__name__} wants all rows of a batch to be equally long, which they are not for "
            "members with different tokenizers: give one prompt at a time (`batch_size=1` in `generate_batch`)."
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


def _schedule(
    call: Call, seats: Roles, authors: list[Author], settling: All | Owner | Enough, readers: Readers, batch: int
) -> Schedule:
    config = call.config
    models = [author.member for author in authors if isinstance(author, ModelAuthor)]
    at_once = len(models) if len(models) < len(authors) else None
    lengths = seats.lengths(config) if config.speculative else (0,) * seats.members
    if lengths is not None:
        return Turns(lengths, seats.first, seats.members, at_once)
    memory = _memory(call, seats, readers, settling, batch)
    costs = [author.costs for author in authors]
    may_propose = seats.may_propose(config)
    watches = call.drafter == PROMPT_LOOKUP or isinstance(call.drafter, Suffixes)  # which cost next to nothing
    rule = partial(settling.rule, readers.groups)
    arguments = memory, costs, batch, seats.members, may_propose, seats.first, at_once, watches, rule
    if isinstance(settling, Owner):
        return AutoMixture(*arguments, weights=readers.weights(authors[0].context.distribution.config))
    return Auto(*arguments)


def _memory(call: Call, roles: Roles, readers: Readers, settling: All | Owner | Enough, batch: int) -> Memory:
    """
    What earlier calls with these readers have learned of so many rows. `roles` may be those of the members or of the
    readers.
    """
    config = call.config
    ensemble = (
        kept_name(config.method), tuple(config.weights or ()), config.contrast, config.plausibility, config.combine_on,
        config.coupling, config.alternate, call.generation_config.do_sample, batch,
        kept_name(call.drafter), readers.all[0].runner.way, tuple(own is not None for own in call.prompts),
        type(settling), tuple(map(tuple, readers.groups)), call.union is not None,
    )  # fmt: skip
    authors = len(readers.groups) + len(roles.order) - roles.members
    models = [reader.model for reader in readers.all]
    return remembered(models, ensemble, lambda: Memory([Acceptance() for _ in range(authors)]))


def counts_of(call: Call, seats: Roles, authors: list[Author]) -> dict[str, list]:
    """What authors have counted, in the caller's order; 0 for members that run as another's rows."""
    counted = dict(forward_passes="passes", member_seconds="seconds")
    counted |= {name: name for name in ("proposed", "verified", "accepted")}
    entries = dict(zip(seats.order, authors))
    return {
        name: [getattr(entries[i], own) if i in entries else 0 for i in range(len(call.names))]
        for name, own in counted.items()
    }


def _report(
    call: Call,
    roles: Roles,
    readers: Readers,
    candidates_of: EnsembleCandidateGenerator,
    transcript: Transcript,
    seconds: float,
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

    seats = roles.sharing(readers.groups)
    owners = _owners(roles, candidates_of, transcript)
    stats = EnsembleStats(
        new_tokens=int(transcript.lengths.sum()),
        **counts_of(call, seats, authors),
        seconds=seconds,
        owned=[] if owners is None else owned(owners, transcript.lengths, len(call.names)),
        shared=readers.shared(roles),
        prompt_tokens_saved=readers.prompt_tokens_saved,
        predicted_speedup=(
            expected_speedup(candidates_of, readers, transcript.lengths.tolist()) if call.config.speculative else None
        ),
        settled_early=candidates_of.settling.early if isinstance(candidates_of.settling, Enough) else None,
        row_tokens=transcript.lengths.tolist(),
        authors=call.names,
    )
    return output_class(call.model)(
        sequences=transcript.written,
        scores=transcript.scores,
        logits=transcript.logits,
        stats=stats,
        trace=_trace(call, seats.order, candidates_of, transcript, seconds, owners) if call.config.trace else None,
        **{OUTPUT_CACHE: cache},
    )


def _trace(
    call: Call,
    order: tuple[int, ...],
    candidates_of: EnsembleCandidateGenerator,
    transcript: Transcript,
    seconds: float,
    owners: np.ndarray | None,
):
    candidates_of.take_times(wait=True)
    rule = call.config.coupling if call.generation_config.do_sample else "greedy"
    recorder = candidates_of.context.recorder
    return recorder.trace(call.names, order, len(candidates_of.members), transcript.lengths, seconds, rule, owners)


def _owners(roles: Roles, candidates_of: EnsembleCandidateGenerator, transcript: Transcript) -> np.ndarray | None:
    """The caller's numbers `[B, T]` of the members that new tokens were drawn from, where each was drawn from one."""
    drawing, batch = candidates_of.context.drawing, len(transcript.sequences)
    if not isinstance(drawing, Ancestral):
        return None
    return np.array(roles.order)[drawing.owners(np.arange(transcript.new_tokens)[None].repeat(batch, axis=0))]
