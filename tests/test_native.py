"""Image mode native: a NaFlex sees pictures of any size, packed with videos and text."""

import dataclasses
import json
import shutil
import signal

import pytest
import torch
from PIL import Image

import evaluate
from checkpoints import layouts
from config import Stage, Train, Tune, UserError
from connectors import CONNECTORS
from data import Steps, token_counts
from export import export
from inputs.image_modes import MODES
from inputs.image_processor import NaFlexProcessor
from inputs.rows import open_rows
from inputs.sample import SampleSpec, item_shape, load_item
from inputs.templates import byte_tokenizer
from model import LLaVA
from packing import IMAGE_TOKEN, ONE_VIEW, Item, ItemShape, pack_samples
from tests.tools.environment import run, shared
from tests.tools.no_cache import generate_without_cache
from tests.tools.sample_rows import make_sample
from tests.tools.small_llava import NAFLEX, small
from tests.tools.stopped_runs import KILLED_AT, StoppedRun, die_in_step
from tests.tools.training_runs import NATIVE, losses
from training import estimate, memory
from training.check import describe_views, inspect_rows

PHOTOGRAPHS = (
    "photos/astronaut.png",
    "photos/chelsea.png",
    "photos/clock_motion.png",
    "photos/coffee.png",
    "photos/cow_in_beach.jpg",
    "quirks/wide_1800x80.jpg",
    "quirks/tall_40x853.png",
    "quirks/tall_1x300.png",
)
SIZES = ((30, 20), (9, 61), (40, 40), (30, 20), (200, 7))


def picture(width: int, height: int) -> Image.Image:
    """Return noise."""
    random = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    return Image.fromarray(random.numpy())


def native(**config) -> LLaVA:
    """Return a small random model with a NaFlex of 12 patches, and set the seed."""
    model = small(**NAFLEX, **config)
    torch.manual_seed(5)
    return model


@pytest.fixture
def rows(tmp_path):
    """Return rows of pictures of different sizes, one and several in a row, a video, and text."""
    torch.manual_seed(4)
    for i, size in enumerate(SIZES):
        picture(*size).save(tmp_path / f"{i}.png")
    frames = [picture(33, 14) for _ in range(3)]
    clip = {"save_all": True, "append_images": frames[1:], "duration": 100}
    frames[0].save(tmp_path / "clip.gif", **clip)

    def row(text: str, answer: str, **shown) -> dict:
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
        return {"conversations": turns, **shown}

    table = [
        row("<image>\nWho?", "A dog.", image="0.png"),
        row("Say no.", "No."),
        row("<image>\n<image>\n<image>\nWhich?", "The last.", image=["1.png", "2.png", "3.png"]),
        row("<image>\nWhat is done?", "It barks.", video="clip.gif"),
        row("<image>\nIs it wide?", "Yes, it is.", image="4.png"),
    ]
    (tmp_path / "rows.json").write_text(json.dumps(table))
    return open_rows(tmp_path / "rows.json", tmp_path)


def spec_of(model: LLaVA) -> SampleSpec:
    return SampleSpec(byte_tokenizer(), "plain", 5000, model.views)


# ------------------------------------------------------------------------------------------- items


@pytest.mark.parametrize("patch_size, patches", ((16, 256), (14, 1000), (7, 37)))
def test_items_are_the_published_processors(patch_size, patches):
    name = "transformers.models.siglip2.image_processing_pil_siglip2"
    published = pytest.importorskip(name).Siglip2ImageProcessorPil
    theirs = published(patch_size=patch_size, max_num_patches=patches)
    processor = NaFlexProcessor(patch_size=patch_size, patches=patches)
    tiling = MODES["native"](patches, processor=processor)
    for name in PHOTOGRAPHS:
        file = shared("assets/images") / name
        made = theirs(Image.open(file).convert("RGB"), return_tensors="pt")
        item = load_item(file, "image", tiling)
        assert made["spatial_shapes"].tolist() == [[item.shape.height, item.shape.width]], name
        tokens = int(made["pixel_attention_mask"].sum())
        assert len(item.pixels) == item.shape.length == tiling.positions(item.shape) == tokens
        assert torch.equal(processor.normalise(item.pixels), made["pixel_values"][0, :tokens])

        # Known from width and height alone, and no more than the largest.
        assert item_shape(file, "image", tiling) == item.shape
        assert tokens <= tiling.positions() == tiling.positions(*tiling.largest()) == patches


