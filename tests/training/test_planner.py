"""The plan of a recipe: what is found, what is missing, exact counts, an estimate about right."""

import json
import re
import shutil
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

import config
import kernels
import train
from checkpoints import layouts, peft
from config import PARTS, LoRA, Stage, Tune, UserError
from inputs.rows import open_rows
from inputs.sample import SampleSpec
from inputs.templates import byte_tokenizer
from inputs.tiling import Tiling
from model import LLaVA
from packing import IMAGE_TOKEN, ONE_VIEW, Batch, constant
from tests.tools.environment import GPU, ROOT, run, shared
from tests.tools.sample_rows import make_sample
from train import round_frozen, set_trainable
from training import estimate, memory, planner
from training.estimate import RowSize

LLM = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}
# What the authors' own files add up to; each part's own tensors once, tied ones once.
PUBLISHED = {
    "TinyLlama--TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "Qwen--Qwen2-0.5B": 494_032_768,
    "Qwen--Qwen2.5-3B": 3_085_938_688,
    "google--gemma-2b": 2_506_172_416,
    "microsoft--phi-2": 2_779_683_840,
    "stabilityai--stablelm-2-zephyr-1_6b": 1_644_515_328,
    "apple--OpenELM-450M-Instruct": 457_179_136,
}
RECIPE = """
[model]
llm = "{llm}"
vision = "{vision}"
tokenizer = "{tokenizer}"
[train]
output = "{out}"
gradient_checkpointing = true
[stage.pretrain]
data = "{data}"
global_batch = 4
[stage.finetune]
data = "{data}"
validation = "{data}"
template = "plain"
global_batch = 4
epochs = 2.0
tune = {{ llm = "full" }}
"""


def folder(path, hf: dict, *files: str):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(hf))
    for name in files:
        (path / name).touch()
    return path


@pytest.fixture
def recipe(tmp_path):
    """A recipe on made-up local folders: (its file, what to .format() into it)."""
    rows = [
        {
            "image": "a.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\n{'x' * 40}"},
                {"from": "gpt", "value": "y" * 80},
            ],
        },
        {
            "conversations": [
                {"from": "human", "value": "x" * 120},
                {"from": "gpt", "value": "y" * 240},
            ]
        },
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows * 5))
    names = {
        "llm": folder(tmp_path / "llm", LLM, "model.safetensors"),
        "vision": folder(tmp_path / "vision", VISION, "model.safetensors"),
        "tokenizer": folder(tmp_path / "tokenizer", {}, "tokenizer.json"),
        "data": tmp_path / "rows.json",
        "out": tmp_path / "out",
    }

    def write(**other):
        (tmp_path / "r.toml").write_text(RECIPE.format(**(names | other)))
        return tmp_path / "r.toml"

    return write


def build(llm: dict = LLM, vision: dict = VISION, device: str = "cpu", **options) -> LLaVA:
    with torch.device(device):
        return LLaVA(
            layouts.config_from_recipe(
                config.Model(llm_config=llm, vision_config=vision, **options), ""
            )
        )


