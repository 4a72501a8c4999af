"""
Every class of language models that transformers knows, as an ensemble of two tiny random members:

    python tests/sweep.py                            # a line for each model type, a few minutes on one core
    python tests/sweep.py --only llama t5 --ways ragged long
    python tests/sweep.py --json sweep.json --markdown > models.md

Each is first tried in transformers alone. What fails there is not tried. The text of the ensemble is then compared,
token by token, with the formula: every member reads the whole prefix of every row, alone and without a cache.
"""

import argparse
import contextlib
import inspect
import io
import json
import logging
import signal
import sys
import textwrap
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
import transformers
from sweep_models import BOS, PAD, VOCAB, Entry, entries, members
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from hf_spec_ensemble import EnsembleConfig


WEIGHTS = [0.6, 0.4]
UNEVEN = dict(num_assistant_tokens=[2, 3])
LENGTHS = (UNEVEN, dict(num_assistant_tokens=1), dict(num_assistant_tokens=5))
STATIC = dict(cache_implementation="static")
SAMPLED = dict(do_sample=True)
ENDS = dict(eos_token_id=[2, 7, 11, 13, 17, 19, 23])

NEW, MANY = 14, 100  # tokens
SECONDS = 120  # for one model
TOLERANCE = 1e-3  # of logits, as a share of their spread: many models round to float32 on the way
NEAR = 1e-2  # of probabilities, where transformers' own logits are beyond that tolerance

EQUAL, WRONG, REFUSED, CRASH = "equal", "wrong", "refused", "crash"
STANDARD_ONLY, NOT_TRIED = "standard only", "not tried"
OUTCOMES = (WRONG, CRASH, EQUAL, STANDARD_ONLY, REFUSED, NOT_TRIED)


class OutOfTime(BaseException):
    """A model took longer than `SECONDS`."""


@dataclass
class Result:
    """What became of one way of decoding."""

    outcome: str
    detail: str = ""


@dataclass
class Report:
    """What became of a model: `notes` say what transformers itself does differently."""

    name: str
    class_name: str
    outcome: str = NOT_TRIED
    reason: str = ""
    ways: dict[str, Result] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    accepted: float | None = None  # share of the proposals, those of all ways
    seconds: float = 0.0

    def having(self, outcome: str) -> list[str]:
        return [way for way, result in self.ways.items() if result.outcome == outcome]


class Counting(StoppingCriteria):
    """Stops nothing, counts the tokens."""

    def __init__(self):
        self.tokens = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.tokens += 1
        return torch.zeros(len(input_ids), dtype=torch.bool)


# --- Inputs, and what they should become ----------------------------------------------------------------------------


def prompts(batch: int, encoder_decoder: bool) -> dict[str, torch.Tensor]:
    """Of different lengths, padded on the left, or for an encoder on the right."""
    ids = torch.randint(3, VOCAB, (batch, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 5)[:batch]):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    return {
        key: value.flip(1) if encoder_decoder else value
        for key, value in dict(input_ids=ids, attention_mask=mask).items()
    }


@torch.no_grad()
def _logits(model: PreTrainedModel, source: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """`[T, V]`: after each token of `text` `[T]`, without a cache; an encoder reads `source`."""
    if model.config.is_encoder_decoder:
        return model(source[None], decoder_input_ids=text[None], use_cache=False).logits[0]
    ids = text[None]
    given = dict(attention_mask=torch.ones_like(ids), use_cache=False)
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = torch.arange(len(text))[None]  # as generate() counts, which some models alone do not
    # Some models append a token of their own to what they are given
    inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **given)
    inputs.pop("logits_to_keep", None)
    return model(**inputs | {"use_cache": False}).logits[0]


