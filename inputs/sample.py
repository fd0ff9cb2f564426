"""From a row to a sample: its token ids with every image position in place, its labels, its pixels.

    spec = SampleSpec(tokenizer, template="phi", max_tokens=2048, views=model.views)
    [sample] = make_samples(rows, 7, spec)

`make_samples` is the whole path of a row; read it first. With a picture of three tokens:

    row       USER: <image>\nWho? ASSISTANT: A dog.</s>
    ids       1 3148 ... -200 -200 -200 ... 319 11203 29889 2     -200 is IMAGE_TOKEN
    labels    - -    ... -    -    -    ... 319 11203 29889 2     - is IGNORE: nothing is learned
    items     [Item(pixels (v, 3, S, S), shape)]    in image mode native (patches, patch dim)

A row is one sample. Only a chat template that rewrites earlier turns (chat_template.py) makes one
of each of its answers.

The functions below it do one step each: the text, then pictures and videos, then the checks.

T tokens of a sample; v views of an item (tiling.py: a picture's tiles, a video's frames), each of
S x S pixels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import UserError, printable
from inputs import templates, video
from inputs.forms import Row, form_fix
from inputs.media import Media, missing_fix
from inputs.pictures import image_size, load_image
from inputs.rows import Rows
from inputs.tiling import Tiling
from inputs.tokenizer import Tokenizer
from packing import IGNORE, IMAGE_TOKEN, Item, ItemShape, count_images, expand_images


@dataclass(frozen=True)
class SampleSpec:
    """All that decides how a row becomes a sample."""

    tokenizer: Tokenizer
    template: str  # a name in templates.TEMPLATES
    max_tokens: int
    views: Tiling  # how the model sees pictures and videos, LLaVA.views


@dataclass
class Sample:
    """A row as the model sees it, or an answer of it with the prompt for it."""

    ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, not shifted; the first is IGNORE
    items: list[Item]  # in the order of the row
    row: int  # which of the rows it is
    cut: int  # tokens taken off the tail
    notes: tuple[str, ...] = ()  # how the row was read
    unread: tuple[str, ...] = ()  # its keys that nothing reads
    lost: int = 0  # tokens of later answers of its row, which begin beyond max_tokens


def make_samples(rows: Rows, i: int, spec: SampleSpec, pixels: bool = True) -> list[Sample]:
    """Return row i, ready for the model.

    With pixels=False its items have a shape and no pixels, and files are read no further than that
    takes: this is for counting. Raise UserError "file:row i (id X): what; fix: action" if the row
    cannot be a sample.
    """
    row = rows[i]
    where = rows.where(i, row)
    media = rows.media(i, row)

    # The texts, with a single IMAGE_TOKEN where an item goes. The last one has all items.
    texts = encode_text(row, where, spec)
    ids, _ = texts[-1]
    check_image_count(ids, media, where)

    # The items, which say how many positions each of them takes. A sample shows those of its turns:
    # items of later turns are not seen yet. How many they are may decide how they are seen.
    items = {}
    for count in sorted((count_images(ids) for ids, _ in texts), reverse=True):
        tiling = spec.views.for_images(count)
        if type(tiling) not in items:
            items[type(tiling)] = read_items(media[:count], where, tiling, pixels)

    samples = []
    for ids, labels in texts:
        count = count_images(ids)
        shown = items[type(spec.views.for_images(count))][:count]
        counts = [spec.views.positions(item.shape) for item in shown]

        # The labels first: their places are those of the ids that are not expanded yet.
        labels = expand_images(ids, counts, labels)
        ids = expand_images(ids, counts)

        # The tail of a text may be cut off. An image may not lose a part: it would have more
        # features than positions.
        check_images_fit(ids, media, where, spec.max_tokens)
        cut = max(0, len(ids) - spec.max_tokens)
        ids = ids[: spec.max_tokens]
        labels = labels[: spec.max_tokens]

        # Nothing stands before the first token that could predict it. In a packed row the token to
        # its left belongs to another sample.
        labels[:1] = IGNORE
        samples.append(Sample(ids, labels, shown, i, cut, row.notes, row.unread))
    return drop_unsupervised(samples, where)


def load_items(
    rows: Rows, i: int, spec: SampleSpec, row: Row | None = None, count: int | None = None
) -> list[Item]:
    """Return the items of row i, without its text: for questions about a row, not for training.

    `row` saves reading it again where it is at hand. With `count` they are the first so many, as a
    conversation that shows no others sees them; the others are read, too. Raise UserError that
    names the row.
    """
    if row is None:
        row = rows[i]
    where = rows.where(i, row)
    media = rows.media(i, row)
    if count is None:
        count = len(media)
    return read_items(media, where, spec.views.for_images(count))[:count]


def read_items(media: list[Media], where: str, tiling: Tiling, pixels: bool = True) -> list[Item]:
    """Return the items of a row's pictures and videos, in order. Raise UserError with `where`."""
    items = []
    views = 0
    for one in media:
        if pixels:
            item = load_medium(one, where, tiling)
        else:
            item = measure_media(one, where, tiling)
        items.append(item)
        views += item.shape.views
        check_views(views, where, tiling)
    return items


# ------------------------------------------------------------------------------------------- text


