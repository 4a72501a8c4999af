"""
The ensemble by its formulas: every member reads the whole prefix of every row, alone and without a cache, for every
token. Uses nothing of the package but `EnsembleConfig`, to say which formula is meant.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from families import EOS, PAD

from hf_spec_ensemble import EnsembleConfig


WEIGHTS = {2: [0.6, 0.4], 3: [0.5, 0.3, 0.2], 4: [0.4, 0.3, 0.2, 0.1]}
SIGNED = {2: [1.5, -0.5], 3: [1.0, 0.7, -0.7], 4: [1.0, 0.5, -0.5, 0.2]}


@dataclass
class Method:
    """How `EnsembleConfig` names a method, and log r of `logits` [N, B, V] with `process`: [B, V] -> [B, V]."""

    config: Callable[[int], dict]
    log_r: Callable[[torch.Tensor, Callable], torch.Tensor]
    members: tuple[int, ...] = (2, 3, 4)


def _sum(weights, terms):
    return sum(w * t for w, t in zip(weights[len(terms)], terms))


def _contrast(expert, amateur, mu, alpha):
    scores = expert - mu * amateur
    plausible = expert.softmax(-1) >= alpha * expert.softmax(-1).amax(-1, keepdim=True)
    return torch.where(plausible, scores, -torch.inf)


def root_mean_square(probs):
    return probs.square().mean(0).sqrt()


METHODS = {
    "weighted": Method(
        lambda n: dict(method="weighted", weights=WEIGHTS[n]),
        lambda logits, process: _sum(WEIGHTS, [process(x).softmax(-1) for x in logits]).log(),
    ),
    "weighted logits": Method(
        lambda n: dict(method="weighted", weights=WEIGHTS[n], combine_on="logits"),
        lambda logits, process: _sum(WEIGHTS, [process(x) for x in logits]).log_softmax(-1),
    ),
    "weighted raw logits": Method(
        lambda n: dict(method="weighted", weights=WEIGHTS[n], combine_on="raw_logits"),
        lambda logits, process: process(_sum(WEIGHTS, list(logits))).log_softmax(-1),
    ),
    "product": Method(
        lambda n: dict(method="product", weights=SIGNED[n]),
        lambda logits, process: process(_sum(SIGNED, list(logits))).log_softmax(-1),
    ),
    "product probs": Method(
        lambda n: dict(method="product", weights=WEIGHTS[n], combine_on="probs"),
        lambda logits, process: _sum(WEIGHTS, [process(x).log_softmax(-1) for x in logits]).log_softmax(-1),
    ),
    "contrastive": Method(
        lambda n: dict(method="contrastive", contrast=0.4, plausibility=0.1),
        lambda logits, process: process(_contrast(*logits, 0.4, 0.1)).log_softmax(-1),
        members=(2,),
    ),
    "contrastive logits": Method(
        lambda n: dict(method="contrastive", contrast=0.4, plausibility=0.1, combine_on="logits"),
        lambda logits, process: _contrast(*[process(x) for x in logits], 0.4, 0.1).log_softmax(-1),
        members=(2,),
    ),
    "callable": Method(
        lambda n: dict(method=root_mean_square, combine_on="probs"),
        lambda logits, process: (
            root_mean_square(torch.stack([process(x).softmax(-1) for x in logits])).log().log_softmax(-1)
        ),
    ),
    "callable raw logits": Method(
        lambda n: dict(method=lambda logits: logits.amax(0)),
        lambda logits, process: process(logits.amax(0)).log_softmax(-1),
    ),
}  # fmt: skip


def config_of(name: str, n: int, **kwargs) -> EnsembleConfig:
    return EnsembleConfig(**METHODS[name].config(n), **kwargs)


@torch.no_grad()
def next_log_probs(models, ids, mask, name: str | Method, processors=(), texts=None) -> torch.Tensor:
    """
    log r [B, V] of the token that follows `ids` [B, T], where `mask` [B, T] is 0 on left padding. Processors see `ids`;
    models too, unless `texts` has other ids and masks for each of them.
    """

    def alone(model, row, visible):
        return model(row[visible.bool()][None], use_cache=False).logits[0, -1]

    def process(scores):
        scores = scores.clone()
        for processor in processors:
            scores = processor(ids, scores)
        return scores

    texts = texts or [(ids, mask)] * len(models)
    logits = torch.stack([torch.stack([alone(m, *row) for row in zip(*text)]) for m, text in zip(models, texts)])
    method = name if isinstance(name, Method) else METHODS[name]
    return method.log_r(logits, process)


def greedy(
    models, inputs, name: str | Method, max_new_tokens: int, processors=(), eos=(EOS,), prompts=()
) -> tuple[torch.Tensor, list]:
    """
    Text [B, T] and log r [B, V] of every new token; finished rows are padded. `prompts` are those of the models' own,
    `None` or missing for `inputs`.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    own = [prompt or inputs for prompt, _ in itertools.zip_longest(prompts, models)]
    texts = [[x.expand(len(ids), -1) for x in (p["input_ids"], p["attention_mask"])] for p in own]
    done = torch.zeros(len(ids), dtype=torch.bool)
    scores = []
    while not done.all() and len(scores) < max_new_tokens:
        scores.append(next_log_probs(models, ids, mask, name, processors, texts))
        token = torch.where(done, PAD, scores[-1].argmax(-1))
        ids, mask = _longer(ids, mask, token[:, None])
        texts = [_longer(*text, token[:, None]) for text in texts]
        done = done | torch.isin(token, torch.tensor(eos))
    return ids, scores


def _longer(ids, mask, token):
    return torch.cat([ids, token], dim=1), torch.cat([mask, torch.ones_like(token)], dim=1)


@torch.no_grad()
def continuation_probs(models, prompt, name: str, length: int, processors=(), prompts=()) -> torch.Tensor:
    """
    The probability of every continuation `[V] * length` of one prompt [T]; after EOS there is only PAD. `prompts` [T_i]
    are those of the models' own, `None` or missing for `prompt`.
    """
    vocab = models[0].config.vocab_size
    own = [prompt if one is None else one for one, _ in itertools.zip_longest(prompts, models)]
    prefixes, probs = prompt[None], torch.ones(1, dtype=torch.float64)
    for _ in range(length):
        new = prefixes[:, len(prompt) :]
        texts = [torch.cat([one.expand(len(new), -1), new], dim=1) for one in own]
        logits = torch.stack([m(text, use_cache=False).logits[:, -1] for m, text in zip(models, texts)])

        def process(scores, prefixes=prefixes):
            for processor in processors:
                scores = processor(prefixes, scores)
            return scores

        following = METHODS[name].log_r(logits, process).exp()  # [prefixes, V]
        ended = (prefixes[:, len(prompt) :] == EOS).any(1)
        following[ended] = torch.nn.functional.one_hot(torch.tensor(PAD), vocab).to(following)
        probs = (probs[:, None] * following).flatten()
        tokens = torch.arange(vocab).repeat(len(prefixes))[:, None]
        prefixes = torch.cat([prefixes.repeat_interleave(vocab, 0), tokens], dim=1)
    return probs.view([vocab] * length)