def count(module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


# ------------------------------------------------------------------------------------------- --list


def test_list_shows_every_recipe_and_its_scores():
    head, *rows, legend = [line for line in run("train.py", "--list").stdout.splitlines() if line]
    assert head.split() == ["recipe", "llm", "vision", "trains", *planner.BENCHMARKS]
    table = {row.split()[0]: row for row in rows}
    assert table.pop("recipe").split() == ["recipe", "llm", "vision", "trains", *planner.VIDEO]
    assert table["qwen2.5-3b-siglip-video"].split()[-5:] == ["47.0", "45.5", "42.4", "52.5", "34.3"]
    assert set(table) == {f.stem for f in (ROOT / "recipes").glob("*.toml")} - {
        "base",
        "share",
        "video",
    }
    phi = re.split(r"\s{2,}", table["phi2-siglip-share-factory"])
    assert phi[1:4] == ["phi-2", "siglip-so400m-patch14-384", "c > c+l > c+l"]
    assert phi[4:] == "80.1 62.1 73.0 60.3 37.5 87.2 1466.4 38.4".split()
    paper = re.split(r"\s{2,}", table["phi2-siglip-share-paper"])
    assert paper[3:] == ["c > c+l+v(partial:12) > c+l", *["-"] * 8]
    assert re.split(r"\s{2,}", table["demo"])[1:3] == ["random", "random"]
    assert "clip-vit-large-patch14 + dinov2-large" in table["tinyllama-mof-base"]
    assert legend.startswith("trains: c connector")


# ---------------------------------------------------------------------------------------- --dry-run


def test_dry_run_of_the_demo():
    world = ROOT / "out/demo/world"
    there = world.exists()
    said = run("train.py", "--dry-run").stdout
    assert world.exists() == there  # it makes nothing
    where = "found" if there else "train.py makes it"
    assert said.count(where) == 15 and "MISSING" not in said
    # The longest key does not run into its value.
    assert "stage.together.mixture.questions.images out/demo/world/images" in " ".join(said.split())
    assert "\nexports to: barellava (" in said
    assert "not to llama.cpp: --to gguf: image mode square" in said
    r, _ = config.load([], ROOT / "recipes/demo.toml")
    model = build(
        r.model.llm_config,
        r.model.vision_config,
        connector=r.model.connector,
        feature_layer=-1,
        feature_select="cls_patch",
    )
    for part in (model.language_model, model.vision_tower, model.connector):
        assert f" {count(part):,}" in said
    assert said.count(f"trains {count(model):,} of {count(model):,} parameters") == 4


def test_dry_run_counts_parameters_steps_and_tokens(recipe, tmp_path):
    file = recipe()
    said = run("train.py", file, "--dry-run", "stage.finetune.global_batch=5").stdout
    model = build()
    for name, part in model.named_children():
        assert f" {name} {count(part):,}" in said
    assert f"{(32 // 8) ** 2 - 1} tokens per image" in said
    first, second = said.split("\nstage ")[1:]
    whole = f" of {count(model):,} parameters"
    assert first.startswith(
        f"pretrain: 3 steps of 4 rows; trains {count(model.connector):,}{whole}"
    )
    both = count(model.connector) + count(model.language_model)
    assert second.startswith(f"finetune: 4 steps of 5 rows; trains {both:,}{whole}")
    # Half the rows have 10 + 20 tokens and a picture, half 30 + 60. The template `pretrain` leaves
    # the question out.
    assert (
        "0.50 views of 8 tokens, 40 text tokens, 40 supervised (data: 10 rows, tokens guessed"
        in first
    )
    assert (
        "0.50 views of 8 tokens, 60 text tokens, 40 supervised (data: 10 rows, tokens guessed"
        in second
    )
    assert (
        said.count("estimate:") == 4
        and "stage.finetune.validation" in said
        and "MISSING" not in said
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("llm", [name for name in PUBLISHED])
def test_dry_run_of_each_published_model(llm, recipe, tmp_path, capsys):
    source = shared(f"assets/configs/{llm}/config.json")
    (tmp_path / "llm" / "config.json").unlink()
    file = recipe()
    shutil.copy(source, tmp_path / "llm")
    vision = tmp_path / "siglip"
    shutil.copytree(shared("assets/configs/google--siglip-so400m-patch14-384"), vision)
    (vision / "model.safetensors").touch()
    train.main([str(file), "--dry-run", f"model.vision={vision}"])
    said = capsys.readouterr().out
    assert f" language_model {PUBLISHED[llm]:,}" in said and "728 tokens per image" in said


@pytest.mark.parametrize(
    "other, key, why",
    [
        ({"data": "nowhere/rows.json"}, "stage.pretrain.data", "'nowhere/rows.json': MISSING"),
        ({"llm": "./no/model"}, "model.llm", "'./no/model': MISSING: no such folder"),
        ({"vision": "no-such-folder"}, "model.vision", "'no-such-folder': MISSING: no such folder"),
        (
            {"tokenizer": "recipes"},
            "model.tokenizer",
            "MISSING: it has no tokenizer.json or tokenizer.model",
        ),
    ],
)
def test_what_is_missing_is_named(recipe, other, key, why, capsys):
    file = recipe(**other)
    with pytest.raises(UserError, match="; fix: correct the path") as e:
        train.main([str(file), "--dry-run"])
    said = capsys.readouterr().out
    assert str(e.value).startswith(f"{file}:{key}: ") and why in str(e.value) and "MISSING" in said
    assert (
        ("steps unknown: no data" in said)
        == ("hours per 100,000 rows" in said)
        == ("data" in other)
    )
    assert (
        "1.00 views of 15 tokens, 200 text tokens, 100 supervised (assumed: no data)" in said
    ) == ("data" in other)


def test_pickled_weights_are_found_where_they_are_allowed(recipe, tmp_path, capsys):
    (tmp_path / "vision/model.safetensors").rename(tmp_path / "vision/pytorch_model.bin")
    with pytest.raises(UserError, match=r"model.vision: .*it has no \*.safetensors; "):
        train.main([str(recipe()), "--dry-run"])
    train.main([str(recipe()), "--dry-run", "model.allow_pickle=true"])


class Hub(SimpleHTTPRequestHandler):
    """A folder served as the Hub serves a model's files: /org/name/resolve/main/FILE."""

    asked: list[str] = []

    def send_head(self):
        Hub.asked += (
            [self.path] if "/resolve/" in self.path else []
        )  # its client asks for other things too
        self.path = self.path.replace("/resolve/main", "")
        return super().send_head()

    def end_headers(self):
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "a" * 40)
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """The environment in which tmp_path/hub is the Hub."""
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=tmp_path / "hub"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
    }
    yield where | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    server.shutdown()
    server.server_close()


