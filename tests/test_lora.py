"""Adapters and quantized linears: their arithmetic, their targets, and runs that train them.

tests/checkpoints/test_peft.py compares adapters with PEFT's, and its files with ours.
"""

import dataclasses
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import config
import lora
from checkpoints import weights
from checkpoints.files import write_file
from checkpoints.peft import ROOT
from config import LoRA, UserError
from demo import world
from kernels import int8, nf4
from kernels.lora import keep_mask
from model import LanguageModel, LLaVA
from tests.tools.environment import run, shared
from tests.tools.small_language_models import (
    IDS,
    KINDS,
    LLAMA,
    OPENELM,
    PLAIN,
    SIZES,
    adapted,
    filled,
    llava,
    small,
)
from tests.tools.training_runs import RECIPE, scripted

Q = "model.layers.0.self_attn.q_proj"


# -------------------------------------------------------------------------------- the module itself


def test_an_adapter_changes_nothing_at_first_and_starts_as_pefts():
    base, x = torch.nn.Linear(300, 40), torch.randn(5, 300)
    for kind in (lora.LoRALinear, lora.DoRALinear):
        torch.manual_seed(1)
        module = kind(base, LoRA(r=16)).eval()
        assert (module(x) - base(x)).abs().max() <= 1e-5 and not module.lora_B.any()
        torch.manual_seed(1)
        assert torch.equal(
            module.lora_A, torch.nn.init.kaiming_uniform_(torch.empty(16, 300), a=5**0.5)
        )


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_one_mask_per_call(dora):
    torch.manual_seed(0)
    make = lora.DoRALinear if dora else lora.LoRALinear
    m = filled(make(torch.nn.Linear(40, 30), LoRA(r=4, alpha=6.0, dropout=0.3)), 1)
    m.base_layer.requires_grad_(False)
    x = torch.randn(7, 40)
    torch.manual_seed(5)
    got, other = m(x), m(x)
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,))[0]
    W, (A, B) = m.base_layer.weight, (m.lora_A, m.lora_B)
    norm = m.lora_magnitude_vector / (W + 1.5 * B @ A).norm(dim=1) if dora else 1
    want = (
        norm * (x @ W.T + 1.5 * (x * keep_mask(seed, 7, 40, 0.3) / 0.7) @ A.T @ B.T)
        + m.base_layer.bias
    )
    assert (got - want).abs().max() <= 1e-5 and not torch.equal(got, other)
    state = torch.get_rng_state()
    plain = norm * (x @ W.T + 1.5 * x @ A.T @ B.T) + m.base_layer.bias
    assert (m.eval()(x) - plain).abs().max() <= 1e-5
    assert (m.train().requires_grad_(False)(x) - plain).abs().max() <= 1e-5  # nothing to regularise
    assert torch.equal(torch.get_rng_state(), state)  # and nothing drawn


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    m = filled(lora.LoRALinear(torch.nn.Linear(64, 8), LoRA(r=4, alpha=4.0, dropout=0.3)), 1)
    x, plain = torch.randn(1, 64), m.eval()(torch.zeros(1, 64))
    with torch.no_grad():
        plain = m(x)
        many = torch.cat([m.train()(x) for _ in range(2000)])
    error = (many.mean(0) - plain[0]) / (many.std(0) / 2000**0.5)
    assert error.abs().max() < 4.5 and many.std(0).min() > 0.05


def test_gradient_checkpointing_draws_the_same_masks():
    grads = []
    for recompute in (False, True):
        lm = adapted(options=dataclasses.replace(PLAIN, dropout=0.2))
        lm.model.gradient_checkpointing = recompute
        torch.manual_seed(3)
        lm.train()(IDS).square().mean().backward()
        grads.append({n: p.grad for n, p in lm.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0]) and len(grads[0]) == 42


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_and_with_bf16_weights(kind):
    lm = adapted(options=KINDS[kind])
    want = lm(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        got = lm(IDS)
        got.float().square().mean().backward()
    assert 0 < ((got - want).norm() / want.norm()) <= 3e-2
    assert {p.grad.dtype for p in lm.parameters() if p.requires_grad} == {torch.float32}
    for p in lm.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    assert ((lm(IDS) - want).norm() / want.norm()) <= 3e-2
    lora.merge(lm)
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}


