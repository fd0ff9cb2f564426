"""The engine that serves requests: continuous refill, prompts that share a beginning, a captured step.

    engine = Engine(model, rows=8)
    for request, tokens in engine.serve(Request(ids, pixels, max_new_tokens=64) for ids, pixels in questions):
        ...                                    # as they finish; `LLaVA.generate` is one use of it

At most `rows` requests are decoded at once and the next takes the place of one that is finished. A prompt that begins
as one does whose keys and values are still there (a picture asked about before, a system line, the last turn of a chat)
starts from a copy of them, so a picture is encoded and prefilled once however many questions follow.

B sequences, T tokens of a packed row, D width, n tokens of an image, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.cache import Cache
from kernels import nf4
from kernels.lora import FORMATS
from packing import IMAGE_TOKEN, Item, as_items, pack_prompts

WORTH = 16  # slots: a beginning that two prompts share is used again from this length on
GRAIN = 256  # the slots of a cache grow by multiples of it


@dataclass
class Request:
    """A prompt and how to go on from it. An answer ends with a token of `stop`, which it contains, or where `until`,
    called with the tokens so far, says so. Equal seeds give equal answers, in whatever company they are decoded."""

    ids: Tensor  # (T,), IMAGE_TOKEN where an image goes
    images: Tensor | Sequence[Item] = ()  # one for each IMAGE_TOKEN: (N, 3, H, W), or items
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: Collection[int] = ()
    until: Callable[[list[int]], bool] | None = None
    tag: object = None  # the caller's own


@dataclass
class Row:
    """A row of the cache: whose it is, what its filled slots hold (an image is one negative number), how many."""

    request: Request | None = None
    generator: torch.Generator | None = None
    tokens: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    filled: int = 0

    def add(self, token: int) -> bool:
        """Whether the answer ends with it."""
        self.tokens.append(token)
        r = self.request
        return (
            token in r.stop
            or len(self.tokens) >= r.max_new_tokens
            or bool(r.until and r.until(self.tokens))
        )


@lru_cache(2)
def odd_numbers(count: int, device: torch.device) -> Tensor:
    return (2 * torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(0)) + 1).to(
        device
    )


def fingerprint(item: Item) -> int:
    """A negative number, equal where shape and all bits are: products with odd random numbers, summed."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        item.pixels.element_size()
    ]
    bits = item.pixels.flatten(1).contiguous().view(kind)
    factors, power, total = odd_numbers(bits.size(1), bits.device), 1, hash(item.shape)
    for number in torch.stack([(view * factors).sum() for view in bits]).tolist():
        power = power * 6364136223846793005 % 2**64  # views in another order are another item
        total += number * power
    return -1 - total % 2**62


