"""README and guides: their examples run, their links lead somewhere, and every claim has a test or a command."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from hf_spec_ensemble.demo import FAMILY


ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", *GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
SMALL = ("135M", "draft")  # names of models for which the small embedded one stands in
texts = pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.stem)


def examples(file: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def local_models(blocks: list[str], folder: Path) -> None:
    """Puts an embedded model under every name that the examples load: `org/name` of the Hub, and `./name`."""
    names = re.findall(r'"(?:\./)?([\w-]+/[\w.-]+)"|"\./([\w-]+)"', "\n".join(blocks))
    for i, name in enumerate(dict.fromkeys(hub or local for hub, local in names)):
        (folder / name).parent.mkdir(exist_ok=True)
        stand_in = "draft" if any(part in name for part in SMALL) else ("reader", "solver")[i % 2]
        (folder / name).symlink_to(FAMILY / stand_in, target_is_directory=True)


@pytest.mark.parametrize("file", [file for file in TEXTS if examples(file)], ids=lambda file: file.stem)
def test_examples_run(file, tmp_path, monkeypatch, capsys):
    """In their order, as one program, with embedded models in local folders under the names of the Hub."""
    blocks, namespace = examples(file), {}
    local_models(blocks, tmp_path)
    monkeypatch.chdir(tmp_path)
    with torch.compiler.set_stance("force_eager"):  # compiling is another test's
        for block in blocks:
            block = re.sub(r"max_new_tokens=\d\d+", "max_new_tokens=12", block)
            exec(compile(block, str(file), "exec"), namespace)
    assert ("print(" in "".join(blocks)) <= bool(capsys.readouterr().out.strip())


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_what_measures_can_be_imported(file):
    runpy.run_path(str(file))


def test_the_readme_fits_a_reader_in_a_hurry():
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 150
    assert len(examples(readme)) == 3
    linked = re.findall(r"\]\((docs/[\w.-]+)", readme.read_text(encoding="utf-8"))
    assert {f"docs/{file.name}" for file in GUIDES} <= set(linked), "every guide is linked"


def anchors(file: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@texts
def test_links_lead_somewhere(file):
    links = re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", file.read_text(encoding="utf-8"))
    for path, anchor in links:
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), f"{file.name} links to {path}"
        assert not anchor or anchor in anchors(target), f"{file.name} links to {path}#{anchor}"


def test_every_claim_has_its_test_or_command():
    """`docs/claims.md`: in the last column, tests that exist, files that exist, or commands of this package."""
    rows = re.findall(r"^\| (?!---|claim).*\| (.*) \|$", (ROOT / "docs" / "claims.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 20
    for row in rows:
        shown = re.findall(r"`([^`]+)`", row)
        assert shown, row
        for each in shown:
            path, _, test = each.split(" ")[0].partition("::")
            if path in ("python", "hf-spec-ensemble", "pip"):
                continue
            assert (ROOT / path).exists(), each
            assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), each
