"""Image processors against the published ones; encoders against transformers and golden files."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoints import weights
from checkpoints.names import rename, reverse
from config import UserError
from encoders import build_encoder, load_encoder, vision_config
from inputs.image_processor import ImageProcessor, NaFlexProcessor, read_preprocessor
from tests.tools.environment import shared
from tests.tools.fuzz import ODD as ODD_VALUES

PROCESSORS = {
    "clip-vit-large-patch14-336": "openai--clip-vit-large-patch14-336",
    "clip-vit-large-patch14": "openai--clip-vit-large-patch14",
    "siglip-so400m-patch14-384": "google--siglip-so400m-patch14-384",
    "dinov2-large": "facebook--dinov2-large",
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 12,
}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "mlp_ratio": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 20,
}
DINOV3 = {
    "model_type": "dinov3_vit",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 12,
    "num_register_tokens": 2,
}
NAFLEX_CONFIG = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "num_patches": 9,
}
MOF = {"model_type": "mof", "clip": CLIP, "dinov2": DINOV2}
SQUARE = {"size": {"height": 12, "width": 12}, "do_center_crop": False}


def golden(case: str):
    """A Factory checkpoint: its encoder's config, its file, and its inputs and outputs."""
    folder = shared(f"golden/{case}")
    c = json.loads((folder / "config.json").read_text())
    hf = c["vision_config"]
    if "vision_config2" in c:
        hf = {"model_type": "mof", "clip": hf, "dinov2": c["vision_config2"]}
    return c, hf, weights.Checkpoint(folder), load_file(folder / "io.safetensors")


# -------------------------------------------------------------------------------------- processors


def test_pixels_equal_the_published_processors():
    cases = json.loads(shared("assets/images/golden_preprocess.json").read_text())["cases"]
    checked = set()
    for case in cases:
        folder = shared("assets/configs") / PROCESSORS[case["processor"]]
        config = vision_config(
            json.loads((folder / "config.json").read_text()), read_preprocessor(folder)
        )
        image = Image.open(shared("assets/images") / case["image"])
        pixels = config.processor(image, "pad" if case["pad"] else "square")
        assert list(pixels.shape) == case["shape"], case["image"]
        assert pixels.mean((1, 2)).tolist() == pytest.approx(case["mean"], abs=1e-5)
        for c, y, x, value in case["points"]:
            assert pixels[c, y, x].item() == pytest.approx(value, abs=1e-5), (
                case["image"],
                case["processor"],
            )
        checked.add((case["image"], case["processor"], case["pad"]))
    assert len(checked) == 160 and {c["processor"] for c in cases} == set(PROCESSORS)


def test_the_real_photograph_gives_exactly_its_pixels():
    folder = shared("assets/weights/tinyllava--TinyLLaVA-Phi-2-SigLIP-3.1B-golden")
    want = torch.frombuffer(
        bytearray((folder / "image_tensor_f32_3x384x384.bin").read_bytes()), dtype=torch.float32
    )
    got = ImageProcessor(384)(Image.open(folder / "test.jpg"))
    assert (got.flatten() - want).abs().max() <= 1e-6


def picture(width: int, height: int) -> Image.Image:
    noise = torch.randint(
        0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Image.fromarray(noise.numpy())


SAVED = [
    ("CLIP", {"size": {"shortest_edge": 17}, "crop_size": {"height": 13, "width": 13}}),
    ("CLIP", {"size": 15, "crop_size": 21, "resample": 2}),  # a crop that needs black borders
    ("Siglip", {"size": {"height": 19, "width": 19}, "resample": 2}),  # SigLIP2's
    ("Bit", {"size": {"shortest_edge": 25}, "crop_size": {"height": 22, "width": 22}}),
]


@pytest.mark.parametrize("name, options", SAVED)
@pytest.mark.parametrize("nested", (False, True))
def test_a_saved_processor_is_read_as_transformers_reads_it(tmp_path, name, options, nested):
    image_processors = pytest.importorskip("transformers")
    processor = getattr(image_processors, f"{name}ImageProcessor")(**options)
    processor.save_pretrained(tmp_path)
    if nested:
        flat = tmp_path / "preprocessor_config.json"
        (tmp_path / "processor_config.json").write_text(
            json.dumps({"image_processor": json.loads(flat.read_text())})
        )
        flat.unlink()
    ours = ImageProcessor.from_hf(
        read_preprocessor(tmp_path), ImageProcessor(99, 0 if name == "Siglip" else 98)
    )
    assert ImageProcessor.from_hf(ours.to_hf(), ImageProcessor()) == ours
    for size in ((31, 40), (53, 18), (16, 16)):
        want = processor(picture(*size), return_tensors="pt")["pixel_values"][0]
        assert (ours(picture(*size)) - want).abs().max() <= 1e-5


def test_the_processor_survives_a_round_trip():
    for processor in (
        ImageProcessor(384),
        ImageProcessor(256, 224, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 2),
    ):
        assert ImageProcessor.from_hf(processor.to_hf(), ImageProcessor()) == processor


def test_pad_centres_the_picture_on_the_mean_colour():
    processor = ImageProcessor(5, 0, (0.2, 0.5, 0.9), (1.0, 1.0, 1.0))
    image = picture(5, 2)
    colour = torch.tensor([int(m * 255) for m in processor.mean]) / 255 - torch.tensor(
        processor.mean
    )
    want = colour[:, None, None].repeat(1, 5, 5)
    want[:, 1:3] = ImageProcessor(5, 0, processor.mean, processor.std)(image.crop((0, -1, 5, 4)))[
        :, 1:3
    ]
    assert torch.equal(processor(image, "pad"), want)


def test_what_a_processor_leaves_out_is_the_families_default(tmp_path):
    assert read_preprocessor(tmp_path) == {}
    default = ImageProcessor(256, 224, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 2)
    assert ImageProcessor.from_hf({}, default) == default
    old = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 30,
        "crop_size": 20,
        "do_center_crop": True,
    }
    assert ImageProcessor.from_hf(old, default) == ImageProcessor(
        30, 20, default.mean, default.std, 2
    )
    assert ImageProcessor.from_hf(
        {"size": 30, "resample": None}, ImageProcessor()
    ) == ImageProcessor(30)
    assert vision_config(DINOV2).processor == ImageProcessor(
        256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 3
    )
    assert (vision_config(CLIP).processor.size, vision_config(CLIP).processor.crop) == (12, 12)


