"""
Measures: every variant on every prompt, in turns, each from a call of `generate()` to its return.

The variants take turns prompt by prompt, and who begins changes with each, so that a machine that gets slower or faster
on the way does so for all. One run of each on the first prompt warms up, after compiling what is compiled. Then the
models' passes are measured by themselves, which says how fast the variants could be. What refills rows decodes all
prompts of a condition in one call, when it is the first one's turn.
"""

import hashlib
import platform
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..batches import generate_batch
from ..members.prompts import with_prompt
from ..members.stopwatch import Stopwatch
from ..members.warmup import warmup
from ..tools.arguments import locate
from ..tools.processes import Process
from ..version import __version__
from .curves import curve_key, curve_table, measure_curves, missing_curves, running_of
from .inputs import batch_of
from .plan import Condition, Group, Plan, Settings
from .records import Record, Records
from .tasks import TASKS
from .variants import BATCHED, COMPILED, STANDARD, STATIC, Variant, repeats_standard


def environment(settings: Settings) -> dict[str, Any]:
    """What affects times besides the settings: versions, device, threads."""
    device = torch.device(settings.device)
    return {
        "hf_spec_ensemble": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": settings.threads or torch.get_num_threads(),
    }


def _processor() -> str:
    """The processor's name; `platform` does not know it on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Bench:
    """
    Measures a plan into records. Models are loaded when the first of them is needed.

    Args:
        plan (`Plan`), records (`Records`): What to measure, and what has been.
        process (`Process`, *optional*): Which of those that measure it together this is; by default the only one.

    Raises:
        `ValueError`: if a prompt is not the one that the records were made with.
    """

    def __init__(self, plan: Plan, records: Records, process: Process | None = None):
        self.plan = plan
        self.records = records
        self.process = process or Process()
        self.settings = plan.settings
        self._calls: dict[tuple, tuple[dict[int, list[list[int]]], Record]] = {}  # of refilled rows
        for condition in plan.conditions:
            for _, variant, group, seed, repeat in self._units(condition):
                key = _key(condition, variant.name, group, seed, repeat)
                if key in records and records[key]["prompt"] != _digest(group):
                    raise ValueError(
                        f"Prompt {group.index} of {condition.task} is not the one in {records.folder}: the data or the "
                        "chat template have changed. Write to another folder with --out."
                    )

    def run(self) -> None:
        """Measures what is missing of the process's share, with a progress bar, and reads what others have by then."""
        units = self._share(self.process.rank)
        done = sum(self._is_recorded(*unit) for unit in units)
        name = f"process {self.process.rank}: " if self.process.world > 1 else ""
        with tqdm(total=len(units), initial=done, unit="run", position=self.process.local_rank or None) as bar:
            for condition in self.plan.conditions:
                missing = [u for u in self._units(condition, self.process.rank) if not self._is_recorded(*u)]
                bar.set_description(name + describe(condition))
                variants = list({variant.name: variant for _, variant, *_ in missing}.values())
                self._warm_up(condition, variants)
                self._measure_curves(condition, variants)
                for unit in missing:
                    self.records.add(self._measure(*unit))
                    bar.update()
                self._compare(condition)
        self.records.read()

    def count_missing(self, rank: int | None = None) -> int:
        """
        How many measurements the records lack.

        Args:
            rank (`int`, *optional*): Of this process's share only; by default of the whole plan.
        """
        runs = sum(not self._is_recorded(*unit) for unit in self._share(rank))
        # Gaps are known to be missing when all runs are made
        return runs or sum(len(list(self._divergences(condition, rank))) for condition in self.plan.conditions)

    def _share(self, rank: int | None) -> list[tuple[Condition, Variant, Group, int, int]]:
        return [unit for condition in self.plan.conditions for unit in self._units(condition, rank)]

    def _units(self, condition: Condition, rank: int | None = None) -> list[tuple[Condition, Variant, Group, int, int]]:
        """What is to be measured, all or a process's share, in order: `(condition, variant, group, seed, repeat)`."""
        variants = self.plan.variants(condition)
        groups = [g for g in self.plan.groups(condition) if rank is None or self.process.rank_of(g.index) == rank]
        turns = product(range(self.settings.repeats), self.plan.seeds(condition), groups)
        units = []
        for turn, (repeat, seed, group) in enumerate(turns):
            first = turn % len(variants)
            units += [(condition, variant, group, seed, repeat) for variant in variants[first:] + variants[:first]]
        return units

    def _is_recorded(self, condition: Condition, variant: Variant, group: Group, seed: int, repeat: int) -> bool:
        return _key(condition, variant.name, group, seed, repeat) in self.records

    @cached_property
    def _models(self) -> dict[str, PreTrainedModel]:
        """Every member and drafter, once."""
        s = self.settings
        dtype = getattr(torch, s.dtype)
        return {
            name: AutoModelForCausalLM.from_pretrained(locate(name), dtype=dtype).to(s.device).eval()
            for name in dict.fromkeys([*s.members, *self.plan.drafters])
        }

    def _members(self, condition: Condition) -> list[PreTrainedModel]:
        return [self._models[name] for name in self.plan.member_names(condition.members)]

    def _warm_up(self, condition: Condition, variants: Sequence[Variant]) -> None:
        group = self.plan.groups(condition)[0]
        for variant in variants:
            if variant.prefix == COMPILED:
                self._compile(condition, variant)
            if variant.prefix == BATCHED:
                self._serve(condition, variant, [group], self.settings.seeds[0])
            else:
                self._generate(condition, variant, group, self.settings.seeds[0])

    def _measure_curves(self, condition: Condition, variants: Sequence[Variant]) -> None:
        """Records, and shows, what passes cost of which these variants consist, as far as that is not recorded."""
        missing = missing_curves(self.plan, self.records, condition, variants) if variants else {}
        for prefix, names in missing.items():
            curves = measure_curves(
                {name: self._models[name] for name in names},
                batch_of(self.plan.groups(condition)[0].prompts, self._padding["pad_token_id"], self.settings.device),
                running_of(self.plan, condition, prefix),
                self.settings.max_new_tokens,
                self.plan.longest,
            )
            records = [curve_key(condition, prefix, name) | curve for name, curve in curves.items()]
            for record in records:
                self.records.add(record)
            tqdm.write("\n".join(["Milliseconds of a pass (times one over one token):", *curve_table(records)]))

    def _compile(self, condition: Condition, variant: Variant) -> None:
        """Compiles a variant's passes, as far as no other has done so, and records how long that took."""
        drafting = [] if variant.drafting_model is None else [self._models[variant.drafting_model]]
        seconds = warmup(
            [*self._members(condition), *drafting],
            max_length=self.plan.longest_text(condition),
            batch_size=condition.batch_size,
            compile_config=self.plan.compile_config,
        )
        key = {"kind": "warmup", **condition.key, "variant": variant.name}
        if key not in self.records:  # a run that is continued compiles again
            self.records.add(key | {"seconds": sum(seconds), "member_seconds": seconds})

    def _measure(self, condition: Condition, variant: Variant, group: Group, seed: int, repeat: int) -> Record:
        name = self._reads(condition, variant)
        prompts = group.own.get(name, group.prompts)
        if variant.prefix == BATCHED:
            tokens, took = self._served(condition, variant, group, seed, repeat)
        else:
            seconds, output, passes = self._generate(condition, variant, group, seed)
            length = max(len(ids) for ids in prompts)
            tokens = [_until_end(row, self._ends_of(name)) for row in output.sequences[:, length:].tolist()]
            took = {"seconds": seconds, **self._statistics(output, passes, seconds)}
        texts = self._tokenizer(name).batch_decode(tokens, skip_special_tokens=True)
        return {
            **_key(condition, variant.name, group, seed, repeat),
            "processes": self.process.world,
            "prompt": _digest(group),
            "prompt_tokens": [len(ids) for ids in prompts],
            "new_tokens": sum(len(row) for row in tokens),
            **took,
            "scores": self._scores(condition, group, texts),
            "tokens": tokens,
            "texts": texts,
        }

    @staticmethod
    def _statistics(output: Any, passes: "Passes", seconds: float) -> Record:
        """An ensemble's own statistics; for transformers' methods, what passes were seen."""
        stats = getattr(output, "stats", None)
        if stats is None:
            return {"forward_passes": passes.counts, "member_seconds": passes.seconds, "loop_seconds": seconds}
        return {
            "forward_passes": stats.forward_passes,
            "member_seconds": stats.member_seconds,
            "loop_seconds": stats.seconds,
            "proposed": stats.proposed,
            "verified": stats.verified,
            "accepted": stats.accepted,
            "predicted_speedup": stats.predicted_speedup,
            "settled_early": stats.settled_early,
        }

    def _scores(self, condition: Condition, group: Group, texts: Sequence[str]) -> list[float] | None:
        """A score for each row; `None` for prompts that were cut, and where running code is not allowed."""
        task = TASKS[condition.task]
        if condition.prompt_length is not None or (task.runs_code and not self.settings.run_model_code):
            return None
        return [task.score(row, text) for row, text in zip(group.rows, texts)]

    def _generate(
        self, condition: Condition, variant: Variant, group: Group, seed: int, **more: Any
    ) -> tuple[float, Any, "Passes"]:
        """A timed call of `generate()`: seconds, its output, and the passes that were seen."""
        members, name = self._members(condition), self._reads(condition, variant)
        model, arguments = variant.arguments(members, self._models)
        if self.plan.others and variant.alone is None:
            arguments |= self._of_union(condition, variant, group)
        arguments |= {"return_dict_in_generate": True} | self._settings(condition, variant) | more
        inputs = batch_of(group.own.get(name, group.prompts), self._padding_of(name)["pad_token_id"], model.device)
        with variant.prepared(members), Passes([] if variant.config else members) as passes:
            torch.manual_seed((seed << 32) + group.index)  # whom a mixture draws from, and so its time, are chance too
            _synchronize(model.device)
            start = time.perf_counter()
            output = model.generate(**inputs, **arguments)
            _synchronize(model.device)
            seconds = time.perf_counter() - start
        return seconds, output, passes

    # Refilled rows: one call for all groups

    def _served(
        self, condition: Condition, variant: Variant, group: Group, seed: int, repeat: int
    ) -> tuple[list[list[int]], Record]:
        """A group's texts, and its share of what all took that were missing when the first of them was asked for."""
        key = condition, variant.name, seed, repeat
        if key not in self._calls:
            missing = [
                unit[2]
                for unit in self._units(condition, self.process.rank)
                if (condition, unit[1].name, *unit[3:]) == key and not self._is_recorded(*unit)
            ]
            self._calls[key] = self._serve(condition, variant, missing, seed)
        texts, took = self._calls[key]
        share = sum(map(len, texts[group.index])) / sum(len(row) for rows in texts.values() for row in rows)
        divided = {
            name: [share * number for number in value] if isinstance(value, list) else share * value
            for name, value in took.items()
        }
        return texts[group.index], divided | {"predicted_speedup": None}

    def _serve(
        self, condition: Condition, variant: Variant, groups: Sequence[Group], seed: int
    ) -> tuple[dict[int, list[list[int]]], Record]:
        """The texts of groups, by index, and what all of them took together."""
        model, arguments = variant.arguments(self._members(condition), self._models)
        arguments |= self._settings(condition, variant)
        size = condition.batch_size
        prompts = [list(ids) for group in groups for ids in group.prompts]
        numbers = [group.index * size + row for group in groups for row in range(size)]
        torch.manual_seed(seed)
        _synchronize(model.device)
        start = time.perf_counter()
        results = generate_batch(model, prompts, batch_size=size, numbers=numbers, progress_bar=False, **arguments)
        _synchronize(model.device)
        seconds = time.perf_counter() - start
        rows, stats = iter(results.values()), next(iter(results.values())).stats
        texts = {group.index: [next(rows).generated_tokens for _ in group.prompts] for group in groups}
        counts = ("forward_passes", "member_seconds", "proposed", "verified", "accepted")
        took = {"seconds": seconds, "loop_seconds": stats.seconds}
        return texts, took | {name: getattr(stats, name) for name in counts}

    def _settings(self, condition: Condition, variant: Variant) -> dict[str, Any]:
        """Arguments of `generate()` that all variants have, and those of a variant's caches."""
        settings = {"max_new_tokens": self.settings.max_new_tokens}
        if condition.prompt_length is not None and self._ends:  # a prompt that was cut may end the text at once
            settings["suppress_tokens"] = self._ends
        padding = self._padding_of(self._reads(condition, variant))
        return settings | self._caches(condition, variant) | padding | _sampling(condition.temperature)

    def _reads(self, condition: Condition, variant: Variant) -> str:
        """The name of the member whose `generate()` runs."""
        return self.plan.member_names(condition.members)[variant.alone or 0]

    def _tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        return self.plan.others.get(name, self.plan.tokenizer)

    def _of_union(self, condition: Condition, variant: Variant, group: Group) -> dict[str, Any]:
        """Arguments of `generate()` for members with different tokenizers, each with the prompt in its own tokens."""
        names = self.plan.member_names(condition.members)[1:]
        if variant.assisted is not None:  # transformers' own writes the prompt anew
            return {"tokenizer": self.plan.tokenizer, "assistant_tokenizer": self._tokenizer(names[0])}
        models = [self._models[name] for name in names]
        for i, name in enumerate(names):
            if name in group.own:
                pad = self._padding_of(name)["pad_token_id"]
                models[i] = with_prompt(models[i], **batch_of(group.own[name], pad, models[i].device))
        tokenizers = [self._tokenizer(name) for name in names]
        return {"assistant_model": models, "tokenizer": self.plan.tokenizer, "assistant_tokenizer": tokenizers}

    def _caches(self, condition: Condition, variant: Variant) -> dict[str, Any]:
        """Arguments of `generate()` for static caches, one size for all prompts, and compiled passes."""
        if variant.prefix not in (STATIC, COMPILED):
            return {}
        static = {"cache_implementation": "static", "max_cache_len": self.plan.longest_text(condition)}
        if variant.prefix == COMPILED:
            return static | {"compile_config": self.plan.compile_config}
        return static | {"disable_compile": True}  # which a GPU would do unasked

    @property
    def _ends(self) -> list[int]:
        """The tokens that end a text: the main model's, for every variant that it writes."""
        return self._ends_of(self.settings.members[0])

    def _ends_of(self, name: str) -> list[int]:
        """Those of a member; the main model's where it has no tokenizer of its own."""
        name = name if name in self.plan.others else self.settings.members[0]
        ends = self._models[name].generation_config.eos_token_id
        if ends is None:
            ends = self._tokenizer(name).eos_token_id
        return [] if ends is None else ends if isinstance(ends, list) else [ends]

    @property
    def _padding(self) -> dict[str, Any]:
        return self._padding_of(self.settings.members[0])

    def _padding_of(self, name: str) -> dict[str, Any]:
        pad, ends = self._tokenizer(name).pad_token_id, self._ends_of(name)
        if pad is None:
            pad = ends[0] if ends else 0
        return {"pad_token_id": pad, "eos_token_id": ends or None}

    # What the texts of greedy variants of the ensemble have to do with the standard ensemble's

    def _compare(self, condition: Condition) -> None:
        """Records where greedy texts leave the standard ensemble's, and how close the decision was there."""
        for key, *text in list(self._divergences(condition, self.process.rank)):
            self.records.add(key | {"gap": self._gap(condition, *text)})

    def _divergences(self, condition: Condition, rank: int | None) -> Iterator[tuple[Record, Group, list[int]]]:
        """Those of a share that are not recorded, without gaps; the prompt, and the text up to where texts differ."""
        if condition.temperature > 0:
            return
        for _, variant, group, seed, repeat in self._units(condition, rank):
            if not repeats_standard(variant.name):
                continue
            standard = self.records[_key(condition, STANDARD, group, seed, repeat)]["tokens"]
            own = self.records[_key(condition, variant.name, group, seed, repeat)]["tokens"]
            for row, (expected, got) in enumerate(zip(standard, own)):
                key = _key(condition, variant.name, group, seed, repeat) | {"kind": "divergence", "row": row}
                if expected != got and key not in self.records:
                    position = first_difference(expected, got)
                    own = {name: (prompts[row],) for name, prompts in group.own.items()}
                    yield key | {"position": position}, Group(0, (), (group.prompts[row],), own), expected[:position]

    def _gap(self, condition: Condition, group: Group, written: list[int]) -> float:
        """By how much the ensemble's most probable next token leads, in log-probability."""
        standard, new = self.plan.variants(condition)[0], 1
        if group.own:  # the text is written again: others cannot be given its tokens
            new = len(written) + 1
        else:
            group = Group(0, (), ((*group.prompts[0], *written),))
        output = None
        while output is None or (new > 1 and output.sequences.shape[1] - len(group.prompts[0]) > len(written) + 1):
            new -= output is not None  # tokens that are written as several
            _, output, _ = self._generate(condition, standard, group, 0, max_new_tokens=new, output_scores=True)
        first, second = output.scores[-1][0].topk(2).values.tolist()
        return first - second


