"""TraceStreamer: the text as it is made, marked by who proposed it."""

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .data import Mark
from .screens import Notebook, Terminal, screen_of
from .text import Reader


class TraceStreamer(BaseStreamer):
    """
    Shows the text as it is generated, each token in the colour of the member that proposed it. In a notebook the
    cell's output grows, a few times a second; in a terminal the text is printed; elsewhere it is plain text. A token
    that came in place of a rejected proposal has a cross before it. Without `EnsembleConfig(trace=True)`, too.

    Of the standard ensemble (`speculative=False`), and of calls without an ensemble, the text has no colours.

    Any streamer that has a method `put_marks(marks)` is told the same: before every `put` of new tokens, a list with
    one `Mark` for each row, `None` for a row that has ended.

    State: what was read of the current text, and where it is shown.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The members'.
        skip_prompt (`bool`, defaults to `True`): Whether the text begins with the first new token.
        skip_special_tokens (`bool`, defaults to `True`): Whether special tokens are left out.
        interval (`float`, defaults to 0.25): Seconds between two updates of a notebook.

    Raises:
        `ValueError`: for a batch of more than one row, before the first forward pass.

    Example:

    >>> import hf_spec_ensemble as se
    >>> from hf_spec_ensemble.demo import FAMILY
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> tokenizer = AutoTokenizer.from_pretrained(FAMILY / "reader")
    >>> model, other = [AutoModelForCausalLM.from_pretrained(FAMILY / name) for name in ("reader", "solver")]
    >>> inputs = tokenizer("Tom has 3 boxes with", return_tensors="pt")
    >>> _ = model.generate(
    ...     **inputs,
    ...     assistant_model=other,
    ...     ensemble_config=se.EnsembleConfig(),
    ...     streamer=se.TraceStreamer(tokenizer),
    ...     max_new_tokens=4,
    ...     do_sample=False,
    ... )
     12 boxes
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        skip_prompt: bool = True,
        skip_special_tokens: bool = True,
        interval: float = 0.25,
    ):
        self.tokenizer, self.skip_prompt, self.interval = tokenizer, skip_prompt, interval
        self._hidden = frozenset(tokenizer.all_special_ids) if skip_special_tokens else frozenset()
        self._begin([])

    def put_marks(self, marks: list[Mark | None]) -> None:
        """How the tokens of the next `put` came about, by row."""
        self._mark = marks[0]

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt `[1, P]`, which begins a new text, and then one new token `[1]` after the other."""
        if len(value) > 1:
            raise ValueError(f"A TraceStreamer shows one text, but the batch has {len(value)} rows: pass one prompt.")
        if value.dim() == 2:
            prompt = value[0].tolist()
            self._begin([] if not self.skip_prompt else prompt)
            for token in [] if self.skip_prompt else prompt:
                self._add(token)
        else:
            self._add(int(value))
        self._screen.show(self._parts)

    def end(self) -> None:
        """Shows what is left."""
        self._parts.append((self._reader.rest(), None))
        self._screen.show(self._parts, last=True)
        self._begin([])

    def _begin(self, before: list[int]) -> None:
        self._reader = Reader(self.tokenizer, before)
        self._parts: list[tuple[str, Mark | None]] = []
        self._mark: Mark | None = None
        self._screen: Notebook | Terminal = screen_of(self.interval)

    def _add(self, token: int) -> None:
        text = self._reader.add(token)
        self._parts.append(("" if token in self._hidden else text, self._mark))
        self._mark = None
