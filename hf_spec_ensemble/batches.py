"""Many prompts: each is decoded as a `generate()` call of its own would, and shares the batch with others."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation import CandidateGenerator, MaxTimeCriteria

from .compat import given_cache
from .config import AUTO, EnsembleConfig
from .decoding.call import Call
from .decoding.drafter import PROMPT_LOOKUP, chosen_drafter
from .decoding.families import tokenizer_list
from .decoding.output import EnsembleStats
from .decoding.refill import Queue, serve
from .decoding.requests import Request
from .decoding.suffixes import Suffixes
from .decoding.validate import assistant_list, check_members, check_prompt
from .ensemble.grammar import holds_grammar
from .ensemble.padded import left_padded
from .ensemble.processing import flat, in_order_only
from .integration import call_of
from .members.cache import can_roll_back, without_fresh_static_cache
from .members.prompts import Prompt, model_of
from .notices import warn_once


LONGEST = 2**31  # list of prompts


@dataclass
class EnsembleGenerationOutput:
    """
    A prompt's text, with the names of transformers' `GenerationOutput`.

    Args:
        request_id (`str`): `"req_0"` of the first prompt, and so on.
        prompt_ids (`list[int]`), generated_tokens (`list[int]`): The prompt, and what follows, a token that ended it
            included.
        number (`int`): The prompt's place in the list, or that of `numbers`.
        stats (`EnsembleStats`): What the whole call has done so far: one object, which all its results share. Its
            tokens are those of texts that are done.
    """

    request_id: str
    prompt_ids: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)
    number: int = 0
    stats: EnsembleStats = field(default_factory=EnsembleStats, repr=False)


def generate_batch(
    model: PreTrainedModel,
    inputs: Sequence[Sequence[int]],
    assistant_model: PreTrainedModel | Sequence[PreTrainedModel] | None = None,
    ensemble_config: EnsembleConfig | None = None,
    generation_config: GenerationConfig | None = None,
    batch_size: int = 8,
    progress_bar: bool = True,
    **kwargs: Any,
) -> dict[str, EnsembleGenerationOutput]:
    r"""
    Decodes an ensemble over many prompts, after transformers' `model.generate_batch`. A row of the batch whose text has
    ended is given the next prompt at once.

    A prompt's text depends on the prompt, its place in the list and the seed alone: not on the batch size, nor on what
    shares the batch. It is that of `generate()` with the prompt alone, but for rounding; sampled, that of its row in
    one call of `generate()` with all prompts. `EnsembleConfig(speculative=False)` is served so too.

    Args:
        model (`PreTrainedModel`):
            The main model; decoder-only.
        inputs (`Sequence[Sequence[int]]`):
            The prompts as token ids, without padding: lists, or tensors of one dimension.
        assistant_model (`PreTrainedModel` or `list[PreTrainedModel]`):
            The other members. What `with_prompt` returns has one prompt, or one for each of `inputs`.
        ensemble_config (`EnsembleConfig`, *optional*):
            Defaults to `EnsembleConfig()`.
        generation_config (`GenerationConfig`, *optional*):
            Of every prompt. `max_length` counts each prompt's own tokens.
        batch_size (`int`, defaults to 8):
            Rows. Caches have room for so many texts, however many prompts there are.
        progress_bar (`bool`, defaults to `True`):
            Whether to show how many texts are done.
        kwargs:
            Whatever else `generate()` takes for text: `drafter`, `max_new_tokens`, `logits_processor`,
            `stopping_criteria`, `stop_strings`, `tokenizer` and `assistant_tokenizer`, ... And `numbers`
            (`Sequence[int]`): the place of each of `inputs` in a longer list, to continue a run; by default 0, 1, 2,
            ... Texts and request ids are those of the longer list.

    Returns:
        `dict[str, EnsembleGenerationOutput]`: By request id, in the order of the prompts; empty without prompts.

    Raises:
        `TypeError`, `ValueError`: before the first forward pass: for prompts that are no lists of known tokens, for
            `numbers` that are not one for each prompt, each once, for what `generate()` refuses, and for what would let
            texts depend on each other, as `coupling="maximal"` of samples and processors that keep state.

    Example:

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_spec_ensemble import generate_batch

    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> size |= dict(eos_token_id=None, pad_token_id=0)
    >>> one, two = (LlamaForCausalLM(LlamaConfig(**size)) for _ in range(2))
    >>> results = generate_batch(
    ...     one, [[3, 4, 5], [6], [7, 8]], assistant_model=two, batch_size=2, max_new_tokens=4, progress_bar=False
    ... )
    >>> [(name, len(result.generated_tokens)) for name, result in results.items()]
    [('req_0', 4), ('req_1', 4), ('req_2', 4)]
    """
    inputs = list(inputs) if isinstance(inputs, Iterator) else inputs
    results = generate_as_completed(
        model, inputs, assistant_model, ensemble_config, generation_config, batch_size, **kwargs
    )
    with closing(results), tqdm(total=len(inputs), unit="text", disable=not progress_bar) as bar:
        done = []
        for result in results:
            done.append(result)
            bar.update()
    return {result.request_id: result for result in sorted(done, key=lambda result: result.number)}


def generate_as_completed(
    model: PreTrainedModel,
    inputs: Sequence[Sequence[int]],
    assistant_model: PreTrainedModel | Sequence[PreTrainedModel] | None = None,
    ensemble_config: EnsembleConfig | None = None,
    generation_config: GenerationConfig | None = None,
    batch_size: int = 8,
    **kwargs: Any,
) -> Iterator[EnsembleGenerationOutput]:
    r"""
    As `generate_batch`, one result after the other as they are done, in whatever order that is. What was given out is
    the caller's, whatever happens later. Arguments are checked at once, and decoding goes on while results are taken:
    the seed is drawn from torch's generator when the first one is.

    Returns:
        `Iterator[EnsembleGenerationOutput]`.

    Example:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_spec_ensemble import generate_as_completed

    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> size |= dict(eos_token_id=None, pad_token_id=0)
    >>> one, two = (LlamaForCausalLM(LlamaConfig(**size)) for _ in range(2))
    >>> results = generate_as_completed(one, [[3, 4, 5], [6]], assistant_model=two, batch_size=1, max_new_tokens=4)
    >>> [result.number for result in results]
    [0, 1]
    """
    config = ensemble_config or EnsembleConfig()
    prompts = _prompts(inputs)
    numbers = _places(kwargs.pop("numbers", None), len(prompts))
    _check_size(batch_size)
    _check_arguments(kwargs)
    assistants = assistant_list(assistant_model)
    drafter = _drafter(kwargs.pop("drafter", AUTO), config)
    tokenizers = tokenizer_list(kwargs.get("tokenizer"), kwargs.get("assistant_tokenizer"), len(assistants))
    check_members([model, *assistants], config, drafter, tokenizers)
    _check_prompts(prompts, model)
    arguments = kwargs | dict(assistant_model=assistants, drafter=drafter, generation_config=generation_config)
    calls = [_call(model, number, prompt, config, arguments) for number, prompt in zip(numbers, prompts)]
    if not calls:
        return _results(None)
    first = replace(
        calls[0],
        config=replace(calls[0].config, speculative=config.speculative),
        prompts=[_merged([call.prompts[place] for call in calls]) for place in range(len(calls[0].prompts))],
    )
    for prompt in prompts if first.union is None else ():
        check_prompt(torch.tensor(prompt), [model, *map(model_of, assistants)])
    _check_call(first, len(prompts))
    first.ranks.share_random_state(first.input_ids.device)
    requests = [Request.of(number, place, call) for place, (number, call) in enumerate(zip(numbers, calls))]
    return _results(Queue(first, requests, batch_size))


def _results(queue: Queue | None) -> Iterator[EnsembleGenerationOutput]:
    if queue is None:
        return
    union = queue.call.union
    with closing(serve(queue)) as served:
        for request, tokens in served:
            if union is not None:
                tokens = [token for u in tokens for token in union.maps[0].read(u)]
            yield EnsembleGenerationOutput(f"req_{request.number}", request.prompt, tokens, request.number, queue.stats)


def _call(
    model: PreTrainedModel, number: int, prompt: list[int], config: EnsembleConfig, arguments: dict[str, Any]
) -> Call:
    """What `generate()` makes of one prompt."""
    arguments = dict(arguments)
    allowed = arguments.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        arguments["prefix_allowed_tokens_fn"] = lambda _, ids: allowed(number, ids)
    ids = torch.tensor([prompt], device=model.device)
    config = replace(config, speculative=True)  # whose checks are those of refilled rows
    return call_of(
        model, input_ids=ids, attention_mask=torch.ones_like(ids), ensemble_config=config, **arguments
    )  # fmt: skip


def _merged(prompts: Sequence[Prompt | None]) -> Prompt | None:
    """What a model has for its own in all calls: given once for all of these, or made for each."""
    if prompts[0] is None or all(own is prompts[0] for own in prompts):
        return prompts[0]
    return Prompt(*left_padded([own.input_ids[0].tolist() for own in prompts]))


def _prompts(inputs: Sequence[Sequence[int]]) -> list[list[int]]:
    if isinstance(inputs, (str, bytes, dict)) or not hasattr(inputs, "__iter__") or getattr(inputs, "ndim", 1) != 1:
        raise TypeError(
            f"`inputs` must be a list of prompts, each of token ids without padding, but is a {type(inputs).__name__}: "
            "pass `tokenizer(texts)['input_ids']`."
        )
    return [_tokens(number, prompt) for number, prompt in enumerate(inputs)]


def _tokens(number: int, prompt: Any) -> list[int]:
    if not isinstance(prompt, (str, bytes, dict)) and getattr(prompt, "ndim", 1) == 1 and hasattr(prompt, "__iter__"):
        tokens = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        if all(isinstance(token, Integral) and not isinstance(token, bool) for token in tokens):
            if tokens:
                return list(map(int, tokens))
            raise ValueError(f"Prompt {number} is empty: give at least one token, as the one that begins a text.")
    raise TypeError(
        f"Prompt {number} must be a list of token ids, but is a {type(prompt).__name__}: {str(prompt)[:60]!r}. Pass "
        "`tokenizer(texts)['input_ids']`."
    )


def _places(numbers: Sequence[int] | None, count: int) -> list[int]:
    """The prompts' places in a list, by default in that of `inputs`."""
    if numbers is None:
        return list(range(count))
    places = list(numbers)
    each_once = len(set(places)) == len(places)
    if not each_once or not all(isinstance(place, Integral) and 0 <= place < LONGEST for place in places):
        raise ValueError(
            f"`numbers` must be places in a list, whole numbers from 0 on and each once, but are {str(numbers)[:60]}."
        )
    if len(places) != count:
        raise ValueError(f"`numbers` has {len(places)} places, but there are {count} `inputs`: give one for each.")
    return list(map(int, places))


