"""What `LLaVA.generate` is made of: the engine, or, for beams and without a cache, all sequences step by step.

B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.cache import Cache
from inference.engine import Request, Row, choose, engine_of
from packing import IMAGE_TOKEN, Item, pack_prompts, packed_attention


def generate(
    model, rows: list[Tensor], items: list[Item], new: int, beams: int, eos: int | None, use_cache: bool,
    generator: torch.Generator | None, stream: Callable[[list[int]], None] | None, **options,
) -> Tensor:  # fmt: skip
    """LLaVA.generate, whose prompts are rows on the model's device and whose items are one for each placeholder."""
    fill = 0 if eos is None else eos
    if beams > 1 or not use_cache:
        encoded = model.encode_items(items)
        counts, features = [len(f) for f in encoded], torch.cat(encoded) if encoded else None
        decoding = Decoding(model, pack_prompts(rows, counts), features, beams, new, use_cache)
    if beams > 1:
        if stream or options["temperature"] or options["until"]:
            raise ValueError("beam search has no temperature, no stream and no stopping text")
        return beam_search(decoding, new, eos)
    at = generator.device if generator else "cpu"
    seeds = torch.randint(2**62, (len(rows),), generator=generator, device=at).tolist()
    stop, items = () if eos is None else (eos,), iter(items)
    requests = [
        Request(
            ids,
            list(islice(items, int((ids == IMAGE_TOKEN).sum()))),
            new,
            seed=seed,
            stop=stop,
            tag=i,
            **options,
        )
        for i, (ids, seed) in enumerate(zip(rows, seeds, strict=True))
    ]

    def watch(step: list[tuple[Request, int]]):
        tokens = {request.tag: token for request, token in step}
        stream([tokens.get(i, fill) for i in range(len(rows))])

    engine = engine_of(model, len(rows)) if use_cache else decoding
    made = {
        r.tag: torch.tensor(tokens)
        for r, tokens in engine.serve(requests, watch if stream else None)
    }
    made = [made[i] for i in range(len(rows))]
    return torch.nn.utils.rnn.pad_sequence(made, batch_first=True, padding_value=fill).to(
        rows[0].device
    )


class Decoding:
    """The state of B x beams sequences; logits (B x beams, V) are always those of the next token."""

    def __init__(
        self, model, prompts, features: Tensor | None, beams: int, new: int, use_cache: bool
    ):
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
        if not self.use_cache:
            parts = self.x.split(self.lengths.tolist())
            self.x, self.lengths = torch.cat([parts[i] for i in rows.tolist()]), self.lengths[rows]

    def step(self, token: Tensor):
        x = self.lm.model.embed(token)
        if self.use_cache:
            at = self.cache.lengths
            hidden = self.lm.model(x, at, self.cache.step())
        else:
            parts = self.x.split(self.lengths.tolist())
            self.x = torch.cat(
                [t for part, new in zip(parts, x, strict=True) for t in (part, new[None])]
            )
            self.lengths = self.lengths + 1
            cu_seqlens = F.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)
            positions = torch.cat([torch.arange(n, device=x.device) for n in self.lengths.tolist()])
            hidden = self.lm.model(
                self.x, positions, packed_attention(cu_seqlens, int(self.lengths.max()))
            )
            hidden = hidden[cu_seqlens[1:].long() - 1]
        self.logits = self.lm.lm_head(hidden).float()

    def serve(
        self, requests: list[Request], watch: Callable | None = None
    ) -> Iterator[tuple[Request, list[int]]]:
        """As Engine.serve does, for as many requests as there are prompts, of equal options."""
        rows = [Row(r, torch.Generator().manual_seed(r.seed)) for r in requests]
        going, r = list(range(len(rows))), requests[0]
        while True:
            generators = [row.generator for row in rows]
            token = choose(self.logits, r.temperature, r.top_p, generators, r.top_k)
            tokens = token.tolist()
            if watch:
                watch([(rows[i].request, tokens[i]) for i in going])
            ended = [i for i in going if rows[i].add(tokens[i])]
            yield from ((rows[i].request, rows[i].tokens) for i in ended)
            going = [i for i in going if i not in ended]
            if not going:
                return
            self.step(token)


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
            finished[b] += [
                (s / len(t), t) for s, t in zip(scores[b].tolist(), tokens[b], strict=True)
            ]
        best.append(torch.tensor(max(finished[b], key=lambda f: f[0])[1]))
    fill = 0 if eos is None else eos
    return torch.nn.utils.rnn.pad_sequence(best, batch_first=True, padding_value=fill).to(device)
