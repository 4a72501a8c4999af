"""The text of single tokens, in their context."""

from transformers import PreTrainedTokenizerBase


CONTEXT = 8  # tokens before one that its text may depend on
UNFINISHED = "\ufffd"  # what decoders make of bytes that are no character yet


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int = 0) -> list[str]:
    """
    What each token from the `start`-th on adds to the text. Tokens that are not decoded alone, since spaces and bytes
    hang together with their neighbours; one that leaves a character unfinished adds nothing, and the one that
    finishes it all of it.
    """
    texts, done = [], start
    for end in range(start + 1, len(ids) + 1):
        context = max(done - CONTEXT, 0)
        before, now = (_decode(tokenizer, ids[context:stop]) for stop in (done, end))
        unfinished = now.endswith(UNFINISHED) and end < len(ids)
        texts.append("" if unfinished else now[len(before) :])
        if not unfinished:
            done = end
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