class Formula:
    """The greedy text by the formula: every member reads the whole prefix of a row, alone, for every token."""

    def __init__(self, models: list[PreTrainedModel], weights: list[float], inputs: dict[str, torch.Tensor]):
        self._models, self._weights = models, weights
        self._sources = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
        # By row: the texts that are known to be its
        self._known: dict[int, list[int]] = {}

    def difference(self, texts: list[list[int]]) -> str:
        for row, text in enumerate(texts):
            known = self._known.get(row, [])
            if known[: len(text)] != text:
                self._known[row] = text if self._is_text(row, text) else self._text(row, len(text))
        return difference(texts, [self._known[row][: len(text)] for row, text in enumerate(texts)])

    def distance(self, texts: list[list[int]], logits: torch.Tensor) -> float:
        """How far a single model's `logits` `[B, T, V]` of these texts are from its own, as a share of their spread."""
        away = []
        for row, text in enumerate(texts):
            start = self._start(row)
            prefix = torch.cat([start, torch.tensor(text[:-1], dtype=torch.long)])
            own = _logits(self._models[0], self._sources[row], prefix)[len(start) - 1 :]
            away.append(float((own - logits[row]).abs().max() / own.std()))
        return max(away)

    def near_tie(self, row: int, text: list[int]) -> bool:
        """Whether the last token of a row's text is, within rounding, as probable as the one in its place."""
        start = self._start(row)
        read = torch.cat([start, torch.tensor(text[:-1], dtype=torch.long)])
        logits = [_logits(model, self._sources[row], read)[-1] for model in self._models]
        probs = sum(w * x.softmax(-1) for w, x in zip(self._weights, logits))
        return bool(probs[text[-1]] > probs.max() * (1 - NEAR))

    def _start(self, row: int) -> torch.Tensor:
        return torch.tensor([BOS]) if self._models[0].config.is_encoder_decoder else self._sources[row]

    def _tokens(self, row: int, text: torch.Tensor) -> torch.Tensor:
        """The most probable tokens `[T]` after each of `text` `[T]`."""
        logits = [_logits(model, self._sources[row], text) for model in self._models]
        return sum(w * x.softmax(-1) for w, x in zip(self._weights, logits)).argmax(-1)

    def _is_text(self, row: int, text: list[int]) -> bool:
        """In one pass, which suffices for a model that sees nothing of what comes after a token."""
        start = self._start(row)
        try:
            tokens = self._tokens(row, torch.cat([start, torch.tensor(text[:-1], dtype=torch.long)]))
        except Exception:
            return False
        return tokens[len(start) - 1 :].tolist() == text

    def _text(self, row: int, new: int) -> list[int]:
        text = self._start(row)
        for _ in range(new):
            text = torch.cat([text, self._tokens(row, text)[-1:]])
        return text[-new:].tolist()


def difference(texts: list[list[int]], expected: list[list[int]]) -> str:
    """Where the first row that differs does so first; empty where none does."""
    for row, (text, other) in enumerate(zip(texts, expected)):
        if text != other:
            at = next((i for i, pair in enumerate(zip(text, other)) if pair[0] != pair[1]), min(len(text), len(other)))
            got, want = (x[at] if at < len(x) else "nothing" for x in (text, other))
            where = f"row {row}, " if len(texts) > 1 else ""
            return f"{where}new token {at + 1}: {got} instead of {want}"
    return ""


# --- The ways of decoding -------------------------------------------------------------------------------------------