def test_a_video_has_the_size_of_its_first_frame(rows):
    model = native(frames=4)
    views = model.views
    file = rows.images / "clip.gif"
    item = load_item(file, "video", views)
    grid = views.processor.grid_of((33, 14))
    assert item.shape == item_shape(file, "video", views) == ItemShape(4, height=2, width=5)
    assert grid == (2, 5) and len(item.pixels) == item.shape.length == 40
    for rate, frames in ((10.0, 3), (0.1, 1)):
        some = dataclasses.replace(views, fps=rate)
        assert item_shape(file, "video", some) == ItemShape(frames, height=2, width=5)
        assert load_item(file, "video", some).shape.views == frames

    # Frames of a folder may differ.
    first = picture(20, 20)
    other = picture(50, 10)
    clip = views.clip([first, other])
    assert clip.shape == ItemShape(2, height=3, width=3)
    resized = other.resize((12, 12), views.processor.resample)
    assert torch.equal(views.seen(clip)[1], views.processor.tensor(resized))
    (features,) = model.encode_items([clip])
    assert features.shape == (18, 48)


@pytest.mark.parametrize("connector", ["mlp2x_gelu", "mean_mlp2x_gelu", "resampler", "qformer"])
def test_positions_are_the_tokens_that_come_whatever_the_connector(connector):
    check_positions(connector)


def test_a_spatial_connector_that_reads_any_grid_gets_that_of_each_picture():
    check_positions("cross_attention")


def check_positions(connector: str):
    sizes = {"num_queries": 5, "num_resampler_layers": 1, "num_hidden_layers": 1}
    sizes |= {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 30}
    options = {k: v for k, v in sizes.items() if k in CONNECTORS[connector].options}
    model = native(connector=connector, connector_options=options)
    items = [model.views.picture(picture(*size)) for size in SIZES]
    items.append(model.views.clip([picture(33, 14) for _ in range(3)]))
    together = model.encode_items(items)
    for item, features in zip(items, together, strict=True):
        assert features.shape == (model.views.positions(item.shape), 48)
        assert len(features) <= model.views.positions() * item.shape.views
        assert (model.encode_items([item])[0] - features).abs().max() < 1e-4

    # A few pictures at a time, as without gradients, change nothing.
    with torch.no_grad():
        many = model.encode_items(items * 4)
        for features, few in zip(together * 4, many, strict=True):
            assert (features - few).abs().max() < 1e-4


def test_what_does_not_go_together_is_one_line():
    for change, message in (
        ({"image_mode": "square"}, "model.image_mode: square, for a NaFlex.*; fix: use native"),
        ({"tower": "siglip"}, "model.image_mode: native, for an encoder of squares; fix: use squ"),
        ({"feature_select": "patch"}, "model.feature_select: 'patch' .*; fix: use cls_patch"),
        ({"connector": "pixel_shuffle"}, "pixel_shuffle reads one grid .*; fix: use mlp2x_gelu or"),
        ({"connector": "c_abstractor"}, "c_abstractor reads one grid .* cross_attention$"),
    ):
        with pytest.raises(UserError, match=message):
            small(**(NAFLEX | change))

    # A tensor of squares is no item of it.
    model = native()
    with pytest.raises(ValueError, match="a NaFlex sees items of views.picture"):
        model(torch.tensor([[1, IMAGE_TOKEN, 2]]), torch.zeros(1, 3, 12, 12))


def test_what_is_made_of_a_picture_is_bounded(monkeypatch):
    views = native().views
    monkeypatch.setattr("inputs.tiling.MOST_PIXELS", 12 * 16 - 1)
    for make in (views.picture, lambda image: views.clip([image])):
        with pytest.raises(ValueError, match="30 x 20 pixels, of which 'native' makes 192, more"):
            make(picture(30, 20))


# ----------------------------------------------------------------------------------------- batches


