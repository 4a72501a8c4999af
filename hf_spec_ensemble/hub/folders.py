"""
Ensembles as folders and as repositories on the Hub: the config, the members' names, a model card, and
`custom_generate/generate.py`, with which `generate(custom_generate=...)` decodes the ensemble. Weights stay where they
are.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from pprint import pformat
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config import CONFIG_NAME, EnsembleConfig, config_file
from ..decoding.drafter import PROMPT_LOOKUP
from ..decoding.vocabulary import UNCOMPARED, check_tokens, tokens_of
from ..files import naming, parse_object
from ..members.adapters import is_model
from ..notices import warn_once
from ..version import __version__


FILES = (CONFIG_NAME, "README.md", "custom_generate/generate.py", "custom_generate/requirements.txt")
ACCESS = ("token", "cache_dir", "local_files_only", "trust_remote_code")  # arguments for whatever is downloaded


@dataclass(frozen=True)
class MemberReference:
    """
    Where a member comes from.

    Args:
        name (`str`): A folder, or a repository on the Hub.
        revision (`str`, *optional*): Of the repository: a branch, a tag or a commit.
        dtype (`str`, *optional*): To load it in, as `"bfloat16"`; by default the one it was saved in.
    """

    name: str
    revision: str | None = None
    dtype: str | None = None

    def __post_init__(self):
        for field in ("name", "revision", "dtype"):
            value = getattr(self, field)
            if not isinstance(value, str) and (field == "name" or value is not None):
                raise TypeError(f"A member's `{field}` must be text, but is {value!r}.")
        if self.name and Path(self.name).is_dir():
            object.__setattr__(self, "name", str(Path(self.name).resolve()))
        else:
            try:
                validate_repo_id(self.name)
            except HFValidationError as error:
                raise ValueError(
                    f"A member must be a folder or the id of a repository on the Hub, but is {self.name!r}: {error}"
                ) from None
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"`dtype` must be the name of a torch.dtype, as 'bfloat16', but is {self.dtype!r}.")

    @classmethod
    def of(cls, member: "Source") -> "MemberReference":
        """
        Raises:
            `ValueError`: for a model that was loaded from nowhere.
            `TypeError`: for what is no model and no name.
        """
        if isinstance(member, cls):
            return member
        if isinstance(member, (str, Path)):
            return cls(str(member))
        if not is_model(member):
            raise TypeError(
                "A member must be a folder, the id of a repository on the Hub, a `MemberReference` or a loaded model, "
                f"but is a {type(member).__name__}: {str(member)[:80]!r}."
            )
        name = member.config._name_or_path
        if not name:
            raise ValueError(
                f"A {type(member).__name__} that was not loaded from a folder or the Hub has no name to be saved "
                "under: save it with `save_pretrained`, and give that folder."
            )
        return cls(name, dtype=str(member.dtype).removeprefix("torch."))

    @property
    def is_local(self) -> bool:
        return Path(self.name).is_dir()

    @property
    def short_name(self) -> str:
        return self.name.rstrip("/").split("/")[-1]

    def load(self, **kwargs) -> PreTrainedModel:
        """The model, ready for inference. `kwargs` are for `from_pretrained`, and win."""
        kwargs = {"revision": self.revision or "main", "dtype": self.dtype or "auto"} | kwargs
        looks = {name: kwargs[name] for name in ("revision", *ACCESS) if name in kwargs}
        config = AutoConfig.from_pretrained(self.name, **looks)
        # The class that was saved, as there is no Auto class for every kind that generates
        kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
        return kind.from_pretrained(self.name, **kwargs).eval()


@dataclass
class Ensemble:
    """
    A loaded ensemble.

    Args:
        model (`PreTrainedModel`), assistant_models (`list[PreTrainedModel]`): The members.
        config (`EnsembleConfig`): How they are combined.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The main model's.
        drafter (`PreTrainedModel` or `str`, *optional*): As for `generate(drafter=...)`.
    """

    model: PreTrainedModel
    assistant_models: list[PreTrainedModel]
    config: EnsembleConfig
    tokenizer: PreTrainedTokenizerBase | None = None
    drafter: PreTrainedModel | str | None = None

    @classmethod
    def load(cls, members: "Sequence[Source]", config: EnsembleConfig, drafter: "Source | None" = None, **kwargs):
        """
        Loads models that form an ensemble.

        Args:
            members (`list`): The main model first: folders, ids on the Hub, or `MemberReference`s.
            config (`EnsembleConfig`): How they are combined.
            drafter (*optional*): `"prompt_lookup"`, or a model, given as the members are.
            kwargs: For every model's `from_pretrained`: `device_map`, `dtype`, `token`, ...

        Raises:
            `ValueError`: before anything is loaded, for members that do not fit the config or have other tokenizers
                than the main model.
            `OSError`: for one that is not found.
            `TypeError`: for what is no list of members, or no config.
        """
        entry = _entry(members, config, drafter)
        config, references, drafting = read_entry(entry)
        tokenizer = _shared_tokenizer(references, drafting, {name: kwargs[name] for name in ACCESS if name in kwargs})
        model, *assistants = (reference.load(**kwargs) for reference in references)
        drafting = drafting.load(**kwargs) if isinstance(drafting, MemberReference) else drafting
        return cls(model, assistants, config, tokenizer, drafting)

    def generate(self, *args, **kwargs):
        """`model.generate` of the ensemble; takes and returns all that this does."""
        ours = dict(assistant_model=self.assistant_models, ensemble_config=self.config, drafter=self.drafter)
        return self.model.generate(*args, **ours | kwargs)


Source = MemberReference | PreTrainedModel | str | Path


def save_ensemble(
    folder: str | Path,
    members: Sequence[Source],
    config: EnsembleConfig,
    drafter: Source | None = None,
    repo_id: str | None = None,
    speedup: str | None = None,
    licence: str | None = None,
) -> Path:
    """
    Writes an ensemble's folder: `ensemble_config.json`, `README.md`, `custom_generate/`. Not the members' weights.

    Args:
        folder (`str` or `Path`): Made if need be; an ensemble in it is replaced.
        members (`list`): The main model first: folders, ids on the Hub, models that were loaded from either (which do
            not know of which revision they are), or `MemberReference`s, which say a revision and a dtype too.
        config (`EnsembleConfig`): How they are combined.
        drafter (*optional*): `"prompt_lookup"`, or a model, given as the members are.
        repo_id (`str`, *optional*): Where it will be on the Hub, for the card's examples; by default the folder's name.
        speedup (`str`, *optional*), licence (`str`, *optional*): As for `ensemble_card`.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: before anything is written, for members that cannot be named or do not fit the config.

    Example:

    >>> import tempfile
    >>> from hf_spec_ensemble import EnsembleConfig, load_ensemble, save_ensemble
    >>> from hf_spec_ensemble.demo import FAMILY

    >>> folder = tempfile.mkdtemp()
    >>> members = [FAMILY / "reader", FAMILY / "solver"]
    >>> _ = save_ensemble(folder, members, EnsembleConfig(weights=[0.7, 0.3]), drafter="prompt_lookup")
    >>> ensemble = load_ensemble(folder)
    >>> ids = ensemble.generate(**ensemble.tokenizer("2 + 2 =", return_tensors="pt"), max_new_tokens=8)
    """
    folder = Path(folder)
    entry = _entry(members, config, drafter)
    card = ensemble_card(members, config, drafter, repo_id or folder.resolve().name, speedup, licence)
    (folder / "custom_generate").mkdir(parents=True, exist_ok=True)
    texts = (
        json.dumps(entry, indent=2) + "\n",
        str(card),
        GENERATE.format(entry=pformat(entry, width=118, sort_dicts=False)),
        f"hf_spec_ensemble>={__version__}\n",
    )
    for name, text in zip(FILES, texts):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def load_ensemble(name: str | Path, revision: str | None = None, **kwargs) -> Ensemble:
    """
    Loads a saved ensemble with its members.

    Args:
        name (`str` or `Path`): A folder, or a repository on the Hub.
        revision (`str`, *optional*): Of that repository; members have their own.
        kwargs: For every model's `from_pretrained`, over what was saved: `device_map`, `dtype`, `token`, ...

    Returns:
        `Ensemble`.

    Raises:
        `OSError`: if there is no `ensemble_config.json`, or a member is not found.
        `TypeError`: for what is no name.
        `ValueError`: naming the file, if it does not hold an ensemble; and as `Ensemble.load`.
    """
    given = {key: kwargs[key] for key in ACCESS if key in kwargs and key != "trust_remote_code"}
    config, members, drafter = read_ensemble(config_file(name, revision=revision, **given))
    return Ensemble.load(members, config, drafter, **kwargs)


def push_ensemble(
    repo_id: str,
    members: Sequence[Source],
    config: EnsembleConfig,
    drafter: Source | None = None,
    speedup: str | None = None,
    licence: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "An ensemble",
    endpoint: str | None = None,
) -> str:
    """
    Saves an ensemble to a repository on the Hub, which is made if need be.

    Args:
        repo_id (`str`): `"name/ensemble"`.
        members, config, drafter, speedup, licence: As for `save_ensemble`; the models must be on the Hub.
        private (`bool`, *optional*), token, revision (`str`, *optional*), commit_message (`str`): As for
            `huggingface_hub.HfApi.create_repo` and `upload_folder`.
        endpoint (`str`, *optional*): Of another Hub.

    Returns:
        `str`: The commit's address.

    Raises:
        `ValueError`: before anything is sent, as `save_ensemble`, or if a model is a folder, which nobody else has.

    Example: `push_ensemble("me/two-qwens", ["Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-Coder-1.5B"], EnsembleConfig())`.
    """
    _, references, drafting = read_entry(_entry(members, config, drafter))
    models = [*references, *([drafting] if isinstance(drafting, MemberReference) else [])]
    local = [reference.name for reference in models if reference.is_local]
    if local:
        raise ValueError(
            f"An ensemble on the Hub needs its members there, but {local} are folders on this machine: push the models "
            "first (`model.push_to_hub`) and give their ids."
        )
    api = HfApi(endpoint=endpoint, token=token)
    with TemporaryDirectory() as folder:
        save_ensemble(folder, members, config, drafter, repo_id, speedup, licence)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        ).commit_url


def ensemble_card(
    members: Sequence[Source],
    config: EnsembleConfig,
    drafter: Source | None = None,
    repo_id: str = "name/ensemble",
    speedup: str | None = None,
    licence: str | None = None,
) -> ModelCard:
    """
    The model card of an ensemble: metadata for the Hub, members, formula, examples that run as they stand.

    Args:
        members, config, drafter: As for `save_ensemble`.
        repo_id (`str`): Where the ensemble is, for the examples.
        speedup (`str`, *optional*): What was measured, and on what: `"1.7x on GSM8K (bfloat16, two CPU cores)"`.
        licence (`str`, *optional*): The Hub's name of one, as `"apache-2.0"`.

    Returns:
        `huggingface_hub.ModelCard`.

    Example:

    >>> from hf_spec_ensemble import EnsembleConfig
    >>> from hf_spec_ensemble.hub import ensemble_card

    >>> card = ensemble_card(["org/base", "org/math"], EnsembleConfig(weights=[0.7, 0.3]), repo_id="me/both")
    >>> card.data.base_model, card.data.tags
    (['org/base', 'org/math'], ['custom_generate', 'ensemble', 'speculative-decoding'])
    """
    config, references, drafting = read_entry(_entry(members, config, drafter))
    shown = config.for_members(len(references), drafters=int(drafter is not None))
    rows = [
        f"| l_{i} | {_shown(each)} | {_markdown(each.revision or '')} | {each.dtype or 'as saved'} |"
        for i, each in enumerate(references, 1)
    ]
    if drafting is not None:
        name = _shown(drafting) if isinstance(drafting, MemberReference) else f"`{drafting}`"
        rows.append(f"| drafter, proposes only | {name} | | |")
    data = ModelCardData(
        base_model=[each.name for each in references if not each.is_local] or None,
        library_name="transformers",
        license=licence and _text(licence),
        tags=["custom_generate", "ensemble", "speculative-decoding"],
        pipeline_tag="text-generation",
    )
    body = CARD.format(
        title=_markdown(repo_id.rstrip("/").split("/")[-1]),
        formula=_formula(shown),
        members="\n".join(rows),
        repo=_literal(repo_id),
        main=_literal(references[0].name),
        revision=f", revision={_literal(references[0].revision)}" if references[0].revision else "",
        dtype=_literal(references[0].dtype or "auto"),
        kind=_auto_class(references[0]),
        speed=f"\n## Speed\n\nOver the same ensemble decoded token by token: {speedup}\n" if speedup else "",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def generate_with(entry: dict[str, Any], model: PreTrainedModel, **kwargs):
    """
    What `custom_generate/generate.py` of a saved ensemble calls: `model.generate(**kwargs)` with the other members,
    which are loaded once in the process.

    Args:
        entry (`dict`): What `ensemble_config.json` holds.
        model (`PreTrainedModel`): The main model, from the caller.
        kwargs: Of `generate`. An `ensemble_config` replaces the saved one.

    Raises:
        `ValueError`: if `assistant_model` is given: the ensemble names its own.
    """
    config, members, drafter = read_entry(entry)
    for name in ("assistant_model", "assistant_models"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(
                f"`{name}` is given, but this ensemble names its members: {[each.name for each in members]}. Leave it "
                "out, or use `generate(assistant_model=..., ensemble_config=...)` without `custom_generate`."
            )
    name = model.config._name_or_path
    if Path(name).is_dir():
        name = str(Path(name).resolve())
    if name != members[0].name:
        warn_once(f"This ensemble was saved with {members[0].name!r} as its main model, and runs with {name!r}.")
    device = str(model.device)
    ours = dict(
        assistant_model=[_loaded_once(member, device) for member in members[1:]],
        ensemble_config=kwargs.pop("ensemble_config", None) or config,
        drafter=_loaded_once(drafter, device) if isinstance(drafter, MemberReference) else drafter,
    )
    # Not `model.generate`: transformers replaces that where the ensemble lies in the model's own repository
    return type(model).generate(model, **ours | kwargs)


@cache
def _loaded_once(member: MemberReference, device: str) -> PreTrainedModel:
    return member.load().to(device)


def _entry(members: Sequence[Source], config: EnsembleConfig, drafter: Source | None) -> dict[str, Any]:
    """What `ensemble_config.json` holds, checked."""
    if not isinstance(config, EnsembleConfig):
        raise TypeError(f"`config` must be an EnsembleConfig, but is a {type(config).__name__}: {config!r}.")
    if not isinstance(members, (list, tuple)):
        raise TypeError(f"`members` must be a list, the main model first, but is {members!r}.")
    references = [MemberReference.of(member) for member in members]
    config.for_members(len(references), drafters=int(drafter is not None))
    named = drafter is None or (isinstance(drafter, str) and drafter == PROMPT_LOOKUP)
    drafting = drafter if named else asdict(MemberReference.of(drafter))
    return {**config.to_dict(), "members": [asdict(each) for each in references], "drafter": drafting}


def read_entry(entry: dict[str, Any]) -> tuple[EnsembleConfig, list[MemberReference], MemberReference | str | None]:
    """
    The config, the members and the drafter that an `ensemble_config.json` names.

    Raises:
        `ValueError`, `TypeError`: saying what is not as `save_ensemble` writes it.
    """
    fields = dict(entry)
    members, drafter = fields.pop("members", None), fields.pop("drafter", None)
    if not members:
        raise ValueError("it names no members: write it with `save_ensemble`.")
    if not isinstance(members, list):
        raise ValueError(f"`members` must be a list of objects with a `name`, but is {members!r}.")
    if drafter not in (None, PROMPT_LOOKUP):
        drafter = _reference(drafter)
    config, references = EnsembleConfig.from_dict(fields), [_reference(member) for member in members]
    config.for_members(len(references), drafters=int(drafter is not None))
    return config, references, drafter


def read_ensemble(file: Path) -> tuple[EnsembleConfig, list[MemberReference], MemberReference | str | None]:
    """As `read_entry`, of a file, which errors name."""
    entry = parse_object(file.read_bytes(), file)
    with naming(file):
        return read_entry(entry)


def _reference(fields: Any) -> MemberReference:
    """A member as `save_ensemble` writes it."""
    known = MemberReference.__dataclass_fields__
    if not isinstance(fields, dict) or "name" not in fields or not fields.keys() <= known.keys():
        raise ValueError(f"A member or drafter must be an object with a `name`, of {list(known)}, but is {fields!r}.")
    return MemberReference(**fields)


def _shared_tokenizer(
    members: list[MemberReference], drafter: MemberReference | str | None, access: dict[str, Any]
) -> PreTrainedTokenizerBase:
    """The main model's tokenizer, which the others must have too; raises a `ValueError` otherwise."""
    named = {each: f"assistant model {i} ({each.name!r})" for i, each in enumerate(members)}
    named |= {drafter: f"the drafter ({drafter.name!r})"} if isinstance(drafter, MemberReference) else {}
    named[members[0]] = f"the main model ({members[0].name!r})"
    tokenizers, sizes = {}, []
    for each in named:
        where = {"revision": each.revision or "main", **access}
        sizes.append(AutoConfig.from_pretrained(each.name, **where).get_text_config().vocab_size)
        try:
            tokenizers[each] = AutoTokenizer.from_pretrained(each.name, **where)
        except (OSError, ValueError):
            if each == members[0]:
                raise
            tokenizers[each] = None  # a folder of weights alone
    tokens = [(tokenizer and tokens_of(tokenizer), named[each]) for each, tokenizer in tokenizers.items()]
    if not check_tokens(tokens, min(sizes)):
        warn_once(UNCOMPARED)
    return tokenizers[members[0]]


