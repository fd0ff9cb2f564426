"""Checkpoint layouts in and out: what other programs write, we read; what we write, they read; or we say why not."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoints import weights
from checkpoints.files import read_json
from config import LLaVAConfig
from export import export
from inputs import templates
from inputs.pictures import load_image
from inputs.templates import byte_tokenizer
from inputs.tokenizer import load_tokenizer
from model import LLaVA, init_weights
from packing import IMAGE_TOKEN, Item, ItemShape
from tests.tools.environment import ROOT, SHARED, shared

GOLDEN = (
    "gemma-siglip-qformer", "openelm-dinov2-mlp3x_gelu", "phi-siglip-mlp2x_gelu", "qwen2-clip-mlp-cls_patch",
    "qwen2-siglip-linear", "stablelm-clip-resampler", "tinyllama-clip-mlp2x_gelu", "tinyllama-mof-mof_mlp",
)  # fmt: skip
SIDE = 12
TEXT = {
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 14},
    "phi": {"num_attention_heads": 4, "partial_rotary_factor": 0.5},
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4,
          "image_size": SIDE}  # fmt: skip
CLIP_SIDE = {
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_center_crop": True,
}


def small(
    family="llama", tower="clip", vocab: int = 97, seed: int = 0, edge: int = SIDE, **config
) -> LLaVA:
    text = {"model_type": family, "vocab_size": vocab, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 2, **TEXT[family]}  # fmt: skip
    vision = {"model_type": f"{tower}_vision_model", **VISION}
    clip, siglip = (
        CLIP_SIDE | {"size": {"shortest_edge": edge}},
        {"size": {"height": SIDE, "width": SIDE}},
    )
    torch.manual_seed(seed)
    model = LLaVA(LLaVAConfig(text, vision, clip if tower == "clip" else siglip, **config)).eval()
    init_weights(model, 0.2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and name != "language_model.lm_head.bias":
                p.add_(0.2 * torch.randn_like(p))
    return model


def under(version: str, *command):
    """Run tests/tools/hf_llava.py with transformers 5 (of this environment) or 4 (installed beside it by `make test`)."""
    pytest.importorskip(
        "transformers", reason="the oracle is a development dependency: pip install .[dev]"
    )
    older = ROOT / ".venv" / "hf4"
    if version == "4" and not older.is_dir():
        pytest.skip("transformers 4.57 is not in .venv/hf4; `make test` puts it there")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(older) if version == "4" else ""}
    done = subprocess.run([sys.executable, ROOT / "tests" / "tools" / "hf_llava.py", *map(str, command)], env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def same_answers(model: LLaVA, folder, image: int):
    """Ours against theirs: logits over our vocabulary, greedy tokens. Their ids repeat the image token n times."""
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


# --------------------------------------------------------------------------------------- Hugging Face LLaVA


@pytest.fixture(scope="module", params=["4", "5"])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf" + request.param)
    under(request.param, "write", folder)
    return folder


def test_what_transformers_writes_gives_its_logits_and_tokens(written):
    folders = sorted(written.iterdir())
    assert len(folders) == 3
    for folder in folders:
        same_answers(LLaVA.from_pretrained(folder), folder, 90)


@pytest.mark.parametrize("version", ["4", "5"])
def test_transformers_loads_what_we_write(version, tmp_path):
    """Nothing missing, nothing unexpected, our logits, our greedy tokens."""
    models = {}
    for i, (family, tower) in enumerate(
        (f, t) for f in ("llama", "qwen2", "gemma") for t in ("clip", "siglip")
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
    """Loaded from a file of either version: the tower keeps the blocks behind the feature layer and its head."""
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
    """folder -> (model, tokenizer, what `ask` makes): prompts, pixels, logits and answers of the exported folders."""
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
    """Processor, chat template and tokenizer: the ids of 20 questions about pictures, and the answers, are ours."""
    photos = [shared("assets/images/photos") / name for name in PHOTOS]
    turns = [human("<image>\nWhat is this?"), {"from": "gpt", "value": "A horse, grazing."},
             human("Which colour\nis it?")]  # fmt: skip
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
    """Pictures of three shapes, each alone and all in one prompt: what LlavaNextProcessor makes of them is ours."""
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
    for family, tower, select, free in (("llama", "clip", "patch", 0), ("gemma", "siglip", "cls_patch", 9),
                                        ("qwen2", "siglip", "cls_patch", 0)):  # fmt: skip
        model = small(family, tower, tok.vocab_size + free, image_mode="anyres", image_grids=GRIDS,
                      feature_select=select)  # fmt: skip
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


@pytest.mark.parametrize(
    "config, message",
    [
        ({"connector": "mean_mlp2x_gelu"}, "no mean_mlp2x_gelu"),
        ({"image_mode": "tiles"}, "no tiles"),
        ({"family": "gemma", "image_scale": 0.5}, "image features scaled otherwise"),
        ({"family": "phi", "head": False}, "a Phi without a bias on its head"),
    ],
)
def test_what_factory_cannot_express_is_refused(config, message, tmp_path):
    model = small(**{k: v for k, v in config.items() if k != "head"})
    if "head" in config:
        model.config.text["lm_head_bias"] = config["head"]
    with pytest.raises(ValueError, match=message) as error:
        export(model, None, "tinyllava", tmp_path / "out")
    assert "; fix: " in str(error.value) and not (tmp_path / "out").exists()


def biased(model):
    model.language_model.lm_head.bias.data[3] = 0.1
    return model


# ----------------------------------------------------------------------------------------- TinyLLaVA layouts


@pytest.mark.parametrize("case", GOLDEN)
def test_factory_round_trip_is_key_for_key_and_bit_for_bit(case, tmp_path):
    source = shared("golden") / case
    model = LLaVA.from_pretrained(source, dtype=None)
    export(model, None, "tinyllava", tmp_path / "factory")
    export(model, None, "barellava", tmp_path / "ours")
    again = LLaVA.from_pretrained(tmp_path / "ours", dtype=None)
    export(again, None, "tinyllava", tmp_path / "again")
    before = load_file(source / "model.safetensors")
    for folder in ("factory", "again"):
        after = load_file(tmp_path / folder / "model.safetensors")
        assert after.keys() == before.keys()
        assert all(
            torch.equal(after[k], before[k]) and after[k].dtype == before[k].dtype for k in before
        )
    want, got = (
        read_json(source / "config.json"),
        read_json(tmp_path / "again" / "config.json"),
    )
    same = (
        "connector_type", "vision_feature_layer", "vision_feature_select_strategy", "image_aspect_ratio",
        "text_config", "llm_model_name_or_path", "vision_model_name_or_path", "vision_model_name_or_path2",
    )  # fmt: skip
    assert {k: got[k] for k in same} == {k: want[k] for k in same}
    LLaVA.from_pretrained(tmp_path / "again")


LATENTS = {"latents", "linear.weight", "linear.bias", "norm.weight", "norm.bias", "layers.0.0.norm_media.weight",
    "layers.0.0.norm_media.bias", "layers.0.0.norm_latents.weight", "layers.0.0.norm_latents.bias",
    "layers.0.0.to_q.weight", "layers.0.0.to_kv.weight", "layers.0.0.to_out.weight", "layers.0.1.0.weight",
    "layers.0.1.0.bias", "layers.0.1.1.weight", "layers.0.1.3.weight"}  # fmt: skip


@pytest.mark.parametrize(
    "kind, options", [("groupresampler", {"group": 3}), ("naiveresampler", {})]
)
def test_tinyllava_videos_round_trip(kind, options, tmp_path):
    """Its names and settings of the two resamplers, and the older name of one."""
    sizes = {"num_queries": 6, "num_resampler_layers": 1}
    model = small(
        "qwen2", "siglip", connector=kind, connector_options=sizes | options, frames=5, fps=2.0
    )
    export(model, None, "tinyllava", tmp_path / "1")
    config, state = (
        read_json(tmp_path / "1" / "config.json"),
        load_file(tmp_path / "1" / "model.safetensors"),
    )
    said = {k: config[k] for k in ("connector_type", "group", *sizes) if k in config}
    assert said == {"connector_type": kind, **sizes, **options} and f"{kind}_config" not in config
    prefix = "connector._connector."
    assert {k.removeprefix(prefix) for k in state if k.startswith("connector.")} == LATENTS
    latents = 6 // options.get("group", 1)
    assert (
        torch.equal(state[f"{prefix}latents"], model.connector.latents)
        and len(model.connector.latents) == latents
    )
    card = (tmp_path / "1" / "README.md").read_text()
    assert "- frames of a video: 5 at most, 2 a second\n" in card and "TinyLLaVA-Video" in card
    again = LLaVA.from_pretrained(tmp_path / "1", dtype=None)
    export(again, None, "tinyllava", tmp_path / "2")
    assert read_json(tmp_path / "2" / "config.json") == config
    if kind == "naiveresampler":  # has had another name, and may have a `group` that says nothing
        for change in ({"connector_type": "resamplerwithpe"}, {"group": None}, {"group": 16}):
            (tmp_path / "1" / "config.json").write_text(json.dumps(config | change))
            again = LLaVA.from_pretrained(tmp_path / "1", dtype=None)
            assert again.config.connector == kind
    ids, clip = (
        torch.tensor([[1, IMAGE_TOKEN, 5]]),
        [Item(torch.randn(5, 3, SIDE, SIDE), ItemShape(5))],
    )
    logits = again(ids, clip).logits
    assert logits.size(1) == 2 + 6 and torch.equal(logits, model(ids, clip).logits)


def pickled(folder, state):
    folder.mkdir(parents=True)
    torch.save(state, folder / "pytorch_model.bin")


def test_factorys_three_folders_of_pickles_load_when_allowed(tmp_path):
    source = shared("golden/stablelm-clip-resampler")
    state = load_file(source / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    for folder, prefix in (("language_model", "language_model."), ("vision_tower", "vision_tower._vision_tower."),
                           ("connector", "connector.")):  # fmt: skip
        pickled(
            tmp_path / folder,
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)},
        )
    with pytest.raises(ValueError, match="allow_pickle"):
        LLaVA.from_pretrained(tmp_path)
    a, b = LLaVA.from_pretrained(source), LLaVA.from_pretrained(tmp_path, allow_pickle=True)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_legacy_bench_phi_keeps_all_siglip_patches_and_has_no_head_bias(tmp_path):
    """bczhou/TinyLLaVA-3.1B's layout: one flat config, mm_* fields, the tower by name, its last block deleted."""
    model = small("phi", "siglip", feature_select="cls_patch", template="phi")
    model.language_model.lm_head.bias.data.zero_()
    state = {}
    lm = weights.tensors(model.language_model, model.language_model.rename)
    state |= {k: v for k, v in lm.items() if k != "lm_head.bias"}
    state |= {f"model.mm_projector.{k}": v for k, v in model.connector.state_dict().items()}
    tower = weights.tensors(model.vision_tower, model.vision_tower.rename)
    state |= {f"model.vision_tower.vision_tower.{k}": v for k, v in tower.items()}
    weights.save(tmp_path, state)
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(
        json.dumps({"model_type": "siglip_vision_model", **VISION})
    )
    config = {**model.config.text, "model_type": "tiny_llava_phi", "mm_vision_tower": str(tmp_path / "tower"),
              "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_hidden_size": 32,
              "image_aspect_ratio": "pad", "tune_mm_mlp_adapter": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = LLaVA.from_pretrained(tmp_path)
    assert again.language_model.lm_head.bias is None and again.image_tokens == 9
    assert (again.config.image_mode, again.config.template) == ("pad", "phi")
    ids, images = torch.tensor([[1, IMAGE_TOKEN, 5]]), torch.randn(1, 3, SIDE, SIDE)
    assert torch.equal(again(ids, images).logits, model(ids, images).logits)
    export(
        again, None, "hf-llava", tmp_path / "hf"
    )  # and so this Phi, unlike others, can go to Hugging Face
    assert "language_model.lm_head.bias" not in weights.Checkpoint(tmp_path / "hf")


def test_unknown_layout_and_incomplete_config_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llavaa"}')
    with pytest.raises(ValueError, match="no layout known here; fix: one of barellava, tinyllava"):
        LLaVA.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "tinyllava", "text_config": {}}')
    with pytest.raises(ValueError, match="vision_config: missing"):
        LLaVA.from_pretrained(tmp_path)


def test_the_command(tmp_path):
    from tests.tools.environment import run

    if not SHARED.is_dir():
        pytest.skip("the reference data folder ../shared is not on this machine")
    out = tmp_path / "out"
    model = shared("golden/qwen2-siglip-linear")
    done = run("export.py", "--model", model, "--to", "tinyllava", out)
    assert "model.safetensors" in done.stdout and (out / "config.json").exists()
    again = run("export.py", "--model", model, "--to", "tinyllava", out, ok=False)
    assert again.stderr.strip().splitlines()[-1].startswith(f"error: {out}: exists; fix: ")
    refused = run("export.py", "--model", model, "--to", "hf-llava", tmp_path / "hf", ok=False)
    assert "two-layer MLP" in refused.stderr.splitlines()[-1]
