"""What will be measured: checked settings, and the conditions, variants and prompts that follow from them.

All errors in the settings are found here, before a model is loaded.
"""

import importlib.util
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, CompileConfig, PreTrainedTokenizerBase

from ..config import EnsembleConfig
from ..decoding.vocabulary import UNCOMPARED, Tokens, check_tokens, tokens_of
from ..hub.references import MemberReference
from ..hub.tokenizers import tokenizers_of
from ..tools.arguments import check_device, locate
from .sandbox import can_run, enforced
from .tasks import TASKS, Row, encode, load_rows
from .variants import COMPILED, STANDARD, TAKE_LENGTHS, Variant, kind_of, parse, split


AUTO = "auto"  # as dtype
COMPARED = (
    "members", STANDARD, "no-alternate:5", "fixed:1", "fixed:5", "auto", "drafter:none", "assisted:5",
    "ensemble-weight:5",
)  # fmt: skip
CURVES = {
    "members": (2, 3, 4, 5, 6),
    "batch": (1, 2, 4, 8, 16),
    "prompt-length": (32, 64, 128, 256, 512, 1024, 2048),
    "proposal-length": (1, 2, 3, 4, 6, 8, 12),
}
COMPARED_IN_CURVES = dict.fromkeys(CURVES, (STANDARD, "no-alternate", "auto"))
COMPARED_IN_CURVES["proposal-length"] = (STANDARD, "no-alternate", "fixed", "auto")


@dataclass
class Settings:
    """
    What the command line says.

    Args:
        members (`list[str]`): Folders or names on the Hub, the main model first; `reader`, `solver` and `draft` are
            embedded in the package.
        config (`EnsembleConfig`): How they are combined. Variants change who proposes and how much.
        tasks, compare (`list[str]`): Names of tasks, and of what is compared; by default `COMPARED`, or
            `COMPARED_IN_CURVES`. The standard ensemble is always there.
        data_files (`dict[str, str]`): JSON lines for tasks that should not come from the Hub.
        shots (`int`, *optional*): Examples before a question; each task has a default.
        chat (`bool`): Whether prompts go through the tokenizer's chat template, if it has one.
        temperatures (`list[float]`): 0 is greedy.
        batch_sizes, seeds (`list[int]`): Greedy decoding uses the first seed only.
        max_new_tokens, num_prompts, repeats (`int`): A repeat measures the same text again.
        curve (`str`, *optional*): What to vary instead, one of `CURVES`, over `values`.
        dtype (`str`): As torch names it; `"auto"` until the faster one is found.
        device (`str`), threads (`int`, *optional*): As torch names it; torch's default number of threads.
        freeze (`bool`): Whether compiled passes have weights packed for them.
        run_model_code (`bool`): Whether tasks may run the code that models write, to score it.
        out (`Path`): The folder of records, table and plots.
    """

    members: list[str] = field(default_factory=lambda: ["reader", "solver"])
    config: EnsembleConfig = field(default_factory=EnsembleConfig)
    tasks: list[str] = field(default_factory=lambda: ["gsm8k"])
    data_files: dict[str, str] = field(default_factory=dict)
    shots: int | None = None
    chat: bool = True
    compare: list[str] | None = None
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    max_new_tokens: int = 128
    num_prompts: int = 16
    repeats: int = 1
    seeds: list[int] = field(default_factory=lambda: [0])
    curve: str | None = None
    values: list[int] | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    freeze: bool = False
    run_model_code: bool = False
    out: Path = Path("bench-results")

    def pinned(self) -> dict[str, Any]:
        """What all records of a file have in common; tasks, variants and the like may be added to it."""
        return {
            "members": self.members,
            "config": {name: value for name, value in self.config.to_dict().items() if name != "trace"},
            "data_files": {task: Path(file).name for task, file in self.data_files.items()},
            "shots": self.shots,
            "chat": self.chat,
            "max_new_tokens": self.max_new_tokens,
            "curve": self.curve,
            "dtype": self.dtype,
            "freeze": self.freeze,
            "run_model_code": self.run_model_code,
        }


@dataclass(frozen=True)
class Condition:
    """The conditions of a measurement. `prompt_length` is `None` if prompts are neither cut nor repeated."""

    task: str
    temperature: float
    batch_size: int
    members: int
    prompt_length: int | None = None

    @property
    def key(self) -> dict[str, Any]:
        """Its part of a record's key."""
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """
    Prompts that are decoded together: their place, rows and ids, and these by the names of members with tokenizers of
    their own.
    """

    index: int
    rows: tuple[Row, ...]
    prompts: tuple[tuple[int, ...], ...]
    own: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)