def shared(a: list[int], b: list[int]) -> int:
    """How many numbers two lists begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class Engine:
    """Decodes the requests of one model, at most `rows` at once, in a cache that grows to what the longest needs.

    Rows that are being decoded are the first ones, so that a step reads views. On a GPU a step is a CUDA graph,
    captured once for each (rows, slots); on a CPU weights in bfloat16 are laid out anew for its products, which takes
    their size in memory once more. The weights must stay as they are, or what rows hold is not theirs: see `forget`.
    """

    def __init__(self, model, rows: int, slots: int = GRAIN):
        self.model, self.lm = model, model.language_model
        self.device = self.lm.lm_head.weight.device
        self.like = self.lm.model.embed(torch.zeros(1, dtype=torch.long, device=self.device))
        self.rows, self.active, self.logits = [Row() for _ in range(rows)], 0, None
        self.sizes: dict[int, int] = {}  # slots of an image, by its name in Row.held
        self.linears, self.state, self.cache = fast_linears(self.lm), None, None
        # A sharded weight is put together with the other ranks, and training frees and moves them.
        self.graphs = (
            self.like.is_cuda
            and not model.training
            and type(self.lm.lm_head.weight) is nn.Parameter
        )
        self._allocate(slots)

    def _allocate(self, slots: int):
        old, self.cache = self.cache, Cache(self.lm.config, len(self.rows), slots, self.like)
        for new, was in zip(self.cache.tensors(), old.tensors() if old else (), strict=False):
            new[:, :, : was.size(2)] = was
        self.inputs = torch.zeros(
            2, len(self.rows), dtype=torch.long, device=self.device
        )  # tokens, filled slots
        self.graph = self.output = None

    @torch.inference_mode()
    def serve(
        self, requests: Iterable[Request], watch: Callable | None = None
    ) -> Iterator[tuple[Request, list[int]]]:
        """(request, tokens) of each as it finishes; `watch` is called with every step's [(request, token)].

        Raises ValueError where a prompt is empty or its images and placeholders disagree.
        """
        waiting = iter(requests)
        try:
            with replaced(self.linears):
                while True:
                    if new := list(islice(waiting, len(self.rows) - self.active)):
                        self._admit(new)
                    if not self.active:
                        return
                    rows, tokens = self.rows[: self.active], self._choose()
                    if watch:
                        watch(
                            [(row.request, token) for row, token in zip(rows, tokens, strict=True)]
                        )
                    ended = [
                        i
                        for i, (row, token) in enumerate(zip(rows, tokens, strict=True))
                        if row.add(token)
                    ]
                    for i in reversed(ended):
                        self._retire(i)
                    for i in ended:
                        yield rows[i].request, rows[i].tokens
                    if self.active:
                        self._step()
        except (
            BaseException
        ):  # also where the caller stops early: no row is known to hold what it should
            self.forget()
            raise

    def forget(self):
        """No row holds anything."""
        self.rows, self.active = [Row() for _ in self.rows], 0

    def _retire(self, i: int):
        """Row i is done: the last that is decoded takes its place, and what it holds stays to be used again."""
        self.active -= 1
        last = self.rows[self.active]
        if i < self.active:
            self.cache.copy(self.active, i, last.filled)
            self.rows[i] = last
        self.rows[self.active] = Row(held=last.held[:], filled=last.filled)

    def _choose(self) -> list[int]:
        """A token for each row, in one call for all rows of equal options."""
        groups, tokens = {}, [0] * self.active
        for i, row in enumerate(self.rows[: self.active]):
            r = row.request
            groups.setdefault(
                (r.temperature, r.top_p, r.top_k) if r.temperature else (0.0, 1.0, 0), []
            ).append(i)
        for (temperature, top_p, top_k), of in groups.items():
            logits = self.logits if len(groups) == 1 else self.logits[of]
            made = choose(logits, temperature, top_p, [self.rows[i].generator for i in of], top_k)
            for i, token in zip(of, made.tolist(), strict=True):
                tokens[i] = token
        return tokens

    def _step(self):
        """Every row's last token into the cache; self.logits become those of the next."""
        for row in self.rows[: self.active]:
            row.held.append(row.tokens[-1])
        last = [
            (row.held[-1] if i < self.active else 0, row.filled) for i, row in enumerate(self.rows)
        ]
        if self.graphs:
            self.inputs.copy_(torch.tensor(last).T)
            self.logits = self._replay()[: self.active]
        else:
            self.logits = self._forward(torch.tensor(last[: self.active], device=self.device).T)
        for row in self.rows[: self.active]:
            row.filled += 1

    def _forward(self, inputs: Tensor) -> Tensor:
        self.cache.lengths = inputs[1]
        return self.lm.lm_head(
            self.lm.model(self.lm.model.embed(inputs[0]), inputs[1], self.cache.step())
        )

    def _replay(self) -> Tensor:
        """`_forward` of all rows as a graph. Rows that wait write into the slot behind what they hold.

        There is one: the last token of an answer has a slot and is never put there.
        """
        if self.graph is None:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(
                    2
                ):  # compiles the kernels and fills the libraries' workspaces; repeating it is harmless
                    self._forward(self.inputs)
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self._forward(self.inputs)
        self.graph.replay()
        return self.output

    # -- prompts ------------------------------------------------------------------------------------------

    def _slots(self, ids: list[int]) -> int:
        """What a list of tokens and images fills."""
        return len(ids) + sum(self.sizes[i] - 1 for i in ids if i < 0)

    def _admit(self, new: list[Request]):
        """Prompts into the rows behind those that are decoded, and the logits of their first tokens behind theirs."""
        asked, seen = [], {}
        for r in new:
            items = [Item(item.pixels.to(self.device), item.shape) for item in as_items(r.images)]
            names = [fingerprint(item) for item in items]
            holes = int((r.ids == IMAGE_TOKEN).sum())
            if holes != len(items) or len(r.ids) == 0:
                short = f"{holes} image placeholders but {len(items)} images"
                raise ValueError(short if len(r.ids) else "a prompt is empty")
            seen |= dict(zip(names, items, strict=True))
            names = iter(names)
            asked.append([next(names) if i == IMAGE_TOKEN else i for i in r.ids.tolist()])
        self.sizes = {i: self.sizes[i] for row in self.rows for i in row.held if i < 0}
        features = self._encode({i: item for i, item in seen.items() if i not in self.sizes})
        self.sizes |= {i: len(f) for i, f in features.items()}
        need = max(
            self._slots(ids) + max(1, r.max_new_tokens) for ids, r in zip(asked, new, strict=True)
        )
        if need > self.cache.slots:
            self._allocate(-(-need // GRAIN) * GRAIN)
        free, whole, rest = list(range(self.active, self.active + len(new))), [], []
        for ids, request in zip(asked, new, strict=True):
            # What another free row holds may be written over before it is copied: a free row serves only itself.
            sources = [*range(self.active), *free, *(to for to, _, _ in whole)]
            source = max(sources, key=lambda i: shared(self.rows[i].held, ids[:-1]))
            kept = shared(self.rows[source].held, ids[:-1])
            kept = kept if self._slots(ids[:kept]) >= WORTH else 0
            to = source if kept and source in free else min(free, key=lambda i: self.rows[i].filled)
            free.remove(to)
            (rest if kept else whole).append((to, source, kept))
            self.rows[to] = Row(
                request, torch.Generator().manual_seed(request.seed), [], ids, self._slots(ids)
            )
        features |= self._encode({i: seen[i] for to, _, n in whole + rest for i in self.rows[to].held[n:] if i in seen
                                  and i not in features})  # fmt: skip
        logits = [None] * len(new)
        for parts in (whole, rest):  # these may begin with what those have just put there
            for (to, _, _), made in zip(
                parts, self._prefill(parts, features) if parts else (), strict=True
            ):
                logits[to - self.active] = made
        self.logits = (
            torch.stack(logits)
            if not self.active
            else torch.cat([self.logits, torch.stack(logits)])
        )
        self.active += len(new)

    def _encode(self, items: dict[int, Item]) -> dict[int, Tensor]:
        """Items by name -> what stands for each, (n, D)."""
        return dict(zip(items, self.model.encode_items(list(items.values())), strict=True))

    def _prefill(self, parts: list[tuple[int, int, int]], features: dict[int, Tensor]) -> Tensor:
        """(row, where its beginning is, how much of its prompt that is) of each -> logits behind the prompts."""
        tails = [self.rows[to].held[kept:] for to, _, kept in parts]
        starts = [self._slots(self.rows[to].held[:kept]) for to, _, kept in parts]
        images = [features[i] for tail in tails for i in tail if i < 0]
        rows = [
            torch.tensor([max(i, IMAGE_TOKEN) for i in tail], device=self.device) for tail in tails
        ]
        ids, positions, cu_seqlens, longest = pack_prompts(rows, [len(image) for image in images])
        to = [row for row, _, _ in parts]
        if any(starts):
            for (row, source, _), filled in zip(parts, starts, strict=True):
                if row != source:
                    self.cache.copy(source, row, filled)
            lengths = cu_seqlens.diff().tolist()
            positions = positions + torch.tensor(starts, device=self.device).repeat_interleave(
                cu_seqlens.diff()
            )
            attend = self.cache.extend(to, starts, lengths, positions)
        else:
            attend = self.cache.prefill(
                cu_seqlens, longest, positions, torch.tensor(to, device=self.device)
            )
        x = self.model.embed(ids, torch.cat(images) if images else None)
        hidden = self.lm.model(x, positions, attend)
        return self.lm.lm_head(hidden[cu_seqlens[1:].long() - 1])


def state(model: nn.Module) -> list[tuple[int, int]]:
    """What changes when any weight of a model is replaced or written to."""
    tensors = chain(model.parameters(), model.buffers())
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


KEPT: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # model -> its last engine, for the calls to come


def engine_of(model, rows: int) -> Engine:
    """The engine of a model's last call if it still fits; a model in training has a new one for each."""
    kept = KEPT.pop(model, None)
    if model.training or kept is None or len(kept.rows) != rows or kept.state != state(model):
        kept = Engine(weakref.proxy(model), rows)
    if not model.training:
        KEPT[model], kept.state = kept, state(model)
    return kept


# --------------------------------------------------------------------------------------------- fast products


def fast_linears(lm: nn.Module) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """What computes the products of decoding faster than the modules themselves do, for those where there is such."""
    fast, dtype, cpu = {}, lm.model.norm.weight.dtype, lm.model.norm.weight.is_cpu
    for name, m in lm.named_modules():
        weight = getattr(m, "weight", None)
        if name.endswith("base_layer"):  # an adapter multiplies with it itself
            continue
        if cpu and type(weight) is nf4.NF4:  # no product on a CPU reads its codes
            fast[m] = _laid_out(nf4.dequantize(weight, dtype), m.bias)
        elif type(weight) in FORMATS:
            fast[m] = partial(_quantized, FORMATS[type(weight)].matmul, weight, m.bias)
        elif (
            cpu
            and isinstance(m, nn.Linear)
            and type(weight) is nn.Parameter
            and weight.dtype == dtype
        ):
            fast[m] = _laid_out(weight.detach(), m.bias)
    return fast


def _laid_out(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """oneDNN would lay the weight out anew for every product in bfloat16, which takes longer than the product."""
    if weight.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return lambda x: F.linear(x, weight, bias)
    laid, product = (
        torch.ops.mkldnn._reorder_linear_weight(weight),
        torch.ops.mkldnn._linear_pointwise.default,
    )
    return lambda x: product(x, laid, bias, "none", [], "")


def _quantized(matmul: Callable, weight, bias: Tensor | None, x: Tensor) -> Tensor:
    """Without the adapter of rank 0 that lora.Quantized has."""
    y = matmul(x, weight)
    return y if bias is None else y.add_(bias)


@contextmanager
def replaced(forwards: dict[nn.Module, Callable]):
    """Modules that compute something else meanwhile."""
    try:
        for m, forward in forwards.items():
            m.forward = forward
        yield
    finally:
        for m in forwards:
            del m.forward


# ----------------------------------------------------------------------------------------------- choosing


def choose(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | list[torch.Generator], top_k: int = 0
) -> Tensor:  # fmt: skip
    """One token per row of logits (B, V), (B,): the likeliest at temperature 0, else drawn from the top_k likeliest
    and of those from the fewest whose probabilities reach top_p (Holtzman et al., 2020).

    A draw takes one number of a row's generator, which is the CPU's: other rows and devices do not change it.
    """
    if temperature == 0:
        return logits.float().argmax(-1)  # which is slow in bfloat16 on a CPU
    p, order = (logits.float() / temperature).softmax(-1), None
    if top_k or top_p < 1:
        p, order = p.topk(min(top_k or p.size(-1), p.size(-1)))
        before = p.cumsum(-1) - p
        p = p.masked_fill(before >= top_p * p.sum(-1, keepdim=True), 0) if top_p < 1 else p
    each = generator if isinstance(generator, list) else [generator]
    u = torch.cat([torch.rand(len(logits) // len(each), 1, generator=g) for g in each]).to(p.device)
    mass = p.cumsum(-1)
    token = (mass <= u * mass[:, -1:]).sum(-1, keepdim=True).clamp(max=p.size(-1) - 1)
    return (token if order is None else order.gather(-1, token))[:, 0]
