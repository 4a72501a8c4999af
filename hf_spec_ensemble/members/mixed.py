"""Different adapters of one base in one pass, as PEFT's `adapter_names` lets the rows of a batch have them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from .adapters import AdapterView, adapters_of, base_of, lock_of
from .check import difference, tolerance_of
from .costs import remembered
from .placement import device_of


NO_ADAPTER = "__base__"  # PEFT's name for it in a batch
TRIED = 4  # tokens


class MixedAdapters(AdapterView):
    """
    A base with several adapters: the first of G equal parts of a pass's rows have the first one, and so on. PEFT mixes
    LoRA adapters of some kinds; whether these, `can_mix` finds out.

    Args:
        base (`PreTrainedModel`): Holds the adapters' layers.
        adapter (`tuple[str | None, ...]`, G): The adapters' names, `None` for none.
    """

    @property
    def _names(self):
        return sorted({name for name in self.adapter if name is not None})

    def __repr__(self) -> str:
        return f"{type(self.base).__name__} with rows of {list(self.adapter)}"

    def _run(self, run, *args, **kwargs):
        with lock_of(self.base):
            self._each = len(kwargs["input_ids"]) // len(self.adapter)
            return super()._run(run, *args, **kwargs)

    @contextmanager
    def _active(self) -> Iterator[None]:
        names = [name or NO_ADAPTER for name in self.adapter for _ in range(self._each)]

        def put(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return args, kwargs | {"adapter_names": names}

        with super()._active(), ExitStack() as hooks:
            for layer in self._layers:
                hooks.callback(layer.register_forward_pre_hook(put, with_kwargs=True).remove)
            yield


def one_model_for(models: Sequence[PreTrainedModel]) -> PreTrainedModel | None:
    """
    What gives in one pass, over rows of each, what these models give, which share a base; `None` if nothing does.
    """
    adapters = [adapters_of(model) for model in models]
    if all(names == adapters[0] for names in adapters):
        return models[0]
    if any(names is None or len(names) > 1 for names in adapters):
        return None
    mixed = MixedAdapters(base_of(models[0]), tuple(names[0] if names else None for names in adapters))
    return mixed if can_mix(mixed, models) else None


def can_mix(mixed: MixedAdapters, models: Sequence[PreTrainedModel]) -> bool:
    """
    Whether PEFT mixes these adapters rightly: tried on a few tokens, once in a process.

    Args:
        models (`Sequence[PreTrainedModel]`, G): What each part of the rows should be.
    """
    return remembered([mixed], ("mixes", repr(mixed.base.peft_config)), lambda: _mixes(mixed, models))


def _mixes(mixed: MixedAdapters, models: Sequence[PreTrainedModel]) -> bool:
    vocabulary = mixed.config.get_text_config().vocab_size
    ids = torch.tensor([[(7 * i + 3) % vocabulary for i in range(TRIED)]], device=device_of(mixed))
    try:
        together = mixed(input_ids=ids.repeat(len(models), 1), use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever PEFT's code for other kinds of adapters raises
        return False
    with lock_of(mixed.base):  # one of them may be no view, and other threads use its layers
        return all(
            difference(rows, model(input_ids=ids, use_cache=False).logits[0]) <= tolerance_of(mixed)
            for rows, model in zip(together, models)
        )
