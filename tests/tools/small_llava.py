"""Small random LLaVAs of several families, to be written in one layout and read from another."""

import torch

from config import LLaVAConfig
from model import LLaVA, init_weights

GOLDEN = (
    "gemma-siglip-qformer",
    "openelm-dinov2-mlp3x_gelu",
    "phi-siglip-mlp2x_gelu",
    "qwen2-clip-mlp-cls_patch",
    "qwen2-siglip-linear",
    "stablelm-clip-resampler",
    "tinyllama-clip-mlp2x_gelu",
    "tinyllama-mof-mof_mlp",
)
SIDE = 12
TEXT = {
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 14},
    "gemma3_text": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 14,
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,  # all prompts are longer
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0},
        },
        "pad_token_id": None,
    },
    "phi": {"num_attention_heads": 4, "partial_rotary_factor": 0.5},
    "mistral": {"num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": None},
    "smollm3": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "no_rope_layers": [0, 1],
        "pad_token_id": None,
    },
    "phi3": {
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 8,  # all prompts are longer
        "pad_token_id": None,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1234.5,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.2, 1.5],
            "long_factor": [1.5, 4.2, 3.5],
        },
    },
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": SIDE,
}
CLIP_SIDE = {
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_center_crop": True,
}

# A NaFlex: its processor, and the settings that go with it.
NAFLEX_PATCHES = {"patch_size": 4, "max_num_patches": 12}
NAFLEX = {
    "tower": "siglip2",
    "image_mode": "native",
    "feature_select": "cls_patch",
    "feature_layer": -1,
}


def small(
    family="llama",
    tower="clip",
    vocab: int = 97,
    seed: int = 0,
    edge: int = SIDE,
    sizes: dict | None = None,
    vision: dict | None = None,
    processor: dict | None = None,
    **config,
) -> LLaVA:
    """Return a model of random weights.

    sizes, vision, processor: fields of its language model, encoder and image processor.
    """
    text = {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        **TEXT[family],
        **(sizes or {}),
    }
    encoder = {"model_type": f"{tower}_vision_model", **VISION, **(vision or {})}
    if tower == "clip":
        preprocessor = CLIP_SIDE | {"size": {"shortest_edge": edge}}
    elif tower == "siglip2":
        preprocessor = NAFLEX_PATCHES
    else:
        preprocessor = {"size": {"height": SIDE, "width": SIDE}}
    preprocessor = preprocessor | (processor or {})
    torch.manual_seed(seed)
    model = LLaVA(LLaVAConfig(text, encoder, preprocessor, **config)).eval()
    init_weights(model, 0.2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and name != "language_model.lm_head.bias":
                p.add_(0.2 * torch.randn_like(p))
    return model


def biased(model):
    model.language_model.lm_head.bias.data[3] = 0.1
    return model
