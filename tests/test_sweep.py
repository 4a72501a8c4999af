"""Every class of language models that transformers knows: as an ensemble right, or refused."""

import pytest
from sweep import CRASH, NOT_TRIED, WRONG, line, quick
from sweep_models import entries


# What transformers 5.24 alone cannot do with text: drafters that need their target, codebooks of music, models that
# must be given speech, or whose images want another package, and xLSTM, which finds its own state of a wrong shape.
UNTRIED = (
    "gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody", "voxtral_realtime",
    "xlstm",
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_right_or_refused(entry):
    report = quick(entry)
    assert report.outcome not in (WRONG, CRASH), line(report)
    assert report.outcome != NOT_TRIED or entry.name in UNTRIED, line(report)
