"""Compiles members' passes before they are needed."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import CompileConfig, PreTrainedModel

from .adapters import is_model
from .cached import CachedMember
from .placement import device_of
from .prompts import model_of
from .runner import SETTLED, WIDTHS, Running


@torch.no_grad()
def warmup(
    members: Sequence[PreTrainedModel],
    max_length: int,
    batch_size: int = 1,
    compile_config: CompileConfig | None = None,
    widths: Sequence[int] = WIDTHS,
    progress: bool = True,
) -> list[float]:
    r"""
    Compiles the passes that `generate(cache_implementation="static", compile_config=compile_config)` will run, all
    widths of them, so that no call has to wait for it. Without it every width is compiled when it is first needed.
    Compiled code and caches are kept as long as the model.

    Args:
        members (`Sequence[PreTrainedModel]`):
            The main model, assistants and drafters.
        max_length (`int`):
            Tokens of the longest text, prompt included. Shorter texts use the same code, longer ones do not.
        batch_size (`int`, defaults to 1):
            B. Each batch size is compiled separately.
        compile_config (`CompileConfig`, *optional*):
            The same options that `generate()` will be given; defaults to `CompileConfig()`.
        widths (`Sequence[int]`):
            The numbers of tokens, of those that passes are padded to, to compile; by default all.
        progress (`bool`, defaults to `True`):
            Whether to say what is compiled, before it begins, and to show a progress bar.

    Returns:
        `list[float]`: Seconds by member; close to zero for what was compiled before.

    Raises:
        `ValueError`: if a member cannot be compiled, or passes are not padded to one of the widths.

    Example:

    >>> import torch
    >>> from hf_spec_ensemble import EnsembleConfig, warmup
    >>> from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

    >>> size = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> size |= dict(eos_token_id=None, pad_token_id=0)
    >>> one, two = (LlamaForCausalLM(LlamaConfig(**size)) for _ in range(2))
    >>> config = CompileConfig(backend="eager", mode=None)  # leave both out for real
    >>> seconds = warmup([one, two], max_length=32, compile_config=config, widths=[1, 2], progress=False)
    >>> one.generate(
    ...     torch.tensor([[3, 4, 5]]),
    ...     assistant_model=two,
    ...     ensemble_config=EnsembleConfig(),
    ...     cache_implementation="static",
    ...     compile_config=config,
    ...     max_new_tokens=4,
    ... ).shape
    torch.Size([1, 7])
    """
    if not set(widths) <= set(WIDTHS):
        raise ValueError(f"`widths` must be of {WIDTHS}, but are {tuple(widths)}.")
    for member in members:
        if not is_model(member):
            raise TypeError(f"`members` must be loaded transformers models, but one is a {type(member).__name__}.")
    members = [model_of(member) for member in members]
    running = Running(max_length, static=True, compile_config=compile_config or CompileConfig())
    runners = [running.runner(model, batch_size) for model in members]
    seconds = []
    if progress:
        tqdm.write(_announced(members, widths, batch_size, max_length))
    with tqdm(total=len(members) * len(widths), desc="compiling", unit="pass", disable=not progress) as bar:
        for model, runner in zip(members, runners):
            start = time.perf_counter()
            ids = torch.ones(batch_size, max(WIDTHS), dtype=torch.long, device=device_of(model))
            member = CachedMember(model, {}, ids[:, :1], runner)
            nothing = np.zeros(batch_size, int)
            member.score(ids, nothing)
            for width in widths:
                for _ in range(SETTLED):
                    member.score(ids, nothing + width)
                    member.forget(nothing, settled=nothing)
                bar.update()
            member.close()
            seconds.append(time.perf_counter() - start)
    return seconds


def _announced(members: list[PreTrainedModel], widths: Sequence[int], batch_size: int, max_length: int) -> str:
    passes = len(members) * len(widths)
    rows = f"{batch_size} row{'' if batch_size == 1 else 's'}"
    return (
        f"Compiling {passes} passes: {len(members)} members, each over {', '.join(map(str, widths))} tokens, {rows}, "
        f"texts of up to {max_length} tokens. A pass takes from a few seconds for small models to a minute; what is "
        "compiled is used by every call of this process."
    )
