"""Member: one language model that reads its prompt and then the new tokens of the rows, and scores what may follow."""

from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel
from transformers.generation.candidate_generator import _prepare_token_type_ids

from ..compat import CACHE_NAMES, forward_parameters
from .adapters import lock_of
from .costs import PassCosts
from .placement import device_of
from .runner import Runner
from .stopwatch import Stopwatch


# What a member passes to the model itself, from its own state; the mask and the positions are those of the decoder.
OWN_KWARGS = (*CACHE_NAMES, "logits_to_keep", "use_cache", "output_logits")


class Member:
    """
    A language model, its prompt, and how many tokens of each row it has seen. Of an encoder-decoder model, the decoder:
    the encoder's outputs are among `kwargs`. It does not depend on other members, which may have other prompts.

    Rows of a batch may see and forget different numbers of tokens. Counts of tokens (`seen` and arguments) are numpy
    integers `[B]`. They count *new* tokens: before the prompt of P tokens is read, `seen` is -P, and then 0.

    State: `seen`, `settled` and `passes`, written by the methods here and in subclasses alone.

    Args:
        model (`PreTrainedModel`):
            Decoder-only or encoder-decoder.
        kwargs (`dict`):
            What `generate()` prepared for its `forward`: `attention_mask` and `position_ids` of the prompt (with an
            encoder `decoder_attention_mask` and `decoder_position_ids`), on the model's device, perhaps
            a cache, and anything else, which is passed on. That cache may hold the first tokens of the prompt.
        prompt (`torch.LongTensor` `[B, P]`):
            Left-padded where `attention_mask` says so.
        runner (`Runner`, *optional*):
            How its passes run; by default eagerly, over a cache that grows.
    """

    cache: Cache | None = None
    windowed = False  # whether layers see the last tokens only
    minds_hidden_slots = False  # whether slots between tokens that are masked out disturb it

    def __init__(
        self,
        model: PreTrainedModel,
        kwargs: dict[str, Any],
        prompt: torch.Tensor,
        runner: Runner | None = None,
    ):
        self.model = model
        self.runner = runner or Runner(model)
        self.device = device_of(model)
        decoder = "decoder_" if model.config.is_encoder_decoder else ""
        self._mask_name, self._positions_name = f"{decoder}attention_mask", f"{decoder}position_ids"
        own = (*OWN_KWARGS, self._mask_name, self._positions_name)
        self.kwargs = {key: value for key, value in kwargs.items() if key not in own}
        self.prompt = prompt
        mask = kwargs.get(self._mask_name)
        self.prompt_visible = np.ones(prompt.shape, bool) if mask is None else mask.bool().cpu().numpy()
        self._prompt_positions = self._positions_of_prompt(kwargs.get(self._positions_name))  # [..., B, P]
        self._takes_logits_to_keep = model._supports_logits_to_keep()
        self.passes = 0
        self.seen = np.full(len(prompt), -self.prompt_length)
        self.settled = self.seen  # tokens that will never be forgotten
        self._last_token: int | None = None
        self._lock = lock_of(model)
        self.stopwatch = Stopwatch(self.device)

    @property
    def costs(self) -> PassCosts:
        """Of its passes."""
        return self.runner.costs

    @property
    def prompt_length(self) -> int:
        """P."""
        return self.prompt.shape[1]

    @property
    def counts_what_is_visible(self) -> bool:
        """Whether the positions of the prompt's tokens are those that its mask gives."""
        given, own = self._prompt_positions, self._visible_positions()
        hidden = torch.from_numpy(~self.prompt_visible).to(self.device)
        return given is None or (given.shape == own.shape and bool(((given == own) | hidden).all()))

    @property
    def in_step(self) -> bool:
        """Whether all rows must have seen equally many tokens before a pass."""
        return False

    @property
    def can_refill(self) -> bool:
        """Whether one row can begin another text while the others go on; known after the first pass."""
        return False

    @property
    def can_keep_rows(self) -> bool:
        """Whether it can go on with some of its rows alone (`reorder`) after roll-backs."""
        return True

    @property
    def visible(self) -> np.ndarray:
        """Which of the places `[B, S]` of the text, or of its cache, attention may see."""
        raise NotImplementedError

    def read_as_if_known(self, vocab_size: int) -> None:
        """
        Lets a drafter with a smaller vocabulary than this read the tokens it lacks as its last one, which is padding
        too: what it proposes then may be worse, and the text is the members'.
        """
        own = self.model.config.get_text_config().vocab_size
        if own < vocab_size:
            self._last_token = own - 1

    def score(self, new: torch.Tensor, end: np.ndarray, width: int = 0, skip: int = 0) -> torch.Tensor:
        """
        Reads the tokens `new[b, seen[b]:end[b]]` in one forward pass, the whole prompt before them the first time.

        Args:
            new (`torch.LongTensor` `[B, >= max(end)]`): The rows' new tokens.
            end (`np.ndarray` `[B]`): `seen` after the pass, >= 0. Rows with `end[b] == seen[b]` read nothing.
            width (`int`): Least number of tokens to run over in each row, padded by any tokens, which are forgotten.
            skip (`int`): Logits of the first so many tokens, of those below, that are not wanted; fewer than K.

        Returns:
            `torch.Tensor` `[B, K - skip, V]`, the model's dtype and device: logits after each token read. Of the
            prompt's only those after its last token are given, so `[b, 0]` predicts new token
            `max(seen[b] + 1, 0) + skip`.
        """
        raise NotImplementedError

    def forget(self, length: np.ndarray, settled: np.ndarray) -> None:
        """
        Rolls back: of each row, only the first `length[b]` tokens stay seen.

        Args:
            length (`np.ndarray` `[B]`): >= 0: the prompt stays. May exceed `seen`, then that row forgets nothing.
            settled (`np.ndarray` `[B]`): No later call asks for less than this.
        """
        raise NotImplementedError

    def prefill(self, prompt: torch.Tensor, mask: torch.Tensor, part: int = 0) -> "Member":
        """
        The same model with another prompt, which it reads in one or several passes of its own: `score` with negative
        `end` reads a part.

        Args:
            prompt (`torch.LongTensor` `[1, P]`), mask (`torch.LongTensor` `[1, P]`): 0 for what attention may not see.
            part (`int`, defaults to 0): The number of the member whose prompt it is, of those that share passes.
        """
        raise NotImplementedError

    def refill(self, row: int, reader: "Member", part: int = 0) -> None:
        """Lets a row, whose text is not wanted any more, continue what `prefill` gave, which has read its prompt."""
        raise NotImplementedError

    def insert_masked(self, slots: int) -> None:
        """Puts so many masked slots behind all that was read, if it has a cache that takes them."""

    def release(self, length: int, copied: bool = True) -> Cache | None:
        """
        The cache, as `generate()` would leave it after `length` new tokens or however many all rows have seen; `None`
        if there is none, or where rows ended at different lengths and layers cannot go back so far. One that will serve
        other calls is `copied`, unless it is not returned.
        """
        return None

    def close(self) -> None:
        """Ends the use of this member; its cache may be used for another."""

    def reorder(self, rows: torch.Tensor) -> None:
        """
        Row b continues what row `rows[b]` was: in a beam search, or where only these rows go on. `rows`:
        `torch.LongTensor` `[B]`, CPU.
        """
        if self._prompt_positions is not None:
            self._prompt_positions = self._prompt_positions.index_select(-2, rows.to(self._prompt_positions.device))
        self.prompt = self.prompt[rows.to(self.prompt.device)]
        rows = rows.numpy()
        self.prompt_visible = self.prompt_visible[rows]
        self.seen, self.settled = self.seen[rows], self.settled[rows]

    def _text(self, new: torch.Tensor, length: int) -> torch.Tensor:
        """The prompt and so many of the new tokens, `[B, P + length]`."""
        return torch.cat([self.prompt, new[:, :length].to(self.prompt.device)], dim=1)

    def _inputs(
        self, chunk: torch.Tensor, visible: np.ndarray, positions: np.ndarray, masked: bool, **more
    ) -> dict[str, Any]:
        """
        What `forward` is given to read the tokens `chunk` `[B, W]`, of which these are the `positions` `[B, W]` in the
        text, where these slots are `visible` `[B, S + W]`. As in `generate()` there is no mask where it would hide
        nothing, unless it must be `masked`.
        """
        chunk = chunk.to(self.device)
        if self._last_token is not None:
            chunk = chunk.clamp(max=self._last_token)
        kwargs = dict(self.kwargs)
        if kwargs.get("token_type_ids") is not None:
            kwargs = _prepare_token_type_ids(kwargs, visible.shape[1])
        unmasked = visible.all() and not masked
        kwargs[self._mask_name] = None if unmasked else torch.from_numpy(visible).long().to(self.device)
        kwargs[self._positions_name] = self._positions(positions)
        return self.model.prepare_inputs_for_generation(chunk, **kwargs, **more)

    def _positions_of_prompt(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """As given or, since the other members need not take the same arguments as the main model, from the mask."""
        if not self._takes(self._positions_name):
            return None
        return self._visible_positions() if given is None else given

    def _visible_positions(self) -> torch.Tensor:
        visible = self.prompt_visible
        return torch.from_numpy(np.where(visible, visible.cumsum(-1) - 1, 0)).to(self.device)

    def _takes(self, argument: str) -> bool:
        """Whether the model's `forward` does."""
        return argument in forward_parameters(self.model)

    def _positions(self, index: np.ndarray) -> torch.Tensor | None:
        """The position ids of tokens `index` `[B, K]`: the prompt's as given, then one after the other."""
        given = self._prompt_positions
        if given is None:
            return None
        beyond = torch.from_numpy(index + 1).to(given.device)  # [B, K], <= 0 within the prompt
        after = given[..., -1:] + beyond
        if index.min() >= 0:
            return after
        within = torch.from_numpy(np.minimum(index, -1) + self.prompt_length).to(given.device)
        return torch.where(beyond <= 0, given.gather(-1, within.expand(*given.shape[:-1], -1)), after)
