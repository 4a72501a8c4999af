"""
A tiny random model of every class that transformers' mappings of causal and of sequence-to-sequence language models
name: what the sweep runs over. Owns how configurations are made small; runs no ensemble.
"""

import copy
import dataclasses
from dataclasses import dataclass

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)


VOCAB = 50
PAD, BOS, EOS = 0, 1, 2
SIZE = 32
LAYERS = 2
LIKENESS = 0.8
UNLIKE = 0.2  # of those whose members agree on nearly everything
AGREEING = (
    "bigbird_pegasus", "biogpt", "falcon", "gemma2", "gemma3", "gemma3_text", "gemma4_text", "gemma4_unified_text",
    "gpt_neox_japanese", "minicpm3", "openai-gpt", "pegasus", "pegasus_x", "t5gemma", "t5gemma2", "xglm", "xlm",
)  # fmt: skip
WINDOW = 8  # shorter than the texts
POSITIONS = 256

# What every configuration that has settings of these names is given; by value
SMALL = [
    (
        SIZE,
        """
        hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim input_embedding_size
        output_embedding_size intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff ffn_hidden_size
        dim_ff dff intermediate_size_mlp feed_forward_size d_inner dense_intermediate_size d_embed
        out_hidden_size prefix_dense_intermediate_size lru_width attention_hidden_size d_in backbone_hidden_size
        mlp_hidden_size projection_dim hidden_dim adapter_in_dim adapter_out_dim adapter_input_size
        audio_hidden_size mm_embed_dim output_proj_dims downsample_hidden_size hidden_size_global
        ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels router_hidden_size
        cross_attention_hidden_size output_dim emb_dim text_hidden_size projector_hidden_size
        """,
    ),
    (
        16,
        """
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size block_ffn_dim intermediate_channel
        """,
    ),
    (
        LAYERS,
        """
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers depth encoder_num_hidden_layers speech_encoder_layers t2u_encoder_layers
        t2u_decoder_layers
        """,
    ),
    (
        4,
        """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts
        n_routed_experts moe_num_experts num_attention_heads_per_layer swa_num_attention_heads
        speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads
        """,
    ),
    (
        2,
        """
        num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts
        swa_num_key_value_heads linear_num_key_heads linear_num_value_heads index_n_heads type_vocab_size
        """,
    ),
    (
        8,
        """
        head_dim attention_head_dim attention_head_size kv_channels d_kv v_head_dim qk_rope_head_dim
        qk_nope_head_dim q_lora_rank kv_lora_rank o_lora_rank swa_head_dim linear_key_head_dim
        linear_value_head_dim index_head_dim index_topk mamba_d_state mamba_chunk_size mamba_d_head
        mamba_n_heads state_size mamba_num_heads mamba_head_dim ssm_state_size chunk_size rotary_dim
        linear_head_dim global_head_dim hidden_size_per_layer_input d_rel
        """,
    ),
    (
        1,
        """
        n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers
        mamba_n_groups n_groups max_window_layers moe_num_shared_experts num_expert_group
        """,
    ),
    (
        WINDOW,
        """
        sliding_window attention_chunk_size local_attention window_size sliding_window_size
        attention_window_size attention_window keep_window_size block_size
        """,
    ),
    (
        POSITIONS,
        """
        max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length max_seqlen
        original_max_position_embeddings
        """,
    ),
    (64, "max_source_positions"),
    (
        VOCAB,
        """
        vocab_size vocab_size_per_layer_input unpadded_vocab_size src_vocab_size tgt_vocab_size
        decoder_vocab_size output_vocab_size t2u_vocab_size audio_vocab_size n_words
        """,
    ),
    (PAD, "pad_token_id pad_index pad_token"),
    (BOS, "bos_token_id decoder_start_token_id bos_index"),
    (EOS, "eos_token_id eos_index"),
    (VOCAB - 1, "blank_token_id"),
    (None, "forced_eos_token_id forced_bos_token_id suppress_tokens begin_suppress_tokens"),
    (True, "use_cache is_decoder use_sliding_window"),
    (False, "use_mamba_kernels use_associative_scan use_mambapy"),
    (0.3, "initializer_range init_std"),
    (4.0, "initializer_factor"),
    (
        0.0,
        """
        dropout hidden_dropout_prob attention_probs_dropout_prob layerdrop encoder_layerdrop decoder_layerdrop
        """,
    ),
]
SETTINGS = [(name, value) for value, names in SMALL for name in names.split()]

