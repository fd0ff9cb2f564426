"""Hugging Face's LLaVA: we read what it writes; it reads what we write, or we say why not."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoints import hf_llava, weights
from checkpoints.fields import Fields
from checkpoints.files import read_json
from encoders import vision_config
from export import export
from inputs import templates
from inputs.pictures import load_image
from inputs.templates import byte_tokenizer
from inputs.tokenizer import load_tokenizer
from model import FAMILIES, LLaVA, lm_config
from packing import IMAGE_TOKEN
from tests.tools.environment import shared
from tests.tools.small_language_models import CONFIGS, SIZES
from tests.tools.small_llava import CLIP_SIDE, SIDE, VISION, biased, small
from tests.tools.transformers_versions import under


def same_answers(model: LLaVA, folder, image: int):
    """Ours against theirs: logits over our vocabulary, greedy tokens.

    Their ids repeat the image token n times.
    """
    io, theirs = load_file(folder / "io.safetensors"), load_file(folder / "answers.safetensors")
    rows = []
    for ids in io["input_ids"].tolist():
        first = ids.index(image)
        rows.append([*ids[:first], IMAGE_TOKEN, *(i for i in ids[first:] if i != image)])
    rows = torch.tensor(rows)
    with torch.no_grad():
        logits = model(rows, io["images"]).logits
    want = theirs["logits"]
    assert (logits - want[..., : logits.size(-1)]).abs().max().item() <= 1e-4, folder.name
    assert want.std().item() > 0.1  # otherwise 1e-4 would say little
    assert (
        model.generate(rows, io["images"], max_new_tokens=12).tolist()
        == theirs["generated"].tolist()
    )


@pytest.fixture(scope="module", params=["4", "5"])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf" + request.param)
    under(request.param, "write", folder)
    return folder


def test_what_transformers_writes_gives_its_logits_and_tokens(written):
    folders = sorted(written.iterdir())
    assert len(folders) == 4
    for folder in folders:
        same_answers(LLaVA.from_pretrained(folder), folder, 90)


@pytest.mark.parametrize("version", ["4", "5"])
def test_transformers_loads_what_we_write(version, tmp_path):
    """Nothing missing, nothing unexpected, our logits, our greedy tokens."""
    models = {}
    for i, (family, tower) in enumerate(
        (f, t)
        for f in ("llama", "qwen2", "gemma", "gemma3_text", "mistral", "smollm3", "phi3")
        for t in ("clip", "siglip")
    ):
        model = small(family, tower, feature_select="patch" if i % 2 else "cls_patch")
        folder = tmp_path / f"{family}-{tower}"
        export(model, None, "hf-llava", folder, int(version))
        image = read_json(folder / "config.json")["image_token_index"]
        rows = [
            [1, 5, *[image] * model.image_tokens, 7, 9],
            [3, *[image] * model.image_tokens, 8, 2, 60],
        ]
        images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(i))
        save_file({"input_ids": torch.tensor(rows), "images": images}, folder / "io.safetensors")
        models[folder] = model, image
    under(version, "read", *models)
    for folder, (model, image) in models.items():
        assert json.loads((folder / "info.json").read_text()) == {}, folder.name
        same_answers(model, folder, image)


@pytest.mark.parametrize("version", ["4", "5"])
def test_what_came_from_transformers_goes_back_complete(written, version, tmp_path):
    """From either version: the tower keeps its head and the blocks behind the feature layer."""
    source = written / "siglip-qwen2"
    model = LLaVA.from_pretrained(source)
    export(model, None, "hf-llava", tmp_path / "out", int(version))
    io = load_file(source / "io.safetensors")
    io["input_ids"][io["input_ids"] == 90] = read_json(tmp_path / "out" / "config.json")[
        "image_token_index"
    ]
    save_file(io, tmp_path / "out" / "io.safetensors")
    under(version, "read", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "info.json").read_text()) == {}
    want, got = (
        load_file(source / "answers.safetensors"),
        load_file(tmp_path / "out" / "answers.safetensors"),
    )
    assert torch.equal(got["logits"][..., :97], want["logits"]) and torch.equal(
        got["generated"], want["generated"]
    )
    assert any("head.probe" in key for key in weights.Checkpoint(tmp_path / "out"))


CHATS = [
    (
        "llama",
        "clip",
        "meta-llama--Llama-2-7b-hf",
        ("tokenizer.model", "tokenizer_config.json"),
        32000,
        "llama",
        "pad",
    ),
    (
        "llama",
        "siglip",
        "meta-llama--Llama-2-7b-hf",
        ("tokenizer.json", "tokenizer_config.json"),
        32064,
        "llama",
        "anyres",
    ),
    (
        "qwen2",
        "siglip",
        "Qwen--Qwen2-0.5B",
        ("tokenizer.json", "tokenizer_config.json"),
        151936,
        "qwen2_base",
        "pad",
    ),
    (
        "qwen2",
        "clip",
        "Qwen--Qwen2-0.5B",
        ("tokenizer.json", "tokenizer_config.json"),
        151936,
        "chat",
        "square",
    ),
]


PHOTOS = ("horse.png", "astronaut.png", "cow_in_beach.jpg", "coffee.png", "chelsea.png")


def ask(text: str, *photos) -> tuple:
    """A question with pictures in front: our turns, their messages, the files."""
    parts = [{"type": "image", "path": str(photo)} for photo in photos] + [
        {"type": "text", "text": text}
    ]
    return [human("<image>\n" * len(photos) + text)], [{"role": "user", "content": parts}], photos


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def chat_is_ours(version: str, ours: dict):
    """Compare prompts, pixels, logits and answers of exported folders with ours.

    ours: folder -> (model, tokenizer, what `ask` makes).
    """
    for folder, (model, tok, asked) in ours.items():
        export(model, tok, "hf-llava", folder, int(version))
        shown = [
            {"messages": messages, "images": [str(p) for p in photos]}
            for _, messages, photos in asked
        ]
        (folder / "chat.json").write_text(json.dumps(shown))
    under(version, "chat", *ours)
    for folder, (model, tok, asked) in ours.items():
        assert json.loads((folder / "info.json").read_text()) == {}, folder.name
        got, theirs = (
            json.loads((folder / "answered.json").read_text()),
            load_file(folder / "chat.safetensors"),
        )
        template, image = (
            model.config.template,
            read_json(folder / "config.json")["image_token_index"],
        )
        stop, again = templates.stop_id(tok, template), LLaVA.from_pretrained(folder)
        assert len(got["alone"]) == len(asked)
        for i, (turns, _, photos) in enumerate(asked):
            ids = torch.tensor(templates.encode_prompt(turns, tok, template))
            items = [model.views.picture(load_image(photo)) for photo in photos]
            assert [again.views.picture(load_image(photo)).shape for photo in photos] == [
                x.shape for x in items
            ]
            n = iter([model.views.positions(item.shape) for item in items])
            want = [
                j for k in ids.tolist() for j in ([image] * next(n) if k == IMAGE_TOKEN else [k])
            ]
            alone = got["alone"][i]
            assert alone["input_ids"] == want, alone["prompt"]
            pixels = theirs[f"pixels{i}"].view(len(items), -1, 3, SIDE, SIDE)
            for item, seen in zip(items, pixels, strict=True):
                mine = model.vision_tower.processor.normalise(item.pixels)
                assert (seen[: len(mine)] - mine).abs().max().item() <= 1e-5
            for loaded in (model, again):
                with torch.no_grad():
                    logits = loaded(ids[None], items).logits[0, :, :1000]
                assert (
                    theirs[f"logits{i}"][:, : logits.size(1)] - logits
                ).abs().max().item() <= 1e-4, folder.name
                assert logits.std().item() > 0.1  # otherwise 1e-4 would say little
            new = model.generate([ids], items, max_new_tokens=12, eos_token_id=stop)[0].tolist()
            assert alone["generated"] == new, (folder.name, photos)
            assert got["together"][i][: len(new)] == new
        assert got["pipeline"][0].strip() == got["pipeline"][1].strip() != ""


@pytest.mark.parametrize("version", ["4", "5"])
def test_chat_pipelines_of_transformers_work_on_the_exported_folder(version, tmp_path):
    """Processor, chat template, tokenizer: ids and answers of 20 questions on pictures are ours."""
    photos = [shared("assets/images/photos") / name for name in PHOTOS]
    turns = [
        human("<image>\nWhat is this?"),
        {"from": "gpt", "value": "A horse, grazing."},
        human("Which colour\nis it?"),
    ]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A horse, grazing."}]},
        {"role": "user", "content": "Which colour\nis it?"},
    ]
    ours = {}
    for i, (family, tower, tokenizer, files, vocab, template, mode) in enumerate(CHATS):
        source, folder = tmp_path / f"tok{i}", tmp_path / f"{i}"
        source.mkdir()
        for file in files:
            shutil.copy(shared("assets/tokenizers") / tokenizer / file, source)
        if template == "chat":
            config = read_json(
                shared("assets/tokenizers/Qwen--Qwen2.5-0.5B-Instruct/tokenizer_config.json")
            )
            (source / "tokenizer_config.json").write_text(json.dumps(config))
        select = "cls_patch" if mode == "anyres" else "patch"
        tok = load_tokenizer(source)
        model = small(
            family, tower, vocab, 1, template=template, image_mode=mode, feature_select=select
        )
        asked = [(turns, messages, photos[:1])]
        asked += [ask(f"What does {photo.stem} show, and where?", photo) for photo in photos[1:4]]
        ours[folder] = model, tok, [*asked, ask("What do both show?", *photos[3:])]
    chat_is_ours(version, ours)
    for folder, (model, *_) in ours.items():
        assert LLaVA.from_pretrained(folder).config.image_mode == model.config.image_mode
        assert f"chat template: {model.config.template}\n" in (folder / "README.md").read_text()


GRIDS = "1x2 2x1 2x2 1x3 3x1"


@pytest.mark.parametrize("version", ["4", "5"])
def test_anyres_becomes_llava_next(version, tmp_path):
    """Pictures of three shapes, each alone and all in one prompt, come out as ours."""
    photos = [
        tmp_path / f"{width}x{height}.png" for width, height in ((40, 40), (96, 31), (23, 77))
    ]
    for i, photo in enumerate(photos):
        size = [int(n) for n in photo.stem.split("x")]
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), np.uint8)).save(
            photo
        )
    asked = [
        *(ask("What is it?", photo) for photo in photos),
        ask("Which of them is tall?", *photos),
    ]
    tok, ours = byte_tokenizer(), {}
    for family, tower, select, free in (
        ("llama", "clip", "patch", 0),
        ("gemma", "siglip", "cls_patch", 9),
        ("qwen2", "siglip", "cls_patch", 0),
    ):
        model = small(
            family,
            tower,
            tok.vocab_size + free,
            image_mode="anyres",
            image_grids=GRIDS,
            feature_select=select,
        )
        ours[tmp_path / family] = model, tok, asked
    chat_is_ours(version, ours)
    config, again = (
        read_json(tmp_path / "llama" / "config.json"),
        LLaVA.from_pretrained(tmp_path / "llama"),
    )
    assert config["image_grid_pinpoints"] == [[12, 24], [24, 12], [24, 24], [12, 36], [36, 12]]
    assert (again.config.image_mode, again.config.image_grids) == ("anyres", GRIDS)


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: small(connector="mlp3x_gelu"), "two-layer MLP"),
        (lambda: small(connector="linear"), "two-layer MLP"),
        (lambda: small(image_mode="tiles"), "image mode tiles: .*; fix: export to barellava$"),
        (lambda: small(image_mode="anyres_max"), "image mode anyres_max: .*; fix: export to barel"),
        (
            lambda: small("llama", "siglip", feature_norm=True, feature_layer=-1),
            "behind the encoder's final norm: .*; fix: export to barellava$",
        ),
        (
            lambda: small(image_mode="anyres", edge=14),
            "12 pixels cropped from 14: .*; fix: export to barellava$",
        ),
        (lambda: biased(small("phi")), "bias of the language model's head"),
        (
            lambda: LLaVA.from_pretrained(shared("golden/openelm-dinov2-mlp3x_gelu")),
            "two-layer MLP",
        ),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(model, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        export(model(), None, "hf-llava", tmp_path / "out")
    assert "; fix: " in str(error.value) and not (tmp_path / "out").exists()


def test_what_transformers_4_cannot_express_of_phi3_is_refused(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    change = {"rope_scaling": None, "rope_parameters": rope | {"attention_factor": 1.2}}
    model = small("phi3", sizes=change)
    with pytest.raises(ValueError, match="^--transformers 4: attention_factor of .*; fix: "):
        export(model, None, "hf-llava", tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()
    export(model, None, "hf-llava", tmp_path / "out", 5)


FLAGS = (None, False, True)
# A family that is not tied unless the file says so, and one that is; the others in full mode.
TIES = ["qwen2", "gemma"]
for name in (*hf_llava.FAMILIES, "gemma3_text"):
    if name not in TIES:
        TIES.append(pytest.param(name, marks=pytest.mark.full))


def save_theirs(transformers, kind: str, family: str, tied: bool, folder):
    """Write a random LLaVA by transformers; return its config.json. Nothing is zero in it."""
    sizes = SIZES | CONFIGS[family][0] | {"num_hidden_layers": 3, "tie_word_embeddings": tied}
    text = transformers.AutoConfig.for_model(family, **sizes)
    vision = transformers.AutoConfig.for_model("clip_vision_model", **VISION)
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, image_token_index=90
    )
    if kind == "LlavaNext":
        config.image_grid_pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP_SIDE))
    return read_json(folder / "config.json")


def with_flags(config: dict, top, nested) -> dict:
    """Return a config.json with the two tie flags; None leaves one out."""
    config = json.loads(json.dumps(config))
    for place, flag in ((config, top), (config["text_config"], nested)):
        place.pop("tie_word_embeddings", None)
        if flag is not None:
            place["tie_word_embeddings"] = flag
    return config


@pytest.mark.parametrize("kind", ["Llava", "LlavaNext"])
@pytest.mark.parametrize("family", TIES)
def test_a_head_is_tied_where_transformers_ties_it(kind, family, tmp_path):
    """Its flag at the top, in text_config, in both or none, of files with and without a head.

    In two cases transformers loads something, with a warning: a head that is missing is random, and
    one that differs although the flag ties it is kept. Both are refused here, but for a LLaVA-NeXT
    without a head: version 4 tied that by text_config.
    """
    transformers = pytest.importorskip("transformers")
    outcomes = set()
    for stored_tied in (True, False):
        folder = tmp_path / str(stored_tied)
        config = save_theirs(transformers, kind, family, stored_tied, folder)
        stored = set(weights.Checkpoint(folder))
        assert ("language_model.lm_head.weight" in stored) != stored_tied

        for top, nested in itertools.product(FLAGS, FLAGS):
            (folder / "config.json").write_text(json.dumps(with_flags(config, top, nested)))
            model = getattr(transformers, f"{kind}ForConditionalGeneration")
            theirs, info = model.from_pretrained(folder, output_loading_info=True)
            is_random = bool(info["missing_keys"])
            told_to_tie = theirs.config.tie_word_embeddings
            theirs_ties = theirs.lm_head.weight is theirs.get_input_embeddings().weight

            if told_to_tie and not theirs_ties:
                outcomes.add("differs")
                with pytest.raises(ValueError, match="differs .* set tie_word_embeddings to false"):
                    LLaVA.from_pretrained(folder)
                continue
            text_ties = theirs.config.text_config.tie_word_embeddings
            if is_random and not text_ties:
                outcomes.add("missing")
                with pytest.raises(ValueError, match="lm_head.* missing from the weights"):
                    LLaVA.from_pretrained(folder)
                continue

            ours = LLaVA.from_pretrained(folder).language_model
            head, embedding = ours.lm_head.weight, ours.model.embed_tokens.weight
            if is_random:
                outcomes.add("of version 4")
                assert kind == "LlavaNext" and ours.config.tied
            else:
                outcomes.add(f"tied: {theirs_ties}")
                assert ours.config.tied == theirs_ties == (head is embedding)
                assert torch.equal(head, theirs.lm_head.weight)
            assert torch.equal(embedding, theirs.get_input_embeddings().weight)

    expected = {"differs", "missing", "tied: True", "tied: False"}
    if kind == "LlavaNext":
        expected.add("of version 4")
    assert outcomes == expected


def test_what_a_config_leaves_out_is_what_transformers_fills_in(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaConfig()
    ours = hf_llava.read(Fields({"model_type": "llava"}, "config.json"), tmp_path)
    text = lm_config(FAMILIES["llama"].defaults | ours.text)
    assert ours.text == {"model_type": "llama"}
    sizes = (text.vocab, text.width, len(text.layers), text.tied)
    full = theirs.text_config
    want = (full.vocab_size, full.hidden_size, full.num_hidden_layers, full.tie_word_embeddings)
    assert sizes == want
    vision = vision_config(ours.vision).hf
    both = vision.keys() & theirs.vision_config.to_dict().keys()
    assert {k: vision[k] for k in both} == {k: getattr(theirs.vision_config, k) for k in both}
    assert set(hf_llava.DEFAULT_VISION) <= both
    assert (ours.feature_layer, ours.feature_select) == (theirs.vision_feature_layer, "patch")


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_fields_of_features_are_read_as_transformers_reads_them(strategy, tmp_path):
    """A list of one layer is that layer; either name of the image token changes nothing here."""
    transformers = pytest.importorskip("transformers")
    config = save_theirs(transformers, "Llava", "llama", False, tmp_path)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    for layer in (-1, -2, [-2], [1], 2):
        changed = config | {"vision_feature_layer": layer, "pad_token_id": 5, "image_token_id": 90}
        changed["vision_feature_select_strategy"] = strategy
        del changed["image_token_index"]
        (tmp_path / "config.json").write_text(json.dumps(changed))
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert theirs.config.image_token_index == 90
        with torch.no_grad():
            features = theirs.get_image_features(pixel_values=pixels).pooler_output[0]
            got = LLaVA.from_pretrained(tmp_path).encode_images(pixels)[0]
        assert (got - features).abs().max() <= 1e-4

    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_layer": [1, 2]}))
    with pytest.raises(ValueError, match="vision_feature_layer: several layers; fix: "):
        LLaVA.from_pretrained(tmp_path)
