"""What users are told from several places: each warning once in a process, and what to do instead."""

import logging
from functools import lru_cache


logger = logging.getLogger(__name__)

STANDARD = "EnsembleConfig(speculative=False)"


@lru_cache(None)
def warn_once(message: str) -> None:
    logger.warning(message)
