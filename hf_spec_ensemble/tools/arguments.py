"""What the package's programs share: the config's fields on a command line, names of models, prompts."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import BatchEncoding

from ..choices import EMBEDDED, NO_DRAFTER
from ..config import EnsembleConfig
from ..demo import FAMILY


FIELDS = ("method", "weights", "contrast", "plausibility", "combine_on", "coupling")


def drafter_of(name: str | None) -> str | None:
    """What `generate(drafter=...)` takes for what `--drafter` says."""
    return None if name == NO_DRAFTER else name


def config_of(given: dict[str, Any], **more: Any) -> EnsembleConfig:
    """
    The config that parsed options describe, those of `options.add_config_arguments`; takes its fields out of `given`.

    Args:
        given (`dict`): By name, from `vars(namespace)`.
        more: Further fields.

    Raises:
        `ValueError`, `TypeError`: as `EnsembleConfig` does.
    """
    fields = {name: given.pop(name) for name in FIELDS}
    return EnsembleConfig(**{name: value for name, value in fields.items() if value is not None}, **more)


def locate(name: str) -> str:
    """The folder of an embedded model, or the name as it is."""
    return str(FAMILY / name) if name in EMBEDDED else name


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> None:
    """
    Checks that torch has a device, before models are loaded for it.

    Raises:
        `ValueError`: naming what `--device` says.
    """
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"--device {name}: torch has no such device here ({reason}). It sees {torch.cuda.device_count()} GPUs. Use "
            "--device cpu. Of several processes on a machine each takes a GPU of its own, unless --device says which."
        ) from None


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> BatchEncoding:
    """The prompt as the models expect it: through the chat template if there is one."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
