import gc
import os

import peft
import pytest
import torch
from hypothesis import settings
from packaging.version import Version
from transformers.integrations import peft as transformers_peft

from hf_spec_ensemble.notices import warn_once


torch.set_num_threads(1)  # tiny models, and a process for each core

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("fixed")

# transformers 5.24 asks for a version of PEFT that its package index did not have when this was written; the adapters
# of the tests do with the one before
if Version(peft.__version__) < Version(transformers_peft.MIN_PEFT_VERSION):
    transformers_peft.MIN_PEFT_VERSION = peft.__version__


def pytest_collection_finish():
    """What the imports have made stays: no collection of garbage need look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _every_test_is_warned_anew():
    warn_once.cache_clear()


if "HF_SPEC_ENSEMBLE_TEST_DEVICE" in os.environ:
    import on_device

    on_device.move()
