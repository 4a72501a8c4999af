"""Warnings and advice that several modules give; each warning once in a process."""

import logging
from functools import lru_cache


logger = logging.getLogger(__name__)

STANDARD = "EnsembleConfig(speculative=False)"


@lru_cache(None)
def warn_once(message: str) -> None:
    logger.warning(message)