def gradients(model: LLaVA, batches: list) -> tuple[float, dict]:
    """Return the sum of the losses of batches, and the gradients of it."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model.loss(batch)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", (False, True))
def test_pictures_of_all_sizes_videos_and_text_in_one_row_are_what_each_is_alone(rows, recompute):
    model = native(frames=3, vocab=300)
    spec = spec_of(model)
    samples = [make_sample(rows, i, spec) for i in range(len(rows))]
    grids = {(item.shape.height, item.shape.width) for s in samples for item in s.items}
    assert len(grids) == 5

    model.vision_tower.gradient_checkpointing = recompute
    batch = pack_samples(samples)
    together = gradients(model, [batch])
    alone = gradients(model, [pack_samples([sample]) for sample in samples])
    parts = [batch.part(slice(0, 3), slice(0, 4)), batch.part(slice(3, 5), slice(4, 6))]
    for loss, grads in (alone, gradients(model, parts)):
        assert together[0] == pytest.approx(loss, rel=1e-5)
        for name, grad in together[1].items():
            assert grad.abs().max() > 0, name
            assert (grad - grads[name]).abs().max() <= 1e-5 * max(1, grads[name].abs().max()), name


def test_compiled_blocks_compute_the_same(rows):
    model = native(frames=3, vocab=300)
    spec = spec_of(model)
    batches = [pack_samples([make_sample(rows, i, spec) for i in some]) for some in ([0, 2], [3])]
    want, grads = gradients(model, batches)
    torch._dynamo.reset()
    model.compile_blocks(backend="eager")
    got, compiled = gradients(model, batches)
    assert got == pytest.approx(want, rel=1e-5)
    for name, grad in grads.items():
        assert (grad - compiled[name]).abs().max() <= 1e-5 * max(1, grad.abs().max()), name


def test_parts_of_a_step_have_the_patches_of_their_rows(rows):
    model = native(frames=3)
    spec = spec_of(model)
    stage = Stage(global_batch=5, micro_batch_tokens=0)
    step = Steps(rows, spec, stage, Train())[0]
    assert sorted(b.rows[0] for b in step.batches) == [0, 1, 2, 3, 4]
    for batch in step.batches:
        sample = make_sample(rows, batch.rows[0], spec)
        alone = pack_samples([sample])
        assert batch.shapes == alone.shapes
        assert batch.images is alone.images is None or torch.equal(batch.images, alone.images)
        for item, one in zip(batch.items, sample.items, strict=True):
            assert torch.equal(item.pixels, one.pixels)

    # From the headers of the pictures.
    counts = token_counts(rows, spec)
    assert [c[0] for c in counts] == [len(make_sample(rows, i, spec).ids) for i in range(5)]
    assert counts[:, 1].tolist() == [1, 0, 3, 3, 1]


def test_the_whole_model_is_that_of_transformers(tmp_path):
    """Logits of prompts with pictures of all sizes, by transformers' encoder and Llama."""
    transformers = pytest.importorskip("transformers")
    model = native()
    items = [model.views.picture(picture(*size)) for size in SIZES]
    prompts = [torch.tensor([3, *[5, IMAGE_TOKEN] * 3, 8]), torch.tensor([IMAGE_TOKEN, 2] * 2)]
    width = max(map(len, prompts))
    padded = torch.stack([torch.nn.functional.pad(p, (0, width - len(p))) for p in prompts])
    mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts])
    logits = model(padded, items, mask).logits

    # Their encoder takes padded patches.
    vision = transformers.Siglip2VisionConfig(**model.vision_tower.config.hf)
    encoder = transformers.Siglip2VisionModel(vision).eval()
    ours = {f"vision_model.{k}": t for k, t in model.vision_tower.state_dict().items()}
    known = encoder.state_dict().keys()
    ours = {k if k in known else k.removeprefix("vision_model."): t for k, t in ours.items()}
    wrong = encoder.load_state_dict(ours, strict=False)
    assert not wrong.unexpected_keys
    assert all("head" in k or "post_layernorm" in k for k in wrong.missing_keys)
    patches = [model.vision_tower.processor.normalise(item.pixels) for item in items]
    made = encoder(
        pixel_values=torch.nn.utils.rnn.pad_sequence(patches, batch_first=True),
        pixel_attention_mask=torch.tensor([[1] * len(p) + [0] * (12 - len(p)) for p in patches]),
        spatial_shapes=torch.tensor([(item.shape.height, item.shape.width) for item in items]),
        output_hidden_states=True,
    )
    states = made.hidden_states[-1]
    features = [model.connector(s[: len(p)]) for s, p in zip(states, patches, strict=True)]

    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.text)).eval()
    lm.load_state_dict(model.language_model.state_dict())
    rest = iter(features)
    for prompt, got in zip(prompts, logits, strict=True):
        parts = []
        for token in prompt.tolist():
            if token == IMAGE_TOKEN:
                parts.append(next(rest))
            else:
                parts.append(lm.model.embed_tokens(torch.tensor([token])))
        want = lm(inputs_embeds=torch.cat(parts)[None]).logits[0]
        assert (got[: len(want)] - want).abs().max() <= 1e-4


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 0.9, "top_p": 0.8}])
def test_the_cache_changes_nothing(options):
    model = native()
    items = [model.views.picture(picture(*size)) for size in SIZES[:4]]
    items.append(model.views.clip([picture(33, 14) for _ in range(3)]))
    shown = [items[0], items[0], items[1], items[2], items[4]]
    prompts = [[5, IMAGE_TOKEN, 7], [5, IMAGE_TOKEN, 9, 4], [IMAGE_TOKEN, 6, IMAGE_TOKEN], [3, 4]]
    prompts = [torch.tensor(p) for p in [*prompts, [8, IMAGE_TOKEN]]]

    def seeded():
        if "top_p" in options:
            return {"generator": torch.Generator().manual_seed(3)}
        return {}

    options = {"max_new_tokens": 7, **options}
    got = model.generate(prompts, shown, **options, **seeded())
    want = generate_without_cache(model, prompts, shown, **options, **seeded())
    assert got.tolist() == want.tolist()


