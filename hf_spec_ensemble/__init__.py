"""Speculative ensembles of language models for Hugging Face `generate()`: the same distribution, fewer forward passes.

import hf_spec_ensemble as se

model.generate(**inputs, assistant_model=other, ensemble_config=se.EnsembleConfig(weights=[0.5, 0.5]))
"""

from .config import EnsembleConfig
from .decoding import ensemble_decoding
from .integration import disable, enable
from .logits_process import EnsembleLogitsProcessor
from .output import EnsembleDecoderOnlyOutput, EnsembleStats


__version__ = "0.1.0"
__all__ = [
    "EnsembleConfig",
    "EnsembleDecoderOnlyOutput",
    "EnsembleLogitsProcessor",
    "EnsembleStats",
    "disable",
    "enable",
    "ensemble_decoding",
]

enable()
