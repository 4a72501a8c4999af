"""Going back in a recurrent state: copies from before the passes that read tokens which may be rejected."""

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer


STATES = ("conv_states", "recurrent_states")  # of a layer, by number


class Snapshots:
    """
    The states of recurrent layers at some lengths of the text, all rows having the same.

    Args:
        layers (`list[LinearAttentionLayer]`): Of a cache that records the past.

    Example:

    >>> import torch
    >>> from hf_spec_ensemble.members.snapshots import Snapshots
    >>> from transformers.cache_utils import LinearAttentionLayer

    >>> layer = LinearAttentionLayer()
    >>> snapshots = Snapshots([layer])
    >>> for length in (3, 5):
    ...     _ = layer.update_recurrent_state(torch.full((1, 2), float(length)))
    ...     snapshots.take(length)
    >>> snapshots.restore(4), layer.recurrent_states[0].tolist()
    (3, [[3.0, 3.0]])
    """

    def __init__(self, layers: list[LinearAttentionLayer]):
        self._layers = layers
        self._taken: list[tuple[int, list[dict[str, dict[int, torch.Tensor | None]]]]] = []  # by length, ascending

    def take(self, length: int) -> None:
        """Notes the states as those after `length` tokens."""
        states = [{name: _copied(getattr(layer, name)) for name in STATES} for layer in self._layers]
        self._taken = [(at, held) for at, held in self._taken if at < length]
        self._taken.append((length, states))

    def restore(self, length: int) -> int:
        """Puts back the last states that are not beyond `length` tokens; says after how many they were taken."""
        self._taken = [(at, held) for at, held in self._taken if at <= length]
        at, states = self._taken[-1]
        for layer, held in zip(self._layers, states):
            layer.conv_states = _copied(held["conv_states"])
            for i, state in held["recurrent_states"].items():
                if state is not None:
                    layer.recurrent_states[i].copy_(state)
        return at

    def forget_before(self, length: int) -> None:
        """States before `length` tokens are not needed any more."""
        last = max((at for at, _ in self._taken if at <= length), default=0)
        self._taken = [(at, held) for at, held in self._taken if at >= last]


def _copied(states: dict[int, torch.Tensor | None]) -> dict[int, torch.Tensor | None]:
    """Copies: models write to states in place."""
    return {i: None if state is None else state.clone() for i, state in states.items()}


def needs_snapshots(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "_is_stateful", False))
