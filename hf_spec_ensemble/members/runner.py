"""Runner: how a model's forward passes run. Eagerly over a cache that grows or over a static one, or compiled over
static ones. It does not handle tokens: members fill the caches that it makes."""

import copy
import threading
import types
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, CompileConfig, GenerationConfig, PreTrainedModel, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..compat import OUTPUT_CACHE, given_cache
from .adapters import AdapterView
from .cache import decoder_cache, empty_cache
from .costs import PassCosts, pass_costs, remembered
from .placement import device_of


WIDTHS = (1, 2, 4, 8, 16, 32)  # tokens in a row of the passes that are compiled; what has more runs eagerly
ROUNDED_TO = 256  # slots of the static caches that are compiled for, so that texts of about the same length share them
SETTLED = 3  # runs of a graph before one is measured: the first compiles it, with CUDA graphs the second records it


class Runner:
    """Eager passes, over a cache that grows with the text."""

    slots: int | None = None  # of the cache
    shapes_fixed = False  # whether a pass over so many tokens must always give as many logits
    way = "growing"  # what measurements of these passes are kept under

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @property
    def costs(self) -> PassCosts:
        """The process's measurements of such passes."""
        return pass_costs(self.model, self.way)

    def new_cache(self) -> Cache:
        """An empty one."""
        return empty_cache(self.model, self.slots)

    def width(self, needed: int) -> int:
        """How many tokens a row a pass has that must read `needed`."""
        return needed

    def run(self, inputs: dict[str, Any], width: int) -> tuple[torch.Tensor, bool]:
        """
        One forward pass.

        Args:
            inputs (`dict`): As `prepare_inputs_for_generation` makes them.
            width (`int`): Tokens in a row; 0 for the pass over the prompt.

        Returns:
            The logits, and whether the time of the pass is representative.
        """
        return self.model(**inputs, return_dict=True).logits, width > 0

    def released(self, cache: Cache) -> Cache:
        """The cache as it may be handed out at the end of a call."""
        return cache

    def take_back(self, cache: Cache) -> None:
        """The cache is not used any more."""


class StaticRunner(Runner):
    """Eager passes, over a static cache of so many slots."""

    way = "static"

    def __init__(self, model: PreTrainedModel, slots: int):
        super().__init__(model)
        self.slots = slots


class CompiledRunner(StaticRunner):
    """
    Compiled passes over a static cache; the prompt, and what is wider than the widest of `WIDTHS`, runs eagerly. Passes
    are padded to the next width, so that there is one graph for each, whatever is accepted. Graphs and caches outlive
    the call.

    Args:
        model (`PreTrainedModel`), slots (`int`): The cache gets at least so many slots.
        batch (`int`): B.
        compile_config (`CompileConfig`): For `torch.compile`. Shapes are not dynamic unless it says so.
    """

    shapes_fixed = True

    def __init__(self, model: PreTrainedModel, slots: int, batch: int, compile_config: CompileConfig):
        options = compile_config.to_dict()
        self.way = f"compiled {sorted(options.items())}"
        self.graphs: Graphs = remembered([model], self.way, lambda: Graphs(options))
        super().__init__(model, self.graphs.slots(batch, slots))
        self.batch = batch

    @property
    def costs(self) -> PassCosts:
        return pass_costs(self.model, self.way, WIDTHS)

    def new_cache(self) -> Cache:
        return self.graphs.lend(self.batch, self.slots) or super().new_cache()

    def width(self, needed: int) -> int:
        return next((width for width in WIDTHS if width >= needed), needed)

    def run(self, inputs, width):
        if width not in WIDTHS:
            return super().run(inputs, width)
        return self.graphs.run(self.model, inputs, width, self.batch, self.slots)

    def released(self, cache: Cache) -> Cache:
        return copy.deepcopy(cache)  # a later call would write into the one that was compiled for

    def take_back(self, cache: Cache) -> None:
        self.graphs.take_back(cache, self.batch, self.slots)


