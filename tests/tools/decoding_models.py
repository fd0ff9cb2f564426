"""Small LLaVAs of random weights, of language models that attend in different ways.

model = build("qwen3")
seen = spied(model, monkeypatch)  # counts what is computed from here on
"""

import torch

from config import LLaVAConfig
from model import LLaVA, init_weights

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma": {"head_dim": 16},
    # Most sequences are longer than the window; every other layer has one.
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 11,
        "sliding_window_pattern": 2,
    },
    "phi": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    # It switches behind 20 tokens: some prompts are longer, some answers cross.
    "phi3": {
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 20,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.2, 1.5, 1.3, 1.7, 2.0, 2.0, 3.0],
            "long_factor": [1.5, 4.2, 3.5, 5.3, 7.7, 9.0, 8.0, 8.0],
        },
    },
    "stablelm": {"use_parallel_residual": True},
    "openelm": {
        "model_dim": 64,
        "head_dim": 16,
        "num_query_heads": [4, 8],
        "num_kv_heads": [1, 2],
        "ffn_multipliers": [1.0, 2.0],
        "ffn_dim_divisor": 16,
        "rope_freq_constant": 10000,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
    },
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}


def build(family: str = "llama", **change) -> LLaVA:
    """Return a LLaVA with a language model of that family; change: entries of its config."""
    torch.manual_seed(0)
    model = LLaVA(LLaVAConfig(SIZES | {"model_type": family} | FAMILIES[family] | change, VISION))
    init_weights(model, 0.3)
    return model.eval()


def spied(model: LLaVA, monkeypatch) -> dict[str, int]:
    """Return a count, kept up to date, of views encoded and tokens through the language model."""
    seen = {"images": 0, "tokens": 0}
    encode = model.vision_tower.forward
    decode = model.language_model.model.forward

    def count_images(pixels):
        seen["images"] += len(pixels)
        return encode(pixels)

    def count_tokens(x, *rest):
        seen["tokens"] += len(x)
        return decode(x, *rest)

    monkeypatch.setattr(model.vision_tower, "forward", count_images)
    monkeypatch.setattr(model.language_model.model, "forward", count_tokens)
    return seen
