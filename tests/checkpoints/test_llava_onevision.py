"""LLaVA-OneVision against transformers: pixels, ids, logits, answers, and folders in and out.

Tokenizer and processor of a published model are not at hand: they are made of the same classes.
"""

import json

import pytest
import torch
from PIL import Image

from checkpoints import weights
from checkpoints.files import read_json
from config import UserError
from export import export
from inputs.pictures import load_image
from inputs.templates import byte_tokenizer, encode_prompt
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from packing import IMAGE_TOKEN, pack_prompts
from tests.tools.environment import shared
from tests.tools.small_llava import small

transformers = pytest.importorskip(
    "transformers", reason="the oracle is a development dependency: pip install .[dev]"
)

LlavaOnevisionImageProcessorPil = pytest.importorskip(
    "transformers.models.llava_onevision.image_processing_pil_llava_onevision"
).LlavaOnevisionImageProcessorPil

# As the published template: pictures first, then videos, then the text. That one also has a blank
# behind every role but that of a prompt, and marks answers with a `generation` block.
TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] }}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}\
{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}\
{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ '\\n' + part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
PHOTOS = (
    "horse.png",
    "astronaut.png",
    "cow_in_beach.jpg",
    "coffee.png",
    "chelsea.png",
    "rocket.jpg",
    "wolves.jpg",
    "page.png",
)
SIZES = ((600, 37), (31, 500), (7, 5), (1, 1), (3000, 2000), (150, 80), (90, 61))  # width, height

# Two models: a side of 3 tokens and untied, a side of 4 and tied at the top level alone.
SMALL = {
    "odd": {"side": 15, "patch": 4, "width": 42, "heads": 3, "tied": False, "grids": 6},
    "tied": {"side": 20, "patch": 5, "width": 48, "heads": 4, "tied": True, "grids": 4},
}


def photos() -> list[Image.Image]:
    """Return eight photographs, and some that are wide, tall, tiny and large."""
    found = [load_image(shared("assets/images/photos") / name) for name in PHOTOS]
    return found + [found[i].resize(size) for i, size in enumerate(SIZES)]


class PictureProcessor(transformers.LlavaOnevisionProcessor):
    """The published processor without its part for videos, for which torchvision is missing."""

    def check_argument_for_proper_class(self, name: str, part):
        if part is not None:
            super().check_argument_for_proper_class(name, part)


def write_published(folder, side: int, patch: int, width: int, heads: int, tied: bool, grids: int):
    """Write a random model with tokenizer and processor, by the classes of transformers."""
    torch.manual_seed(width)
    source = folder / "source"
    byte_tokenizer().save(source)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"),
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    marks = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks, "eos_token": marks[1]})
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in ("<image>", "<video>", *marks)}
    pinpoints = [[side * r, side * c] for r in range(1, grids + 1) for c in range(1, grids + 1)]

    text = {
        "model_type": "qwen2",
        "vocab_size": max(ids.values()) + 3,
        "hidden_size": width,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 30,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "patch_size": patch,
        "image_size": side,
        "vision_use_head": False,
    }
    config = transformers.LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=tied,
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)

    images = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side},
        image_grid_pinpoints=pinpoints,
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.5, 0.6, 0.7],
    )
    processor = PictureProcessor(
        images,
        tokenizer,
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return model, processor


@pytest.fixture(scope="module", params=SMALL)
def published(request, tmp_path_factory):
    """Return a folder of transformers' with its model and processor, and our model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = write_published(folder, **SMALL[request.param])
    return folder, model, processor, LLaVA.from_pretrained(folder).eval()


def ids_of(ids: torch.Tensor, counts: list[int], token: int) -> list[int]:
    """Return ids with so many tokens in the place of each item."""
    counts = iter(counts)
    expanded = []
    for i in ids.tolist():
        expanded += [token] * next(counts) if i == IMAGE_TOKEN else [i]
    return expanded


def ask(kind: str, number: int, folder) -> tuple[list[dict], torch.Tensor]:
    """Return the messages of a question on so many pictures or videos, and our ids of it."""
    parts = [{"type": kind}] * number + [{"type": "text", "text": "What is it?"}]
    turns = [{"from": "human", "value": "<image>\n" * number + "What is it?"}]
    ids = encode_prompt(turns, load_tokenizer(folder), "chat")
    return [{"role": "user", "content": parts}], torch.tensor(ids)


@torch.no_grad()
def same_answers(ours, theirs, ids, items, inputs, token: int):
    """Compare ids, logits and greedy tokens."""
    counts = [ours.views.positions(item.shape) for item in items]
    assert inputs["input_ids"][0].tolist() == ids_of(ids, counts, token)
    logits = ours(ids[None], items).logits[0]
    want = theirs(**inputs).logits[0]
    assert (logits - want).abs().max().item() <= 1e-4
    assert want.std().item() > 0.1  # otherwise 1e-4 would say little
    new = ours.generate([ids], items, max_new_tokens=7)[0].tolist()
    length = inputs["input_ids"].size(1)
    greedy = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert theirs.generate(**inputs, **greedy)[0, length:].tolist() == new


def test_pixels_ids_logits_and_answers_of_one_picture_are_those_of_transformers(published):
    folder, theirs, processor, ours = published
    messages, ids = ask("image", 1, folder)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    smaller = set()
    for photo in photos():
        item = ours.views.picture(photo)
        assert item.shape == ours.views.shape(photo.size)
        inputs = processor(text=prompt, images=[[photo]], return_tensors="pt")
        pixels = ours.vision_tower.processor.normalise(item.pixels)
        assert torch.allclose(inputs["pixel_values"][0], pixels, rtol=0, atol=1e-6)
        assert inputs["pixel_values"][0].shape == pixels.shape
        same_answers(ours, theirs, ids, [item], inputs, theirs.config.image_token_index)

        size = ours.views.size_in_tokens(item.shape)
        smaller.add(ours.views.made_smaller(*size) != size)
    assert smaller == {True, False}


def test_several_pictures_are_padded_and_have_one_view_each(published):
    folder, theirs, processor, ours = published
    messages, ids = ask("image", 3, folder)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    shown = photos()[6:9]
    items = [ours.views.picture(photo, 3) for photo in shown]
    inputs = processor(text=prompt, images=[shown], return_tensors="pt")
    for item, pixels in zip(items, inputs["pixel_values"], strict=True):
        mine = ours.vision_tower.processor.normalise(item.pixels)
        assert torch.allclose(pixels, mine, rtol=0, atol=1e-6)
    same_answers(ours, theirs, ids, items, inputs, theirs.config.image_token_index)


@pytest.mark.parametrize("frames", [1, 5])
def test_frames_of_a_video_have_a_quarter_of_the_tokens_and_one_separator(published, frames):
    folder, theirs, processor, ours = published
    messages, ids = ask("video", 1, folder)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    item = ours.views.clip([photo.resize((64, 48)) for photo in photos()[:frames]])
    pixels = ours.vision_tower.processor.normalise(item.pixels)
    inputs = {"pixel_values_videos": pixels[None]}
    written = processor.replace_video_token(inputs, 0)
    inputs |= processor.tokenizer(prompt.replace("<video>", written), return_tensors="pt")
    same_answers(ours, theirs, ids, [item], inputs, theirs.config.video_token_index)


@torch.no_grad()
def test_a_packed_row_of_pictures_clip_and_text_equals_each_alone(published):
    *_, ours = published
    shown = photos()
    alone = [ours.views.picture(shown[0])]
    several = [ours.views.picture(photo, 2) for photo in shown[1:3]]
    clip = [ours.views.clip(shown[3:6])]
    rows = [
        (torch.tensor([3, IMAGE_TOKEN, 5, 9]), alone),
        (torch.tensor([IMAGE_TOKEN, 4, IMAGE_TOKEN, 8]), several),
        (torch.tensor([7, 6, 2]), []),
        (torch.tensor([1, IMAGE_TOKEN, 11]), clip),
    ]
    items = [item for _, row in rows for item in row]
    counts = [ours.views.positions(item.shape) for item in items]
    packed = pack_prompts([ids for ids, _ in rows], counts)
    features = ours.encode_items(items)
    assert [len(f) for f in features] == counts
    hidden = ours._decode(packed, features)
    ends = packed.cu_seqlens.tolist()
    for (ids, row), first, last in zip(rows, ends, ends[1:], strict=False):
        logits = ours.language_model.lm_head(hidden[first:last])
        assert (ours(ids[None], row or None).logits[0] - logits).abs().max().item() <= 1e-5


def test_the_largest_shape_is_at_least_any_picture(published):
    *_, ours = published
    most = max(ours.views.positions(shape) for shape in ours.views.largest())
    for width in range(1, 400, 13):
        for height in range(1, 400, 17):
            assert ours.views.positions(ours.views.shape((width, height))) <= most


def test_what_transformers_wrote_goes_back_bit_for_bit(published, tmp_path):
    folder, theirs, processor, ours = published
    export(ours, load_tokenizer(folder), "llava-onevision", tmp_path / "out")
    again, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert type(again) is type(theirs)
    assert not any(info.values()), info
    want = theirs.state_dict()
    assert again.state_dict().keys() == want.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, want[name]), name

    read = LLaVA.from_pretrained(tmp_path / "out")
    assert read.config.image_mode == "anyres_max_9" and read.views == ours.views
    mine = weights.tensors(read.language_model)
    for name, tensor in weights.tensors(ours.language_model).items():
        assert torch.equal(tensor, mine[name]), name

    # Their processor reads what we wrote, and makes the same of a picture.
    fields = read_json(tmp_path / "out" / "processor_config.json")
    del fields["processor_class"]
    made = PictureProcessor(
        LlavaOnevisionImageProcessorPil.from_pretrained(tmp_path / "out"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
        chat_template=(tmp_path / "out" / "chat_template.jinja").read_text(),
        **fields,
    )
    photo = photos()[0]
    for kind in ("image", "video"):
        messages, _ = ask(kind, 1, folder)
        prompt = made.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt == processor.apply_chat_template(messages, add_generation_prompt=True)
        if kind == "image":
            got = made(text=prompt, images=[[photo]], return_tensors="pt")
            want = processor(text=prompt, images=[[photo]], return_tensors="pt")
            assert torch.equal(got["input_ids"], want["input_ids"])
            assert torch.allclose(got["pixel_values"], want["pixel_values"], rtol=0, atol=1e-6)


def onevision(**changes) -> LLaVA:
    """Return a model that was made here."""
    return small(
        "qwen2",
        "siglip",
        **{
            "image_mode": "anyres_max_9",
            "image_grids": "1x2 2x1 4x4",
            "feature_select": "cls_patch",
            **changes,
        },
    )


@torch.no_grad()
def test_a_model_made_here_becomes_one_of_transformers(tmp_path):
    ours = onevision()
    export(ours, None, "llava-onevision", tmp_path / "out")
    theirs, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    item = ours.views.picture(photos()[0])
    ids = torch.tensor([1, IMAGE_TOKEN, 5])
    token = theirs.config.image_token_index
    assert theirs.config.video_token_index == token + 1
    inputs = {
        "input_ids": torch.tensor([ids_of(ids, [ours.views.positions(item.shape)], token)]),
        "pixel_values": ours.vision_tower.processor.normalise(item.pixels)[None],
        "image_sizes": torch.tensor([photos()[0].size[::-1]]),
    }
    for model in (ours, LLaVA.from_pretrained(tmp_path / "out")):
        logits = model(ids[None], [item]).logits[0]
        want = theirs.eval()(**inputs).logits[0, :, : logits.size(1)]
        assert (logits[:, :97] - want[:, :97]).abs().max().item() <= 1e-4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_mode": "anyres"}, "image mode anyres"),
        ({"connector": "mlp3x_gelu"}, "connector mlp3x_gelu"),
    ],
)
def test_what_onevision_cannot_express_is_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export(onevision(**changes), None, "llava-onevision", tmp_path / "out")
    with pytest.raises(UserError, match="for transformers 5"):
        export(onevision(), None, "llava-onevision", tmp_path / "out", 4)


@pytest.mark.parametrize(
    "file, field, value",
    [
        ("config.json", "vision_aspect_ratio", "anyres_max_4"),
        ("config.json", "vision_feature_select_strategy", "default"),
        ("config.json", "vision_feature_layer", [-2, -1]),
        ("config.json", "projector_hidden_act", "relu"),
        ("config.json", "multimodal_projector_bias", False),
        ("processor_config.json", "vision_aspect_ratio", "anyres_max_4"),
        ("preprocessor_config.json", "image_grid_pinpoints", [[12, 12]]),
    ],
)
def test_a_field_that_is_computed_otherwise_is_refused(file, field, value, tmp_path):
    export(onevision(), None, "llava-onevision", tmp_path / "out")
    content = read_json(tmp_path / "out" / file)
    (tmp_path / "out" / file).write_text(json.dumps(content | {field: value}))
    with pytest.raises(UserError, match=field if field != "multimodal_projector_bias" else "proj"):
        LLaVA.from_pretrained(tmp_path / "out")
