"""LLaVA rows, files of them, and what shows which samples came out of them."""

import dataclasses
import json

import numpy as np
import torch
from PIL import Image

from inputs.rows import open_rows
from inputs.sample import SampleSpec, make_samples
from inputs.templates import byte_tokenizer
from inputs.tiling import Tiling


def turns(*texts):
    """Return a conversation of these texts, the human first."""
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def row(name, text="<image>\nWhat?", answer="A dog.", image="a.png"):
    """Return a row of one question; image=None gives one without a picture."""
    made = {"id": name, "conversations": turns(text, answer)}
    if image:
        made["image"] = image
    return made


def make_sample(rows, i, spec, pixels=True):
    """Return the sample of row i, which is one."""
    [sample] = make_samples(rows, i, spec, pixels)
    return sample


# name: (a row that makes no sample, what the message says)
BAD = {
    "missing": (row("m", image="none.png"), "none.png: no such file or directory"),
    "marks": (row("n", "<image><image>"), "2 <image> in what the humans say but 1 images"),
    "a mark too few": (
        row("o", "<image> What?", image=["a.png", "a.png"]),
        "1 <image> in what the humans say but 2 images",
    ),
    "mark in a text": (row("p", image=None), "1 <image> in what the humans say but 0 images"),
    "roles": ({"id": "r", "conversations": turns("a", "b", "c")}, "conversations[2]: "),
    "role": ({"id": "q", "conversations": [{"from": "user", "value": "a"}]}, "conversations[0]: "),
    "nothing": ({"id": "s", "conversations": turns("a", " ")}, "nothing is supervised"),
    "no turns": ({"id": "t"}, "conversations: "),
    "video": (
        {"id": "v", "video": "a.mp4", "conversations": turns("<image><image>a", "b")},
        "but 1 videos in the row",
    ),
    "no video": (
        {"id": "v", "video": "a.mp4", "conversations": turns("<image> a", "b")},
        "a.mp4: no such file",
    ),
    "both": (
        {"id": "v", "video": "a.mp4", "image": "a.png", "conversations": turns("a", "b")},
        "an image and a video",
    ),
    "no dict": ([1], "a JSON list, not a row"),
    "surrogate": (row("w", "Hi \ud83d", image=None), "text that is not Unicode"),
}


def write(folder, rows, name="rows.json"):
    """Write rows as a JSON list, and open it."""
    (folder / name).write_text(json.dumps(rows))
    return open_rows(folder / name)


@dataclasses.dataclass(frozen=True)
class MeanColour:
    """An image processor to (3, 2, 2) of a picture's mean colour, which tells pictures apart."""

    def pixels(self, image, image_mode):
        colour = np.asarray(image, np.float32).mean((0, 1))
        return torch.from_numpy(colour)[:, None, None].expand(3, 2, 2).clone()


def flat(steps):
    """Return steps as lists that can be compared: everything in them but the time."""
    flattened = []
    for step in steps:
        batches = []
        for batch in step.batches:
            values = vars(batch).values()
            batches.append([v.tolist() if isinstance(v, torch.Tensor) else v for v in values])
        flattened.append([batches, step.skipped])
    return flattened


def rows_of(steps):
    """Return the rows of all samples of steps, in their order."""
    return [r for step in steps for batch in step.batches for r in batch.rows]


def write_pictures_and_rows(folder):
    """Write three pictures and 38 rows without, with one, and with two of them; open the rows."""
    for i, name in enumerate(("a.png", "b.png", "c.JPEG")):
        Image.new("RGB", (8, 8), (10 * i, 20, 30)).save(folder / name)
    rows = [row(i, "Hi" + "." * (7 * i % 40), image=None) for i in range(20)]
    rows += [row(20 + i, "<image>" + "." * i, image="ab"[i % 2] + ".png") for i in range(17)]
    rows += [row("two \u56fe \ud83d", "<image><image>", image=["c.JPEG", "a.png"])]
    return write(folder, rows)


def mean_colour_spec():
    """Return a spec of bytes as tokens, five of them for a picture, which is its mean colour."""
    views = Tiling(5, processor=MeanColour())
    return SampleSpec(byte_tokenizer(), "plain", max_tokens=1000, views=views)
