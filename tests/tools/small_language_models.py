"""Small random language models: configurations of every family, and models to put adapters on.

`filled` makes parameters random where a fresh model has zeros and ones, which would hide mistakes.
"""

import dataclasses

import torch

import lora
from config import LLaVAConfig, LoRA
from model import LanguageModel, LLaVA

SIZES = {
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 94,
    "num_hidden_layers": 3,
    "initializer_range": 0.1,
}
# model_type -> two configurations or more; each differs from SIZES in what it names.
CONFIGS = {
    "llama": (
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
        {"num_attention_heads": 3, "head_dim": 18, "rope_theta": 1234.5, "attention_bias": True},
        # Llama-3.1 and 3.2. Some pairs are fast, some slow and some between.
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {
            "num_attention_heads": 5,
            "head_dim": 14,
            "mlp_bias": True,
            "rope_scaling": {
                "type": "llama3",
                "factor": 32.5,
                "low_freq_factor": 0.7,
                "high_freq_factor": 3.5,
                "original_max_position_embeddings": 41,
            },
            "rope_theta": 777.7,
        },
    ),
    "mistral": (
        {"num_attention_heads": 5, "num_key_value_heads": 1, "sliding_window": None},
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 18,
            "sliding_window": 4,
            "max_position_embeddings": 77,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 3e5, "factor": 2.5},
        },
    ),
    "smollm3": (
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "num_hidden_layers": 5,
            "pad_token_id": None,
        },
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "no_rope_layers": [0, 1, 0, 1],
            "rope_theta": 5e6,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
    ),
    # Fused projections and LongRoPE. The first switches to other divisors behind 12 tokens.
    "phi3": (
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "max_position_embeddings": 96,
            "original_max_position_embeddings": 12,
            "sliding_window": 96,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.7],
                "long_factor": [1.0, 2.1, 3.3, 4.2, 7.5, 9.7],
            },
            "pad_token_id": None,
        },
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.6,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 432.1,
                "attention_factor": 1.19,
                "short_factor": [1.0, 2.5, 3],
                "long_factor": [5.0, 6.5, 7],
            },
            "pad_token_id": None,
        },
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "sliding_window": 7,
            "pad_token_id": None,
        },
    ),
    "qwen2": (
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
        {"num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    "qwen3": (
        {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 14, "rope_theta": 1e6},
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "tie_word_embeddings": True,
        },
    ),
    "gemma": (
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 26},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "hidden_size": 50},
    ),
    # Windows of which 17 tokens are several. The second is in the fields of older files.
    "gemma3_text": (
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 26,
            "query_pre_attn_scalar": 11,
            "sliding_window": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 3e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 123.4},
            },
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "hidden_size": 52,
            "num_hidden_layers": 5,
            "query_pre_attn_scalar": 30,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "rope_theta": 5e4,
            "rope_local_base_freq": 321.5,
            "rope_scaling": {"rope_type": "linear", "factor": 2.5},
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "stablelm": (
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "partial_rotary_factor": 0.5,
            "use_qkv_bias": True,
        },
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.4,
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "tie_word_embeddings": True,
        },
    ),
    "phi": (
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "partial_rotary_factor": 0.5,
            "layer_norm_eps": 1e-4,
        },
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.4,
            "qk_layernorm": True,
        },
    ),
}

PLAIN = LoRA(r=4, alpha=6.0, dropout=0.0)
KINDS = {
    "lora": PLAIN,
    "rslora": dataclasses.replace(PLAIN, rslora=True),
    "dora": dataclasses.replace(PLAIN, dora=True),
}
IDS = torch.randint(1, 131, (2, 11), generator=torch.Generator().manual_seed(2))
LLAMA = {"model_type": "llama", **SIZES, "num_attention_heads": 6, "num_key_value_heads": 2}
OPENELM = {
    "model_type": "openelm",
    "vocab_size": 131,
    "model_dim": 64,
    "head_dim": 16,
    "ffn_dim_divisor": 16,
    "ffn_multipliers": [1.0, 1.5],
    "num_query_heads": [4, 6],
    "num_kv_heads": [2, 3],
    "rope_freq_constant": 10000,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
}


@torch.no_grad()
def filled(module, seed: int = 0):
    """Make all that trains random: no adapter is zero, no norm one, no magnitude its weight's."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.requires_grad and p.dim() == 1:
            p.copy_(p + 0.2 * torch.randn(p.shape, generator=g))
        elif p.requires_grad:
            p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return module


def small(hf=LLAMA, seed=0):
    """Return a frozen random language model."""
    torch.manual_seed(seed)
    lm = LanguageModel.from_hf(hf)
    return filled(lm).requires_grad_(False)


def adapted(hf=LLAMA, options=PLAIN):
    """Return one with adapters of which none is zero; only they train."""
    lm = small(hf)
    lora.apply(lm, options)
    return filled(lm, 1)


def llava(connector: str):
    """Return a random LLaVA around the language model `LLAMA`, of which all trains."""
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 16,
        "image_size": 32,
    }
    torch.manual_seed(0)
    return filled(LLaVA(LLaVAConfig(LLAMA, vision, {}, connector)))
