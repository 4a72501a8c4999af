"""
Runs tests on another device than the CPU: `HF_SPEC_ENSEMBLE_TEST_DEVICE=cuda python -m pytest tests/test_exactness.py`.

Models that a test builds, and tensors that the code of tests makes, are moved there. Models that are loaded stay where
they are loaded.
"""

import os
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from transformers import PreTrainedModel


DEVICE = os.environ.get("HF_SPEC_ENSEMBLE_TEST_DEVICE", "cpu")
TESTS = str(Path(__file__).parent)


class TensorsOfTests(TorchFunctionMode):
    """What `torch.tensor`, `torch.ones` and the like make where tests call them is moved to the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        asked = (kwargs or {}).get("device") is not None
        if not asked and function in _device_constructors() and sys._getframe(1).f_code.co_filename.startswith(TESTS):
            return made.to(DEVICE)
        return made


def move() -> None:
    """From now on, in this process."""
    from hf_spec_ensemble.members import rows  # not before the tests' own imports

    finish = PreTrainedModel.post_init

    def post_init(model):
        finish(model)
        if all(parameter.device.type != "meta" for parameter in model.parameters()):
            model.to(DEVICE)

    PreTrainedModel.post_init = post_init
    rows.WORTH_A_PASS[torch.device(DEVICE).type] = rows.WORTH_A_PASS["cpu"]  # tests count passes
    TensorsOfTests().__enter__()
