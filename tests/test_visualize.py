"""visualize.py: its numbers are the model's own, and in the demo its maps lie on the object."""

import random
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import visualize
from config import Model
from demo import questions, scenes
from demo import world as demo_world
from inputs.templates import encode_prompt
from inputs.tiling_split import mark_names
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from packing import IMAGE_TOKEN, Item, ItemShape
from tests.tools import decoding_models
from tests.tools.environment import ROOT, run
from tests.tools.small_llava import small

TEXT = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 16,
    "image_size": 48,
}
MADE = [270, 300, 17]
PLAIN = SimpleNamespace(scale=None, window=None)  # of an attention layer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("visualize")
    demo_world.write(out / "world", scenes=60)
    LLaVA.from_parts(Model(llm_config=TEXT, vision_config=VISION), "plain").save(out)
    load_tokenizer(out / "world" / "tokenizer").save(out)
    Image.effect_noise((60, 40), 90).convert("RGB").save(out / "noise.png")
    return out


def read(folder, question="How many?"):
    model, tokenizer = LLaVA.from_pretrained(folder), load_tokenizer(folder)
    picture = model.vision_tower.processor.pixels(Image.open(folder / "noise.png"))
    prompt = encode_prompt([{"from": "human", "value": f"<image>\n{question}"}], tokenizer, "plain")
    return model, tokenizer, picture, prompt


def test_probabilities_are_those_of_the_model(folder):
    model, _, picture, prompt = read(folder)
    answer = visualize.inspect_answer(model, prompt, MADE, picture)
    pixels = model.vision_tower.processor.normalise(picture[None])
    logits = model(torch.tensor([prompt + MADE]), pixels).logits[0, -4:-1]
    torch.testing.assert_close(answer.probabilities, logits.softmax(-1), rtol=1e-4, atol=1e-6)
    assert answer.ids[answer.first :].tolist() == MADE


@pytest.mark.parametrize(
    "family, change", [("gemma3_text", {"query_pre_attn_scalar": 7}), ("phi3", {})]
)
def test_probabilities_are_those_of_models_with_windows_scales_and_long_ropes(family, change):
    model = decoding_models.build(family, **change)
    prompt, answer = [5, IMAGE_TOKEN, 9, 11, 8, 31], [40, 3, 17]
    picture = torch.randint(0, 255, (3, 16, 16)).byte()
    seen = visualize.inspect_answer(model, prompt, answer, picture)
    pixels = model.vision_tower.processor.normalise(picture[None])
    logits = model(torch.tensor([prompt + answer]), pixels).logits[0, -4:-1]
    torch.testing.assert_close(seen.probabilities, logits.softmax(-1), rtol=1e-4, atol=1e-6)


def test_attention_is_causal_and_moves_the_answer(folder):
    """Its probabilities sum to 1, none is on the future, and the output is that of torch."""
    model, _, picture, prompt = read(folder)
    answer = visualize.inspect_answer(model, prompt, MADE, picture)
    assert answer.attention.shape == (2, 3, len(answer.ids))
    torch.testing.assert_close(answer.attention.sum(-1), torch.ones(2, 3))
    for w in range(3):
        assert (answer.attention[:, w, answer.first + w :] == 0).all()
        assert (answer.attention[:, w, : answer.first + w] > 0).all()
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    seen = []
    out = visualize.recording_attention(slice(3, 5), seen)(PLAIN, q, k, v)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, exact[0].transpose(0, 1))
    assert seen[0].shape == (2, 5)


def test_maps_have_a_cell_for_each_patch(folder):
    model, _, picture, prompt = read(folder)
    answer = visualize.inspect_answer(model, prompt, MADE, picture)
    image = answer.attention.mean(0)[:, answer.ids == IMAGE_TOKEN]
    drawn = answer.attention_map()
    assert image.shape == (3, 8)  # SigLIP under feature_select "patch" loses its first
    assert drawn.shape == answer.similarity.shape == (3, 3, 3) and (drawn[:, 0, 0] == 0).all()
    assert torch.equal(drawn.flatten(1)[:, 1:], image)
    assert torch.equal(
        answer.attention_map(1).flatten(1)[:, 1:], answer.attention[1][:, answer.ids == IMAGE_TOKEN]
    )
    assert answer.similarity.abs().max() <= 1
    with_class = visualize.on_grid(torch.arange(10.0)[None], 3)
    assert with_class.flatten().tolist() == list(range(1, 10))


