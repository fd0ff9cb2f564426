"""Packed rows, and the key-value cache that decoding reads.

B sequences, T tokens of a packed row, H heads, K key-value heads, d head width, L cache slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention_decode, attention_packed
from packing import Attend

# -------------------------------------------------------------------------------------------------- the cache


class Cache:
    """Keys and values of B sequences for decoding, (B, K, L, d) per layer, and how many slots each has filled.

    On a CPU they are float32, in which torch attends to them five times faster than in bfloat16.
    """

    def __init__(self, c, rows: int, slots: int, like: Tensor):
        self.slots, dtype = (
            slots,
            like.dtype if like.is_cuda else torch.promote_types(like.dtype, torch.float32),
        )
        shapes = [(rows, layer.kv_heads, slots, c.head_dim) for layer in c.layers]
        self.k, self.v = ([like.new_zeros(s, dtype=dtype) for s in shapes] for _ in "kv")
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)

    def _write(self, layer: int, row: Tensor, at: Tensor, k: Tensor, v: Tensor):
        """k, v (T, K, d) into the slots `at` (T,) of rows (T,)."""
        self.k[layer][row, :, at] = k.to(self.k[layer].dtype)
        self.v[layer][row, :, at] = v.to(self.v[layer].dtype)

    def prefill(
        self, cu_seqlens: Tensor, max_seqlen: int, positions: Tensor, rows: Tensor | None = None
    ) -> Attend:
        """Attention of packed prompts that also fills `rows` (S,) of the cache; the first ones if not given."""
        self.lengths = cu_seqlens.diff().long()
        rows = torch.arange(len(self.lengths), device=positions.device) if rows is None else rows
        row = rows.repeat_interleave(self.lengths)

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer.index, row, positions, k, v)
            return attention_packed(q, k, v, cu_seqlens, max_seqlen)

        return attend

    def extend(
        self, rows: list[int], starts: list[int], lengths: list[int], positions: Tensor
    ) -> Attend:
        """Attention of packed tokens, `lengths` of each, that follow what `rows` hold in their first `starts` slots."""
        row = torch.tensor(
            [row for row, n in zip(rows, lengths, strict=True) for _ in range(n)]
        ).to(positions.device)
        each = [
            (row, start + n, positions.new_ones(n, start + n, dtype=torch.bool).tril(start))
            for row, start, n in zip(rows, starts, lengths, strict=True)
        ]

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer.index, row, positions, k, v)
            k, v, out = self.k[layer.index], self.v[layer.index], []
            for part, (row_, end, mask) in zip(q.to(k.dtype).split(lengths), each, strict=True):
                part = part.transpose(0, 1)[None]
                out.append(
                    _attend(part, k[row_, :, :end][None], v[row_, :, :end][None], mask)[
                        0
                    ].transpose(0, 1)
                )
            return torch.cat(out).to(q.dtype)

        return attend

    def step(self) -> Attend:
        """Attention of one new token of each of the first rows, so many as there are lengths, behind what is there."""
        row, at = torch.arange(len(self.lengths), device=self.lengths.device), self.lengths
        self.lengths = lengths = at + 1
        longest, mask = self.slots, None
        if not at.is_cuda:  # the kernel reads what is filled, plain torch all that it is given
            longest, least = int(lengths.max()), int(lengths.min())
            if least < longest:
                mask = (torch.arange(longest) < lengths[:, None])[:, None, None]
        k, v = ([t[: len(row), :, :longest] for t in tensors] for tensors in (self.k, self.v))

        def attend(layer: nn.Module, q: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
            i = layer.index
            self._write(i, row, at, new_k, new_v)
            wide = q.to(k[i].dtype)
            if q.is_cuda:
                return attention_decode(wide, k[i], v[i], lengths)
            return _attend(wide[:, :, None], k[i], v[i], mask)[:, :, 0].to(q.dtype)

        return attend

    def tensors(self) -> list[Tensor]:
        return self.k + self.v

    def copy(self, source: int, to: int, slots: int):
        """Row `to` begins as row `source` does."""
        for t in self.tensors():
            t[to, :, :slots] = t[source, :, :slots]

    def reorder(self, rows: Tensor):
        """Row i continues what row rows[i] was (beam search)."""
        self.lengths = self.lengths[rows]
        for tensors in (self.k, self.v):
            for i, t in enumerate(tensors):
                tensors[i] = t[rows]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (B, H, T, d), k and v (B, K, L, d), mask of what is seen -> (B, H, T, d)."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1)
    )
