"""The key-value cache of decoding: what attention needs of the tokens that came before.

    cache = Cache(lm.config, rows=B, slots=L, like=hidden_states)
    hidden_states = lm.model(x, positions, cache.prefill(cu_seqlens, max_seqlen, positions))
    hidden_states = lm.model(x, cache.lengths, cache.step())  # one more token of each sequence

Row b of the cache belongs to sequence b, and its slot t holds the key and the value of token t.
`prefill`, `extend` and `step` return the attention function (packing.Attend) that the language
model calls in each of its layers. It writes the keys and values of the new tokens into the cache
and attends to what is in it. They differ in what is new:

    prefill   whole prompts, packed; nothing is in the cache yet
    extend    the rest of prompts whose beginning is in the cache
    step      one token of each sequence

B sequences, T tokens of a packed row, H heads, K key-value heads, d head width, L cache slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention_decode, attention_packed
from packing import Attend


class Cache:
    """Keys and values (B, K, L, d) of every layer, and the number of slots each row has filled."""

    def __init__(self, config, rows: int, slots: int, like: Tensor):
        """Allocate the cache of a language model's config on the device and in the dtype of `like`.

        On a CPU it is float32 at least, in which torch attends five times faster than in bfloat16.
        """
        dtype = like.dtype
        if not like.is_cuda:
            dtype = torch.promote_types(dtype, torch.float32)

        self.slots = slots
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        for layer in config.layers:
            shape = (rows, layer.kv_heads, slots, config.head_dim)
            self.k.append(like.new_zeros(shape, dtype=dtype))
            self.v.append(like.new_zeros(shape, dtype=dtype))

        # Of the sequences that are decoded, which are the first rows: `prefill` sets it, `step`
        # counts on, and whoever decodes other rows than before sets it anew.
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)

    # -- attention -----------------------------------------------------------------------------

    def prefill(
        self, cu_seqlens: Tensor, max_seqlen: int, positions: Tensor, rows: Tensor | None = None
    ) -> Attend:
        """Return the attention of packed prompts, which fills the cache from slot 0.

        cu_seqlens (S + 1,), max_seqlen and positions (T,) describe the packed row of S prompts.
        rows (S,): the cache row of each prompt, by default the first S rows.
        """
        self.lengths = cu_seqlens.diff().long()
        if rows is None:
            rows = torch.arange(len(self.lengths), device=positions.device)
        row_of_token = rows.repeat_interleave(self.lengths)  # (T,)

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer.index, row_of_token, positions, k, v)
            return attention_packed(q, k, v, cu_seqlens, max_seqlen)

        return attend

    def extend(
        self, rows: list[int], starts: list[int], lengths: list[int], positions: Tensor
    ) -> Attend:
        """Return the attention of packed tokens that continue sequences in the cache.

        Sequence s is in row rows[s], of which the first starts[s] slots are filled. lengths[s] new
        tokens follow; they attend to those slots and, causally, to each other. positions (T,) are
        the slots of all new tokens, T = sum of lengths.
        """
        row_of_token = torch.tensor(rows).repeat_interleave(torch.tensor(lengths))
        row_of_token = row_of_token.to(positions.device)  # (T,)

        masks = []
        for start, length in zip(starts, lengths, strict=True):
            everything = positions.new_ones(length, start + length, dtype=torch.bool)
            masks.append(everything.tril(start))  # token i sees what was there and tokens 0..i

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer.index, row_of_token, positions, k, v)
            k_cache = self.k[layer.index]
            v_cache = self.v[layer.index]

            # The sequences have different lengths, so each is attended to on its own.
            outputs = []
            q_of_each = q.to(k_cache.dtype).split(lengths)
            for row, mask, q_part in zip(rows, masks, q_of_each, strict=True):
                end = mask.size(1)
                out = _attend(
                    q_part.transpose(0, 1)[None],  # (1, H, length, d)
                    k_cache[row, :, :end][None],  # (1, K, end, d)
                    v_cache[row, :, :end][None],
                    mask,
                )
                outputs.append(out[0].transpose(0, 1))  # (length, H, d)
            return torch.cat(outputs).to(q.dtype)  # (T, H, d)

        return attend

    def step(self) -> Attend:
        """Return the attention of one new token for each of the B sequences in `lengths`.

        The token of sequence b goes into slot lengths[b] of row b and attends to all slots up to
        it. `lengths` counts it from now on.
        """
        slot_of_token = self.lengths
        self.lengths = lengths = slot_of_token + 1
        rows = torch.arange(len(lengths), device=lengths.device)

        # The kernel reads of each row what is filled. Plain torch reads all that it is given, so
        # it gets the slots up to the longest row, with a mask if the rows differ.
        used = self.slots
        mask = None
        if not lengths.is_cuda:
            used = int(lengths.max())
            if int(lengths.min()) < used:
                mask = torch.arange(used) < lengths[:, None]  # (B, used)
                mask = mask[:, None, None]  # (B, 1, 1, used), for all heads

        # Views, made here once and not by every layer.
        k_cache = [k[: len(rows), :, :used] for k in self.k]
        v_cache = [v[: len(rows), :, :used] for v in self.v]

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer.index, rows, slot_of_token, k, v)
            k_used = k_cache[layer.index]
            v_used = v_cache[layer.index]

            wide_q = q.to(k_used.dtype)  # (B, H, d)
            if q.is_cuda:
                return attention_decode(wide_q, k_used, v_used, lengths)
            out = _attend(wide_q[:, :, None], k_used, v_used, mask)  # (B, H, 1, d)
            return out[:, :, 0].to(q.dtype)

        return attend

    def _write(self, layer: int, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor):
        """Put k and v (T, K, d) of T tokens into the given rows (T,) and slots (T,) of a layer."""
        self.k[layer][rows, :, slots] = k.to(self.k[layer].dtype)
        self.v[layer][rows, :, slots] = v.to(self.v[layer].dtype)

    # -- rows ----------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """Return the keys of all layers, then the values."""
        return self.k + self.v

    def copy_row(self, source: int, target: int, slots: int):
        """Copy the first slots of one row to another."""
        for tensor in self.tensors():
            tensor[target, :, :slots] = tensor[source, :, :slots]

    def copy_from(self, other: Cache):
        """Copy all of a cache of as many rows and no more slots."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine[:, :, : other.slots] = theirs

    def reorder(self, rows: Tensor):
        """Let row i hold what row rows[i] held; beam search also changes the number of rows so."""
        self.lengths = self.lengths[rows]
        for tensors in (self.k, self.v):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[rows]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention of q (B, H, T, d) to k and v (B, K, L, d) where the mask is true."""
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