class Plan:
    """
    Conditions, and for each its variants and groups of prompts.

    Args:
        settings (`Settings`): Checked here.

    Raises:
        `ValueError`: saying what is wrong with the settings, and what is allowed.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.notes: list[str] = []  # what was left out or done otherwise, and why
        self._check()
        self.conditions = self._conditions()
        self._variants = {condition: self._variants_in(condition) for condition in self.conditions}
        self._check_freeze()
        self.tokenizer = _read(AutoTokenizer, settings.members[0])
        self.others = self._other_tokenizers()
        if self.others:
            self._check_union()
        else:
            self._check_tokenizers()
        self.longest = self._longest()
        self._own_prompts: dict[str, dict[str, list[list[int]]]] = {}
        self._prompts = {task: self._read_task(task) for task in settings.tasks}
        self._check_lengths()

    def variants(self, condition: Condition) -> list[Variant]:
        """What is compared; the standard ensemble first."""
        return self._variants[condition]

    def groups(self, condition: Condition) -> list[Group]:
        """Batches of whole size; prompts that fill no batch are left out."""
        rows, prompts = self._prompts[condition.task]
        if condition.prompt_length is not None:
            prompts = [_stretched(prompts, i, condition.prompt_length) for i in range(len(prompts))]
        size, own = condition.batch_size, self._own_prompts[condition.task]

        def batch(each: Sequence[Sequence[int]], i: int) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(ids) for ids in each[i * size :][:size])

        return [
            Group(i, tuple(rows[i * size :][:size]), batch(prompts, i), {name: batch(own[name], i) for name in own})
            for i in range(len(rows) // size)
        ]

    def longest_text(self, condition: Condition) -> int:
        """What static caches must hold: of all tasks, so that prompts share what is compiled, prompt included."""
        prompts = (ids for _, prompts in self._prompts.values() for ids in prompts)
        return (condition.prompt_length or max(map(len, prompts))) + self.settings.max_new_tokens

    @cached_property
    def compile_config(self) -> CompileConfig:
        """How passes are compiled."""
        # `mode` names a set of options, and excludes any of one's own
        return CompileConfig(mode=None, options={"freezing": True}) if self.settings.freeze else CompileConfig()

    def seeds(self, condition: Condition) -> list[int]:
        return self.settings.seeds if condition.temperature > 0 else self.settings.seeds[:1]

    def member_names(self, count: int) -> list[str]:
        """Of the first so many members, from the top again when they do not suffice."""
        return [self.settings.members[i % len(self.settings.members)] for i in range(count)]

    @cached_property
    def drafters(self) -> list[str]:
        """The models that draft."""
        names = (variant.drafting_model for variants in self._variants.values() for variant in variants)
        return sorted({name for name in names if name is not None})

    def _check(self) -> None:
        s = self.settings
        for name in ("max_new_tokens", "num_prompts", "repeats"):
            _check_whole(name, getattr(s, name), 1)
        for name, least in (("batch_sizes", 1), ("seeds", 0), ("values", 1)):
            for number in getattr(s, name) or []:
                _check_whole(name, number, least)
        for name, least in (("threads", 1), ("shots", 0)):
            if getattr(s, name) is not None:
                _check_whole(name, getattr(s, name), least)
        if min(s.temperatures) < 0:
            raise ValueError(f"--temperatures must be >= 0, but are {s.temperatures}.")
        unknown = sorted({*s.tasks, *s.data_files} - set(TASKS))
        if unknown:
            raise ValueError(f"There is no task {unknown[0]!r}. Tasks: {', '.join(TASKS)}.")
        if s.curve is not None and s.curve not in CURVES:
            raise ValueError(f"There is no curve {s.curve!r}. Curves: {', '.join(CURVES)}.")
        if s.values is not None and s.curve is None:
            raise ValueError("--values are those of a --curve, which is not given.")
        if s.dtype != AUTO and not getattr(getattr(torch, s.dtype, None), "is_floating_point", False):
            raise ValueError(f"--dtype must be a floating type of torch, as bfloat16, or auto, but is {s.dtype!r}.")
        check_device(s.device)
        if s.run_model_code and not can_run():
            raise ValueError("--run-model-code needs limits of the operating system that this one does not have.")
        if s.run_model_code and not enforced():
            self.notes.append(
                "The kernel does not confine the code that models write here: limits of time and memory, and checks in "
                "Python, stop accidents and not attackers. Run the benchmark in a container."
            )
        needed = {"matplotlib": True, "rouge_score": "cnn_dailymail" in s.tasks}
        needed["datasets"] = not set(s.tasks) <= set(s.data_files)
        missing = [name for name, is_needed in needed.items() if is_needed and importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"This needs {', '.join(missing)}: pip install 'hf_spec_ensemble[bench]'.")

    def _check_freeze(self) -> None:
        compiled = any(v.prefix == COMPILED for variants in self._variants.values() for v in variants)
        if self.settings.freeze and not compiled:
            raise ValueError(f"--freeze is about compiled passes, but nothing in --compare has the prefix {COMPILED}")

    def _conditions(self) -> list[Condition]:
        s = self.settings
        sizes = {"members": [len(s.members)], "batch": s.batch_sizes, "prompt-length": [None]}
        if s.curve in sizes:
            sizes[s.curve] = self.values
        for count in sizes["members"]:
            s.config.for_members(count)  # raises if the method or the weights do not take so many
        if max(sizes["members"]) > len(s.members):
            self.notes.append(
                f"There are {len(s.members)} members for up to {max(sizes['members'])}: they take part several times, "
                "each time with a cache of its own. They agree more than as many different models would."
            )
        return [
            Condition(task, temperature, batch_size, members, length)
            for task in s.tasks
            for temperature in s.temperatures
            for members in sizes["members"]
            for batch_size in sizes["batch"]
            for length in sizes["prompt-length"]
        ]

    @property
    def values(self) -> list[int]:
        return self.settings.values or list(CURVES[self.settings.curve])

    def _variants_in(self, condition: Condition) -> list[Variant]:
        s = self.settings
        names = s.compare or (COMPARED if s.curve is None else COMPARED_IN_CURVES[s.curve])
        if s.curve == "proposal-length":
            names = [
                x for n in names for x in ([f"{n}:{k}" for k in self.values] if split(n)[1] in TAKE_LENGTHS else [n])
            ]
        variants: dict[str, Variant] = {}
        for name in dict.fromkeys([STANDARD, *names]):
            parsed = parse(name, condition.members, s.config, condition.batch_size, condition.temperature)
            if isinstance(parsed, str):
                where = f" with batches of {condition.batch_size}" if condition.batch_size > 1 else ""
                note = f"{name} is left out{where}: {parsed}."
                self.notes += [note] if note not in self.notes else []
            else:
                variants |= {variant.name: variant for variant in parsed}
        return list(variants.values())

    def _other_tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """By their names, those of members that have tokenizers of their own; none where all share one."""
        names = list(dict.fromkeys(self.settings.members))
        for name in names:
            _read(AutoConfig, name)  # raises for what is no model
        _, found = tokenizers_of([MemberReference(locate(name)) for name in names], None, {})
        pairs = zip(names[1:], found or [])
        return {name: tokenizer for name, tokenizer in pairs if tokenizer.get_vocab() != self.tokenizer.get_vocab()}

    def _check_union(self) -> None:
        """What cannot be measured of members with different tokenizers."""
        every = [variant for variants in self._variants.values() for variant in variants]
        static = [variant.name for variant in every if variant.prefix]
        if static:
            raise ValueError(
                "For members with different tokenizers neither static caches nor refilled rows are measured: leave out "
                f"{static[0]}."
            )
        if self.drafters:
            raise ValueError(f"Members with different tokenizers: leave out drafter:{self.drafters[0]}.")
        if self.settings.curve == "prompt-length":
            raise ValueError("Members with different tokenizers have prompts of different lengths: leave out --curve.")
        for condition, variants in self._variants.items():
            self._variants[condition] = [one for one in variants if one.loop is None and one.weight is None]
        left = sorted({kind_of(one.name) for one in every if one.loop is not None or one.weight is not None})
        self.notes += [f"{name} is left out: it takes members that share a tokenizer." for name in left]
        self.notes.append(
            "The members have different tokenizers, and each reads the prompt by its own. Tokens are the main model's; "
            "of a member alone they are its own, so that their speeds do not compare."
        )

    def _check_tokenizers(self) -> None:
        names = list(dict.fromkeys([*self.settings.members, *self.drafters]))
        sizes = [_read(AutoConfig, name).get_text_config().vocab_size for name in names]
        tokens = [tokens_of(self.tokenizer), *map(_tokens_of, names[1:])]
        if not check_tokens(list(zip(tokens, map(repr, names))), min(sizes)):
            self.notes.append(UNCOMPARED)

    def _longest(self) -> int | None:
        """The most tokens, prompt and text, that all models have positions for."""
        limits = []
        for name in dict.fromkeys([*self.settings.members, *self.drafters]):
            config = _read(AutoConfig, name).get_text_config()
            limits.append(getattr(config, "max_position_embeddings", None))
        return min((limit for limit in limits if limit is not None), default=None)

    def _read_task(self, name: str) -> tuple[list[Row], list[list[int]]]:
        s, task = self.settings, TASKS[name]
        shots = s.shots
        if shots is None:
            shots = task.shots
        elif shots and task.examples_split is None:
            self.notes.append(f"{name} takes no examples: --shots {shots} does not apply to it.")
            shots = 0
        if task.runs_code and not s.run_model_code:
            self.notes.append(f"{name} is not scored: that runs what the models write, which --run-model-code allows.")
        rows, examples = load_rows(name, s.num_prompts, shots, s.data_files.get(name))
        if len(rows) < s.num_prompts:
            self.notes.append(f"{name} has {len(rows)} prompts for the {s.num_prompts} wanted.")

        def encoded(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
            chat = s.chat and tokenizer.chat_template is not None
            return [encode(task, row, examples, tokenizer, chat) for row in rows]

        self._own_prompts[name] = {member: encoded(tokenizer) for member, tokenizer in self.others.items()}
        return rows, encoded(self.tokenizer)

    def _check_lengths(self) -> None:
        s = self.settings
        for condition in self.conditions:
            count = len(self._prompts[condition.task][0])
            if count < condition.batch_size:
                raise ValueError(f"A batch of {condition.batch_size} needs as many prompts, but there are {count}.")
        if self.longest is None:
            return
        if s.curve == "prompt-length":
            short = [c for c in self.conditions if c.prompt_length + s.max_new_tokens <= self.longest]
            left_out = sorted({c.prompt_length for c in self.conditions} - {c.prompt_length for c in short})
            if left_out:
                self.notes.append(
                    f"Prompts of {', '.join(map(str, left_out))} tokens are left out: with {s.max_new_tokens} new ones "
                    f"they exceed the {self.longest} that the models have positions for."
                )
            self.conditions = short
            if not short:
                raise ValueError(self.notes[-1])
            return
        for task, (_, prompts) in self._prompts.items():
            length = max(len(ids) for each in (prompts, *self._own_prompts[task].values()) for ids in each)
            if length + s.max_new_tokens > self.longest:
                raise ValueError(
                    f"A prompt of {task} has {length} tokens, which with {s.max_new_tokens} new ones exceeds the "
                    f"{self.longest} that the models have positions for: set --shots or --max-new-tokens lower."
                )


def short_names(names: Sequence[str]) -> list[str]:
    """
    What tables call models: the last part of a folder or name, numbered where two are alike.

    >>> from hf_spec_ensemble.bench.plan import short_names

    >>> short_names(["org/base", "models/math/", "org/base"])
    ['base', 'math', 'base 2']
    """
    seen: Counter[str] = Counter()
    short = []
    for name in names:
        last = name.rstrip("/").split("/")[-1]
        seen[last] += 1
        short.append(last if seen[last] == 1 else f"{last} {seen[last]}")
    return short


def _stretched(prompts: Sequence[Sequence[int]], index: int, length: int) -> list[int]:
    """The end of a prompt, or the prompt behind those after it in the list, so that it has the length."""
    ids: list[int] = []
    while len(ids) < length:
        ids = [*prompts[index % len(prompts)], *ids]
        index += 1
    return ids[-length:]


def _check_whole(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, but is {value}.")


def _tokens_of(name: str) -> Tokens | None:
    """What a model's tokenizer knows; `None` if the model has none."""
    try:
        return tokens_of(_read(AutoTokenizer, name))
    except ValueError:
        return None


def _read(kind: type, name: str) -> Any:
    """A model's configuration or tokenizer."""
    folder = locate(name)
    if folder.startswith((".", "/", "~")) and not os.path.isdir(folder):
        raise ValueError(f"There is no folder {name!r} to load a model from.")
    try:
        return kind.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name!r} is not a model's folder or a name on the Hub: {reason}") from None