# --------------------------------------------------------------------------- what else asks for it


def test_estimates_are_of_patches(rows):
    model = native(frames=3, vocab=300)
    spec = spec_of(model)
    row = estimate.mean_row(rows, "plain", model.views, spec)
    assert row.is_exact and row.views == 8 / 5
    lengths = [len(make_sample(rows, i, spec).ids) for i in range(5)]
    assert row.tokens == pytest.approx(sum(lengths) / 5)

    # Without rows, of pictures alone, of text alone, of videos: the batch is one that trains.
    video = model.views.clip_shape(3, (640, 480))
    for size in (
        row,
        estimate.mean_row(None, "plain", model.views),
        dataclasses.replace(row, shape=model.views.largest()[0], items=0.0),
        dataclasses.replace(row, shape=video, items=1.0),
    ):
        batch = memory.typical_batch(model, size, 3)
        assert batch.images is None or torch.isfinite(model.loss(batch))
        stage = Stage(tune=Tune(llm="full", vision="full"), global_batch=3)
        assert memory.measure(model, stage, size, bf16=False).activations > 0
        assert estimate.operations(model, stage, size, recompute=False) > 0
    (text,) = estimate.measure_row(rows, 1, spec)
    assert text.views == 0 and text.shape == model.views.largest()[0]
    guessed = estimate.guess_row(rows[3], "plain", model.views)
    assert guessed.shape == video and guessed.views == 3


def test_rows_are_shown_as_the_encoder_gets_them(rows, capsys):
    spec = spec_of(native(frames=3))
    page = inspect_rows(rows, spec, list(range(5)))
    assert page.count("<img") == 1 + 3 + 3 + 1
    said = capsys.readouterr().out
    assert "views: 1 of 12 x 16" in said and "views: 3 of 8 x 20" in said
    sample = make_sample(rows, 2, spec, pixels=False)
    assert describe_views(sample, spec.views, pixels=False) == "1, 1, 1"


def test_controls_show_a_mean_patch_and_the_middle_frame(rows, monkeypatch):
    model = native(frames=3)
    clip = load_item(rows.images / "clip.gif", "video", model.views)
    shown = evaluate.middle_frame(clip)
    assert shown.shape == clip.shape
    frames = shown.pixels.view(3, 10, -1)
    assert torch.equal(frames, clip.pixels.view(3, 10, -1)[1].expand_as(frames))

    items = [model.views.picture(picture(*size)) for size in SIZES[:2]]
    monkeypatch.setattr(evaluate, "items_of_example", lambda example, *rest: [items[example["id"]]])
    monkeypatch.setattr(evaluate, "shown_names", lambda example: ["a picture"])
    blank = evaluate.blank_with_mean([{"id": 0}, {"id": 1}], None, model)
    shown = blank(items[0])
    patches = [model.vision_tower.processor.normalise(item.pixels).mean(0) for item in items]
    assert shown.shape == items[0].shape and shown.pixels.shape == items[0].pixels.shape
    assert (shown.pixels - torch.stack(patches).mean(0)).abs().max() < 1e-6
    assert evaluate.most_tokens(model.views, "image") == 12
    assert evaluate.most_tokens(model.views, "video") == 36


