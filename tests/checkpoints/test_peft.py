"""Adapters against PEFT: the same outputs and gradients, its files read, ours read by it."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
import lora
from checkpoints import hf_llava, layouts, tinyllava, weights
from checkpoints.names import rename, reverse
from checkpoints.peft import (
    ADAPTED,
    load_adapter,
    merge_adapter,
    merge_and_save_adapters,
    save_adapter,
)
from config import UserError
from connectors import build_connector
from encoders import build_encoder, vision_config
from model import FAMILIES, LanguageModel, LLaVA
from tests.tools.small_language_models import (
    CONFIGS,
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


def oracle(model, options, **more):
    """A copy of `model` with PEFT's adapters, all random."""
    peft = pytest.importorskip(
        "peft", reason="the oracle is a development dependency: pip install .[dev]"
    )
    config = {
        "r": options.r,
        "lora_alpha": options.alpha,
        "use_rslora": options.rslora,
        "use_dora": options.dora,
    }
    config |= {"target_modules": "all-linear", **more}
    return filled(peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)), 3)


FUSED = ("openelm", "phi3")  # one linear of their files is several of ours


@pytest.fixture(scope="module", params=[k for k in FAMILIES if k not in FUSED])
def family(request, tmp_path_factory):
    """A random model of transformers and the folder that ours is loaded from."""
    return random_model(request.param, tmp_path_factory.mktemp(request.param))


def random_model(kind, folder):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **(SIZES | CONFIGS[kind][1] | {"num_hidden_layers": 2})
    )
    model = filled(transformers.AutoModelForCausalLM.from_config(config).eval())
    model.save_pretrained(folder)
    return model, folder


def compare(ours, want, got, theirs, table=(), close=1e-5):
    """Outputs, and the gradients of all adapters; `table` has PEFT's names and ours."""
    assert (got - want).abs().max() <= close * want.abs().max()
    want.square().mean().backward()
    got.square().mean().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, p in ours.named_parameters():
        if p.requires_grad:
            module, _, kind = name.rpartition(".")
            path = rename(f"{module}.weight", reverse(table)).removesuffix(".weight")
            grad = grads.pop(f"base_model.model.{path}.{kind}.default.weight", None)
            if grad is None:
                grad = grads.pop(f"base_model.model.{path}.{kind}.default", None)
            assert (p.grad - grad).norm() <= close * grad.norm() and grad.norm() > 0, name
    assert not grads


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_every_gradient_equal_peft(family, kind, tmp_path):
    theirs, ours = oracle(family[0], KINDS[kind]), LanguageModel.from_pretrained(family[1])
    theirs.save_pretrained(tmp_path)
    linears = lora.targets(ours)
    assert load_adapter(tmp_path, ours) == linears  # every one but the head
    want, got = theirs(IDS).logits, ours(IDS)
    compare(ours, want, got, theirs, ours.rename)
    with theirs.disable_adapter(), torch.no_grad():
        assert (want - theirs(IDS).logits).abs().max() > 0.1 * want.std()  # the adapters matter
    lora.merge(ours)
    assert not lora.adapters(ours) and (ours(IDS) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_phi3s_fused_linears_becomes_one_of_each(kind, tmp_path):
    """Loaded and merged it is PEFT's; ours, of another rank in effect, cannot go back."""
    model, folder = random_model("phi3", tmp_path / "model")
    theirs, ours = oracle(model, KINDS[kind]), LanguageModel.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "adapter")
    linears = lora.targets(ours)
    assert load_adapter(tmp_path / "adapter", ours) == linears
    want = theirs(IDS).logits
    assert (ours(IDS) - want).abs().max() <= 1e-5 * want.abs().max()
    with theirs.disable_adapter(), torch.no_grad():
        assert (want - theirs(IDS).logits).abs().max() > 0.1 * want.std()
    with pytest.raises(UserError, match="one of several .*qkv_proj.*merge instead"):
        save_adapter(tmp_path, ours)
    lora.merge(ours)
    assert (ours(IDS) - want).abs().max() <= 1e-5 * want.abs().max()
    fused = weights.tensors(ours, ours.rename)
    model.load_state_dict(fused, strict=False)  # the merged weights, in their shapes
    assert (model(IDS).logits - want).abs().max() <= 1e-5 * want.abs().max()


def ours_of(name):
    if name == "openelm":
        return small(OPENELM), IDS
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if name == "vision":
        hf = {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 16,
            "image_size": 32,
        }
        return filled(build_encoder(vision_config(hf))), pixels
    options = {"num_queries": 4, "num_resampler_layers": 1} if name == "resampler" else {}
    return filled(build_connector(name, 32, 24, **options)), pixels.view(2, -1, 32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["openelm", "vision", "mlp2x_gelu", "resampler"])