# By model type, of a configuration or of a part of one
ALTERNATE = ["sliding_attention", "full_attention"]
SHARED = dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=ALTERNATE * 2)
SPECIAL: dict[str, dict] = {
    "bamba": dict(attn_layer_indices=[1]),
    "blt": dict(
        num_hidden_layers=6,  # for its cache: of all its parts
        encoder_hash_byte_group_vocab=40,
        encoder_hash_byte_group_size=[2, 3],
    ),
    "cohere_compass_text": dict(
        layer_types=ALTERNATE,
        rope_parameters={
            kind: dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]) for kind in ALTERNATE
        },
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=16, moe_top_k=2),
    ),
    "dots3_note_text": dict(
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_q_lora_rank=8,
        swa_kv_lora_rank=8,
        swa_head_dim=16,
        swa_qk_nope_head_dim=8,
        swa_v_head_dim=8,
    ),
    "encoder-decoder": dict(encoder=dict(is_decoder=False), decoder=dict(add_cross_attention=True)),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n_text": dict(laurel_rank=8, activation_sparsity_pattern=None, intermediate_size=32, **SHARED),
    "gemma4_text": SHARED,
    "gemma4_unified_text": SHARED,
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "gemma4_assistant": dict(
        text_config=dict(
            hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_kv_shared_layers=4, num_hidden_layers=4
        )
    ),
    "hrm_text": dict(H_cycles=2, L_cycles=2),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4),
    "laguna": dict(num_attention_heads_per_layer=[4, 4]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "vibevoice_acoustic_tokenizer_encoder": dict(
        num_filters=2, depths=[1, 1], downsampling_ratios=[2], layer_scale_init_value=0.1
    ),
    "longcat_flash": dict(zero_expert_num=2),
    "mamba2": dict(num_heads=8),
    "qwen4_exp_text": dict(
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
        hc_lowrank=8,
    ),
    "reformer": dict(
        axial_pos_shape=[16, 16],
        axial_pos_embds_dim=[16, 16],
        attn_layers=["local", "lsh"],
        num_buckets=2,
        hash_seed=0,
    ),
    "roc_bert": dict(pronunciation_vocab_size=20, shape_vocab_size=20, pronunciation_embed_dim=8, shape_embed_dim=8),
    "zamba": dict(
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        attention_hidden_size=64,
        attention_head_dim=16,
        num_key_value_heads=4,
    ),
    "zamba2": dict(num_key_value_heads=4, attention_head_dim=16, attention_hidden_size=64),
    "xmod": dict(default_language="en_XX"),
    "zaya": dict(num_experts_per_tok=1),
}

LAYER_COUNTS = next(names.split() for _, names in SMALL if "num_hidden_layers" in names.split())
LAYER_LISTS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "indexer_types")


@dataclass(frozen=True)
class Entry:
    """One line of transformers' mappings."""

    name: str
    model_type: str
    class_name: str

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return CONFIG_MAPPING[self.model_type]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.class_name)


def entries() -> list[Entry]:
    """Of both mappings; a model type that is in both with two classes has two."""
    found = {}
    for mapping, kind in (
        (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ""),
        (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "-seq2seq"),
    ):
        for model_type, names in mapping.items():
            for class_name in [names] if isinstance(names, str) else names:
                if (model_type, class_name) not in found:
                    taken = any(model_type == entry.name for entry in found.values())
                    found[model_type, class_name] = Entry(model_type + kind * taken, model_type, class_name)
    return list(found.values())


def _names(config_class) -> dict:
    """The settings of a configuration, and their defaults as far as there are."""
    try:
        return dict(vars(config_class()))
    except Exception:
        return {f.name: f.default for f in dataclasses.fields(config_class)}


def _part(config_class, name: str, default) -> type[PreTrainedConfig] | None:
    """The class of a part of a configuration; none where it has none by default."""
    if isinstance(default, PreTrainedConfig):
        return type(default)
    part = config_class.sub_configs[name]
    if isinstance(part, type) and issubclass(part, PreTrainedConfig):
        return part
    usual = getattr(config_class, "sub_configs_defaults", {}).get(name)
    return CONFIG_MAPPING[usual.model_type] if getattr(usual, "model_type", None) else None


def small(config_class: type[PreTrainedConfig], **settings) -> PreTrainedConfig:
    """A tiny configuration. `settings` are taken as they are; of a part's, by the name of the part, a dict."""
    special = copy.deepcopy(SPECIAL.get(config_class.model_type, {})) | settings
    defaults = _names(config_class)
    chosen = {name: value for name, value in SETTINGS if name in defaults}
    for name in config_class.sub_configs:
        if isinstance(special.get(name, {}), dict) and (part := _part(config_class, name, defaults.get(name))):
            chosen[name] = small(part, **special.pop(name, {}))
    if "kv_lora_rank" in defaults:
        chosen["num_key_value_heads"] = 4  # multi-head latent attention
    kinds = [list(dict.fromkeys(defaults[name])) for name in LAYER_LISTS if isinstance(defaults.get(name), list)]
    layers = max([LAYERS, *map(len, kinds)])
    chosen |= {name: layers for name in chosen if name in LAYER_COUNTS}
    for name in LAYER_LISTS:
        if isinstance(defaults.get(name), list):
            distinct = list(dict.fromkeys(defaults[name]))
            chosen[name] = (distinct * layers)[:layers]
    return config_class(**chosen | special)


def build(entry: Entry, seed: int, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model."""
    config = small(entry.config_class)
    model_class = entry.model_class
    if not isinstance(config, model_class.config_class):  # as AutoModelForCausalLM does
        parts = [getattr(config, name) for name in config.sub_configs]
        config = next((part for part in parts if isinstance(part, model_class.config_class)), config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class._from_config(config, experts_implementation="eager")
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.03)  # of what is made of zeros or ones, too
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None, decoder_start_token_id=BOS
    )
    return model.to(dtype).eval()


def members(entry: Entry, dtype: torch.dtype = torch.float64) -> list[PreTrainedModel]:
    """Two, so alike that some proposals are accepted and some rejected."""
    one, two = (build(entry, seed, dtype) for seed in range(2))
    with torch.no_grad():
        for parameter, first in zip(two.parameters(), one.parameters()):
            parameter.lerp_(first, UNLIKE if entry.model_type in AGREEING else LIKENESS)
    return [one, two]
