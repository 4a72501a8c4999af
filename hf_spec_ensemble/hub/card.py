"""The model card of an ensemble. Names that others chose are escaped."""

import json
import re
from collections.abc import Sequence

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig

from ..config import AUTO, EnsembleConfig
from ..decoding.drafter import chosen_drafter
from .references import MemberReference, Source, entry_of, read_entry


USER = "USER"  # whose repository it will be, where that is not known


def ensemble_card(
    members: Sequence[Source],
    config: EnsembleConfig,
    drafter: Source | None = AUTO,
    repo_id: str = "USER/ensemble",
    speedup: str | None = None,
    licence: str | None = None,
) -> ModelCard:
    """
    The model card of an ensemble: metadata for the Hub, members, formula, examples that run as they are. Members that
    are folders are named without their paths, `USER/NAME` in the examples, and the card says that they are missing.

    Args:
        members, config, drafter: As for `save_ensemble`.
        repo_id (`str`): Where the ensemble is, for the examples.
        speedup (`str`, *optional*): What was measured, and on what: `"1.7x on GSM8K (bfloat16, two CPU cores)"`.
        licence (`str`, *optional*): The Hub's name of one, as `"apache-2.0"`.

    Returns:
        `huggingface_hub.ModelCard`.

    Example:

    >>> from hf_spec_ensemble import EnsembleConfig
    >>> from hf_spec_ensemble.hub import ensemble_card

    >>> card = ensemble_card(["org/base", "org/math"], EnsembleConfig(weights=[0.7, 0.3]), repo_id="me/both")
    >>> card.data.base_model, card.data.tags
    (['org/base', 'org/math'], ['custom_generate', 'ensemble', 'speculative-decoding'])
    """
    config, references, drafting = read_entry(entry_of(members, config, drafter))
    shown = config.for_members(len(references), drafters=int(chosen_drafter(drafter, config) is not None))
    rows = [
        f"| l_{i} | {_shown(each)} | {_markdown(each.revision or '')} | {each.dtype or 'as saved'} |"
        for i, each in enumerate(references, 1)
    ]
    if drafting not in (None, AUTO):
        name = _shown(drafting) if isinstance(drafting, MemberReference) else f"`{drafting}`"
        rows.append(f"| drafter, proposes only | {name} | | |")
    data = ModelCardData(
        base_model=[each.name for each in references if not each.is_local] or None,
        library_name="transformers",
        license=licence and _text(licence),
        tags=["custom_generate", "ensemble", "speculative-decoding"],
        pipeline_tag="text-generation",
    )
    body = CARD.format(
        title=_markdown(repo_id.rstrip("/").split("/")[-1]),
        formula=_formula(shown),
        members="\n".join(rows),
        repo=_literal(repo_id),
        missing=_missing([*references, *([drafting] if isinstance(drafting, MemberReference) else [])]),
        main=_literal(_on_the_hub(references[0])),
        revision=f", revision={_literal(references[0].revision)}" if references[0].revision else "",
        dtype=_literal(references[0].dtype or "auto"),
        kind=_auto_class(references[0]),
        speed=f"\n## Speed\n\nOver the same ensemble decoded token by token: {speedup}\n" if speedup else "",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def _auto_class(main: MemberReference) -> str:
    """The Auto class to load the main model with, as far as this is known without a network."""
    try:
        config = AutoConfig.from_pretrained(main.name, revision=main.revision or "main", local_files_only=True)
    except (OSError, ValueError):
        return "AutoModelForCausalLM"
    return "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"


def on_the_hub(name: str) -> str:
    """What a repository of this name is called by those who do not know yet whose it will be."""
    return name if "/" in name else f"{USER}/{name}"


def _on_the_hub(reference: MemberReference) -> str:
    return on_the_hub(reference.short_name) if reference.is_local else reference.name


def _missing(references: list[MemberReference]) -> str:
    local = [_markdown(each.short_name) for each in references if each.is_local]
    if not local:
        return ""
    return (
        f"\n> **Not on the Hub yet:** {', '.join(local)}. They are folders of the machine that wrote this card. "
        "Push these models, and write the ensemble anew with their names.\n"
    )


def _shown(reference: MemberReference) -> str:
    name = reference.short_name if reference.is_local else reference.name
    shown = _markdown(name)
    return shown if reference.is_local else f"[{shown}](https://huggingface.co/{name})"


def _markdown(text: str) -> str:
    """Text that shows as it is in a line or a table of Markdown; underscores inside words need no escape."""
    return re.sub(r"[\\`*\[\]<>|&#~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", " ".join(_text(text).split()))


def _literal(text: str) -> str:
    """Text as a literal of Python, in double quotes."""
    return _text(json.dumps(text, ensure_ascii=False))


def _text(name: str) -> str:
    """A name as text: names of files may contain bytes that are not text."""
    return name.encode("utf-8", "backslashreplace").decode()


def _formula(config: EnsembleConfig) -> str:
    if config.method == "contrastive":
        cut = f"; tokens under {config.plausibility:g} of the expert's best excluded" if config.plausibility else ""
        return f"softmax(l_1 - {config.contrast:g} * l_2){cut}"
    terms = " + ".join(f"{weight:.4g} * TERM_{i}" for i, weight in enumerate(config.weights, 1)).replace("+ -", "- ")
    if config.method == "weighted" and config.combine_on == "probs":
        return re.sub(r"TERM_(\d+)", r"softmax(l_\1)", terms)
    return f"softmax({terms.replace('TERM', 'l')})"


CARD = """
# {title}

An ensemble of language models. With `l_i` the members' logits, each token is drawn from

    {formula}

| | member | revision | dtype |
|---|---|---|---|
{members}
{missing}
It is decoded by `hf_spec_ensemble`, speculatively ([Fu et al., 2025](https://arxiv.org/abs/2502.01662)): members take
turns to propose tokens and to verify them against this distribution, so that the text has just the distribution, and
greedily is just the text, of the ensemble decoded token by token, with fewer forward passes.

## Use

    pip install hf_spec_ensemble

With `generate()` of transformers. This runs `custom_generate/generate.py` of this repository, ten lines; the other
members are loaded at the first call:

```python
from transformers import AutoTokenizer, {kind}

tokenizer = AutoTokenizer.from_pretrained({main}{revision})
model = {kind}.from_pretrained({main}, dtype={dtype}{revision})
inputs = tokenizer("Question: What is 2 + 3?\\nAnswer:", return_tensors="pt")
ids = model.generate(**inputs, custom_generate={repo}, trust_remote_code=True, max_new_tokens=32)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

Or without remote code:

```python
from hf_spec_ensemble import load_ensemble

ensemble = load_ensemble({repo})
inputs = ensemble.tokenizer("Question: What is 2 + 3?\\nAnswer:", return_tensors="pt")
ids = ensemble.generate(**inputs, max_new_tokens=32)
print(ensemble.tokenizer.decode(ids[0], skip_special_tokens=True))
```
{speed}"""
