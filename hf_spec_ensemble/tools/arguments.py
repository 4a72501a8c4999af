"""What the package's programs share: the config's fields on a command line, names of models, prompts."""

import argparse
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import BatchEncoding

from ..config import AUTO, COMBINE_ON, COUPLINGS, METHODS, EnsembleConfig
from ..demo import FAMILY


FIELDS = ("method", "weights", "contrast", "plausibility", "combine_on", "coupling")


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options that say how members are combined and tokens drawn; gives their group, to add more."""
    group = parser.add_argument_group("ensemble (see EnsembleConfig)")
    group.add_argument("--method", choices=METHODS, default="weighted")
    group.add_argument("--weights", type=float, nargs="+")
    group.add_argument("--contrast", type=float, default=EnsembleConfig.contrast)
    group.add_argument("--plausibility", type=float, default=EnsembleConfig.plausibility)
    group.add_argument("--combine-on", choices=COMBINE_ON)
    group.add_argument("--coupling", choices=COUPLINGS, default=EnsembleConfig.coupling)
    return group


def add_drafter_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--drafter`, for `drafter_of`."""
    parser.add_argument(
        "--drafter",
        default=AUTO,
        help="what proposes besides the members: a model, `prompt_lookup` (copies of the text), `auto` (what followed "
        "before in the text, where proposal lengths choose themselves) or `none` (default: %(default)s)",
    )


def drafter_of(name: str | None) -> str | None:
    """What `generate(drafter=...)` takes for what `--drafter` says."""
    return None if name == "none" else name


def config_of(given: dict[str, Any], **more: Any) -> EnsembleConfig:
    """
    The config that parsed arguments describe; takes its fields out of `given`.

    Args:
        given (`dict`): By name, from `vars(namespace)`.
        more: Further fields.

    Raises:
        `ValueError`, `TypeError`: as `EnsembleConfig` does.
    """
    return EnsembleConfig(**{name: given.pop(name) for name in FIELDS}, **more)


def locate(name: str) -> str:
    """The folder of an embedded model, or the name as it is."""
    return str(FAMILY / name) if name in ("reader", "solver", "draft") else name


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
