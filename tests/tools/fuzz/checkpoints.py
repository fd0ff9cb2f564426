"""Wrong checkpoints: every JSON file, every header, adapters and tokenizers, of many small models.

    python -m tests.tools.fuzz.checkpoints --count 500 --seed 0

Small models of every family, encoder and layout are written once. A case takes a copy of one,
spoils one file and does what the command lines do: it opens the model, lays out a picture, makes
one token, and exports it. The result is a UserError of one line, or a model of finite logits.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import tokenizers
import torch
from PIL import Image

import lora
from checkpoints import layouts, peft, weights
from checkpoints.files import read_json
from config import LLaVAConfig, LoRA, Model, UserError
from encoders import build_encoder, load_encoder, vision_config
from export import export
from inference.answer import answer
from inputs import templates
from inputs.tiling import mark_names
from inputs.tokenizer import JsonTokenizer, load_tokenizer
from model import LanguageModel, LLaVA, init_weights, tiling_of
from packing import IMAGE_TOKEN
from tests.tools import fuzz
from tests.tools.environment import shared
from tests.tools.fuzz import Case, Violation, mutate, mutate_bytes, odd_json, places
from tests.tools.small_language_models import CONFIGS, OPENELM, SIZES
from tests.tools.small_llava import SIDE, TEXT, VISION, small
from tests.tools.vocabularies import train_pieces

VOCAB = 400  # more than any tokenizer here has
EXPORTS = ("barellava", "tinyllava", "hf-llava", "llava-onevision")
OPTIONS = LoRA(r=2, alpha=3.0, dropout=0.0, targets="q_proj,v_proj")
ENCODERS = {
    "clip": VISION | {"model_type": "clip_vision_model"},
    "siglip": VISION | {"model_type": "siglip_vision_model"},
    "dinov2": VISION | {"model_type": "dinov2", "mlp_ratio": 1.5},
    "swiglu": VISION | {"model_type": "dinov2", "mlp_ratio": 1.5, "use_swiglu_ffn": True},
    "registers": VISION | {"model_type": "dinov2_with_registers", "num_register_tokens": 2},
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DINOV2_IMAGES = {
    "size": {"shortest_edge": 14},
    "crop_size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.4, 0.5, 0.6],
}

# ------------------------------------------------------------------------------------ good folders


@cache
def good_folders() -> Path:
    """Write every good folder once; return the folder that holds them."""
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    root = Path(tempfile.mkdtemp(prefix="fuzz-good-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    tokenizer = templates.byte_tokenizer()

    # Whole models, each in the layouts that can hold it.
    models = {
        "llama-siglip": small("llama", "siglip", VOCAB, template="plain"),
        "qwen2-clip-pad": small("qwen2", "clip", VOCAB, image_mode="pad", template="plain"),
        "gemma-clip": small("gemma", "clip", VOCAB, template="plain"),
        "llama-clip-anyres": small(
            "llama", "clip", VOCAB, image_mode="anyres", image_grids="1x2 2x1", template="plain"
        ),
        "qwen2-siglip-anyres-max": small(
            "qwen2",
            "siglip",
            VOCAB,
            image_mode="anyres_max",
            image_grids="1x2 2x1",
            feature_select="cls_patch",
            template="plain",
        ),
        "llama-siglip-resampler": small(
            "llama",
            "siglip",
            VOCAB,
            connector="groupresampler",
            connector_options={"num_queries": 4, "num_resampler_layers": 1, "group": 2},
            template="plain",
        ),
        "qwen2-siglip-qformer": small(
            "qwen2",
            "siglip",
            VOCAB,
            connector="qformer",
            connector_options={
                "num_queries": 3,
                "hidden_size": 12,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "intermediate_size": 16,
            },
            template="plain",
        ),
    }
    for name, model in models.items():
        for layout in EXPORTS:
            try:
                export(model, tokenizer, layout, root / f"{layout}-{name}")
            except UserError:
                continue
    mixture = _mixture()
    export(mixture, tokenizer, "barellava", root / "barellava-mixture")
    export(mixture, tokenizer, "tinyllava", root / "tinyllava-mixture")
    _write_shards(root / "barellava-shards", models["llama-siglip"], tokenizer)
    _write_factory_folders(root)
    _write_bench(root / "bench-phi", tokenizer)
    _write_smolvlm(root / "smolvlm")
    _write_nanovlm(root / "nanovlm")
    _write_parts(root)
    _write_recipe(root / "recipe")
    _write_adapter(root, models["llama-siglip"])
    _write_pickle(root)
    _write_tokenizers(root)
    return root


def _mixture() -> LLaVA:
    """Return a model with CLIP and DINOv2."""
    text = {"model_type": "llama", **SIZES, **TEXT["llama"], "hidden_size": 48, "vocab_size": VOCAB}
    vision = {"model_type": "mof", "clip": ENCODERS["clip"], "dinov2": ENCODERS["dinov2"]}
    model = LLaVA(LLaVAConfig(text, vision, {}, connector="mof_mlp", template="plain")).eval()
    init_weights(model, 0.2)
    return model


def _write_shards(folder: Path, model: LLaVA, tokenizer):
    """Write a model in our layout, its weights as shards with an index."""
    export(model, tokenizer, "barellava", folder)
    tensors = dict(weights.Checkpoint(folder))
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    (folder / "model.safetensors").unlink()
    weights.save(folder, tensors, shard_bytes=60_000)


def _write_factory_folders(root: Path):
    """Write what TinyLLaVA Factory leaves after a LoRA run: three folders, and the adapters."""
    source = root / "tinyllava-llama-siglip"
    folder = root / "factory-lora"
    shutil.copytree(source, folder)
    tensors = dict(weights.Checkpoint(source))
    (folder / "model.safetensors").unlink()

    adapters = {}
    parts = {
        "language_model": "language_model.",
        "vision_tower": "vision_tower._vision_tower.",
        "connector": "connector.",
    }
    for part, prefix in parts.items():
        state = {}
        for key, tensor in tensors.items():
            if not key.startswith(prefix):
                continue
            name = key
            if key.endswith("q_proj.weight") and part == "language_model":
                name = key.replace("q_proj.", "q_proj.base_layer.")
                path = f"base_model.model.{key.removesuffix('.weight')}"
                adapters[f"{path}.lora_A.weight"] = torch.randn(2, tensor.size(1))
                adapters[f"{path}.lora_B.weight"] = torch.randn(tensor.size(0), 2)
            state[name.removeprefix(prefix)] = tensor.clone()
        weights.save(folder / part, state)
    weights.write_tensors(folder / "adapter_model.safetensors", adapters)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _write_bench(folder: Path, tokenizer):
    """Write a model in the layout of TinyLLaVABench, with its encoder's folder in it."""
    model = small("phi", "siglip", VOCAB, feature_select="cls_patch", template="phi")
    lm = weights.tensors(model.language_model, model.language_model.rename)
    lm.pop("lm_head.bias")
    state = dict(lm)
    for key, tensor in model.connector.state_dict().items():
        state[f"model.mm_projector.{key}"] = tensor
    for key, tensor in weights.tensors(model.vision_tower, model.vision_tower.rename).items():
        state[f"model.vision_tower.vision_tower.{key}"] = tensor
    weights.save(folder, state)
    tokenizer.save(folder)
    (folder / "tower").mkdir()
    (folder / "tower/config.json").write_text(json.dumps(ENCODERS["siglip"]))
    config = {
        **model.config.text,
        "model_type": "tiny_llava_phi",
        "mm_vision_tower": "tower",  # `spoil` makes it a path
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(config))


