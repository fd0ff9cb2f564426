"""Chapter 17: the layouts that a trained model goes to, and who reads them."""

from checkpoints import layouts
from config import LLaVAConfig
from guide.drawings.ch00 import TEXT, VISION
from guide.drawings.svg import BLUE, GREEN, GREY, ORANGE, PINK, arrow, box, figure, lines, text
from model import LLaVA

READERS = {
    "barellava": (BLUE, ["this repository:", "generate, evaluate, serve"]),
    "tinyllava": (GREEN, ["TinyLLaVA Factory"]),
    "hf-llava": (ORANGE, ["transformers,", "servers that read its models"]),
    "gguf": (PINK, ["llama.cpp: laptops, phones;", "8 and 4 bits"]),
}


def formats() -> str:
    """Draw the layouts that the small model of the chapters can be written in."""
    model = LLaVA(LLaVAConfig(text=TEXT, vision=VISION, feature_select="cls_patch"))
    names = [name for name in READERS if name in layouts.exports_to(model)]
    height = 64 * len(names) + 36
    middle = height / 2
    body = box(20, middle - 34, 150, 68, ["a trained folder", "model.safetensors"], BLUE, 13)
    body += text(95, middle + 56, "export.py --to", 12, GREY, "middle", mono=True)
    for i, name in enumerate(names):
        colour, readers = READERS[name]
        top = 22 + 64 * i
        body += arrow(174, middle, 256, top + 22, GREY)
        body += box(260, top, 130, 44, name, colour)
        body += arrow(394, top + 22, 446, top + 22, GREY)
        first = top + 27 - 9 * (len(readers) - 1)
        body += lines(456, first, readers, 13.5)
    title = "Layouts that a trained model is written in, and the programs that read each."
    return figure(720, height, body, title)


FIGURES = {"17-layouts.svg": formats}