CHANGED = [
    ("do_rescale", False),
    ("do_resize", False),
    ("do_normalize", False),
    ("do_pad", True),
    ("do_thumbnail", True),
    ("rescale_factor", 1 / 127.5),
    ("size", {"longest_edge": 30}),
    ("size", {"height": 30, "width": 20}),
    ("crop_size", {"height": 30, "width": 20}),
    ("image_processor_type", "ConvNextImageProcessor"),
    ("size", {"shortest_edge": 30, "longest_edge": 40}),
    ("size", {"height": 30, "width": 30}),
    ("feature_extractor_type", "ViTFeatureExtractor"),
    ("do_center_crop", False),
]


@pytest.mark.parametrize("field, value", CHANGED)
def test_a_field_that_would_change_the_pixels_is_refused(field, value):
    good = ImageProcessor(30, 20).to_hf()
    good.pop("image_processor_type")
    named = field
    if field == "do_center_crop":
        named = "size"
    elif "type" in field:
        named = "processor_type"
    with pytest.raises(UserError, match=named):
        ImageProcessor.from_hf(good | {field: value}, ImageProcessor())


# Square, wide, tall, tiny, large and grey ones.
PHOTOGRAPHS = (
    "photos/astronaut.png",
    "photos/chelsea.png",
    "photos/page.png",
    "photos/rocket.jpg",
    "photos/moondream_demo-1.jpg",
    "quirks/wide_1800x80.jpg",
    "quirks/tall_40x853.png",
    "quirks/tall_1x300.png",
)


def naflex_oracle(patch_size: int, patches: int, **options):
    """transformers' NaFlex processor that resizes with Pillow."""
    name = "transformers.models.siglip2.image_processing_pil_siglip2"
    published = pytest.importorskip(name)
    return published.Siglip2ImageProcessorPil(
        patch_size=patch_size, max_num_patches=patches, **options
    )


@pytest.mark.parametrize("patch_size, patches", ((16, 256), (14, 1000), (7, 37)))
def test_patches_in_native_proportions_equal_the_published_processors(patch_size, patches):
    ours = NaFlexProcessor(patch_size=patch_size, patches=patches)
    theirs = naflex_oracle(patch_size, patches)
    for name in PHOTOGRAPHS:
        image = Image.open(shared("assets/images") / name).convert("RGB")
        rows, columns = ours.grid_of(image.size)
        made = theirs(image, return_tensors="pt")
        got = ours(image)
        assert made["spatial_shapes"].tolist() == [[rows, columns]], name
        assert len(got) == rows * columns == made["pixel_attention_mask"].sum(), name
        assert torch.equal(got, made["pixel_values"][0, : len(got)]), name

        # The patches are the picture again.
        whole = ours.picture(ours.pixels(image), (rows, columns))
        size = (columns * patch_size, rows * patch_size)
        assert torch.equal(whole, ours.tensor(image.resize(size, ours.resample)))
        assert ours.pixels_made(image.size) == whole[0].numel() <= ours.side**2


def test_any_size_has_the_published_grid():
    name = "transformers.models.siglip2.image_processing_pil_siglip2"
    published = pytest.importorskip(name).get_image_size_for_max_num_patches
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        width, height = torch.randint(1, 3000, (2,), generator=generator).tolist()
        for patch_size, patches in ((16, 256), (7, 9), (14, 1024)):
            want = published(height, width, patch_size, patches)
            rows, columns = NaFlexProcessor(patch_size=patch_size, patches=patches).grid_of(
                (width, height)
            )
            assert (rows * patch_size, columns * patch_size) == want


