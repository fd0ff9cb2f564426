"""Chapter 0: the way of a picture and a question to a loss, with the shapes of a small model."""

import torch
from PIL import Image, ImageDraw

from config import LLaVAConfig
from guide.drawings.svg import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    arrow,
    box,
    figure,
    lines,
    picture,
    rectangle,
    text,
)
from inputs.templates import byte_tokenizer, encode
from model import LLaVA
from packing import IGNORE, IMAGE_TOKEN, expand_images

TEXT = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 16,
    "image_size": 48,
}
CONVERSATION = [
    {"from": "human", "value": "<image>\nLeft?"},
    {"from": "gpt", "value": "red"},
]


def draw_picture() -> Image.Image:
    """Return the picture of the chapter: a red circle and a blue square."""
    image = Image.new("RGB", (48, 48), (240, 240, 240))
    draw = ImageDraw.Draw(image)
    draw.ellipse([3, 5, 19, 21], fill=(214, 40, 40))
    draw.rectangle([28, 27, 44, 43], fill=(40, 80, 210))
    return image


def whole_way() -> str:
    """Draw the way with the shapes that the chapter's model has."""
    model = LLaVA(LLaVAConfig(text=TEXT, vision=VISION, feature_select="cls_patch"))
    image = draw_picture()
    pixels = model.views.picture(image).pixels
    with torch.inference_mode():
        seen = model.vision_tower(model.vision_tower.processor.normalise(pixels))
        features = model.encode_images(pixels)

    ids, labels = encode(CONVERSATION, byte_tokenizer(), "plain")
    long_ids = expand_images(torch.tensor(ids), [features.shape[1]])
    long_labels = expand_images(torch.tensor(ids), [features.shape[1]], torch.tensor(labels))
    total = len(long_ids)
    learned = int((long_labels != IGNORE).sum())
    patches, width_seen = seen.shape[1:]
    width = features.shape[2]
    vocabulary = TEXT["vocab_size"]

    # Above: the picture. Below: the text. Both arrive at the row of tokens in the middle.
    rows = [[image.getpixel((x, y)) for x in range(48)] for y in range(48)]
    body = picture(24, 30, rows, 1.75)
    body += rectangle(24, 30, 84, 84, stroke=GREY)
    body += text(66, 132, "(1, 3, 48, 48)", 12, GREY, "middle")
    body += arrow(114, 72, 150, 72)
    body += box(150, 48, 112, 48, ["encoder", "a ViT"], BLUE)
    body += text(206, 114, f"(1, {patches}, {width_seen})", 12, GREY, "middle")
    body += arrow(262, 72, 298, 72)
    body += box(298, 48, 112, 48, ["connector", "an MLP"], GREEN)
    body += text(354, 114, f"(1, {patches}, {width})", 12, GREY, "middle")

    body += text(400, 160, "USER: <image>⏎Left? ASSISTANT: red<end>", 12, mono=True)
    body += text(400, 180, f"{len(ids)} ids, {learned} of them with a label", 12, GREY)
    body += arrow(480, 190, 480, 222)

    # One square for each position of the row: picture, text, answer.
    cell = 13.5
    left = 24
    for i, (token, label) in enumerate(zip(long_ids.tolist(), long_labels.tolist(), strict=True)):
        colour = "#c6ccd6"
        if token == IMAGE_TOKEN:
            colour = GREEN
        elif label != IGNORE:
            colour = ORANGE
        body += rectangle(left + i * cell, 226, cell - 1.5, 22, colour, radius=2)
    first = (long_ids == IMAGE_TOKEN).nonzero()[0].item()
    middle = left + (first + patches / 2) * cell
    body += arrow(330, 124, middle + 4, 221, GREEN)
    body += text(left, 266, f"one row of {total} positions, each with {width} numbers", 12, GREY)
    body += text(left + total * cell, 266, f"({total}, {width})", 12, GREY, "end")

    body += arrow(206, 274, 206, 302)
    body += box(24, 302, 390, 44, "decoder: a position sees itself and all before it", PINK)
    body += text(426, 328, f"hidden states ({total}, {width})", 12, GREY)
    body += arrow(206, 346, 206, 374)
    body += box(24, 374, 390, 44, "head and cross-entropy, where there are labels", ORANGE)
    body += text(426, 400, f"logits ({learned}, {vocabulary}) → one number", 12, GREY)

    key = ["green: the picture", "grey: text that is given", "orange: what is learned"]
    body += lines(500, 48, key, 12.5, colour=GREY)
    title = "From a picture and a question to a loss, with the shape of each tensor on the way."
    return figure(720, 438, body, title)


FIGURES = {"00-way.svg": whole_way}