def _write_smolvlm(folder: Path):
    """Write a SmolVLM of 2 x 2 tiles, of one token each, with a tokenizer that has its marks."""
    files = dict(templates.byte_tokenizer().files)
    fast = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    names = mark_names(2 * SIDE, SIDE)
    controls = [name for name in names if name.strip()]
    fast.add_special_tokens(["<image>", *controls])
    files["tokenizer.json"] = fast.to_str().encode()
    files["chat_template.jinja"] = TEMPLATE.encode()
    tokenizer = JsonTokenizer(files)

    model = small(
        "llama",
        "siglip",
        VOCAB,
        connector="pixel_shuffle",
        connector_options={"factor": 3, "mlp_depth": 1},
        feature_layer=-1,
        feature_select="cls_patch",
        feature_norm=True,
        image_mode="split",
        image_edge=2 * SIDE,
        image_marks={name: tokenizer.encode(name)[0] for name in names},
        template="chat",
    )
    export(model, tokenizer, "smolvlm", folder)


def _write_nanovlm(folder: Path):
    """Write the nanoVLM that its own code has made."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(shared("golden/nanovlm") / name, folder)

    # Without a tokenizer, none is looked for on the Hub.
    config = read_json(folder / "config.json") | {"lm_tokenizer": "./nowhere"}
    (folder / "config.json").write_text(json.dumps(config))


def _write_parts(root: Path):
    """Write language models and encoders by themselves, under Hugging Face's names."""
    families = {
        f"{kind}-{i}": {"model_type": kind, **SIZES, **change}
        for kind, changes in CONFIGS.items()
        for i, change in enumerate(changes)
    }
    families["openelm"] = OPENELM
    for name, hf in families.items():
        hf = hf | {"vocab_size": VOCAB}
        lm = LanguageModel.from_hf(hf)
        init_weights(lm, 0.1)
        weights.save(root / f"lm-{name}", weights.tensors(lm, lm.rename))
        (root / f"lm-{name}/config.json").write_text(json.dumps(hf))
        templates.byte_tokenizer().save(root / f"lm-{name}")

    for name, hf in ENCODERS.items():
        images = DINOV2_IMAGES if "dinov2" in hf["model_type"] else {}
        config = vision_config(hf, images)
        encoder = build_encoder(config, -1)
        init_weights(encoder, 0.1)
        folder = root / f"encoder-{name}"
        weights.save(folder, weights.tensors(encoder, encoder.rename))
        (folder / "config.json").write_text(json.dumps(hf))
        (folder / "preprocessor_config.json").write_text(json.dumps(config.processor.to_hf()))


