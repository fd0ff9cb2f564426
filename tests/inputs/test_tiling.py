"""Items of one or more views: their positions, LLaVA-NeXT's tiles and order beside transformers,
one packed batch of all kinds beside each row alone."""

import copy
import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints.layouts import read_config
from config import LLaVAConfig, Model, Stage, Train, UserError
from connectors import anyres_order, join_views
from data import Steps, loader, token_counts
from inputs import image_processor
from inputs import tiling as tiling_module
from inputs.image_processor import ImageProcessor
from inputs.pictures import image_size, load_image
from inputs.rows import open_rows
from inputs.sample import SampleSpec, load_item, load_items
from inputs.templates import byte_tokenizer
from inputs.tiling import MODES, Tiling, mark_names, read_grids
from model import LLaVA, init_weights
from packing import IGNORE, IMAGE_TOKEN, Item, ItemShape, pack_samples
from tests.tools.environment import shared
from tests.tools.fuzz import run_case
from tests.tools.no_cache import generate_without_cache
from tests.tools.sample_rows import make_sample, row, write
from training.check import check_rows

TEXT = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}
SMALL = {"num_queries": 6, "num_resampler_layers": 1}


def build(connector="mlp2x_gelu", mode="square", frames=5, options=None, **change) -> LLaVA:
    torch.manual_seed(0)
    config = LLaVAConfig(
        TEXT, VISION | change, {}, connector, options or {}, image_mode=mode, frames=frames
    )
    if mode == "split":
        marks = {name: [7 + i] * (1 + i % 2) for i, name in enumerate(mark_names(32, 16))}
        config = dataclasses.replace(config, image_edge=32, image_marks=marks)
    model = LLaVA(config)
    init_weights(model, 0.3)
    return model.eval()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    )


# ---- shapes and positions


def brute_order(shape: ItemShape, side: int) -> list:
    """Walks over the large picture row by row, as one would point with a finger."""
    out = list(range(side * side))
    for y in range(shape.top, shape.rows * side - shape.top):
        for x in range(shape.left, shape.columns * side - shape.left):
            tile = (y // side) * shape.columns + x // side
            out.append(side * side * (1 + tile) + (y % side) * side + x % side)
        out.append(shape.views * side * side)
    return out


def test_tokens_of_tiles_are_those_of_one_large_picture():
    for rows, columns, top, left in itertools.product((1, 2, 3), (1, 2, 3), (0, 1), (0, 2)):
        shape = ItemShape(1 + rows * columns, rows, columns, top, left)
        assert anyres_order(shape, 36).tolist() == brute_order(shape, 6)


@pytest.mark.parametrize("mode", ["square", "pad", "tiles", "anyres"])
def test_positions_are_the_tokens_that_come(mode):
    model, draw = build(mode=mode), random.Random(1)
    for seed in range(12):
        item = model.views.picture(photo(draw.randint(1, 90), draw.randint(1, 90), seed))
        assert (
            item.pixels.shape == (item.shape.views, 3, 16, 16) and item.pixels.dtype == torch.uint8
        )
        (features,) = model.encode_items([item])
        assert features.shape == (model.views.positions(item.shape), 32)
    clip = model.views.clip([photo(20, 30, i) for i in range(5)])
    (features,) = model.encode_items([clip])
    assert features.shape == (5 * 16, 32) == (model.views.positions(ItemShape(5)), 32)


@pytest.mark.parametrize(
    "connector, options, want",
    [
        ("mean_mlp2x_gelu", {}, 16),
        ("resampler", SMALL, 6),
        ("naiveresampler", SMALL, 6),
        ("groupresampler", SMALL | {"group": 3}, 6),
        ("mlp2x_gelu", {}, 80),
    ],
)
def test_a_video_takes_what_its_connector_says(connector, options, want):
    model = build(connector, options=options)
    clip = torch.randn(5, 3, 16, 16)
    (features,) = model.encode_items([Item(clip, ItemShape(5))])
    assert len(features) == want == model.views.positions(ItemShape(5))
    seen = model.vision_tower(clip)
    joined = seen.mean(0)[None] if connector.startswith("mean") else seen.flatten(0, 1)[None]
    assert torch.allclose(features, model.connector(joined)[0], atol=1e-6)


def test_a_mixtures_views_are_joined_in_each_encoder():
    x = torch.arange(2 * 3 * 2 * 4 * 5.0).view(2, 3, 2, 4, 5)  # (N, v, 2, n, C)
    joined = join_views("mof_mlp", x)
    assert joined.shape == (2, 2, 12, 5) and torch.equal(joined[1, 0, 4:8], x[1, 1, 0])


def test_the_size_of_a_picture_is_that_of_its_pixels(tmp_path):
    for number, turned in enumerate([None, 1, 3, 6, 8]):
        file, exif = tmp_path / f"{number}.jpg", Image.Exif()
        if turned:
            exif[0x0112] = turned
        photo(30, 20).save(file, exif=exif)
        assert (
            image_size(file)
            == load_image(file).size
            == ((20, 30) if turned in (6, 8) else (30, 20))
        )
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    for read in (image_size, load_image):
        with pytest.raises(ValueError, match="not an image"):
            read(tmp_path / "cut.jpg")


def test_what_does_not_go_together_is_one_line():
    for grids in ("", "2", "2x0", "axb", "2x2x2"):
        with pytest.raises(UserError, match="model.image_grids: .*; fix: write rows x columns"):
            read_grids(grids)
    with pytest.raises(
        UserError, match="anyres takes a connector mlpNx_gelu; fix: use one, or tiles"
    ):
        build("resampler", "anyres", options=SMALL)
    with pytest.raises(
        UserError, match="anyres with mean_mlp2x_gelu, the mean of all views; fix: use mlp2x_gelu"
    ):
        build("mean_mlp2x_gelu", "anyres")
    config = LLaVAConfig(TEXT, VISION, {}, image_mode="anyres", feature_select="cls_patch")
    with pytest.raises(
        UserError, match="anyres, with 17 tokens of a view that are no square; fix: "
    ):
        LLaVA(config)
    with pytest.raises(UserError, match="0 frames"):
        build(frames=0)


# ---- beside transformers


SIZES = [(40, 40), (96, 31), (23, 77), (16, 16), (200, 9), (33, 32), (200, 31), (20, 170)]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    name = "LlavaNextImageProcessor"
    processor = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    pinpoints = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
    processor = processor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=pinpoints,
    )
    want = processor(photo(*size), return_tensors="pt")["pixel_values"][0]
    model = build(mode="anyres")
    item = model.views.picture(photo(*size))
    assert item.pixels.shape == want.shape
    assert (model.vision_tower.processor.normalise(item.pixels) - want).abs().max() <= 1e-5


