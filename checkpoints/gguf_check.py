"""Ask a model and its GGUF files five questions, for `export.py --to gguf --check` to print.

    answers = both_answers(folder, model, tokenizer)     # None where no llama.cpp is installed

The llama.cpp is that of the package xllamacpp, in a process of its own (gguf_child.py). Answers are
greedy. They may differ where two words are all but equally probable: llama.cpp computes the patches
of a picture in float16, and a quantized file holds other weights.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw

from checkpoints import gguf
from config import UserError
from inputs.templates import encode_prompt, stop_id

TOKENS = 24  # of an answer
CONTEXT = 4096


class Question(NamedTuple):
    """What is asked, about a picture or about none."""

    text: str
    picture: Image.Image | None = None


class Answers(NamedTuple):
    """The two answers to a question."""

    question: str
    ours: str
    theirs: str


def questions() -> list[Question]:
    """Return five questions, with small pictures drawn here."""
    disc = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(disc).ellipse((20, 20, 76, 76), fill="red")

    square = Image.new("RGB", (128, 96), "gray")
    ImageDraw.Draw(square).rectangle((10, 30, 60, 80), fill="blue")

    stripes = Image.new("RGB", (64, 96), "black")
    for top in range(0, 96, 24):
        ImageDraw.Draw(stripes).rectangle((0, top, 63, top + 11), fill="yellow")

    shades = Image.linear_gradient("L").resize((120, 120)).convert("RGB")
    return [
        Question("What is in the picture?", disc),
        Question("What color is the square?", square),
        Question("Describe the image.", stripes),
        Question("Is there a dog?", shades),
        Question("Who are you?"),
    ]


def both_answers(folder: Path, model, tokenizer) -> list[Answers] | None:
    """Return the answers of a model and of its files in llama.cpp; None where that is not here.

    Raises UserError if llama.cpp ends.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    asked = questions()
    theirs = ask_llama_cpp(folder, asked, model)
    both = []
    for question, answer in zip(asked, theirs, strict=True):
        both.append(Answers(question.text, ask_model(question, model, tokenizer), answer))
    return both


def ask_model(question: Question, model, tokenizer) -> str:
    """Return the model's own answer."""
    text = question.text
    items = None
    if question.picture is not None:
        text = f"<image>\n{text}"
        items = [model.views.picture(question.picture)]

    template = model.config.template
    ids = torch.tensor(encode_prompt([{"from": "human", "value": text}], tokenizer, template))
    stop = stop_id(tokenizer, template)
    new = model.generate([ids], items, max_new_tokens=TOKENS, eos_token_id=stop)
    return tokenizer.decode(new[0])


def ask_llama_cpp(folder: Path, asked: list[Question], model) -> list[str]:
    """Return what llama.cpp answers with the files of a folder."""
    request = {
        "model": str(folder / gguf.MODEL),
        "mmproj": str(folder / gguf.MMPROJ),
        "context": min(CONTEXT, gguf.context_length(model)),
        "tokens": TOKENS,
        "conversations": [[message(question)] for question in asked],
    }
    child = Path(__file__).with_name("gguf_child.py")
    done = subprocess.run(
        [sys.executable, child], input=json.dumps(request), capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise UserError(gguf.MODEL, f"llama.cpp cannot use it: {lines[-1]}", "report it")
    return json.loads(done.stdout.splitlines()[-1])


def message(question: Question) -> dict:
    """Return a question as a message of OpenAI's chat API."""
    content = [{"type": "text", "text": question.text}]
    if question.picture is not None:
        file = io.BytesIO()
        question.picture.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": content}
