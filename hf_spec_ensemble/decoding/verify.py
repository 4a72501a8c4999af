"""Accept, reject, resample: the verification of proposals against the ensemble's distribution. Pure tensor functions.

Shapes: B rows, K positions, V vocabulary. A row has `proposed[b] <= K` proposals x_1 ... x_k, drawn from q_1 ... q_k;
r_j is the ensemble's distribution at position j, given the prefix and x_1 ... x_{j-1}. Distributions are probabilities.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch


IN_CACHE = 2**16  # 64-bit numbers to work on at once on a CPU


def matches_before_mismatch(match: torch.Tensor, proposed: np.ndarray) -> torch.Tensor:
    """
    How many proposals of each row hold before the first that does not.

    Args:
        match (`torch.BoolTensor` `[B, K]`): Whether each proposal holds.
        proposed (`np.ndarray` `[B]`): Numbers of proposals; columns past them do not count.

    Returns:
        `torch.LongTensor` `[B]`.
    """
    if (proposed == proposed[0]).all():  # nothing to move to the device
        return match[:, : proposed[0]].cumprod(dim=1).sum(dim=1)
    exists = torch.from_numpy(np.arange(match.shape[1]) < proposed[:, None])
    return (match & exists.to(match.device)).cumprod(dim=1).sum(dim=1)


def acceptance_probs(tokens: torch.Tensor, q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """
    min(1, r(x) / q(x)), the probability of keeping x ~ q (Leviathan et al., arXiv 2211.17192, section 2.3, with the
    ensemble's r as target as in Fu et al., arXiv 2502.01662).

    Args:
        tokens (`torch.LongTensor` `[B, K]`): Proposals x, with q(x) > 0.
        q (`torch.Tensor` `[B, K, V]`): What they were drawn from.
        r (`torch.Tensor` `[B, K, V]`): The ensemble's.

    Returns:
        `torch.Tensor` `[B, K]`.
    """
    index = tokens.unsqueeze(-1)
    return (r.gather(-1, index) / q.gather(-1, index)).squeeze(-1).clamp(max=1)


def shared_noise_acceptance(tokens: torch.Tensor, q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """
    The probability that x = argmax(log q + g) is also argmax(log r + g): 1 / sum_y max(q(y), r(y) q(x) / r(x)), from
    the joint distribution of two draws with the same noise (Daliri et al., arXiv 2408.07978).

    Args:
        tokens (`torch.LongTensor` `[B, K]`), q, r (`torch.Tensor` `[B, K, V]`): As in `acceptance_probs`.

    Returns:
        `torch.Tensor` `[B, K]`.
    """
    index = tokens.unsqueeze(-1)
    q_x, r_x = q.gather(-1, index), r.gather(-1, index)
    return (r_x / torch.maximum(r_x * q, q_x * r).sum(-1, keepdim=True)).squeeze(-1)


def residual_probs(q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """
    norm(max(0, r - q)), what replaces a rejected proposal; r itself where the difference rounds to nothing (q = r to
    the last bit, so that a rejection has probability zero but for rounding).

    Args:
        q, r (`torch.Tensor` `[..., V]`): As in `acceptance_probs`; q = 0 everywhere gives r.

    Returns:
        `torch.Tensor` `[..., V]`.
    """
    residual = (r - q).clamp(min=0)
    total = residual.sum(-1, keepdim=True)
    return torch.where(total > 0, residual / total.clamp(min=torch.finfo(r.dtype).tiny), r)


def draw(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """
    A draw from each distribution by inversion: the first token whose cumulative probability exceeds u.

    Args:
        probs (`torch.Tensor` `[..., V]`): Not negative, of any positive sum.
        uniforms (`torch.Tensor` `[...]`): In [0, 1).

    Returns:
        `torch.LongTensor` `[...]`: Of positive probability.

    Example:

    >>> import torch
    >>> from hf_spec_ensemble.decoding.verify import draw

    >>> draw(torch.tensor([0.0, 0.5, 0.5, 0.0]), torch.tensor([0.0, 0.4, 0.5, 0.99])[:, None].expand(4, 1)[:, 0])
    tensor([1, 1, 2, 2])
    """
    cumulative = probs.cumsum(-1, dtype=uniforms.dtype)
    total = cumulative[..., -1:]
    below = (uniforms.unsqueeze(-1) * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, below, right=True).squeeze(-1)


def verify_maximal(
    tokens: torch.Tensor, q: torch.Tensor, r: torch.Tensor, proposed: np.ndarray, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The rejection rule: keep x while u < r(x) / q(x); replace the first rejected one by a draw from the residual.

    Args:
        tokens (`torch.LongTensor` `[B, K]`), q, r (`torch.Tensor` `[B, K, V]`): As in `acceptance_probs`.
        proposed (`np.ndarray` `[B]`): Numbers of proposals.
        uniforms (`torch.Tensor` `[B, K + 1]`): Independent draws from [0, 1), the last one for the replacement.

    Returns:
        accepted (`torch.LongTensor` `[B]`): How many proposals each row keeps.
        emitted (`torch.LongTensor` `[B]`): The draw at position `accepted[b]`: from the residual if there was a
        proposal, from r if not. Arbitrary for rows that keep all K.
    """
    accepted = matches_before_mismatch(uniforms[:, :-1] < acceptance_probs(tokens, q, r), proposed)
    if (
        tokens.device.type == "cpu" and (accepted == tokens.shape[1]).all()
    ):  # elsewhere, asking costs more than it saves
        return accepted, tokens[:, -1]
    row = torch.arange(len(tokens), device=tokens.device)
    column = accepted.clamp(max=tokens.shape[1] - 1)
    was_proposed = (column < torch.from_numpy(proposed).to(column.device)).unsqueeze(-1)
    q_there = q[row, column] * was_proposed  # [B, V]
    return accepted, draw(residual_probs(q_there, r[row, column]), uniforms[:, -1])


def verify_match(tokens: torch.Tensor, target: torch.Tensor, proposed: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keeps a proposal if it is the token that the ensemble emits: greedy verification with argmax r, and the
    drafter-invariant rule (Daliri et al., arXiv 2408.07978) with argmax(log r + g), g being the Gumbel noise that the
    proposal was drawn with.

    Args:
        tokens (`torch.LongTensor` `[B, K]`): Proposals.
        target (`torch.LongTensor` `[B, K]`): What the ensemble emits at each position.
        proposed (`np.ndarray` `[B]`): Numbers of proposals.

    Returns:
        accepted (`torch.LongTensor` `[B]`), emitted (`torch.LongTensor` `[B]`): As in `verify_maximal`.
    """
    accepted = matches_before_mismatch(target == tokens, proposed)
    return accepted, target.gather(1, accepted.clamp(max=tokens.shape[1] - 1)[:, None]).squeeze(1)


def _mix(state):
    """
    The output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) mod 2^64 on a tensor or an array of int64, in
    place.
    """
    for bits, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):  # 0xBF58..., 0x94D0...
        shifted = state >> bits
        shifted &= (1 << (64 - bits)) - 1  # a logical shift; that of int64 is arithmetic
        state ^= shifted
        if factor != 1:
            state *= factor
    return state


_STEP = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, splitmix64's increment


@lru_cache(maxsize=8)
def _counters(count: int, device: torch.device) -> torch.Tensor:
    return _STEP * torch.arange(1, count + 1, device=device)


def exponential_noise(
    seed: int,
    rows: np.ndarray,
    positions: np.ndarray,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """
    Standard exponential noise E that depends on (seed, row, position, token) alone: but for rounding the same on every
    device and in every dtype, whatever else is drawn, in whatever order. A counter-based generator: splitmix64 keyed
    by seed, row and position.

    -log E is Gumbel noise g, so that argmax(log r + g) = argmax(r / E) is a draw from r.

    Args:
        seed (`int`): In [-2^63, 2^63).
        rows, positions (`np.ndarray` `[...]`, int64): Broadcast.
        vocab_size (`int`): V.
        dtype (`torch.dtype`), device (`torch.device`): Of the result, `torch.float32` or `torch.float64`.

    Returns:
        `torch.Tensor` `[..., V]`, positive and finite.

    Example:

    >>> import numpy as np
    >>> from hf_spec_ensemble.decoding.verify import exponential_noise

    >>> round(exponential_noise(0, np.zeros(1000, int), np.arange(1000), 50).mean().item(), 1)
    1.0
    """
    key = _mix(_mix(seed + _STEP * (rows + 1)) + _STEP * (positions + 1))
    key = torch.from_numpy(key).to(device)
    counters = _counters(vocab_size, key.device)
    if key.device.type != "cpu":
        return _exponential(key, counters, dtype)
    noise = torch.empty(key.numel(), vocab_size, dtype=dtype)
    rows = max(IN_CACHE // vocab_size, 1)
    for part, made in zip(key.flatten().split(rows), noise.split(rows)):
        for some, there in zip(counters.split(IN_CACHE), made.split(IN_CACHE, dim=1)):
            there.copy_(_exponential(part, some, dtype))
    return noise.view(*key.shape, vocab_size)


def mixture_owners(seed: int, rows: np.ndarray, positions: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """
    For every position the component of a mixture that its token is drawn from: i with probability `weights[i]`,
    independently of other rows and positions. Depends on (seed, row, position) alone, and not on what
    `exponential_noise` gives for these.

    Args:
        seed (`int`), rows, positions (`np.ndarray` `[...]`, int64): As in `exponential_noise`.
        weights (`Sequence[float]`, N): >= 0, with a sum of one.

    Returns:
        `np.ndarray` `[...]`: In [0, N).

    Example:

    >>> import numpy as np
    >>> from hf_spec_ensemble.decoding.verify import mixture_owners

    >>> owners = mixture_owners(0, np.zeros(10_000, int), np.arange(10_000), [0.3, 0.7])
    >>> float(owners.mean().round(2))
    0.7
    """
    # The noise of tokens has positions from 0 on: numbers below are free
    bits = _mix(_mix(_mix(seed + _STEP * (rows + 1)) - _STEP * (positions + 1)) + _STEP)
    uniform = ((bits >> 11) & ((1 << 53) - 1)) * 2.0**-53
    limits = np.cumsum(weights)[:-1]  # without the last, which rounding could put below one
    return np.searchsorted(limits, uniform, side="right")


def _exponential(key: torch.Tensor, counters: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Noise `[..., V]` from keys `[...]` and the tokens' counters `[V]`."""
    bits = _mix(key.unsqueeze(-1) + counters).bitwise_right_shift_(11)
    uniform = bits.bitwise_and_((1 << 53) - 1).to(dtype).add_(0.5).mul_(2.0**-53)
    # The least noise decides: u near 0, where floats are dense, and never 1
    return uniform.clamp_(max=1 - torch.finfo(dtype).eps / 2).neg_().log1p_().neg_()
