"""A scene of the demo world: what it holds, which split it belongs to, and its picture.

    scene = draw_scene(random.Random(0), "train")   # [{"colour": "red", "shape": "circle", ...}]
    image = render(scene, background=(240, 240, 240))

A scene is a list of one to four objects on a 3 x 3 grid, in reading order. An object is a
dictionary (`Thing`), because the rows of the data set hold it as it is. It lies within two pixels
of the middle of its cell, has one of eight sizes and any shade of its colour, so no two pictures of
"a red circle" are alike, and it covers several patches of the demo's encoder.

The *composition* of a scene is the multiset of its (colour, shape) pairs. It alone decides whether
the scene may be trained on, so a model is tested on combinations of objects that it has never seen
together, wherever they stand and however large they are.

A `Look` says how scenes are drawn: `TRAINED` is the one of all training pictures. Those of
`UNSEEN` each differ from it in one thing, and ask whether a model has learned more than what it was
shown.

The file in order: the constants, compositions and splits, drawing a scene at random, its picture.
"""

import colorsys
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypedDict

from PIL import Image, ImageDraw

IMAGE_SIZE = 72  # pixels
GRID = 3  # cells a side
CELL = IMAGE_SIZE // GRID  # pixels: two patches of the demo's encoder
SHIFT = 2  # pixels: how far from the middle of its cell an object may be, each way
SCALE = 4  # pictures are drawn four times larger and averaged down, for clean edges

# The hues of each colour, least and greatest, in degrees. Saturation and brightness vary, too.
COLOURS = {
    "red": (-12, 8),
    "green": (105, 150),
    "blue": (210, 240),
    "yellow": (44, 58),
}
SATURATION = (0.7, 0.95)
BRIGHTNESS = (0.65, 0.95)
SHAPES = ("circle", "square", "triangle")
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]

# These are drawn twice as often as the others, so that POPE's "popular" negatives mean something.
POPULAR = [("red", "circle"), ("green", "triangle"), ("blue", "square"), ("yellow", "circle")]

# How often a further object takes the first one's colour or shape. Without it, counts above one
# and objects that are easily confused would be rare.
REPEAT = 0.5

BENCHMARK_PERCENT = 12  # of all compositions
VAL_PERCENT = 8  # the rest is for training

# The salt of the hash that deals compositions to splits. With this one, every answer to every
# question occurs among the held-out scenes.
SALT = 1970

Pair = tuple[str, str]  # (colour, shape)
Colour = tuple[int, int, int]  # red, green, blue: 0 to 255


class Thing(TypedDict):
    """One object of a scene."""

    colour: str
    shape: str
    cell: list[int]  # [row, column]
    box: list[float]  # [left, top, right, bottom] in pixels
    fill: list[int]  # [red, green, blue]


Scene = list[Thing]


@dataclass(frozen=True)
class Look:
    """How scenes are drawn."""

    counts: tuple[int, ...] = (1, 2, 3, 4)  # how many objects a scene may have
    count_weights: tuple[int, ...] = (1, 2, 3, 3)  # how often: of one there is little to ask
    widths: tuple[int, ...] = tuple(range(13, 21))  # pixels across
    grid: int = GRID  # cells a side that objects may stand in
    offset: int = 0  # pixels from the picture's corner to that of the first cell, both ways
    background: tuple[int, int] = (225, 250)  # least and greatest of red, of green and of blue


TRAINED = Look()