def _auto_class(main: MemberReference) -> str:
    """The Auto class to load the main model with, as far as that can be told without a network."""
    try:
        config = AutoConfig.from_pretrained(main.name, revision=main.revision or "main", local_files_only=True)
    except (OSError, ValueError):
        return "AutoModelForCausalLM"
    return "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"


def _shown(reference: MemberReference) -> str:
    name = reference.short_name if reference.is_local else reference.name
    shown = _markdown(name)
    return shown if reference.is_local else f"[{shown}](https://huggingface.co/{name})"


def _markdown(text: str) -> str:
    """Text that shows as it is in a line or a table of Markdown; underscores inside words need no escape."""
    return re.sub(r"[\\`*\[\]<>|&#~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", " ".join(_text(text).split()))


def _literal(text: str) -> str:
    """Text as a literal of Python, in double quotes."""
    return _text(json.dumps(text, ensure_ascii=False))


def _text(name: str) -> str:
    """A name as text: names of files may hold bytes that are none."""
    return name.encode("utf-8", "backslashreplace").decode()


def _formula(config: EnsembleConfig) -> str:
    if config.method == "contrastive":
        cut = f"; tokens under {config.plausibility:g} of the expert's best excluded" if config.plausibility else ""
        return f"softmax(l_1 - {config.contrast:g} * l_2){cut}"
    terms = " + ".join(f"{weight:.4g} * TERM_{i}" for i, weight in enumerate(config.weights, 1)).replace("+ -", "- ")
    if config.method == "weighted" and config.combine_on == "probs":
        return re.sub(r"TERM_(\d+)", r"softmax(l_\1)", terms)
    return f"softmax({terms.replace('TERM', 'l')})"