class Trial:
    """Two members of one kind, and what they should say."""

    def __init__(self, models: list[PreTrainedModel]):
        self.models = models
        self.encoder_decoder = models[0].config.is_encoder_decoder
        self.one, self.three = prompts(1, self.encoder_decoder), prompts(3, self.encoder_decoder)
        self.formula = Formula(models, WEIGHTS, self.three)
        self.by_formula = {1: True, 3: True}  # by batch size: or against the standard ensemble
        self._cached: dict = {}
        self.imprecise = False  # whether transformers alone differs by more than rounding, and says the same
        self.accepted = Counter()
        self.counting = Counting()

    def generate(self, models: list[PreTrainedModel], inputs: dict, settings: dict | None, **kwargs) -> list[list[int]]:
        if settings is not None:
            kwargs |= dict(
                assistant_models=models[1:], ensemble_config=EnsembleConfig(weights=WEIGHTS, **settings),
                return_dict_in_generate=True, stopping_criteria=StoppingCriteriaList([self.counting]),
            )  # fmt: skip
        out = self.generated(models, inputs, **kwargs)
        stats = getattr(out, "stats", None)
        if stats is not None and settings.get("speculative", True):
            self.accepted["accepted"] += sum(stats.accepted)
            self.accepted["proposed"] += sum(stats.verified)
        return self._new(out if isinstance(out, torch.Tensor) else out.sequences, inputs)

    def generated(self, models: list[PreTrainedModel], inputs: dict, **kwargs):
        torch.manual_seed(3)
        return models[0].generate(**inputs, **dict(max_new_tokens=NEW, do_sample=False) | kwargs)

    def _new(self, ids: torch.Tensor, inputs: dict) -> list[list[int]]:
        return ids[:, 1 if self.encoder_decoder else inputs["input_ids"].shape[1] :].tolist()

    def alone(self, inputs: dict, **kwargs) -> list[list[list[int]]]:
        return [self.generate([model], inputs, None, **kwargs) for model in self.models]

    def inexact(self, inputs: dict) -> str:
        """How transformers alone, with a cache and for these rows, differs from what it is without; empty if not."""
        for model in self.models:
            formula = Formula([model], [1.0], self.three)
            out = self.generated([model], inputs, return_dict_in_generate=True, output_logits=True)
            text = self._new(out.sequences, inputs)
            if formula.difference(text):
                return "gives another text"
            with contextlib.suppress(Exception):  # of models that read more than what they are given
                away = formula.distance(text, torch.stack(out.logits, dim=1))
                if away > TOLERANCE:
                    return f"is {away:.0e} of the logits' spread away"
        return ""

    def standard(self, inputs: dict, **kwargs) -> list[list[int]]:
        key = len(inputs["input_ids"]), str(kwargs)
        if key not in self._cached:
            self._cached[key] = self.generate(self.models, inputs, dict(speculative=False), **kwargs)
        return self._cached[key]

    def try_alone(self, report: Report) -> str:
        """What transformers does without us: why it cannot, or nothing; what it does differently is noted."""
        try:
            different = self.inexact(self.one)
        except Exception as error:
            return f"transformers alone fails: {said(error)}"
        try:
            different_if_padded = self.inexact(self.three)
        except Exception as error:
            self.three = self.one  # its own matter
            report.notes.append(f"padded batches were not tried, on which transformers alone fails: {said(error)}")
            different_if_padded = ""
        if different:
            self.by_formula = {1: False, 3: False}
            self.imprecise = "spread" in different
            report.notes.append(f"with its cache transformers alone {different}")
        elif different_if_padded:
            self.by_formula[3] = False
            report.notes.append(f"on padded batches transformers alone {different_if_padded}")
        return ""

    def static_alone(self) -> bool:
        try:
            return self.alone(self.one, max_new_tokens=6, **STATIC) == self.alone(self.one, max_new_tokens=6)
        except Exception:
            return False

    def pairs(self, way: str) -> Iterator[tuple[Callable[[], list], Callable[[list], str]]]:
        """What is decoded in this way, and what says where that differs from what it should be."""
        one, three = self.one, self.three

        def spec(inputs, settings, **kwargs):
            return lambda: self.generate(self.models, inputs, settings, **kwargs)

        def plain(inputs, **kwargs):
            return lambda text: difference(text, self.standard(inputs, **kwargs))

        def right(inputs, **kwargs):
            return self.formula.difference if self.by_formula[len(inputs["input_ids"])] else plain(inputs, **kwargs)

        if way == "standard":
            yield lambda: self.standard(one), right(one)
            yield lambda: self.standard(three), right(three)
        elif way == "fixed":
            for settings in LENGTHS:
                yield spec(one, settings), right(one)
        elif way == "auto":
            yield spec(one, dict(num_assistant_tokens="auto")), right(one)
        elif way == "ragged":
            for settings in LENGTHS[::2]:
                yield spec(three, settings), right(three)
        elif way == "static":
            for inputs in (one, three):
                yield spec(inputs, UNEVEN, **STATIC), right(inputs, **STATIC)
        elif way == "sampled":
            for inputs in (one, three):
                yield spec(inputs, UNEVEN, **SAMPLED), plain(inputs, **SAMPLED)
        elif way == "ends":
            yield spec(three, UNEVEN, **ENDS), plain(three, **ENDS)
        elif way == "long":
            yield spec(three, UNEVEN, max_new_tokens=MANY), plain(three, max_new_tokens=MANY)
        elif way == "short":  # for a test of every model
            yield spec(three, UNEVEN), right(three)

    def _near_tie(self, texts: list[list[int]], way: str) -> bool:
        """Whether rows begin to differ from the standard ensemble's where two tokens are as probable."""
        inputs, kwargs = (self.three, self.one)[len(texts) == 1], {"max_new_tokens": MANY} if way == "long" else {}
        for row, (text, other) in enumerate(zip(texts, self.standard(inputs, **kwargs))):
            at = next((i for i, pair in enumerate(zip(text, other)) if pair[0] != pair[1]), None)
            if at is not None and not self.formula.near_tie(row, text[: at + 1]):
                return False
        return True

    def run(self, way: str) -> Result:
        detail = ""
        for make, compare in self.pairs(way):
            self.counting.tokens = 0
            try:
                text = make()
            except Exception as error:
                return Result(REFUSED if self.refused(error) else CRASH, said(error))
            try:
                different = compare(text)
            except Exception as error:
                return Result(CRASH, f"what it is compared with: {said(error)}")
            if different and not (self.imprecise and self._near_tie(text, way)):
                return Result(WRONG, different)
            detail = f"but for a near-tie: {different}" if different else detail
        return Result(EQUAL, detail)

    def refused(self, error: Exception) -> bool:
        """Whether the package refuses, before the first token. (Its check of a model is made of forward passes.)"""
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        return isinstance(error, ValueError) and "/hf_spec_ensemble/" in raised_in and self.counting.tokens == 0