def encode_text(row: Row, where: str, spec: SampleSpec) -> list[tuple[Tensor, Tensor]]:
    """Return the ids and labels of each sample of a row, one IMAGE_TOKEN for each <image>."""
    # A row of no known form has its keys named.
    conversation = row.get("conversations")
    if row and conversation is None:
        keys = {row.keys_read.get(part, part) for part in row}
        what = f"conversations: missing, the row has {printable(', '.join(sorted(keys)), 100)}"
        raise UserError(where, what, form_fix(row))

    try:
        samples = templates.encode_samples(conversation, spec.tokenizer, spec.template)
    except ValueError as e:
        # In messages the turns have the name that they have in the file.
        name = row.keys_read.get("conversations", "conversations")
        what = str(e).replace("conversations", name, 1)
        raise user_error(where, ValueError(what)) from None
    return [(torch.tensor(ids), torch.tensor(labels)) for ids, labels in samples]


def user_error(
    where: str | Path,
    error: ValueError,
    otherwise: str = "mend the row, or remove it",
    before: str = "",
) -> UserError:
    """Return a UserError at `where` for a ValueError("what; fix: action").

    otherwise: what to do about an error that does not say it. before: a text before its message.
    """
    what, _, fix = str(error).partition("; fix: ")
    return UserError(where, before + what, fix or otherwise)


# ---------------------------------------------------------------------------- pictures and videos


def load_item(source: str | Path | bytes, kind: str, tiling: Tiling, **part) -> Item:
    """Return a picture or video as the encoder sees it.

    `kind` is "image" or "video"; `part` are the span and rate of video.stream. Raise ValueError
    (what is wrong with it), or UserError if what reads videos is not installed.
    """
    if kind == "image":
        image = load_image(source, tiling.check_size)
        return tiling.picture(image)

    frames = video.stream(source, tiling.frames, tiling.fps, **part)
    return tiling.clip(frames)


def item_shape(source: str | Path | bytes, kind: str, tiling: Tiling) -> ItemShape:
    """Return the shape of the item that `load_item` returns, and read no more than that takes.

    Raise as `load_item` does, for a file that has to be read.
    """
    if kind == "image":
        if tiling.tiled or tiling.native:
            return tiling.shape(image_size(source))
        return ItemShape()

    tiling.check_video()

    # Without fps every video has the same number of frames, so none is opened.
    frames = tiling.frames
    if tiling.fps:
        clip = video.probe(source)
        frames = len(video.indices(clip, tiling.frames, tiling.fps))
    if not tiling.native:
        return ItemShape(frames)

    # All frames have the size of the first one.
    (first,) = video.frames(source, 1)
    return tiling.clip_shape(frames, first.size)


def load_medium(media: Media, where: str, tiling: Tiling) -> Item:
    """Return the item of a row's picture or video. Raise UserError at `where`."""
    try:
        return load_item(media.source, media.kind, tiling)
    except ValueError as e:
        raise media_error(media, where, e) from None


def measure_media(media: Media, where: str, tiling: Tiling) -> Item:
    """Return the item of a row's picture or video without pixels. Raise UserError at `where`."""
    try:
        shape = item_shape(media.source, media.kind, tiling)
    except ValueError as e:
        raise media_error(media, where, e) from None
    return Item(torch.empty(0), shape)


def check_views(views: int, where: str, tiling: Tiling):
    """Raise UserError at `where` if a row's pictures and videos have too many views together."""
    try:
        tiling.check_views(views)
    except ValueError as e:
        raise UserError(where, str(e), "split the row") from None


def media_error(media: Media, where: str, error: ValueError) -> UserError:
    """Return what to raise for a picture or video that cannot be read."""
    # A package that is missing is no fault of this row. (A UserError is a ValueError, too.)
    if isinstance(error, UserError):
        return error

    fix = f"fetch the {media.kind} again, or remove the row"
    if isinstance(media.source, bytes) or not os.path.exists(media.source):
        fix = missing_fix(media)
    return user_error(where, error, fix, f"{media}: ")


# ----------------------------------------------------------------------------------------- checks


def kind_of(media: list[Media]) -> str:
    """Return what a row's media are, "image" or "video": a row has no two kinds."""
    if media:
        return media[0].kind
    return "image"


def check_image_count(ids: Tensor, media: list[Media], where: str):
    """Raise UserError unless there is one <image> for each picture or video."""
    written = int((ids == IMAGE_TOKEN).sum())
    if written != len(media):
        there = f"{len(media)} {kind_of(media)}s in the row"
        what = f"{written} <image> in what the humans say but {there}"
        raise UserError(where, what, "write one <image> for each, or remove the row")


def check_images_fit(ids: Tensor, media: list[Media], where: str, max_tokens: int):
    """Raise UserError if an image's positions go beyond max_tokens. The ids are expanded."""
    positions = (ids == IMAGE_TOKEN).nonzero()
    if not len(positions):
        return

    end = int(positions[-1]) + 1
    if end > max_tokens:
        what = f"{kind_of(media)} cut, it ends at token {end} and max_tokens is {max_tokens}"
        raise UserError(where, what, "raise max_tokens, or split the row")


def drop_unsupervised(samples: list[Sample], where: str) -> list[Sample]:
    """Return the samples of a row in which something is left to learn. Raise UserError if none has.

    An answer that begins beyond max_tokens is lost, as it is where all answers are one sample. The
    last sample that is left says how many tokens that are.
    """
    kept = []
    lost = 0
    for sample in samples:
        if (sample.labels != IGNORE).any():
            kept.append(sample)
        else:
            lost += len(sample.labels) + sample.cut
    if not kept:
        sample = samples[0]
        total = len(sample.labels) + sample.cut
        what = f"nothing supervised in the first {len(sample.labels)} of its {total} tokens"
        raise UserError(where, what, "write an answer, raise max_tokens, or remove the row")
    kept[-1].lost = lost
    return kept
