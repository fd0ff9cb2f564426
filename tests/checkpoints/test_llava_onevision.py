"""LLaVA-OneVision against transformers: pixels, ids, logits, answers, and folders in and out.

Tokenizer and processor of a published model are not at hand: they are made of the same classes.
"""

import copy
import json
import shutil
from base64 import b64encode
from dataclasses import replace
from math import ceil, isqrt

import pytest
import torch
from PIL import Image

import evaluate
import serve
from checkpoints import weights
from checkpoints.files import read_json
from checkpoints.layouts import read_config
from checkpoints.llava_onevision import TABLE
from checkpoints.names import as_tuple, rename
from config import UserError
from export import export
from generate import Chat
from inference.job_queue import JobQueue, Limits
from inputs.media import as_list
from inputs.pictures import load_image
from inputs.rows import Rows, open_rows
from inputs.sample import SampleSpec, load_items, make_samples
from inputs.templates import byte_tokenizer, encode_prompt, encode_samples
from inputs.tiling_anyres import PADDED
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from packing import IGNORE, IMAGE_TOKEN, ItemShape, pack_samples
from tests.tools.environment import ROOT, run, shared
from tests.tools.sample_rows import make_sample
from tests.tools.small_llava import SIDE, small
from training.estimate import guess_row
from training.run_log import first_question

transformers = pytest.importorskip(
    "transformers", reason="the oracle is a development dependency: pip install .[dev]"
)

LlavaOnevisionImageProcessorPil = pytest.importorskip(
    "transformers.models.llava_onevision.image_processing_pil_llava_onevision"
).LlavaOnevisionImageProcessorPil