def test_a_saved_processor_of_patches_is_read_as_transformers_reads_it(tmp_path):
    options = {"resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    theirs = naflex_oracle(5, 41, **options)
    theirs.save_pretrained(tmp_path)
    fields = read_preprocessor(tmp_path)
    ours = NaFlexProcessor.from_hf(fields, NaFlexProcessor())
    assert ours == NaFlexProcessor(
        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resample=3, patch_size=5, patches=41
    )
    assert NaFlexProcessor.from_hf(ours.to_hf(), NaFlexProcessor()) == ours
    want = theirs(picture(31, 40), return_tensors="pt")["pixel_values"][0]
    got = ours(picture(31, 40))
    assert (got - want[: len(got)]).abs().max() <= 1e-6
    changes = (
        ("do_resize", False),
        ("do_pad", True),
        ("rescale_factor", 1.0),
        ("image_processor_type", "SiglipImageProcessor"),
        ("max_num_patches", 0),
        ("patch_size", "16"),
    )
    for field, value in changes:
        with pytest.raises(UserError, match=field.removeprefix("image_")):
            NaFlexProcessor.from_hf(fields | {field: value}, NaFlexProcessor())


# ---------------------------------------------------------------------------------- the arithmetic

ODD = dict(hidden_size=33, num_attention_heads=3, num_hidden_layers=3, patch_size=5, image_size=17)
FIVE = dict(hidden_size=40, num_attention_heads=5, num_hidden_layers=2, patch_size=3, image_size=21)
KINDS = {
    "clip": (
        "CLIPVisionModel",
        [
            ODD | dict(intermediate_size=50),
            FIVE | dict(intermediate_size=31, hidden_act="gelu", layer_norm_eps=1e-3),
        ],
    ),
    "siglip": (
        "SiglipVisionModel",
        [
            ODD | dict(intermediate_size=50),
            FIVE | dict(intermediate_size=31),
        ],
    ),
    "dinov2": (
        "Dinov2Model",
        [
            ODD | dict(mlp_ratio=3),
            FIVE | dict(mlp_ratio=4, use_swiglu_ffn=True, layerscale_value=0.5),
        ],
    ),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        [
            ODD | dict(mlp_ratio=3, num_register_tokens=3, use_swiglu_ffn=True),
            FIVE | dict(mlp_ratio=2, num_register_tokens=1),
        ],
    ),
    "dinov3_vit": (
        "DINOv3ViTModel",
        [
            ODD | dict(hidden_size=36, intermediate_size=50, num_register_tokens=3),
            # As the 7B model has it, and more.
            FIVE
            | dict(
                intermediate_size=31,
                use_gated_mlp=True,
                hidden_act="silu",
                query_bias=False,
                value_bias=False,
                key_bias=True,
                rope_theta=17.5,
                layer_norm_eps=1e-3,
            ),
        ],
    ),
}
CASES = [(name, c) for name, (_, configs) in KINDS.items() for c in configs]


