"""What is compared: the names that `--compare` takes, and the arguments of `generate()` that they mean."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..config import EnsembleConfig
from ..decoding.suffixes import Suffixes
from .loop import ancestral_loop


STANDARD = "standard"
NONE, PROMPT_LOOKUP, SUFFIXES = "none", "prompt_lookup", "suffixes"  # drafters that are no models
SPECULATIVE = ("auto", "no-alternate", "fixed", "drafter")
TAKE_LENGTHS = ("fixed", "no-alternate", "assisted", "ensemble-weight")
ORDER = (
    STANDARD, "member", "no-alternate", "fixed", "auto", "drafter", "loop", "assisted", "ensemble-weight",
)  # fmt: skip
STATIC, COMPILED, BATCHED = PREFIXES = "static:", "compiled:", "batched:"
NAMES = """\
members (each alone), standard, auto (what generate() does by default), drafter:none, drafter:suffixes,
drafter:prompt_lookup or drafter:FOLDER (the same with another drafter, or with none), no-alternate or no-alternate:K,
fixed:K or fixed:K,K,.. (one for each member; no drafter), loop (mixtures sampled by their components in a plain loop),
assisted:K and ensemble-weight:K (transformers' own); in front of what decodes the ensemble, static: (over static
caches), compiled: (compiled passes over these) or batched: (all prompts in one call, in rows that are refilled), as in
compiled:fixed:1,1"""

NOTES = {
    BATCHED: "all prompts are one call of `generate_batch`, with as many rows as others have in a batch. Its time is "
    "divided among them by their tokens. Sampled texts are others: noise is keyed by a prompt's place among all.",
    "loop": "a plain loop over KV caches: it draws the member whose turn it is, lets it read, and draws the token. "
    "These members are the ensemble's; its tokens are drawn with other random numbers, so that its texts are others of "
    "the same distribution.",
    "assisted": "transformers' assisted generation of the first two members: the text is the main model's, not the "
    "ensemble's.",
    "ensemble-weight": "transformers' `assistant_ensemble_weight`: mixes the two distributions where it verifies, but "
    "not for the token after, so that the text is not exactly the ensemble's.",
}


def split(name: str) -> tuple[str, str]:
    """
    A name's prefix, empty if it has none, and the rest.

    >>> from hf_spec_ensemble.bench.variants import split

    >>> split("compiled:fixed:5"), split("fixed:5")
    (('compiled:', 'fixed:5'), ('', 'fixed:5'))
    """
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return prefix, name.removeprefix(prefix)


def kind_of(name: str) -> str:
    """`"fixed"` of `"fixed:5"` and of `"compiled:fixed:5"`."""
    return split(name)[1].partition(":")[0]


def note_of(name: str) -> str:
    """What says whether a variant has one of the `NOTES`: its kind, or that it refills rows."""
    return BATCHED if name.startswith(BATCHED) else kind_of(name)


def place_of(name: str) -> tuple:
    """
    Where a variant stands among others, in tables and plots.

    >>> from hf_spec_ensemble.bench.variants import place_of

    >>> sorted(["static:auto", "fixed:10", "fixed:9", "auto", "standard"], key=place_of)
    ['standard', 'fixed:9', 'fixed:10', 'auto', 'static:auto']
    """
    prefix, name = split(name)
    kind, _, rest = name.partition(":")
    numbers = [int(part) for part in rest.split(",") if part.isdigit()]
    return ("", *PREFIXES).index(prefix), ORDER.index(kind), numbers, rest


def is_speculative(name: str) -> bool:
    """Whether a variant decodes the ensemble speculatively."""
    return kind_of(name) in SPECULATIVE


def repeats_standard(name: str) -> bool:
    """Whether a variant decodes the ensemble in another way than `standard` does, so that its text is the same."""
    return name != STANDARD and (is_speculative(name) or kind_of(name) == STANDARD)


@dataclass(frozen=True)
class Variant:
    """
    One thing that is compared; one of `alone`, `config`, `loop` and `assisted` is set.

    Args:
        name (`str`): As `--compare` takes it.
        alone (`int`, *optional*): A member without the others.
        config (`EnsembleConfig`, *optional*): An ensemble of all members.
        drafter (`str`, *optional*): What drafts for that ensemble: `"none"`, `"suffixes"` (of the texts of one call),
            `"prompt_lookup"`, or a model's folder or name. By default that is left to `generate()`.
        loop (`list[float]`, *optional*): The weights of a mixture that a plain loop samples.
        assisted (`int`, *optional*): The proposal length of transformers' own assisted generation.
        weight (`float`, *optional*): The main model's, for `assistant_ensemble_weight` in that.
        prefix (`str`): `"static:"`, `"compiled:"` or `"batched:"`, of an ensemble over static caches, compiled
            passes, or in refilled rows.
    """

    name: str
    alone: int | None = None
    config: EnsembleConfig | None = None
    drafter: str | None = None
    loop: list[float] | None = None
    assisted: int | None = None
    weight: float | None = None
    prefix: str = ""

    @property
    def drafting_model(self) -> str | None:
        return None if self.drafter in (NONE, PROMPT_LOOKUP, SUFFIXES) else self.drafter

    def arguments(
        self, models: Sequence[PreTrainedModel], drafters: dict[str, PreTrainedModel]
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model whose `generate()` runs, and what is particular to this variant in the arguments."""
        if self.alone is not None:
            return models[self.alone], {}
        if self.config is not None:
            arguments: dict[str, Any] = {"assistant_model": list(models[1:]), "ensemble_config": self.config}
            if self.drafter is not None:
                known = {NONE: None, SUFFIXES: Suffixes()} | drafters
                arguments["drafter"] = known.get(self.drafter, self.drafter)
            return models[0], arguments
        if self.loop is not None:
            others = list(models[1:])
            return models[0], {"custom_generate": ancestral_loop, "assistant_models": others, "weights": self.loop}
        mixing = {} if self.weight is None else {"assistant_ensemble_weight": self.weight}
        return models[0], {"assistant_model": models[1], **mixing}

    @contextlib.contextmanager
    def prepared(self, models: Sequence[PreTrainedModel]) -> Iterator[None]:
        """Sets the proposal length of assisted generation, which transformers reads from the assistant, for a while."""
        if self.assisted is None:
            yield
            return
        config = models[1].generation_config
        wanted = dict(
            num_assistant_tokens=self.assisted,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        before = {name: getattr(config, name) for name in wanted}
        try:
            for name, value in wanted.items():
                setattr(config, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)


def parse(
    name: str, members: int, config: EnsembleConfig, batch_size: int = 1, temperature: float = 0.0
) -> list[Variant] | str:
    """
    The variants that a name stands for, in an ensemble of so many members that decodes batches of that size at that
    temperature.

    Returns:
        `list[Variant]`, or a `str` that says why the name does not apply here.

    Raises:
        `ValueError`: if it is not a name, or its lengths are wrong.

    Example:

    >>> from hf_spec_ensemble import EnsembleConfig
    >>> from hf_spec_ensemble.bench.variants import parse

    >>> parse("fixed:5,1", 2, EnsembleConfig())[0].config.num_assistant_tokens
    [5, 1]
    >>> parse("assisted:5", 2, EnsembleConfig(), batch_size=4)
    'transformers decodes only one prompt at a time in assisted generation'
    """
    prefix, unprefixed = split(name)
    if prefix:
        if unprefixed.partition(":")[0] not in (STANDARD, *SPECULATIVE):
            raise ValueError(
                f"{name!r}: {prefix} goes in front of what decodes the ensemble, which is standard, auto, "
                "no-alternate, no-alternate:K, fixed:K and drafter:X."
            )
        if prefix == BATCHED and temperature > 0 and config.coupling == "maximal":
            return "with coupling maximal, samples depend on what shares the batch"
        made = parse(unprefixed, members, config, batch_size, temperature)
        return [replace(variant, name=prefix + variant.name, prefix=prefix) for variant in made]
    kind, _, rest = name.partition(":")
    if kind == "members" and not rest:
        return [Variant(f"member:{i}", alone=i) for i in range(members)]
    if kind == STANDARD and not rest:
        return [Variant(name, config=replace(config, speculative=False, share_passes=False))]
    if kind == "auto" and not rest:
        return [Variant(name, config=config)]
    if kind == "drafter" and rest:
        return [Variant(name, config=config, drafter=rest)]
    if kind == "loop" and not rest:
        if batch_size > 1 or temperature == 0 or not config.is_mixture:
            return "it samples mixtures of probabilities, at temperatures > 0 and one prompt at a time"
        return [Variant(name, loop=config.for_members(members).weights)]
    if kind not in TAKE_LENGTHS or (not rest and kind != "no-alternate"):
        raise ValueError(f"{name!r} is nothing to compare. There are: {' '.join(NAMES.split())}.")

    lengths = _lengths(name, rest) if rest else []
    given = {} if not lengths else {"num_assistant_tokens": lengths if len(lengths) > 1 else lengths[0]}
    if kind in ("fixed", "no-alternate"):
        made = replace(config, alternate=kind == "fixed", **given)
        made.for_members(members)  # raises if there is not one length for each member
        return [Variant(name, config=made, drafter=NONE)]
    if len(lengths) > 1:
        raise ValueError(f"{name!r}: transformers' assisted generation takes one proposal length.")
    return _assisted(name, kind, lengths[0], members, config, batch_size)


def _assisted(
    name: str, kind: str, length: int, members: int, config: EnsembleConfig, batch_size: int
) -> list[Variant] | str:
    """As `parse`, for transformers' own."""
    if batch_size > 1:
        return "transformers decodes only one prompt at a time in assisted generation"
    if kind == "assisted":
        return [Variant(name, assisted=length)]
    if config.method != "weighted" or members != 2:
        return "`assistant_ensemble_weight` is a weighted mixture of two members"
    weight = (config.weights or [0.5])[0]
    if not 0 < weight < 1:
        return f"`assistant_ensemble_weight` must be between 0 and 1, but the main model's weight is {weight:g}"
    return [Variant(name, assisted=length, weight=weight)]


def _lengths(name: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) >= 1 for part in parts):
        raise ValueError(f"{name!r}: proposal lengths are whole numbers >= 1, separated by commas.")
    return [int(part) for part in parts]