def test_it_goes_out_in_our_own_layout_alone(tmp_path):
    model = native()
    item = model.views.picture(picture(30, 20))
    want = model.encode_items([item])[0]
    export(model, None, "barellava", tmp_path / "out")
    again = LLaVA.from_pretrained(tmp_path / "out").eval()
    assert again.config.image_mode == "native" and again.views == model.views
    assert torch.equal(again.encode_items([item])[0], want)
    again.save(tmp_path / "again")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert "at most 12 tokens for an image" in (tmp_path / "out/README.md").read_text()

    others = [layout.export_name for layout in layouts.LAYOUTS.values() if layout.write]
    for name in set(others) - {"barellava"}:
        with pytest.raises(UserError, match="siglip2_vision|pixel_shuffle|mode native"):
            export(model, None, name, tmp_path / name)
        assert not (tmp_path / name).exists()


def varied(world, folder):
    """Copy the demo's rows with pictures of many sizes, and some as videos."""
    (folder / "images").mkdir(parents=True)
    (folder / "tokenizer").symlink_to(world / "tokenizer")
    for name in ("pretrain.json", "finetune.json", "val.json"):
        table = json.loads((world / name).read_text())[:60]
        for i, row in enumerate(table):
            if "image" not in row:
                continue
            image = Image.open(world / "images" / row["image"])
            image = image.resize((20 + 7 * (i % 9), 20 + 5 * (i % 7)))
            row["image"] = f"{name}-{i}.png"
            image.save(folder / "images" / row["image"])
            if i % 4 == 0:
                row["video"] = f"{row.pop('image')}.gif"
                frames = [image.rotate(90), image.rotate(180)]
                image.save(folder / "images" / row["video"], save_all=True, append_images=frames)
        (folder / name).write_text(json.dumps(table))


def test_a_run_that_was_killed_ends_with_the_same_bytes(tiny_world, tmp_path):
    run_ = StoppedRun(tmp_path / "run")
    varied(tiny_world, run_.world)
    change = (*NATIVE, "model.connector=mlp2x_gelu", "model.frames=3")
    code, said = run_.start(*change)
    assert code == 0 and "at most 9 tokens per image" in said, said
    want = run_.weights()
    want_losses = losses(run_.out)
    assert len(want_losses) == 6 and want_losses[-1] < want_losses[0]

    shutil.rmtree(run_.out)
    code, said = run_.start(*change, before=lambda rank: die_in_step(KILLED_AT))
    assert code == -signal.SIGKILL, said
    code, said = run_.start(*change)
    assert code == 0 and "resumed" in said
    assert run_.weights() == want and losses(run_.out) == want_losses

    # A micro-batch for each row.
    shutil.rmtree(run_.out)
    code, said = run_.start(*change, "stage.finetune.micro_batch_tokens=0")
    assert code == 0 and losses(run_.out) == pytest.approx(want_losses, rel=1e-5), said

    # What a plan says of it, and what the model says of a picture.
    plan = run("train.py", run_.recipe, *change, "--dry-run").stdout
    assert "at most 9 tokens per image" in plan
    image = run_.world / "images/val.json-1.png"
    command = ["--model", run_.out, "--image", image, "--prompt", "What?"]
    assert "tokens/s" in run("generate.py", *command, "--max-new-tokens", 3).stdout
    refused = run("visualize.py", *command, tmp_path / "page", ok=False).stderr.splitlines()[-1]
    assert refused.startswith("error: --model: its pictures keep their proportions")


def test_one_view_of_nothing_known_is_the_largest():
    views = native().views
    assert views.grid_of(ONE_VIEW) == (3, 4) and views.tokens_text == "at most 12"
    for patches, grid in ((14, (2, 7)), (13, (1, 13)), (256, (16, 16))):
        assert MODES["native"](patches).grid_of(ONE_VIEW) == grid
    item = Item(torch.zeros(12, 48, dtype=torch.uint8), ItemShape(height=3, width=4))
    assert views.pixels_size(item.shape) == tuple(item.pixels.shape)
    assert [x.shape for x in views.seen(item)] == [(3, 12, 16)]
