"""From a row to a sample: its token ids with every image position in place, its labels, its pixels.

    spec = SampleSpec(tokenizer, template="phi", max_tokens=2048, views=model.views)
    sample = make_sample(rows, 7, spec)

`make_sample` is the whole path of a row: the text becomes ids and labels, media become items, each
<image> gets as many positions as its item has tokens, and what is longer than max_tokens is cut.

T tokens of a sample; v views of an item (tiling.py: a picture's tiles, a video's frames). Ids hold
IMAGE_TOKEN at each of an item's positions, labels hold IGNORE where nothing is learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import UserError
from inputs import templates, video
from inputs.media import Media
from inputs.pictures import image_size, load_image
from inputs.rows import Rows
from inputs.tiling import TILED, Tiling
from inputs.tokenizer import Tokenizer
from packing import IGNORE, IMAGE_TOKEN, Item, ItemShape, expand_images


@dataclass(frozen=True)
class SampleSpec:
    """All that decides how a row becomes a sample."""

    tokenizer: Tokenizer
    template: str
    max_tokens: int
    views: Tiling


@dataclass
class Sample:
    """A row as the model sees it."""

    ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, not shifted; the first is IGNORE
    items: list[Item]  # in order of occurrence
    row: int
    cut: int  # tokens taken off the tail


def make_sample(rows: Rows, i: int, spec: SampleSpec, pixels: bool = True) -> Sample:
    """Return row i, ready for the model.

    With pixels=False its items have a shape and no pixels, and files are read no further than that
    takes: this is for counting. Raise UserError "file:row i (id X): what; fix: action" if the row
    cannot be a sample.
    """
    row = rows[i]
    where = rows.where(i, row)
    media = rows.media(i, row)

    # The text, with a single IMAGE_TOKEN where an item goes.
    ids, labels = encode_text(row, where, spec)
    check_marks(ids, media, where)

    # The items, which say how many positions each of them takes.
    if pixels:
        items = [load_media(m, where, spec.views) for m in media]
    else:
        items = [measure_media(m, where, spec.views) for m in media]
    counts = [spec.views.positions(item.shape) for item in items]
    labels = expand_images(ids, counts, labels)
    ids = expand_images(ids, counts)

    # Text may be cut, from the tail. Part of an image may not: it would have more features than
    # positions.
    check_images_fit(ids, media, where, spec.max_tokens)
    cut = max(0, len(ids) - spec.max_tokens)
    ids = ids[: spec.max_tokens]
    labels = labels[: spec.max_tokens]

    # Nothing stands before the first token that could predict it. In a packed row the token to its
    # left belongs to another sample.
    labels[:1] = IGNORE
    check_supervised(labels, where, cut)
    return Sample(ids, labels, items, i, cut)


def load_items(rows: Rows, i: int, spec: SampleSpec, row: dict | None = None) -> list[Item]:
    """Return the items of all pictures or videos of row i. Raise UserError that names it."""
    if row is None:
        row = rows[i]
    where = rows.where(i, row)
    return [load_media(media, where, spec.views) for media in rows.media(i, row)]


# ------------------------------------------------------------------------------------------- text


def encode_text(row: dict, where: str, spec: SampleSpec) -> tuple[Tensor, Tensor]:
    """Return the ids and labels of a row's conversation, one IMAGE_TOKEN for each <image>."""
    try:
        conversation = row.get("conversations")
        ids, labels = templates.encode(conversation, spec.tokenizer, spec.template)
    except ValueError as e:
        raise user_error(where, e) from None
    except TypeError as e:
        # `tokenizers` says this of half a surrogate pair ("\ud83d"), which JSON may hold.
        what = f"text that is not Unicode ({e})"
        raise UserError(where, what, "mend the row, or remove it") from None
    return torch.tensor(ids), torch.tensor(labels)


def user_error(where: str | Path, error: ValueError) -> UserError:
    """Return a UserError at `where` for a ValueError("what; fix: action")."""
    what, _, fix = str(error).partition("; fix: ")
    return UserError(where, what, fix or "mend the row, or remove it")


# ---------------------------------------------------------------------------- pictures and videos


def load_item(source: str | Path | bytes, kind: str, views: Tiling, **part) -> Item:
    """Return a picture or video as the encoder sees it.

    `kind` is "image" or "video"; `part` are the span and rate of video.stream. Raise ValueError
    (what is wrong with it), or UserError where what reads videos is not installed.
    """
    if kind == "image":
        return views.picture(load_image(source))
    return views.clip(video.stream(source, views.frames, views.fps, **part))


def item_shape(source: str | Path | bytes, kind: str, views: Tiling) -> ItemShape:
    """Return the shape of the item that `load_item` returns, and read no more than that takes."""
    if kind == "image":
        if views.mode in TILED:
            return views.shape(image_size(source))
        return ItemShape()

    if views.fps:
        clip = video.probe(source)
        return ItemShape(len(video.indices(clip, views.frames, views.fps)))
    return ItemShape(views.frames)


def load_media(media: Media, where: str, views: Tiling) -> Item:
    """Return the item of a row's picture or video. Raise UserError at `where`."""
    try:
        return load_item(media.source, media.kind, views)
    except ValueError as e:
        raise media_error(media, where, e) from None


def measure_media(media: Media, where: str, views: Tiling) -> Item:
    """Return the item of a row's picture or video without pixels. Raise UserError at `where`."""
    try:
        shape = item_shape(media.source, media.kind, views)
    except ValueError as e:
        raise media_error(media, where, e) from None
    return Item(torch.empty(0), shape)


def media_error(media: Media, where: str, error: ValueError) -> UserError:
    """Return what to raise for a picture or video that cannot be read."""
    if isinstance(error, UserError):
        return error  # of the installation, not of this row
    fix = f"fetch the {media.kind} again, or remove the row"
    return UserError(where, f"{media}: {error}", fix)


# ----------------------------------------------------------------------------------------- checks


def kind_of(media: list[Media]) -> str:
    """Return what a row's media are, in one word."""
    return media[0].kind if media else "image"


def check_marks(ids: Tensor, media: list[Media], where: str):
    """Raise UserError unless there is one <image> for each picture or video."""
    marks = int((ids == IMAGE_TOKEN).sum())
    if marks != len(media):
        there = f"{len(media)} {kind_of(media)}s in the row"
        what = f"{marks} <image> in what the humans say but {there}"
        raise UserError(where, what, "write one <image> for each, or remove the row")


def check_images_fit(ids: Tensor, media: list[Media], where: str, max_tokens: int):
    """Raise UserError if an image's positions, all in place now, go beyond max_tokens."""
    positions = (ids == IMAGE_TOKEN).nonzero()
    if not len(positions):
        return
    end = int(positions[-1]) + 1
    if end > max_tokens:
        what = f"{kind_of(media)} cut, it ends at token {end} and max_tokens is {max_tokens}"
        raise UserError(where, what, "raise max_tokens, or split the row")


def check_supervised(labels: Tensor, where: str, cut: int):
    """Raise UserError if there is nothing to learn in what is left of a row."""
    if bool((labels == IGNORE).all()):
        total = len(labels) + cut
        what = f"nothing supervised in the first {len(labels)} of its {total} tokens"
        raise UserError(where, what, "write an answer, raise max_tokens, or remove the row")
