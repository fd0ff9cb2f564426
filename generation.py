"""Packed rows and decoding: the key-value cache, sampling and beam search. `LLaVA.generate` in model.py is the way in.

B sequences, T tokens of a packed row, H heads, K key-value heads, d head width, L cache slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention_decode, attention_packed
from kernels.cross_entropy import IGNORE
from templates import IMAGE_TOKEN

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> attention output, packed


def expand(ids: Tensor, features: Tensor | None, labels: Tensor | None = None) -> Tensor:
    """One placeholder -> n image positions; with labels, their expansion instead (image positions -100)."""
    image = ids == IMAGE_TOKEN
    repeats = torch.where(image, 1 if features is None else features.size(1), 1)
    return (ids if labels is None else labels.masked_fill(image, IGNORE)).repeat_interleave(repeats)


def pack(rows: list[Tensor], features: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows of ids with single placeholders -> packed ids, positions, cu_seqlens, max_seqlen."""
    rows = [expand(row, features) for row in rows]
    lengths = [len(r) for r in rows]
    device = rows[0].device
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    return torch.cat(rows), positions, cu_seqlens, max(lengths)


def packed(cu_seqlens: Tensor, max_seqlen: int) -> Attend:
    """Causal attention inside each sample of a packed row."""
    return lambda layer, q, k, v: attention_packed(q, k, v, cu_seqlens, max_seqlen)


class Cache:
    """Keys and values of B sequences for decoding, (B, K, L, d) per layer, and how many slots each has filled."""

    def __init__(self, c, rows: int, slots: int, like: Tensor):
        shapes = [(rows, layer.kv_heads, slots, c.head_dim) for layer in c.layers]
        self.k = [like.new_zeros(s) for s in shapes]
        self.v = [like.new_zeros(s) for s in shapes]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)

    def prefill(self, cu_seqlens: Tensor, max_seqlen: int, positions: Tensor) -> Attend:
        """Attention of the packed prompts that also fills the cache."""
        lengths = cu_seqlens.diff().long()
        row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        self.lengths = lengths

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer][row, :, positions] = k.to(self.k[layer].dtype)
            self.v[layer][row, :, positions] = v.to(self.v[layer].dtype)
            return attention_packed(q, k, v, cu_seqlens, max_seqlen)

        return attend

    def step(self) -> Attend:
        """Attention of one new token per sequence, written behind what is there."""
        row, at = torch.arange(len(self.lengths), device=self.lengths.device), self.lengths
        self.lengths = at + 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer][row, :, at] = k.to(self.k[layer].dtype)
            self.v[layer][row, :, at] = v.to(self.v[layer].dtype)
            return attention_decode(q.to(self.k[layer].dtype), self.k[layer], self.v[layer], self.lengths)

        return attend

    def reorder(self, rows: Tensor):
        """Row i continues what row rows[i] was (beam search)."""
        self.lengths = self.lengths[rows]
        for tensors in (self.k, self.v):
            for i, t in enumerate(tensors):
                tensors[i] = t[rows]


