"""A row -> a Sample (ids with every image position in place, labels, pixels); Samples -> a packed Batch: one row of
tokens, positions that restart, `cu_seqlens` where samples meet.

T tokens, S samples, N items (views.py: pictures and videos), V views in all of them, H x W pixels. Ids hold
IMAGE_TOKEN at each of an item's positions, labels hold IGNORE where nothing is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import config
from checkpoints.layouts import from_recipe, views_of
from checkpoints.weights import resolve
from config import UserError
from inputs import templates, video
from inputs.rows import Mixture, Rows, image_size, load_image, media
from inputs.templates import IGNORE, IMAGE_TOKEN
from inputs.tiling import TILED, Item, Shape, Views

# --------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class SampleSpec:
    """All that decides how a row becomes a sample."""

    tokenizer: templates.Tokenizer
    template: str
    max_tokens: int
    views: Views


def make_spec(tokenizer: str, template: str, **rest) -> SampleSpec:
    """A spec whose tokenizer (folder or Hugging Face id) and template fit. Raises UserError."""
    folder = resolve(tokenizer, small=True) if tokenizer else None
    try:
        tok = templates.load_tokenizer(folder) if folder else byte_tokenizer()
        templates.resolve(template, tok)
    except ValueError as e:
        raise _user_error(tokenizer or "command line", e) from None
    return SampleSpec(tok, template, **rest)


def byte_tokenizer() -> templates.Tokenizer:
    """One token per byte, and every template's eos: lets `check` see a row's structure where no tokenizer is named."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(sorted({t.eos for t in templates.TEMPLATES.values() if t.eos}))
    files = {
        "tokenizer.json": tok.to_str().encode(),
        "tokenizer_config.json": b'{"eos_token": "</s>"}',
    }
    return templates.JsonTokenizer(files)


def stage_spec(model: config.Model, stage: config.Stage) -> SampleSpec:
    """The spec that training and `check` share. Raises UserError for a missing tokenizer, template or encoder."""
    if not model.text:
        raise UserError(
            "model.tokenizer", "not set", "name a folder with tokenizer.json or tokenizer.model"
        )
    views = views_of(from_recipe(model, stage.template))
    return make_spec(model.text, stage.template, max_tokens=stage.max_tokens, views=views)


def _user_error(where, error: ValueError) -> UserError:
    what, _, fix = str(error).partition("; fix: ")
    return UserError(where, what, fix or "mend the row, or remove it")


def look(source, kind: str, views: Views, **part) -> Item:
    """A picture or video (kind) as the encoder sees it; part: video.stream's span and rate. Raises ValueError(what is
    wrong with it), UserError where what reads videos is not installed."""
    if kind == "image":
        return views.picture(load_image(source))
    return views.clip(video.stream(source, views.frames, views.fps, **part))


def measure(source, kind: str, views: Views) -> Shape:
    """The shape of the item that `look` makes of it, without reading more of it than that takes."""
    if kind == "video":
        return Shape(
            len(video.indices(video.probe(source), views.frames, views.fps))
            if views.fps
            else views.frames
        )
    return views.shape(image_size(source)) if views.mode in TILED else Shape()


@dataclass
class Sample:
    ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, not shifted; the first is IGNORE
    items: list[Item]  # in order of occurrence
    row: int
    cut: int  # tokens taken off the tail


def read(
    rows: Rows | Mixture, i: int, spec: SampleSpec, do: Callable, where: str, row: dict
) -> list:
    """What `do` (look, measure) makes of each picture or video of row i. Raises UserError that names it."""
    kind, names = media(row, where)
    made = []
    for j, name in enumerate(names):
        source = rows.image(i, j, name)
        try:
            made.append(do(source, kind, spec.views))
        except UserError:
            raise
        except ValueError as e:
            name = name if isinstance(source, bytes) else source
            raise UserError(
                where, f"{kind} {name}: {e}", f"fetch the {kind} again, or remove the row"
            ) from None
    return made


def encode_row(
    rows: Rows | Mixture, i: int, row: dict, where: str, spec: SampleSpec
) -> tuple[list, list, list, int]:
    """Row i without its pixels -> ids, labels, its items' shapes, tokens cut. Raises UserError at `where`."""
    kind, names = media(row, where)
    try:
        tokens = templates.encode(row.get("conversations"), spec.tokenizer, spec.template)
    except ValueError as e:
        raise _user_error(where, e) from None
    except (
        TypeError
    ) as e:  # what `tokenizers` says of half a surrogate pair ("\ud83d"), which JSON may hold
        raise UserError(
            where, f"text that is not Unicode ({e})", "mend the row, or remove it"
        ) from None

    marks = tokens[0].count(IMAGE_TOKEN)
    if marks != len(names):
        what = f"{marks} <image> in what the humans say but {len(names)} {kind}s in the row"
        raise UserError(where, what, "write one <image> for each, or remove the row")
    shapes = read(rows, i, spec, measure, where, row)
    sizes = iter([spec.views.positions(shape) for shape in shapes])
    ids, labels, images_end = [], [], 0
    for token, label in zip(*tokens, strict=True):
        n = next(sizes) if token == IMAGE_TOKEN else 1
        ids += [token] * n
        labels += [IGNORE if token == IMAGE_TOKEN else label] * n
        images_end = len(ids) if token == IMAGE_TOKEN else images_end

    # Text may go, from the tail. Part of an image may not: it would have more features than positions.
    limit = spec.max_tokens
    if images_end > limit:
        what = f"{kind} cut, it ends at token {images_end} and max_tokens is {limit}"
        raise UserError(where, what, "raise max_tokens, or split the row")
    cut = max(0, len(ids) - limit)
    ids, labels = ids[:limit], labels[:limit]
    labels[:1] = [
        IGNORE
    ]  # nothing stands before it; packed, the token to its left is another sample's
    if all(label == IGNORE for label in labels):
        what = f"nothing supervised in the first {len(labels)} of its {len(labels) + cut} tokens"
        raise UserError(where, what, "write an answer, raise max_tokens, or remove the row")
    return ids, labels, shapes, cut


