"""Speculative ensembles of language models for Hugging Face `generate()`: the same distribution, fewer forward passes.

import hf_spec_ensemble as se

model.generate(**inputs, assistant_model=other, ensemble_config=se.EnsembleConfig(weights=[0.5, 0.5]))
"""

from . import (
    compat,  # noqa: F401  says what is wrong with the version of transformers before anything fails on it
    recipes,
)
from .batches import EnsembleGenerationOutput, generate_as_completed, generate_batch
from .config import EnsembleConfig
from .decoding.logits_process import EnsembleLogitsProcessor
from .decoding.method import ensemble_decoding
from .decoding.output import EnsembleDecoderOnlyOutput, EnsembleEncoderDecoderOutput, EnsembleStats
from .decoding.suffixes import Suffixes
from .fitting import FitResult, FitResults, fit
from .hub import Ensemble, MemberReference, ensemble_card, load_ensemble, push_ensemble, save_ensemble
from .integration import disable, enable
from .members.adapters import with_adapter
from .members.prompts import with_prompt
from .members.warmup import warmup
from .trace import Trace, TraceStreamer
from .version import __version__ as __version__


__all__ = [
    "Ensemble",
    "EnsembleConfig",
    "EnsembleDecoderOnlyOutput",
    "EnsembleEncoderDecoderOutput",
    "EnsembleGenerationOutput",
    "EnsembleLogitsProcessor",
    "EnsembleStats",
    "FitResult",
    "FitResults",
    "MemberReference",
    "Suffixes",
    "Trace",
    "TraceStreamer",
    "disable",
    "enable",
    "ensemble_card",
    "ensemble_decoding",
    "fit",
    "generate_as_completed",
    "generate_batch",
    "load_ensemble",
    "push_ensemble",
    "recipes",
    "save_ensemble",
    "warmup",
    "with_adapter",
    "with_prompt",
]

enable()
