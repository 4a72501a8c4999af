"""The way in: checks, texts, passes, weights, report, in this order."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import METHODS, EnsembleConfig
from ..decoding.families import tokenizer_list, union_for
from ..decoding.names import names_of
from ..decoding.validate import check_members, shared_vocabulary
from ..ensemble.union import Union
from ..members.prompts import PromptView
from .linear import Objective, contrast_weight, greatest_plausibility, product_weights, score
from .mixture import mixture_log_probs, mixture_weights
from .passes import OwnTokens, Reading
from .report import FitResult, FitResults, Part, result_of
from .texts import Text, split, texts_of


DIGITS = 4  # of weights: texts do not say more
FIT = "fit"
ROWS = "uniform", "fitted", "contrast"  # how those of a report begin that are no members'


def fit(
    members: Sequence[PreTrainedModel],
    texts: Iterable[Any] | Mapping[str, Iterable[Any]],
    tokenizer: PreTrainedTokenizerBase,
    method: str = "weighted",
    plausibility: float | str = 0.0,
    held_out: float | Iterable[Any] | Mapping[str, Any] = 0.2,
    columns: str | Sequence[str] | Mapping[str, Any] | None = None,
    chat_template: bool = False,
    max_length: int | None = None,
    batch_size: int = 8,
    memory: int = 4 * 2**30,
    seed: int = 0,
    progress: bool = True,
    assistant_tokenizer: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
) -> FitResult | FitResults:
    """
    Finds the config under which texts are most likely, and evaluates it on texts that were held out.

    Likelihoods are those of the ensemble without logits processors: at temperature 1, without top-k, top-p or
    penalties. Every member reads every text once. Of a mixture a number per member and token is all that is kept. Of a
    product or a contrast whole distributions are needed. These are kept in half precision: `2 N T V` bytes for N
    members, T tokens and a vocabulary of V. What exceeds `memory` is read again for each of about ten evaluations.

    Args:
        members (`Sequence[PreTrainedModel]`): `[model, *assistant_models]`, decoder-only.
        texts (iterable, or `dict` of these):
            The texts to make likely: strings; pairs of a prompt and its answer, of which the answer counts; chats,
            lists of messages, of which the last, the assistant's, counts; or rows of these, as a `datasets.Dataset`.
            A `dict` has several sets by name: each is fitted by itself.
        tokenizer (`PreTrainedTokenizerBase`): The members', or the main model's.
        method (`str`, defaults to `"weighted"`):
            `"weighted"`, by expectation maximisation; `"product"`, weights of any sign, by L-BFGS; `"contrastive"`,
            the contrast, between 0 and 8. The negative log-likelihood is convex in all of them: the optimum is global.
        plausibility (`float` or `"fit"`, defaults to 0.0):
            Of contrastive decoding. A number is taken as it is: tokens that it cuts do not count in the fit, and make
            held-out texts impossible. `"fit"`: the greatest that cuts no token of the fitted texts, which makes these
            most likely.
        held_out (`float` or texts, defaults to 0.2):
            The share of the texts that is not fitted on, chosen at random, or other texts in the same form. For
            several sets also a `dict`.
        columns (`str` or pair of `str`, *optional*): The fields of rows. For several sets also a `dict`.
        chat_template (`bool`, defaults to `False`): Whether pairs are put through the tokenizer's chat template.
        max_length (`int`, *optional*):
            Longer texts are cut to so many tokens, with a warning. By default texts are whole, and refused if they are
            longer than the members' positions.
        batch_size (`int`, defaults to 8): Texts in a pass; they are batched by length.
        memory (`int`, defaults to 4 GiB): Bytes of distributions to keep; not used for mixtures.
        seed (`int`, defaults to 0): Of what is held out, of the order of batches, and of the bootstrap.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.
        assistant_tokenizer (`PreTrainedTokenizerBase` or a list of them, *optional*):
            Of the other members, where they have tokenizers of their own, as for `generate()`. What counts is then in
            the main model's tokens, or for methods other than `"weighted"` in those that all members have, and
            everybody reads what is before it in their own. Nats are per such token; compare bits per byte. A member by
            itself writes with several tokens what it has none for.

    Returns:
        `FitResult`, with the `config`, or for several sets `FitResults`, a `dict` of them. If reading is interrupted
        (Ctrl-C), it is of the texts read so far; if the search is, it has the best weights so far. It says so, and
        which sets were not fitted.

    Raises:
        `ValueError`: before the first pass, for members that do not fit together, an unknown method, no texts, empty
            answers, texts that are too long, and members in training mode.
        `TypeError`: if something is not a model, or not a text.
        `KeyboardInterrupt`: if there is no result yet.

    Example:

    >>> import hf_spec_ensemble as se
    >>> from hf_spec_ensemble.demo import FAMILY
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> folders = [FAMILY / "reader", FAMILY / "solver"]
    >>> models = [AutoModelForCausalLM.from_pretrained(folder, dtype="float32") for folder in folders]
    >>> pairs = [(f"Tom has {i} pens and buys {i} more.", f" He has {i} + {i} = {2 * i} pens.") for i in range(2, 12)]
    >>> result = se.fit(models, pairs, AutoTokenizer.from_pretrained(folders[0]), progress=False)
    >>> [row.name for row in result.rows], result.config.method, round(sum(result.config.weights), 6)
    (['reader', 'solver', 'uniform', 'fitted'], 'weighted', 1.0)
    """
    members = list(members) if isinstance(members, (list, tuple)) else [members]
    tokenizers = tokenizer_list(tokenizer, assistant_tokenizer, len(members) - 1)
    shared, limit, union = _check(members, method, plausibility, batch_size, tokenizers)
    others = [] if union is None else tokenizers[1:]
    sets = texts if isinstance(texts, Mapping) else {FIT: texts}
    if not sets:
        raise ValueError("`texts` is an empty dict: give at least one set of texts.")
    parts = {}
    for name, given in sets.items():
        of_set = [each.get(name) if isinstance(each, Mapping) else each for each in (held_out, columns)]
        if of_set[0] is None:
            raise ValueError(f"`held_out` has nothing for {name!r}, only for {sorted(held_out)}.")

        def tokenized(given, columns=of_set[1]):
            texts = texts_of(given, tokenizer, columns, chat_template, max_length, limit, others)
            return texts if union is None else _of_union(texts, union, members)

        parts[name] = _parts(tokenized, given, of_set[0], seed)
        if union is None:
            _check_tokens([text for part in parts[name] for text in part], shared)
    results = FitResults()
    for name, (fitted, out) in parts.items():
        memory_of_set = 0 if method == "weighted" else memory
        reading = Reading(members, shared, fitted, out, batch_size, memory_of_set, seed, union)
        try:
            reading.run(progress)
            results[name] = _fit(reading, method, plausibility, names_of(members), seed)
        except KeyboardInterrupt:
            if not results:
                raise
            break
        if results[name].interrupted:
            break
    unread = [name for name in parts if name not in results]
    if unread:
        warnings.warn(f"Interrupted: {unread} were not fitted.", stacklevel=2)
    return results if isinstance(texts, Mapping) else results[FIT]


def _check(
    members: list, method: Any, plausibility: Any, batch_size: Any, tokenizers: list | None
) -> tuple[int, int | None, Union | None]:
    """Tokens that can be decoded, the fewest positions that a member has, and the vocabulary if tokenizers differ."""
    if callable(method):
        raise ValueError(f"A callable ({method!r}) has no weights to fit: choose a method of {METHODS}.")
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, but is {method!r}.")
    if plausibility != FIT:
        EnsembleConfig(method="contrastive", plausibility=plausibility)
    if plausibility and method != "contrastive":
        raise ValueError(f"`plausibility` ({plausibility!r}) is of method 'contrastive', not of {method!r}.")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be an int >= 1, but is {batch_size!r}.")
    config = check_members(members, EnsembleConfig(method=method), None, tokenizers)
    if any(isinstance(member, PromptView) for member in members):
        raise ValueError("`fit` reads the same texts with all members: give models, without `with_prompt`.")
    if members[0].config.is_encoder_decoder:
        raise ValueError("`fit` reads texts with decoder-only models, but the members are encoder-decoders.")
    training = next((i for i, member in enumerate(members) if member.training), None)
    if training is not None:
        raise ValueError(
            f"Member {training + 1}, a {type(members[training]).__name__}, is in training mode, in which dropout makes "
            "passes random: call `model.eval()`."
        )
    limit = min((limit for limit in map(_positions, members) if limit), default=None)
    union = union_for(members, tokenizers, config, members[0].generation_config)
    if union is None:
        return shared_vocabulary(members)[1], limit, None
    return union.width if union.common is None else len(union.common), limit, union


def _positions(member: PreTrainedModel) -> int | None:
    return getattr(member.config.get_text_config(), "max_position_embeddings", None)


def _of_union(texts: list[Text], union: Union, members: list[PreTrainedModel]) -> list[Text]:
    """The same texts, where need be in the tokens that all members have; checked for what members read of them."""
    if union.common is not None:
        texts = [
            replace(text, ids=(*text.ids[: text.first], *union.in_common(text.ids[text.first :]))) for text in texts
        ]
    for number, text in enumerate(texts):
        for i, member in enumerate(members):
            own = OwnTokens.of(text, i, union)
            if own.ends[0] < 0:
                raise ValueError(
                    f"What is before the part of text {number} that counts is empty in the tokens of member {i + 1}, a "
                    f"{type(member).__name__}, whose tokenizer puts no token before a text: give pairs with prompts."
                )
            if len(own.ids) > (_positions(member) or len(own.ids)):
                raise ValueError(
                    f"Text {number} has {len(own.ids)} tokens of member {i + 1}, a {type(member).__name__}, which has "
                    f"{_positions(member)} positions: leave it out, or lower `max_length`."
                )
    return texts


def _parts(tokenized, given: Iterable[Any], held_out: Any, seed: int) -> tuple[list[Text], list[Text]]:
    if isinstance(held_out, (int, float)):
        return split(tokenized(given), held_out, seed)
    return tokenized(given), tokenized(held_out)


def _check_tokens(texts: list[Text], shared: int) -> None:
    most = max(max(text.ids) for text in texts)
    if most >= shared:
        raise ValueError(f"A text has token {most}, but the smallest of the members' vocabularies has {shared} tokens.")


@torch.no_grad()
def _fit(reading: Reading, method: str, plausibility: float | str, names: list[str], seed: int) -> FitResult:
    names = [f"{name} (member)" if name.split()[0] in ROWS else name for name in names]
    fitted, out = reading.texts(held_out=False), reading.texts(held_out=True)
    more = {}
    n, interrupted = len(names), reading.interrupted
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    nats = dict(zip(names, _by_text(reading.log_probs(held_out=True, alone=True), out)))
    if method == "weighted":
        log_probs = reading.log_probs(held_out=False)
        config = EnsembleConfig(weights=_rounded(mixture_weights(log_probs), log_probs))
        more = {"log_probs": log_probs}
        on = reading.log_probs(held_out=True)
        for name, weights in (("uniform", uniform), ("fitted", torch.tensor(config.weights, dtype=torch.float64))):
            nats[name] = _by_text(mixture_log_probs(on, weights), out)
    else:
        if plausibility == FIT:
            plausibility = greatest_plausibility(reading.blocks(held_out=False))
        objective = Objective(lambda: reading.blocks(held_out=False), plausibility)
        if method == "product":
            found = [round(weight, DIGITS) + 0.0 for weight in product_weights(objective, n).tolist()]  # not -0.0
            if max(found) <= 0:
                raise ValueError(
                    f"The texts are most likely with weights that no product can have, {found}: all members find them "
                    "less likely than random tokens. Fit on texts like those that the ensemble is to write."
                )
            config = EnsembleConfig(method="product", weights=found)
            weights = torch.tensor(config.weights, dtype=torch.float64)
            candidates = {"uniform": (uniform, 0.0), "fitted": (weights, 0.0)}
        else:
            contrast = round(contrast_weight(objective), DIGITS)
            config = EnsembleConfig(method="contrastive", contrast=contrast, plausibility=plausibility)
            plain = EnsembleConfig.contrast
            candidates = {f"contrast {plain:g}": (_contrast(plain), 0.0), "fitted": (_contrast(contrast), plausibility)}
        more = {"points": objective.points}
        interrupted |= objective.interrupted
        scored: dict[str, list[torch.Tensor]] = {name: [] for name in candidates}
        for block in reading.blocks(held_out=True):
            for name, (weights, cut) in candidates.items():
                scored[name].append(score(block, weights, cut).log_probs)
        nats |= {name: _by_text(torch.cat(parts), out) for name, parts in scored.items()}
    part = Part(len(fitted), sum(text.count for text in fitted))
    # As they were given, so that the bootstrap does not depend on the batches
    order = sorted(range(len(out)), key=lambda i: reading.given[out[i]])
    out, nats = [out[i] for i in order], {name: each[order] for name, each in nats.items()}
    counts, sizes = [text.count for text in out], [text.size for text in out]
    return result_of(config, names, part, counts, sizes, nats, interrupted, seed, **more)


def _contrast(contrast: float) -> torch.Tensor:
    return torch.tensor([1.0, -contrast], dtype=torch.float64)


def _by_text(log_probs: torch.Tensor, texts: list[Text]) -> torch.Tensor:
    """Nats by text, of tokens one text after the other: `[..., T]` -> `[..., texts]`."""
    return torch.stack([-part.sum(-1) for part in log_probs.split([text.count for text in texts], -1)], -1)


def _rounded(weights: torch.Tensor, log_probs: torch.Tensor) -> list[float]:
    """To four digits, with a sum of one still; not to zero where tokens `[N, T]` are impossible without the member."""
    rounded = [round(weight, DIGITS) for weight in weights.tolist()]
    possible = log_probs > -torch.inf
    for i, weight in enumerate(rounded):
        others = torch.tensor(rounded) > 0
        if weight == 0 and (possible[i] & ~possible[others].any(0)).any():
            rounded[i] = 10**-DIGITS
    rounded[rounded.index(max(rounded))] += 1 - sum(rounded)
    return [round(weight, DIGITS) for weight in rounded]
