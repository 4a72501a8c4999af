"""The README's examples run, in their order."""

import re
from pathlib import Path

import torch


README = Path(__file__).parent.parent / "README.md"


def test_the_examples_of_the_readme_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    with torch.compiler.set_stance("force_eager"):  # compiling is another test's
        for block in blocks:
            exec(block, namespace)
    assert namespace["ids"].shape[1] > namespace["inputs"]["input_ids"].shape[1]
    assert "[" in capsys.readouterr().out
