"""Processes that decode together, since a member is spread over them: what they must agree on, and how.

Every process makes every pass and every draw. Decisions by measured times, and results that differ in the last bits,
could make processes diverge. So the first process decides, and the others follow.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel


class Ranks:
    """The processes that decode together. Here there is only one."""

    def agree(self, values: torch.Tensor) -> torch.Tensor:
        """The first process's values, on the device of these. All call with the same shape and dtype."""
        return values

    def agree_on(self, thing: Any) -> Any:
        """The first process's object, which must be picklable."""
        return thing

    def share_random_state(self, device: torch.device) -> None:
        """Gives all processes the first one's state of torch's global generators."""


class Together(Ranks):
    """
    Several processes, all in the same call.

    Args:
        group (`torch.distributed.ProcessGroup`): Of the tensor-parallel members.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        on_gpu = "nccl" in dist.get_backend(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def agree(self, values):
        shared = values.to(self.device).contiguous()
        dist.broadcast(shared, group=self.group, group_src=0)
        return shared.to(values.device)

    def agree_on(self, thing):
        things = [thing]
        dist.broadcast_object_list(things, group=self.group, group_src=0)
        return things[0]

    def share_random_state(self, device):
        torch.set_rng_state(self.agree(torch.get_rng_state()))
        if device.type == "cuda":
            torch.cuda.set_rng_state(self.agree(torch.cuda.get_rng_state(device)), device)


def ranks_of(models: Sequence[PreTrainedModel]) -> Ranks:
    """
    `Together` if one of the models is tensor-parallel (`from_pretrained(..., tp_plan="auto")`, or with a
    `DistributedConfig`); else the process is by itself.

    Raises:
        `ValueError`: if members are spread in another way, or over different processes.
    """
    meshes = [getattr(model, "_device_mesh", None) for model in models]
    groups = []
    for model, mesh in zip(models, meshes):
        if mesh is None or mesh.size() == 1:
            continue
        tensor_parallel = mesh["tp"] if mesh.ndim > 1 else mesh
        if tensor_parallel.size() < mesh.size():
            raise ValueError(
                f"A {type(model).__name__} is spread over {mesh}: an ensemble's members may be tensor-parallel, not "
                "pipeline-parallel or sharded. Load it with tensor parallelism alone."
            )
        groups.append(tensor_parallel.get_group())
    if not groups:
        return Ranks()
    if len({tuple(dist.get_process_group_ranks(group)) for group in groups}) > 1:
        raise ValueError("The members are spread over different processes: load all that are over the same ones.")
    return Together(groups[0])


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether passes gather the weights from other processes, which have texts of their own: by FSDP or ZeRO-3."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    kinds = {base.__name__ for base in type(model).__mro__}
    return (
        not kinds.isdisjoint({"FullyShardedDataParallel", "FSDPModule"})
        or getattr(model, "_is_fsdp_managed_module", False)
        or any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    )
