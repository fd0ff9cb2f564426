"""Softmax attention, three shapes of it: dense batches, packed rows of samples, one new token against a cache.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j          j <= i where causal, j in the same sample where packed

T tokens, S samples, B batch, H query heads, K key-value heads (H a multiple of K), d head width, L cache slots.
scale is 1/sqrt(d) unless given. All dtypes; the softmax is in float32 inside the fused torch kernels.

Bytes moved, forward: q, k, v and o once each (2 T d (H + K) elements); the T x T scores never reach memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    """Dense attention: q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(1, 2)


def attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None
) -> Tensor:
    """Causal attention inside each sample of a packed row; no token sees another sample.

    q (T, H, d), k and v (T, K, d), cu_seqlens (S+1,) int32 with sample s at [cu_seqlens[s], cu_seqlens[s+1]),
    max_seqlen the longest sample -> (T, H, d).
    """
    tokens, samples = q.size(0), cu_seqlens.numel() - 1
    if samples == 1:
        return attention(q[None], k[None], v[None], True, scale)[0]
    lengths = cu_seqlens.diff()
    if samples * max_seqlen > 2 * tokens:  # very unequal lengths: padding would cost more than a loop
        parts = [t.split(lengths.tolist()) for t in (q, k, v)]
        return torch.cat([attention(*(t[None] for t in s), True, scale)[0] for s in zip(*parts, strict=True)])
    # Pad on the right. Under a causal mask no real token sees the padding behind it, so no mask is needed.
    start = torch.arange(samples, device=q.device) * max_seqlen - cu_seqlens[:-1]
    slot = torch.arange(tokens, device=q.device) + start.repeat_interleave(lengths, output_size=tokens)

    def pad(t: Tensor) -> Tensor:
        rows = t.new_zeros(samples * max_seqlen, *t.shape[1:]).index_copy(0, slot, t)
        return rows.view(samples, max_seqlen, *t.shape[1:])

    return attention(pad(q), pad(k), pad(v), True, scale).flatten(0, 1).index_select(0, slot)


def attention_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None = None) -> Tensor:
    """One query per sequence against a cache: q (B, H, d), k and v (B, K, L, d), lengths (B,) filled slots."""
    seen = torch.arange(k.size(2), device=q.device) < lengths[:, None]
    grouped, q, mask = q.size(1) != k.size(1), q[:, :, None], seen[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)[:, :, 0]
