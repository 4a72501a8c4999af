r"""
Ensembles from the literature by their names, each with its formula: functions that return what `generate()` is given,
`assistant_model` and `ensemble_config`.

model.generate(**inputs, **recipes.guidance(model, negative))

Prompts are mappings of `input_ids` and perhaps `attention_mask`, as tokenizers return them, for `with_prompt`. The main
model reads the prompt of the call. `settings` are other fields of `EnsembleConfig`, as `speculative` or `trace`.

`l(y | c)` stands for a model's logits after the context c and the new tokens so far. The `"product"` method adds
these, where papers add log-probabilities: the two differ by a constant, which softmax drops.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .config import EnsembleConfig
from .members.prompts import with_prompt


def guidance(
    model: PreTrainedModel, negative: Mapping[str, torch.Tensor], scale: float = 1.5, **settings: Any
) -> dict[str, Any]:
    r"""
    Classifier-free guidance: moves away from the distribution under a negative prompt, such as the prompt's last token.

    r(y) = softmax(l(y | negative) + scale * (l(y | prompt) - l(y | negative)))

    Sanchez et al., "Stay on topic with Classifier-Free Guidance", arXiv 2306.17806. The greedy text is that of
    transformers' own `generate(guidance_scale=scale, negative_prompt_ids=...)`.

    Args:
        model (`PreTrainedModel`): The main model, or another one, which reads the negative prompt.
        negative (`Mapping`): The negative prompt.
        scale (`float`, defaults to 1.5): 1 leaves the model as it is, larger values strengthen the prompt. The paper
            recommends 1.5 for most tasks.

    Returns:
        `dict`: `assistant_model` and `ensemble_config`.

    Example:

    >>> from hf_spec_ensemble import recipes
    >>> from hf_spec_ensemble.demo import FAMILY
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> tokenizer = AutoTokenizer.from_pretrained(FAMILY / "reader")
    >>> model = AutoModelForCausalLM.from_pretrained(FAMILY / "reader")
    >>> prompt = tokenizer("Question: How many pens has Ann?\nAnswer:", return_tensors="pt")
    >>> negative = tokenizer("Answer:", return_tensors="pt")
    >>> recipe = recipes.guidance(model, negative)
    >>> recipe["ensemble_config"].method, recipe["ensemble_config"].weights
    ('product', [1.5, -0.5])
    >>> ids = model.generate(**prompt, **recipe, max_new_tokens=8)
    """
    return _of([with_prompt(model, **negative)], "product", [scale, 1 - scale], settings)


def context_aware(
    model: PreTrainedModel, without_context: Mapping[str, torch.Tensor], alpha: float = 0.5, **settings: Any
) -> dict[str, Any]:
    r"""
    Context-aware decoding: amplifies what a document changes, so that the model trusts it more than its memory.

    r(y) = softmax((1 + alpha) * l(y | context, question) - alpha * l(y | question))

    Shi et al., "Trusting Your Evidence: Hallucinate Less with Context-aware Decoding", arXiv 2305.14739. It is guidance
    with `scale = 1 + alpha`; here the call's prompt has the document.

    Args:
        model (`PreTrainedModel`): The main model.
        without_context (`Mapping`): The prompt without the document.
        alpha (`float`, defaults to 0.5): 0 leaves the model as it is. The paper's is 0.5 for summaries, and 1 where the
            document contradicts what the model knows.

    Returns:
        `dict`: `assistant_model` and `ensemble_config`.

    Example:

    >>> from hf_spec_ensemble import recipes
    >>> from hf_spec_ensemble.demo import FAMILY
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> tokenizer = AutoTokenizer.from_pretrained(FAMILY / "reader")
    >>> model = AutoModelForCausalLM.from_pretrained(FAMILY / "reader")
    >>> whole = tokenizer("Ann has 3 pens. Question: How many pens has Ann?\nAnswer:", return_tensors="pt")
    >>> question = tokenizer("Question: How many pens has Ann?\nAnswer:", return_tensors="pt")
    >>> ids = model.generate(**whole, **recipes.context_aware(model, question, alpha=1.0), max_new_tokens=8)
    """
    return _of([with_prompt(model, **without_context)], "product", [1 + alpha, -alpha], settings)


def replug(
    model: PreTrainedModel,
    prompts: Sequence[Mapping[str, torch.Tensor]],
    scores: Sequence[float],
    temperature: float = 1.0,
    **settings: Any,
) -> dict[str, Any]:
    r"""
    REPLUG: a mixture over retrieved documents, each before the question in a prompt of its own.

    r(y) = sum_d w_d p(y | d, question), with w = softmax(scores / temperature)

    Shi et al., "REPLUG: Retrieval-Augmented Black-Box Language Models", arXiv 2301.12652.

    Args:
        model (`PreTrainedModel`): The main model, which reads the first document in the prompt of the call.
        prompts (`Sequence[Mapping]`): Those with the other documents.
        scores (`Sequence[float]`): The retriever's, the first document's first: one more than there are `prompts`. They
            are the same for all rows of a batch.
        temperature (`float`, defaults to 1.0): Above 0. The lower, the more the best document counts.

    Returns:
        `dict`: `assistant_model` and `ensemble_config`.

    Raises:
        `TypeError`: if `prompts` is one prompt and no list of them.
        `ValueError`: if the number of scores is wrong, or the temperature is not above 0.

    Example:

    >>> from hf_spec_ensemble import recipes
    >>> from hf_spec_ensemble.demo import FAMILY
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> tokenizer = AutoTokenizer.from_pretrained(FAMILY / "reader")
    >>> model = AutoModelForCausalLM.from_pretrained(FAMILY / "reader")
    >>> documents = ["Ann has 3 pens.", "Ann and Tom have 5 pens.", "Tom has 2 pens."]
    >>> texts = [f"{document} Question: How many pens has Ann?\nAnswer:" for document in documents]
    >>> first, *others = [tokenizer(text, return_tensors="pt") for text in texts]
    >>> recipe = recipes.replug(model, others, scores=[0.9, 0.4, 0.1], temperature=0.5)
    >>> [round(weight, 2) for weight in recipe["ensemble_config"].weights]
    [0.64, 0.23, 0.13]
    >>> ids = model.generate(**first, **recipe, max_new_tokens=8)
    """
    others = _each(model, prompts)
    if len(scores) != 1 + len(prompts):
        raise ValueError(
            f"`scores` must have one entry for the main model's document and one for each of the {len(prompts)} "
            f"prompts, but has {len(scores)}."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, but is {temperature!r}.")
    weights = (torch.tensor([float(score) for score in scores], dtype=torch.float64) / temperature).softmax(0).tolist()
    return _of(others, "weighted", weights, settings)


def prompt_ensemble(
    model: PreTrainedModel, prompts: Sequence[Mapping[str, torch.Tensor]], method: str = "weighted", **settings: Any
) -> dict[str, Any]:
    r"""
    One model under several prompts: other words, other examples, another order of examples. Equal weights.

    r(y) = 1/N sum_i p(y | prompt_i), or with `method="product"` r(y) = softmax(1/N sum_i l(y | prompt_i))

    The mixture favours what some prompts make likely, the product what no prompt makes unlikely. Combining the
    distributions of several prompts: Jiang et al., "How Can We Know What Language Models Know?", arXiv 1911.12543.

    Args:
        model (`PreTrainedModel`): The main model, which reads the first prompt as that of the call.
        prompts (`Sequence[Mapping]`): The others.
        method (`str`, defaults to `"weighted"`): Or `"product"`, or any other method of `EnsembleConfig`.

    Returns:
        `dict`: `assistant_model` and `ensemble_config`.

    Raises:
        `TypeError`: if `prompts` is one prompt and no list of them.

    Example:

    >>> from hf_spec_ensemble import recipes
    >>> from hf_spec_ensemble.demo import FAMILY
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> tokenizer = AutoTokenizer.from_pretrained(FAMILY / "reader")
    >>> model = AutoModelForCausalLM.from_pretrained(FAMILY / "reader")
    >>> texts = ["Question: 3 + 4?\nAnswer:", "3 plus 4 is", "3 + 4 ="]
    >>> first, *others = [tokenizer(text, return_tensors="pt") for text in texts]
    >>> ids = model.generate(**first, **recipes.prompt_ensemble(model, others, method="product"), max_new_tokens=8)
    """
    return _of(_each(model, prompts), method, None, settings)


def proxy_tuning(
    tuned: PreTrainedModel, untuned: PreTrainedModel, scale: float = 1.0, **settings: Any
) -> dict[str, Any]:
    r"""
    Proxy tuning: adds to a model what tuning changed in a small one. All read the prompt of the call.

    r(y) = softmax(l_model(y) + scale * (l_tuned(y) - l_untuned(y)))

    Liu et al., "Tuning Language Models by Proxy", arXiv 2401.08565.

    Args:
        tuned (`PreTrainedModel`), untuned (`PreTrainedModel`): The small model, after and before its tuning. To give
            the tuned one alone a chat template, pass `with_prompt(tuned, ...)`.
        scale (`float`, defaults to 1.0): As in the paper.

    Returns:
        `dict`: `assistant_model` and `ensemble_config`.

    Example:

    >>> from hf_spec_ensemble import recipes
    >>> from hf_spec_ensemble.demo import FAMILY
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> tokenizer = AutoTokenizer.from_pretrained(FAMILY / "reader")
    >>> names = ["reader", "solver", "draft"]
    >>> model, tuned, untuned = [AutoModelForCausalLM.from_pretrained(FAMILY / name) for name in names]
    >>> prompt = tokenizer("Question: How many pens has Ann?\nAnswer:", return_tensors="pt")
    >>> recipe = recipes.proxy_tuning(tuned, untuned)
    >>> recipe["ensemble_config"].weights
    [1.0, 1.0, -1.0]
    >>> ids = model.generate(**prompt, **recipe, max_new_tokens=8)
    """
    return _of([tuned, untuned], "product", [1.0, scale, -scale], settings)


def _each(model: PreTrainedModel, prompts: Sequence[Mapping[str, torch.Tensor]]) -> list:
    """The model under each prompt."""
    if isinstance(prompts, Mapping):
        raise TypeError("`prompts` must be a list of prompts, but is one prompt: give `[prompt]`.")
    return [with_prompt(model, **prompt) for prompt in prompts]


def _of(members: list, method: str, weights: list[float] | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What `generate()` is given."""
    return {"assistant_model": members, "ensemble_config": EnsembleConfig(method, weights, **settings)}
