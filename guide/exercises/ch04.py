"""Exercises of chapter 4: the size of a Llama, and attention with a window."""

from torch import Tensor


def count_parameters(
    vocab: int,
    width: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    tied: bool,
) -> int:
    """Return the number of parameters of a Llama without biases; a head is width / heads wide.

    There are: the embeddings, the lm_head unless it is tied to them, the last norm; and in each
    layer two norms, the linears q, k, v and o of attention, and gate, up and down of the MLP.
    """
    raise NotImplementedError


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Return causal attention in which a query sees only the last `window` keys, (T, H, d).

    q (T, H, d), k and v (T, K, d) of one sample; K divides H, and query head h uses key head
    h // (H / K). A query's own key is one of the `window`. Scores are divided by sqrt(d).
    """
    raise NotImplementedError