def _check_size(batch_size: int) -> None:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a number of rows, 1 or more, but is {batch_size!r}.")


def _check_arguments(given: dict[str, Any]) -> None:
    """Raises for arguments of `generate()` that are of one batch, and not of every prompt."""
    for name, value in given.items():
        if isinstance(value, (torch.Tensor, Cache)) or name in ("streamer", "input_ids"):
            raise ValueError(
                f"`{name}` is not supported here: prompts are given as `inputs`, text alone, and read and shown apart."
            )


def _drafter(drafter: Any, config: EnsembleConfig) -> Any:
    """The one of all prompts; none where nothing is proposed. Raises for one that serves one text."""
    drafter = chosen_drafter(drafter, config)
    if isinstance(model_of(drafter), CandidateGenerator) and not isinstance(drafter, Suffixes):
        raise ValueError(
            f"A {type(drafter).__name__} as `drafter` serves one text: use a model, {PROMPT_LOOKUP!r} or a `Suffixes`."
        )
    if drafter is not None and not config.speculative:
        warn_once("`drafter` is not used by the standard ensemble (EnsembleConfig(speculative=False)).")
        return None
    return drafter


def _check_prompts(prompts: list[list[int]], model: PreTrainedModel) -> None:
    """Raises for tokens that the main model does not know."""
    size = model.config.get_text_config().vocab_size
    for number, prompt in enumerate(prompts):
        unknown = [token for token in prompt if not 0 <= token < size]
        if unknown:
            raise ValueError(
                f"Prompt {number} holds token {unknown[0]}, but the main model's vocabulary has {size} tokens: use its "
                "own tokenizer."
            )