GENERATE = '''"""Decodes an ensemble: model.generate(..., custom_generate="this repository", trust_remote_code=True)."""

from hf_spec_ensemble.hub import generate_with


# As in ensemble_config.json
ENSEMBLE = {entry}


def generate(model, **kwargs):
    return generate_with(ENSEMBLE, model, **kwargs)
'''

CARD = """
# {title}

An ensemble of language models. With `l_i` the members' logits, each token is drawn from

    {formula}

| | member | revision | dtype |
|---|---|---|---|
{members}

It is decoded by `hf_spec_ensemble`, speculatively ([Fu et al., 2025](https://arxiv.org/abs/2502.01662)): members take
turns to propose tokens and to verify them against this distribution, so that the text has just the distribution, and
greedily is just the text, of the ensemble decoded token by token, with fewer forward passes.

## Use

    pip install hf_spec_ensemble

With `generate()` of transformers. This runs `custom_generate/generate.py` of this repository, ten lines; the other
members are loaded at the first call:

```python
from transformers import AutoTokenizer, {kind}

tokenizer = AutoTokenizer.from_pretrained({main}{revision})
model = {kind}.from_pretrained({main}, dtype={dtype}{revision})
inputs = tokenizer("Question: What is 2 + 3?\\nAnswer:", return_tensors="pt")
ids = model.generate(**inputs, custom_generate={repo}, trust_remote_code=True, max_new_tokens=32)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

Or without remote code:

```python
from hf_spec_ensemble import load_ensemble

ensemble = load_ensemble({repo})
inputs = ensemble.tokenizer("Question: What is 2 + 3?\\nAnswer:", return_tensors="pt")
ids = ensemble.generate(**inputs, max_new_tokens=32)
print(ensemble.tokenizer.decode(ids[0], skip_special_tokens=True))
```
{speed}"""
