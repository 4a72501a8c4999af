"""Several members that share weights: one model with different PEFT adapters, or with none."""

import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..compat import ENCODE


# By the module whose adapters may be switched
_locks: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()
_making_locks = threading.Lock()


def with_adapter(model: PreTrainedModel, adapter: str | None) -> "AdapterView":
    r"""
    A model with one of its adapters, or with none, as an assistant or drafter. So one base can be several members,
    without a copy of its weights.

    The adapter is active during this member's forward passes only. Afterwards the former adapters are active again. No
    parameter's `requires_grad` changes. The main model of the call goes on with the adapters that are active when
    `generate()` is called. Members that share a base take turns, in other threads too: a lock is held for every forward
    pass of an ensemble's member that has adapters, and by the standard ensemble for its whole call if the main model
    has some. A forward pass of the base that another thread makes by itself is not protected.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            With adapters: wrapped by PEFT, or loaded with `load_adapter` or `add_adapter`. Not with prompt learning,
            whose virtual tokens the engine does not count, nor with adapters merged into the weights.
        adapter (`str`, *optional*):
            The adapter's name; `None` for the base without any.

    Returns:
        `AdapterView`: Equal to any other view of the same adapter of the same base; refers to it, and copies nothing.

    Raises:
        `ValueError`: if the model has no such adapter, or one that cannot be switched.

    Example:

    >>> import torch
    >>> from hf_spec_ensemble import EnsembleConfig, with_adapter
    >>> from peft import LoraConfig
    >>> from transformers import LlamaConfig, LlamaForCausalLM

    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> size |= dict(eos_token_id=None, pad_token_id=0)
    >>> model = LlamaForCausalLM(LlamaConfig(**size))
    >>> model.add_adapter(LoraConfig(target_modules=["q_proj"]), "maths")

    The fine-tuned model against its own base:

    >>> ids, config = torch.tensor([[3, 4, 5]]), EnsembleConfig(method="contrastive", contrast=0.1)
    >>> model.generate(
    ...     ids, assistant_model=with_adapter(model, None), ensemble_config=config, max_new_tokens=4
    ... ).shape
    torch.Size([1, 7])
    """
    if hasattr(model, "of_other"):  # it has a prompt of its own, which it keeps
        return model.of_other(with_adapter(model.model, adapter))
    _switchable(model)
    return AdapterView(base_of(model), adapter)


class AdapterView:
    """
    What `with_adapter` returns. The engine treats it as a model; except for its forward pass it is the base.

    Args:
        base (`PreTrainedModel`): Holds the adapters' layers.
        adapter (`str`, *optional*): The adapter's name; `None` for none.
    """

    def __init__(self, base: PreTrainedModel, adapter: str | None):
        self.base = base
        self.adapter = adapter
        self.refresh()

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # while being copied or unpickled
            raise AttributeError(name)
        found = getattr(self.base, name)
        return functools.partial(self._run, found) if name in ENCODE else found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterView) and self.base is other.base and self.adapter == other.adapter

    def __hash__(self) -> int:
        return hash((id(self.base), self.adapter))

    def __repr__(self) -> str:
        return f"with_adapter({type(self.base).__name__}, {self.adapter!r})"

    @property
    def _names(self) -> list[str]:
        """The adapters that must be active."""
        return [] if self.adapter is None else [self.adapter]

    def __call__(self, *args, **kwargs):
        """The base's forward pass, with this adapter."""
        return self._run(self.base, *args, **kwargs)

    forward = __call__

    def _run(self, run: Callable, *args, **kwargs):
        with lock_of(self.base), self._active():
            return run(*args, **kwargs)

    def get_base_model(self) -> PreTrainedModel:
        """The base, by the name PEFT gives it."""
        return self.base

    def generate(self, *args, **kwargs):
        raise TypeError(
            f"{self!r} serves as an assistant or drafter, not as the main model: call `model.set_adapter(...)` (or "
            "`model.disable_adapter()`) and then `model.generate(...)` with the views of the other members."
        )

    def refresh(self) -> None:
        """
        Looks up the layers to switch.

        Raises:
            `ValueError`: if the adapter cannot be switched.
        """
        configs = _switchable(self.base)
        missing = [name for name in self._names if name not in configs]
        if not configs or missing:
            has = f"its adapters are {sorted(configs)}" if configs else "it has none"
            raise ValueError(
                f"This {type(self.base).__name__} has no adapter {(missing or [None])[0]!r}: {has}. Load it first, "
                "with PEFT or `model.load_adapter(...)`."
            )
        self._layers = _adapter_layers(self.base)
        self._configs = list(configs.items())
        self._refuse_merged()

    @contextmanager
    def _active(self) -> Iterator[None]:
        """
        This adapter, in place of what is active. The caller holds the lock.

        It does not use `set_adapter` or `disable_adapter`: these also walk through all modules, set `requires_grad` of
        all adapters and write to the PEFT model, at twenty times the cost, for every forward pass.
        """
        now = list(self.base.peft_config.items())
        # As objects: other layers may have configs that are equal
        if len(now) != len(self._configs) or any(a != b or x is not y for (a, x), (b, y) in zip(now, self._configs)):
            self.refresh()
        self._refuse_merged()
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        try:
            for layer, active, _ in before:
                layer._active_adapter = self._names or active
                layer._disable_adapters = not self._names
            yield
        finally:
            for layer, active, disabled in before:
                layer._active_adapter, layer._disable_adapters = active, disabled

    def _refuse_merged(self) -> None:
        merged = next((layer.merged_adapters for layer in self._layers if layer.merged_adapters), None)
        if merged:
            raise ValueError(
                f"The adapters {merged} are merged into the weights of this {type(self.base).__name__}, so that all "
                "its members would have them: call `unmerge_adapter()` first."
            )


