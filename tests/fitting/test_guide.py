"""The guide's example runs."""

import re
from pathlib import Path


GUIDE = Path(__file__).parents[2] / "docs" / "fitting.md"


def test_the_example_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    exec(block, {})
    assert "nats per token" in capsys.readouterr().out and (tmp_path / "weights.png").exists()