def make_sample(rows: Rows | Mixture, i: int, spec: SampleSpec) -> Sample:
    """Row i, ready for the model. Raises UserError `file:row i (id X): what; fix: action` if it cannot be."""
    row = rows[i]
    where = rows.where(i, row)
    ids, labels, _, cut = encode_row(rows, i, row, where, spec)
    items = read(rows, i, spec, look, where, row)
    return Sample(torch.tensor(ids), torch.tensor(labels), items, i, cut)


# ------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """S samples in one row of T tokens."""

    input_ids: Tensor  # (T,) int64, IMAGE_TOKEN at image positions
    labels: Tensor  # (T,) int64, NOT shifted, IGNORE where unsupervised
    positions: Tensor  # (T,) int64, from 0 in each sample
    cu_seqlens: Tensor  # (S+1,) int32, where samples begin; the last is T
    max_seqlen: int
    images: Tensor | None  # (V, 3, H, W) uint8, in order of occurrence
    shapes: list[Shape]  # of the N items
    rows: list[int]  # S row numbers

    @property
    def supervised(self) -> int:
        """Targets that count: no sample's first token is one, so the model's shift loses none. Waits for a GPU."""
        return int((self.labels != IGNORE).sum())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self, **{k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        )

    def to(self, device) -> Batch:
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def part(self, samples: slice, items: slice) -> Batch:
        """Some of its samples, with their items, as tensor views."""
        cu = self.cu_seqlens[samples.start : samples.stop + 1]
        t, cu = slice(int(cu[0]), int(cu[-1])), cu - cu[0]
        first, last = (
            sum(shape.views for shape in self.shapes[:i]) for i in (items.start, items.stop)
        )
        pixels = self.images[first:last] if last > first else None
        ids, labels, positions, shapes = (
            self.input_ids[t],
            self.labels[t],
            self.positions[t],
            self.shapes[items],
        )
        return Batch(
            ids, labels, positions, cu, int(cu.diff().max()), pixels, shapes, self.rows[samples]
        )


def pack(samples: list[Sample]) -> Batch:
    """Samples one after the other, in the order given."""
    lengths = [len(s.ids) for s in samples]
    items = [item for s in samples for item in s.items]
    return Batch(
        input_ids=torch.cat([s.ids for s in samples]),
        labels=torch.cat([s.labels for s in samples]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
        images=torch.cat([item.pixels for item in items]) if items else None,
        shapes=[item.shape for item in items],
        rows=[s.row for s in samples],
    )


def share(lengths: list[int], world: int) -> list[list[int]]:
    """Which samples of a step each rank takes, so that all have as many tokens: longest first, to who has fewest."""
    shares, tokens = [[] for _ in range(world)], [0] * world
    for j in sorted(range(len(lengths)), key=lambda j: -lengths[j]):
        rank = min(range(world), key=lambda r: (tokens[r], len(shares[r])))
        shares[rank].append(j)
        tokens[rank] += lengths[j]
    return [sorted(s) for s in shares]


def fill(lengths: list[int], budget: int) -> list[list[int]]:
    """Which samples share a micro-batch of at most `budget` tokens: the longest left, and of the others those that
    together come closest to filling it, which all sums that they can make show (bit t of `sums`: t tokens).

    A sample longer than the budget is alone; with budget 0 every one is. Inside, stream order.
    """
    bins, left = [], sorted(range(len(lengths)), key=lambda j: -lengths[j])
    while left:
        chosen, room, sums = left[:1], max(0, budget - lengths[left[0]]), [1]
        for j in left[1:]:
            sums.append((sums[-1] | sums[-1] << lengths[j]) & ((1 << room + 1) - 1))
        total = sums.pop().bit_length() - 1
        for j in reversed(left[1:]):
            if not sums.pop() >> total & 1:  # longer ones alone do not make this total
                chosen.append(j)
                total -= lengths[j]
        bins.append(sorted(chosen))
        left = [j for j in left if j not in chosen]
    return sorted(bins)
