"""The key-value cache of decoding: what attention needs to know of the tokens before.

    cache = Cache(lm.config, rows=B, slots=L, like=hidden_states)
    packed = pack_rows(prompts)
    hidden_states = lm.model(x, packed.positions, cache.prefill(packed))
    hidden_states = lm.model(y, cache.lengths, cache.step())  # one more token of each sequence

Row b of the cache belongs to sequence b, and its slot t holds the key and the value of token t.
`prefill`, `extend` and `step` return the attention function (packing.Attend) that the language
model calls in each of its layers. It writes the keys and values of the new tokens into the cache
and attends to what is in it. They differ in what is new:

    prefill   whole prompts, packed; nothing is in the cache yet
    extend    the rest of prompts whose beginning is in the cache
    step      one token of each sequence

Read `step` first: it is the shortest path through the cache. `prefill` and `extend` do the same
for many tokens at once. Below them are the operations on rows that the engine's prefix cache and
beam search need. `free_memory` says how much room there is for a cache.

B sequences, S prompts, T tokens of a packed row, H heads, K key-value heads, d head width,
L cache slots.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention_decode, attention_packed
from packing import Attend, PackedRow, send


class Cache:
    """Keys and values of every layer, and the number of slots that each sequence has filled.

    k[i] and v[i] (B, K, L, d) are those of layer i. Layers may differ in K.
    """

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
            # Zeros and not `empty`: masked slots get probability 0, and 0 times a NaN that the
            # memory happened to hold would be NaN.
            shape = (rows, layer.kv_heads, slots, config.head_dim)
            self.k.append(like.new_zeros(shape, dtype=dtype))
            self.v.append(like.new_zeros(shape, dtype=dtype))

        # How many slots each sequence that is being decoded has filled. These sequences are in the
        # first rows. `prefill` sets it and `step` adds 1. Whoever goes on with other sequences than
        # before sets it anew.
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)

    # -- attention -----------------------------------------------------------------------------

    def prefill(self, packed: PackedRow, rows: Tensor | None = None) -> Attend:
        """Return the attention of S packed prompts, which fills the cache from slot 0.

        rows (S,): the cache row of each prompt, by default the first S rows.
        """
        lengths = packed.cu_seqlens.diff().long()
        self.lengths = lengths
        if rows is None:
            rows = torch.arange(len(lengths), device=lengths.device)
        tokens = len(packed.input_ids)
        row_of_token = rows.repeat_interleave(lengths, output_size=tokens)  # (T,)

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Nothing older is in these rows, so the new keys and values are all there is to see.
            self._write(layer.index, row_of_token, packed.positions, k, v)
            return attention_packed(q, k, v, packed.cu_seqlens, packed.max_seqlen)

        return attend

    def extend(
        self, rows: list[int], starts: list[int], lengths: list[int], positions: Tensor
    ) -> Attend:
        """Return the attention of packed tokens that continue sequences in the cache.

        Sequence s is in row rows[s], of which the first starts[s] slots are filled. lengths[s] new
        tokens follow; they attend to those slots and, causally, to each other. positions (T,) are
        the slots of all new tokens, T = sum of lengths.
        """
        row_of_token = []
        for row, length in zip(rows, lengths, strict=True):
            row_of_token += [row] * length
        row_of_token = send(torch.tensor(row_of_token), positions.device)  # (T,)

        # New token i of a sequence sees the `start` slots that were filled, and new tokens 0 to i.
        masks = []
        for start, length in zip(starts, lengths, strict=True):
            mask = positions.new_ones(length, start + length, dtype=torch.bool)
            masks.append(mask.tril(start))

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer.index, row_of_token, positions, k, v)
            k_cache = self.k[layer.index]
            v_cache = self.v[layer.index]
            q_of_each = q.to(k_cache.dtype).split(lengths)

            # The sequences have different lengths, so attention takes one after the other.
            outputs = []
            for row, mask, q_new in zip(rows, masks, q_of_each, strict=True):
                end = mask.size(1)
                q_one = q_new.transpose(0, 1)[None]  # (1, H, length, d)
                k_one = k_cache[row, :, :end][None]  # (1, K, end, d)
                v_one = v_cache[row, :, :end][None]
                out = _attend(q_one, k_one, v_one, mask)
                outputs.append(out[0].transpose(0, 1))  # (length, H, d)

            return torch.cat(outputs).to(q.dtype)  # (T, H, d)

        return attend

    def step(self) -> Attend:
        """Return the attention of one new token for each of the B sequences in `lengths`.

        The token of sequence b goes into slot lengths[b] of row b and attends to all slots up to
        it. `lengths` counts it from now on.
        """
        # A new tensor, since callers pass the old one to the model as the tokens' positions.
        slot_of_token = self.lengths
        lengths = slot_of_token + 1
        self.lengths = lengths

        sequences = len(lengths)
        rows = torch.arange(sequences, device=lengths.device)

        # The kernel reads only what is filled in each row. Plain torch reads all that it is given,
        # so it gets the slots up to the longest row, with a mask if the rows differ.
        used = self.slots
        mask = None
        if not lengths.is_cuda:
            used = int(lengths.max())
            if int(lengths.min()) < used:
                is_filled = torch.arange(used) < lengths[:, None]  # (B, used)
                mask = is_filled[:, None, None]  # (B, 1, 1, used), for all heads

        # Views, made here once and not by every layer.
        k_used = [k[:sequences, :, :used] for k in self.k]
        v_used = [v[:sequences, :, :used] for v in self.v]

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer.index, rows, slot_of_token, k, v)
            k_layer = k_used[layer.index]  # (B, K, used, d)
            v_layer = v_used[layer.index]
            wide_q = q.to(k_layer.dtype)  # (B, H, d)

            if q.is_cuda:
                return attention_decode(wide_q, k_layer, v_layer, lengths)

            one_token = wide_q[:, :, None]  # (B, H, 1, d)
            out = _attend(one_token, k_layer, v_layer, mask)
            return out[:, :, 0].to(q.dtype)

        return attend

    def _write(self, layer: int, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor):
        """Put k and v (T, K, d) of T tokens into the given rows (T,) and slots (T,) of a layer."""
        k_cache = self.k[layer]
        v_cache = self.v[layer]
        k_cache[rows, :, slots] = k.to(k_cache.dtype)
        v_cache[rows, :, slots] = v.to(v_cache.dtype)

    # -- rows ----------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """Return the keys of all layers, then the values."""
        return self.k + self.v

    def copy_row(self, source: int, target: int, slots: int):
        """Copy the first slots of one row to another."""
        for tensor in self.tensors():
            tensor[target, :, :slots] = tensor[source, :, :slots]

    def grow(self, slots: int):
        """Make room for more slots in each row. What the rows hold stays."""
        # One tensor after the other, so that only one is in memory twice.
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                rows, kv_heads, _, head_dim = old.shape
                tensors[layer] = old.new_zeros(rows, kv_heads, slots, head_dim)
                tensors[layer][:, :, : old.size(2)] = old
        self.slots = slots

    def reorder(self, rows: Tensor):
        """Let row i hold what row rows[i] held. The number of rows becomes that of `rows`."""
        self.lengths = self.lengths[rows]

        # One layer after the other, so that only one layer is in memory twice.
        for layer in range(len(self.k)):
            self.k[layer] = self.k[layer][rows]
            self.v[layer] = self.v[layer][rows]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention of q (B, H, T, d) to k and v (B, K, L, d) where the mask is true."""
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def free_memory(device: str) -> int:
    """Return how many bytes of a device's memory can be had."""
    if device != "cpu":
        free, _ = torch.cuda.mem_get_info(device)

        # What torch has taken from the device and does not use is free, too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    # As Linux counts it, caches of files included. A container may be allowed less.
    bounds = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                bounds.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        bounds.append(int(limit.read_text()) - int((group / "memory.current").read_text()))

    # Other systems do not say; the default number of rows was always taken there.
    return min(bounds, default=2**60)