@pytest.fixture(scope="module")
def next_folder(tmp_path_factory):
    """A random LlavaNextForConditionalGeneration as transformers writes it, and the module."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("next")
    torch.manual_seed(3)
    vision = {k: v for k, v in VISION.items() if k != "model_type"}
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=319,
        image_seq_length=16,
        text_config=transformers.LlamaConfig(
            **{k: v for k, v in TEXT.items() if k != "model_type"}
        ),
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]],
    )
    theirs = transformers.LlavaNextForConditionalGeneration(config).eval().float()
    theirs.save_pretrained(folder)
    name = "LlavaNextImageProcessor"
    processor = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    processor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=config.image_grid_pinpoints,
    ).save_pretrained(folder)
    return folder, theirs


SEVERAL = [(96, 31), (23, 77), (40, 40)]


@pytest.mark.parametrize("sizes", [*([size] for size in SIZES), SEVERAL])
def test_llava_next_is_transformers(next_folder, sizes):
    folder, theirs = next_folder
    model = LLaVA.from_pretrained(folder).eval()
    assert model.config.image_mode == "anyres" and model.config.image_grids == "1x2 2x1 2x2 3x1 1x3"
    items = [model.views.picture(photo(*size, seed)) for seed, size in enumerate(sizes)]
    ids, wide = [1, 5], [1, 5]
    for n, item in enumerate(items):
        ids += [IMAGE_TOKEN, 9 + n]
        wide += [319] * model.views.positions(item.shape) + [9 + n]
    pixels = [model.vision_tower.processor.normalise(item.pixels) for item in items]
    most = max(map(len, pixels))
    pixels = torch.stack([torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in pixels])
    want = theirs(
        input_ids=torch.tensor([wide]),
        pixel_values=pixels,
        image_sizes=torch.tensor([(h, w) for w, h in sizes]),
    ).logits
    got = model(torch.tensor([ids]), items).logits
    assert got.shape == want.shape and (got - want).abs().max() <= 1e-4


def test_a_grid_that_is_not_of_whole_views_is_refused(next_folder, tmp_path):
    folder, _ = next_folder
    config = json.loads((folder / "config.json").read_text())
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"image_grid_pinpoints": [[336, 672], [20, 16]]})
    )
    with pytest.raises(
        UserError, match="image_grid_pinpoints: 20 pixels are not whole views of 16; fix: "
    ):
        read_config(tmp_path)


# ---- one batch of all kinds


@pytest.fixture
def kinds(tmp_path):
    """Text alone, one picture, three, a tiled one, a 16-frame video: rows and their files."""
    for i, size in enumerate([(40, 40), (96, 31), (23, 77)]):
        photo(*size, i).save(tmp_path / f"{i}.png")
    frames = [photo(24, 24, 100 + i).quantize(64) for i in range(20)]
    frames[0].save(
        tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=50, optimize=False
    )
    rows = [
        row("text", "Hi", image=None),
        row("one", "<image>\nWhat?", image="1.png"),
        row("three", "<image> or <image>, <image>?", image=["0.png", "2.png", "1.png"]),
        {k: v for k, v in row("video", "<image>\nWhat happens?").items() if k != "image"}
        | {"video": "clip.gif"},
    ]
    return write(tmp_path, rows)


@pytest.mark.parametrize(
    "connector, mode, options",
    [
        ("mlp2x_gelu", "anyres", {}),
        ("mlp2x_gelu", "square", {}),
        ("mean_mlp2x_gelu", "pad", {}),
        ("groupresampler", "tiles", SMALL | {"group": 2}),
        ("pixel_shuffle", "tiles", {}),
        ("c_abstractor", "pad", {"num_queries": 4, "hidden_size": 20, "depth": 1}),
        ("pixel_shuffle", "split", {}),
    ],
)
def test_a_packed_batch_of_all_kinds_is_each_row_alone(kinds, connector, mode, options):
    model = build(connector, mode, frames=16, options=options).train()
    spec = SampleSpec(byte_tokenizer(), "plain", 5000, model.views)
    samples = [make_sample(kinds, i, spec) for i in range(3)]
    assert len(samples[2].items) == 3
    if mode in ("anyres", "tiles"):
        assert [s.shape.views for s in samples[2].items] == [5, 4, 4]
    if mode == "split":  # which has no videos
        assert [s.shape.views for s in samples[2].items] == [5, 3, 3]
    else:
        samples.append(make_sample(kinds, 3, spec))
        assert samples[3].items[0].shape == ItemShape(16)

    def gradients(groups):
        model.zero_grad()
        total = 0.0
        for group in groups:
            b = pack_samples(group)
            loss = model.loss(b)
            loss.backward()
            total += loss.item()
        return total, {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    together, alone = gradients([samples]), gradients([[s] for s in samples])
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    for name, grad in together[1].items():
        assert (grad - alone[1][name]).abs().max() <= 1e-5 * max(1, alone[1][name].abs().max()), (
            name
        )
    shuffled = gradients([[samples[-1], samples[0]], samples[-2:0:-1]])
    assert shuffled[0] == pytest.approx(alone[0], rel=1e-5)


def test_parts_of_a_step_have_the_views_of_their_rows(kinds):
    model = build(mode="anyres", frames=16)
    spec = SampleSpec(byte_tokenizer(), "plain", 5000, model.views)
    stage = Stage(global_batch=4, micro_batch_tokens=0)
    step = Steps(kinds, spec, stage, Train())[0]
    assert sorted(b.rows[0] for b in step.batches) == [0, 1, 2, 3]
    for batch in step.batches:
        alone = pack_samples([make_sample(kinds, batch.rows[0], spec)])
        assert batch.shapes == alone.shapes
        assert batch.images is alone.images is None or torch.equal(batch.images, alone.images)
    counts = token_counts(kinds, spec)
    assert [c[0] for c in counts] == [len(make_sample(kinds, i, spec).ids) for i in range(4)]
    assert counts[:, 1].tolist() == [0, 4, 13, 16]


def test_a_longest_sample_never_cuts_a_video(kinds):
    spec = SampleSpec(byte_tokenizer(), "plain", 100, build(frames=16).views)
    with pytest.raises(
        UserError,
        match=r"row 3 \(id video\): video cut, it ends at token .*; fix: raise max_tokens",
    ):
        make_sample(kinds, 3, spec)


def test_fps_asks_the_clip(kinds):
    model = build(frames=16)
    views = dataclasses.replace(model.views, fps=4.0)  # the clip: 20 frames of 50 ms, a second
    spec = SampleSpec(byte_tokenizer(), "plain", 5000, views)
    sample = make_sample(kinds, 3, spec)
    assert (
        sample.items[0].shape == ItemShape(4) and int((sample.ids == IMAGE_TOKEN).sum()) == 4 * 16
    )


def test_check_names_a_damaged_clip(kinds, capsys):
    file = kinds.images / "clip.gif"
    file.write_bytes(file.read_bytes()[:300])
    spec = SampleSpec(byte_tokenizer(), "plain", 5000, build(frames=16).views)
    assert check_rows(kinds, spec) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "; fix: " in line]
    assert (
        "row 3 (id video): video " in line
        and "clip.gif: " in line
        and "fetch the video again" in line
    )
    assert "1 text-only, 1 with one image or video, 1 with several" in out


# ---- answering


@pytest.mark.parametrize(
    "mode, connector",
    [
        ("anyres", "mlp2x_gelu"),
        ("tiles", "mlp2x_gelu"),
        ("square", "mean_mlp2x_gelu"),
        ("split", "pixel_shuffle"),
    ],
)
def test_prompts_of_all_kinds_are_answered_together_as_alone(mode, connector):
    model = build(connector, mode, frames=4)
    wide, tall = model.views.picture(photo(96, 31)), model.views.picture(photo(23, 77, 1))
    if mode == "split":  # which has no videos
        other = model.views.picture(photo(9, 9))
    else:
        other = model.views.clip([photo(20, 20, i) for i in range(4)])
    asked = [
        ([5, 6], []),
        ([5, IMAGE_TOKEN, 7], [wide]),
        ([IMAGE_TOKEN, 4, IMAGE_TOKEN], [other, tall]),
        ([5, IMAGE_TOKEN, 8], [wide]),
    ]
    prompts = [torch.tensor(ids) for ids, _ in asked]
    items = [item for _, shown in asked for item in shown]
    alone = [
        generate_without_cache(model, [p], shown, max_new_tokens=6)[0].tolist()
        for p, (_, shown) in zip(prompts, asked, strict=True)
    ]
    assert model.generate(prompts, items, max_new_tokens=6).tolist() == alone
    assert generate_without_cache(model, prompts, items, max_new_tokens=6).tolist() == alone


def test_items_that_differ_in_order_or_shape_are_not_taken_for_each_other():
    from inference.engine import fingerprint

    pixels = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    names = {
        fingerprint(Item(p, s))
        for p, s in [
            (pixels, ItemShape(4)),
            (pixels.flip(0), ItemShape(4)),
            (pixels[:2], ItemShape(2)),
            (pixels, ItemShape(4, 1, 3)),
            (pixels, ItemShape(4, 3, 1)),
        ]
    }
    assert (
        len(names) == 5
        and fingerprint(Item(pixels.clone(), ItemShape(4))) in names
        and max(names) < 0
    )


def test_without_gradients_views_are_encoded_in_parts():
    model, most = build(), []
    forward = model.vision_tower.forward
    model.vision_tower.forward = lambda pixels: most.append(len(pixels)) or forward(pixels)
    pixels = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        (features,) = model.encode_items([Item(pixels, ItemShape(40))])
    assert most == [16, 16, 8]
    assert torch.allclose(
        features, model.encode_items([Item(pixels, ItemShape(40))])[0], atol=1e-5
    ) and most[3:] == [40]


def test_a_recipe_names_grids_and_frames():
    from checkpoints import barellava
    from checkpoints.layouts import config_from_recipe

    c = config_from_recipe(
        Model(
            llm_config=TEXT, vision_config=VISION, image_mode="tiles", image_grids="1x4", frames=3
        ),
        "",
    )
    model = LLaVA(c)
    assert model.views.grids == ((1, 4),) and model.views.frames == 3
    saved = copy.deepcopy(barellava.config_json(c))
    assert (saved["image_grids"], saved["frames"], saved["fps"]) == ("1x4", 3, 0.0)
    assert model.views.picture(photo(9, 9)).shape == ItemShape(5)
    assert IGNORE == -100


def test_the_corrupted_clip_is_one_line_from_check_and_from_training(tmp_path, capsys):
    pytest.importorskip("av", reason="pip install '.[video]'")
    clips = shared("assets/videos")
    rows = [
        {
            "id": name,
            "video": name,
            "conversations": row("", "<image>\nWhat happens?")["conversations"],
        }
        for name in ("corrupted.mp4", "video_90.mov")
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    rows = open_rows(tmp_path / "rows.json", clips)
    spec = SampleSpec(byte_tokenizer(), "plain", 5000, build(frames=4).views)
    assert check_rows(rows, spec) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "; fix: " in line]
    assert line.startswith(
        f"{rows.file}:row 0 (id corrupted.mp4): video {clips / 'corrupted.mp4'}: "
    )
    with pytest.raises(UserError) as e:
        list(loader(Steps(rows, spec, Stage(global_batch=2), Train(on_bad_row="stop"))))
    assert str(e.value) == line
    ((step, _),) = loader(
        Steps(rows, spec, Stage(global_batch=2, steps=1), Train(on_bad_row="skip")), workers=1
    )
    assert step.skipped == [line] and step.packed.shapes == [ItemShape(4)] * 2


# ---- how much may be made


def padded_as_the_reference_does(image, processor):
    """Return what LLaVA-1.5 does: the square is made, and then resized."""
    side = max(image.size)
    colour = tuple(int(mean * 255) for mean in processor.mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return dataclasses.replace(processor).pixels(square)


@pytest.mark.parametrize("strip", [1, 1000, 2**22])
@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_padding_in_strips_gives_the_pixels_of_the_padded_square(monkeypatch, strip, resample):
    monkeypatch.setattr(image_processor, "STRIP", strip)
    random = np.random.default_rng(strip + resample)
    for width, height in ((1, 1), (1, 90), (90, 1), (37, 60), (60, 37), (24, 24), (300, 211)):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        for size, crop in ((24, 0), (24, 24), (26, 24)):
            means = (0.48145466, 0.4578275, 0.40821073)
            processor = ImageProcessor(size, crop, means, resample=resample)
            expected = padded_as_the_reference_does(image, processor)
            assert torch.equal(processor.pixels(image, "pad"), expected), (width, height, size)


@pytest.mark.parametrize("mode", ["square", "pad", "tiles", "anyres"])
@pytest.mark.parametrize("crop", [0, 24])
def test_what_is_made_of_a_picture_is_bounded_before_it_is_decoded(monkeypatch, mode, crop):
    """The estimate is at least what is made, and beyond the limit nothing is."""
    processor = ImageProcessor(24, crop=crop)
    tiling = MODES[mode](9, processor=processor, grids=((1, 2), (3, 1)))
    image = Image.new("RGB", (90, 41))
    made = []
    new, resize = Image.new, Image.Image.resize
    monkeypatch.setattr(Image, "new", lambda *a, **k: made.append(a[1]) or new(*a, **k))
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: made.append(a[1]) or resize(*a, **k))
    tiling.picture(image)
    most = max(width * height for width, height in made)
    monkeypatch.setattr(tiling_module, "MOST_PIXELS", most - 1)
    made.clear()
    with pytest.raises(ValueError, match=f"90 x 41 pixels, of which '{mode}' makes [0-9]+, more"):
        tiling.check_size((90, 41))
    with pytest.raises(ValueError, match="90 x 41 pixels"):
        tiling.picture(image)
    assert not made
    with pytest.raises(ValueError, match="90 x 41 pixels|views of"):
        tiling.clip([image] * 9)


def test_a_wide_picture_of_three_kilobytes_is_padded_in_little_memory(tmp_path):
    """The square around it would take 36 GB."""
    Image.new("1", (110_000, 222)).save(tmp_path / "thin.png")
    tiling = MODES["pad"](9, processor=ImageProcessor(24))

    def load():
        item = load_item(tmp_path / "thin.png", "image", tiling)
        assert item.pixels.shape == (1, 3, 24, 24)

    assert run_case(load, seconds=100, memory=2**30).kind == "accepted"


def test_the_largest_pictures_that_are_taken_today_fit_the_limit():
    """CLIP's shortest side of a ratio of 500, five tiles, 512 frames."""
    clip = Tiling(9, processor=ImageProcessor(384, crop=384))
    clip.check_size((89_000, 178))
    clip.check_size((178, 89_000))
    grids = ((2, 2), (1, 2), (2, 1), (1, 3), (3, 1))
    MODES["anyres"](9, processor=ImageProcessor(384), grids=grids).check_size((9000, 9000))
    clip.check_views(512)
    padding = MODES["pad"](9, processor=ImageProcessor(384))
    padding.check_size((89_000, 178))
    with pytest.raises(ValueError, match="'pad' makes 7955323456, more than 536870912"):
        padding.check_size((178, 89_000))


def test_a_row_of_too_many_pictures_is_one_line(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = write(tmp_path, [row("x", "<image>" * 9, image=["a.png"] * 9)])
    tiling = Tiling(2, processor=ImageProcessor(24))
    spec = SampleSpec(byte_tokenizer(), "plain", 1000, tiling)
    make_sample(rows, 0, spec)
    monkeypatch.setattr(tiling_module, "MOST_PIXELS", 8 * 24 * 24)
    for pixels in (True, False):
        with pytest.raises(UserError, match="row 0 .id x.: 9 views of 5184 pixels, more.*; fix: "):
            make_sample(rows, 0, spec, pixels)
    with pytest.raises(UserError, match="9 views of 5184 pixels"):
        load_items(rows, 0, spec)
