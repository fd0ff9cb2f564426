"""A scene of the demo world: what it holds, which split it belongs to, and its picture.

    scene = draw_scene(random.Random(0), "train")   # [{"colour": "red", "shape": "circle", ...}]
    image = render(scene, background=(240, 240, 240))

A scene is a list of one to three objects on a 2 x 2 grid, in reading order. An object is a
dictionary, because the rows of the data set hold it as it is (`Thing`).

The *composition* of a scene is the multiset of its (colour, shape) pairs. It alone decides whether
the scene may be trained on, so a model is tested on combinations of objects that it has never seen
together, wherever they stand and however large they are.
"""

import random
import zlib
from typing import TypedDict

from PIL import Image, ImageDraw

IMAGE_SIZE = 48  # pixels
GRID = 2
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
OBJECTS = (1, 3, 4)  # weights of one, two and three objects: about one there is little to ask

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


def composition(scene: Scene) -> tuple[Pair, ...]:
    """Return what a scene is made of, wherever it stands: its sorted (colour, shape) pairs."""
    return tuple(sorted((thing["colour"], thing["shape"]) for thing in scene))


def split_of(scene: Scene) -> str:
    """Return "train", "val" or "benchmark".

    It depends on the composition alone and on no seed, so two data sets never disagree about it.
    """
    text = repr((SALT, composition(scene)))
    number = zlib.crc32(text.encode()) % 100
    if number < BENCHMARK_PERCENT:
        return "benchmark"
    if number < BENCHMARK_PERCENT + VAL_PERCENT:
        return "val"
    return "train"


def draw_pairs(rng: random.Random, count: int) -> list[Pair]:
    """Return (colour, shape) of `count` random objects."""
    weights = [2 if pair in POPULAR else 1 for pair in PAIRS]
    pairs = rng.choices(PAIRS, weights=weights, k=count)

    # Let some of the further objects share the first one's colour or its shape.
    for i in range(1, count):
        if rng.random() < REPEAT:
            colour, shape = pairs[i]
            if rng.random() < 0.5:
                pairs[i] = (pairs[0][0], shape)
            else:
                pairs[i] = (colour, pairs[0][1])
    return pairs


def draw_scene(rng: random.Random, split: str, count: int | None = None) -> Scene:
    """Return a random scene of `split` with `count` objects (None: one to three)."""
    while True:
        n = count or rng.choices((1, 2, 3), weights=OBJECTS)[0]
        pairs = draw_pairs(rng, n)
        if split_of([{"colour": colour, "shape": shape} for colour, shape in pairs]) == split:
            break

    cells = sorted(rng.sample(range(GRID * GRID), n))
    scene = []
    for pair, cell in zip(pairs, cells, strict=True):
        scene.append(place(rng, pair, divmod(cell, GRID)))
    return scene


def place(rng: random.Random, pair: Pair, cell: tuple[int, int]) -> Thing:
    """Return one object, moved from the middle of its cell by up to a pixel each way."""
    size = rng.choice(list(SIZES))

    # All in quarters of a pixel, the grid that `render` draws on.
    width = SIZES[size] * SCALE
    margin = (CELL * SCALE - width) // 2
    row, column = cell
    top = CELL * SCALE * row + margin + rng.randint(-SCALE, SCALE)
    left = CELL * SCALE * column + margin + rng.randint(-SCALE, SCALE)
    box = [edge / SCALE for edge in (left, top, left + width, top + width)]

    colour, shape = pair
    return {"colour": colour, "shape": shape, "size": size, "cell": list(cell), "box": box}


def draw_background(rng: random.Random) -> tuple[int, int, int]:
    """Return a random light colour."""
    return (rng.randint(225, 250), rng.randint(225, 250), rng.randint(225, 250))


def render(scene: Scene, background: tuple[int, int, int]) -> Image.Image:
    """Return the picture of a scene, (IMAGE_SIZE, IMAGE_SIZE) RGB."""
    image = Image.new("RGB", (IMAGE_SIZE * SCALE, IMAGE_SIZE * SCALE), background)
    draw = ImageDraw.Draw(image)
    for thing in scene:
        left, top, right, bottom = (edge * SCALE for edge in thing["box"])
        colour = COLOURS[thing["colour"]]
        if thing["shape"] == "circle":
            draw.ellipse((left, top, right, bottom), fill=colour)
        elif thing["shape"] == "square":
            draw.rectangle((left, top, right, bottom), fill=colour)
        else:
            corners = ((left, bottom), (right, bottom), ((left + right) / 2, top))
            draw.polygon(corners, fill=colour)
    return image.reduce(SCALE)