class Decoding:
    """The state of B x beams sequences; logits (B x beams, V) are always those of the next token."""

    def __init__(self, model, prompts, features: Tensor | None, beams: int, new: int, use_cache: bool):
        self.lm, self.beams, self.use_cache = model.language_model, beams, use_cache
        ids, positions, cu_seqlens, longest = prompts
        self.rows = rows = len(cu_seqlens) - 1
        self.x, self.lengths = model.embed(ids, features), cu_seqlens.diff().long()
        self.cache = Cache(self.lm.config, rows, longest + new, self.x)
        attend = self.cache.prefill(cu_seqlens, longest, positions)
        hidden = self.lm.model(self.x, positions, attend)
        self.logits = self.lm.lm_head(hidden[cu_seqlens[1:].long() - 1]).float()
        if beams > 1:
            self.reorder(torch.arange(rows, device=ids.device).repeat_interleave(beams))

    def reorder(self, rows: Tensor):
        self.cache.reorder(rows)
        self.logits = self.logits[rows]
        parts = self.x.split(self.lengths.tolist())
        self.x, self.lengths = torch.cat([parts[i] for i in rows.tolist()]), self.lengths[rows]

    def step(self, token: Tensor):
        x = self.lm.model.embed(token)
        if self.use_cache:
            at = self.cache.lengths
            hidden = self.lm.model(x, at, self.cache.step())
        else:
            parts = self.x.split(self.lengths.tolist())
            self.x = torch.cat([t for part, new in zip(parts, x, strict=True) for t in (part, new[None])])
            self.lengths = self.lengths + 1
            cu_seqlens = F.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)
            positions = torch.cat([torch.arange(n, device=x.device) for n in self.lengths.tolist()])
            hidden = self.lm.model(self.x, positions, packed(cu_seqlens, int(self.lengths.max())))
            hidden = hidden[cu_seqlens[1:].long() - 1]
        self.logits = self.lm.lm_head(hidden).float()

    def run(self, new: int, temperature: float, top_p: float, eos: int | None, generator, stream) -> Tensor:
        """Up to `new` tokens for each prompt, (B, new); `stream` is called with the B tokens of each step."""
        if self.beams > 1:
            return beam_search(self, new, eos)
        done = torch.zeros(self.rows, dtype=torch.bool, device=self.logits.device)
        tokens: list[Tensor] = []
        for _ in range(new):
            token = choose(self.logits, temperature, top_p, generator)
            if eos is not None:
                token = torch.where(done, eos, token)
                done |= token == eos
            tokens.append(token)
            if stream:
                stream(token.tolist())
            if done.all() or len(tokens) == new:
                break
            self.step(token)
        return torch.stack(tokens, 1)


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token per row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keep the smallest set whose mass reaches top_p
        return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def beam_search(decoding: Decoding, max_new: int, eos: int | None) -> Tensor:
    """Beam search as Hugging Face's defaults have it: 2 beams x candidates a step, a finished one scores
    sum of log-probabilities / tokens, and a prompt is done when no open beam can still beat its worst finished one."""
    device, B = decoding.logits.device, decoding.rows
    beams = len(decoding.logits) // B
    scores = torch.full((B, beams), -1e9, device=device)
    scores[:, 0] = 0  # the beams of a prompt start equal; only one of them may branch
    tokens: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(B)]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(B)]
    done = [False] * B
    for length in range(1, max_new + 1):
        total = scores[..., None] + decoding.logits.log_softmax(-1).view(B, beams, -1)
        V = total.size(-1)
        top, index = total.flatten(1).topk(min(2 * beams, total[0].numel()))
        rows, chosen = [], []
        for b in range(B):
            going: list[tuple[float, int, int]] = []
            for rank, (score, i) in enumerate(zip(top[b].tolist(), index[b].tolist(), strict=True)):
                beam, token = divmod(i, V)
                if token != eos:
                    going.append((score, beam, token))
                elif rank < beams and not done[b]:
                    finished[b].append((score / length, tokens[b][beam] + [token]))
                if len(going) == beams:
                    break
            finished[b] = sorted(finished[b], key=lambda f: -f[0])[:beams]
            done[b] |= len(finished[b]) == beams and finished[b][-1][0] >= top[b, 0].item() / length
            tokens[b] = [tokens[b][beam] + [token] for _, beam, token in going]
            scores[b] = torch.tensor([s for s, _, _ in going], device=device)
            rows += [b * beams + beam for _, beam, _ in going]
            chosen += [token for _, _, token in going]
        if all(done) or length == max_new:
            break
        decoding.reorder(torch.tensor(rows, device=device))
        decoding.step(torch.tensor(chosen, device=device))
    best = []
    for b in range(B):
        if not done[b]:
            finished[b] += [(s / len(t), t) for s, t in zip(scores[b].tolist(), tokens[b], strict=True)]
        best.append(torch.tensor(max(finished[b], key=lambda f: f[0])[1]))
    fill = 0 if eos is None else eos
    return torch.nn.utils.rnn.pad_sequence(best, batch_first=True, padding_value=fill).to(device)
