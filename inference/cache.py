"""The key-value cache of decoding: what attention needs to know of the tokens before.

    cache = Cache(lm.config, rows=B, slots=L, like=hidden_states)
    packed = pack_rows(prompts)
    hidden_states = lm.model(x, packed.positions, cache.prefill(packed))
    hidden_states = lm.model(y, cache.lengths, cache.step())  # one more token of each sequence

Row b of the cache belongs to sequence b, and its slot t holds the key and the value of token t. A
layer with a window of W tokens has only W slots, and token t is in slot t mod W: it takes the place
of token t - W, which nobody sees any more.

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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention_decode, attention_packed, window_mask
from packing import Attend, PackedRow, send


def slots_of(window: int | None, slots: int) -> int:
    """Return how many of a cache's slots a row has in a layer: no more than the layer's window."""
    if window is None:
        return slots
    return min(window, slots)


class NewTokens(NamedTuple):
    """One new token of each sequence, in the layers of one window."""

    slots: Tensor  # (B,) where its key and value go
    lengths: Tensor  # (B,) how many slots it sees, from the first on
    used: int  # slots that the longest row uses
    mask: Tensor | None  # (B, 1, 1, used), where plain torch needs one


class Cache:
    """Keys and values of every layer, and the number of slots that each sequence has filled.

    k[i] and v[i] (B, K, L, d) are those of layer i. Layers may differ in K and, where some have a
    window, in L.
    """

    def __init__(self, config, rows: int, slots: int, like: Tensor):
        """Allocate the cache of a language model's config on the device and in the dtype of `like`.

        On a CPU it is float32 at least, in which torch attends five times faster than in bfloat16.
        """
        dtype = like.dtype
        if not like.is_cuda:
            dtype = torch.promote_types(dtype, torch.float32)

        self.slots = slots
        self.windows = [layer.window for layer in config.layers]
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        for layer in config.layers:
            # Zeros and not `empty`: masked slots get probability 0, and 0 times a NaN that the
            # memory happened to hold would be NaN.
            shape = (rows, layer.kv_heads, slots_of(layer.window, slots), config.head_dim)
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

        # For the layers of each window, which token of the row each slot of a prompt gets, (S, n).
        tokens_of_slots = {}
        for window in self.windows_of_layers():
            slots = min(slots_of(window, self.slots), packed.max_seqlen)
            tokens_of_slots[window] = last_tokens(packed.cu_seqlens, slots)

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer.window is None:
                self._write(layer.index, row_of_token, packed.positions, k, v)
            else:
                # One write for each slot, and not for each token: several tokens have the same one.
                tokens = tokens_of_slots[layer.window]
                slots = tokens.size(1)
                for cache, new in ((self.k, k), (self.v, v)):
                    kept = new[tokens].transpose(1, 2)  # (S, K, n, d)
                    cache[layer.index][rows, :, :slots] = kept.to(cache[layer.index].dtype)

            # Nothing older is in these rows, so the new keys and values are all there is to see.
            return attention_packed(
                q, k, v, packed.cu_seqlens, packed.max_seqlen, layer.scale, layer.window
            )

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

        windows = {}
        for window in self.windows_of_layers():
            windows[window] = self._extend_window(
                window, rows, starts, lengths, positions, row_of_token
            )

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer.window is not None:
                return windows[layer.window](layer, q, k, v)

            self._write(layer.index, row_of_token, positions, k, v)
            k_cache = self.k[layer.index]
            v_cache = self.v[layer.index]
            q_of_each = q.to(k_cache.dtype).split(lengths)

            # The sequences have different lengths, so attention takes one after the other.
            outputs = []
            for row, mask, q_new in zip(rows, masks, q_of_each, strict=True):
                end = mask.size(1)
                k_one = k_cache[row, :, :end]
                v_one = v_cache[row, :, :end]
                outputs.append(_attend_one(q_new, k_one, v_one, mask, layer.scale))
            return torch.cat(outputs).to(q.dtype)  # (T, H, d)

        return attend

    def _extend_window(
        self,
        window: int,
        rows: list[int],
        starts: list[int],
        lengths: list[int],
        positions: Tensor,
        row_of_token: Tensor,
    ) -> Attend:
        """Return what `extend` does in the layers of one window.

        A new token takes the slot of an old one that others of the new tokens still see. So keys
        and values of the past are taken out before the new ones are written.
        """
        slots = slots_of(window, self.slots)
        past_slots = []  # of each sequence, where the tokens are that its first new token sees
        masks = []
        kept = []  # the new tokens that later ones may see: the last of each sequence
        first = 0
        for start, length in zip(starts, lengths, strict=True):
            seen = min(start, window - 1)
            past = torch.arange(start - seen, start, device=positions.device)
            past_slots.append(past % slots)
            masks.append(window_mask(length, seen + length, window, positions.device))
            kept += range(first + max(0, length - slots), first + length)
            first += length
        kept = send(torch.tensor(kept), positions.device)
        kept_rows = row_of_token[kept]
        kept_slots = positions[kept] % slots

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_cache = self.k[layer.index]
            v_cache = self.v[layer.index]
            q_of_each = q.to(k_cache.dtype).split(lengths)
            k_of_each = k.to(k_cache.dtype).transpose(0, 1).split(lengths, 1)
            v_of_each = v.to(v_cache.dtype).transpose(0, 1).split(lengths, 1)

            outputs = []
            for i, row in enumerate(rows):
                k_past = k_cache[row][:, past_slots[i]]  # (K, seen, d)
                v_past = v_cache[row][:, past_slots[i]]
                k_one = torch.cat([k_past, k_of_each[i]], 1)
                v_one = torch.cat([v_past, v_of_each[i]], 1)
                outputs.append(_attend_one(q_of_each[i], k_one, v_one, masks[i], layer.scale))

            self._write(layer.index, kept_rows, kept_slots, k[kept], v[kept])
            return torch.cat(outputs).to(q.dtype)  # (T, H, d)

        return attend

    def step(self) -> Attend:
        """Return the attention of one new token for each of the B sequences in `lengths`.

        The token of sequence b goes into slot lengths[b] of row b and attends to all slots up to
        it. `lengths` counts it from now on.
        """
        # A new tensor, since callers pass the old one to the model as the tokens' positions.
        positions = self.lengths
        self.lengths = positions + 1

        sequences = len(positions)
        rows = torch.arange(sequences, device=positions.device)
        new = {None: self._new_tokens(None, positions)}
        for window in self.windows_of_layers():
            new[window] = self._new_tokens(window, positions)

        # Views, made here once and not by every layer.
        k_used = []
        v_used = []
        for k, v, window in zip(self.k, self.v, self.windows, strict=True):
            k_used.append(k[:sequences, :, : new[window].used])
            v_used.append(v[:sequences, :, : new[window].used])

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            token = new[layer.window]
            self._write(layer.index, rows, token.slots, k, v)
            k_layer = k_used[layer.index]  # (B, K, used, d)
            v_layer = v_used[layer.index]
            wide_q = q.to(k_layer.dtype)  # (B, H, d)

            if q.is_cuda:
                return attention_decode(wide_q, k_layer, v_layer, token.lengths, layer.scale)

            one_token = wide_q[:, :, None]  # (B, H, 1, d)
            out = _attend(one_token, k_layer, v_layer, token.mask, layer.scale)
            return out[:, :, 0].to(q.dtype)

        return attend

    def _new_tokens(self, window: int | None, positions: Tensor) -> NewTokens:
        """Return where new tokens at these positions (B,) go in the layers of one window."""
        slots = positions
        lengths = positions + 1
        used = slots_of(window, self.slots)
        if window is not None:
            # A row that has gone round is full. In which order its slots are does not matter.
            slots = positions % used
            lengths = lengths.clamp(max=used)

        # The kernel reads only what is filled in each row. Plain torch reads all that it is given,
        # so it gets the slots up to the longest row, with a mask if the rows differ.
        mask = None
        if not positions.is_cuda:
            used = int(lengths.max())
            if int(lengths.min()) < used:
                is_filled = torch.arange(used) < lengths[:, None]  # (B, used)
                mask = is_filled[:, None, None]  # (B, 1, 1, used), for all heads
        return NewTokens(slots, lengths, used, mask)

    def _write(self, layer: int, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor):
        """Put k and v (T, K, d) of T tokens into the given rows (T,) and slots (T,) of a layer."""
        k_cache = self.k[layer]
        v_cache = self.v[layer]
        k_cache[rows, :, slots] = k.to(k_cache.dtype)
        v_cache[rows, :, slots] = v.to(v_cache.dtype)

    def windows_of_layers(self) -> set[int]:
        """Return the windows of those layers that have one."""
        return {window for window in self.windows if window is not None}

    def can_continue(self, filled: int, start: int) -> bool:
        """Return whether a sequence can go on behind the first `start` of a row's `filled` tokens.

        Where a layer has gone round, the token at `start` no longer finds all that it would see,
        unless it is the next one. The engine also writes to the slot behind the last token.
        """
        if start == filled:
            return True
        return all(filled < slots_of(w, self.slots) for w in self.windows_of_layers())

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
                size = slots_of(self.windows[layer], slots)
                tensors[layer] = old.new_zeros(rows, kv_heads, size, head_dim)
                tensors[layer][:, :, : old.size(2)] = old
        self.slots = slots

    def reorder(self, rows: Tensor):
        """Let row i hold what row rows[i] held. The number of rows becomes that of `rows`."""
        self.lengths = self.lengths[rows]

        # One layer after the other, so that only one layer is in memory twice.
        for layer in range(len(self.k)):
            self.k[layer] = self.k[layer][rows]
            self.v[layer] = self.v[layer][rows]


def last_tokens(cu_seqlens: Tensor, slots: int) -> Tensor:
    """Return the tokens of a packed row that stay in the slots of each prompt, (S, slots).

    Slot r keeps the last token whose position is r modulo `slots`. A slot beyond the end of a short
    prompt gets the first token, which nobody reads there.
    """
    last = cu_seqlens.diff().long()[:, None] - 1  # (S, 1) the position of each prompt's last token
    slot = torch.arange(slots, device=cu_seqlens.device)
    position = last - (last - slot) % slots  # (S, slots)
    return cu_seqlens[:-1, None].long() + position.clamp(min=0)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return the attention of q (B, H, T, d) to k and v (B, K, L, d) where the mask is true."""
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Return the attention (T, H, d) of q (T, H, d) to k and v (K, L, d) where the mask is true."""
    out = _attend(q.transpose(0, 1)[None], k[None], v[None], mask, scale)
    return out[0].transpose(0, 1)


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
