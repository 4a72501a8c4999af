"""
Ensembles are written and read: the config, a model card, and `custom_generate/generate.py`, with which
`generate(custom_generate=...)` decodes the ensemble. Weights stay where they are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pprint import pformat
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import AUTO, CONFIG_NAME, EnsembleConfig, config_file
from ..members.prompts import with_prompt
from ..notices import warn_once
from ..version import __version__
from .card import ensemble_card, on_the_hub
from .references import ACCESS, MemberReference, Source, entry_of, read_ensemble, read_entry
from .tokenizers import Tokenizers, encoded, tokenizers_of


FILES = (CONFIG_NAME, "README.md", "custom_generate/generate.py", "custom_generate/requirements.txt")


@dataclass
class Ensemble:
    """
    A loaded ensemble.

    Args:
        model (`PreTrainedModel`), assistant_models (`list[PreTrainedModel]`): The members.
        config (`EnsembleConfig`): How they are combined.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The main model's.
        drafter (`PreTrainedModel` or `str`, defaults to `"auto"`): As for `generate(drafter=...)`.
        assistant_tokenizers (`list[PreTrainedTokenizerBase]`, *optional*): The other members', where they differ.
    """

    model: PreTrainedModel
    assistant_models: list[PreTrainedModel]
    config: EnsembleConfig
    tokenizer: PreTrainedTokenizerBase | None = None
    drafter: PreTrainedModel | str | None = AUTO
    assistant_tokenizers: list[PreTrainedTokenizerBase] | None = None

    @classmethod
    def load(cls, members: Sequence[Source], config: EnsembleConfig, drafter: Source | None = AUTO, **kwargs):
        """
        Loads models that form an ensemble.

        Args:
            members (`list`): The main model first: folders, ids on the Hub, or `MemberReference`s.
            config (`EnsembleConfig`): How they are combined.
            drafter (defaults to `"auto"`): Or `None`, `"prompt_lookup"`, or a model, given as the members are.
            kwargs: For every model's `from_pretrained`: `device_map`, `dtype`, `token`, ...

        Raises:
            `ValueError`: before anything is loaded, for members that do not fit the config, and for a drafter with
                another tokenizer than the main model.
            `OSError`: for one that is not found.
            `TypeError`: for what is no list of members, or no config.
        """
        entry = entry_of(members, config, drafter)
        config, references, drafting = read_entry(entry)
        access = {name: kwargs[name] for name in ACCESS if name in kwargs}
        tokenizer, theirs = tokenizers_of(references, drafting, access)
        model, *assistants = (reference.load(**kwargs) for reference in references)
        drafting = drafting.load(**kwargs) if isinstance(drafting, MemberReference) else drafting
        return cls(model, assistants, config, tokenizer, drafting, theirs)

    def encode(self, prompts: str | list) -> dict[str, Any]:
        """
        What `generate` is given for prompts: `ensemble.generate(**ensemble.encode(prompts))`. Where tokenizers differ,
        every member has the prompt in its own tokens, by its own chat template.

        Args:
            prompts (`str` or `list`): A text, or messages (`[{"role": "user", "content": "..."}]`); or a list of
                either. A member without a chat template reads the messages' texts.

        Returns:
            `dict`: `input_ids` and `attention_mask` `[B, P]` of the main model, and perhaps `assistant_model`.

        Example:

        >>> from hf_spec_ensemble import EnsembleConfig
        >>> from hf_spec_ensemble.demo import FAMILY
        >>> from hf_spec_ensemble.hub import Ensemble

        >>> ensemble = Ensemble.load([FAMILY / "reader", FAMILY / "solver"], EnsembleConfig())
        >>> ids = ensemble.generate(**ensemble.encode("2 + 2 ="), max_new_tokens=8)
        """
        single = isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict))
        prompts = [prompts] if single else prompts
        inputs = {name: x.to(self.model.device) for name, x in encoded(self.tokenizer, prompts).items()}
        if self.assistant_tokenizers is not None:
            pairs = zip(self.assistant_models, self.assistant_tokenizers)
            inputs["assistant_model"] = [with_prompt(model, **encoded(own, prompts)) for model, own in pairs]
        return inputs

    def generate(self, *args, **kwargs):
        """`model.generate` of the ensemble; takes and returns all that this does."""
        ours = dict(assistant_model=self.assistant_models, ensemble_config=self.config, drafter=self.drafter)
        if self.assistant_tokenizers is not None:
            ours |= dict(tokenizer=self.tokenizer, assistant_tokenizer=self.assistant_tokenizers)
        return self.model.generate(*args, **ours | kwargs)


def save_ensemble(
    folder: str | Path,
    members: Sequence[Source],
    config: EnsembleConfig,
    drafter: Source | None = AUTO,
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
        drafter (defaults to `"auto"`): Or `None`, `"prompt_lookup"`, or a model, given as the members are.
        repo_id (`str`, *optional*): Where it will be on the Hub, for the card's examples; by default `USER/` and the
            folder's name.
        speedup (`str`, *optional*), licence (`str`, *optional*): As for `ensemble_card`.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: before anything is written, for members that cannot be named, as those with adapters or prompts of
            their own, or that do not fit the config.

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
    entry = entry_of(members, config, drafter)
    card = ensemble_card(members, config, drafter, repo_id or on_the_hub(folder.resolve().name), speedup, licence)
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
        `TypeError`: if it is not a name.
        `ValueError`: naming the file, if it does not hold an ensemble; and as `Ensemble.load`.
    """
    given = {key: kwargs[key] for key in ACCESS if key in kwargs and key != "trust_remote_code"}
    config, members, drafter = read_ensemble(config_file(name, revision=revision, **given))
    return Ensemble.load(members, config, drafter, **kwargs)


def push_ensemble(
    repo_id: str,
    members: Sequence[Source],
    config: EnsembleConfig,
    drafter: Source | None = AUTO,
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
        `ValueError`: before anything is sent, as `save_ensemble`, or if a model is a local folder.

    Example: `push_ensemble("me/two-qwens", ["Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-Coder-1.5B"], EnsembleConfig())`.
    """
    _, references, drafting = read_entry(entry_of(members, config, drafter))
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
    tokenizer, theirs = _tokenizers_once(tuple(members), drafter)
    ours = dict(
        assistant_model=[_loaded_once(member, device) for member in members[1:]],
        ensemble_config=kwargs.pop("ensemble_config", None) or config,
        drafter=_loaded_once(drafter, device) if isinstance(drafter, MemberReference) else drafter,
    )
    if theirs is not None:
        ours |= dict(tokenizer=tokenizer, assistant_tokenizer=theirs)
    # Not `model.generate`: transformers replaces that where the ensemble lies in the model's own repository
    return type(model).generate(model, **ours | kwargs)


@cache
def _loaded_once(member: MemberReference, device: str) -> PreTrainedModel:
    return member.load().to(device)


@cache
def _tokenizers_once(members: tuple[MemberReference, ...], drafter: MemberReference | str | None) -> Tokenizers:
    try:
        return tokenizers_of(members, drafter, {})
    except OSError:  # without one `generate` compares what is beside the models
        return None, None


GENERATE = '''"""Decodes an ensemble: model.generate(..., custom_generate="this repository", trust_remote_code=True)."""

from hf_spec_ensemble.hub import generate_with


# As in ensemble_config.json
ENSEMBLE = {entry}


def generate(model, **kwargs):
    return generate_with(ENSEMBLE, model, **kwargs)
'''
