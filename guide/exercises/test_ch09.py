"""Chapter 9: the size of a cache, and the steps of continuous batching."""

import pytest
import torch

from config import Model
from guide.exercises import chosen
from inference.cache import Cache
from inference.engine import Engine, Request
from model import LLaVA

ch = chosen("ch09")

TEXT = {
    "model_type": "gemma3_text",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 16,
}


@pytest.fixture(scope="module")
def model():
    parts = Model(llm_config=TEXT, vision_config=VISION, feature_layer=-1)
    return LLaVA.from_parts(parts, template="plain").eval()


@pytest.mark.parametrize("tokens", [3, 20])
def test_cache_bytes_are_those_of_the_real_cache(model, tokens):
    config = model.language_model.config
    cache = Cache(config, rows=1, slots=tokens, like=torch.zeros(1))
    real = sum(tensor.numel() * tensor.element_size() for tensor in cache.tensors())
    windows = [layer.window for layer in config.layers]
    assert ch.cache_bytes(tokens, windows, kv_heads=1, head_dim=8, bytes_of_number=4) == real


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_refill_steps_are_those_of_the_engine(model, rows):
    lengths = [3, 9, 1, 4, 7, 2]
    requests = []
    for number, length in enumerate(lengths):
        requests.append(Request(torch.tensor([1, 2 + number]), max_new_tokens=length))

    steps = []
    list(Engine(model, rows=rows).serve(requests, steps.append))
    assert ch.refill_steps(lengths, rows) == len(steps)
