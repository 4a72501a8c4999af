"""EnsembleConfig: how members are combined, who proposes, how tokens are drawn. Plain data, checked once, early."""

import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from .choices import AUTO, COMBINE_ON, COUPLINGS, DEFAULT_COMBINE_ON, METHODS
from .files import naming, parse_object


CONFIG_NAME = "ensemble_config.json"
NOT_OURS = ("members", "drafter")  # that `hub.save_ensemble` writes to the same file


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass
class EnsembleConfig:
    r"""
    What `model.generate(..., assistant_model=..., ensemble_config=EnsembleConfig(...))` decodes, and how.

    With members `[model, *assistant_models]`, `l_i` member i's logits `[..., V]` and `process` the logits processors of
    the call (penalties, temperature, top-k, ...), the ensemble's distribution r is

    | `method`        | r                                                                       | default `combine_on` |
    |-----------------|-------------------------------------------------------------------------|----------------------|
    | `"weighted"`    | sum_i w_i softmax(process(l_i)): the mixture                            | `"probs"`            |
    | `"product"`     | softmax(process(sum_i w_i l_i)): a geometric mean; with weights of any  | `"raw_logits"`       |
    |                 | sign also proxy tuning and DExperts, as `[1.0, 1.0, -1.0]`              |                      |
    | `"contrastive"` | softmax(process(l_model - contrast * l_assistant))                      | `"raw_logits"`       |
    | a callable      | of the members' stacked tensors                                         | `"raw_logits"`       |

    Args:
        method (`str` or `Callable`, defaults to `"weighted"`):
            One of the above. A callable gets a tensor `[N, ..., V]` and returns `[..., V]`: of probabilities, returning
            non-negative ones that need not sum to one, with `combine_on="probs"`; of logits, returning logits, else.
            It must treat every position alike and must not change its argument. A callable is not serialisable.
        weights (`Sequence[float]`, *optional*):
            One for each member, in the order `[model, *assistant_models]`. For `"weighted"` non-negative, normalised to
            a sum of one (with a warning if that changes them); for `"product"` of any sign, used as they are. Defaults
            to 1/N each.
        contrast (`float`, defaults to 0.1):
            mu >= 0 of contrastive decoding: `model` is the expert, the assistant the amateur.
        plausibility (`float`, defaults to 0.0):
            alpha in [0, 1] of contrastive decoding: tokens with less than alpha times the probability of the expert's
            most probable token are excluded. 0 excludes nothing.
        combine_on (`str`, *optional*):
            What is combined: `"probs"`, each member's processed probabilities; `"logits"`, each member's processed
            logits; `"raw_logits"`, the raw logits, so that the processors see the combination only.
        num_assistant_tokens (`int`, `Sequence[int]` or `"auto"`, defaults to `"auto"`):
            Proposal lengths, >= 1: one for each member, and last for a drafter if there is one, or an int for the
            drafter or else the smallest member while the others propose 1. `"auto"` chooses who proposes and how much
            as generation runs, from the measured costs of passes and the acceptance so far; where speculation gains
            nothing it decodes as the standard ensemble. See `hf_spec_ensemble.schedule.auto.Auto`.
        alternate (`bool`, defaults to `True`):
            Whether members alternate as proposer and verifier. `False`: the drafter, or without one the smallest
            member, always proposes, which is plain speculative decoding against r.
        coupling (`str`, defaults to `"auto"`):
            How tokens are drawn and sampled proposals are verified. All are exact. Greedy decoding and beam search
            use none. `"auto"` is `"ancestral"` for a weighted mixture of probabilities, else `"gumbel"`.
            `"ancestral"`: every position has an owner, member i with probability w_i, and its token is drawn from the
            owner only. So a token costs one pass, for any number of members, however different they are. The owner
            and the noise of a position depend on the seed alone, so that a seed's text is the standard ensemble's.
            `"gumbel"`: proposal and verification share Gumbel noise that depends on the seed and the position alone,
            so that a seed's text is the standard ensemble's, whatever the proposals and however long passes take.
            `"maximal"`: accepted with probability min(1, r/q), otherwise replaced from the residual; the highest
            acceptance there is, but a seed's text depends on what was proposed, and so on measured times unless
            `num_assistant_tokens` are given.
        speculative (`bool`, defaults to `True`):
            `False` decodes the standard ensemble: every member, token by token.
        share_passes (`bool` or `"auto"`, defaults to `"auto"`):
            Whether members that share their weights (one model under several prompts, one base with several adapters)
            run as rows of one pass, which reads the weights once for all of them; also in the standard ensemble.
            `"auto"` decides that by what passes cost, which is measured in some short passes before the first call.
            `True` shares wherever it is possible, with a warning where it is not.
        check_members (`bool`, defaults to `True`):
            Whether to check, before a model's first use in a process, that it reads correctly: several tokens at
            once, and again after a roll-back. This takes about the time of four tokens. Models that fail are refused;
            without the check their texts may be wrong. See `hf_spec_ensemble.members.check`.
        trace (`bool`, defaults to `False`):
            Whether to record who proposed every token and whether it was kept: `generate(..., tokenizer=tokenizer,
            return_dict_in_generate=True).trace`, a `Trace`. Only for the speculative ensemble.

    Raises:
        `ValueError` or `TypeError`: naming the field, its value and what is allowed.

    Example:

    >>> from hf_spec_ensemble import EnsembleConfig

    >>> config = EnsembleConfig(method="weighted", weights=[0.7, 0.3])
    >>> config.combine_on
    'probs'
    >>> EnsembleConfig.from_dict(config.to_dict()) == config
    True
    """

    method: str | Callable[[torch.Tensor], torch.Tensor] = "weighted"
    weights: Sequence[float] | None = None
    contrast: float = 0.1
    plausibility: float = 0.0
    combine_on: str | None = None
    num_assistant_tokens: int | Sequence[int] | str = AUTO
    alternate: bool = True
    coupling: str = AUTO
    speculative: bool = True
    share_passes: bool | str = AUTO
    check_members: bool = True
    trace: bool = False

    def __post_init__(self) -> None:
        if not callable(self.method) and self.method not in METHODS:
            raise ValueError(f"`method` must be one of {METHODS} or a callable, but is {self.method!r}.")
        if self.combine_on is None:
            self.combine_on = DEFAULT_COMBINE_ON.get(self.method, "raw_logits")
        if self.combine_on not in COMBINE_ON:
            raise ValueError(f"`combine_on` must be one of {COMBINE_ON}, but is {self.combine_on!r}.")
        if self.coupling not in COUPLINGS:
            raise ValueError(f"`coupling` must be one of {COUPLINGS}, but is {self.coupling!r}.")
        if self.coupling == "ancestral" and not self.is_mixture:
            raise ValueError(
                "`coupling` 'ancestral' draws from one component of a mixture: it needs method 'weighted' with "
                f"combine_on='probs', but they are {self.method!r} and {self.combine_on!r}. Use 'auto'."
            )
        for name in ("alternate", "speculative", "check_members", "trace"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, but is {getattr(self, name)!r}.")
        if not (self.share_passes == AUTO or isinstance(self.share_passes, bool)):
            raise ValueError(f"`share_passes` must be 'auto', True or False, but is {self.share_passes!r}.")
        if not _is_number(self.contrast) or self.contrast < 0:
            raise ValueError(f"`contrast` must be a finite number >= 0, but is {self.contrast!r}.")
        if not _is_number(self.plausibility) or not 0 <= self.plausibility <= 1:
            raise ValueError(f"`plausibility` must be a number in [0, 1], but is {self.plausibility!r}.")
        self.contrast, self.plausibility = float(self.contrast), float(self.plausibility)
        self._check_weights()
        self._check_lengths()

    @property
    def is_mixture(self) -> bool:
        """Whether r is the weighted mean of the members' probabilities."""
        return self.method == "weighted" and self.combine_on == "probs"

    def _check_weights(self) -> None:
        if self.weights is None:
            return
        weights = self.weights.tolist() if isinstance(self.weights, torch.Tensor) else self.weights
        if isinstance(weights, str) or not isinstance(weights, Sequence):
            raise TypeError(f"`weights` must be a list of numbers, one for each member, but is {self.weights!r}.")
        self.weights = list(weights)
        if not self.weights or not all(_is_number(weight) for weight in self.weights):
            raise ValueError(f"`weights` must be finite numbers, one for each member, but are {self.weights}.")
        self.weights = [float(weight) for weight in self.weights]
        if self.method == "contrastive" or callable(self.method):
            name = self.method if isinstance(self.method, str) else "a callable"
            raise ValueError(
                f"`weights` ({self.weights}) are not used by method {name}: leave them out"
                f"{', and set `contrast`' if name == 'contrastive' else ', and weigh inside the callable'}."
            )
        if self.method == "product" and max(self.weights) <= 0:
            raise ValueError(f"`weights` of method 'product' need a positive one, but are {self.weights}.")
        if self.method == "weighted":
            if min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
                raise ValueError(
                    f"`weights` of method 'weighted' must be >= 0 with a finite sum > 0, but are {self.weights}. "
                    "For weights of any sign use method 'product'."
                )
            total = math.fsum(self.weights)
            if abs(total - 1) > 1e-6:
                self.weights = [weight / total for weight in self.weights]
                warnings.warn(f"`weights` sum to {total:g}, not to 1: normalised to {self.weights}.", stacklevel=4)

    def _check_lengths(self) -> None:
        lengths = self.num_assistant_tokens
        if lengths == AUTO or _is_length(lengths):
            return
        if isinstance(lengths, (list, tuple)) and lengths and all(_is_length(length) for length in lengths):
            self.num_assistant_tokens = list(lengths)
            return
        raise ValueError(
            "`num_assistant_tokens` must be 'auto', an int >= 1 (for the drafter or else the smallest member; the "
            f"others propose 1) or a list of ints >= 1, one for each member, but is {lengths!r}."
        )

    def for_members(self, n: int, drafters: int = 0) -> "EnsembleConfig":
        """
        This config with its weights filled in, checked against the number of members.

        Args:
            n (`int`): Members, >= 2.
            drafters (`int`): Models or generators that propose and are not part of the ensemble.

        Returns:
            `EnsembleConfig`: `weights` has N entries for the methods that use it; `coupling` is not `"auto"`.

        Raises:
            `ValueError`: if N does not suit the method, the weights or the proposal lengths.

        Example:

        >>> from hf_spec_ensemble import EnsembleConfig

        >>> EnsembleConfig().for_members(2).weights
        [0.5, 0.5]
        """
        if n < 2:
            raise ValueError(f"An ensemble needs at least two members, but has {n}: pass `assistant_model`.")
        if self.method == "contrastive" and n != 2:
            raise ValueError(
                f"Method 'contrastive' takes two members (model - contrast * assistant), but got {n}. For more, use "
                "method 'product' with `weights` of any sign."
            )
        weights = self.weights
        if self.method in ("weighted", "product") and weights is None:
            weights = [1 / n] * n
        if weights is not None and len(weights) != n:
            raise ValueError(
                f"`weights` must have one entry for each member, {n} in the order [model, *assistant_models], but has "
                f"{len(weights)}: {weights}."
            )
        lengths = self.num_assistant_tokens
        if isinstance(lengths, list) and len(lengths) != n + drafters:
            raise ValueError(
                f"`num_assistant_tokens` must be 'auto', an int or have one entry for each of the {n} members"
                f"{' and the drafter' if drafters else ''}, but has {len(lengths)}: {lengths}."
            )
        coupling = self.coupling
        if coupling == AUTO:
            coupling = "ancestral" if self.is_mixture else "gumbel"
        return replace(self, weights=weights, coupling=coupling)

    def to_dict(self) -> dict[str, Any]:
        """
        The fields as JSON types.

        Raises:
            `ValueError`: if `method` is a callable.
        """
        if callable(self.method):
            raise ValueError(
                f"A config whose `method` is a callable ({self.method!r}) cannot be serialised: keep the function in "
                f"code and pass it again, or use one of {METHODS}."
            )
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "EnsembleConfig":
        """
        The inverse of `to_dict`.

        Raises:
            `TypeError`: if it is not a dict.
            `ValueError`: naming the fields that are not known.
        """
        if not isinstance(fields, dict):
            raise TypeError(f"The fields of an ensemble config must be a dict, but are {fields!r}.")
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"Unknown fields of an ensemble config: {unknown}. Known: {list(cls.__dataclass_fields__)}."
            )
        return cls(**fields)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes `ensemble_config.json` to the folder, which is made if need be. Raises as `to_dict` does."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / CONFIG_NAME).write_text(text)

    @classmethod
    def from_pretrained(cls, pretrained_path: str | Path, **kwargs) -> "EnsembleConfig":
        """
        Reads `ensemble_config.json` from a folder or a repository on the Hub. What `save_ensemble` adds to it, the
        members and the drafter, is left to `load_ensemble`.

        Args:
            pretrained_path (`str` or `Path`): The folder, or the repository's id.
            kwargs: For `huggingface_hub.hf_hub_download`: `revision`, `token`, `cache_dir`, ...

        Raises:
            `FileNotFoundError`: if the folder has none, or there is no such folder or repository.
            `TypeError`: if it is not a name.
            `ValueError`: naming the file, if it does not hold a config.
        """
        file = config_file(pretrained_path, **kwargs)
        fields = parse_object(file.read_bytes(), file)
        with naming(file):
            return cls.from_dict({name: value for name, value in fields.items() if name not in NOT_OURS})


def config_file(name: str | Path, **kwargs) -> Path:
    """
    The `ensemble_config.json` of a folder or, downloaded, of a repository on the Hub; arguments and errors as for
    `EnsembleConfig.from_pretrained`.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(
            f"What is loaded must be a folder or the id of a repository on the Hub, but is a {type(name).__name__}: "
            f"{str(name)[:80]!r}. For members without a saved ensemble: `Ensemble.load(members, config)`."
        )
    file = Path(name) / CONFIG_NAME
    if not file.is_file() and not file.parent.is_dir():
        try:
            file = Path(hf_hub_download(str(name), CONFIG_NAME, **kwargs))
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(
                f"{str(name)!r} is neither a folder nor a repository on the Hub with an {CONFIG_NAME}: {error}"
            ) from error
    if not file.is_file():
        raise FileNotFoundError(f"No {CONFIG_NAME} in {str(name)!r}: save one with `save_pretrained`.")
    return file