def _write_recipe(folder: Path):
    """Write the tables of a recipe whose model has random weights, as JSON."""
    text = {"model_type": "llama", **SIZES, **TEXT["llama"], "hidden_size": 48}
    images = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5, 0.5, 0.5]}
    tables = {
        "llm_config": text,
        "vision_config": ENCODERS["siglip"] | {"preprocessor": images},
        "connector_options": {"num_queries": 4, "num_resampler_layers": 1, "group": 2},
    }
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(tables))


def _write_adapter(root: Path, model: LLaVA):
    """Write a model with a PEFT adapter for it, in the folder `adapter` beside its files."""
    folder = root / "adapter-llama-siglip"
    shutil.copytree(root / "barellava-llama-siglip", folder)
    adapted = LLaVA.from_pretrained(folder)
    lora.apply(adapted, OPTIONS, ["language_model"])
    for adapter in lora.adapters(adapted).values():
        torch.nn.init.normal_(adapter.lora_B)
    peft.save_adapter(folder / "adapter", adapted, peft.hf_llava.NEWER)

    dora = root / "adapter-dora"
    shutil.copytree(root / "barellava-llama-siglip", dora)
    adapted = LLaVA.from_pretrained(dora)
    lora.apply(adapted, dataclasses.replace(OPTIONS, dora=True, rslora=True), ["language_model"])
    peft.save_adapter(dora / "adapter", adapted, peft.hf_llava.NEWER)


