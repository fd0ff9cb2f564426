"""nanoVLM: pixels, ids, logits, gradients and files are those of its own code."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import nanovlm
from checkpoints.files import read_json
from checkpoints.layouts import read_config
from config import UserError
from export import export
from inputs import nanovlm_tokenizer, templates
from inputs.pictures import load_image
from inputs.rows import open_rows
from inputs.sample import SampleSpec
from inputs.tokenizer import load_tokenizer
from model import LLaVA, tiling_of
from packing import IGNORE, IMAGE_TOKEN
from tests.tools import nanovlm as reference
from tests.tools.environment import ROOT, run, shared
from tests.tools.refused_exports import check_refusals
from tests.tools.sample_rows import make_sample, turns
from tests.tools.transformers_versions import run_script

PHOTOS = ("astronaut.png", "australia.jpg", "camera.png", "chelsea.png")
PHOTOS += ("coffee.png", "cow_in_beach.jpg", "horse.png", "rocket.jpg")
SIZES = ((3, 5), (1, 1), (450, 1), (1, 333), (217, 216), (46, 46), (2000, 1500))


@pytest.fixture
def golden(tmp_path):
    """A copy of the stored folder: nanoVLM's code has written it, and the answers in it."""
    return shutil.copytree(shared("golden/nanovlm"), tmp_path / "golden")


@pytest.fixture(scope="module", params=sorted(reference.CONFIGS))
def fetched(request, tmp_path_factory):
    """A folder that nanoVLM's code writes now, with its answers about photographs."""
    if not (reference.REFERENCE / "models" / "vision_language_model.py").is_file():
        pytest.skip(f"nanoVLM's code is not in {reference.REFERENCE}; NANOVLM names its folder")
    if not reference.OLDER.is_dir():
        pytest.skip("transformers 4.57 is not in .venv/hf4; `make test` puts it there")
    folder = tmp_path_factory.mktemp(request.param)
    reference.write_tokenizer(folder / "llm")
    config = folder / "wanted.json"
    config.write_text(json.dumps(reference.config_of(request.param, folder / "llm")))
    run_script("nanovlm.py", "4", "make", config, folder)

    names = []
    for name in PHOTOS:
        image = load_image(shared("assets/images/photos") / name)
        image.thumbnail((300, 300))  # the larger, the longer nanoVLM takes
        image.save(folder / f"{name}.png")
        names.append(f"{name}.png")
    for seed, size in enumerate(SIZES):
        reference.drawn(size, seed).save(folder / f"{seed}.png")
        names.append(f"{seed}.png")
    talks = [([name], f"What is in {name}?", "A horse.") for name in names]
    talks += [(names[2:5], "Which?", "The first \n\n one."), ([], "And now?", "Nothing.")]
    asked = reference.cases(talks, "all", 0)
    (folder / "cases.json").write_text(json.dumps(asked))
    run_script("nanovlm.py", "4", "answer", folder)
    return folder


def with_marks(ids, views, items) -> list[int]:
    """Return ids with the text of each item in place, -200 where a feature goes."""
    left = iter(items)
    row = []
    for i in ids:
        if i == IMAGE_TOKEN:
            row += views.placeholder(next(left).shape)
        else:
            row.append(int(i))
    return row


def gradients_by_name(model: LLaVA) -> dict[str, torch.Tensor]:
    """Return the gradients under nanoVLM's names."""
    for p in model.parameters():
        p.data = p.grad
    found = nanovlm.contents(model)
    if model.language_model.config.tied:
        found[nanovlm.EMBEDDING] = found.pop(nanovlm.HEAD)
    return found


