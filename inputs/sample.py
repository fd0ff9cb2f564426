"""A row -> a Sample (ids with every image position in place, labels, pixels); Samples -> a packed Batch: one row of
tokens, positions that restart, `cu_seqlens` where samples meet.

T tokens, S samples, N items (views.py: pictures and videos), V views in all of them, H x W pixels. Ids hold
IMAGE_TOKEN at each of an item's positions, labels hold IGNORE where nothing is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from config import UserError
from inputs import templates, video
from inputs.rows import Mixture, Rows, image_size, load_image, media
from inputs.tiling import TILED, Tiling
from inputs.tokenizer import Tokenizer
from packing import IGNORE, IMAGE_TOKEN, Item, ItemShape

# --------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class SampleSpec:
    """All that decides how a row becomes a sample."""

    tokenizer: Tokenizer
    template: str
    max_tokens: int
    views: Tiling


def user_error(where, error: ValueError) -> UserError:
    what, _, fix = str(error).partition("; fix: ")
    return UserError(where, what, fix or "mend the row, or remove it")


def load_item(source, kind: str, views: Tiling, **part) -> Item:
    """A picture or video (kind) as the encoder sees it; part: video.stream's span and rate. Raises ValueError(what is
    wrong with it), UserError where what reads videos is not installed."""
    if kind == "image":
        return views.picture(load_image(source))
    return views.clip(video.stream(source, views.frames, views.fps, **part))


def item_shape(source, kind: str, views: Tiling) -> ItemShape:
    """The shape of the item that `look` makes of it, without reading more of it than that takes."""
    if kind == "video":
        return ItemShape(
            len(video.indices(video.probe(source), views.frames, views.fps))
            if views.fps
            else views.frames
        )
    return views.shape(image_size(source)) if views.mode in TILED else ItemShape()


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
        raise user_error(where, e) from None
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
    shapes = read(rows, i, spec, item_shape, where, row)
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
    items = read(rows, i, spec, load_item, where, row)
    return Sample(torch.tensor(ids), torch.tensor(labels), items, i, cut)


# ------------------------------------------------------------------------------------------- batches