def _write_pickle(root: Path):
    """Write a model whose weights are a pickle."""
    folder = root / "pickle-llama-siglip"
    shutil.copytree(root / "barellava-llama-siglip", folder)
    torch.save(weights.read_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _write_tokenizers(root: Path):
    """Give every folder the small files of a tokenizer; write one folder of each other kind."""
    token = {"content": "</s>", "lstrip": False, "rstrip": True, "special": True}
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": False,
        "legacy": None,
        "eos_token": token,
        "pad_token": "</s>",
        "model_max_length": 2048,
        "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
    }
    small_files = {
        "special_tokens_map.json": {"eos_token": "</s>", "unk_token": {"content": "</s>"}},
        "generation_config.json": {"eos_token_id": [256, 257], "bos_token_id": 1},
        "chat_template.json": {"chat_template": "{{ messages[0].content }}"},
        "tokenizer_config.json": settings,
    }
    for folder in root.iterdir():
        for name, content in small_files.items():
            if not folder.name.startswith("encoder-"):
                (folder / name).write_text(json.dumps(content))

    # The vocabulary as a tokenizer.model, and as vocab.json and merges.txt.
    pieces = root / "tokenizer-pieces"
    shutil.copytree(root / "barellava-llama-siglip", pieces)
    (pieces / "tokenizer.json").unlink()
    (pieces / "tokenizer.model").write_bytes(train_pieces())
    (pieces / "added_tokens.json").write_text(json.dumps({"<pad>": 340, "<x>": 341}))
    decoder = {"added_tokens_decoder": {"342": token | {"content": "<y>"}}, "add_bos_token": True}
    (pieces / "tokenizer_config.json").write_text(json.dumps(settings | decoder))

    pairs = root / "tokenizer-pairs"
    shutil.copytree(root / "barellava-llama-siglip", pairs)
    vocabulary = json.loads((pairs / "tokenizer.json").read_text())["model"]["vocab"]
    (pairs / "tokenizer.json").unlink()
    (pairs / "vocab.json").write_text(json.dumps(vocabulary))
    (pairs / "merges.txt").write_text("#version: 0.2\n")
    decoder = {"added_tokens_decoder": {str(len(vocabulary)): token}}
    (pairs / "tokenizer_config.json").write_text(json.dumps(settings | decoder))


# -------------------------------------------------------------------------------- what is tried


def check_finite(logits: torch.Tensor):
    """Raise Violation for NaN or infinity."""
    if not logits.isfinite().all():
        raise Violation("logits that are not finite")


def use_model(folder: Path, layout: str):
    """Do with a whole model what generate.py, train.py, data.py and export.py do."""
    recipe = Model(checkpoint=str(folder), allow_pickle=True)
    template = "chat" if layout == "smolvlm" else "plain"
    tiling_of(layouts.config_from_recipe(recipe, template)).positions()

    model = LLaVA.from_parts(recipe, template).eval()
    item = model.views.picture(Image.new("RGB", (30, 20), (200, 10, 60)))
    with torch.no_grad():
        check_finite(model(torch.tensor([[1, IMAGE_TOKEN, 5]]), [item]).logits)
        tokenizer = load_tokenizer(folder)
        answer(model, tokenizer, ["What?"], [[item]], max_new_tokens=1)
    if not isinstance(tokenizer.chat_template, str | None):
        raise Violation("a chat template that is no text")

    if (folder / "adapter").is_dir():
        peft.merge_adapter(model, folder / "adapter")
        with torch.no_grad():
            check_finite(model(torch.tensor([[1, IMAGE_TOKEN, 5]]), [item]).logits)
    export(model, tokenizer, layout, folder / "exported")
    LLaVA.from_pretrained(folder / "exported")