def test_doras_norm_is_not_rounded_by_autocast():
    torch.manual_seed(0)
    m, x = (
        filled(
            lora.DoRALinear(torch.nn.Linear(64, 32, bias=False), LoRA(r=8, alpha=16.0)), 1
        ).eval(),
        torch.randn(9, 64),
    )
    factor = m.lora_magnitude_vector / (m.base_layer.weight + 2 * m.lora_B @ m.lora_A).norm(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(m(x), m.product(x, None) * factor.bfloat16())


# ---------------------------------------------------------------------------------------- quantized


@pytest.mark.parametrize("kind, module", [("nf4", nf4), ("int8", int8)])
@pytest.mark.parametrize("options", [None, *KINDS.values()], ids=["bare", *KINDS])
def test_quantized_forward_and_gradients_are_the_dequantized_products(kind, module, options):
    torch.manual_seed(0)
    holder = torch.nn.Sequential(torch.nn.Linear(96, 40))
    q = module.quantize(holder[0].weight)
    W, b = module.dequantize(q, torch.float32), holder[0].bias.detach().clone()
    lora.quantize(holder, kind)
    if options:
        lora.apply(holder, options)
        filled(holder, 1)
    m, x = holder[0], torch.randn(3, 5, 96, requires_grad=True)
    y = holder(x)
    (got,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    plain = torch.nn.Linear(96, 40)
    with torch.no_grad():
        plain.weight.copy_(W)
        plain.bias.copy_(b)
    trained = [p for p in m.parameters() if p.requires_grad]
    if options:
        other = (lora.DoRALinear if options.dora else lora.LoRALinear)(plain, options)
        other.load_state_dict(
            {k: v for k, v in m.state_dict().items() if "lora" in k}, strict=False
        )
        plain = other
    want = plain(x)
    assert (y - want).abs().max() <= 1e-5
    (wanted,) = torch.autograd.grad(want.square().sum(), x, retain_graph=True)
    assert (got - wanted).abs().max() <= 1e-4

    # A, B, and DoRA's magnitude.
    if options is None:
        assert not trained
    else:
        assert len(trained) == (3 if options.dora else 2)
        same = [p for n, p in plain.named_parameters() if "lora" in n]
        ours = torch.autograd.grad(y.square().sum(), trained)
        theirs = torch.autograd.grad(want.square().sum(), same)
        for a, c in zip(ours, theirs, strict=True):
            assert (a - c).norm() <= 1e-5 * c.norm() and c.norm() > 0

    lora.merge(holder, torch.float32)
    assert type(holder[0]) is torch.nn.Linear and (holder(x) - want).abs().max() <= 1e-5


def test_the_kernel_takes_a_linear_without_an_adapter():
    from kernels.lora import triton_linears

    q, x = nf4.quantize(torch.randn(40, 64)), torch.randn(3, 64, requires_grad=True)
    (y,) = triton_linears(
        x, [q], [None], [x.new_empty(0, 64)], [x.new_empty(40, 0)], [0.0], 0.0, None
    )
    W = nf4.dequantize(q, torch.float32)
    assert (y - x @ W.T).abs().max() <= 1e-5
    assert (torch.autograd.grad(y.sum(), x)[0] - W.sum(0)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind, module", [("nf4", nf4), ("int8", int8)])
def test_the_state_dict_is_bitsandbytes_and_loads_again(kind, module):
    lm = small(OPENELM)
    q, name = module.quantize(lm.model.layers[0].mlp.up_proj.weight), "model.layers.0.mlp.up_proj."
    lora.quantize(lm, kind)
    state = lm.state_dict()
    got = {k.removeprefix(name): t for k, t in state.items() if k.startswith(name)}
    assert got.keys() == q.state().keys() and all(
        torch.equal(got[k], t) for k, t in q.state().items()
    )
    assert state["lm_head.weight"].dtype == torch.float32
    other = filled(LanguageModel.from_hf(OPENELM), 9)
    lora.quantize(other, kind)
    other.load_state_dict(state)
    assert torch.equal(other(IDS), lm(IDS))
    del state[f"{name}weight"], state[f"{name}{'weight.absmax' if kind == 'nf4' else 'SCB'}"]
    state = {k: t for k, t in state.items() if not k.startswith(name)}
    with pytest.raises(RuntimeError, match=f"{name}weight"):
        other.load_state_dict(state)


class Watched(dict):
    """A checkpoint that knows how many of its matrices are alive at once."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.alive, self.most = weakref.WeakSet(), 0

    def __getitem__(self, key):
        assert key != "other"  # another part's
        tensor = super().__getitem__(key).clone()
        if tensor.dim() == 2 and "embed" not in key:
            self.alive.add(tensor)
            self.most = max(self.most, len(self.alive))
        return tensor


@pytest.mark.parametrize("hf", [LLAMA, OPENELM], ids=["llama", "openelm"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loading_quantized_is_loading_and_then_quantizing(kind, hf):
    lm = small(hf | {"tie_word_embeddings": True})
    source = Watched(
        {f"part.{k}": t.bfloat16() for k, t in weights.tensors(lm, lm.rename).items()}
        | {"other": IDS}
    )
    with weights.empty():
        got = LanguageModel.from_hf(hf | {"tie_word_embeddings": True})
    used = lora.load_quantized(got, source, lm.rename, "part.", kind, torch.float32)
    assert (
        used == set(source) - {"other"} and source.most <= 2
    )  # the one at hand, and the one just read
    lm.bfloat16().float()
    names = lora.targets(lm)
    for name in names:
        linear = lm.get_submodule(name)
        linear.weight.data = linear.weight.data.bfloat16()
    lora.quantize(lm, kind)
    assert len(names) == 7 * len(lm.model.layers) and torch.equal(got(IDS), lm(IDS))
    assert (
        got.lm_head.weight is got.model.embed_tokens.weight
        and got.lm_head.weight.dtype == torch.bfloat16
    )
    assert got.model.norm.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in got.parameters())


def test_a_quantized_model_takes_a_training_step():
    lm = small()
    lora.quantize(lm, "nf4")
    lora.apply(lm, PLAIN)
    optimizer = torch.optim.SGD([p for p in lm.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(3):
        losses.append(F.cross_entropy(lm(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]
    lora.merge(lm)
    assert {lm.get_submodule(name).weight.dtype for name in lora.targets(lm)} == {torch.bfloat16}


def test_weights_that_cannot_be_quantized_are_named():
    lm = small()
    source = weights.tensors(lm)
    lm.get_submodule(Q).weight[3, 4] = 1e5
    with weights.empty():
        got = LanguageModel.from_hf(LLAMA)
    with pytest.raises(
        UserError, match=f"checkpoint:{Q}.weight: a weight is not finite in float16"
    ):
        lora.load_quantized(got, source, kind="int8")
    source[f"{Q}.weight"] = torch.ones(61, 60)
    with pytest.raises(UserError, match=rf"{Q}.weight: shape \[61, 60\]"):
        lora.load_quantized(got, source)


# ------------------------------------------------------------------------------ which, and resuming


def test_targets_are_named_as_we_or_hugging_face_do():
    phi = small({"model_type": "phi", **SIZES, "num_attention_heads": 5, "num_key_value_heads": 5})
    layers = [f"model.layers.{i}" for i in range(3)]
    dense = [f"{x}.self_attn.o_proj" for x in layers]
    assert (
        lora.targets(phi, "o_proj")
        == lora.targets(phi, "dense")
        == lora.targets(phi, "**.self_attn.dense")
        == dense
    )
    assert lora.targets(phi, "model.layers.1.mlp.*") == [
        "model.layers.1.mlp.fc1",
        "model.layers.1.mlp.fc2",
    ]
    assert lora.targets(phi, "q_proj, v_proj") == [
        f"{x}.self_attn.{n}_proj" for x in layers for n in "qv"
    ]
    openelm = small(OPENELM)
    assert lora.targets(openelm, "qkv_proj") == [
        f"{x}.self_attn.{n}_proj" for x in layers[:2] for n in "qkv"
    ]
    assert len(lora.targets(phi)) == 18
    with pytest.raises(UserError, match="the linears here .*: none"):
        lora.targets(adapted())  # what lies under an adapter has one


@pytest.mark.parametrize("pattern", ["qproj", "q_proj,gate", "lm_head", "model.layers.7.**", "roj"])
def test_a_pattern_that_matches_nothing_is_an_error(pattern):
    lm = small()
    wrong = pattern.rpartition(",")[2].replace("*", r"\*")
    with pytest.raises(
        UserError, match=f"'{wrong}' matches no linear; fix: the linears here .*q_proj"
    ):
        lora.apply(lm, dataclasses.replace(PLAIN, targets=pattern))
    assert not lora.adapters(lm)


def test_options_out_of_range():
    for wrong in ({"r": 0}, {"dropout": 1.0}, {"dropout": -0.1}):
        with pytest.raises(UserError, match="lora: r "):
            lora.apply(small(), dataclasses.replace(PLAIN, **wrong))


def test_parts_of_a_llava():
    model = llava("linear")
    names = lora.apply(
        model,
        dataclasses.replace(PLAIN, targets="q_proj,connector"),
        ["language_model", "connector"],
    )
    assert names == [f"language_model.model.layers.{i}.self_attn.q_proj" for i in range(3)] + [
        "connector"
    ]
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "vision" not in n}
    assert trained == {f"{n}.lora_{x}" for n in names for x in "AB"}
    assert all(
        p.requires_grad for p in model.vision_tower.parameters()
    )  # not asked for, not touched
    filled(model, 1)
    pixels, ids = torch.randn(1, 3, 32, 32), torch.tensor([[5, -200, 7]])
    want = model(ids, pixels).logits
    lora.merge(model)
    assert (model(ids, pixels).logits - want).abs().max() <= 1e-5 * want.abs().max()
    assert {f"{part}.{k}" for part in model.PARTS for k in getattr(model, part).state_dict()} == {
        f"{part}.{k}" for part in model.PARTS for k in getattr(llava("linear"), part).state_dict()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["", "nf4", "int8"])
def test_what_trains_is_enough_to_resume(kind, how):
    """train.py keeps the parameters that require gradients; a new start puts them on the base."""

    def fresh():
        lm = small()
        if how:
            lora.quantize(lm, how)
        lora.apply(lm, KINDS[kind])
        return lm

    lm = filled(fresh(), 4)
    state = {n: p.detach().clone() for n, p in lm.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in state} == {"lora_A", "lora_B"} | (
        {"lora_magnitude_vector"} if kind == "dora" else set()
    )
    other = fresh()
    with torch.no_grad():
        for n, p in other.named_parameters():
            if p.requires_grad:
                p.copy_(state.pop(n))
    assert not state and torch.equal(other(IDS), lm(IDS))


def test_training_moves_the_adapters_alone_and_merges_them(tmp_path):
    """tune.llm = "lora": plain linears, only the adapted ones moved, and PEFT's files."""
    world.write(tmp_path / "world", scenes=60)
    file, out = tmp_path / "r.toml", tmp_path / "out"
    file.write_text(RECIPE.format(world=tmp_path / "world", out=out))
    tune = [
        "stage.finetune.tune.llm=lora",
        "stage.finetune.tune.vision=frozen",
        "stage.finetune.lora.r=4",
    ]
    run(
        "train.py",
        file,
        *tune,
        "stage.pretrain.tune.llm=frozen",
        "stage.pretrain.tune.vision=frozen",
    )
    made = LLaVA.from_pretrained(out)
    recipe = config.load([str(file), *tune], file)[0]
    start = LLaVA.from_parts(recipe.model, "plain", recipe.train.seed)
    moved = {k for k, v in made.state_dict().items() if not torch.equal(v, start.state_dict()[k])}
    linears = set(lora.targets(start.language_model))
    wanted = {f"language_model.{name}.weight" for name in linears}
    assert wanted == {k for k in moved if k.startswith("language_model.")}
    assert not any(k.startswith("vision_tower.") for k in moved)
    assert {f.name for f in (out / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    run("export.py", "--model", out, "--to", "peft", tmp_path / "peft")
    for file in (out / "adapter").iterdir():
        assert (tmp_path / "peft" / file.name).read_bytes() == file.read_bytes()
    start.save(
        tmp_path / "start"
    )  # before the pretrain stage, which trains the connector alone: it is in the adapter
    arguments = (
        "--model",
        tmp_path / "start",
        "--adapter",
        out / "adapter",
        "--to",
        "barellava",
        tmp_path / "merged",
    )
    run("export.py", *arguments)
    merged = LLaVA.from_pretrained(tmp_path / "merged").state_dict()
    assert all((merged[k] - v).abs().max() <= 1e-6 for k, v in made.state_dict().items())
    wrong = run(
        "export.py", "--model", tmp_path / "start", "--to", "peft", tmp_path / "none", ok=False
    )
    assert (
        "no adapters; fix: give the output folder of a run that tuned something as lora"
        in wrong.stderr
    )


STOP = """
import os, signal
from training import run_log
def step(self, n, *rest, real=run_log.RunLog.step):
    real(self, n, *rest)
    if (self.name, n) == ("finetune", 5):
        os.kill(os.getpid(), signal.SIGTERM)
run_log.RunLog.step = step
"""


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_on_a_quantized_model(kind, tmp_path):
    """tune.llm = "qlora-KIND": quantized as it is read, resumed as if never stopped, merged."""
    world.write(tmp_path / "world", scenes=60)
    file, lm = tmp_path / "r.toml", tmp_path / "lm"
    file.write_text(RECIPE.format(world=tmp_path / "world", out=tmp_path / "whole"))
    recipe = config.load([str(file)], file)[0]
    whole = LLaVA.from_parts(recipe.model, "plain")
    state = {k: t.bfloat16() for k, t in weights.tensors(whole.language_model).items()}
    weights.save(lm, state)
    write_file(lm / "config.json", json.dumps(recipe.model.llm_config))
    own = [
        f"model.llm={lm}",
        "model.llm_config={}",
        f"stage.finetune.tune.llm=qlora-{kind}",
        "stage.finetune.lora.r=4",
        "stage.finetune.tune.vision=frozen",
        "stage.pretrain.tune.llm=frozen",
        "stage.pretrain.steps=2",
        "stage.finetune.steps=8",
    ]
    run("train.py", file, *own)
    out = tmp_path / "resumed"
    scripted(STOP, file, *own, f"train.output={out}", ok=True)
    assert (out / "PREEMPTED").exists()
    run("train.py", file, *own, f"train.output={out}")
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()

    made, module = LLaVA.from_pretrained(out).language_model, {"nf4": nf4, "int8": int8}[kind]
    made.requires_grad_(False)
    trained = load_file(out / "adapter" / "adapter_model.safetensors")
    for name in lora.targets(made):
        A, B = (trained[f"{ROOT}model.language_model.{name[6:]}.lora_{x}.weight"] for x in "AB")
        base = module.dequantize(module.quantize(state[f"{name}.weight"]), torch.float32)
        want = base + 256 / 4 * B @ A
        assert (made.get_submodule(name).weight - want).abs().max() <= 1e-6 and not torch.equal(
            want, base
        )
    assert torch.equal(made.model.embed_tokens.weight, state["model.embed_tokens.weight"].float())


REAL = """
import json, resource, sys, time
import torch
import lora
from checkpoints import weights
from config import LoRA
from kernels.cross_entropy import linear_cross_entropy
from model import LanguageModel
from packing import packed_attention
from pathlib import Path
folder, kind = Path(sys.argv[1]), sys.argv[2]
hf = json.loads((folder / "config.json").read_text())
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
if kind == "write":
    lm = LanguageModel.from_hf(hf).bfloat16()
    weights.save(folder, weights.tensors(lm, lm.rename))
    sys.exit()
before = peak()
with weights.empty():
    lm = LanguageModel.from_hf(hf)
lora.load_quantized(lm, weights.Checkpoint(folder), lm.rename, kind=kind, dtype=torch.float32)
loading = peak() - before
held = sum(t.nbytes for t in [*lm.buffers(), *lm.parameters()])
quantized = [m for m in lm.blocks[0].modules() if isinstance(m, lora.Quantized)]
layer = sum(2 * m.in_features * m.out_features for m in quantized)
lora.apply(lm, LoRA(r=8, dropout=0.0))
lm.model.gradient_checkpointing = True
optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], 1e-3)
ids = torch.arange(1, 25)
labels = torch.cat([ids[1:], ids.new_full((1,), -100)])
losses = []
for _ in range(2):
    attend = packed_attention(torch.tensor([0, 24], dtype=torch.int32), 24)
    hidden = lm.model(lm.model.embed(ids), torch.arange(24), attend)
    loss = linear_cross_entropy(hidden, lm.lm_head.weight, None, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(json.dumps({"held": held, "layer": layer, "loading": loading, "losses": losses}))
"""


@pytest.mark.full
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_real_size_loads_quantized_without_ever_being_whole(kind, tmp_path):
    """Qwen2.5-0.5B: at most 1.2 times quantized weights, one layer in bfloat16 and 300 MB."""
    (tmp_path / "config.json").write_text(
        shared("assets/configs/Qwen--Qwen2.5-0.5B/config.json").read_text()
    )
    run("-c", REAL, tmp_path, "write")
    found = json.loads(run("-c", REAL, tmp_path, kind).stdout)
    print(f"{kind}: {found}", flush=True)
    assert found["loading"] <= 1.2 * (found["held"] + found["layer"] + 300e6)
    assert found["losses"][1] < found["losses"][0]
