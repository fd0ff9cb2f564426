"""The engine that decodes requests: continuous batching, a prefix cache, and a captured step.

    engine = Engine(model, rows=8)
    requests = [Request(ids, pixels, max_new_tokens=64) for ids, pixels in questions]
    for request, tokens in engine.serve(requests):
        ...  # in the order in which the answers end; LLaVA.generate is one use of it

Continuous batching (Yu et al., Orca, 2022): at most `rows` requests are decoded at once. As soon
as an answer ends, the next request takes its row; nobody waits for the longest answer of a batch.

Prefix cache: a row keeps its keys and values when its answer ends. A new prompt may begin like
what some row holds: with the same picture, a system line, the last turn of a chat. It copies them
and computes only the rest. So a picture is encoded once, however many questions follow.

Captured step: on a GPU one step of decoding is a CUDA graph, captured once and then replayed.

Read `Request` and `CacheRow` first, then `Engine.serve`. It calls `_admit` for the prompts of new
requests, `_sample` for the next tokens, `_retire` for the answers that end, and `_step` for the
next logits. The prefix cache is in `_place`, which decides what a prompt can reuse, and in
`_prefill`, which computes the rest.

B sequences, T tokens of a packed row, D width, n tokens of an image, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inference.cache import Cache
from inference.fast_layers import fast_layers, replaced
from inference.sampling import sample_tokens
from kernels import fused
from packing import IMAGE_TOKEN, Item, as_items, count_images, pack_prompts, send

# A common beginning of fewer slots is computed again: copying it would not be worth the trouble.
MIN_PREFIX = 16

# The number of slots of a cache is a multiple of this, so that the cache seldom has to grow.
CACHE_STEP = 256

# Called after each step with (request, its new token) of every request that is being decoded.
OnStep = Callable[[list[tuple["Request", int]]], None]


@dataclass
class Request:
    """A prompt, and how to continue it. Its answer does not depend on the requests beside it.

    An answer ends with a token of `stop`, which it contains, at max_new_tokens, or where `until`,
    called with the tokens so far, returns true. Equal seeds draw equal answers.
    """

    ids: Tensor  # (T,), IMAGE_TOKEN where an image goes
    images: Tensor | Sequence[Item] = ()  # one for each IMAGE_TOKEN: (N, 3, H, W), or items
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: Collection[int] = ()
    until: Callable[[list[int]], bool] | None = None
    tag: object = None  # the caller's own, to know the request again


class Sampling(NamedTuple):
    """The options by which a token is chosen. Rows with equal ones are sampled together."""

    temperature: float
    top_p: float
    top_k: int


GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0)


def sampling_of(request: Request) -> Sampling:
    """Return the sampling options of a request; at temperature 0 the others do not count."""
    if request.temperature == 0:
        return GREEDY
    return Sampling(request.temperature, request.top_p, request.top_k)


@dataclass
class CacheRow:
    """What the engine knows of one row of the cache.

    After its answer has ended a row is free: it has no request, but keeps cached_ids and filled,
    so that later prompts can begin with what is in the cache.
    """

    request: Request | None = None
    generator: torch.Generator | None = None
    tokens: list[int] = field(default_factory=list)  # of the answer
    cached_ids: list[int] = field(default_factory=list)  # in the cache; see `Prompt.ids`
    filled: int = 0  # cache slots that these take: one for a token, n for an image

    def add(self, token: int) -> bool:
        """Add a token to the answer; return whether the answer ends with it."""
        self.tokens.append(token)
        request = self.request
        if token in request.stop:
            return True
        if len(self.tokens) >= request.max_new_tokens:
            return True
        if request.until is None:
            return False
        return bool(request.until(self.tokens))


@dataclass
class Prompt:
    """A new request whose images have fingerprints, so that equal prompts have equal ids."""

    request: Request
    ids: list[int]  # of tokens, and in the place of an image its fingerprint, which is negative
    images: dict[int, Item]  # by fingerprint


@dataclass
class Placement:
    """Where a prompt goes: into cache row `row`, the first `reused` ids copied from `source`."""

    row: int
    source: int
    reused: int


class Engine:
    """The decoder of one model's requests, at most `rows` at once.

    The cache grows to what the longest request needs. The rows that are being decoded are always
    the first `active` ones, so that a step reads views of the cache.

    The weights must stay as they are while the engine is used, since the keys and values that rows
    keep belong to them. After a change of the weights call `forget`.
    """

    def __init__(self, model, rows: int, slots: int = CACHE_STEP):
        """Prepare for a LLaVA; on a CPU with bfloat16 weights this takes their memory once more."""
        self.model = model
        self.lm = model.language_model
        self.device = self.lm.lm_head.weight.device

        # One token's embedding shows the device and dtype of the hidden states, for the cache.
        some_token = torch.zeros(1, dtype=torch.long, device=self.device)
        self.embedding = self.lm.model.embed(some_token)

        self.rows = [CacheRow() for _ in range(rows)]
        self.active = 0  # rows being decoded
        self.logits: Tensor | None = None  # (active, V), for the next token of each
        self.image_slots: dict[int, int] = {}  # by fingerprint, of the images in cached_ids
        self.fast_layers = fast_layers(self.lm)

        # A graph holds on to the addresses of the weights, and training moves them. It is made for
        # the kernels: the references are not kept from waiting for the GPU.
        self.use_graph = fused(self.embedding) and is_plain(self.lm) and not model.training

        self.cache = Cache(self.lm.config, rows, slots, like=self.embedding)

        # Sequences of more slots than this have other keys, from their first token on (LongRoPE).
        self.switch = self.lm.config.rope_switch

        # A captured step reads its inputs from here: each row's last token, and how many of its
        # slots are filled.
        self.inputs = torch.zeros(2, rows, dtype=torch.long, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_logits: Tensor | None = None

    @torch.inference_mode()
    def serve(
        self, requests: Iterable[Request], on_step: OnStep | None = None
    ) -> Iterator[tuple[Request, list[int]]]:
        """Yield (request, tokens of its answer) as the answers end.

        A request is taken from `requests` only when there is a row for it. Raises ValueError if a
        prompt is empty, or if its images and placeholders disagree.
        """
        waiting = iter(requests)
        try:
            with replaced(self.fast_layers):
                while True:
                    # Fill the free rows. This computes the logits of the new prompts.
                    free = len(self.rows) - self.active
                    new = list(islice(waiting, free))
                    if new:
                        self._admit(new)
                    if self.active == 0:
                        return

                    # One more token for each row. `decoding` is a list of its own, because
                    # self.rows changes when answers end.
                    decoding = self.rows[: self.active]
                    tokens = self._sample()
                    if on_step:
                        requests_of_rows = [row.request for row in decoding]
                        on_step(list(zip(requests_of_rows, tokens, strict=True)))

                    ended = []
                    for i, token in enumerate(tokens):
                        if decoding[i].add(token):
                            ended.append(i)

                    # Free their rows, from the last one on, since a freed row changes places with
                    # the last active one.
                    for i in reversed(ended):
                        self._retire(i)
                    for i in ended:
                        yield decoding[i].request, decoding[i].tokens

                    if self.active:
                        self._step()
        except BaseException:
            # An error, or a caller that stops early, can leave a row half written.
            self.forget()
            raise

    def forget(self):
        """Drop all requests, and everything that rows hold."""
        self.rows = [CacheRow() for _ in self.rows]
        self.active = 0

    def _retire(self, i: int):
        """Free row i. The last active row moves into its place, so that active rows stay first.

        The place of that last row becomes free. What it holds stays there for later prompts.
        """
        self.active -= 1
        last = self.rows[self.active]
        if i < self.active:
            self.cache.copy_row(source=self.active, target=i, slots=last.filled)
            self.rows[i] = last

        # With a copy of the list: the row that has moved goes on to append to the old one.
        kept_ids = list(last.cached_ids)
        self.rows[self.active] = CacheRow(cached_ids=kept_ids, filled=last.filled)

    # -- one step ------------------------------------------------------------------------------

    def _sample(self) -> list[int]:
        """Return the next token of each active row, with one call for all rows of equal options."""
        groups: dict[Sampling, list[int]] = {}  # options -> rows
        for i, row in enumerate(self.rows[: self.active]):
            options = sampling_of(row.request)
            groups.setdefault(options, []).append(i)

        tokens = [0] * self.active
        for options, members in groups.items():
            logits = self.logits
            if len(groups) > 1:
                logits = self.logits[members]
            generators = [self.rows[i].generator for i in members]

            chosen = sample_tokens(
                logits, options.temperature, options.top_p, generators, options.top_k
            )
            for i, token in zip(members, chosen.tolist(), strict=True):
                tokens[i] = token
        return tokens

    def _step(self):
        """Put the last token of each active row into the cache and compute the next logits."""
        active = self.rows[: self.active]
        tokens = [row.tokens[-1] for row in active]

        if self.use_graph:
            # The graph computes all rows. For the free ones any token will do.
            free = len(self.rows) - self.active
            tokens_of_rows = tokens + [0] * free
            filled = [row.filled for row in self.rows]
            self.inputs.copy_(torch.tensor([tokens_of_rows, filled]))
            self.logits = self._replay()[: self.active]
        else:
            filled = [row.filled for row in active]
            inputs = send(torch.tensor([tokens, filled]), self.device)
            self.logits = self._forward(inputs)

        for i, (row, token) in enumerate(zip(active, tokens, strict=True)):
            row.cached_ids.append(token)
            row.filled += 1
            if row.filled == self.switch + 1:
                self._compute_again(i)

    def _compute_again(self, i: int):
        """Compute an active row from its first token on, and its next logits."""
        images = self._read(self.rows[i].request).images
        whole = Placement(row=i, source=i, reused=0)
        self.logits[i] = self._prefill([whole], self._encode(images))[0]

    def _forward(self, inputs: Tensor) -> Tensor:
        """Return the logits (B, V) behind inputs (2, B): tokens, and the slots filled before."""
        tokens, filled = inputs
        self.cache.lengths = filled
        x = self.lm.model.embed(tokens)  # (B, D)
        # The position of a token is the number of slots before it.
        attend = self.cache.step()
        hidden_states = self.lm.model(x, filled, attend)
        return self.lm.lm_head(hidden_states)

    def _replay(self) -> Tensor:
        """Return what `_forward` returns for self.inputs, by a graph that is captured once.

        All of it is done on the GPU of the cache, which need not be the current one.

        The graph also writes a key and a value for every free row, into the slot behind what the
        row holds. That slot always exists: room is made for a whole answer, and its last token,
        with which it ends, never enters the cache.
        """
        with torch.cuda.device(self.device):
            if self.graph is None:
                self._capture()
            self.graph.replay()
        return self.graph_logits

    def _capture(self):
        """Capture a step, on the current GPU."""
        # Before the capture the step runs twice without a graph, on a side stream as PyTorch
        # demands: this compiles the kernels and fills the libraries' workspaces. Doing a step again
        # changes nothing, since it writes the same keys and values to the same slots.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(self.inputs)
            self._forward(self.inputs)
        torch.cuda.current_stream().wait_stream(stream)

        # With the stream of this GPU: by default all captures share that of the first one. Other
        # threads may allocate meanwhile, as the one does that pins batches for training.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.graph_logits = self._forward(self.inputs)
        self.graph = graph

    # -- new prompts ---------------------------------------------------------------------------

    def _admit(self, requests: list[Request]):
        """Put the prompts of new requests into free rows, and their logits behind self.logits."""
        prompts = [self._read(request) for request in requests]
        images: dict[int, Item] = {}
        for prompt in prompts:
            images |= prompt.images

        features = self._encode_new(images)
        self._make_room(prompts)
        whole, continued = self._place(prompts)

        # An image that a row held before is encoded again if its prompt cannot begin with that row.
        missing = {}
        for placement in whole + continued:
            ids = self.rows[placement.row].cached_ids
            for name in fingerprints_in(ids[placement.reused :]):
                if name not in features:
                    missing[name] = images[name]
        features |= self._encode(missing)

        # First the prompts that reuse nothing, then those that may reuse what these have computed.
        logits_of_row: dict[int, Tensor] = {}
        for placements in (whole, continued):
            if placements:
                computed = self._prefill(placements, features)
                for placement, logits in zip(placements, computed, strict=True):
                    logits_of_row[placement.row] = logits

        # The new rows are those behind the active ones.
        new_logits = [logits_of_row[row] for row in sorted(logits_of_row)]
        logits = torch.stack(new_logits)
        if self.active:
            logits = torch.cat([self.logits, logits])
        self.logits = logits
        self.active += len(requests)

    def _encode_new(self, images: dict[int, Item]) -> dict[int, Tensor]:
        """Return the features of those images that no row holds, and note the slots of all images.

        How many slots a prompt takes depends on its images. For an image that a row holds this is
        known from before, and for a new one its features tell.
        """
        held = set()
        for row in self.rows:
            held.update(fingerprints_in(row.cached_ids))
        self.image_slots = {name: self.image_slots[name] for name in held}

        new = {}
        for name, item in images.items():
            if name not in held:
                new[name] = item

        features = self._encode(new)
        for name, image_features in features.items():
            self.image_slots[name] = len(image_features)
        return features

    def _make_room(self, prompts: list[Prompt]):
        """Let the cache grow if a prompt and its longest answer would not fit into a row."""
        needed = 0
        for prompt in prompts:
            new_tokens = max(1, prompt.request.max_new_tokens)
            needed = max(needed, self._slots(prompt.ids) + new_tokens)

        if needed > self.cache.slots:
            steps = -(-needed // CACHE_STEP)  # rounded up

            # A graph holds on to the addresses of the cache, so a larger one needs a new graph.
            self.graph = None
            self.graph_logits = None
            self.cache.grow(steps * CACHE_STEP)

    def _read(self, request: Request) -> Prompt:
        """Return a request's prompt. Raises ValueError if it is empty or its images do not fit."""
        if len(request.ids) == 0:
            raise ValueError("a prompt is empty")
        items = as_items(request.images, self.model.views.one_view)
        placeholders = count_images(request.ids)
        if placeholders != len(items):
            raise ValueError(f"{placeholders} image placeholders but {len(items)} images")

        images = {}
        ids = []
        remaining = iter(items)
        for token in request.ids.tolist():
            if token != IMAGE_TOKEN:
                ids.append(token)
                continue
            item = next(remaining)
            name = fingerprint(item)
            ids.append(name)
            pixels = item.pixels.to(self.device)
            images[name] = Item(pixels, item.shape)
        return Prompt(request, ids, images)

    def _encode(self, items: dict[int, Item]) -> dict[int, Tensor]:
        """Return the features (n, D) of images, by their fingerprints."""
        features = self.model.encode_items(list(items.values()))
        return dict(zip(items, features, strict=True))

    def _slots(self, ids: list[int]) -> int:
        """Return the number of cache slots that tokens and images take."""
        slots = len(ids)
        for name in fingerprints_in(ids):
            slots += self.image_slots[name] - 1
        return slots

    def _place(self, prompts: list[Prompt]) -> tuple[list[Placement], list[Placement]]:
        """Give each prompt a free row; return those that reuse nothing, and those that do."""
        after = self.active + len(prompts)
        free = list(range(self.active, after))  # the rows behind the active ones
        whole: list[Placement] = []
        continued: list[Placement] = []

        for prompt in prompts:
            # Which row begins like this prompt? Active rows and new ones that reuse nothing stay as
            # they are until they are copied. What a free row holds may be overwritten before that,
            # so a prompt can reuse it only by taking this very row.
            sources = list(range(self.active)) + free
            for placement in whole:
                sources.append(placement.row)

            # At least the last token is computed, for its logits are the answer's first.
            beginning = prompt.ids[:-1]
            source, reused = self._longest_prefix(sources, beginning)
            start = self._slots(beginning[:reused])
            if start < MIN_PREFIX or not self.cache.can_continue(self.rows[source].filled, start):
                reused = 0

            # On the other side of the switch the same tokens have other keys.
            was_long = self.rows[source].filled > self.switch
            is_long = self._slots(prompt.ids) > self.switch
            if was_long != is_long:
                reused = 0

            # A prompt that reuses no free row takes the one whose loss costs least.
            if reused and source in free:
                row = source
            else:
                row = min(free, key=lambda i: self.rows[i].filled)
            free.remove(row)

            placement = Placement(row, source, reused)
            if reused:
                continued.append(placement)
            else:
                whole.append(placement)

            # Later prompts of this call already see what the row will hold.
            self.rows[row] = CacheRow(
                request=prompt.request,
                generator=torch.Generator().manual_seed(prompt.request.seed),
                cached_ids=prompt.ids,
                filled=self._slots(prompt.ids),
            )
        return whole, continued

    def _longest_prefix(self, rows: list[int], ids: list[int]) -> tuple[int, int]:
        """Return the row that has the most of a prompt's beginning, and how many of its ids.

        Of rows that have equally much, the first counts.
        """
        best = rows[0]
        longest = -1
        for row in rows:
            length = common_prefix(self.rows[row].cached_ids, ids)
            if length > longest:
                best = row
                longest = length
        return best, longest

    def _prefill(self, placements: list[Placement], features: dict[int, Tensor]) -> Tensor:
        """Compute what prompts do not reuse; return the logits (S, V) behind their last tokens."""
        rows = []
        starts = []  # how many slots of each row are reused
        tails = []  # the ids behind them, with IMAGE_TOKEN for an image, as the model has it
        images = []  # the features of all images in the tails
        for placement in placements:
            ids = self.rows[placement.row].cached_ids

            # Copy what another row has computed.
            start = self._slots(ids[: placement.reused])
            if start and placement.row != placement.source:
                self.cache.copy_row(placement.source, placement.row, start)

            # Everything else is computed below.
            tail = []
            for i in ids[placement.reused :]:
                if i < 0:
                    images.append(features[i])
                    tail.append(IMAGE_TOKEN)
                else:
                    tail.append(i)

            rows.append(placement.row)
            starts.append(start)
            tails.append(torch.tensor(tail))

        # They are packed on the CPU and sent afterwards, so that it need not wait for a GPU.
        packed = pack_prompts(tails, [len(image) for image in images])
        if any(starts):
            # The tails do not begin at position 0 but behind what is reused.
            lengths = packed.cu_seqlens.diff()
            offsets = torch.tensor(starts).repeat_interleave(lengths)
            packed = packed._replace(positions=packed.positions + offsets).to(self.device)
            attend = self.cache.extend(rows, starts, lengths.tolist(), packed.positions)
        else:
            packed = packed.to(self.device)
            attend = self.cache.prefill(packed, send(torch.tensor(rows), self.device))

        features_of_tails = None
        if images:
            features_of_tails = torch.cat(images)
        x = self.model.embed(packed.input_ids, features_of_tails, packed.image_at)  # (T, D)
        hidden_states = self.lm.model(x, packed.positions, attend, packed.cu_seqlens)
        last = packed.cu_seqlens[1:].long() - 1
        return self.lm.lm_head(hidden_states[last])


def is_plain(lm: nn.Module) -> bool:
    """Return whether all weights are ordinary parameters, none of them a shard.

    A shard is put together anew for each step, by a collective, which a graph must not hold. Some
    may be whole at a time when others are shards: all of them count.
    """
    return all(type(p) is nn.Parameter for p in lm.parameters())


def fingerprint(item: Item) -> int:
    """Return a negative number that names an item: equal where its shape and all its bits are.

    It can stand among token ids, which are never negative.
    """
    pixels = item.pixels.detach().cpu().contiguous()
    shape = f"{item.shape} {pixels.dtype} {pixels.shape}"
    digest = hashlib.sha256(shape.encode())
    digest.update(pixels.view(torch.uint8).numpy())
    return -1 - int.from_bytes(digest.digest())


def fingerprints_in(ids: list[int]) -> list[int]:
    """Return the fingerprints of images among the ids of a prompt."""
    return [i for i in ids if i < 0]


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many numbers at the beginning of two lists are equal."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