def use_lm(folder: Path):
    """Start a run from a language model: with random weights and with its own."""
    config = read_json(folder / "config.json")
    lm = LanguageModel.from_pretrained(folder).eval()
    with torch.no_grad():
        check_finite(lm(torch.tensor([[1, 2, 3]])))
    recipe = Model(llm=str(folder), vision_config=ENCODERS["siglip"])
    LLaVA.from_parts(recipe, "plain")
    recipe = Model(llm_config=config, vision_config=ENCODERS["siglip"])
    model = LLaVA.from_parts(recipe, "plain").eval()
    with torch.no_grad():
        check_finite(model(torch.tensor([[1, 2, 3]])).logits)
        answer(model, load_tokenizer(folder), ["What?"], [[]], max_new_tokens=1)


def use_encoder(folder: Path):
    """Start a run from an encoder, and look at a picture with it."""
    encoder = load_encoder(folder, torch.float32).eval()
    with torch.no_grad():
        check_finite(encoder(encoder.preprocess(Image.new("RGB", (30, 20)))[None]))
    text = {"model_type": "llama", **SIZES, **TEXT["llama"], "hidden_size": 48}
    recipe = Model(vision=str(folder), llm_config=text)
    model = LLaVA.from_parts(recipe, "plain").eval()
    item = model.views.picture(Image.new("RGB", (30, 20)))
    with torch.no_grad():
        check_finite(model(torch.tensor([[1, IMAGE_TOKEN, 5]]), [item]).logits)


def use_recipe(file: Path):
    """Start a run from the tables of a recipe alone: all weights are random."""
    tables = read_json(file)
    config = Model(**{key: value for key, value in tables.items() if isinstance(value, dict)})
    config = dataclasses.replace(config, connector="groupresampler")
    tiling_of(layouts.config_from_recipe(config, "plain")).positions()
    model = LLaVA.from_parts(config, "plain").eval()
    item = model.views.picture(Image.new("RGB", (30, 20)))
    with torch.no_grad():
        check_finite(model(torch.tensor([[1, IMAGE_TOKEN, 5]]), [item]).logits)


def use(folder: Path, layout: str):
    """Do with a folder what fits its kind."""
    here = os.getcwd()
    try:
        os.chdir(folder)  # where a TinyLLaVABench model names its encoder
        if (folder / "kind").read_text().startswith("lm-"):
            use_lm(folder)
        elif (folder / "kind").read_text().startswith("encoder-"):
            use_encoder(folder)
        elif (folder / "kind").read_text() == "recipe":
            use_recipe(folder / "recipe.json")
        else:
            use_model(folder, layout)
    finally:
        os.chdir(here)


# ------------------------------------------------------------------------------------- spoiling


def spoil_json(file: Path, rng: random.Random) -> str:
    """Put a wrong value into a JSON file, sometimes two, or make it no JSON at all."""
    if rng.random() < 0.06:
        content, what = odd_json(rng)
        file.write_bytes(content)
        return what
    mutated = mutate(json.loads(file.read_text()), rng)
    if rng.random() < 0.2:
        mutated = mutate(mutated.value, rng)
    file.write_bytes(json.dumps(mutated.value).encode(errors="surrogatepass"))
    return mutated.what


