"""What names a member, and what an `ensemble_config.json` holds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, PreTrainedModel

from ..config import AUTO, EnsembleConfig
from ..decoding.drafter import chosen_drafter, is_named
from ..files import naming, parse_object
from ..members.adapters import AdapterView, base_of, is_model
from ..members.prompts import PromptView


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
            `ValueError`: if a model was not loaded from a folder or the Hub.
            `TypeError`: if it is neither a model nor a name.
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
        if isinstance(member, PromptView):
            raise ValueError(
                f"{member!r} has a prompt of its own, which belongs to a call and is not saved: save the model, and "
                "give `with_prompt` to `generate()`."
            )
        if _has_adapter(member):
            raise ValueError(
                f"{_called(member)} has an adapter, which its name does not say, so that the model would be loaded "
                "without: merge it into a copy of the model, save that with `save_pretrained`, and give the folder."
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
        """The model, ready for inference. `kwargs` are for `from_pretrained`, and take precedence."""
        kwargs = {"revision": self.revision or "main", "dtype": self.dtype or "auto"} | kwargs
        looks = {name: kwargs[name] for name in ("revision", *ACCESS) if name in kwargs}
        config = AutoConfig.from_pretrained(self.name, **looks)
        # The class that was saved, as there is no Auto class for every kind that generates
        kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
        return kind.from_pretrained(self.name, **kwargs).eval()


def _has_adapter(model: PreTrainedModel) -> bool:
    if isinstance(model, AdapterView):
        return model.adapter is not None
    return hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False)


def _called(model: PreTrainedModel) -> str:
    name = model.config._name_or_path or type(base_of(model)).__name__
    return f"{name!r} with the adapter {model.adapter!r}" if isinstance(model, AdapterView) else repr(name)


Source = MemberReference | PreTrainedModel | str | Path


def entry_of(members: Sequence[Source], config: EnsembleConfig, drafter: Source | None) -> dict[str, Any]:
    """What `ensemble_config.json` holds, checked."""
    if not isinstance(config, EnsembleConfig):
        raise TypeError(f"`config` must be an EnsembleConfig, but is a {type(config).__name__}: {config!r}.")
    if not isinstance(members, (list, tuple)):
        raise TypeError(f"`members` must be a list, the main model first, but is {members!r}.")
    references = [MemberReference.of(member) for member in members]
    config.for_members(len(references), drafters=int(chosen_drafter(drafter, config) is not None))
    drafting = drafter if is_named(drafter) else asdict(MemberReference.of(drafter))
    return {**config.to_dict(), "members": [asdict(each) for each in references], "drafter": drafting}


def read_entry(entry: dict[str, Any]) -> tuple[EnsembleConfig, list[MemberReference], MemberReference | str | None]:
    """
    The config, the members and the drafter that an `ensemble_config.json` names.

    Raises:
        `ValueError`, `TypeError`: naming what differs from what `save_ensemble` writes.
    """
    fields = dict(entry)
    members, drafter = fields.pop("members", None), fields.pop("drafter", AUTO)
    if not members:
        raise ValueError("it names no members: write it with `save_ensemble`.")
    if not isinstance(members, list):
        raise ValueError(f"`members` must be a list of objects with a `name`, but is {members!r}.")
    if not is_named(drafter):
        drafter = _reference(drafter)
    config, references = EnsembleConfig.from_dict(fields), [_reference(member) for member in members]
    config.for_members(len(references), drafters=int(chosen_drafter(drafter, config) is not None))
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
