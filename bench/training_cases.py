"""What both paths of bench/training.py have in common: cases, sizes, rows, weights.

B rows, T tokens of a row. It imports torch only in functions, because the first process of the
benchmark has to stay small.
"""

from __future__ import annotations

import resource
from typing import NamedTuple


class Case(NamedTuple):
    """One comparison."""

    model: str
    tune: str  # of the language model: full or lora
    dtype: str
    rows: int  # of an optimizer step
    budget: int  # tokens of one of our micro-batches
    targets: dict[str, float]  # least "speed" and "share", most memory as "leaner"


# The models are config.json of those on the Hub. The small one is SmolLM-135M with 16 of its 30
# layers and a ViT-S as SigLIP has it.
SMOLLM = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 16, "num_attention_heads": 9, "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
PHI_2 = {
    "model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.4,
    "hidden_act": "gelu_new", "resid_pdrop": 0.0, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}  # fmt: skip
VIT_S = {
    "model_type": "siglip_vision_model", "hidden_size": 384, "intermediate_size": 1536,
    "num_hidden_layers": 9, "num_attention_heads": 6, "image_size": 224, "patch_size": 16,
}  # fmt: skip
SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
    "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
MODELS = {
    "100M": (SMOLLM, VIT_S),
    "Phi-2-SigLIP-3.1B": (PHI_2, SO400M),
    "Qwen2-0.5B-SigLIP": (QWEN2, SO400M),
}
LEANER = 0.6
CASES = {
    "cpu": {
        "100M, full, fp32": Case(
            "100M", "full", "float32", 16, 1024, {"speed": 1.7, "leaner": LEANER}
        ),
        "100M, full, bf16": Case(
            "100M", "full", "bfloat16", 16, 1024, {"speed": 2.0, "leaner": LEANER}
        ),
        "100M, LoRA, fp32": Case(
            "100M", "lora", "float32", 16, 1024, {"speed": 1.8, "leaner": LEANER}
        ),
        "100M, LoRA, bf16": Case(
            "100M", "lora", "bfloat16", 16, 1024, {"speed": 1.8, "leaner": LEANER}
        ),
    },
    "cuda": {
        "Phi-2-SigLIP-3.1B, full": Case(
            "Phi-2-SigLIP-3.1B", "full", "bfloat16", 64, 8192, {"speed": 2.5, "share": 0.57}
        ),
        "Phi-2-SigLIP-3.1B, LoRA": Case(
            "Phi-2-SigLIP-3.1B", "lora", "bfloat16", 64, 8192, {"speed": 2.5}
        ),
        "Qwen2-0.5B-SigLIP, full": Case(
            "Qwen2-0.5B-SigLIP", "full", "bfloat16", 128, 16384, {"speed": 2.5, "share": 0.45}
        ),
    },
}
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4}


def toy(case: Case) -> Case:
    """Return a case of few rows, and without targets."""
    return case._replace(rows=10, budget=512, targets={})


def sizes(case: Case, quick: bool) -> tuple[dict, dict]:
    """Return config.json of the language model and of the encoder; quick: cut to a toy."""
    text, vision = MODELS[case.model]
    if not quick:
        return text, vision

    kv_heads = 4 if text["model_type"] == "phi" else 2
    text = text | {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
    }
    vision = vision | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    return text, vision


def peak_memory(device: str) -> int:
    """Return the peak in bytes, of the process or of the GPU's allocator."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

    import torch

    return torch.cuda.max_memory_allocated()


def make_rows(case: Case, text: dict, vision: dict) -> list:
    """Return the samples of a step. Nine of ten have a picture, which is noise.

    The second half of the text is supervised.
    """
    import torch

    from bench.operations import sample_lengths
    from inputs.sample import Sample
    from packing import IGNORE, IMAGE_TOKEN, Item

    g = torch.Generator().manual_seed(0)
    side = vision["image_size"]
    n = (side // vision["patch_size"]) ** 2 - 1  # both paths drop the first patch
    # The first sixteen lengths hold an unusually long one.
    lengths = sample_lengths(10**6, 0)[16 : 16 + case.rows]

    rows = []
    for i, length in enumerate(lengths):
        ids = torch.randint(text["vocab_size"], (length,), generator=g)  # (T,)
        labels = ids.index_fill(0, torch.arange(length - length // 2), IGNORE)
        images = []
        if i % 10 != 3:
            at = length // 4
            ids = torch.cat([ids[:at], torch.full((n,), IMAGE_TOKEN), ids[at:]])
            labels = torch.cat([labels[:at], torch.full((n,), IGNORE), labels[at:]])
            images = [Item(torch.randn(1, 3, side, side, generator=g))]
        rows.append(Sample(ids, labels, images, i, 0))
    return rows


def fill_by_name(parameters: dict):
    """Give the same names the same random values, whatever the dtype.

    Matrices are Normal(0, 0.02), biases and the adapters' B 0, norms 1.
    """
    import zlib

    import torch

    with torch.no_grad():
        for name, p in parameters.items():
            if name.endswith(("bias", "lora_B.weight")):
                p.fill_(0.0)
            elif p.dim() < 2:
                p.fill_(1.0)
            else:
                seed = zlib.crc32(name.encode())
                g = torch.Generator(p.device).manual_seed(seed)
                p.copy_(torch.randn(p.shape, generator=g, device=p.device) * 0.02)
