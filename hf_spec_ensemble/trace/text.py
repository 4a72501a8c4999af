"""The text of single tokens, in their context."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


CONTEXT = 8  # tokens before one that its text may depend on
UNFINISHED = "\ufffd"  # what decoders make of bytes that are no character yet


class Reader:
    """
    Reads tokens one after the other. Tokens are not decoded alone, since spaces and bytes hang together with their
    neighbours; one that leaves a character unfinished adds nothing, and the one that finishes it all of it.

    State: the last tokens, and how many of them have added their text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`).
        before (`Sequence[int]`): Tokens before the first one that is read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(before)[-CONTEXT:]
        self._done = len(self._ids)

    def add(self, token: int) -> str:
        """What one more token adds to the text."""
        self._ids.append(token)
        text = self.rest()
        if text.endswith(UNFINISHED) and len(self._ids) - self._done < CONTEXT:  # no character has so many tokens
            return ""
        self._ids = self._ids[-CONTEXT:]
        self._done = len(self._ids)
        return text

    def rest(self) -> str:
        """What the tokens that have added nothing read as they are; empty if there are none."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._done])) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int = 0) -> list[str]:
    """What each token from the `start`-th on adds to the text, as a `Reader` has it; the last one adds all the rest."""
    reader = Reader(tokenizer, ids[:start])
    texts = [reader.add(token) for token in ids[start:]]
    if texts:
        texts[-1] += reader.rest()
    return texts


def printable(text: str) -> str:
    """The text without a model's control characters, which could hide or reorder what follows them."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\u25ab" for c in text)