def cache(path, *files: str):
    """org/llm in the Hugging Face cache below a path: its snapshot."""
    home = path / "cache/hub/models--org--llm"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text("b" * 40)
    return folder(home / "snapshots" / ("b" * 40), LLM, *files)


def test_a_model_that_would_be_downloaded_is_not(recipe, tmp_path, hub):
    folder(tmp_path / "hub/org/llm", LLM, "model.safetensors", "tokenizer_config.json")
    cached = cache(tmp_path)  # without weights: no model
    said = run("train.py", recipe(llm="org/llm", tokenizer=""), "--dry-run", **hub).stdout
    assert re.search(r"model.llm +org/llm +would be downloaded\n", said)
    assert re.search(r"model.tokenizer +org/llm +would be downloaded\n", said)
    assert f"language_model {count(build().language_model):,}" in said
    assert {path.split("/")[-1] for path in Hub.asked} == {
        "config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
    }
    assert list((tmp_path / "cache").rglob("*.json")) == [cached / "config.json"]


def test_a_name_that_the_hub_does_not_know_is_missing(recipe, hub):
    done = run("train.py", file := recipe(vision="org/typo"), "--dry-run", ok=False, **hub)
    what = "MISSING: the Hub answers 404; check the name, or log in for a gated model"
    fix = "correct the path, or put it there"
    assert done.stderr == f"error: {file}:model.vision: 'org/typo': {what}; fix: {fix}\n"


def test_a_cached_model_needs_no_network(recipe, tmp_path, hub):
    snapshot = cache(tmp_path, "model.safetensors")
    said = run("train.py", recipe(llm="org/llm"), "--dry-run", **hub).stdout
    assert f"in the Hugging Face cache: {snapshot}" in said and "estimate" in said and not Hub.asked


def test_without_a_network_one_line_says_so(recipe, hub):
    nobody = hub | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run("train.py", recipe(llm="org/llm"), "--dry-run", ok=False, **nobody)
    assert re.search(
        r"model.llm +org/llm +would be downloaded, but the Hub cannot be reached now", done.stdout
    )
    assert (
        len(done.stderr.strip().splitlines()) == 1
        and "; fix: connect, or name a local folder" in done.stderr
    )
    assert "estimate" not in done.stdout


