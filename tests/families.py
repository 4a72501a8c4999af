"""Tiny random models of several architectures, for tests of exactness."""

import copy
import functools
from collections.abc import Callable

import torch
import transformers
from packaging import version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)


VOCAB = 50
PAD, BOS, EOS = 0, 1, 2
SPECIAL = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
SIZE = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, max_position_embeddings=128)

SLIDING_WINDOW = 5  # shorter than the texts of the tests


def _gemma3(layers, vocab, spread):
    config = Gemma3TextConfig(
        vocab_size=vocab,
        num_hidden_layers=layers,
        sliding_window=SLIDING_WINDOW,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2) + ["sliding_attention"] * (layers % 2),
        initializer_range=spread,
        query_pre_attn_scalar=8,
        tie_word_embeddings=False,
        **SIZE,
        **SPECIAL,
    )
    return Gemma3ForCausalLM(config)


def _gpt2(layers, vocab, spread):
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab, n_layer=layers, n_embd=32, n_head=4, n_positions=128, initializer_range=spread, **SPECIAL
        )
    )


def _opt(layers, vocab, spread):
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=vocab,
            num_hidden_layers=layers,
            hidden_size=32,
            ffn_dim=32,
            num_attention_heads=4,
            init_std=spread,
            word_embed_proj_dim=32,
            max_position_embeddings=128,
            **SPECIAL,
        )
    )


def _like_llama(config_class, model_class, **extra):
    def build(layers, vocab, spread):
        config = config_class(
            vocab_size=vocab,
            num_hidden_layers=layers,
            num_key_value_heads=2,
            initializer_range=spread,
            **SIZE,
            **SPECIAL,
            **extra,
        )
        return model_class(config)

    return build


FAMILIES = {
    "llama": _like_llama(LlamaConfig, LlamaForCausalLM),
    "qwen3": _like_llama(Qwen3Config, Qwen3ForCausalLM, head_dim=8),
    "gpt2": _gpt2,
    "opt": _opt,
    "gemma3": _gemma3,
    "mixtral": _like_llama(MixtralConfig, MixtralForCausalLM, num_local_experts=3, num_experts_per_tok=2),
}


def _of(name, config=None, **extra):
    """A builder for `{name}Config`, or another, and `{name}ForCausalLM`."""

    def build(layers, vocab, spread):
        config_class = getattr(transformers, config or f"{name}Config")
        model_class = getattr(transformers, f"{name}ForCausalLM")
        settings = dict(vocab_size=vocab, num_hidden_layers=layers, initializer_range=spread, **SIZE, **SPECIAL)
        settings |= {key: value(layers) if callable(value) else value for key, value in extra.items()}
        return model_class(config_class(**settings))

    return build


def _sliding(layers):
    return (["sliding_attention", "full_attention"] * layers)[:layers]


GROUPED = dict(num_key_value_heads=2)
WINDOWS = dict(sliding_window=SLIDING_WINDOW, **GROUPED)

# Those that are tested less thoroughly than FAMILIES
MORE_FAMILIES = {
    "qwen2": _of("Qwen2", **GROUPED),
    "mistral": _of("Mistral", head_dim=8, **WINDOWS),
    "gemma2": _of("Gemma2", head_dim=8, layer_types=_sliding, final_logit_softcapping=3.0, **WINDOWS),
    "phi3": _of("Phi3", **GROUPED),
    "gpt_neox": _of("GPTNeoX"),
    "bloom": _of("Bloom", n_layer=lambda n: n, n_head=4),
    "falcon": _of("Falcon", new_decoder_architecture=True, num_kv_heads=2),
    "falcon_alibi": _of("Falcon", alibi=True, new_decoder_architecture=False, multi_query=False),
    "stablelm": _of("StableLm", **GROUPED),
    "olmo2": _of("Olmo2", **GROUPED),
    "granite": _of("Granite", logits_scaling=2.0, **GROUPED),
    "qwen3_moe": _of("Qwen3Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, **GROUPED),
    "mpt": _of("Mpt", d_model=32, n_heads=4, n_layers=lambda n: n, max_seq_len=128, use_cache=True),
    "xglm": _of("XGLM", d_model=32, attention_heads=4, ffn_dim=32, num_layers=lambda n: n, init_std=0.3),
    "lfm2": _of("Lfm2", layer_types=lambda n: (["full_attention", "conv"] * n)[:n], conv_L_cache=3, **GROUPED),
    "llama4": _of(
        "Llama4",
        "Llama4TextConfig",
        head_dim=8,
        attention_chunk_size=SLIDING_WINDOW,
        layer_types=lambda n: (["chunked_attention", "full_attention"] * n)[:n],
        intermediate_size_mlp=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        **GROUPED,
    ),
}  # fmt: skip

# The grouped matmul of experts has no float64, and some masks of padding overflow in it
# transformers' own code for these takes no static caches in older versions
NEWER = ("bloom", "llama4") if version.parse(transformers.__version__) < version.parse("5.23") else ()
IN_FLOAT32 = ("mixtral", "qwen3_moe", "llama4", "gemma2", "bloom", "mpt", "xglm")


@functools.cache
def tiny(family: str = "llama", seed: int = 0, layers: int = 2, vocab: int = VOCAB, spread: float = 0.3):
    """A tiny random model: float64, but for some families."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (FAMILIES | MORE_FAMILIES)[family](layers, vocab, spread)
    return model.to(torch.float32 if family in IN_FLOAT32 else torch.float64).eval()


@functools.cache
def _related(family: str, n: int, likeness: float, **kwargs) -> list:
    models = [copy.deepcopy(tiny(family, seed=i, layers=1 if i == n - 1 else 2, **kwargs)) for i in range(n)]
    first = models[0].state_dict()
    with torch.no_grad():
        for model in models[1:]:
            for name, parameter in model.named_parameters():
                parameter.lerp_(first[name], likeness)
    return models


def members(family: str = "llama", n: int = 2, likeness: float = 0.9, **kwargs) -> list:
    """n models of one family, the last being the smallest; the more alike, the more proposals are accepted."""
    return list(_related(family, n, likeness, **kwargs))


def alike(build: Callable[[], PreTrainedModel], n: int = 3, likeness: float = 0.9) -> list:
    """n models of any kind in float64, drawn towards the first."""
    models = []
    for seed in range(n):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models.append(build().to(torch.float64).eval())
        with torch.no_grad():
            for parameter, first in zip(models[-1].parameters(), models[0].parameters()):
                parameter.lerp_(first, likeness)
    return models


def prompts(batch: int, length: int = 7, vocab: int = VOCAB, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts; in a batch, of different lengths and padded on the left."""
    ids = torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(batch):
        padding = (3 * row) % (length - 1) if batch > 1 else 0
        ids[row, :padding], mask[row, :padding] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def tokenizer() -> PreTrainedTokenizerFast:
    """One character a token: the lower-case letters are tokens 3 to 28."""
    names = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTU"]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="U"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
