"""A CLIP that trains in seconds, on pictures of one shape: the model of chapter 2.

    clip = train(steps=60)
    print(clip.accuracy(clip.draw(200)))

It learns from pairs of a picture and a caption, "red circle". Nothing ever asks it where the circle
stands. `probe` measures what can be read from its features, of what was asked and what was not.

N pictures, K captions, C width of the encoder, n tokens per picture.
"""

from __future__ import annotations

import random
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo import scenes
from encoders import VisionEncoder, build_encoder, vision_config
from model import init_weights

WIDTH = 64
PAIRS = list(product(scenes.COLOURS, scenes.SHAPES))  # the captions
SIDE = scenes.IMAGE_SIZE
CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": SIDE // 6,
}
PROCESSOR = {
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.9, 0.9, 0.9],
    "image_std": [0.5, 0.5, 0.5],
}


class Pictures(NamedTuple):
    """N pictures of one object each, and what is in them."""

    pixels: Tensor  # (N, 3, H, W)
    pair: Tensor  # (N,), an index of PAIRS
    colour: Tensor  # (N,)
    shape: Tensor  # (N,)
    cell: Tensor  # (N,), where it stands: no caption says it


class TinyCLIP(nn.Module):
    """An image encoder, and one vector for each caption (CLIP: Radford et al., 2021).

    CLIP's text half is a transformer. Here a caption is two words, so it is a sum of two embeddings
    and a linear.
    """

    def __init__(self):
        super().__init__()
        config = vision_config(CONFIG, PROCESSOR)
        self.encoder: VisionEncoder = build_encoder(config, -1, "cls_patch")
        self.colour = nn.Embedding(len(scenes.COLOURS), WIDTH)
        self.shape = nn.Embedding(len(scenes.SHAPES), WIDTH)
        self.text = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.5))  # a logarithm, as in CLIP
        init_weights(self.encoder, 0.09)
        self.rng = random.Random(0)

    def draw(self, count: int) -> Pictures:
        """Return random pictures, of each caption as often as of the others."""
        pixels = []
        facts = []
        for i in range(count):
            pair = i % len(PAIRS)
            cell = (self.rng.randrange(scenes.GRID), self.rng.randrange(scenes.GRID))
            thing = scenes.place(self.rng, PAIRS[pair], cell)
            image = scenes.render([thing], scenes.draw_background(self.rng))
            pixels.append(self.encoder.preprocess(image))
            colour, shape = divmod(pair, len(scenes.SHAPES))
            facts.append([pair, colour, shape, cell[0] * scenes.GRID + cell[1]])
        return Pictures(torch.stack(pixels), *torch.tensor(facts).T)

    def captions(self) -> Tensor:
        """Return the vectors of all captions, (K, C), each of length 1."""
        words = self.colour.weight[:, None] + self.shape.weight  # (colours, shapes, C)
        return F.normalize(self.text(F.gelu(words.flatten(0, 1))), dim=-1)

    def similarity(self, pixels: Tensor) -> Tensor:
        """Return how well each picture fits each caption, (N, K): scaled cosines."""
        class_token = self.encoder(pixels)[:, 0]  # (N, C)
        return F.normalize(class_token, dim=-1) @ self.captions().T * self.scale.exp()

    def accuracy(self, pictures: Pictures) -> float:
        """Return the share of pictures whose own caption fits best."""
        with torch.no_grad():
            best = self.similarity(pictures.pixels).argmax(1)
        return (best == pictures.pair).float().mean().item()

    def states(self, pixels: Tensor) -> list[Tensor]:
        """Return what enters each block and leaves the last, (N, n, C) each."""
        encoder = self.encoder
        with torch.no_grad():
            x = encoder.pre_layrnorm(encoder.embeddings(pixels))
            states = [x]
            for block in encoder.blocks:
                x = block(x)
                states.append(x)
        return states


def clip_loss(similarity: Tensor) -> Tensor:
    """Return CLIP's loss of (N, N): row i must find column i, and column i must find row i."""
    own = torch.arange(len(similarity))
    by_picture = F.cross_entropy(similarity, own)
    by_caption = F.cross_entropy(similarity.T, own)
    return (by_picture + by_caption) / 2


def train(steps: int, seed: int = 0) -> TinyCLIP:
    """Return a TinyCLIP after so many steps, each of two batches: a picture for every caption."""
    torch.manual_seed(seed)
    clip = TinyCLIP()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3)
    for _ in range(steps):
        pictures = clip.draw(2 * len(PAIRS))
        first, second = clip.similarity(pictures.pixels).split(len(PAIRS))
        loss = clip_loss(first) + clip_loss(second)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clip.eval()


def probe(features: Tensor, classes: Tensor) -> float:
    """Return how often a linear map of features (N, C) finds the class (N,) of unseen pictures.

    It is fitted by least squares to the first two thirds and tested on the rest.
    """
    x = F.pad(features, (0, 1), value=1.0).double()  # the 1 takes the place of a bias
    y = F.one_hot(classes).double()
    fitted = 2 * len(x) // 3

    a = x[:fitted]
    ridge = 0.01 * torch.eye(x.size(1), dtype=x.dtype)  # keeps the inverse finite
    weight = torch.linalg.solve(a.T @ a + ridge, a.T @ y[:fitted])
    guess = (x[fitted:] @ weight).argmax(1)
    return (guess == classes[fitted:]).float().mean().item()


def probe_layers(clip: TinyCLIP, pictures: Pictures) -> list[dict[str, float]]:
    """Return for each state what can be read from the class token, and the cell from the patches.

    Patches are averaged, so that a probe has as many numbers of them as of the class token.
    """
    layers = []
    for state in clip.states(pictures.pixels):
        class_token = state[:, 0]
        patches = state[:, 1:].mean(1)
        layers.append(
            {
                "colour": probe(class_token, pictures.colour),
                "shape": probe(class_token, pictures.shape),
                "cell": probe(class_token, pictures.cell),
                "cell, patches": probe(patches, pictures.cell),
            }
        )
    return layers
