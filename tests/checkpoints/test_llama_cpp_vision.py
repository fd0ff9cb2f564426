"""Pictures in the real llama.cpp: what we export is answered there as here."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from checkpoints import gguf, gguf_vision
from inputs.pictures import load_image
from inputs.tiling_split import control_names, mark_names
from inputs.tokenizer import load_tokenizer
from tests.tools import vocabularies
from tests.tools.environment import shared
from tests.tools.llama_cpp import differences, needs_llama_cpp, serving
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
    return folder / gguf.MODEL, folder / gguf.MMPROJ


def random_model(tokenizer, connector: str = "linear", **config):
    """Return a model of random weights whose answers depend on the picture."""
    settings = {
        "tower": "siglip",
        "vocab": tokenizer.vocab_size,
        "sizes": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
        "connector": connector,
        "feature_select": "cls_patch",
        "template": "plain",
    }
    return small(**{**settings, **config})


def split_model(tokenizer, **config):
    """Return a random model like SmolVLM: pixel shuffle, tiles with marks, and a chat template."""
    settings = {
        "connector": "pixel_shuffle",
        "connector_options": {"factor": 3},
        "feature_layer": -1,
        "feature_norm": True,
        "image_mode": "split",
        "image_edge": EDGE,
        "image_marks": {name: tokenizer.encode(name)[0] for name in mark_names(EDGE, SIDE)},
        "processor": {"resample": 1},
        "template": "chat",
    }
    return random_model(tokenizer, **{**settings, **config})


def check_answers(model, tokenizer, asked, folder: Path, file_type: str = "float32"):
    """Fail unless llama.cpp answers as we do, but for one near-tie at most."""
    with serving(*write(folder, model, tokenizer, file_type)) as llama:
        found = differences(llama, model, tokenizer, asked)
    assert sum(apart > 0 for apart in found) <= 1, found
    assert max(found) < NEAR_TIE


def of_each(photos) -> list[tuple[list[str], list]]:
    """Return each question about each photograph."""
    return [([text], [photo]) for text in QUESTIONS for photo in photos]


@pytest.mark.parametrize("connector", gguf_vision.MLP)
def test_answers_of_every_connector_are_ours(connector, tokenizer, photos, tmp_path):
    model = random_model(tokenizer, connector, image_scale=1.5)
    check_answers(model, tokenizer, of_each(photos), tmp_path)


@pytest.mark.parametrize("family", ["gemma", "qwen2", "phi"])
def test_pictures_reach_other_families(family, tokenizer, photos, tmp_path):
    # Gemma's graph scales what stands in the place of an embedding.
    model = random_model(tokenizer, "mlp2x_gelu", family=family, sizes={})
    check_answers(model, tokenizer, of_each(photos), tmp_path)


@pytest.mark.parametrize("file_type", ["float16", "bfloat16"])
def test_answers_of_other_types(file_type, tokenizer, photos, tmp_path):
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[file_type]
    model = random_model(tokenizer, "mlp2x_gelu")
    rounded = {name: tensor.to(dtype).float() for name, tensor in model.state_dict().items()}
    model.load_state_dict(rounded)
    check_answers(model, tokenizer, of_each(photos), tmp_path, file_type)


def test_the_whole_depth_with_its_norm_and_an_mlp_of_one_width(tokenizer, photos, tmp_path):
    model = random_model(
        tokenizer, feature_layer=-1, feature_norm=True, vision={"intermediate_size": 32}
    )
    check_answers(model, tokenizer, of_each(photos), tmp_path)


def test_several_pictures_and_turns(tokenizer, photos, tmp_path):
    model = random_model(tokenizer, "mlp2x_gelu")
    check_answers(model, tokenizer, conversations(photos), tmp_path)


def conversations(photos) -> list[tuple[list[str], list]]:
    """Return questions about several pictures, and some that were asked before."""
    asked = []
    for text in QUESTIONS:
        asked.append(([text], photos[:2]))
        asked.append(([text], photos))
        asked.append(([text, "A horse.", "And what else?"], photos[1:2]))
        asked.append((["Hello", "So\n\n two", text], photos[2:4]))
    return asked


def test_smolvlm_sees_tiles_as_we_do(tokenizer, photos, tmp_path):
    check_answers(split_model(tokenizer), tokenizer, of_each(photos), tmp_path)


def test_smolvlm_sees_several_pictures_in_two_turns(tokenizer, photos, tmp_path):
    model = split_model(tokenizer, vision={"intermediate_size": 32})
    check_answers(model, tokenizer, conversations(photos), tmp_path)


def test_llama_cpp_still_misreads_clip(tokenizer, photos, tmp_path, monkeypatch):
    # It puts the class token behind the patches and takes the last patch for it. When this fails,
    # that is mended, and gguf_vision.py need not refuse a CLIP that does not crop.
    uncropped = {"do_center_crop": False, "size": {"height": SIDE, "width": SIDE}}
    model = random_model(tokenizer, tower="clip", feature_select="patch", processor=uncropped)
    tower = model.vision_tower
    tensors = gguf_vision.named_tensors(model)
    del tensors["v.patch_embd.bias"]
    tensors["v.class_embd"] = tower.embeddings.class_embedding
    tensors["v.pre_ln.weight"] = tower.pre_layrnorm.weight
    tensors["v.pre_ln.bias"] = tower.pre_layrnorm.bias
    monkeypatch.setattr(gguf_vision, "named_tensors", lambda model: tensors)
    monkeypatch.setattr(gguf_vision, "check_expressible", lambda model: None)

    with serving(*write(tmp_path, model, tokenizer)) as llama:
        found = differences(llama, model, tokenizer, of_each(photos))
    assert sum(apart > NEAR_TIE for apart in found) > 5, found
