"""A scene of the demo world: what it holds, which split it belongs to, and its picture.

    scene = draw_scene(random.Random(0), "train")   # [{"colour": "red", "shape": "circle", ...}]
    image = render(scene, background=(240, 240, 240))

A scene is a list of one to three objects on a 2 x 2 grid, in reading order. An object is a
dictionary (`Thing`), because the rows of the data set hold it as it is.

The *composition* of a scene is the multiset of its (colour, shape) pairs. It alone decides whether
the scene may be trained on, so a model is tested on combinations of objects that it has never seen
together, wherever they stand and however large they are.

The file in order: the constants, compositions and splits, drawing a scene at random, its picture.
"""

import random
import zlib
from collections.abc import Iterable
from typing import TypedDict

from PIL import Image, ImageDraw

IMAGE_SIZE = 48  # pixels
GRID = 2  # cells a side
CELL = IMAGE_SIZE // GRID  # pixels: one patch of the demo's encoder
SCALE = 4  # pictures are drawn four times larger and averaged down, for clean edges

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 190, 20),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"large": 19, "small": 12}  # pixels across
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]

# These are drawn twice as often as the others, so that POPE's "popular" negatives mean something.
POPULAR = [("red", "circle"), ("green", "triangle"), ("blue", "square"), ("yellow", "circle")]

# How often a further object takes the first one's colour or shape. Without it, counts above one
# and objects that are easily confused would be rare.
REPEAT = 0.5

# How many objects a scene has, and how often: about a single one there is little to ask.
COUNTS = (1, 2, 3)
COUNT_WEIGHTS = (1, 3, 4)

BENCHMARK_PERCENT = 12  # of all compositions
VAL_PERCENT = 4  # the rest is for training

# The salt of the hash that deals compositions to splits. With this one, every answer to every
# question occurs among the held-out scenes.
SALT = 1970

Pair = tuple[str, str]  # (colour, shape)


class Thing(TypedDict):
    """One object of a scene."""

    colour: str
    shape: str
    size: str
    cell: list[int]  # [row, column]
    box: list[float]  # [left, top, right, bottom] in pixels


Scene = list[Thing]


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


def draw_scene(rng: random.Random, split: str, count: int | None = None) -> Scene:
    """Return a random scene of `split` with `count` objects (None: one to three)."""
    # Draw until the composition is one of the split. The count is drawn anew each time.
    while True:
        n = count
        if n is None:
            n = rng.choices(COUNTS, weights=COUNT_WEIGHTS)[0]
        pairs = draw_pairs(rng, n)
        if split_of(pairs) == split:
            break

    # Cells are numbered row by row, so sorted numbers are in reading order.
    cells = sorted(rng.sample(range(GRID * GRID), n))
    scene = []
    for pair, number in zip(pairs, cells, strict=True):
        cell = divmod(number, GRID)
        scene.append(place(rng, pair, cell))
    return scene


def place(rng: random.Random, pair: Pair, cell: tuple[int, int]) -> Thing:
    """Return one object of random size, up to a pixel each way from the middle of its cell."""
    size = rng.choice(list(SIZES))

    # All in quarters of a pixel, the grid that `render` draws on: its edges are then whole numbers.
    cell_width = CELL * SCALE
    width = SIZES[size] * SCALE
    margin = (cell_width - width) // 2
    row, column = cell
    top = row * cell_width + margin + rng.randint(-SCALE, SCALE)
    left = column * cell_width + margin + rng.randint(-SCALE, SCALE)
    bottom = top + width
    right = left + width

    colour, shape = pair
    return {
        "colour": colour,
        "shape": shape,
        "size": size,
        "cell": [row, column],
        "box": [left / SCALE, top / SCALE, right / SCALE, bottom / SCALE],
    }


def draw_background(rng: random.Random) -> tuple[int, int, int]:
    """Return a random light colour, (red, green, blue)."""
    red = rng.randint(225, 250)
    green = rng.randint(225, 250)
    blue = rng.randint(225, 250)
    return red, green, blue


# ---------------------------------------------------------------------- its picture


def render(scene: Scene, background: tuple[int, int, int]) -> Image.Image:
    """Return the picture of a scene, (IMAGE_SIZE, IMAGE_SIZE) RGB."""
    drawn_size = IMAGE_SIZE * SCALE
    image = Image.new("RGB", (drawn_size, drawn_size), background)
    draw = ImageDraw.Draw(image)
    for thing in scene:
        box = [edge * SCALE for edge in thing["box"]]
        colour = COLOURS[thing["colour"]]
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