def said(error: Exception) -> str:
    """An error in one line; what is not the package's own, with its place."""
    message = " ".join(str(error).split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, ValueError) and "/hf_spec_ensemble/" in frame.filename:
        return message.split(". ")[0].split(": use ")[0][:300]
    place = "/".join(frame.filename.split("/")[-2:])
    return f"{type(error).__name__}: {message[:160]} ({place}:{frame.lineno})"


WAYS = ("standard", "fixed", "auto", "ragged", "static", "sampled", "ends", "long")


# --- A model, all models --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_):
        raise OutOfTime(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sweep(entry: Entry, ways: tuple[str, ...] = WAYS, seconds: int = SECONDS) -> Report:
    """Tries one model in these ways."""
    report = Report(entry.name, entry.class_name)
    began = time.perf_counter()
    try:
        with limited(seconds), contextlib.redirect_stdout(io.StringIO()):  # Reformer prints
            _sweep(entry, ways, report)
    except OutOfTime as error:
        if report.ways:
            report.ways["time"] = Result(CRASH, str(error))
            report.outcome = CRASH
        else:
            report.reason = f"transformers alone {error}"
    except Exception as error:  # one model's must not end the sweep
        report.outcome, report.reason = CRASH, f"of the sweep itself: {said(error)}"
    report.seconds = round(time.perf_counter() - began, 2)
    return report


def quick(entry: Entry) -> Report:
    """One run of a model, padded rows against the formula; only where that is not right, what else may be the cause."""
    report = Report(entry.name, entry.class_name)
    began = time.perf_counter()
    with limited(SECONDS), contextlib.redirect_stdout(io.StringIO()):
        try:
            result = Trial(members(entry)).run("short")
        except Exception:
            result = None
    if result is None or result.outcome != EQUAL:
        return sweep(entry, ("standard", "short"))
    report.ways["short"], report.outcome = result, EQUAL
    report.seconds = round(time.perf_counter() - began, 2)
    return report


def _sweep(entry: Entry, ways: tuple[str, ...], report: Report) -> None:
    # In float64, but for what some models only do in float32
    tried = []
    for dtype in (torch.float64, torch.float32):
        alone = Report(entry.name, entry.class_name)
        try:
            trial = Trial(members(entry, dtype))
        except Exception as error:
            report.reason = f"cannot be built: {said(error)}"
            return
        alone.reason = trial.try_alone(alone)
        tried.append((bool(alone.reason), len(alone.notes), len(tried), alone, trial))
        if not alone.reason and not alone.notes:
            break
    *_, alone, trial = min(tried, key=lambda one: one[:3])
    report.reason = alone.reason
    report.notes += alone.notes + ["in float32"] * (trial is not tried[0][-1])
    if report.reason:
        return
    for way in ways:
        if way == "static" and not trial.static_alone():
            report.notes.append("transformers alone fails with a static cache")
            continue
        report.ways[way] = trial.run(way)
    if trial.accepted["proposed"]:
        report.accepted = round(trial.accepted["accepted"] / trial.accepted["proposed"], 2)
    report.outcome = outcome(report)


def outcome(report: Report) -> str:
    """Of a model, from those of the ways: the worst, but for what is refused in some ways only."""
    for bad in (WRONG, CRASH):
        if report.having(bad):
            return bad
    speculative = [result.outcome for way, result in report.ways.items() if way != "standard"]
    if EQUAL in speculative or not speculative:
        return EQUAL if report.having(EQUAL) else REFUSED
    return STANDARD_ONLY if "standard" in report.having(EQUAL) else REFUSED


def line(report: Report) -> str:
    """For the terminal."""
    facts = [report.reason] if report.reason else []
    facts += [f"{way} {result.outcome}: {result.detail}" for way, result in report.ways.items() if result.detail]
    facts += report.notes
    accepted = "" if report.accepted is None else f"{report.accepted:.0%} of proposals accepted"
    head = f"{report.name:26} {report.outcome:14} {report.seconds:5.1f} s  {accepted}"
    return "\n".join([head.rstrip(), *(f"    {fact}" for fact in dict.fromkeys(facts))])


def markdown(reports: list[Report]) -> str:
    """For a guide, by outcome: the names of models without remarks, then a table of the others."""
    parts = []
    for kind in OUTCOMES:
        of_kind = sorted((report for report in reports if report.outcome == kind), key=lambda report: report.name)
        if not of_kind:
            continue
        parts += [f"### {kind.capitalize()} ({len(of_kind)})", ""]
        plain = [report for report in of_kind if not _has_remarks(report)]
        if plain:
            parts += [
                *textwrap.wrap(", ".join(f"`{report.name}`" for report in plain) + ".", 120, break_on_hyphens=False),
                "",
            ]
        if len(plain) < len(of_kind):
            parts += ["| model type | class | remarks |", "|---|---|---|"]
        for report in filter(_has_remarks, of_kind):
            remarks = [report.reason] if report.reason else []
            for detail in dict.fromkeys(result.detail for result in report.ways.values() if result.detail):
                ways = [way for way, result in report.ways.items() if result.detail == detail]
                same = report.ways[ways[0]].outcome
                remarks.append(f"{', '.join(ways)} {same}: {detail}")
            text = "; ".join(remarks + report.notes).replace("|", "\\|")
            parts.append(f"| `{report.name}` | `{report.class_name}` | {text} |")
        parts += [""] * (len(plain) < len(of_kind))
    return "\n".join(parts).rstrip()


def _has_remarks(report: Report) -> bool:
    return bool(report.reason or report.notes or any(result.detail for result in report.ways.values()))


def quiet() -> None:
    """Tiny configurations make many warnings."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for name in ("hf_spec_ensemble", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types; by default all")
    parser.add_argument("--quick", action="store_true", help="one run of each, as tests/test_sweep.py")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=(*WAYS, "short"))
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for one model")
    parser.add_argument("--json", metavar="FILE", help="where to write all that was found")
    parser.add_argument("--markdown", action="store_true", help="tables in place of lines")
    args = parser.parse_args(arguments)

    quiet()
    chosen = [entry for entry in entries() if not args.only or entry.name in args.only]
    if unknown := set(args.only or ()) - {entry.name for entry in chosen}:
        parser.error(f"no such model types: {', '.join(sorted(unknown))}")
    reports = []
    for entry in chosen:
        reports.append(quick(entry) if args.quick else sweep(entry, tuple(args.ways), args.seconds))
        print(line(reports[-1]), file=sys.stderr if args.markdown else sys.stdout, flush=True)
    counts = Counter(report.outcome for report in reports)
    print(
        f"{len(reports)} models: {', '.join(f'{counts[kind]} {kind}' for kind in OUTCOMES if counts[kind])}; "
        f"{sum(report.seconds for report in reports):.0f} s",
        file=sys.stderr if args.markdown else sys.stdout,
    )
    if args.markdown:
        print(markdown(reports))
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(report) for report in reports], file, indent=1)
    return int(bool(counts[WRONG] or counts[CRASH]))


if __name__ == "__main__":
    sys.exit(main())
