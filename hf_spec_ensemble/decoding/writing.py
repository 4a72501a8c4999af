"""Writer: the tokens of a union as the main model writes them. Only the output and stopping criteria see this."""

from collections.abc import Sequence

import torch
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation import MaxLengthCriteria

from ..ensemble.union import Map


class Writer:
    """
    The rows' texts in the main model's ids. A token that it does not have is written as its tokenizer writes the bytes.

    State: what was written.

    Args:
        way (`Map`): The main model's.
        prompt (`torch.LongTensor` `[B, P]`): In its ids.
        pad (`int`): Stands where a row has no token.
    """

    def __init__(self, way: Map, prompt: torch.Tensor, pad: int):
        self.way, self.prompt, self.pad = way, prompt, pad
        self.rows: list[list[int]] = [[] for _ in prompt]
        self.last: list[int] = [0] * len(prompt)  # how many ids of each row the last token was written as
        self.differs = False  # whether some token was written as several

    def put(self, tokens: torch.Tensor, wanted: Sequence[bool]) -> torch.Tensor:
        """
        Writes one more token `[B]` of the rows that want it.

        Returns:
            `torch.LongTensor` `[B, L]`: What was written, padded behind.
        """
        new = [list(self.way.read(u)) if w else [] for u, w in zip(tokens.tolist(), wanted)]
        for row, ids in zip(self.rows, new):
            row += ids
        self.last = [len(ids) for ids in new]
        self.differs |= max(self.last) > 1
        return self._block(new)

    def sequences(self) -> torch.Tensor:
        """The prompts and what was written, `[B, T]`, padded behind."""
        return torch.cat([self.prompt, self._block(self.rows)], dim=1)

    def asked(self, criteria: StoppingCriteriaList, tokens: torch.Tensor, scores) -> torch.Tensor:
        """
        Which rows `[B]` stop. The longest text counts tokens of the union; all other criteria see the texts in the main
        model's ids, padded in front. Stop strings may end within what one token is written as.

        Args:
            criteria (`StoppingCriteriaList`): Of the call.
            tokens (`torch.LongTensor` `[B, T]`): Prompts and tokens of the union.
            scores: As for criteria.
        """
        if not self.differs:
            return criteria(tokens, scores)
        done = torch.zeros(len(self.rows), dtype=torch.bool, device=tokens.device)
        whole = self._without_last(0)
        for criterion in criteria:
            if isinstance(criterion, StopStringCriteria):
                for n in range(1, max(self.last)):
                    done |= criterion(self._without_last(n), scores)
            done |= criterion(tokens if isinstance(criterion, MaxLengthCriteria) else whole, scores)
        return done

    def _without_last(self, n: int) -> torch.Tensor:
        """The texts `[B, T]` but for the last `n` ids, of which one of the last token is left in any case."""
        ends = [len(row) - min(n, max(last - 1, 0)) for row, last in zip(self.rows, self.last)]
        texts = [torch.cat([p, p.new_tensor(row[:end])]) for p, row, end in zip(self.prompt, self.rows, ends)]
        return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.pad, padding_side="left")

    def _block(self, rows: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, rows))
        return self.prompt.new_tensor([row + [self.pad] * (longest - len(row)) for row in rows])
