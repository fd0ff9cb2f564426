"""The other world: the demo's scenes in hues and shapes that the demo lacks.

    python -m demo.other out/lab/other --seed 1 --scenes 12000

The laboratory's grids need parts that are pretrained, and have not seen what they are tested on.
A model of this world can look for objects, count them and tell where they are, as a pretrained
encoder and language model can, but it has met neither the demo's colours nor its shapes, nor their
names. A scene of the other world is a scene of the demo in which each colour and each shape has
become another one, in the picture and in every word. Written to OUT:

    images/{pretrain,finetune}/*.png
    pretrain.json  finetune.json    as world.py's
    tokenizer/                      as world.py's, with a token for each word of both worlds
    world.json                      seed and sizes; written last

The file in order: what becomes what, pictures, rows, the whole folder. The same seed writes the
same bytes.
"""

import colorsys
import json
import random
import re
from pathlib import Path

from PIL import Image, ImageDraw

from demo import world
from demo.questions import Balance
from demo.scenes import IMAGE_SIZE, SCALE, Colour, Scene, Thing, draw_background, draw_scene

# What each colour becomes, and by how many degrees its hue is turned for that.
COLOURS = {
    "red": ("copper", 28),
    "green": ("teal", 50),
    "blue": ("purple", 55),
    "yellow": ("pink", 280),
}

# What each shape becomes. `draw_shape` draws it.
SHAPES = {"circle": "ring", "square": "diamond", "triangle": "cross"}

WORDS = {colour: name for colour, (name, _) in COLOURS.items()}
for shape, other in SHAPES.items():
    WORDS[shape] = other
    WORDS[f"{shape}s"] = f"{other}s"


def translated(row: dict) -> dict:
    """Return a row of the demo's world, each word of which has become the other world's."""

    def translate(match: re.Match) -> str:
        word = match[0]
        return WORDS.get(word, word)

    text = re.sub(r"\w+", translate, json.dumps(row))
    return json.loads(text)


# ---------------------------------------------------------------------- pictures


def fill_of(thing: Thing) -> Colour:
    """Return the colour that an object of the demo has in the other world."""
    channels = [channel / 255 for channel in thing["fill"]]
    hue, saturation, brightness = colorsys.rgb_to_hsv(*channels)

    # Shades stay as they are: only the hue is turned.
    _, degrees = COLOURS[thing["colour"]]
    hue += degrees / 360
    channels = colorsys.hsv_to_rgb(hue % 1, saturation, brightness)
    red, green, blue = [round(255 * channel) for channel in channels]
    return red, green, blue


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: list[float], colour: Colour):
    """Draw one of the other world's shapes into a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    width = right - left
    middle_x = (left + right) / 2
    middle_y = (top + bottom) / 2
    if shape == "ring":
        draw.ellipse(box, outline=colour, width=round(width / 4))
    elif shape == "diamond":
        corners = [
            (middle_x, top),
            (right, middle_y),
            (middle_x, bottom),
            (left, middle_y),
        ]
        draw.polygon(corners, fill=colour)
    else:
        # Two bars, each a third as thick as it is long.
        half = width / 6
        lying = [left, middle_y - half, right, middle_y + half]
        standing = [middle_x - half, top, middle_x + half, bottom]
        draw.rectangle(lying, fill=colour)
        draw.rectangle(standing, fill=colour)


def render(scene: Scene, background: Colour) -> Image.Image:
    """Return the picture of a scene of the demo as it looks in the other world."""
    side = IMAGE_SIZE * SCALE
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    for thing in scene:
        box = [edge * SCALE for edge in thing["box"]]
        draw_shape(draw, SHAPES[thing["shape"]], box, fill_of(thing))
    return image.reduce(SCALE)


# ---------------------------------------------------------------------- rows


def demo_rows(split: str, rng: random.Random, count: int, out: Path) -> list[dict]:
    """Return rows about scenes in the words of the demo, and write pictures of the other world."""
    balance = Balance()
    images = out / "images"
    (images / split).mkdir(parents=True)
    rows = []
    for i in range(count):
        scene = draw_scene(rng, "train")
        name = f"{split}/{i:05d}.png"
        background = draw_background(rng)
        picture = render(scene, background)
        picture.save(images / name, compress_level=1)

        row_name = f"{split}-{i:05d}"
        if split == "pretrain":
            row = world.caption_row(row_name, name, scene)
        else:
            row = world.question_row(row_name, name, scene, rng, balance)
        rows.append(row)
    return rows


def fill_folder(out: Path, seed: int, scenes: int, asks_about: str):
    """Write the whole data set into the folder `out`, which it makes.

    There is no benchmark, so `asks_about` decides nothing here.
    """
    counts = {"pretrain": scenes // 2, "finetune": scenes - scenes // 2}
    streams = world.random_streams(seed)
    said = []
    for split, count in counts.items():
        rows = demo_rows(split, streams[split], count, out)
        others = [translated(row) for row in rows]
        world.write_rows(out / f"{split}.json", others)
        said += rows
        said += others

    # Models that start from this world go on with the demo's words.
    world.train_tokenizer(said, out / "tokenizer")
    world.write_summary(out / "world.json", seed, scenes, IMAGE_SIZE, counts)


if __name__ == "__main__":
    world.main(__doc__, world.SCENES, fill_folder)