def oracle(name: str, config: dict, folder):
    """Save a random model of transformers to a folder; what starts at 0 is random too."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, KINDS[name][0])
    torch.manual_seed(0)
    model = cls(cls.config_class(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name, config", CASES, ids=[f"{n}-{c['hidden_size']}" for n, c in CASES])
def test_features_equal_those_of_transformers(tmp_path, name, config):
    model = oracle(name, config, tmp_path)
    sides = [config["image_size"]]
    if name.startswith("dino"):  # larger, smaller, and not a multiple of the patch
        sides += [config["image_size"] + 2 * config["patch_size"], 2 * config["patch_size"] + 1]
    for side in sides:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(ImageProcessor(side).to_hf()))
        pixels = torch.randn(2, 3, side, side)
        with torch.no_grad():
            states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
            for layer in (-1, -2, 0):
                for select, want in (("cls_patch", states[layer]), ("patch", states[layer][:, 1:])):
                    encoder = load_encoder(tmp_path, feature_layer=layer, feature_select=select)
                    got = encoder(pixels)
                    assert got.shape == want.shape and got.size(1) == encoder.config.tokens(select)
                    assert (got - want).abs().max() <= 1e-4
            half = load_encoder(tmp_path, torch.bfloat16)(pixels)
            want = states[-2][:, 1:]
            assert half.dtype == torch.bfloat16 and (half - want).norm() <= 2e-2 * want.norm()


@pytest.mark.parametrize("name, config", CASES[-2:], ids=("plain", "gated"))
def test_gradients_of_dinov3_equal_those_of_transformers(tmp_path, name, config):
    """Those of every parameter in front of the last hidden state; the pictures are no squares."""
    model = oracle(name, config, tmp_path)
    width = config["image_size"]
    pixels = torch.randn(2, 3, width + 2 * config["patch_size"], width)
    want = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    upstream = torch.randn_like(want)
    want.backward(upstream)

    encoder = load_encoder(tmp_path, feature_layer=-1, feature_select="cls_patch")
    got = encoder.requires_grad_(True)(pixels)
    assert (got - want).abs().max() <= 1e-4
    got.backward(upstream)

    expected = {
        key.removeprefix("model."): p.grad
        for key, p in model.named_parameters()
        if p.grad is not None and p.numel()
    }
    table = reverse(encoder.rename)
    grads = {rename(key, table): p.grad for key, p in encoder.named_parameters() if p.numel()}
    assert set(grads) == set(expected)
    for key, grad in grads.items():
        # A key's bias is zero but for rounding where it moves all scores of a query alike.
        assert (grad - expected[key]).norm() <= 1e-4 * expected[key].norm() + 1e-5, key


@pytest.mark.parametrize("name, config", CASES[-2:], ids=("plain", "gated"))
def test_transformers_loads_the_dinov3_that_we_save(tmp_path, name, config):
    model = oracle(name, config | {"pos_embed_rescale": None}, tmp_path / "theirs")
    encoder = load_encoder(tmp_path / "theirs", feature_layer=1)
    weights.save(tmp_path / "ours", weights.tensors(encoder, encoder.rename))
    (tmp_path / "ours" / "config.json").write_text(json.dumps(encoder.config.hf))

    kind = type(model)
    back, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    same = kind.from_pretrained(tmp_path / "theirs").config.to_dict()
    assert back.config.to_dict() == same | {"_name_or_path": str(tmp_path / "ours")}
    state = back.state_dict()
    assert all(torch.equal(state[n], p) for n, p in model.state_dict().items())
    pixels = torch.randn(1, 3, 30, 20)
    with torch.no_grad():
        assert torch.equal(back.eval()(pixels)[0], model(pixels)[0])


def test_what_a_dinov3_leaves_out_is_what_transformers_fills_in():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DINOv3ViTConfig().to_dict()
    ours = vision_config({"model_type": "dinov3_vit"}).hf
    assert ours == {key: theirs[key] for key in ours}
    read = set(DINOV3) | {"rope_theta", "key_bias", "use_gated_mlp", "layerscale_value"}
    assert read <= set(ours)


def test_coordinates_of_dinov3_are_moved_in_pretraining_only(tmp_path):
    """pos_embed_*: transformers moves them in training mode; a model trained here does not."""
    config = CASES[-2][1]
    moved = dict(pos_embed_shift=0.3, pos_embed_jitter=1.5, pos_embed_rescale=2.0)
    pixels = torch.randn(1, 3, 17, 17)
    model = oracle("dinov3_vit", config | moved, tmp_path)
    encoder = load_encoder(tmp_path, feature_layer=-1, feature_select="cls_patch")
    with torch.no_grad():
        want = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        for mode in (True, False):
            assert (encoder.train(mode)(pixels) - want).abs().max() <= 1e-4
        model.train()
        other = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    assert (other - want).abs().max() > 1e-2


def test_pixels_of_dinov3_are_at_most_one_level_from_the_published_ones():
    """Its processor resizes in float32 (torchvision's resize is interpolate), ours in 8 bits.

    Both use the same filter, so they differ by rounding: half a level in each of two directions.
    """
    published = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "crop_size": None,
        "data_format": "channels_first",
        "default_to_square": True,
        "do_center_crop": None,
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 224, "width": 224},
    }
    config = {"model_type": "dinov3_vit"}
    processor = vision_config(config, published).processor
    assert processor == vision_config(config).processor
    mean = torch.tensor(published["image_mean"])[:, None, None]
    std = torch.tensor(published["image_std"])[:, None, None]
    images = [picture(31, 40), picture(600, 150)]
    photographs = sorted(shared("assets/images/photos").iterdir())
    images += [Image.open(path).convert("RGB") for path in photographs]
    exact = 0
    for image in images:
        pixels = ImageProcessor.tensor(image) / 255
        resized = torch.nn.functional.interpolate(
            pixels[None], (224, 224), mode="bilinear", antialias=True
        )[0]
        levels = 255 * ((processor(image) * std + mean) - resized)
        assert levels.abs().max() <= 1.01
        exact += (levels.abs() <= 0.51).float().mean() / len(images)
    assert exact > 0.8


# Whole blocks, both kinds of MLP.
SAVED_CASES = [*CASES[::2], CASES[-1]]


@pytest.mark.parametrize("name, config", SAVED_CASES, ids=[n for n, _ in SAVED_CASES])
def test_a_checkpoint_goes_out_under_the_names_it_came_with(tmp_path, name, config):
    oracle(name, config, tmp_path)
    source = weights.Checkpoint(tmp_path)
    encoder = load_encoder(tmp_path, feature_layer=1)
    assert len(encoder.blocks) == 1 and any(
        k.startswith("encoder.layers.1.") for k in encoder.spares
    )
    out = weights.tensors(encoder, encoder.rename)
    whole = {k if k in source else k.removeprefix("vision_model."): t for k, t in out.items()}
    assert set(whole) == set(source) and all(torch.equal(whole[k], source[k]) for k in source)


def test_the_scale_of_2023_samples_the_position_table_elsewhere(tmp_path):
    """transformers 4.40 passes scale_factor = (patches + 0.1) / old instead of a size."""
    config = CASES[4][1]
    model = oracle("dinov2", config, tmp_path)
    side, patch, grid = 31, config["patch_size"], config["image_size"] // config["patch_size"]
    hf = json.loads((tmp_path / "config.json").read_text())
    table = (
        model.embeddings.position_embeddings[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    )
    table = torch.nn.functional.interpolate(
        table, scale_factor=(side // patch + 0.1) / grid, mode="bicubic"
    )
    table = table.permute(0, 2, 3, 1).reshape(1, (side // patch) ** 2, -1)
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        want = model.embeddings.patch_embeddings(pixels) + table
        got = {}
        for offset in (0.0, 0.1):
            (tmp_path / "config.json").write_text(json.dumps(hf | {"interpolate_offset": offset}))
            got[offset] = load_encoder(tmp_path, feature_layer=0)(pixels)
    assert (got[0.1] - want).abs().max() <= 1e-5
    assert (got[0.0] - want).abs().max() > 1e-2


CASES_GOLDEN = [
    "tinyllama-clip-mlp2x_gelu",
    "phi-siglip-mlp2x_gelu",
    "stablelm-clip-resampler",
    "gemma-siglip-qformer",
    "qwen2-siglip-linear",
    "openelm-dinov2-mlp3x_gelu",
    "tinyllama-mof-mof_mlp",
    "qwen2-clip-mlp-cls_patch",
]


@pytest.mark.parametrize("case", CASES_GOLDEN)
def test_golden_features_of_factory_checkpoints(case):
    c, hf, source, io = golden(case)
    prefix, select = "vision_tower._vision_tower.", c["vision_feature_select_strategy"]
    with torch.device("meta"):
        encoder = build_encoder(vision_config(hf), c["vision_feature_layer"], select)
    used = weights.load(encoder, source, encoder.rename, prefix, ignore=encoder.ignore)
    assert used == {k for k in source if k.startswith(prefix)}
    with torch.no_grad():
        got = encoder(io["images"])
    want = io["vision_features"]
    if "vision_features2" in io:
        want = torch.stack([want, io["vision_features2"]], 1)
        assert encoder.config.tokens(select) == want.size(2)
    assert got.shape == want.shape and (got - want).abs().max() <= 1e-4
    out = weights.tensors(encoder, encoder.rename, prefix)
    assert set(out) == used and all(torch.equal(out[k], source[k]) for k in used)


def test_published_sizes():
    """Parameters of a whole tower as published: what is built, and what always lies behind it."""
    # SigLIP's pooling head: probe, attention (in and out), layer norm, two linears.
    siglip_head = 1152 + 4 * (1152 + 1) * 1152 + 2 * 1152 + (1152 + 1) * 4304 + (4304 + 1) * 1152
    for name, published, behind in (
        (
            "google--siglip-so400m-patch14-384",
            428_225_600,
            siglip_head + 2 * 1152,
        ),  # and post_layernorm
        ("openai--clip-vit-large-patch14-336", 303_507_456, 2 * 1024),  # post_layernorm
        ("facebook--dinov2-large", 304_368_640, 1024 + 2 * 1024),  # mask_token, layernorm
    ):
        folder = shared("assets/configs") / name
        with torch.device("meta"):
            hf = json.loads((folder / "config.json").read_text())
            encoder = build_encoder(vision_config(hf, read_preprocessor(folder)), -1)
        assert sum(p.numel() for p in encoder.parameters()) + behind == published, name


def test_the_real_siglip_embeddings():
    folder = shared("assets/weights/tinyllava--TinyLLaVA-Phi-2-SigLIP-3.1B-golden")
    configs = shared("assets/configs/google--siglip-so400m-patch14-384")
    hf = json.loads((configs / "config.json").read_text())
    config = vision_config(hf, read_preprocessor(configs))
    assert config.tokens("patch") == 728  # as golden_shapes.txt has it
    with torch.device("meta"):
        encoder = build_encoder(config, 0, "cls_patch")
    prefix = "vision_tower._vision_tower."
    names = {
        f"{prefix}vision_model.embeddings.{n}": p.shape
        for n, p in encoder.embeddings.named_parameters()
    }

    def read(name: str) -> torch.Tensor:
        data = bytearray((folder / f"{name}.bin").read_bytes())
        return torch.frombuffer(data, dtype=torch.float16)

    source = {name: read(name).view(shape) for name, shape in names.items()}
    weights.load(
        encoder, source, encoder.rename, prefix, dtype=torch.float32, ignore=encoder.ignore
    )
    pixels = encoder.preprocess(Image.open(folder / "test.jpg"))[None]
    with torch.no_grad():
        patches = encoder.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)[0]
        got = encoder(pixels)[0]
    want = json.loads((folder / "golden_embeddings.json").read_text())
    assert got.shape == (729, 1152)
    for key, x in (("patch_out_mean_std", patches), ("embeddings_mean_std", got)):
        assert [x.mean().item(), x.std(correction=0).item()] == pytest.approx(want[key], abs=1e-4)
    assert got[:8].norm(dim=1).tolist() == pytest.approx(want["row_l2_first8"], rel=1e-5)
    for row, col, patch, embedded in want["points_row_col_patch_embed"]:
        assert patches[row, col].item() == pytest.approx(patch, abs=1e-4)
        assert got[row, col].item() == pytest.approx(embedded, abs=1e-4)


# -------------------------------------------------------------------------------------- the module


def randomized(config: dict, preprocessor=None, layer: int = -1, select: str = "cls_patch"):
    torch.manual_seed(0)
    encoder = build_encoder(vision_config(config, preprocessor), layer, select)
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return encoder


def folder_of(tmp_path, config: dict, prefix: str = "vision_model.", **extra):
    """Write a Hugging Face folder with random weights; return their encoder, with all blocks."""
    encoder = randomized(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {prefix + k: v.contiguous() for k, v in encoder.state_dict().items()} | extra
    save_file(state, tmp_path / "model.safetensors")
    return encoder


def test_feature_layer_and_selection(tmp_path):
    whole = folder_of(tmp_path, CLIP)
    pixels = torch.randn(2, 3, 12, 12)
    x = whole.pre_layrnorm(whole.embeddings(pixels))
    states = [x]
    for block in whole.blocks:
        states.append(block(states[-1]))
    for layer in (-1, -2, 0, 2):
        got = load_encoder(tmp_path, feature_layer=layer, feature_select="cls_patch")(pixels)
        assert torch.equal(got, states[layer])
    assert torch.equal(load_encoder(tmp_path)(pixels), states[-2][:, 1:])
    assert (
        vision_config(CLIP).tokens("patch") == 9 and vision_config(CLIP).tokens("cls_patch") == 10
    )
    for layer in (-5, 4):
        with pytest.raises(UserError, match="feature_layer"):
            load_encoder(tmp_path, feature_layer=layer)


def test_siglip_loses_its_first_patch_as_tinyllava_has_it(tmp_path):
    config = CLIP | {"model_type": "siglip_vision_model"}
    folder_of(tmp_path, config)
    pixels = torch.randn(1, 3, 12, 12)
    every = load_encoder(tmp_path, feature_select="cls_patch")(pixels)
    assert every.shape[1] == 9
    assert torch.equal(load_encoder(tmp_path)(pixels), every[:, 1:])


def test_the_text_half_of_a_full_checkpoint_is_left_where_it_is(tmp_path):
    text = {"text_model.x.weight": torch.ones(3), "visual_projection.weight": torch.ones(3)}
    whole = folder_of(tmp_path, CLIP, logit_scale=torch.ones(()), **text)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": CLIP}))
    pixels = torch.randn(1, 3, 12, 12)
    assert torch.equal(
        load_encoder(tmp_path, feature_layer=-1, feature_select="cls_patch")(pixels), whole(pixels)
    )


def test_spares_go_back_under_their_names(tmp_path):
    folder_of(tmp_path, CLIP, **{"vision_model.post_layernorm.weight": torch.ones(32)})
    encoder = load_encoder(tmp_path)
    assert len(encoder.blocks) == 2 and any(
        k.startswith("encoder.layers.2.") for k in encoder.spares
    )
    assert set(weights.tensors(encoder, encoder.rename)) == set(weights.Checkpoint(tmp_path))


def test_pickled_weights_only_where_asked_for(tmp_path):
    whole = folder_of(tmp_path, CLIP)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickle"):
        load_encoder(tmp_path)
    encoder = load_encoder(tmp_path, feature_layer=-1, allow_pickle=True)
    assert all(
        torch.equal(p, q) for p, q in zip(encoder.parameters(), whole.parameters(), strict=True)
    )


UNKNOWN = [
    (CLIP, {"model_type": "clip_vison_model"}, "clip_vison_model"),
    (CLIP, {"hidden_act": "relu"}, "hidden_act"),
    (CLIP, {"num_channels": 1}, "num_channels"),
    (NAFLEX_CONFIG, {"num_patches": 10}, "num_patches.*square"),
    (NAFLEX_CONFIG, {"patch_size": [4, 4]}, "patch_size"),
    (DINOV2, {"qkv_bias": False}, "qkv_bias"),
    (DINOV3, {"proj_bias": False}, "proj_bias"),
    (DINOV3, {"mlp_bias": False}, "mlp_bias"),
    (DINOV3, {"num_attention_heads": 16}, "heads of a multiple of 4"),
    (DINOV3, {"hidden_act": "silu"}, "hidden_act"),
    (DINOV3, {"use_gated_mlp": True}, "hidden_act"),
    (DINOV3, {"patch_size": [4, 4]}, "patch_size"),
    (DINOV3, {"rope_theta": 0}, "rope_theta"),
    (DINOV2, {"hidden_act": "silu"}, "hidden_act"),
    (DINOV2, {"head_dim": 8}, "head_dim"),
    (DINOV2, {"num_attention_heads": 3}, "hidden_size"),
    (DINOV2, {"image_size": [20, 20]}, "image_size"),
    (MOF, {"clip": CLIP | {"hidden_act": "relu"}}, "clip:hidden_act"),
    (MOF, {"dinov2": {}}, "dinov2:model_type"),
    (MOF, {"dinov2": DINOV2 | {"hidden_size": 48}}, "width"),
    (MOF, {"dinov2": DINOV2 | {"patch_size": 3}}, "tokens"),
    (MOF, {"dinov2": DINOV2 | {"model_type": "dinov2_with_registers"}}, "tokens"),
]


@pytest.mark.parametrize("base, change, message", UNKNOWN)
def test_an_encoder_we_do_not_know_is_refused(base, change, message):
    with pytest.raises(UserError, match=message):
        vision_config(base | change)


def test_a_processor_of_another_size_is_refused_except_for_dinov2():
    processor = ImageProcessor(16).to_hf()
    for kind in ("clip_vision_model", "siglip_vision_model"):
        with pytest.raises(UserError, match="image_size"):
            vision_config(CLIP | {"model_type": kind}, processor)
    config = vision_config(DINOV2 | {"use_mask_token": False, "drop_path_rate": 0.1}, processor)
    assert (config.tokens("patch"), config.tokens("cls_patch")) == (16, 17)


def test_the_mixture_is_both_encoders_side_by_side():
    mixture = randomized(MOF, layer=-2, select="patch")
    pixels = torch.randn(2, 3, 12, 12)
    got = mixture(pixels)
    assert (
        got.shape == (2, 2, 9, 32)
        and mixture.config.tokens("patch") == 9
        and mixture.config.width == 32
    )
    for i, (name, config) in enumerate((("clip", CLIP), ("dinov2", DINOV2))):
        single = build_encoder(vision_config(config, SQUARE))
        single.load_state_dict(getattr(mixture, name).state_dict())
        assert torch.equal(got[:, i], single(pixels)), name
    assert {k.split(".")[0] for k in mixture.state_dict()} == {"clip", "dinov2"}
    assert mixture.processor == mixture.clip.processor == vision_config(CLIP).processor
    assert mixture.preprocess(picture(30, 20), "pad").shape == (3, 12, 12)


def test_blocks_of_the_mixture_are_those_of_both_towers():
    deep = MOF | {"dinov2": DINOV2 | {"num_hidden_layers": 4}}
    mixture = randomized(deep)
    keys = set(mixture.state_dict())
    assert len(mixture.blocks) == 4
    mixture.requires_grad_(False)
    mixture.blocks[2:].requires_grad_(True)
    trains = {
        n.rsplit(".layers.")[0] + n.rsplit(".layers.")[1][:2]
        for n, p in mixture.named_parameters()
        if p.requires_grad
    }
    assert (
        trains == {"clip.encoder2.", "dinov2.encoder2.", "dinov2.encoder3."}
        and set(mixture.state_dict()) == keys
    )


def test_the_mixture_from_two_folders_goes_out_whole(tmp_path):
    for name, kind, config in (("clip", "clip", CASES[0][1]), ("dinov2", "dinov2", CASES[4][1])):
        (tmp_path / name).mkdir()
        oracle(kind, config | {"image_size": 15}, tmp_path / name)
    parts = {f"{name}.": weights.Checkpoint(tmp_path / name) for name in ("clip", "dinov2")}
    hf = {n: json.loads((tmp_path / n / "config.json").read_text()) for n in ("clip", "dinov2")}
    source = weights.Joined(parts)
    with torch.device("meta"):
        mixture = build_encoder(vision_config({"model_type": "mof"} | hf))
    assert weights.load(mixture, source, mixture.rename, ignore=mixture.ignore) == set(source)
    out = weights.tensors(mixture, mixture.rename)
    assert {k.replace("clip.vision_model.", "clip.") for k in out} == set(source)
    assert (
        any(k.startswith("clip.vision_model.post") for k in out)
        and "dinov2.embeddings.mask_token" in out
    )


@pytest.mark.parametrize(
    "config", (CLIP, DINOV2, DINOV3, MOF), ids=("clip", "dinov2", "dinov3", "mof")
)
def test_gradient_checkpointing_recomputes_and_changes_nothing(config):
    encoder = randomized(config, SQUARE if config is DINOV2 else None)
    pixels, grads, runs = torch.randn(1, 3, 12, 12), [], []
    for name, module in encoder.named_modules():
        if name.endswith("layer_norm1"):
            module.register_forward_hook(lambda *_: runs.append(1))
    for on in (False, True):
        encoder.gradient_checkpointing = on
        encoder.zero_grad()
        runs.clear()
        encoder(pixels).square().mean().backward()
        grads.append([len(runs), *(p.grad.clone() for p in encoder.parameters())])
    assert grads[1][0] == 2 * grads[0][0]
    assert all(torch.equal(a, b) for a, b in zip(grads[0][1:], grads[1][1:], strict=True))


def test_positions_and_tokens_start_by_the_width_and_layer_scale_as_configured():
    config = DINOV2 | {
        "model_type": "dinov2_with_registers",
        "hidden_size": 256,
        "layerscale_value": 0.25,
    }
    encoder = randomized(config)
    linear = encoder.blocks[0].mlp.fc1.weight.clone()
    encoder.init_positions()
    own = dict(encoder.embeddings.named_parameters(recurse=False))
    assert set(own) == {"class_embedding", "register_tokens"}
    for p in (encoder.embeddings.position_embedding.weight, *own.values()):
        assert p.std().item() == pytest.approx(256**-0.5, rel=0.2)
    scales = [
        s
        for block in encoder.blocks
        for s in (block.layer_scale1.lambda1, block.layer_scale2.lambda1)
    ]
    assert len(scales) == 6 and all((s == 0.25).all() for s in scales)
    assert torch.equal(encoder.blocks[0].mlp.fc1.weight, linear)


@pytest.mark.parametrize(
    "base", [CLIP, DINOV2, DINOV3, MOF], ids=["clip", "dinov2", "dinov3", "mixture"]
)
def test_a_field_of_a_wrong_kind_or_size_is_named(base):
    """Each field with each odd value: a usable encoder, or an error that names file and field."""
    good = base | {"layer_norm_eps": 1e-6, "initializer_range": 0.1, "hidden_act": "gelu"}
    good |= {"mlp_ratio": 2, "layerscale_value": 1.0, "num_register_tokens": None, "head_dim": None}
    good |= {
        "use_swiglu_ffn": False,
        "qkv_bias": True,
        "use_gated_mlp": False,
        "rope_theta": 100.0,
        "proj_bias": True,
        "mlp_bias": True,
        "query_bias": True,
        "key_bias": False,
        "value_bias": True,
        "num_channels": 3,
        "interpolate_offset": 0.1,
    }
    vision_config(good)

    for key in good:
        for value in ODD_VALUES:
            try:
                config = vision_config(good | {key: value}, {}, "config.json")
            except UserError as e:
                assert re.match(r"(config.json|preprocessor_config.json):", str(e)), str(e)
                continue
            assert config.width % config.heads == 0 and config.layers <= 512
            assert 0 < config.norm_eps <= 1 and config.tokens("cls_patch") <= 2**14


def test_an_image_processor_with_a_wrong_field_is_named():
    for good in (ImageProcessor(30).to_hf(), ImageProcessor(30, 20).to_hf()):
        for key in good:
            for value in ODD_VALUES:
                try:
                    made = ImageProcessor.from_hf(good | {key: value}, ImageProcessor(), "p.json")
                except UserError as e:
                    assert str(e).startswith("p.json:"), str(e)
                    continue
                pixels = made(Image.new("RGB", (40, 30)), "pad")
                assert pixels.isfinite().all() and pixels.shape[1] <= 4096


def test_more_tokens_than_anybody_sees_are_refused():
    huge = {"model_type": "siglip_vision_model", "image_size": 4096, "patch_size": 1}
    with pytest.raises(UserError, match="patch_size: 4096 pixels in patches of 1 are 16777216"):
        vision_config(huge)
    with pytest.raises(UserError, match="2 pixels are less than a patch of"):
        vision_config(DINOV2, {"size": {"shortest_edge": 2}, "crop_size": 2})
    with pytest.raises(UserError, match="patch_size: 16 is larger than the image_size 12"):
        vision_config(CLIP | {"patch_size": 16})


# ------------------------------------------------------------------------------------------ NaFlex

NAFLEX = [
    dict(hidden_size=33, num_attention_heads=3, num_hidden_layers=3, patch_size=5, num_patches=9)
    | dict(intermediate_size=50),
    dict(hidden_size=40, num_attention_heads=5, num_hidden_layers=2, patch_size=3, num_patches=49)
    | dict(intermediate_size=31, hidden_act="gelu", layer_norm_eps=1e-3),
]
GRIDS = [(3, 3), (1, 7), (5, 2), (7, 6), (1, 1), (3, 3)]


def naflex(config: dict, folder):
    """Save a random NaFlex of transformers; return it and pictures of GRIDS: patches, padded ones.

    -> the model, the patches (P, 3 p p) one picture behind the other, and the arguments that give
    transformers' model the same pictures.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = transformers.Siglip2VisionConfig(**config)
    model = transformers.Siglip2VisionModel(made).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)

    lengths = [rows * columns for rows, columns in GRIDS]
    patches = torch.randn(sum(lengths), 3 * config["patch_size"] ** 2)
    padded = torch.nn.utils.rnn.pad_sequence(patches.split(lengths), batch_first=True)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    given = {
        "pixel_values": padded,
        "pixel_attention_mask": mask.to(torch.int32),
        "spatial_shapes": torch.tensor(GRIDS),
    }
    return model, patches, given, mask