def _switchable(model: PreTrainedModel) -> dict[str, Any]:
    """The adapters' configs by name; raises a `ValueError` if they are of a kind that cannot be switched."""
    configs = dict(getattr(model, "peft_config", None) or {})
    for name, config in configs.items():
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"Adapter {name!r} of this {type(model).__name__} is of type {config.peft_type.value}, which adds to "
                "the prompt or the cache and cannot be switched between forward passes: use adapters that change "
                "layers, like LoRA."
            )
    return configs


def _adapter_layers(base: torch.nn.Module) -> list[torch.nn.Module]:
    """All that has adapters to switch: PEFT's layers, and modules that an adapter replaces."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [module for module in base.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if not all(hasattr(layer, "_active_adapter") and hasattr(layer, "_disable_adapters") for layer in layers):
        raise ImportError(f"`with_adapter` does not work with peft {peft.__version__}. It is tested with peft 0.21.")
    return layers


def adapters_of(model: PreTrainedModel) -> tuple[str, ...] | None:
    """The adapters that a model's passes have now, none or some at once; `None` if these differ between its layers."""
    if isinstance(model, AdapterView):
        return tuple(model._names)
    base = base_of(model)
    layers = _adapter_layers(base) if getattr(base, "peft_config", None) else []
    with lock_of(model):  # or those of a view that runs in another thread
        found = {() if layer.disable_adapters else tuple(layer.active_adapters) for layer in layers} or {()}
    return found.pop() if len(found) == 1 else None


def is_model(thing: object) -> bool:
    """Whether this is a loaded model, perhaps one that PEFT has wrapped."""
    return hasattr(thing, "prepare_inputs_for_generation") and hasattr(thing, "config")


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside what PEFT or `with_adapter` made of it, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def identity(model: PreTrainedModel) -> tuple[object, Hashable]:
    """The key of a model's measurements: an object that lives as long as the model, and what distinguishes views."""
    return (model.base, ("adapter", model.adapter)) if isinstance(model, AdapterView) else (model, None)


def lock_of(model: PreTrainedModel) -> AbstractContextManager:
    """Held while a model with adapters runs, so that no view, made before or later, switches these then."""
    base = base_of(model)
    if not getattr(base, "peft_config", None):
        return nullcontext()
    with _making_locks:
        return _locks.setdefault(base, threading.RLock())


@contextmanager
def all_locks_of(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """The locks of several models, always taken in the same order, so that no two calls wait for each other."""
    locks = {id(lock): lock for lock in map(lock_of, models)}
    with ExitStack() as stack:
        for _, lock in sorted(locks.items()):
            stack.enter_context(lock)
        yield


def adds_virtual_tokens(model: PreTrainedModel) -> bool:
    """Whether PEFT prepends a learnt prompt to what this model reads."""
    # PEFT's generate() calls the one of the base, whose preparation of inputs it has replaced by its own
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)
    return bool(getattr(getattr(owner, "active_peft_config", None), "is_prompt_learning", False))
