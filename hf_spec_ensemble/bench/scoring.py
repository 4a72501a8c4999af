"""Scores of answers: pure functions of text. What is expected of a task's answer is in `tasks`."""

import re


NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"


def final_number(text: str) -> float | None:
    """
    The number an answer ends on: after `####` or in `\\boxed{}` if it has one, else the last.

    >>> from hf_spec_ensemble.bench.scoring import final_number

    >>> final_number("She has 3 + 4 = 7 pens.\\n#### 7"), final_number("It costs $1,250.50."), final_number("none")
    (7.0, 1250.5, None)
    """
    marked = re.findall(rf"####\s*({NUMBER})", text) or re.findall(rf"\\boxed\{{\s*({NUMBER})", text)
    found = marked[:1] or re.findall(NUMBER, text)[-1:]
    return float(re.sub(r"[$,]", "", found[0])) if found else None


def chosen_letter(text: str) -> str | None:
    """
    The choice, A to D, that an answer settles on: after "answer is" if it says so, else the last letter on its own.

    >>> from hf_spec_ensemble.bench.scoring import chosen_letter

    >>> chosen_letter("A is wrong. The answer is (C)."), chosen_letter("B"), chosen_letter("It depends.")
    ('C', 'B', None)
    """
    said = re.findall(r"answer(?: is|:)?[\s:*(]*([A-D])\b", text, flags=re.IGNORECASE)
    alone = [letter for letter in said if letter.isupper()] or re.findall(r"(?<![\w'])([A-D])(?![\w'])", text)
    return alone[-1] if alone else None


def fenced(text: str) -> str:
    """
    What is inside an answer's first code fence, also an unfinished one; the answer itself if there is none.

    >>> from hf_spec_ensemble.bench.scoring import fenced

    >>> fenced("Here it is:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    match = re.search(r"```[^\n`]*\n(.*?)(?:```|\Z)", text, flags=re.DOTALL)
    return match.group(1) if match else text


def same_code(text: str, expected: str) -> bool:
    """Whether an answer, out of its code fence, is the expected code, but for blanks at the ends of lines."""
    lines = [[line.rstrip() for line in code.strip().splitlines()] for code in (fenced(text), expected)]
    return lines[0] == lines[1]


def program(text: str, prompt: str, entry_point: str) -> str:
    """
    The program that an answer to HumanEval's `prompt` stands for: a whole function, or the continuation of the prompt
    up to where the function ends.
    """
    code = fenced(text)
    if re.search(rf"^def {re.escape(entry_point)}\b", code, flags=re.MULTILINE):
        before = prompt[: prompt.index(f"def {entry_point}")]  # its imports and helpers
        return f"{before}\n{code}"
    return prompt + re.split(r"\n(?=[^\s#)\]}])", code, maxsplit=1)[0] + "\n"


def rouge_l(text: str, reference: str) -> float:
    """The F-measure of ROUGE-L over summaries of one sentence a line (`rougeLsum` of the library rouge_score)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeLsum"], use_stemmer=True)
    return scorer.score(reference, text)["rougeLsum"].fmeasure