MARKS = {name: [7, 8] for name in mark_names(24, 12)}
MODES = {
    "anyres_max": {"image_grids": "1x2 2x1"},
    "split": {"image_edge": 24, "image_marks": MARKS},
    "tiles": {"image_grids": "1x2 2x1"},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_tiled_model_is_shown_the_whole_picture_and_maps_leave_marks_out(mode):
    model = small("llama", "siglip", feature_select="cls_patch", image_mode=mode, **MODES[mode])
    prompt, answer = [5, IMAGE_TOKEN, 9], [40, 3, 17]
    picture = torch.randint(0, 255, (3, 12, 12)).byte()
    seen = visualize.inspect_answer(model, prompt, answer, picture)

    # In anyres_max, an item without a grid would be a video.
    shape = ItemShape(1, 1, 1) if mode == "anyres_max" else ItemShape()
    item = Item(model.vision_tower.processor.normalise(picture[None]), shape)
    logits = model(torch.tensor([prompt + answer]), [item]).logits[0, -4:-1]
    torch.testing.assert_close(seen.probabilities, logits.softmax(-1), rtol=1e-4, atol=1e-6)
    assert torch.equal(model(torch.tensor([prompt + answer]), item.pixels).logits[0, -4:-1], logits)
    uncovered = visualize.log_probabilities(model, prompt, answer, picture[None])
    torch.testing.assert_close(uncovered[0], logits.log_softmax(-1)[range(3), answer])

    first = {"anyres_max": 1, "split": 5, "tiles": 1}[mode]
    behind = {"anyres_max": 1, "split": 2, "tiles": 0}[mode]
    assert len(seen.ids) == first + 9 + behind + 1 + 3
    patches = seen.attention[:, :, first : first + 9].mean(0)
    assert torch.equal(seen.attention_map().flatten(1), patches)
    assert seen.similarity.shape == (3, 3, 3)


def test_occlusion_is_the_fall_of_the_log_probability(folder):
    model, _, picture, prompt = read(folder)
    heat = visualize.occlusion(model, prompt, MADE, picture)
    assert heat.shape == (3, 8, 8) and heat.max() > 0
    normalise, ids = model.vision_tower.processor.normalise, torch.tensor([prompt + MADE])

    def log_probabilities(pixels):
        return (
            model(ids, normalise(pixels[None]))
            .logits[0, -4:-1]
            .log_softmax(-1)
            .gather(-1, ids[0, -3:, None])[:, 0]
        )

    for cell, rows, columns in (
        ((0, 0), slice(0, 12), slice(0, 12)),
        ((7, 0), slice(36, 48), slice(0, 12)),
    ):
        corner = picture.clone()  # a corner's cell is covered by one window alone
        corner[:, rows, columns] = picture.flatten(1).median(1).values[:, None, None]
        fall = (log_probabilities(picture) - log_probabilities(corner)).clamp(min=0)
        assert fall.max() > 1e-3
        torch.testing.assert_close(heat[:, *cell], fall, rtol=0, atol=1e-5)
    assert visualize.occlusion(model, prompt, MADE, torch.full_like(picture, 90)).abs().max() < 1e-5


def test_a_resampler_has_no_patches_to_draw_on(tmp_path):
    made = Model(
        llm_config=TEXT,
        vision_config=VISION,
        connector="resampler",
        connector_options={"num_queries": 4},
    )
    model = LLaVA.from_parts(made, "plain")
    answer = visualize.inspect_answer(
        model, [5, IMAGE_TOKEN, 9], MADE, torch.randint(0, 255, (3, 48, 48)).byte()
    )
    assert (
        answer.similarity is None
        and answer.attention_map() is None
        and answer.occlusion.shape == (3, 8, 8)
    )


def test_heat_is_red_where_it_is_largest():
    values = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    drawn = visualize.draw_heat(torch.full((3, 48, 48), 255, dtype=torch.uint8), values)
    cells = [drawn.getpixel((x, y)) for y in (60, 180) for x in (60, 180)]
    assert drawn.size == (240, 240) and cells[0] == cells[3] == (255, 255, 255)
    assert cells[1][1] < cells[2][1] < 255 and cells[1][0] > 225


def test_the_command_writes_a_page_and_pictures(folder, tmp_path):
    question = "What is <b>it</b>?"
    command = [
        "visualize.py",
        "--model",
        folder,
        "--image",
        folder / "noise.png",
        "--prompt",
        question,
    ]
    said = run(*command, "--max-new-tokens", 3, "--top-k", 5, tmp_path / "out").stdout
    text = (tmp_path / "out" / "index.html").read_text()
    assert (
        "index.html" in said
        and "<b>it</b>" not in text
        and "What is &lt;b&gt;it&lt;/b&gt;?" in text
    )
    assert len(re.findall("<h2>", text)) == 3 and len(re.findall("<tr>", text)) == 3 * 5
    assert len(re.findall("<img", text)) == 1 + 3 * 3 and 'src="http' not in text
    assert sorted(f.name for f in (tmp_path / "out").glob("*.png")) == [
        f"token-{i}.png" for i in (1, 2, 3)
    ]
    assert Image.open(tmp_path / "out" / "token-1.png").size == (736, 240)
    wrong = run(*command, "--layer", 2, tmp_path / "no", ok=False).stderr.strip()
    assert (
        wrong == "error: --layer: 2: the model has 2 layers; fix: give 0 to 1"
        and not (tmp_path / "no").exists()
    )


def measure(folder, count):
    """Return {measure: % of the scenes}: is the occlusion map of an answer's word on its object?

    Scenes are of the benchmark's compositions, which no training has seen, with 2 or 3 objects.
    """
    model = LLaVA.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    rng = random.Random(7)
    found = []
    while len(found) < count:
        scene = scenes.draw_scene(rng, "benchmark", rng.choice((2, 3)))
        asked = [q for q in questions.questions(scene) if q.kind in ("colour", "shape")]
        image = scenes.render(scene, scenes.draw_background(rng))
        if not asked:
            continue

        # The heat map of the word that is the answer.
        question = rng.choice(asked)
        turn = {"from": "human", "value": f"<image>\n{question.text}"}
        prompt = encode_prompt([turn], tokenizer, model.config.template)
        made = tokenizer.encode(f" {question.answer}")[0]
        pixels = model.vision_tower.processor.pixels(image)
        seen = visualize.inspect_answer(model, prompt, made, pixels)
        side = scenes.IMAGE_SIZE
        heat = torch.nn.functional.interpolate(seen.occlusion[None, :1], side)[0, 0]

        # Where it is largest, and how much of it lies in the object's box.
        (number,) = question.about
        left, top, right, bottom = map(round, scene[number]["box"])
        y, x = divmod(int(heat.argmax()), side)
        in_box = heat[top:bottom, left:right].sum()
        of_scene = {
            "right": seen.probabilities[0].argmax().item() == made[0],
            "occlusion peaks in the box": top <= y < bottom and left <= x < right,
            "occlusion's mass in the box": (in_box / heat.sum().clamp(min=1e-9)).item(),
            "the box's share of the picture": (bottom - top) * (right - left) / side**2,
        }
        found.append(of_scene)
    return {name: 100 * sum(row[name] for row in found) / count for name in found[0]}


@pytest.mark.full
def test_on_the_demo_the_heat_map_of_a_colour_or_shape_lies_on_its_object(tmp_path):
    demo = ROOT / "out" / "demo"
    if not (demo / "model.safetensors").exists():
        demo = tmp_path / "demo"
        run("train.py", f"train.output={demo}")
    numbers = measure(demo, 100)
    print(numbers)
    assert numbers["occlusion peaks in the box"] > 5 * numbers["the box's share of the picture"]
    assert numbers["occlusion's mass in the box"] > 3 * numbers["the box's share of the picture"]


def test_a_folder_of_somebody_else_stays_and_a_cut_answer_says_so(folder, tmp_path):
    command = ["visualize.py", "--model", folder, "--image", folder / "noise.png", "--prompt", "x"]
    page = tmp_path / "theirs" / "index.html"
    page.parent.mkdir()
    page.write_text("precious")
    refused = run(*command, page.parent, ok=False).stderr
    assert "holds index.html, which this program did not write" in refused
    assert page.read_text() == "precious" and len(list(page.parent.iterdir())) == 1

    run(*command, "--max-new-tokens", 1, tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    assert "cut after token 1" in text and text.count("<li>") == 4