def test_dry_run_tokenizes_rows_where_it_can(recipe, tmp_path):
    """With the tokenizer there, a row has the tokens that training gives it, template included."""
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path / "bytes")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    said = run("train.py", recipe(tokenizer=tmp_path / "bytes"), "--dry-run").stdout
    first, second = said.split("\nstage ")[1:]
    spec = SampleSpec(tokenizer, "plain", 2048, build(device="meta").views)
    samples = [make_sample(open_rows(str(tmp_path / "rows.json"), ""), i, spec) for i in (0, 1)]
    text = sum(int((sample.ids != IMAGE_TOKEN).sum()) for sample in samples) / 2
    assert f"0.50 views of 8 tokens, {text:.0f} text tokens" in second
    assert "(data: 10 rows, tokenized)" in first and "(data: 10 rows, tokenized)" in second


def test_dry_run_says_what_to_lower(recipe):
    """For a GPU that is too small, changes are tried one after the other until it fits."""
    said = run("train.py", recipe(), "--dry-run", "--memory", "1.5035").stdout
    first, second = said.split("\nstage ")[1:]
    assert "it fits one GPU of 2 GB" in first
    assert "for one GPU of 2 GB, lower:" in second
    assert re.search(r"finetune.micro_batch_tokens=\d+ \(one row\) .* GB, which fits", second)

    for wrong in (["--memory"], ["--memory", "x"], ["--memory", "-1"], ["--memory", "nan"]):
        done = run("train.py", recipe(), "--dry-run", *wrong, ok=False)
        assert done.stderr.startswith("error: command line:--memory: ") and "; fix: " in done.stderr


# Models whose sizes are known, but whose config.json is not among the shared files.
LOOKED_UP = {
    "HuggingFaceTB/SmolLM3-3B",
    "google/gemma-3-1b-it",
    "google/siglip2-so400m-patch14-384",
    "meta-llama/Llama-3.2-1B-Instruct",
    "microsoft/Phi-4-mini-instruct",
    "Qwen/Qwen3-0.6B",
    "google/siglip2-base-patch16-naflex",
    # Of nanoVLM's models/config.py.
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "google/siglip2-base-patch16-512",
}


def test_a_recipe_whose_llm_gets_control_tokens_is_planned_without_its_tokenizer():
    """So many as a view's tokens and the three around them; a full SigLIP's config is nested."""
    recipe = ROOT / "recipes" / "smollm2-360m-siglip2-shuffle.toml"
    said = run("train.py", recipe, "--dry-run", "model.image_edge=2048", ok=False).stdout
    assert "; 67 tokens per image of one view, up to" in said
    assert "\nexports to: barellava, smolvlm, idefics3, gguf (" in said
    assert "not to llama.cpp" not in said
    said = run("train.py", recipe, "--dry-run", ok=False).stdout
    assert "\nexports to: barellava, smolvlm, idefics3 (" in said
    assert "\n  not to llama.cpp: --to gguf: pictures of one view: " in said


def test_known_models_are_planned_without_the_hub():
    """Each model of a published recipe has its sizes in the repository, those of its own file."""
    known = json.loads(planner.KNOWN.read_text())
    named = set()
    for file in (ROOT / "recipes").glob("*.toml"):
        model = config.load([str(file)], file)[0].model
        named |= {name for name in (model.llm, model.vision, model.vision2) if name}
    assert named | LOOKED_UP == set(known)
    for name in known.keys() - LOOKED_UP:
        fields = known[name]
        folder = name.replace("/", "--").removesuffix("-it")
        published = json.loads(shared(f"assets/configs/{folder}/config.json").read_text())
        for key, value in fields.items():
            if isinstance(value, dict):
                assert value.items() <= published[key].items(), (name, key)
            else:
                assert value == published[key], (name, key)


# ----------------------------------------------------------------------------------------- estimate


def rounded(model, tune, bf16=True):
    """Return a model as training has it in a stage."""
    set_trainable(model, tune)
    if bf16:
        round_frozen(model)
    return model


