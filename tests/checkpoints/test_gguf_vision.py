"""mmproj: what stands in the file is the model, and what llama.cpp cannot do is refused before."""

import sys

import pytest
import torch
import torch.nn.functional as F

from checkpoints import gguf_vision
from checkpoints.gguf_file import FILE_TYPES
from config import UserError
from inputs.tiling_split import mark_names
from tests.tools.small_llava import NAFLEX, SIDE, small

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'barellava[gguf]'")

WIDTH = {"hidden_size": 32, "num_attention_heads": 4}
SIGLIP = {"tower": "siglip", "feature_select": "cls_patch", "sizes": WIDTH}
SPLIT = SIGLIP | {
    "connector": "pixel_shuffle",
    "connector_options": {"factor": 3},
    "feature_layer": -1,
    "feature_norm": True,
    "image_mode": "split",
    "image_edge": 2 * SIDE,
    "processor": {"resample": 1},
    "image_marks": {name: [i] for i, name in enumerate(mark_names(2 * SIDE, SIDE))},
}
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read(path) -> tuple[dict, dict[str, torch.Tensor], dict[str, str]]:
    """Return the fields of a GGUF file, its tensors in float32, and the names of their types."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    types = {}
    for tensor in reader.tensors:
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        tensors[tensor.name] = values.view(tensor.shape[::-1].tolist())
        types[tensor.name] = tensor.tensor_type.name
    return fields, tensors, types


def encoder_tensors(model) -> dict[str, torch.Tensor]:
    """Return the encoder's tensors by the names that llama.cpp has for them."""
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_out",
        "layer_norm1": "ln1",
        "layer_norm2": "ln2",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
        "embeddings.patch_embedding": "patch_embd",
        "embeddings.position_embedding": "position_embd",
        "post_layernorm": "post_ln",
        "encoder.layers": "blk",
    }
    found = {}
    for name, tensor in model.vision_tower.state_dict().items():
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        found[f"v.{name}"] = tensor
    return found


def project(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return what llama.cpp's graph mlp makes of features: its GELU is x itself from 10 on."""
    x = F.linear(x, tensors["mm.0.weight"], tensors["mm.0.bias"])
    x = torch.where(x >= 10, x, F.gelu(x, approximate="tanh"))
    return F.linear(x, tensors["mm.2.weight"], tensors["mm.2.bias"])


@pytest.mark.parametrize("file_type", TYPES)
@pytest.mark.parametrize("connector", gguf_vision.MLP)
def test_the_file_has_the_tensors_of_the_model(connector, file_type, tmp_path):
    model = small(**SIGLIP, connector=connector, image_scale=0.5)
    gguf_vision.write(tmp_path / "mmproj.gguf", model, file_type)
    gguf_vision.check(tmp_path / "mmproj.gguf", model, file_type)
    _, tensors, types = read(tmp_path / "mmproj.gguf")

    # Matrices have the file's type; vectors and positions are exact in all.
    expected = encoder_tensors(model)
    for name, tensor in expected.items():
        if tensor.dim() > 1 and "position" not in name:
            tensor = tensor.to(TYPES[file_type]).float()
        assert torch.equal(tensors[name], tensor), name
    assert types["v.blk.0.attn_q.weight"] == FILE_TYPES[file_type][1]
    added = sorted(tensors.keys() - expected.keys())
    assert added == ["mm.0.bias", "mm.0.weight", "mm.2.bias", "mm.2.weight"]

    # The connector and the factor on its output, together.
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) * 20
    ours = model.connector(x).detach() * 0.5
    tolerance = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 0.2}[file_type]
    if connector in gguf_vision.SHIFTED:
        tolerance = 1e-4
    torch.testing.assert_close(project(tensors, x), ours, rtol=0, atol=tolerance)


def test_the_fields_of_the_graph_mlp(tmp_path):
    model = small(**SIGLIP, connector="linear")
    gguf_vision.write(tmp_path / "mmproj.gguf", model, "float16")
    fields, _, _ = read(tmp_path / "mmproj.gguf")
    expected = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": True,
        "clip.vision.image_size": SIDE,
        "clip.vision.patch_size": 4,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 48,
        "clip.vision.block_count": 2,  # of the 3, feature_layer -2 needs so many
        "clip.vision.feature_layer": [2],
        "clip.vision.attention.head_count": 2,
        "clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-6),
        "clip.vision.projection_dim": 32,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
        "clip.vision.image_grid_pinpoints": [0, 0],
    }
    assert {name: fields[name] for name in fields if not name.startswith("GGUF.")} == expected


def test_the_graph_of_smolvlm(tmp_path):
    model = small(**SPLIT)
    gguf_vision.write(tmp_path / "mmproj.gguf", model, "float32")
    fields, tensors, _ = read(tmp_path / "mmproj.gguf")
    assert fields["clip.projector_type"] == "idefics3"
    assert fields["clip.vision.projector.scale_factor"] == 3
    assert fields["clip.vision.preproc_image_size"] == 2 * SIDE
    assert fields["clip.vision.block_count"] == 3
    assert "clip.vision.feature_layer" not in fields

    expected = encoder_tensors(model) | {"mm.model.fc.weight": model.connector.proj.weight}
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    assert "v.post_ln.weight" in tensors