def test_every_part_equals_peft(name, kind, tmp_path):
    """PEFT puts its adapters on our own modules, so that names are ours on both sides."""
    ours, x = ours_of(name)
    patterns = "model.**" if name == "openelm" else ""
    theirs = oracle(ours, KINDS[kind], target_modules=lora.targets(ours, patterns))
    theirs.save_pretrained(tmp_path)
    load_adapter(tmp_path, ours)
    compare(ours, theirs(x), ours(x), theirs)


def kind_of(family):
    """One of the three; every one has its turn."""
    return list(KINDS.values())[list(CONFIGS).index(family[0].config.model_type) % 3]


def test_patterns_and_modules_to_save_of_a_peft_file(family, tmp_path):
    names = [f"model.layers.1.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj")]
    final = "final_layernorm" if family[0].config.model_type == "phi" else "norm"
    more = {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {names[0]: 2},
        "alpha_pattern": {r"1.*k_proj": 3},
        "modules_to_save": [f"model.{final}"],
    }
    theirs, ours = (
        oracle(family[0], kind_of(family), **more),
        LanguageModel.from_pretrained(family[1]),
    )
    theirs.save_pretrained(tmp_path)
    load_adapter(tmp_path, ours)
    want = theirs(IDS).logits
    assert (ours(IDS) - want).abs().max() <= 1e-5 * want.abs().max()
    scales = {name: (a.options.r, a.options.alpha) for name, a in lora.adapters(ours).items()}
    assert scales[names[0]] == (2, 6.0) and scales[names[1]] == (4, 3)
    assert scales["model.layers.0.self_attn.q_proj"] == (4, 6.0)
    trained = {name.rpartition(".")[0] for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == {*scales, "model.norm"}


def test_our_files_load_in_peft(family, tmp_path):
    """Adapters of two ranks and a trained norm: the same logits there, and here again."""
    peft = pytest.importorskip("peft")
    ours, kind = LanguageModel.from_pretrained(family[1]), kind_of(family)
    lora.apply(ours, dataclasses.replace(kind, targets="q_proj"))
    lora.apply(ours, dataclasses.replace(kind, targets="layers.1.**.v_proj", r=3, alpha=5.0))
    ours.model.norm.requires_grad_(True)
    save_adapter(tmp_path, filled(ours, 5))
    base = copy.deepcopy(family[0])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    want = ours(IDS)
    with torch.no_grad():
        assert (theirs(IDS).logits - want).abs().max() <= 1e-5 * want.abs().max()
        with theirs.disable_adapter():  # what is in modules_to_save goes too
            assert torch.equal(theirs(IDS).logits, family[0](IDS).logits)
        assert (family[0](IDS).logits - want).abs().max() > 0.1 * want.std()
    again = LanguageModel.from_pretrained(family[1])
    load_adapter(tmp_path, again)
    assert torch.equal(again(IDS), want)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }


