"""LLaVA rows, files of them, and what shows which samples came out of them."""

import dataclasses
import json

import numpy as np
import torch

from inputs.rows import open_rows


def turns(*texts):
    """Return a conversation of these texts, the human first."""
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def row(name, text="<image>\nWhat?", answer="A dog.", image="a.png"):
    """Return a row of one question; image=None gives one without a picture."""
    made = {"id": name, "conversations": turns(text, answer)}
    if image:
        made["image"] = image
    return made


def write(folder, rows, name="rows.json"):
    """Write rows as a JSON list, and open it."""
    (folder / name).write_text(json.dumps(rows))
    return open_rows(folder / name)


@dataclasses.dataclass(frozen=True)
class MeanColour:
    """An image processor whose pictures are (3, 2, 2) of their mean colour: a sample shows which."""

    def pixels(self, image, image_mode):
        colour = np.asarray(image, np.float32).mean((0, 1))
        return torch.from_numpy(colour)[:, None, None].expand(3, 2, 2).clone()


def flat(steps):
    """Return steps as comparable lists: everything in them but the time."""
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