def test_the_factor_on_the_output_is_not_rounded_to_the_models_type(tmp_path):
    model = small(**SIGLIP, image_scale=0.3).bfloat16()
    gguf_vision.write(tmp_path / "mmproj.gguf", model, "float32")
    _, tensors, _ = read(tmp_path / "mmproj.gguf")
    assert torch.equal(tensors["mm.2.weight"], model.connector[2].weight.float() * 0.3)


def test_an_mlp_of_one_width_is_written_swapped(tmp_path):
    # llama.cpp swaps its two halves where it cannot tell them apart.
    model = small(**SIGLIP, vision={"intermediate_size": 32})
    gguf_vision.write(tmp_path / "mmproj.gguf", model, "float32")
    _, tensors, _ = read(tmp_path / "mmproj.gguf")
    mlp = model.vision_tower.blocks[0].mlp
    assert torch.equal(tensors["v.blk.0.ffn_down.weight"], mlp.fc1.weight)
    assert torch.equal(tensors["v.blk.0.ffn_up.bias"], mlp.fc2.bias)


def test_quick_gelu_is_said_by_silence(tmp_path):
    model = small(**SIGLIP, vision={"hidden_act": "quick_gelu"})
    gguf_vision.write(tmp_path / "mmproj.gguf", model, "float32")
    fields, _, _ = read(tmp_path / "mmproj.gguf")
    assert "clip.use_gelu" not in fields


ONE_VIEW = {"image_edge": SIDE}
LONG_BREAK = {"image_marks": SPLIT["image_marks"] | {"\n\n": [2, 2]}}
REFUSED = {
    "first patch": (
        SIGLIP | {"feature_select": "patch"},
        'feature_select = "cls_patch"',
    ),
    "clip": (
        {"feature_select": "cls_patch"},
        "CLIP",
    ),
    "dinov2": (
        {"vision": {"model_type": "dinov2"}},
        "dinov2",
    ),
    "naflex": (
        NAFLEX,
        "siglip2_vision_model",
    ),
    "erf": (
        SIGLIP | {"vision": {"hidden_act": "gelu"}},
        "hidden_act gelu",
    ),
    "no layer": (
        SIGLIP | {"feature_layer": 0},
        "feature_layer",
    ),
    "mlp3x": (
        SIGLIP | {"connector": "mlp3x_gelu"},
        "mlp3x_gelu",
    ),
    "resampler": (
        SIGLIP | {"connector": "resampler"},
        "resampler",
    ),
    "mean": (
        SIGLIP | {"connector": "mean_mlp2x_gelu"},
        "mean_mlp2x_gelu",
    ),
    "pad": (
        SIGLIP | {"image_mode": "pad"},
        "image mode pad",
    ),
    "tiles": (
        SIGLIP | {"image_mode": "tiles"},
        "image mode tiles",
    ),
    "bilinear": (
        SIGLIP | {"processor": {"resample": 2}},
        "bilinear",
    ),
    "square": (
        SPLIT | {"image_mode": "square"},
        "image mode square",
    ),
    "InternVL's": (
        SPLIT | {"connector_options": {"factor": 3, "mlp_depth": 2}},
        "mlp_depth = 1",
    ),
    "bicubic": (
        SPLIT | {"processor": {}},
        "bicubic: llama.cpp has lanczos with split",
    ),
    "one view": (
        SPLIT | ONE_VIEW,
        "pictures of one view",
    ),
    "parts of views": (
        SPLIT | {"image_edge": 2 * SIDE - 2},
        "image_edge = 24",
    ),
    "line breaks": (
        SPLIT | LONG_BREAK,
        r"'\n\n' of several tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_do_is_refused_before_anything_is_written(case, tmp_path):
    settings, words = REFUSED[case]
    model = small(**settings)
    with pytest.raises(UserError) as refusal:
        gguf_vision.write(tmp_path / "mmproj.gguf", model, "float32")
    (line,) = str(refusal.value).splitlines()
    assert line.startswith("--to gguf: ") and "; fix: " in line
    assert words in line
    assert not list(tmp_path.iterdir())


def test_another_model_is_found_out(tmp_path):
    gguf_vision.write(tmp_path / "mmproj.gguf", small(**SIGLIP), "q8_0")
    gguf_vision.check(tmp_path / "mmproj.gguf", small(**SIGLIP), "q8_0")
    with pytest.raises(UserError, match=r"mmproj.gguf:v.patch_embd.weight: not what the model"):
        gguf_vision.check(tmp_path / "mmproj.gguf", small(**SIGLIP, seed=1), "q8_0")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"--to gguf: the package gguf.*; fix: pip install"):
        gguf_vision.write(tmp_path / "mmproj.gguf", small(**SIGLIP), "float32")