def test_what_is_counted_of_the_parameters():
    """Weights, gradients and moments are exact; each GPU of several has its share of them."""
    tune = Tune(llm="full")
    model = rounded(build(device="meta"), tune)
    stage = Stage(tune=tune, global_batch=8, micro_batch_tokens=200)
    row = RowSize(1, 15, 20, 10)
    needs = memory.measure(model, stage, row, bf16=True)
    lm, connector = count(model.language_model), count(model.connector)
    linears = {
        name: sum(m.weight.numel() for m in part.modules() if isinstance(m, torch.nn.Linear))
        for name, part in model.named_children()
    }
    # What is frozen is in bfloat16.
    assert needs.weights == 4 * count(model) - 2 * linears["vision_tower"]
    # Autocast copies biases, too.
    copied = 2 * (linears["language_model"] + linears["connector"])
    assert needs.copies == pytest.approx(copied, rel=0.05)
    assert needs.gradients == 4 * (lm + connector)
    assert needs.AdamW == 8 * (lm + connector)
    assert needs.total == sum(needs.by_kind.values())

    shard = memory.sharded(needs, model, 8)
    assert shard.weights == needs.weights / 8 and shard.AdamW == needs.AdamW / 8
    block = count(model.language_model.blocks[0])
    rest = count(model) - 3 * block
    assert shard.copies == 4 * (rest + 2 * block)

    quantized = replace(stage, tune=Tune(llm="qlora-nf4"))
    assert memory.weight_bytes(model, quantized) == needs.weights  # these train
    model = rounded(build(device="meta"), Tune())
    head = model.language_model.lm_head.weight.numel()
    in_blocks = linears["language_model"] - head
    packed = 0.516 * in_blocks + 2 * head + 4 * (lm - linears["language_model"])
    others = 4 * (count(model) - lm) - 2 * linears["vision_tower"]
    assert memory.weight_bytes(model, quantized) == pytest.approx(packed + others)


@pytest.mark.parametrize(
    "tune, bf16",
    [
        (Tune(llm="full", vision="full"), True),
        pytest.param(Tune(), False, marks=pytest.mark.full),
        pytest.param(Tune(llm="lora"), True, marks=pytest.mark.full),
    ],
)
def test_activations_are_what_triton_keeps(tune, bf16):
    """What autograd holds after forward, with Triton in the interpreter, is what is estimated."""
    kept, estimated = kept_and_estimated(tune, bf16)
    assert kept <= estimated <= 1.1 * kept


@pytest.mark.parametrize("tune", [Tune(), Tune(llm="full", vision="full")])
def test_recomputation_keeps_the_inputs_of_blocks(tune):
    """With gradient checkpointing a block more takes 4 D bytes a token more, its input."""
    peaks = []
    stage = Stage(tune=tune, global_batch=400, micro_batch_tokens=6000)
    row = RowSize(1, 15, 45, 8)
    for blocks in (4, 12):
        model = rounded(build(LLM | {"num_hidden_layers": blocks}, device="meta"), tune)
        model.language_model.model.gradient_checkpointing = True
        model.vision_tower.gradient_checkpointing = True
        needs = memory.measure(model, stage, row, bf16=True)
        peaks.append(needs.activations)
    assert peaks[1] - peaks[0] == pytest.approx(8 * 4 * 64 * 6000, rel=0.1)


def test_what_is_measured_without_values_is_not_kept():
    """Constants that were made while memory is measured have no values for what comes after."""
    constant.cache_clear()
    model = build(LLM, VISION)
    row = RowSize(views=1, positions=model.image_tokens, text=20, supervised=5)
    memory.measure(model, Stage(data="-"), row, bf16=True)
    pixels = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    processor = model.vision_tower.processor
    shown = processor.normalise(pixels)[0, :, 0, 0]
    wanted = [(0.2 - mean) / std for mean, std in zip(processor.mean, processor.std, strict=True)]
    assert shown.tolist() == pytest.approx(wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("tune", [Tune(), Tune(llm="full"), Tune(llm="full", vision="full")])
def test_the_estimate_is_what_a_gpu_allocates(tune):
    """The most that CUDA's allocator gives during a step, to 10 %."""
    text = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 32000}
    text |= {"num_attention_heads": 8, "num_hidden_layers": 8}
    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    stage = Stage(tune=tune, global_batch=64, micro_batch_tokens=8000)
    row = RowSize(1, 15, 485, 400)
    model = rounded(build(LLM | text, VISION | vision, device="meta"), tune)
    needs = memory.measure(model, stage, row, bf16=True)

    model = rounded(build(LLM | text, VISION | vision), tune).cuda()
    batch = memory.typical_batch(model, row, estimate.samples_of_micro_batch(stage, row)).to("cuda")
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        model.loss(batch).backward()
    expected = needs.weights + needs.gradients + needs.copies + needs.activations
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.1)