class Passes:
    """
    A context that counts and times models' forward passes, for methods without statistics of their own.

    Args:
        models (`Sequence[PreTrainedModel]`): `counts` and `seconds` have one entry for each.
    """

    def __init__(self, models: Sequence[PreTrainedModel]):
        self.counts = [0] * len(models)
        self._models = models
        self._watches = [Stopwatch(model.device) for model in models]
        self._hooks: list[Any] = []

    @property
    def seconds(self) -> list[float]:
        return [watch.seconds for watch in self._watches]

    def __enter__(self) -> "Passes":
        for i, model in enumerate(self._models):
            if all(model is not other for other in self._models[:i]):  # a member may be there twice
                self._hooks.append(model.register_forward_pre_hook(lambda *_, i=i: self._watches[i].start()))
                self._hooks.append(model.register_forward_hook(lambda *_, i=i: self._stop(i)))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _stop(self, i: int) -> None:
        self._watches[i].stop()
        self.counts[i] += 1


def describe(condition: Condition) -> str:
    """A condition in a few words."""
    words = [condition.task, f"T = {condition.temperature:g}", f"batch {condition.batch_size}"]
    words.append(f"{condition.members} members")
    if condition.prompt_length is not None:
        words.append(f"prompts of {condition.prompt_length} tokens")
    return ", ".join(words)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """
    The first place where two texts differ; the shorter's end if it is the other's beginning.

    >>> from hf_spec_ensemble.bench.measure import first_difference

    >>> first_difference([5, 6, 7, 8], [5, 6, 9])
    2
    """
    differing = (i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    return next(differing, min(len(one), len(other)))


def _key(condition: Condition, variant: str, group: Group, seed: int, repeat: int) -> Record:
    return {
        "kind": "run",
        **condition.key,
        "variant": variant,
        "group": group.index,
        "seed": seed,
        "repeat": repeat,
    }


def _digest(group: Group) -> str:
    return hashlib.sha256(repr(group.prompts).encode()).hexdigest()[:16]


def _sampling(temperature: float) -> dict[str, Any]:
    """Greedy at 0; else plain sampling, whatever a model's generation config would add."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """A row up to the token that ends it, without the padding after."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)


def _synchronize(device: torch.device) -> None:
    """Waits for what runs on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
