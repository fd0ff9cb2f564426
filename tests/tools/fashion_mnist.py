"""Fashion-MNIST as LLaVA rows, for fashion_mnist.toml: SmolLM2 learns to name clothes.

    python tests/tools/fashion_mnist.py out/fashion-data

The source is the picture of 900 examples that Fashion-MNIST is published with (Xiao et al., 2017).
20 of each class are held out. Of the other 70 each is written in VARIANTS forms, moved by up to two
pixels and mirrored, since an encoder from scratch sees few pictures.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageOps

SHEET = "shared/assets/datasets/fashion-mnist/fashion-mnist-sprite.png"
SOURCE = Path(__file__).resolve().parents[3] / SHEET
SIDE = 28  # pixels of a picture
ROWS_OF_A_CLASS = 3  # of the sheet, in the order of NAMES
COLUMNS = 30
NAMES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
HELD_OUT = 20  # the last ones of each class
VARIANTS = 16
QUESTION = "<image>\nWhat is this?"


def read_pictures() -> list[tuple[str, list[Image.Image]]]:
    """Return each class's name and its 90 pictures."""
    sheet = Image.open(SOURCE).convert("L")
    classes = []
    for i, name in enumerate(NAMES):
        pictures = []
        for row in range(i * ROWS_OF_A_CLASS, (i + 1) * ROWS_OF_A_CLASS):
            for column in range(COLUMNS):
                left, top = column * SIDE, row * SIDE
                pictures.append(sheet.crop((left, top, left + SIDE, top + SIDE)))
        classes.append((name, pictures))
    return classes


def vary(picture: Image.Image, draw: random.Random) -> Image.Image:
    """Return the picture, moved on its black ground by up to two pixels and perhaps mirrored."""
    if draw.random() < 0.5:
        picture = ImageOps.mirror(picture)
    framed = ImageOps.expand(picture, 2)
    moved = ImageChops.offset(framed, draw.randint(-2, 2), draw.randint(-2, 2))
    return moved.crop((2, 2, 2 + SIDE, 2 + SIDE))


def make_row(image: str, question: str, answer: str) -> dict:
    """Return one LLaVA row."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": Path(image).stem, "image": image, "conversations": turns}


def write(folder: Path):
    """Write the pictures, and captions and questions to train on and to hold out."""
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True)
    files = {"captions": [], "questions": [], "held-out": []}
    for name, pictures in read_pictures():
        for i, picture in enumerate(pictures[:-HELD_OUT]):
            for k in range(VARIANTS):
                image = f"images/{name}-{i}-{k}.png"
                vary(picture, draw).save(folder / image)
                files["captions"].append(make_row(image, "<image>", name))
                files["questions"].append(make_row(image, QUESTION, name))

        for i, picture in enumerate(pictures[-HELD_OUT:]):
            image = f"images/{name}-held-out-{i}.png"
            picture.save(folder / image)
            files["held-out"].append(make_row(image, QUESTION, name))

    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
