"""Chapter 4's exercises are done when these tests pass."""

import pytest
import torch

from guide.exercises import chosen
from kernels.attention import attention_packed
from model import LanguageModel

ch = chosen("ch04")


@pytest.mark.parametrize("tied", [True, False])
def test_count_of_parameters(tied):
    with torch.device("meta"):
        llama = LanguageModel.from_hf(
            {
                "model_type": "llama",
                "vocab_size": 101,
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "tie_word_embeddings": tied,
            }
        )
    expected = sum(p.numel() for p in llama.parameters())
    assert ch.count_parameters(101, 48, 80, 3, 6, 2, tied) == expected


@pytest.mark.parametrize("window", [1, 3, 100])
def test_windowed_attention(window):
    torch.manual_seed(0)
    q = torch.randn(9, 4, 8)
    k = torch.randn(9, 2, 8)
    v = torch.randn(9, 2, 8)
    ends = torch.tensor([0, 9], dtype=torch.int32)
    expected = attention_packed(q, k, v, ends, 9, window=window)
    torch.testing.assert_close(ch.windowed_attention(q, k, v, window), expected)
