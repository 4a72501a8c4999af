"""Files of many prompts and of their texts: reads both, and finds what is left to do. Never decodes."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path


Result = dict[str, int | float | str]  # number, prompt, text, and what it took
BEGINS = b'{"number": '  # every line that is written


def read_prompts(file: Path) -> list[str]:
    """
    The prompts of a file: JSON lines with a field `prompt` where its name ends in `.jsonl` or its first line is such an
    object, else one a line. Lines without text are left out.

    Args:
        file (`Path`): `-` is standard input.

    Raises:
        `ValueError`: for what is no text in UTF-8, and for a line that has no prompt; it is named.
        `OSError`: for what cannot be read.
    """
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}.") from None
    # In JSON, a line ends at \n alone: others may stand in a string as they are
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if file.suffix != ".jsonl" and not (lines and _prompt_of(lines[0][1])):
        return [line for line in text.splitlines() if line.strip()]
    prompts = [_prompt_of(line) for _, line in lines]
    for (i, line), prompt in zip(lines, prompts):
        if prompt is None:
            raise ValueError(
                f'--prompts: line {i} of {file} must be an object with a prompt, as {{"prompt": "..."}}, but is '
                f"{line[:60]!r}."
            )
    return prompts


def _prompt_of(line: str) -> str | None:
    prompt = _object(line).get("prompt")
    return prompt if isinstance(prompt, str) and prompt.strip() else None


def _object(line: str | bytes) -> dict:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_results(file: Path, prompts: list[str]) -> tuple[set[int], int]:
    """
    What a file of results has already.

    Args:
        file (`Path`): As `write_results` writes it; it need not be there.
        prompts (`list[str]`): All prompts, that the file's must agree with.

    Returns:
        `set[int]`, `int`: The prompts' numbers, and the bytes up to where the last whole line ends.

    Raises:
        `ValueError`: for a file of something else, or of other prompts: nothing would be known of what is left.
        `OSError`: for what cannot be read.
    """
    *lines, last = (file.read_bytes() if file.exists() else b"").split(b"\n")
    if lines and not last and not _object(lines[-1]):  # broken, and whoever wrote it went on
        last = lines.pop()
    done = set()
    for i, line in enumerate(lines, 1):
        found = _object(line)
        number = found.get("number")
        if not isinstance(number, int) or not {"prompt", "text"} <= set(found):
            raise ValueError(f"--out: line {i} of {file} is no result of this command: name another file.")
        if not 0 <= number < len(prompts) or found["prompt"] != prompts[number]:
            raise ValueError(
                f"--out: {file} has results of other prompts: number {number} is {str(found['prompt'])[:60]!r}. Name "
                "another file, or the same prompts in the same order."
            )
        done.add(number)
    if last[: len(BEGINS)] != BEGINS[: len(last)]:  # it is about to be cut off
        raise ValueError(f"--out: the last line of {file} is no result of this command: name another file.")
    return done, sum(len(line) + 1 for line in lines)


def write_results(file: Path, size: int, results: Iterable[Result]) -> None:
    """
    Appends results as they come, each as a line that is there for good when the next one is asked for.

    Args:
        file (`Path`), size (`int`): What `read_results` said of it; what comes after is cut off.
        results (`Iterable[dict]`): With their `number` first.
    """
    with file.open("ab") as out:
        out.truncate(size)
        for result in results:
            out.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
            out.flush()


def in_order(results: Iterable[Result]) -> Iterable[Result]:
    """Of results with numbers from 0 on, each as soon as those before it are there."""
    waiting, number = {}, 0
    for result in results:
        waiting[result["number"]] = result
        while number in waiting:
            yield waiting.pop(number)
            number += 1