class Graphs:
    """
    A model's compiled passes, one function for each shape, and the caches that they were compiled for. Does not hold
    the model. Any number of threads may use it.

    Args:
        options (`dict`): Of `torch.compile`.
    """

    def __init__(self, options: dict[str, Any]):
        self._options = {key: value for key, value in options.items() if value is not None} | {
            "dynamic": bool(options.get("dynamic"))
        }
        self._functions: dict[tuple[int, int, int], Any] = {}  # by width, batch and slots
        self._runs: Counter[tuple[int, int, int]] = Counter()
        self._free: dict[tuple[int, int], list[Cache]] = {}
        self._lock = threading.Lock()

    def slots(self, batch: int, least: int) -> int:
        """Those of the smallest caches that are compiled for and suffice, or a round number."""
        known = [slots for (b, slots) in list(self._free) if b == batch and slots >= least]
        return min(known, default=-(-least // ROUNDED_TO) * ROUNDED_TO)

    def lend(self, batch: int, slots: int) -> Cache | None:
        """An empty cache from an earlier call."""
        with self._lock:
            free = self._free.setdefault((batch, slots), [])
            return free.pop() if free else None

    def take_back(self, cache: Cache, batch: int, slots: int) -> None:
        cache.reset()
        with self._lock:
            self._free[batch, slots].append(cache)

    def run(self, model, inputs: dict[str, Any], width: int, batch: int, slots: int) -> tuple[torch.Tensor, bool]:
        """As `Runner.run`."""
        shape = width, batch, slots
        function = self._functions.get(shape)
        if function is None:
            with self._lock:
                function = self._functions.setdefault(shape, _compiled(shape, self._options))
        on_gpu = device_of(model).type == "cuda"
        if on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        settled = self._runs[shape] >= SETTLED
        with nullcontext() if settled else _inductor_set(self._options):
            logits = function(model, inputs)
        self._runs[shape] += 1
        # CUDA graphs write their results to the same place again
        return logits.clone() if on_gpu else logits, settled


def _pass(model, inputs):
    return model(**inputs, return_dict=True).logits


def _compiled(shape: tuple[int, int, int], options: dict[str, Any]):
    """
    `_pass` compiled for one shape. torch keeps compiled code with a function's code object, and gives up on one that it
    has compiled a few times. So every model and shape has a function of its own.
    """
    name = "pass_of_{}_tokens_in_{}_rows_over_{}_slots".format(*shape)
    function = types.FunctionType(_pass.__code__.replace(co_name=name), _pass.__globals__, name)
    return torch.compile(function, **options)


def _inductor_set(options: dict[str, Any]):
    """Sets inductor's options while a graph is made: dynamo asks too whether weights may be frozen into it."""
    if options.get("backend") != "inductor" or not options.get("options"):
        return nullcontext()
    return torch._inductor.config.patch(options["options"])


class Stepper:
    """
    A model as transformers' own decoding loops see it, except that passes over single tokens are a compiled runner's.

    Args:
        runner (`CompiledRunner`): Of the model.
        cache (`Cache`, *optional*): The caller's, if there is one; else the runner lends one.
    """

    def __init__(self, runner: CompiledRunner, cache: Cache | None = None):
        self.runner = runner
        self._lent = cache is None
        self.cache = runner.new_cache() if cache is None else cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner.model, name)

    def _valid_auto_compile_criteria(self, *_) -> bool:
        return True

    def get_compiled_call(self, _):
        """What a loop calls after the prompt."""
        return self._step

    def _step(self, return_dict: bool = True, **inputs) -> CausalLMOutputWithPast:
        if "logits_to_keep" in inputs:  # last, as it is in a member's passes: graphs tell orders apart
            inputs["logits_to_keep"] = inputs.pop("logits_to_keep")
        logits, _ = self.runner.run(inputs, inputs["input_ids"].shape[1])
        return CausalLMOutputWithPast(logits=logits, **{OUTPUT_CACHE: given_cache(inputs)})

    def finish(self, output: Any) -> None:
        """Ends the loop, which returned this: no later call may write into a cache that is part of it."""
        if self._lent:
            if isinstance(output, dict):
                output[OUTPUT_CACHE] = self.runner.released(self.cache)
            self.runner.take_back(self.cache)


@dataclass(frozen=True)
class Running:
    """
    How the members' passes run in one call.

    Args:
        max_length (`int`, *optional*): Tokens of the longest text, prompt included. Not used for caches that grow.
        static (`bool`): Whether caches are static.
        compile_config (`CompileConfig`, *optional*): Compiles passes over static caches.
    """

    max_length: int | None = None
    static: bool = False
    compile_config: CompileConfig | None = None

    @classmethod
    def of(cls, generation_config: GenerationConfig, cache: Cache | None, max_length: int, device) -> "Running":
        """
        As the call's `cache_implementation`, `max_cache_len`, `compile_config` and `disable_compile` say, by the rules
        of `generate()`: with static caches, on a GPU, passes are compiled unless that is disabled.

        Raises:
            `ValueError`: if they do not go together, or with an ensemble.
        """
        own = decoder_cache(cache)
        static = isinstance(own, StaticCache)
        if static and own.offloading:
            raise ValueError("Static caches that are offloaded are not supported with an ensemble: use 'static'.")
        config = None if generation_config.disable_compile else generation_config.compile_config
        if config is not None and not static:
            raise ValueError(
                "`compile_config` compiles passes over static caches: pass `cache_implementation='static'` as well."
            )
        if static and config is None and device.type == "cuda" and not generation_config.disable_compile:
            config = CompileConfig()
        return cls(max(max_length, generation_config.max_cache_len or 0), static, config)

    def runner(
        self, model: PreTrainedModel, batch: int, cache: Cache | None = None, longest: int | None = None
    ) -> Runner:
        """
        For a member, that goes on with `cache` if there is one.

        Args:
            longest (`int`, *optional*): Tokens of its own longest text, where that has a prompt of its own.

        Raises:
            `ValueError`: if the cache has too few slots, or the model cannot be compiled.
        """
        if not self.static:
            return Runner(model)
        if getattr(model.config.get_text_config(decoder=True), "alibi", False):
            raise ValueError(
                f"A {type(model).__name__} with ALiBi does not work with static caches in transformers: leave out "
                "`cache_implementation`."
            )
        slots = max(self.max_length, longest or 0) + WIDTHS[-1]  # a pass may be padded at the end of the text
        if cache is not None:
            if cache.get_max_length() < slots:
                raise ValueError(
                    f"The static cache in `past_key_values` has {cache.get_max_length()} slots, but the call needs "
                    f"{slots}: {self.max_length} tokens, and {WIDTHS[-1]} for the padding of passes. Make it with "
                    f"`max_cache_len={slots}`, or pass `cache_implementation='static'` in its place."
                )
            slots = cache.get_max_length()
        if self.compile_config is None:
            return StaticRunner(model, slots)
        check_compilable(model, self.compile_config)
        return CompiledRunner(model, slots, batch, self.compile_config)


def check_compilable(model: PreTrainedModel, compile_config: CompileConfig) -> None:
    """
    Raises:
        `ValueError`: if this package, or transformers by its own criteria, cannot compile the model's passes.
    """
    name, reason = type(model).__name__, None
    if isinstance(model, AdapterView):
        name, reason = repr(model), "adapters that members share a base by are switched between passes"
    elif model.config.is_encoder_decoder:
        reason = "of encoder-decoder models they are not supported"
    elif not model._can_compile_fullgraph:
        reason = "transformers does not compile models of this class"
    else:
        everywhere = copy.copy(compile_config)
        everywhere._compile_all_devices = True
        settings = GenerationConfig(compile_config=everywhere)
        if not model._valid_auto_compile_criteria({OUTPUT_CACHE: empty_cache(model, 1)}, settings):
            reason = "its weights are offloaded, or quantised in a way that does not compile"
    if reason is not None:
        raise ValueError(
            f"Passes of {name} cannot be compiled: {reason}. Leave out `compile_config`, or pass "
            "`disable_compile=True`."
        )
