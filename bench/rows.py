"""Made-up rows and pictures for bench/data.py, with about the sizes of LLaVA's 665k mix.

A folder gets rows.json, one JSON list of conversations, and images/*.jpg, which the rows name. The
same count gives the same bytes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple


class Kind(NamedTuple):
    """One of the sources that LLaVA-665k is made of; words are of one turn, on average."""

    thousands: int  # of rows
    images: int
    turns: int
    question_words: int
    answer_words: int


KINDS = [
    Kind(40, 0, 4, 40, 160), Kind(58, 1, 4, 11, 28), Kind(77, 1, 1, 13, 115),
    Kind(23, 1, 1, 9, 100), Kind(83, 1, 5, 15, 1), Kind(72, 1, 12, 17, 1), Kind(80, 1, 5, 12, 4),
    Kind(75, 1, 1, 40, 1), Kind(22, 1, 1, 40, 12), Kind(48, 1, 7, 14, 6), Kind(86, 1, 10, 14, 7),
]  # fmt: skip
# The most frequent sizes of COCO's pictures.
SIZES = [(640, 480), (480, 640), (640, 427), (640, 640), (500, 375), (640, 425)]
PICTURES = 192
# What a scanner of JSON may trip over.
HARD_WORDS = [
    '"quoted"',
    "line\nbreak",
    "caf\u00e9",
    "\u56fe\u7247",
    "[brackets]",
    "{braces}",
    "\\",
]


def make_words(r: random.Random) -> list[str]:
    """Return a vocabulary."""
    words = []
    for _ in range(3000):
        letters = min(12, 1 + round(r.expovariate(0.25)))
        words.append("".join(r.choices("etaoinshrdlucmf", k=letters)))
    return words + HARD_WORDS


def make_conversation(r: random.Random, words: list[str]) -> list[dict]:
    """Return the turns of one row."""
    kind = r.choices(KINDS, [kind.thousands for kind in KINDS])[0]
    turns = 1
    if kind.turns > 1:
        turns = max(1, round(r.expovariate(1 / kind.turns)))

    conversation = []
    for _ in range(turns):
        for speaker, mean in (("human", kind.question_words), ("gpt", kind.answer_words)):
            count = max(1, round(r.lognormvariate(0, 0.4) * mean))
            text = " ".join(r.choices(words, k=count))
            if kind.images and not conversation:
                text = "<image>\n" + text
            conversation.append({"from": speaker, "value": text})
    return conversation


def write_pictures(folder: Path):
    """Write PICTURES JPEG files, smooth at large and noisy in detail, as photographs are."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    folder.mkdir()
    for i in range(PICTURES):
        w, h = SIZES[i % len(SIZES)]
        coarse = Image.fromarray(noise.integers(0, 255, (h // 8, w // 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((w, h), Image.Resampling.BICUBIC), np.int16)
        fine = np.clip(smooth + noise.integers(-12, 12, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(fine).save(folder / f"{i:012d}.jpg", quality=90)


def write(folder: str, count: str):
    """Write rows.json with `count` rows, and the pictures."""
    r = random.Random(0)
    words = make_words(r)

    # Rows take their conversations from a pool: making each anew would take long.
    pool = []
    for _ in range(8192):
        conversation = make_conversation(r, words)
        has_image = "<image>" in conversation[0]["value"]
        pool.append((has_image, json.dumps(conversation)))
    write_pictures(Path(folder, "images"))

    with open(Path(folder, "rows.json"), "w") as file:
        for i in range(int(count)):
            has_image, conversation = pool[r.randrange(len(pool))]
            image = ""
            if has_image:
                image = f'"image": "images/{i % PICTURES:012d}.jpg", '
            before = ", " if i else "["
            file.write(f'{before}{{"id": "{i:012d}", {image}"conversations": {conversation}}}')
        file.write("]")