def spoil_header(file: Path, rng: random.Random) -> str:
    """Change the header of a safetensors file: its JSON, or its bytes."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.4:
        changed, what = mutate_bytes(content[: 8 + length], rng)
        file.write_bytes(changed + content[8 + length :])
        return what
    header = json.loads(content[8 : 8 + length])
    mutated = mutate(header, rng)
    text = json.dumps(mutated.value).encode(errors="surrogatepass")
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return mutated.what


def spoil_tensors(file: Path, rng: random.Random) -> str:
    """Write the tensors again: one of another shape or type, one missing, added or renamed."""
    tensors = {key: tensor.clone() for key, tensor in weights.read_file(file).items()}
    key = rng.choice(sorted(tensors))
    tensor = tensors.pop(key)
    way = rng.choice(("missing", "shape", "scalar", "empty", "type", "renamed", "added"))
    if way == "shape":
        tensors[key] = torch.cat([tensor.flatten(), tensor.flatten()])
    elif way == "scalar":
        tensors[key] = torch.ones(())
    elif way == "empty":
        tensors[key] = torch.ones(0)
    elif way == "type":
        kinds = (torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64, torch.uint8)
        tensors[key] = tensor.to(rng.choice(kinds))
    elif way == "renamed":
        tensors[rng.choice(("x", f"{key}.x", key[1:], key.replace("0", "99")))] = tensor
    elif way == "added":
        tensors[key] = tensor
        tensors[f"{key.rpartition('.')[0]}.lora_A.weight"] = torch.ones(2, 2)
    weights.write_tensors(file, tensors)
    return f"{key} {way}"


def spoil_place(file: Path, rng: random.Random) -> str:
    """Put something else in a file's place: a pipe, a folder, a device, a link, nothing."""
    file.unlink()
    way = rng.choice(("pipe", "folder", "device", "zero", "loop", "nowhere", "nothing", "secret"))
    if way == "pipe":
        os.mkfifo(file)
    elif way == "folder":
        file.mkdir()
    elif way == "device":
        file.symlink_to("/dev/tty")
    elif way == "zero":
        file.symlink_to("/dev/zero")
    elif way == "loop":
        file.symlink_to(file)
    elif way == "nowhere":
        file.symlink_to(file.parent / "nowhere")
    elif way == "secret":
        file.symlink_to("/etc/hostname")
    return way


def spoil_pickle(file: Path, rng: random.Random) -> str:
    """Change the beginning or the end of a pickle, where it says what it holds."""
    content = file.read_bytes()
    if rng.random() < 0.5:
        changed, what = mutate_bytes(content[:400], rng)
        file.write_bytes(changed + content[400:])
    else:
        changed, what = mutate_bytes(content[-4000:], rng)
        file.write_bytes(content[:-4000] + changed)
    return what


def case(rng: random.Random, folder: Path) -> Case:
    """Return the case of a random generator."""
    root = good_folders()
    names = sorted(path.name for path in root.iterdir())
    group = rng.choice(sorted({name.partition("-")[0] for name in names}))
    name = rng.choice([name for name in names if name.partition("-")[0] == group])
    copy = folder / "model"
    shutil.copytree(root / name, copy)
    (copy / "kind").write_text(name)
    (copy / "README.md").unlink(missing_ok=True)

    # Configurations are where most mistakes can be.
    files = sorted(path for path in copy.rglob("*") if path.suffix in (".json", ".safetensors"))
    configs = [path for path in files if path.suffix == ".json" and path.name != "tokenizer.json"]
    tensors = [path for path in files if path.suffix == ".safetensors"]
    pickles = sorted(copy.rglob("*.bin"))
    spoil: Callable[[Path, random.Random], str]
    spoil, choices = rng.choice(
        [
            (spoil_json, configs),
            (spoil_json, configs),
            (spoil_json, configs),
            (spoil_json, configs),
            (spoil_header, tensors or configs),
            (spoil_tensors, tensors or configs),
            (spoil_place, [*files, *pickles]),
        ]
    )
    if choices is configs:
        # A file with many fields has more that can be wrong.
        sizes = [len(places(json.loads(path.read_text()))) ** 0.5 for path in configs]
        file = rng.choices(configs, sizes)[0]
        spoil = spoil_json
    else:
        file = rng.choice(choices)
    if pickles and rng.random() < 0.5:
        spoil = spoil_pickle
        file = pickles[0]
    what = spoil(file, rng)
    kind = f"{spoil.__name__.removeprefix('spoil_')} {file.name}"
    if file.suffix == ".safetensors":
        kind = f"{spoil.__name__.removeprefix('spoil_')} of weights"

    layout = rng.choice(EXPORTS)
    return Case(kind, f"{name}/{file.relative_to(copy)}: {what}", partial(use, copy, layout))


if __name__ == "__main__":
    fuzz.main(case, __doc__)
