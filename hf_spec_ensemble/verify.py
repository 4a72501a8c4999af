"""Accept, reject, resample: the verification of proposals against the ensemble's distribution. Pure tensor functions.

Shapes: B rows, K positions, V vocabulary. A row has `proposed[b] <= K` proposals x_1 ... x_k, drawn from q_1 ... q_k;
r_j is the ensemble's distribution at position j, given the prefix and x_1 ... x_{j-1}.
"""

import torch


def matches_before_mismatch(match: torch.Tensor, proposed: torch.Tensor) -> torch.Tensor:
    """
    How many proposals of each row hold before the first that does not.

    Args:
        match (`torch.BoolTensor` `[B, K]`): Whether each proposal holds.
        proposed (`torch.LongTensor` `[B]`): Numbers of proposals; columns past them do not count.

    Returns:
        `torch.LongTensor` `[B]`.
    """
    exists = torch.arange(match.shape[1], device=match.device) < proposed[:, None].to(match.device)
    return (match & exists).long().cumprod(dim=1).sum(dim=1)


def acceptance_probs(tokens: torch.Tensor, log_q: torch.Tensor, log_r: torch.Tensor) -> torch.Tensor:
    """
    min(1, r(x) / q(x)), the probability of keeping x ~ q (Leviathan et al., arXiv 2211.17192, section 2.3, with the
    ensemble's r as target as in Fu et al., arXiv 2502.01662).

    Args:
        tokens (`torch.LongTensor` `[B, K]`): Proposals x, with q(x) > 0.
        log_q (`torch.Tensor` `[B, K, V]`): Log-probabilities they were drawn from.
        log_r (`torch.Tensor` `[B, K, V]`): Log-probabilities of the ensemble.

    Returns:
        `torch.Tensor` `[B, K]`.
    """
    index = tokens.unsqueeze(-1)
    return (log_r.gather(-1, index) - log_q.gather(-1, index)).squeeze(-1).clamp(max=0).exp()


def residual_probs(log_q: torch.Tensor, log_r: torch.Tensor) -> torch.Tensor:
    """
    norm(max(0, r - q)), what replaces a rejected proposal; r itself where the difference rounds to nothing (q = r to
    the last bit, so that a rejection has probability zero but for rounding).

    Args:
        log_q, log_r (`torch.Tensor` `[..., V]`): Log-probabilities; q = 0 everywhere (-inf) gives r.

    Returns:
        `torch.Tensor` `[..., V]`: Probabilities.
    """
    r = log_r.exp()
    residual = (r - log_q.exp()).clamp(min=0)
    total = residual.sum(-1, keepdim=True)
    return torch.where(total > 0, residual / total.clamp(min=torch.finfo(r.dtype).tiny), r)


def verify_maximal(
    tokens: torch.Tensor,
    log_q: torch.Tensor,
    log_r: torch.Tensor,
    proposed: torch.Tensor,
    uniforms: torch.Tensor,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The rejection rule: keep x while u < r(x) / q(x); replace the first rejected one by a draw from the residual.

    Args:
        tokens (`torch.LongTensor` `[B, K]`), log_q, log_r (`torch.Tensor` `[B, K, V]`): As in `acceptance_probs`.
        proposed (`torch.LongTensor` `[B]`): Numbers of proposals.
        uniforms (`torch.Tensor` `[B, K]`): Independent draws from [0, 1).
        generator (`torch.Generator`, *optional*): Of the residual's draw. Defaults to torch's global one.

    Returns:
        accepted (`torch.LongTensor` `[B]`): How many proposals each row keeps.
        emitted (`torch.LongTensor` `[B]`): The draw at position `accepted[b]`: from the residual if there was a
        proposal, from r if not. Arbitrary for rows that keep all K.
    """
    accepted = matches_before_mismatch(uniforms < acceptance_probs(tokens, log_q, log_r), proposed)
    row = torch.arange(len(tokens), device=tokens.device)
    column = accepted.clamp(max=tokens.shape[1] - 1)
    was_proposed = (column < proposed.to(column.device)).unsqueeze(-1)
    log_q_there = log_q[row, column].masked_fill(~was_proposed, -torch.inf)  # [B, V]
    emitted = torch.multinomial(residual_probs(log_q_there, log_r[row, column]), 1, generator=generator)
    return accepted, emitted.squeeze(-1)


def verify_shared_noise(
    tokens: torch.Tensor, log_r: torch.Tensor, proposed: torch.Tensor, noise: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The drafter-invariant rule (Daliri et al., arXiv 2408.07978): the emitted token is argmax(log r + g) whatever was
    proposed, and a proposal is kept when it is that token. With g = 0 this is greedy verification.

    Args:
        tokens (`torch.LongTensor` `[B, K]`), log_r (`torch.Tensor` `[B, K, V]`): As in `acceptance_probs`.
        proposed (`torch.LongTensor` `[B]`): Numbers of proposals.
        noise (`torch.Tensor` `[B, K, V]` or 0.0): The positions' Gumbel noise g, the same that proposed.

    Returns:
        accepted (`torch.LongTensor` `[B]`), emitted (`torch.LongTensor` `[B]`): As in `verify_maximal`.
    """
    target = (log_r + noise).argmax(-1)  # [B, K]
    accepted = matches_before_mismatch(target == tokens, proposed)
    return accepted, target.gather(1, accepted.clamp(max=tokens.shape[1] - 1)[:, None]).squeeze(1)


def _mix(state: torch.Tensor) -> torch.Tensor:
    """The output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) on int64 tensors, modulo 2^64."""

    def shifted(z: torch.Tensor, bits: int) -> torch.Tensor:  # a logical shift; torch's is arithmetic
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    state = (state ^ shifted(state, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    state = (state ^ shifted(state, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return state ^ shifted(state, 31)


_STEP = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, splitmix64's increment


def gumbel_noise(seed: int, rows: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """
    Standard Gumbel noise that depends on (seed, row, position, token) alone: the same on every device and whatever else
    is drawn, in whatever order. A counter-based generator: splitmix64 keyed by seed, row and position.

    Args:
        seed (`int`): In [-2^63, 2^63).
        rows, positions (`torch.LongTensor` `[...]`): On the device where the noise is wanted; broadcast.
        vocab_size (`int`): V.

    Returns:
        `torch.Tensor` `[..., V]`, float64.

    Example:

    >>> import torch
    >>> from hf_spec_ensemble.verify import gumbel_noise

    >>> noise = gumbel_noise(0, torch.tensor(0), torch.arange(1000), 50)
    >>> round(noise.mean().item(), 1)  # Euler's constant, 0.577...
    0.6
    """
    key = _mix(_mix(seed + _STEP * (rows + 1)) + _STEP * (positions + 1))
    token = torch.arange(1, vocab_size + 1, device=key.device)
    bits = (_mix(key.unsqueeze(-1) + _STEP * token) >> 11) & ((1 << 53) - 1)
    uniform = (bits.double() + 0.5) * 2.0**-53  # in (0, 1)
    return -(-uniform.log()).log()