def _check_call(call: Call, prompts: int) -> None:
    """Raises for what would not be of each prompt alone, or cannot be refilled."""
    settings = call.generation_config
    if call.model.config.is_encoder_decoder:
        raise ValueError("Encoder-decoder models are not supported here: use `generate()`, batch by batch.")
    if call.config.trace or call.returns("scores") or call.returns("logits"):
        raise ValueError(
            "Texts alone are returned here: leave out `trace`, `output_scores` and `output_logits`, or use "
            "`generate()`."
        )
    if (settings.num_return_sequences or 1) > 1:
        raise ValueError(
            f"`num_return_sequences` ({settings.num_return_sequences}) is not supported here: give a prompt so many "
            "times, each of which is sampled by itself."
        )
    if settings.do_sample and call.config.coupling == "maximal":
        raise ValueError(
            "With coupling='maximal' a sampled text depends on what shares the batch: use 'gumbel', which is as exact, "
            "or `generate()`."
        )
    names = in_order_only(call.logits_processor)
    if names:
        raise ValueError(
            f"{names[0]} may keep state from call to call, and rows of other prompts come between: if what it returns "
            "depends on its arguments only, set `stateless = True` on it."
        )
    if any(holds_grammar(one) and len(one.compiled_grammars) > 1 for one in flat(call.logits_processor)):
        raise ValueError("A grammar for each prompt is not supported here: give one for all.")
    if any(isinstance(criterion, MaxTimeCriteria) for criterion in call.stopping_criteria):
        raise ValueError("`max_time` is not supported here, where prompts wait for each other: leave it out.")
    if call.synced_gpus:
        raise ValueError("Weights sharded over processes are not supported here: load members whole.")
    if not can_roll_back(call.model, given_cache(without_fresh_static_cache(call.model_kwargs))):
        raise ValueError(f"A {type(call.cache).__name__} is not supported here: leave out `cache_implementation`.")
    for own in call.prompts:
        if own is not None and len(own.input_ids) not in (1, prompts):
            raise ValueError(
                f"`with_prompt` was given {len(own.input_ids)} prompts, but there are {prompts} `inputs`: give one for "
                "each, or one for all."
            )