# Each differs from what is trained on in one thing. Between the cells are the places where no
# trained object has its middle: the corners that four cells share.
UNSEEN = {
    "sizes": replace(TRAINED, widths=(8, 9, 10, 22, 23)),
    "positions": replace(TRAINED, grid=GRID - 1, offset=CELL // 2),
    "backgrounds": replace(TRAINED, background=(120, 190)),
    "objects": replace(TRAINED, counts=(5, 6), count_weights=(1, 1)),
}


# ---------------------------------------------------------------------- compositions and splits


def pair_of(thing: Thing) -> Pair:
    """Return the (colour, shape) of an object."""
    return thing["colour"], thing["shape"]


def composition(scene: Scene) -> tuple[Pair, ...]:
    """Return the sorted (colour, shape) pairs of a scene, wherever its objects stand."""
    return tuple(sorted(map(pair_of, scene)))


def split_of(pairs: Iterable[Pair]) -> str:
    """Return the split of a composition, given in any order: "train", "val" or "benchmark".

    It depends on no seed, so two data sets never disagree about it.
    """
    text = repr((SALT, tuple(sorted(pairs))))

    # crc32 and not hash(): the latter differs from one process to the next.
    number = zlib.crc32(text.encode()) % 100
    if number < BENCHMARK_PERCENT:
        return "benchmark"
    if number < BENCHMARK_PERCENT + VAL_PERCENT:
        return "val"
    return "train"


# ---------------------------------------------------------------------- drawing a scene at random


def draw_pairs(rng: random.Random, count: int) -> list[Pair]:
    """Return (colour, shape) of `count` random objects."""
    weights = []
    for pair in PAIRS:
        weights.append(2 if pair in POPULAR else 1)
    pairs = rng.choices(PAIRS, weights=weights, k=count)

    # Let some of the further objects share the first one's colour or its shape.
    first_colour, first_shape = pairs[0]
    for i in range(1, count):
        if rng.random() < REPEAT:
            colour, shape = pairs[i]
            if rng.random() < 0.5:
                colour = first_colour
            else:
                shape = first_shape
            pairs[i] = (colour, shape)
    return pairs


def draw_scene(
    rng: random.Random, split: str, count: int | None = None, look: Look = TRAINED
) -> Scene:
    """Return a random scene of `split` with `count` objects (None: as many as `look` says)."""
    # Draw until the composition is one of the split. The count is drawn anew each time.
    while True:
        n = count
        if n is None:
            n = rng.choices(look.counts, weights=look.count_weights)[0]
        pairs = draw_pairs(rng, n)
        if split_of(pairs) == split:
            break

    # Cells are numbered row by row, so sorted numbers are in reading order.
    cells = sorted(rng.sample(range(look.grid * look.grid), n))
    scene = []
    for pair, number in zip(pairs, cells, strict=True):
        cell = divmod(number, look.grid)
        scene.append(place(rng, pair, cell, look))
    return scene


def place(rng: random.Random, pair: Pair, cell: tuple[int, int], look: Look = TRAINED) -> Thing:
    """Return one object of random size and shade, near the middle of its cell."""
    # All in quarters of a pixel, the grid that `render` draws on: its edges are then whole numbers.
    # Half a pixel stays free on each side, so that neighbours never touch: the largest objects of
    # `UNSEEN` cannot be shifted as far as others.
    width = rng.choice(look.widths) * SCALE
    cell_width = CELL * SCALE
    margin = (cell_width - width) // 2
    shift = min(SHIFT * SCALE, margin - 2)
    row, column = cell
    top = look.offset * SCALE + row * cell_width + margin + rng.randint(-shift, shift)
    left = look.offset * SCALE + column * cell_width + margin + rng.randint(-shift, shift)
    bottom = top + width
    right = left + width

    colour, shape = pair
    return {
        "colour": colour,
        "shape": shape,
        "cell": [row, column],
        "box": [left / SCALE, top / SCALE, right / SCALE, bottom / SCALE],
        "fill": draw_fill(rng, colour),
    }


def draw_fill(rng: random.Random, colour: str) -> list[int]:
    """Return a random shade of a colour, [red, green, blue]."""
    hue = rng.uniform(*COLOURS[colour]) / 360
    saturation = rng.uniform(*SATURATION)
    brightness = rng.uniform(*BRIGHTNESS)
    channels = colorsys.hsv_to_rgb(hue % 1, saturation, brightness)
    return [round(255 * channel) for channel in channels]


def draw_background(rng: random.Random, look: Look = TRAINED) -> Colour:
    """Return a random colour for what is behind the objects, (red, green, blue)."""
    red = rng.randint(*look.background)
    green = rng.randint(*look.background)
    blue = rng.randint(*look.background)
    return red, green, blue


# ---------------------------------------------------------------------- its picture


def render(scene: Scene, background: Colour, size: int = IMAGE_SIZE) -> Image.Image:
    """Return the picture of a scene, (size, size) RGB."""
    drawn_size = size * SCALE
    image = Image.new("RGB", (drawn_size, drawn_size), background)
    draw = ImageDraw.Draw(image)
    for thing in scene:
        box = [edge * SCALE for edge in thing["box"]]
        colour = tuple(thing["fill"])
        shape = thing["shape"]
        if shape == "circle":
            draw.ellipse(box, fill=colour)
        elif shape == "square":
            draw.rectangle(box, fill=colour)
        else:
            left, top, right, bottom = box
            peak = ((left + right) / 2, top)
            draw.polygon([(left, bottom), (right, bottom), peak], fill=colour)

    # Each pixel becomes the mean of the SCALE x SCALE pixels drawn for it.
    return image.reduce(SCALE)