@pytest.mark.parametrize("config", NAFLEX, ids=lambda c: c["hidden_size"])
def test_pictures_of_any_grid_have_the_features_of_transformers(tmp_path, config):
    model, patches, given, mask = naflex(config, tmp_path)
    with torch.no_grad():
        states = model(**given, output_hidden_states=True).hidden_states
        for layer in (-1, -2, 0):
            encoder = load_encoder(tmp_path, feature_layer=layer, feature_select="cls_patch")
            got = encoder(patches, GRIDS)
            assert (got - states[layer][mask]).abs().max() <= 1e-4

        # Each alone is what it is among others.
        lengths = [rows * columns for rows, columns in GRIDS]
        encoder = load_encoder(tmp_path, feature_layer=-1, feature_select="cls_patch")
        packed = encoder(patches, GRIDS).split(lengths)
        for part, grid, among in zip(patches.split(lengths), GRIDS, packed, strict=True):
            assert (encoder(part, [grid]) - among).abs().max() <= 1e-5

        half = load_encoder(tmp_path, torch.bfloat16, feature_layer=-1, feature_select="cls_patch")
        want = states[-1][mask]
        got = half(patches, GRIDS)
        assert got.dtype == torch.bfloat16 and (got - want).norm() <= 2e-2 * want.norm()


