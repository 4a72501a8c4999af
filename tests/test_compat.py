"""A version of transformers that lacks what the package builds on is named, with what is missing and what to do."""

import configparser
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers import GenerationMixin, cache_utils
from transformers.generation import AssistedCandidateGenerator, candidate_generator

from hf_spec_ensemble import compat


@pytest.mark.slow
def test_importing_says_what_is_missing():
    code = "from transformers import GenerationMixin; del GenerationMixin._sample; import hf_spec_ensemble"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    message = done.stderr[done.stderr.rindex("ImportError") :]
    assert "transformers.GenerationMixin: _sample" in message and transformers.__version__ in message
    assert "tested with transformers 5.17 to 5.24" in message
    assert 'pip install "transformers>=5.17,<5.25"' in message


REMOVED = {
    "a method": (GenerationMixin, "_beam_search", None, "transformers.GenerationMixin: _beam_search"),
    "a function": (candidate_generator, "_prepare_token_type_ids", None, "_prepare_token_type_ids"),
    "a class": (cache_utils, "DynamicSlidingWindowLayer", None, "DynamicSlidingWindowLayer.__init__: record_past"),
    "a parameter": (GenerationMixin, "generate", lambda self, **kwargs: None, "generate: custom_generate"),
    "an attribute that a method sets": (
        AssistedCandidateGenerator,
        "__init__",
        lambda self: None,
        "AssistedCandidateGenerator.__init__: assistant_kwargs",
    ),
}


@pytest.mark.parametrize("case", REMOVED)
def test_whatever_is_missing_is_named(case, monkeypatch):
    owner, name, instead, message = REMOVED[case]
    monkeypatch.delattr(owner, name)
    if instead is not None:
        monkeypatch.setattr(owner, name, instead, raising=False)
    with pytest.raises(ImportError, match=message):
        compat.check()


def test_all_that_is_missing_is_listed():
    hooks = {
        "transformers:GenerationMixin": ("_sample", "_no_such_method"),
        "transformers:GenerationMixin.generate": ("custom_generate", "no_such_parameter"),
        "transformers.no_such_module": ("function",),
        "transformers:NoSuchClass.__init__": ("attribute",),
    }
    assert list(compat.missing(hooks)) == [
        "transformers.GenerationMixin: _no_such_method",
        "transformers.GenerationMixin.generate: no_such_parameter",
        "transformers.no_such_module: function",
        "transformers.NoSuchClass.__init__: attribute",
    ]


def test_nothing_is_missing_here():
    assert list(compat.missing()) == []
    compat.check()


@pytest.mark.parametrize("version, warns", [("5.24.3", False), ("5.25.0", True), ("5.25.0.dev0", True), ("6.0", True)])
def test_newer_versions_are_warned_of(version, warns, monkeypatch, caplog):
    monkeypatch.setattr(transformers, "__version__", version)
    with caplog.at_level(logging.WARNING, logger="hf_spec_ensemble.compat"):
        compat.check()
    assert (version in caplog.text and 'pip install "transformers>=5.17,<5.25"' in caplog.text) == warns


def test_the_requirement_and_the_tested_versions_agree():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    lowest, newest = compat.TESTED
    assert f"transformers>={lowest}.0,<{compat.above_tested()}" in setup["options"]["install_requires"].split()
    numbers = [[int(part) for part in version.split(".")[:2]] for version in (lowest, transformers.__version__, newest)]
    assert numbers == sorted(numbers)
