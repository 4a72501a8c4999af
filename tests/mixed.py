"""
Members of different families: tokenizers trained here, tiny models for them, and the ensemble over the union of their
tokens by its definition. Of the package the oracle uses nothing.
"""

import copy
import functools
import itertools
import json

import torch
from families import tiny
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast


CORPUS = [
    "Question: Ann has three boxes with twelve pens each. How many pens has she?\nAnswer: she has thirty six pens.\n\n",
    "Déjà vu à la carte; naïve façade. Größe, Straße, über. Привет, мир! €5 or £4? 数学の問題です。 🙂🙃 ok",
    "def answer(question):\n    return question + 12 * 3  # the answer to the question\n",
] * 8
PLAIN = [CORPUS[0], CORPUS[2], "5 € or 7 €, 🙂🙂🙂\n"] * 8
TEXTS = ["The answer to the question is", "Ann has 5 €", "Größe and 🙂"]

# What the random models mostly say, where their tokenizers have it; bytes of a character among it
FAVOURED = [
    b" question",
    b" the",
    b"answer",
    b"\xe2\x82",
    b"\xac",
    " €".encode(),
    "🙂".encode(),
    b"\xf0\x9f",
    b"\n",
    b"q",
]


def byte_level(size: int, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def sentencepiece(size: int, **special: str) -> PreTrainedTokenizerFast:
    """As Gemma's: spaces are U+2581, unknown characters are written as bytes."""
    trained = Tokenizer(kinds.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    few = trainers.BpeTrainer(vocab_size=size - 256 - 4, show_progress=False)
    trained.train_from_iterator(PLAIN, few)  # other characters of CORPUS are left to bytes
    model = json.loads(trained.to_str())["model"]
    names = [*special.values(), *[f"<0x{byte:02X}>" for byte in range(256)]]
    names += sorted(model["vocab"], key=model["vocab"].get)
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    known = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(kinds.BPE(known, merges, byte_fallback=True, unk_token=special["unk_token"], fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:4]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@functools.cache
def tokenizers() -> list[PreTrainedTokenizerFast]:
    """
    A byte-level BPE of 300 tokens, another of 400 with other ids, and one like SentencePiece's. Each has a name of its
    own for the end of a text, and one's name for it is another's padding.
    """
    return [
        byte_level(300, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"),
        byte_level(400, eos_token="</s>", bos_token="<bos>", pad_token="<eos>"),
        sentencepiece(460, eos_token="<end>", pad_token="<pad>", bos_token="<s>", unk_token="<unk>"),
    ]


@functools.cache
def _family() -> list:
    made = []
    for i, tokenizer in enumerate(tokenizers()):
        model = copy.deepcopy(tiny("llama", seed=i, vocab=len(tokenizer), layers=1))
        for name in ("eos", "pad", "bos"):
            setattr(model.generation_config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        bias = torch.zeros(len(tokenizer), dtype=torch.float64)
        for token, string in enumerate(strings(tokenizer)):
            if string in FAVOURED:
                bias[token] = 7.0
        bias[tokenizer.eos_token_id] = 5.0
        model.lm_head.bias = torch.nn.Parameter(bias)
        made.append(model)
    return made


def family(order=(0, 1, 2)) -> tuple[list, list]:
    """Models and tokenizers, in this order."""
    return [_family()[i] for i in order], [tokenizers()[i] for i in order]


def saved(order, folder) -> list[str]:
    """Folders in this one, each with a model and its tokenizer, in this order."""
    names = []
    for i, (model, tokenizer) in enumerate(zip(*family(order))):
        names.append(str(folder / f"member{i}"))
        model.save_pretrained(names[-1])
        tokenizer.save_pretrained(names[-1])
    return names


# --- The definition -----------------------------------------------------------------------------------------------


@functools.cache
def strings(tokenizer) -> list[bytes | None]:
    """What tokens stand for; `None` for special ones. Found by decoding them, by the `tokenizers` library alone."""
    backend, found = tokenizer.backend_tokenizer, []
    byte_level = type(backend.decoder) is decoders.ByteLevel
    visible = [c for c in range(256) if c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    hidden = [b for b in range(256) if b not in visible]
    of_character = {chr(c): c for c in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}
    for i in range(len(tokenizer)):
        token = backend.id_to_token(i)
        if i in tokenizer.all_special_ids:
            found.append(None)
        elif byte_level:
            found.append(bytes(of_character[c] for c in token))
        elif token.startswith("<0x"):
            found.append(bytes([int(token[3:5], 16)]))
        else:
            found.append(token.replace("▁", " ").encode())
    return found


class Definition:
    """
    The ensemble over the union. A token of U is a string, or what a special token is for: one that only other members
    have is left out.

    Args:
        models, tokenizers (lists of N): The members.
        mix: From the members' probabilities `[N, W]` to r `[W]`.
        common (`bool`): Whether strings that some member lacks are left out, and the rest renormalised.
    """

    def __init__(self, models, tokenizers, mix, common=False):
        self.models, self.tokenizers, self.mix = models, tokenizers, mix
        self.own = [self._own(tokenizer) for tokenizer in tokenizers]
        if tokenizers[0].unk_token_id is not None:
            self.own[0]["unk"] = [tokenizers[0].unk_token_id]
        every = list(dict.fromkeys(itertools.chain(*self.own)))
        self.names = [name for name in every if all(name in own for own in self.own)] if common else every
        self.place = {name: u for u, name in enumerate(self.names)}

    @staticmethod
    def _own(tokenizer) -> dict:
        own = {role: [getattr(tokenizer, f"{role}_token_id")] for role in ("eos", "pad", "bos")}
        for token, string in enumerate(strings(tokenizer)):
            if string:
                own.setdefault(string, []).append(token)
        return own

    def reads(self, i: int, name) -> list[int]:
        """What member i reads for a token of U."""
        own, tokenizer = self.own[i], self.tokenizers[i]
        if name in own:
            named = [t for t in own[name] if not tokenizer.convert_ids_to_tokens(t).startswith("<0x")]
            return [(named or own[name])[0]]
        try:
            return tokenizer.encode(name.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            if type(tokenizer.backend_tokenizer.decoder) is not decoders.ByteLevel:
                found = []  # the longest first, since there are no characters that it could read
                while name:
                    end = next(end for end in range(len(name), 0, -1) if name[:end] in own)
                    found, name = [*found, own[name[:end]][-1]], name[end:]
                return found
            table = {string: tokenizer.convert_ids_to_tokens(t[0]) for string, t in own.items() if len(string) == 1}
            spelled = "".join(table[bytes([byte])] for byte in name)
            return [token.id for token in tokenizer.backend_tokenizer.model.tokenize(spelled)]

    @torch.no_grad()
    def following(self, prompts: list[list[int]], texts: list[tuple]) -> torch.Tensor:
        """r `[texts, W]` after each text, whose tokens are named, behind one prompt in every member's own tokens."""
        given = []
        for i, model in enumerate(self.models):
            rows = [prompts[i] + [t for name in text for t in self.reads(i, name)] for text in texts]
            probs = torch.zeros(len(texts), len(self.names), dtype=torch.float64)
            logits = torch.empty(len(texts), len(self.tokenizers[i]), dtype=torch.float64)
            for length in {len(row) for row in rows}:
                where = [k for k, row in enumerate(rows) if len(row) == length]
                logits[where] = model(torch.tensor([rows[k] for k in where]), use_cache=False).logits[:, -1]
            own = logits.softmax(-1)
            for name, tokens in self.own[i].items():
                if name in self.place:
                    probs[:, self.place[name]] = own[:, tokens].sum(-1)
            given.append(probs / probs.sum(-1, keepdim=True))  # special tokens that others lack are no part of it
        return self.mix(torch.stack(given))

    def written(self, text: tuple) -> list[int]:
        return [t for name in text for t in self.reads(0, name)]

    def prompts(self, text: str) -> list[list[int]]:
        return [tokenizer(text)["input_ids"] for tokenizer in self.tokenizers]

    def greedy_names(self, text: str, max_new_tokens: int) -> tuple:
        """The most probable text after a prompt, one token after the other."""
        prompts, names = self.prompts(text), ()
        while len(names) < max_new_tokens and "eos" not in names:
            names += (self.names[int(self.following(prompts, [names])[0].argmax())],)
        return names

    def greedy(self, text: str, max_new_tokens: int) -> list[int]:
        """The same in the main model's ids."""
        return self.written(self.greedy_names(text, max_new_tokens))

    def likely(self, text: str, length: int, least: float) -> dict[tuple[int, ...], float]:
        """Texts of so many tokens, or ended, in the main model's ids, with probabilities; the rarest are left out."""
        prompts, going, found = self.prompts(text), {(): 1.0}, {}
        for _ in range(length):
            names = list(going)
            r, probs = self.following(prompts, names), going
            going = {}
            for row, name in zip(r, names):
                for u in (row * probs[name] > least / 30).nonzero()[:, 0].tolist():
                    longer = (*name, self.names[u])
                    (found if longer[-1] == "eos" else going)[longer] = float(row[u]) * probs[name]
        totals: dict[tuple[int, ...], float] = {}
        for names, p in (found | going).items():
            key = tuple(self.written(names))
            totals[key] = totals.get(key, 0.0) + p
        return totals