def check_answers(folder):
    """Compare what we compute of a folder with its answers.safetensors."""
    told = load_file(folder / "answers.safetensors")
    tok = load_tokenizer(folder)
    image_token = int(told["image_token"])
    assert tok.token_id("<|image|>") == image_token
    shapes = set()
    for i, case in enumerate(read_json_list(folder / "cases.json")):
        model = LLaVA.from_pretrained(folder)
        images = [load_image(folder / name) for name in case["images"]]
        items = [model.views.picture(image) for image in images]
        for k, (image, item) in enumerate(zip(images, items, strict=True)):
            assert torch.equal(item.pixels, told[f"{i}.pixels.{k}"]), case["images"]
            assert item.shape == model.views.shape(image.size)
            assert len(item.pixels) == item.shape.views
            shapes.add(item.shape)

        # The finished conversation. nanoVLM also learns the line break behind <|im_end|>.
        question = "<image>\n" * len(images) + case["user"]
        ids, labels = templates.encode(turns(question, case["assistant"]), tok, "chat")
        row = with_marks(ids, model.views, items)
        assert row == [IMAGE_TOKEN if t == image_token else t for t in told[f"{i}.ids"].tolist()]
        end = max(k for k, label in enumerate(labels) if label != IGNORE)
        assert tok.token(labels[end]) == "<|im_end|>"
        labels[end + 1] = ids[end + 1]
        wanted = told[f"{i}.targets"].tolist()[-len(ids) :]
        assert [IGNORE, *wanted][1 - len(labels) :][:-1] == labels[2:], case

        output = model(torch.tensor([ids]), items, labels=torch.tensor([labels]))
        assert output.loss.item() == pytest.approx(told[f"{i}.loss"].item(), rel=1e-5)
        if case["gradients"]:
            output.loss.backward()
            mine = gradients_by_name(model)
            prefix = f"{i}.gradient."
            names = [key.removeprefix(prefix) for key in told if key.startswith(prefix)]
            assert names
            for name in names:
                want = told[prefix + name]
                assert (mine[name] - want).abs().max() <= 1e-4 * want.abs().max() + 1e-7, name
            model = LLaVA.from_pretrained(folder)

        # The prompt.
        ids = templates.encode_prompt([{"from": "human", "value": question}], tok, "chat")
        row = with_marks(ids, model.views, items)
        assert row == [IMAGE_TOKEN if t == image_token else t for t in told[f"{i}.prompt"].tolist()]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), items).logits[0]
        want = told[f"{i}.logits"]
        assert (logits[-len(want) :] - want).abs().max().item() <= 1e-4
        assert want.std().item() > 0.1  # otherwise 1e-4 would say little
        new = model.generate([torch.tensor(ids)], items, max_new_tokens=8)[0].tolist()
        tokens = told[f"{i}.tokens"].tolist()
        stop = tok.eos_id
        if stop in tokens:
            tokens = tokens[: tokens.index(stop) + 1]
        assert new[: len(tokens)] == tokens
    assert len(shapes) >= 3
    largest = max(model.views.positions(shape) for shape in model.views.largest())
    assert max(model.views.positions(shape) for shape in shapes) <= largest


def read_json_list(path) -> list:
    return json.loads(path.read_text())


def test_the_stored_answers_of_nanovlm(golden):
    check_answers(golden)


def test_the_answers_of_nanovlm_itself(fetched):
    """The photographs and odd sizes, each with every gradient."""
    check_answers(fetched)


