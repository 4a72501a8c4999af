"""The tasks: where their rows come from, what a model is asked, how its answer is scored."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..files import parse_object
from .sandbox import runs
from .scoring import chosen_letter, final_number, program, rouge_l, same_code


Row = dict[str, Any]
LETTERS = "ABCD"


class Task:
    """
    One task. Subclasses say `question`, `answer` (of the examples before the question) and `score`.

    Attributes:
        hub (`tuple[str, str | None, str]`): Data set on the Hub, its configuration, and the split that is measured.
        examples_split (`str`, *optional*): The split that examples come from; `None` if the task takes none.
        fields (`tuple[str, ...]`): What a row must have.
        metric (`str`): What the score is.
        shots (`int`): Examples before a question, as many as the paper's evaluation has of the kind the data set holds.
        runs_code (`bool`): Whether scoring runs what the model wrote.
    """

    hub: tuple[str, str | None, str]
    examples_split: str | None = None
    fields: tuple[str, ...]
    metric: str
    shots: int = 0
    runs_code: bool = False

    def question(self, row: Row) -> str:
        raise NotImplementedError

    def answer(self, row: Row) -> str:
        raise NotImplementedError

    def score(self, row: Row, text: str) -> float:
        """The score, in [0, 1], of what a model answered."""
        raise NotImplementedError

    def continuation(self, row: Row) -> str:
        """The question for a model that has no chat template and continues text."""
        return f"Question: {self.question(row)}\nAnswer:"


class GSM8K(Task):
    hub = ("openai/gsm8k", "main", "test")
    examples_split = "train"
    fields = ("question", "answer")
    metric = "exact match"
    shots = 4

    def question(self, row: Row) -> str:
        return f"{row['question']}\nThink step by step and end with a line '#### ' and the number."

    def answer(self, row: Row) -> str:
        return re.sub(r"<<.*?>>", "", row["answer"])  # the calculator's annotations

    def score(self, row: Row, text: str) -> float:
        number = final_number(text.split("\nQuestion:")[0])
        return float(number is not None and abs(number - final_number(row["answer"])) < 1e-6)


class MMLU(Task):
    """Answered in words; otherwise there would be one token to measure. The data set has no worked examples."""

    hub = ("cais/mmlu", "all", "test")
    examples_split = "dev"
    fields = ("question", "choices", "answer")
    metric = "accuracy"

    def question(self, row: Row) -> str:
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"]))
        return f"{row['question']}\n{choices}\nExplain in short, and end with 'The answer is' and the letter."

    def answer(self, row: Row) -> str:
        return f"The answer is {LETTERS[row['answer']]}."

    def score(self, row: Row, text: str) -> float:
        return float(chosen_letter(text.split("\nQuestion:")[0]) == LETTERS[row["answer"]])


class HumanEval(Task):
    hub = ("openai/openai_humaneval", None, "test")
    fields = ("prompt", "canonical_solution", "test", "entry_point")
    metric = "pass@1"
    runs_code = True

    def question(self, row: Row) -> str:
        return f"Complete this function. Answer with its whole code.\n```python\n{row['prompt'].strip()}\n```"

    def continuation(self, row: Row) -> str:
        return row["prompt"]

    def score(self, row: Row, text: str) -> float:
        written = program(text, row["prompt"], row["entry_point"])
        return float(runs(f"{written}\n{row['test']}\ncheck({row['entry_point']})\n"))


class CNNDailyMail(Task):
    hub = ("abisee/cnn_dailymail", "3.0.0", "test")
    examples_split = "train"
    fields = ("article", "highlights")
    metric = "ROUGE-L"
    shots = 1

    def question(self, row: Row) -> str:
        return f"Summarise this article in three sentences, one a line.\n\n{row['article']}"

    def answer(self, row: Row) -> str:
        return row["highlights"]

    def score(self, row: Row, text: str) -> float:
        return rouge_l(text.split("\nQuestion:")[0], row["highlights"])


class Copy(HumanEval):
    """
    Copy-editing: most of the answer is in the prompt, which is what prompt-lookup drafting is for. With an example,
    since small models that are only told to copy often do something else.
    """

    examples_split = "test"
    metric = "exact match"
    shots = 1
    runs_code = False

    def edited(self, row: Row) -> str:
        code = row["prompt"] + row["canonical_solution"]
        return re.sub(rf"\b{re.escape(row['entry_point'])}\b", self.name(row), code)

    def name(self, row: Row) -> str:
        return f"new_{row['entry_point']}"

    def question(self, row: Row) -> str:
        code = (row["prompt"] + row["canonical_solution"]).strip()
        return (
            f"Repeat this code with `{row['entry_point']}` renamed to `{self.name(row)}` wherever it stands, and "
            f"nothing else changed. Answer with the code only.\n```python\n{code}\n```"
        )

    def answer(self, row: Row) -> str:
        return f"```python\n{self.edited(row).strip()}\n```"

    def continuation(self, row: Row) -> str:
        return f"{self.question(row)}\n\nThe code with the new name:\n"

    def score(self, row: Row, text: str) -> float:
        return float(same_code(text, self.edited(row)))


TASKS: dict[str, Task] = {
    "gsm8k": GSM8K(), "humaneval": HumanEval(), "mmlu": MMLU(), "cnn_dailymail": CNNDailyMail(), "copy": Copy(),
}  # fmt: skip


def load_rows(name: str, count: int, shots: int, file: str | None) -> tuple[list[Row], list[Row]]:
    """
    The rows to measure, and the examples that stand before every question.

    Args:
        name (`str`): A task.
        count (`int`): Rows wanted; fewer if there are fewer.
        shots (`int`): Examples wanted.
        file (`str`, *optional*): JSON lines with the fields of the Hub's version. Without, rows come from the Hub,
            through `datasets`. Where rows and examples have one source, examples are its last rows, which are not
            measured then.

    Raises:
        `ValueError`: if the file does not hold what the task needs.
        `ModuleNotFoundError`: if `datasets` is needed and not installed.
    """
    task = TASKS[name]
    if file is not None:
        return _split(_read_rows(Path(file), task), count, shots, file)

    from datasets import load_dataset

    path, configuration, split = task.hub
    rows = load_dataset(path, configuration, split=split)
    if name == "mmlu":
        rows = rows.shuffle(seed=0)  # they are sorted by subject
    if task.examples_split == split:
        return _split(list(rows), count, shots, path)
    examples = list(load_dataset(path, configuration, split=task.examples_split).select(range(shots))) if shots else []
    return list(rows.select(range(min(count, len(rows))))), examples


def _split(rows: list[Row], count: int, shots: int, source: str) -> tuple[list[Row], list[Row]]:
    if shots >= len(rows):
        raise ValueError(f"{source} has {len(rows)} rows, too few for {shots} examples and a question.")
    return rows[: min(count, len(rows) - shots)], rows[len(rows) - shots :]


def _read_rows(file: Path, task: Task) -> list[Row]:
    if not file.is_file():
        raise ValueError(f"There is no file {str(file)!r} to read rows from.")
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        where = f"Line {number} of {file}"
        row = parse_object(line, where)
        missing = [field for field in task.fields if field not in row]
        if missing:
            raise ValueError(f"{where} lacks {missing}: a row needs {list(task.fields)}.")
        try:
            task.continuation(row)
            if task.examples_split is not None:
                task.answer(row)
        except (TypeError, AttributeError, LookupError) as error:
            raise ValueError(f"{where} has fields of other types than the Hub's data set: {error}.") from None
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} has no rows.")
    return rows


def encode(task: Task, row: Row, examples: Sequence[Row], tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    """The ids of a prompt: through the chat template, examples as earlier turns, or as plain text."""
    if not chat:
        shown = "".join(f"{task.continuation(example)} {task.answer(example)}\n\n" for example in examples)
        return tokenizer(shown + task.continuation(row))["input_ids"]
    turns = []
    for example in examples:
        turns.append({"role": "user", "content": task.question(example)})
        turns.append({"role": "assistant", "content": task.answer(example)})
    turns.append({"role": "user", "content": task.question(row)})
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
