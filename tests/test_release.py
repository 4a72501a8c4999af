"""What a release consists of says the same everywhere."""

import configparser
import re
from pathlib import Path

import pytest
import yaml

import hf_spec_ensemble as se


ROOT = Path(__file__).parent.parent


def test_the_changelog_and_the_citation_are_of_this_version():
    newest, date = re.findall(r"^## \[(.+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest == cited["version"] == se.__version__ and date == cited["date-released"]
    assert cited["cff-version"] == "1.2.0" and cited["title"] == se.__name__ and cited["authors"] and cited["message"]


@pytest.mark.parametrize("extra", ["notebooks", "bench", "lm_eval"])
def test_what_the_tests_need_of_an_extra_is_at_least_what_that_asks_for(extra):
    """The tests run notebooks and the benchmark: they must not do so with what users do not get."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {name: set(text.split()) for name, text in setup["options.extras_require"].items()}
    lacking = extras[extra] - extras["test"]
    assert all(each.startswith("ipywidgets") for each in lacking), lacking


def test_notebooks_get_accelerate():
    assert "accelerate" in (ROOT / "setup.cfg").read_text().split("notebooks =")[1].split("test =")[0]