def check_equal_folders(folder, out):
    before = load_file(folder / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    wanted = nanovlm.DEFAULTS | read_json(folder / "config.json")
    assert wanted == read_json(out / "config.json")
    tokens = read_json(out / "config.json")["vlm_extra_tokens"]
    assert list(tokens.items()) == list(wanted["vlm_extra_tokens"].items())


def test_the_folder_goes_back_bit_for_bit(golden, tmp_path):
    out = tmp_path / "out"
    export(LLaVA.from_pretrained(golden), load_tokenizer(golden), "nanovlm", out)
    check_equal_folders(golden, out)

    # The tokenizer that went along is the same when it is read again.
    again = LLaVA.from_pretrained(out)
    assert again.views == LLaVA.from_pretrained(golden).views
    assert (
        load_tokenizer(out).files["tokenizer.json"]
        == load_tokenizer(golden).files["tokenizer.json"]
    )


def test_nanovlm_opens_what_goes_back(fetched, tmp_path):
    out = tmp_path / "out"
    export(LLaVA.from_pretrained(fetched), load_tokenizer(fetched), "nanovlm", out)
    check_equal_folders(fetched, out)
    for file in [*fetched.glob("*.png"), fetched / "cases.json"]:
        (out / file.name).write_bytes(file.read_bytes())
    run_script("nanovlm.py", "4", "answer", out)
    before = load_file(fetched / "answers.safetensors")
    after = load_file(out / "answers.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_our_own_layout_keeps_the_marks(golden, tmp_path):
    model = LLaVA.from_pretrained(golden)
    tok = load_tokenizer(golden)
    export(model, tok, "barellava", tmp_path / "own")
    own = LLaVA.from_pretrained(tmp_path / "own")
    assert own.views == model.views
    item = model.views.picture(load_image(golden / "0.png"))
    ids = torch.tensor([[5, IMAGE_TOKEN, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids, [item]).logits, own(ids, [item]).logits)

    # And from there back to nanoVLM.
    export(own, load_tokenizer(tmp_path / "own"), "nanovlm", tmp_path / "back")
    check_equal_folders(golden, tmp_path / "back")


def test_the_tokenizer_is_the_one_that_config_json_names(golden, tmp_path):
    """Beside the weights, in a folder, or nowhere: then the message says what to put there."""
    own = load_tokenizer(golden)
    llm = tmp_path / "llm"
    llm.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (golden / name).rename(llm / name)
    config = read_json(golden / "config.json")
    (golden / "config.json").write_text(json.dumps(config | {"lm_tokenizer": str(llm)}))
    named = load_tokenizer(golden)
    assert named.files["tokenizer.json"] == own.files["tokenizer.json"]
    assert named.chat_template == own.chat_template
    recipe = ROOT / "recipes" / "smolvlm-256m-finetune.toml"
    words = (f"model.checkpoint={golden}", f"stage.own.data={tmp_path}", "train.workers=0")
    plan = run("train.py", recipe, *words, "--dry-run").stdout
    assert "named in its config.json" in plan and "10 tokens per image of one view" in plan

    (golden / "config.json").write_text(json.dumps(config | {"lm_tokenizer": "./nowhere"}))
    wanted = "nowhere.*; fix: put tokenizer.json and tokenizer_config.json of its language model"
    for read in (load_tokenizer, read_config):
        with pytest.raises(UserError, match=wanted):
            read(golden)
    assert "MISSING" in run("train.py", recipe, *words, "--dry-run", ok=False).stdout


def test_the_defaults_are_those_of_nanovlm():
    """A config.json without a field has nanoVLM's default, not one of ours."""
    if not (reference.REFERENCE / "models" / "config.py").is_file():
        pytest.skip(f"nanoVLM's code is not in {reference.REFERENCE}; NANOVLM names its folder")
    names = {"__name__": "config"}
    exec((reference.REFERENCE / "models" / "config.py").read_text(), names)
    defaults = vars(names["VLMConfig"]())
    assert defaults == nanovlm.DEFAULTS
    assert list(defaults["vlm_extra_tokens"]) == list(nanovlm_tokenizer.TOKENS)


CHANGES = [
    ("vit_cls_flag", True, "vit_cls_flag"),
    ("vit_dropout", 0.1, "vit_dropout"),
    ("lm_dropout", 0.1, "lm_dropout"),
    ("lm_attn_scaling", 2.0, "lm_attn_scaling"),
    ("lm_use_tokens", True, "lm_use_tokens"),
    ("mp_image_token_length", 8, "not the 9 tokens of a view"),
    ("mp_pixel_shuffle_factor", 2, "no divisor of the 9 patches"),
    ("max_img_size", 55, "not whole views of 18 pixels"),
    ("max_img_size", 18 * 9, "without ids of '<row_1_col_9>'"),
    ("lm_vocab_size", 300, "fewer than the tokenizer's"),
    ("lm_flash", True, "a field that nanoVLM does not have"),
    ("vlm_extra_tokens", {"image_token": "<|image|>"}, "without global_image_token"),
    ("vlm_extra_tokens", {**nanovlm_tokenizer.TOKENS, "r1c1": "<|x|>"}, "string of r1c1"),
    ("vlm_extra_tokens", {**nanovlm_tokenizer.TOKENS, "r1": "<|x|>"}, "string of r1"),
]


@pytest.mark.parametrize(("key", "value", "named"), CHANGES)
def test_what_is_not_computed_is_refused(golden, key, value, named):
    config = read_json(golden / "config.json")
    (golden / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=named):
        tiling_of(read_config(golden))


def test_frequencies_of_another_base_are_refused(golden):
    config = read_json(golden / "config.json")
    (golden / "config.json").write_text(json.dumps(config | {"lm_re_base": 778}))
    with pytest.raises(UserError, match="inv_freq: not the frequencies of lm_re_base"):
        LLaVA.from_pretrained(golden)


def test_a_square_with_a_row_more_needs_its_mark(golden):
    """nanoVLM rounds some squares up; without a token for the last row it cannot go on either."""
    views = LLaVA.from_pretrained(golden).views
    assert views.shape((26, 26)).rows == 4
    few = {name: ids for name, ids in views.marks.items() if not name.startswith("<row_4")}
    with pytest.raises(ValueError, match="a square of 26 pixels becomes 4 x 3 tiles"):
        replace(views, marks=few).shape((26, 26))


def test_what_nanovlm_cannot_express_is_refused(golden, tmp_path):
    changes = {
        "template llama": {"template": "llama"},
        "final norm": {"feature_norm": False},
        "before every picture": {"image_mode": "square"},
        "has no scale": {"image_scale": 0.5},
        "keeps the first patch": {"feature_select": "patch"},
    }
    model, tokenizer = LLaVA.from_pretrained(golden), load_tokenizer(golden)
    check_refusals(model, tokenizer, "nanovlm", tmp_path / "out", changes)


def test_a_video_is_refused(golden, tmp_path):
    views = LLaVA.from_pretrained(golden).views
    rows = [{"id": "v", "video": "a.mp4", "conversations": turns("<video>\nWhat?", "A horse.")}]
    (tmp_path / "a.mp4").write_bytes(b"a film")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    spec = SampleSpec(load_tokenizer(golden), "chat", 1000, views)
    with pytest.raises(UserError, match="rows.json:row 0 .*a.mp4.*nanoVLM sees none; fix: .*"):
        make_sample(open_rows(tmp_path / "rows.json"), 0, spec, pixels=False)


def test_such_a_folder_is_trained_and_asked_and_goes_back(golden, tmp_path):
    """LoRA on own rows, the page of `inspect`, an answer, and the export to nanoVLM."""
    rows = []
    for i in range(12):
        reference.drawn((40 + i, 60), i).save(tmp_path / f"{i}.png")
        conversation = turns("<image>\nWhat is this?", "A horse.")
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": conversation})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = (
        ROOT / "recipes" / "smolvlm-256m-finetune.toml",
        f"model.checkpoint={golden}",
        f"train.output={tmp_path / 'out'}",
        "train.workers=0",
        f"stage.own.data={tmp_path / 'rows.json'}",
        f"stage.own.images={tmp_path}",
        "stage.own.epochs=3",
    )
    run("data.py", "inspect", *words, "--page", tmp_path / "page.html")
    assert "data:image" in (tmp_path / "page.html").read_text()
    run("train.py", *words)
    run("generate.py", "--model", tmp_path / "out", "--image", tmp_path / "3.png", "--prompt", "?")
    run("export.py", "--model", tmp_path / "out", "--to", "nanovlm", tmp_path / "back")
    before = load_file(golden / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert "MP.proj.weight" in changed and "vision_encoder.layer_norm.weight" not in changed