def kept_and_estimated(tune: Tune, bf16: bool) -> tuple[int, int]:
    """Return the bytes that autograd keeps of a micro-batch, and what is there when there is most.

    The second has in it what backward of the last operations takes. The model is deep and its
    vocabulary small, so that this is little.
    """
    text = LLM | {"num_hidden_layers": 6, "vocab_size": 64}
    # The default rank is twice this model's width: then backward of the adapters takes much, too.
    stage = Stage(tune=tune, global_batch=4, micro_batch_tokens=32, lora=LoRA(r=8))
    row = RowSize(1, 15, 17, 8)

    def made(device):
        model = build(text, VISION, device=device)
        peft.adapt(model, [stage], PARTS)
        return rounded(model, tune, bf16)

    needs = memory.measure(made("meta"), stage, row, bf16)

    model = made("cpu")
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = memory.typical_batch(model, row, estimate.samples_of_micro_batch(stage, row))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with kernels.pretending(), torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks:
        loss = model.loss(batch)
    assert loss.requires_grad
    return sum(kept.values()), int(needs.copies + needs.activations)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "tune",
    [
        Tune(),
        Tune(llm="full"),
        Tune(llm="full", vision="full"),
        Tune("partial:2", "frozen", "frozen"),
        Tune(vision="partial:1"),
    ],
)
def test_operations_are_those_that_torch_counts(tune, recompute):
    """Matrices wide, sequences short: attention, which the counter does not see, is below 1 %."""
    model = build(
        LLM
        | {
            "vocab_size": 16384,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_attention_heads": 8,
        },
        VISION | {"hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 6},
    )
    for part in (model.language_model.model, model.vision_tower):
        part.gradient_checkpointing = recompute
    set_trainable(model, tune)
    ids = torch.cat([torch.full((30,), IMAGE_TOKEN), torch.arange(9)])
    labels = torch.cat([torch.full((31,), -100), torch.arange(1, 9)])
    # Torch ends a recomputation at the last input that backward needs. The formula has the whole
    # block.
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        cu_seqlens = torch.tensor([0, 39], dtype=torch.int32)
        pixels = torch.rand(2, 3, 32, 32)
        loss = model.loss(
            Batch(ids, labels, torch.arange(39), cu_seqlens, 39, pixels, [ONE_VIEW] * 2, [])
        )
        loss.backward()
    work = estimate.operations(model, Stage(tune=tune), RowSize(2, 30, 9, 8), recompute)
    assert work == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_row_of_three_samples_is_three_times_the_work_of_one():
    one = RowSize(1, 9, 30, 8)
    three = replace(one, samples=3.0)
    model = build(device="meta")
    tune = Tune(llm="full")
    set_trainable(model, tune)
    stage = Stage(tune=tune, global_batch=4, micro_batch_tokens=4 * 39)
    works = [estimate.operations(model, stage, row, False) for row in (one, three)]
    assert works[1] == pytest.approx(3 * works[0])

    # Four samples are the step of one, and a third of the other's: then gradients are there.
    assert estimate.samples_of_micro_batch(stage, one) == 4
    assert estimate.samples_of_micro_batch(stage, three) == 4
    needs = [memory.measure(model, stage, row, bf16=True).total for row in (one, three)]
    assert needs[1] > needs[0]
    all_at_once = replace(stage, micro_batch_tokens=10**6)
    assert estimate.samples_of_micro_batch(all_at_once, three) == 12


def test_attention_grows_with_the_square_and_backward_is_two_and_a_half():
    model = build(device="meta")
    set_trainable(model, Tune(llm="full"))
    lm, heads = model.language_model, 3 * 64

    def work(tokens, causal, recompute=False):
        def operations(heads):
            part = lm.model, lm.blocks, heads, tokens
            return estimate.part_operations(*part, True, recompute, causal)

        return operations(heads) - operations(0)

    assert work(100, causal=False) == 4 * 100**2 * heads * 3.5
    assert work(100, causal=True) == 4 * 100**2 * heads * 3.5 / 2
    assert work(100, causal=True, recompute=True) == 4 * 100**2 * heads * 4.5 / 2
    assert work(200, causal=True) == 4 * work(100, causal=True)


def test_a_window_saves_what_its_layers_do_not_see():
    """The share of the causal pairs that are in the window, but for the diagonal."""
    for window in (1, 50, 300, 999, 1000, None):
        mask = torch.ones(1000, 1000).tril()
        pairs = mask.triu(1 - (window or 1000)).sum() / mask.sum()
        assert estimate.share_of_keys(window, 1000) == pytest.approx(float(pairs), abs=2e-3)


def test_both_encoders_of_a_mixture_are_counted():
    one, two = build(device="meta"), build(device="meta")
    two.vision_tower = nn.Module()
    two.vision_tower.clip, two.vision_tower.dinov2 = (
        build(device="meta").vision_tower for _ in range(2)
    )
    stage, row = Stage(), RowSize(1, 15, 20, 10)
    for model in (one, two):
        set_trainable(model, stage.tune)
    first, second = (estimate.operations(m, stage, row, True) for m in (one, two))
    tower = one.vision_tower
    encoder = estimate.part_operations(tower, tower.blocks, 48 * 3, 16, False, True)
    assert second - first == pytest.approx(encoder)


def test_the_largest_run_that_was_reported():
    """Phi-2 with SigLIP through both stages of `base` took about 12 hours on 8 A100-40G.

    That loop pads its batches (a third to a half of the tokens), where ours packs. It shards the
    model, which does not fit otherwise.
    """
    names = ("microsoft--phi-2", "google--siglip-so400m-patch14-384")
    llm, vision = (
        json.loads(shared(f"assets/configs/{name}/config.json").read_text()) for name in names
    )
    model = build(llm, vision, device="meta")
    r, _ = config.load([str(ROOT / "recipes/phi2-siglip-base.toml")], "x")
    hours = []
    for stage, rows in zip(r.stage.values(), (558_128, 665_298), strict=True):
        set_trainable(model, stage.tune)
        row = estimate.mean_row(None, stage.template, model.views)
        work = estimate.operations(model, stage, row, True)
        hours.append(estimate.hours(rows, work, estimate.GPUS["A100-40G"], 8))
    assert 6 < sum(hours) < 12

    # It does not fit 40 GB; sharded over eight of them it does.
    model.language_model.model.gradient_checkpointing = True
    needs = memory.measure(rounded(model, stage.tune), stage, row, bf16=True)
    assert 40 < needs.total / 1e9 < 80
    assert planner.fits(needs, model, 1, 40e9) is None
    assert planner.fits(needs, model, 8, 40e9) == "*"


def test_rows_that_are_none_do_not_stop_an_estimate(tmp_path):
    """Training names them, or leaves them out."""
    turns = [{"from": "human", "value": "<image>Who?"}, {"from": "gpt", "value": "A dog."}]
    good = {"image": "a.png", "conversations": turns}
    bad = [[1], {"id": 1}, {"messages": [{"role": "user"}, 7]}, {"image": 3, "caption": "x"}]
    views = Tiling(9)
    sizes = []
    for name, rows in (("good", [good]), ("some", [*bad, good]), ("none", bad)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        opened = open_rows(tmp_path / f"{name}.json")
        sizes.append(estimate.mean_row(opened, "plain", views))
    assert sizes[0] == sizes[1] and sizes[0].positions == 9
    assert sizes[2] == estimate.mean_row(None, "plain", views)
