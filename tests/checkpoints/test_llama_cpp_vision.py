"""Pictures in the real llama.cpp: what we export is answered there as here."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from checkpoints import gguf, gguf_vision
from inference.answer import answer
from inputs.pictures import load_image
from inputs.tiling_split import control_names, mark_names
from inputs.tokenizer import load_tokenizer
from tests.tools import vocabularies
from tests.tools.environment import shared
from tests.tools.llama_cpp import assistant, differences, needs_llama_cpp, serving, user
from tests.tools.small_llava import SIDE, small

pytestmark = needs_llama_cpp

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "horse.png", "rocket.jpg")
QUESTIONS = (
    "What is this?",
    "Which colour is it?",
    "How many are there?",
    "Is it near?\nOr far?",
    "Describe the picture.",
)
NEAR_TIE = 0.02  # of the logarithms of two probabilities
EDGE = 2 * SIDE

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return a small byte-level tokenizer with SmolVLM's marks and a chat template."""
    controls = ["<|im_start|>", "<|im_end|>", *control_names(EDGE, SIDE)]
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    fast = vocabularies.byte_level(controls, 400)
    vocabularies.write(folder, fast, eos_token="<|im_end|>", chat_template=CHAT)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Return five photographs, small enough to be sent often."""
    folder = shared("assets/images/photos")
    pictures = [load_image(folder / name) for name in PHOTOS]
    for picture in pictures:
        picture.thumbnail((120, 120))
    return pictures


def write(folder: Path, model, tokenizer, file_type: str = "float32") -> tuple[Path, Path]:
    """Write both files of a model, and return their paths."""
    gguf.write(folder, model, tokenizer, file_type)
    gguf_vision.write(folder / "mmproj.gguf", model, file_type)
    return folder / "model.gguf", folder / "mmproj.gguf"


def random_model(tokenizer, connector: str = "linear", **config):
    """Return a model of random weights whose answers depend on the picture."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {
        "tower": "siglip",
        "vocab": tokenizer.vocab_size,
        "sizes": sizes,
        "connector": connector,
        "feature_select": "cls_patch",
        "template": "plain",
    }
    return small(**{**settings, **config})


@pytest.mark.parametrize("connector", gguf_vision.MLP)
def test_answers_of_every_connector_are_ours(connector, tokenizer, photos, tmp_path):
    model = random_model(tokenizer, connector, image_scale=1.5)
    questions = [(text, [photo]) for text in QUESTIONS for photo in photos]
    with serving(*write(tmp_path, model, tokenizer)) as llama:
        found = differences(llama, model, tokenizer, questions)
    print(connector, found)
    assert sum(apart == 0 for apart in found) >= 24
    assert max(found) < NEAR_TIE