# What stands in published folders, and what transformers' script for new ones writes.
PUBLISHED = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}\
{# Render all images first #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}\
{{ '<image>' }}{% endfor %}\
{# Render all video then #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}\
{{ '<video>' }}{% endfor %}\
{# Render all text next #}{% if message['role'] != 'assistant' %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ '\\n' + content['text'] }}{% endfor %}{% else %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}\
{{'<|im_end|>'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
WRITTEN_NOW = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}\
{# Render all images first #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}\
{{ '<image>\\n' }}{% endfor %}\
{# Render all video then #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}\
{{ '<video>\\n' }}{% endfor %}\
{# Render all text next #}{% if message['role'] != 'assistant' %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ content['text'] }}{% endfor %}{% else %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{% generation %}{{ content['text'] }}{% endgeneration %}{% endfor %}{% endif %}\
{{'<|im_end|>' + '\\n'}}{% endfor %}\
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
SIZES = ((600, 37), (31, 500), (7, 5), (1, 1), (3000, 2000), (150, 80), (90, 61))
# The tiles have so many tokens more that the first is made smaller by one model, the other by both.
SIZES += ((45, 60), (40, 40))

# Two models: a side of 3 tokens and untied, a side of 4 and tied at the top level alone.
SMALL = {
    "odd": {
        "side": 15,
        "patch": 4,
        "width": 42,
        "heads": 3,
        "tied": False,
        "grids": 6,
        "most": 9,
        "template": PUBLISHED,
    },
    "tied": {
        "side": 20,
        "patch": 5,
        "width": 48,
        "heads": 4,
        "tied": True,
        "grids": 4,
        "most": 3,
        "template": WRITTEN_NOW,
    },
}


def photos() -> list[Image.Image]:
    """Return eight photographs, and some that are wide, tall, tiny and large."""
    found = [load_image(shared("assets/images/photos") / name) for name in PHOTOS]
    return found + [found[i % len(found)].resize(size) for i, size in enumerate(SIZES)]


class PictureProcessor(transformers.LlavaOnevisionProcessor):
    """The published processor without its part for videos, for which torchvision is missing."""

    def check_argument_for_proper_class(self, name: str, part):
        if part is not None:
            super().check_argument_for_proper_class(name, part)


def write_published(
    folder,
    side: int,
    patch: int,
    width: int,
    heads: int,
    tied: bool,
    grids: int,
    most: int,
    template: str,
):
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
        "initializer_range": 0.1,
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
        vision_aspect_ratio=f"anyres_max_{most}",
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
        vision_aspect_ratio=f"anyres_max_{most}",
        chat_template=template,
    )
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fields = {
        "num_image_tokens": processor.num_image_tokens,
        "vision_feature_select_strategy": processor.vision_feature_select_strategy,
        "vision_aspect_ratio": processor.vision_aspect_ratio,
    }
    (folder / "processor_config.json").write_text(json.dumps(fields))
    (folder / "chat_template.jinja").write_text(template)
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


def ids_of_text(text: str, processor, kind: str = "image") -> list[int]:
    """Return our ids of what the published template wrote."""
    mark = processor.tokenizer.convert_tokens_to_ids(f"<{kind}>")
    return [IMAGE_TOKEN if i == mark else i for i in processor.tokenizer(text)["input_ids"]]


def ask(folder, processor, kind: str, number: int) -> tuple[str, torch.Tensor]:
    """Return the published prompt of a question on so many pictures or videos, and our ids."""
    parts = [{"type": kind}] * number + [{"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    turns = [{"from": "human", "value": "<image>\n" * number + "What is it?"}]
    ids = encode_prompt(turns, load_tokenizer(folder), "chat")
    assert ids == ids_of_text(prompt, processor, kind)
    return prompt, torch.tensor(ids)


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
    prompt, ids = ask(folder, processor, "image", 1)
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
    prompt, ids = ask(folder, processor, "image", 3)
    shown = photos()[6:9]
    views = ours.views.for_images(3)
    items = [views.picture(photo) for photo in shown]
    assert [item.shape for item in items] == [views.shape(photo.size) for photo in shown]
    inputs = processor(text=prompt, images=[shown], return_tensors="pt")
    for item, pixels in zip(items, inputs["pixel_values"], strict=True):
        mine = ours.vision_tower.processor.normalise(item.pixels)
        assert torch.allclose(pixels, mine, rtol=0, atol=1e-6)
    same_answers(ours, theirs, ids, items, inputs, theirs.config.image_token_index)


@pytest.mark.parametrize("frames", [1, 5])
def test_frames_of_a_video_have_a_quarter_of_the_tokens_and_one_separator(published, frames):
    folder, theirs, processor, ours = published
    prompt, ids = ask(folder, processor, "video", 1)
    item = ours.views.clip([photo.resize((64, 48)) for photo in photos()[:frames]])
    pixels = ours.vision_tower.processor.normalise(item.pixels)
    inputs = {"pixel_values_videos": pixels[None]}
    written = processor.replace_video_token(inputs, 0)
    inputs |= processor.tokenizer(prompt.replace("<video>", written), return_tensors="pt")
    same_answers(ours, theirs, ids, [item], inputs, theirs.config.video_token_index)


def write_rows(folder) -> Rows:
    """Write rows of one picture, of several, of a video, and of text alone."""
    shown = photos()
    frames = [photo.resize((64, 48)) for photo in shown[3:6]]
    frames[0].save(folder / "c.gif", save_all=True, append_images=frames[1:], duration=100)
    for name, photo in {"a": shown[8], "b": shown[1], "d": shown[2]}.items():
        photo.save(folder / f"{name}.png")
    media = [
        {"image": "a.png"},
        {"image": ["b.png", "d.png"]},
        {"video": "c.gif"},
        {},
        {"image": "d.png"},
    ]
    rows = []
    for i, one in enumerate(media):
        count = len(as_list(next(iter(one.values()), [])))
        question = {"from": "human", "value": "<image>\n" * count + f"What is {i}?"}
        answer = {"from": "gpt", "value": "Nothing" + "!" * i}
        rows.append({"id": str(i), **one, "conversations": [question, answer]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return open_rows(folder / "rows.json")


def test_rows_of_all_kinds_packed_are_each_alone(published, tmp_path):
    """Loss and gradients; and their pictures are counted as they are made."""
    folder, *_, ours = published
    views = replace(ours.views, frames=3)
    spec = SampleSpec(load_tokenizer(folder), "chat", 5000, views)
    rows = write_rows(tmp_path)
    samples = [make_sample(rows, i, spec) for i in range(5)]
    assert [len(sample.items) for sample in samples] == [1, 2, 1, 0, 1]
    side = isqrt(views.tokens)
    several = [PADDED, PADDED]
    assert [item.shape for item in samples[1].items] == several
    assert samples[2].items[0].shape == ItemShape(3)
    assert samples[4].items[0].shape == views.shape(photos()[2].size)
    for i, sample in enumerate(samples):
        counted = make_sample(rows, i, spec, pixels=False)
        assert counted.ids.tolist() == sample.ids.tolist()
        assert [item.shape for item in load_items(rows, i, spec)] == [
            item.shape for item in sample.items
        ]
    assert (samples[1].ids == IMAGE_TOKEN).sum() == 2 * (side**2 + 1)
    assert (samples[2].ids == IMAGE_TOKEN).sum() == 3 * ceil(side / 2) ** 2 + 1
    assert guess_row(rows[1], "chat", views).positions == 2 * (side**2 + 1)

    ours.zero_grad()
    alone = 0.0
    for sample in samples:
        loss = ours.loss(pack_samples([sample]))
        loss.backward()
        alone += loss.item()
    want = [p.grad for p in ours.parameters()]
    ours.zero_grad()
    loss = ours.loss(pack_samples(samples))
    loss.backward()
    assert loss.item() == pytest.approx(alone, rel=1e-5)
    for (name, p), gradient in zip(ours.named_parameters(), want, strict=True):
        assert (p.grad - gradient).norm() <= 1e-5 * max(0.1, gradient.norm()), name
    ours.zero_grad()


def test_every_gradient_and_bf16_logits_are_those_of_transformers(published):
    folder, theirs, processor, ours = published
    photo = photos()[0]
    prompt, ids = ask(folder, processor, "image", 1)
    inputs = processor(text=prompt, images=[[photo]], return_tensors="pt")
    items = [ours.views.picture(photo)]
    ours.zero_grad()
    theirs.zero_grad()
    ours(ids[None], items).logits.square().mean().backward()
    want = theirs(**inputs).logits
    want.square().mean().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    compared = 0
    for name, p in theirs.named_parameters():
        if p.grad is None:  # the norm behind the last block, whose output no one reads
            assert "post_layernorm" in name
            continue
        [part] = as_tuple(rename(name, TABLE))
        got = gradients.pop(part)
        assert (got - p.grad).norm().item() <= 1e-4 * max(1e-3, p.grad.norm().item()), name
        compared += 1
    assert compared > 70 and not gradients
    ours.zero_grad()
    theirs.zero_grad()

    rounded = copy.deepcopy(ours).to(torch.bfloat16)
    with torch.no_grad():
        logits = rounded(ids[None], items).logits.float()
    assert ((logits - want).norm() / want.norm()).item() <= 2e-2


def test_all_kinds_are_answered_together_as_alone(published):
    *_, ours = published
    shown = photos()
    several = ours.views.for_images(2)
    asked = [
        ([3, IMAGE_TOKEN, 5, 9], [ours.views.picture(shown[0])]),
        ([IMAGE_TOKEN, 4, IMAGE_TOKEN, 8], [several.picture(photo) for photo in shown[1:3]]),
        ([7, 6, 2], []),
        ([1, IMAGE_TOKEN, 11], [ours.views.clip(shown[3:6])]),
    ]
    prompts = [torch.tensor(ids) for ids, _ in asked]
    alone = [
        ours.generate([prompt], items, max_new_tokens=6)[0].tolist()
        for prompt, (_, items) in zip(prompts, asked, strict=True)
    ]
    items = [item for _, items in asked for item in items]
    assert ours.generate(prompts, items, max_new_tokens=6).tolist() == alone


def test_several_pictures_are_seen_as_such_wherever_they_come_in(published, tmp_path):
    """In a chat, a benchmark and a request: a picture is tiled only if it is alone."""
    folder, *_, ours = published
    tokenizer = load_tokenizer(folder)
    write_rows(tmp_path)
    tiled = ours.views.shape(photos()[2].size)
    assert tiled.views > 1

    chat = Chat(ours, tokenizer, {})
    chat.show(str(tmp_path / "c.gif"), "video")
    chat.show(str(tmp_path / "d.png"))
    clip = ItemShape(ours.views.frames)
    assert [item.shape for item in chat.items] == [clip, tiled]
    with pytest.raises(UserError, match="none.png"):
        chat.show(str(tmp_path / "none.png"))
    assert [item.shape for item in chat.items] == [clip, tiled]
    chat.show(str(tmp_path / "b.png"))
    assert [item.shape for item in chat.items] == [clip, PADDED, PADDED]
    chat.reset()
    chat.show(str(tmp_path / "d.png"))
    assert [item.shape for item in chat.items] == [tiled]

    for shown, shapes in (("d.png", [tiled]), (["b.png", "d.png"], [PADDED, PADDED])):
        example = {"prompt": "What?", "image": shown}
        items = evaluate.items_of_example(example, tmp_path, ours)
        assert [item.shape for item in items] == shapes
        room = evaluate.longest_prompt(ours, tokenizer, [example])
        text = evaluate.longest_prompt(ours, tokenizer, [{"prompt": "What?", "image": None}])
        assert room - text >= sum(ours.views.positions(shape) for shape in shapes)
    assert room - text == 2 * ours.views.positions(PADDED)

    jobs = JobQueue(ours, tokenizer, "small", Limits())
    photo = (tmp_path / "d.png").read_bytes()
    url = "data:image/png;base64," + b64encode(photo).decode()
    for count, shape in ((1, tiled), (2, PADDED)):
        assert jobs.picture(photo, count).shape == shape
        parts = [{"type": "image_url", "image_url": {"url": url}}] * count
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
        job = serve.read_request({"model": "small", "messages": messages}, jobs, False)
        assert [item.shape for item in job.images] == [shape] * count


def test_turns_are_those_of_the_template(published):
    """The published one writes an answer otherwise in its prompt than in the history."""
    folder, _, processor, _ = published
    tokenizer = load_tokenizer(folder)
    said = ("<image>\n<image>\nWho?", "A dog.", "Sure?\n Now", "No.")
    speakers = ("human", "gpt", "human", "gpt")
    turns = [{"from": who, "value": text} for who, text in zip(speakers, said, strict=True)]
    messages = []
    for role, text in zip(("user", "assistant") * 2, said, strict=True):
        parts = [{"type": "image"}] * text.count("<image>")
        parts.append({"type": "text", "text": text.replace("<image>\n", "")})
        messages.append({"role": role, "content": parts})

    # What stands before each answer, and the answer.
    prompts = []
    answers = []
    for turn in (1, 3):
        text = processor.apply_chat_template(messages[:turn], add_generation_prompt=True)
        prompts.append(ids_of_text(text, processor))
        answers.append(ids_of_text(said[turn] + "<|im_end|>", processor))
        assert encode_prompt(turns[:turn], tokenizer, "chat") == prompts[-1]

    samples = encode_samples(turns, tokenizer, "chat")
    if processor.chat_template == PUBLISHED:
        for (ids, labels), prompt, answer in zip(samples, prompts, answers, strict=True):
            assert ids == prompt + answer
            assert labels == [IGNORE] * len(prompt) + answer
    else:
        [(ids, labels)] = samples
        whole = processor.apply_chat_template(messages)
        assert ids == ids_of_text(whole, processor)
        assert [i for i in labels if i != IGNORE] == answers[0] + answers[1]


def test_the_published_sizes_are_those_of_transformers(tmp_path):
    """Of 0.5B: what a config leaves out, the number of parameters, the tokens of a picture."""
    text = {
        "model_type": "qwen2",
        "vocab_size": 152_000,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    }
    theirs = transformers.LlavaOnevisionConfig(text_config=text)
    config = {
        "model_type": "llava_onevision",
        "text_config": text,
        "vision_config": theirs.vision_config.to_dict(),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        ours = LLaVA(read_config(tmp_path))
        model = transformers.LlavaOnevisionForConditionalGeneration(theirs)

    # We leave out the norm behind the encoder's last block.
    parameters = sum(p.numel() for p in ours.parameters())
    assert parameters + 2 * 1152 == sum(p.numel() for p in model.parameters()) == 893_675_552
    views = ours.views
    assert max(views.positions(shape) for shape in views.largest()) == 8829
    assert views.positions(PADDED) == 730 and views.positions(ItemShape(2)) == 2 * 196 + 1
    assert [[384 * r, 384 * c] for r, c in views.grids] == theirs.image_grid_pinpoints


def test_answers_of_the_published_template_are_as_transformers_asks_for_them(published, tmp_path):
    """Each is a sample, behind the prompt for it and the pictures as they are seen until then."""
    folder, _, processor, ours = published
    shutil.copytree(folder, tmp_path / "published")
    (tmp_path / "published" / "chat_template.jinja").write_text(PUBLISHED)
    spec = SampleSpec(load_tokenizer(tmp_path / "published"), "chat", 5000, ours.views)

    said = ("Hello", "Yes?", "<image>\nWho?", "A dog.", "Sure?\n Now", "", "<image>\nAnd?", "No. ")
    speakers = ("human", "gpt") * 4
    turns = [{"from": who, "value": text} for who, text in zip(speakers, said, strict=True)]
    messages = []
    for role, text in zip(("user", "assistant") * 4, said, strict=True):
        parts = [{"type": "image"}] * text.count("<image>")
        parts.append({"type": "text", "text": text.replace("<image>\n", "")})
        messages.append({"role": role, "content": parts})
    shown = [photos()[0], photos()[2]]
    for name, photo in zip("ab", shown, strict=True):
        photo.save(tmp_path / f"{name}.png")
    row = {"id": "0", "image": ["a.png", "b.png"], "conversations": turns}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    rows = open_rows(tmp_path / "rows.json")

    mark = processor.tokenizer.convert_tokens_to_ids("<image>")
    samples = make_samples(rows, 0, spec)
    for k, (sample, count) in enumerate(zip(samples, (0, 1, 1, 2), strict=True)):
        text = processor.apply_chat_template(
            messages[: 2 * k + 1], chat_template=PUBLISHED, add_generation_prompt=True
        )
        pictures = [shown[:count]] if count else None
        inputs = processor(text=text, images=pictures, return_tensors="pt")
        prompt = [IMAGE_TOKEN if i == mark else i for i in inputs["input_ids"][0].tolist()]
        answer = processor.tokenizer(said[2 * k + 1] + "<|im_end|>")["input_ids"]
        assert sample.ids.tolist() == prompt + answer
        assert sample.labels.tolist() == [IGNORE] * len(prompt) + answer
        assert len(sample.items) == count
        for item, pixels in zip(sample.items, inputs.get("pixel_values", []), strict=True):
            mine = ours.vision_tower.processor.normalise(item.pixels)
            assert torch.allclose(pixels, mine, rtol=0, atol=1e-6)
        counted = make_samples(rows, 0, spec, pixels=False)[k]
        assert [item.shape for item in counted.items] == [item.shape for item in sample.items]

    # The log of a run asks the first question of a row.
    turns[:2] = []
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    question = first_question(open_rows(tmp_path / "rows.json"), 0, spec)
    assert [item.shape for item in question.items] == [item.shape for item in samples[1].items]


def test_the_largest_shape_is_at_least_any_picture(published):
    *_, ours = published
    for grids in (ours.views.grids, ((3, 4),), ((4, 3),)):
        views = replace(ours.views, grids=grids)
        most = max(views.positions(shape) for shape in views.largest())
        for width in range(1, 400, 13):
            for height in range(1, 400, 17):
                assert views.positions(views.shape((width, height))) <= most


def test_a_line_of_a_picture_keeps_a_row_of_tokens():
    """Where transformers leaves none, and fails."""
    model = onevision(image_grids="1x90", image_views=1)
    item = model.views.picture(Image.new("RGB", (1080, 1), (90, 30, 200)))
    assert model.views.made_smaller(*model.views.size_in_tokens(item.shape))[0] == 1
    [features] = model.encode_items([item])
    assert len(features) == model.views.positions(item.shape)
    assert features.isfinite().all()


def test_the_head_is_tied_where_transformers_ties_it(published, tmp_path):
    folder, theirs, *_ = published
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = read_json(folder / "config.json")
    for top, nested in ((True, False), (False, True), (None, True)):
        config["tie_word_embeddings"] = top
        config["text_config"]["tie_word_embeddings"] = nested
        (tmp_path / "config.json").write_text(json.dumps(config))
        stored = theirs.config.tie_word_embeddings
        if top and not stored:
            # Its two tables differ.
            with pytest.raises(UserError, match="differs from"):
                LLaVA.from_pretrained(tmp_path)
        else:
            lm = LLaVA.from_pretrained(tmp_path).language_model
            assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == stored


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
    assert read.config.image_mode == "anyres_max" and read.views == ours.views
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
    assert made.chat_template.strip() == processor.chat_template
    prompt, _ = ask(tmp_path / "out", made, "image", 1)
    got = made(text=prompt, images=[[photo]], return_tensors="pt")
    want = processor(text=prompt, images=[[photo]], return_tensors="pt")
    assert torch.equal(got["input_ids"], want["input_ids"])
    assert torch.allclose(got["pixel_values"], want["pixel_values"], rtol=0, atol=1e-6)


def onevision(family="qwen2", tower="siglip", **changes) -> LLaVA:
    """Return a model that was made here."""
    options = {"image_mode": "anyres_max", "image_grids": "1x2 2x1 4x4", "image_views": 5}
    if tower == "siglip":
        options["feature_select"] = "cls_patch"
    return small(family, tower, **(options | changes))


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_a_model_made_here_becomes_one_of_transformers(tmp_path, family):
    """Also of a family whose embeddings are scaled."""
    ours = onevision(family)
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


def test_our_own_layout_keeps_what_it_is(tmp_path):
    ours = onevision()
    export(ours, None, "barellava", tmp_path / "out")
    assert LLaVA.from_pretrained(tmp_path / "out").views == ours.views
    assert ours.views.max_views == 5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_mode": "anyres"}, "image mode anyres"),
        ({"connector": "mlp3x_gelu"}, "connector mlp3x_gelu"),
        ({"tower": "clip"}, "encoder clip_vision_model"),
        ({"feature_norm": True, "feature_layer": -1}, "the encoder's final norm"),
    ],
)
def test_what_onevision_cannot_express_is_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export(onevision(**changes), None, "llava-onevision", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_that_onevision_does_not_have_are_refused(tmp_path):
    biased = onevision("phi")
    biased.language_model.lm_head.bias.data[3] = 0.1
    unknown = onevision()
    unknown.config = replace(unknown.config, text=unknown.config.text | {"model_type": "openelm"})
    cropped = onevision()
    cropped.vision_tower.processor = replace(cropped.vision_tower.processor, crop=SIDE)
    for model, message in ((biased, "the bias"), (unknown, "openelm"), (cropped, "12 pixels crop")):
        with pytest.raises(UserError, match=f"--to llava-onevision: {message}.*; fix: "):
            export(model, None, "llava-onevision", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_is_written_for_transformers_5(tmp_path):
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
        ("config.json", "vision_aspect_ratio", "anyres"),
        ("config.json", "vision_config", {"model_type": "clip_vision_model"}),
        ("processor_config.json", "vision_aspect_ratio", "anyres_max_4"),
        ("processor_config.json", "num_image_tokens", 10),
        ("processor_config.json", "vision_feature_select_strategy", "default"),
        ("video_preprocessor_config.json", "image_mean", [0.1, 0.2, 0.3]),
        ("video_preprocessor_config.json", "size", {"height": 24, "width": 24}),
        ("preprocessor_config.json", "image_grid_pinpoints", [[12, 12]]),
    ],
)
def test_a_field_that_is_computed_otherwise_is_refused(file, field, value, tmp_path):
    export(onevision(), None, "llava-onevision", tmp_path / "out")
    content = read_json(tmp_path / "out" / file)
    (tmp_path / "out" / file).write_text(json.dumps(content | {field: value}))
    with pytest.raises(UserError, match=field if field != "multimodal_projector_bias" else "proj"):
        LLaVA.from_pretrained(tmp_path / "out")


def test_the_recipe_trains_such_a_folder_and_the_result_goes_back(tmp_path):
    """LoRA on own rows, an answer, and the export to transformers."""
    folder = tmp_path / "published"
    write_published(folder, **SMALL["odd"])
    write_rows(tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())
    again = [row | {"id": f"{i}-{row['id']}"} for i in range(3) for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(again))
    out = tmp_path / "out"
    run(
        "train.py",
        ROOT / "recipes" / "onevision-0.5b-finetune.toml",
        f"model.checkpoint={folder}",
        f"train.output={out}",
        "train.workers=0",
        "stage.own.epochs=1",
        f"stage.own.data={tmp_path / 'rows.json'}",
        f"stage.own.images={tmp_path}",
    )
    answer = run("generate.py", "--model", out, "--image", tmp_path / "d.png", "--prompt", "Who?")
    assert answer.returncode == 0
    run("export.py", "--model", out, "--to", "llava-onevision", tmp_path / "hf")
    _, info = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values()), info
