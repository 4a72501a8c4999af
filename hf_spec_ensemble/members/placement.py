"""The device of a model's inputs, also if accelerate has spread or offloaded its weights."""

from typing import Any

import torch
from transformers import PreTrainedModel


def device_of(model: PreTrainedModel) -> torch.device:
    """The device of a model's inputs: not always `model.device`, "meta" if accelerate has offloaded weights."""
    device = model.device
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(one, "execution_device", None) for hook in hooks for one in (hook, *getattr(hook, "hooks", ())))
    return torch.device(next((device for device in devices if device is not None), "meta"))


class Placed:
    """A model with offloaded weights, except that its `device` is that of its inputs."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.device = device_of(model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