def test_a_llava_and_hugging_faces_exchange_adapters(tmp_path):
    """The LLaVA recipe in Hugging Face's names: LM adapted, connector trained in full."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ours = llava("mlp2x_gelu")
    export.export(ours, None, "hf-llava", tmp_path / "model")
    lora.apply(ours, PLAIN, ["language_model"])
    ours.vision_tower.requires_grad_(False)
    filled(ours, 2)
    save_adapter(tmp_path, ours, layouts.LAYOUTS["llava"].table[len(hf_llava.PROJECTOR) :])
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 9, -200, 17, 30]])
    token = theirs.base_model.model.config.image_token_id
    spread = torch.tensor([[5, 9, *[token] * ours.image_tokens, 17, 30]])
    with torch.no_grad():
        want = ours(ids, pixels).logits
        got = theirs(
            input_ids=spread, pixel_values=pixels, attention_mask=torch.ones_like(spread)
        ).logits
    assert (got[..., : want.size(-1)] - want).abs().max() <= 1e-4 * want.abs().max()
    again = LLaVA.from_pretrained(tmp_path / "model")
    load_adapter(tmp_path, again, layouts.LAYOUTS["llava"].table)
    assert (
        again(ids, pixels).logits[..., : want.size(-1)] - want
    ).abs().max() <= 1e-5 * want.abs().max()


# ------------------------------------------------------------------------------------- PEFT's files


def write_adapter(folder, tensors, **config):
    known = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def pair(path, rows, width, r=4):
    g = torch.Generator().manual_seed(0)
    return {
        f"base_model.model.{path}.lora_A.weight": torch.randn(r, width, generator=g),
        f"base_model.model.{path}.lora_B.weight": torch.randn(rows, r, generator=g),
    }


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_openelms_fused_linear_becomes_one_of_each(dora, tmp_path):
    lm = small(OPENELM)
    tensors = pair("transformer.layers.1.attn.qkv_proj", 12 * 16, 64)
    if dora:
        magnitude = torch.rand(12 * 16, generator=torch.Generator().manual_seed(1)) + 0.5
        tensors["base_model.model.transformer.layers.1.attn.qkv_proj.lora_magnitude_vector"] = (
            magnitude
        )
    A, B = list(tensors.values())[:2]
    attention = lm.model.layers[1].self_attn
    fused = torch.cat([getattr(attention, f"{x}_proj").weight for x in "qkv"]) + 6 / 4 * B @ A
    if dora:
        fused *= (magnitude / fused.norm(dim=1))[:, None]
    names = load_adapter(write_adapter(tmp_path, tensors, use_dora=dora), lm)
    assert names == [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    lora.merge(lm)
    merged = torch.cat([getattr(lm.model.layers[1].self_attn, f"{x}_proj").weight for x in "qkv"])
    assert (merged - fused).abs().max() <= 1e-5


def test_an_adapter_of_tinyllava_factory(tmp_path):
    model, name = llava("mlp2x_gelu"), "language_model.model.layers.1.mlp.up_proj"
    folder = write_adapter(tmp_path, pair(name, 94, 60))
    assert load_adapter(folder, model, layouts.LAYOUTS["tinyllava"].table) == [name]


def test_a_lora_folder_of_tinyllava_factory_loads_merged(tmp_path):
    """As it saves them: adapters above, base weights in three folders below.

    There adapted weights are called `.base_layer`, and the adapters' own names are among them.
    """
    model, folder = llava("mlp2x_gelu"), tmp_path / "factory"
    export.export(model, None, "tinyllava", folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "language_model.model.layers.1.mlp.up_proj"
    state[f"{name}.base_layer.weight"] = state.pop(f"{name}.weight")
    state |= {
        f"{name}.lora_A.default.weight": torch.zeros(4, 60),
        f"{name}.lora_B.default.weight": torch.zeros(94, 4),
    }
    for part, prefix in tinyllava.FOLDERS.items():
        mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        weights.save(folder / part, mine)
    low = pair(name, 94, 60)
    write_adapter(folder, low)
    loaded, wanted = LLaVA.from_pretrained(folder), model.state_dict()
    wanted[f"{name}.weight"] = (
        wanted[f"{name}.weight"] + 6 / 4 * [*low.values()][1] @ [*low.values()][0]
    )
    for k, v in loaded.state_dict().items():
        assert (v - wanted[k]).abs().max() <= 1e-6 * wanted[k].abs().max(), k
    write_adapter(folder, pair(name.replace("layers.1", "layers.9"), 94, 60))
    with pytest.raises(
        UserError, match="layers.9.mlp.up_proj.lora_A.weight: the model has no place for it"
    ):
        LLaVA.from_pretrained(folder)
    write_adapter(folder, low, use_dora=True)
    with pytest.raises(UserError, match="adapter_config.json:use_dora: not supported"):
        LLaVA.from_pretrained(folder)


def test_what_peft_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="0 kinds"):
        save_adapter(tmp_path, small())
    with pytest.raises(UserError, match="qkv_proj.weight: PEFT has no twin"):
        save_adapter(tmp_path, adapted(OPENELM))
    lm = adapted(LLAMA | {"tie_word_embeddings": True})
    lm.lm_head.requires_grad_(True)
    with pytest.raises(UserError, match="tied to the head"):
        save_adapter(tmp_path, lm)
    lm = small()
    lora.apply(lm, dataclasses.replace(PLAIN, targets="q_proj"))
    lora.apply(lm, dataclasses.replace(PLAIN, targets="v_proj", dora=True))
    with pytest.raises(UserError, match="2 kinds"):
        save_adapter(tmp_path, lm)
    assert not list(tmp_path.iterdir())


Q = "model.layers.0.self_attn.q_proj"
GOOD = pair(Q, 60, 60)


@pytest.mark.parametrize(
    "tensors, config, message",
    [
        (GOOD, {"peft_type": "LOHA"}, "peft_type: 'LOHA'"),
        (GOOD, {"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        (GOOD, {"bias": "lora_only"}, "bias: 'lora_only'"),
        (GOOD, {"use_qalora": True}, "use_qalora: True"),
        (GOOD, {"use_dora": True}, r"shapes .*\[0\]\], the model needs .*\[60\]\]"),
        (pair(Q, 61, 60), {}, r"needs \[\[4, 60\], \[60, 4\]"),
        (pair(Q, 60, 60) | {f"base_model.model.{Q}.lora_B.weight": torch.ones(60, 3)}, {}, "needs"),
        ({f"base_model.model.{Q}.lora_A.weight": torch.ones(4, 60)}, {}, "needs"),
        (
            GOOD | {f"base_model.model.{Q}.lora_B.bias": torch.ones(60)},
            {},
            "lora_B.bias: the model has no place",
        ),
        (pair("model.layers.9.self_attn.q_proj", 60, 60), {}, "layers.9.*: the model has no place"),
        (pair("lm_head", 131, 60), {}, "lm_head.*: the model has no place"),
        (
            GOOD | {"base_model.model.model.norm.weight": torch.ones(61)},
            {},
            r"shape \[61\], the model has \[60\]",
        ),
    ],
)
def test_an_adapter_that_is_not_this_models_is_refused(tensors, config, message, tmp_path):
    lm = small()
    with pytest.raises(UserError, match=message):
        load_adapter(write_adapter(tmp_path, tensors, **config), lm)
    assert not lora.adapters(lm)


def test_a_tied_head_that_was_saved_apart_is_refused(tmp_path):
    lm = small(LLAMA | {"tie_word_embeddings": True})
    folder = write_adapter(
        tmp_path, GOOD | {"base_model.model.lm_head.weight": torch.ones(131, 60)}
    )
    with pytest.raises(UserError, match="lm_head.weight: the model has no place"):
        load_adapter(folder, lm)


def test_a_damaged_adapter_file(tmp_path):
    folder = write_adapter(tmp_path, GOOD)
    (folder / "adapter_model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1"
    )
    with pytest.raises(UserError, match="Git LFS"):
        load_adapter(folder, small())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(folder, small())


CONFIG_MISTAKES = [
    ("lora_alpha", "16"),
    ("lora_alpha", float("nan")),
    ("lora_alpha", -1),
    ("lora_dropout", 1.5),
    ("lora_dropout", [0]),
    ("use_rslora", "yes"),
    ("use_dora", 1),
    ("alpha_pattern", ["q_proj"]),
    ("alpha_pattern", {"q_proj": "x"}),
    ("alpha_pattern", {"(": 1}),
    ("alpha_pattern", {"(a+)+b": 1}),
    ("alpha_pattern", {".*.*.*.*x": 1}),
    ("alpha_pattern", {f"m{i}": 1 for i in range(2001)}),
]


@pytest.mark.parametrize("key, value", CONFIG_MISTAKES)
def test_a_wrong_field_of_adapter_config_is_named(key, value, tmp_path):
    lm = small()
    with pytest.raises(UserError, match=f"adapter_config.json:{key}.*; fix: "):
        load_adapter(write_adapter(tmp_path, GOOD, **{key: value}), lm)
    assert not lora.adapters(lm)


A, B = (f"base_model.model.{Q}.lora_{matrix}.weight" for matrix in "AB")


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({A: torch.ones(()), B: torch.ones(60, 4)}, r"shape \[\]"),
        ({A: torch.ones(0, 60), B: torch.ones(60, 0)}, r"shape \[0, 60\]"),
        ({A: torch.full((4, 60), float("nan")), B: torch.ones(60, 4)}, "finite numbers"),
        ({A: torch.ones(4, 60).long(), B: torch.ones(60, 4)}, "finite numbers"),
    ],
)
def test_tensors_that_are_no_adapter_are_refused(tensors, message, tmp_path):
    lm = small()
    with pytest.raises(UserError, match=f"lora_A.weight: .*{message}"):
        load_adapter(write_adapter(tmp_path, tensors), lm)
    assert not lora.adapters(lm)


def test_no_adapter_is_merged_twice(tmp_path):
    """Not by training's own merge, by export's, nor in any layout that a model went through."""
    model = llava("mlp2x_gelu")
    lora.apply(model, PLAIN, ["language_model"])
    filled(model, 1)
    merged = merge_and_save_adapters(model, tmp_path, "base")
    merged.save(tmp_path / "run")
    weight = merged.language_model.model.layers[0].self_attn.q_proj.weight.clone()

    # Files that hold the same tensors in another order are the same adapter.
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = dict(reversed(load_file(file).items()))
    save_file(tensors, file, metadata={"format": "pt"})

    folder = tmp_path / "run"
    for layout in ("barellava", "tinyllava", "hf-llava"):
        loaded = LLaVA.from_pretrained(folder)
        for call in (load_adapter, lambda path, model, _: merge_adapter(model, path)):
            with pytest.raises(UserError, match="in the weights of the model already; fix: "):
                call(tmp_path / "adapter", loaded, ADAPTED)
        assert torch.equal(loaded.language_model.model.layers[0].self_attn.q_proj.weight, weight)
        export.export(loaded, None, layout, tmp_path / layout)
        folder = tmp_path / layout

    # Another adapter is welcome, and then it is noted, too.
    tensors = {key: 2 * tensor for key, tensor in tensors.items()}
    save_file(tensors, file)
    merge_adapter(loaded, tmp_path / "adapter")
    assert len(loaded.config.merged_adapters) == 2
    with pytest.raises(UserError, match="already"):
        merge_adapter(loaded, tmp_path / "adapter")