@pytest.mark.parametrize("config", NAFLEX, ids=lambda c: c["hidden_size"])
@pytest.mark.parametrize("recompute", (False, True))
def test_every_gradient_of_any_grid_is_that_of_transformers(tmp_path, config, recompute):
    model, patches, given, mask = naflex(config, tmp_path)
    encoder = load_encoder(tmp_path, feature_layer=-1, feature_select="cls_patch")
    encoder.gradient_checkpointing = recompute
    weight = torch.randn(len(patches), config["hidden_size"])
    (encoder(patches, GRIDS) * weight).sum().backward()
    states = model(**given, output_hidden_states=True).hidden_states
    (states[-1][mask] * weight).sum().backward()
    theirs = {name.removeprefix("vision_model."): p.grad for name, p in model.named_parameters()}
    for name, p in encoder.named_parameters():
        want = theirs[name]
        assert (p.grad - want).norm() <= 1e-4 * want.norm() + 1e-4, name


@pytest.mark.parametrize("config", NAFLEX, ids=lambda c: c["hidden_size"])
def test_a_naflex_goes_out_as_it_came(tmp_path, config):
    naflex(config, tmp_path)
    source = weights.Checkpoint(tmp_path)
    encoder = load_encoder(tmp_path, feature_layer=1, feature_select="cls_patch")
    assert encoder.config.processor.patches == config["num_patches"]
    out = weights.tensors(encoder, encoder.rename)
    whole = {k if k in source else k.removeprefix("vision_model."): t for k, t in out.items()}
    assert set(whole) == set(source) and all(torch.equal(whole[k], source[k]) for k in source)
    with pytest.raises(UserError, match="feature_select"):
        load_encoder(tmp_path)
