"""Connectors against TinyLLaVA's features, by its weights, and against arithmetic spelled out."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from checkpoints import weights
from config import UserError
from connectors import CONNECTORS, build_connector, connector_tokens
from tests.tools.environment import shared

# Options that keep the large ones small; a new connector with options adds its own here.
SMALL = {
    "resampler": {"num_queries": 5, "num_resampler_layers": 2},
    "naiveresampler": {"num_queries": 5, "num_resampler_layers": 2},
    "groupresampler": {"num_queries": 6, "num_resampler_layers": 1, "group": 3},
    "qformer": {
        "num_queries": 5,
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 20,
    },
}


def make(spec, vision_dim=7, text_dim=11, **options):
    torch.manual_seed(0)
    return build_connector(
        spec, vision_dim, vision_dim if spec == "identity" else text_dim, **options
    )


def features(spec, n=6, vision_dim=7):
    torch.manual_seed(1)
    return torch.randn((2, 2, n, vision_dim) if spec == "mof_mlp" else (2, n, vision_dim))


@pytest.mark.parametrize(
    "case, spec",
    [
        ("tinyllama-mof-mof_mlp", "mof_mlp"),
        ("stablelm-clip-resampler", "resampler"),
        ("gemma-siglip-qformer", "qformer"),
        ("qwen2-siglip-linear", "linear"),
        ("qwen2-clip-mlp-cls_patch", "mlp1x_gelu"),
        ("tinyllama-clip-mlp2x_gelu", "mlp2x_gelu"),
        ("openelm-dinov2-mlp3x_gelu", "mlp3x_gelu"),
    ],
)
def test_features_are_tinyllavas(case, spec):
    folder = shared(f"golden/{case}")
    config, io = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "io.safetensors"),
    )
    prefix, source = "connector._connector.", weights.Checkpoint(folder)
    sizes = config | config.get("qformer_config", {}) if spec in ("resampler", "qformer") else {}
    options = {name: sizes[name] for name in CONNECTORS[spec].options}  # they have Factory's names
    x, want = io["vision_features"], io["connector_features"]
    if spec == "mof_mlp":
        x = torch.stack([x, io["vision_features2"]], 1)
    with weights.empty():
        connector = build_connector(spec, x.size(-1), want.size(-1), **options)
    weights.load(connector, source, prefix=prefix)
    ours = connector(x)

    # The reference rounds, too. The Q-Former makes a thousand times as much of a rounding, so there
    # the reference itself is further than 2e-5 from the exact numbers. Ours may differ from it by
    # that distance, never by more than the 1e-4 that all golden features are held to, and must be
    # as close to the exact numbers as the reference is.
    exact = copy.deepcopy(connector).double()(x.double())
    error_of_reference = (want - exact).abs().max()
    limit = error_of_reference.clamp(min=2e-5, max=1e-4)
    assert (ours - want).abs().max() <= limit
    assert (ours - exact).abs().max() <= limit

    assert connector_tokens(spec, x.size(-2), **options) == want.size(1)
    back = weights.tensors(connector, prefix=prefix)
    assert back.keys() == {k for k in source if k.startswith(prefix)}
    assert all(torch.equal(tensor, source[k]) for k, tensor in back.items())


@pytest.mark.parametrize("spec", CONNECTORS)
def test_every_entry_makes_the_tokens_it_declares(spec):
    options = SMALL.get(spec, {})
    for n in (1, 6):
        connector, x = make(spec, **options), features(spec, n).requires_grad_()
        y = connector(x)
        assert y.shape == (2, connector_tokens(spec, n, **options), 7 if spec == "identity" else 11)
        assert (connector(x[1:])[0] - y[1]).abs().max() < 1e-6  # images do not see each other
    used = torch.autograd.grad(y.sum(), [x, *connector.parameters()], allow_unused=True)
    assert all(gradient is not None for gradient in used)
    with weights.empty():
        empty = build_connector(spec, 7, 7 if spec == "identity" else 11, **options)
    weights.load(empty, weights.tensors(connector))
    assert torch.equal(empty(x), connector(x))


def test_identity_and_linear():
    x = features("identity")
    assert make("identity")(x) is x
    with pytest.raises(
        UserError, match="model.connector: identity of widths 7 and 11; fix: use linear"
    ):
        build_connector("identity", 7, 11)
    linear = make("linear")
    assert (linear(x) - (x @ linear.weight.T + linear.bias)).abs().max() < 1e-6


@pytest.mark.parametrize("depth", range(1, 9))
def test_an_mlp_of_every_depth(depth):
    connector, x = make(f"mlp{depth}x_gelu"), features("mlp")
    want, state = x, connector.state_dict()
    assert list(state) == [f"{2 * i}.{kind}" for i in range(depth) for kind in ("weight", "bias")]
    for i in range(depth):
        want = want if i == 0 else want * (1 + torch.erf(want / math.sqrt(2))) / 2
        want = want @ state[f"{2 * i}.weight"].T + state[f"{2 * i}.bias"]
    assert (connector(x) - want).abs().max() < 1e-6


def test_the_mixture_takes_turns():
    connector, x = make("mof_mlp"), features("mof_mlp")
    y = connector(x)
    assert (y[:, 0::2] - connector.clip(x[:, 0])).abs().max() < 1e-6
    assert (y[:, 1::2] - connector.dinov2(x[:, 1])).abs().max() < 1e-6
    assert not torch.equal(connector.clip[0].weight, connector.dinov2[0].weight)


def norm(x, weight=1.0, bias=0.0, eps=1e-5):
    return (x - x.mean(-1, True)) / (
        x.var(-1, unbiased=False, keepdim=True) + eps
    ).sqrt() * weight + bias


def heads_one_by_one(q, k, v, heads):
    """Attention spelled out: the columns of head h are h*d .. (h+1)*d."""
    out = []
    for one in zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True):
        scores = one[0] @ one[1].transpose(-1, -2) / math.sqrt(one[0].size(-1))
        out.append(scores.softmax(-1) @ one[2])
    return torch.cat(out, -1)


def shake(module):
    """Give norms and biases values that a mistake in their place would show."""
    torch.manual_seed(2)
    for p in module.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.2)
    return {k: v.double() for k, v in module.state_dict().items()}


def test_the_resampler_is_a_perceiver():
    connector, x = make("resampler", **SMALL["resampler"]), features("resampler", 9)
    w = shake(connector)
    media = x.double() @ w["linear.weight"].T + w["linear.bias"]
    z = w["latents"].expand(2, 5, 11)
    for i in range(2):
        a, f = f"layers.{i}.0.", f"layers.{i}.1."
        seen = norm(media, w[a + "norm_media.weight"], w[a + "norm_media.bias"])
        own = norm(z, w[a + "norm_latents.weight"], w[a + "norm_latents.bias"])
        both = torch.cat([seen, own], 1)
        kv = w[a + "to_kv.weight"]
        q, k, v = own @ w[a + "to_q.weight"].T, both @ kv[:512].T, both @ kv[512:].T
        z = z + heads_one_by_one(q, k, v, 8) @ w[a + "to_out.weight"].T
        inner = norm(z, w[f + "0.weight"], w[f + "0.bias"]) @ w[f + "1.weight"].T
        z = z + F.gelu(inner) @ w[f + "3.weight"].T
    assert w["layers.0.1.1.weight"].shape == (44, 11)
    want = norm(z, w["norm.weight"], w["norm.bias"])
    assert (connector.double()(x.double()) - want).abs().max() < 1e-10


def test_the_qformer_is_a_bert_that_looks_every_second_layer():
    connector, x = make("qformer", **SMALL["qformer"]), features("qformer", 9)
    w = shake(connector)

    def dense(x, key):
        return x @ w[key + ".weight"].T + w[key + ".bias"]

    def out(x, residual, key):
        summed = dense(x, key + ".dense") + residual
        return norm(summed, w[key + ".LayerNorm.weight"], w[key + ".LayerNorm.bias"], 1e-12)

    def attend(x, source, key):
        q, (k, v) = (
            dense(x, key + ".self.query"),
            (dense(source, f"{key}.self.{n}") for n in ("key", "value")),
        )
        return out(heads_one_by_one(q, k, v, 3), x, key + ".output")

    image = x.double()
    z = norm(w["query_tokens"], eps=1e-12).expand(2, -1, -1)
    for i in range(3):
        layer = f"bert.encoder.layer.{i}."
        z = attend(z, z, layer + "attention")
        if i in (0, 2):
            z = attend(z, image, layer + "crossattention")
        z = out(F.gelu(dense(z, layer + "intermediate_query.dense")), z, layer + "output_query")
    assert not any(k.startswith("bert.encoder.layer.1.crossattention") for k in w)
    want = dense(z, "projector")
    assert (connector.double()(image) - want).abs().max() < 1e-10


def test_sizes_are_tinyllavas_unless_chosen():
    with weights.empty():
        resampler, qformer = (
            build_connector("resampler", 1152, 2048),
            build_connector("qformer", 1152, 2048),
        )
    assert resampler.latents.shape == (128, 2048) and len(resampler.layers) == 3
    assert resampler.layers[0][0].to_kv.weight.shape == (
        1024,
        2048,
    )  # 8 heads of 64, keys and values
    assert resampler.layers[0][1][1].weight.shape == (8192, 2048)
    layers = qformer.bert.encoder.layer
    assert qformer.query_tokens.shape == (1, 128, 768) and len(layers) == 12
    assert (
        layers[0].intermediate_query.dense.weight.shape == (3072, 768)
        and layers[0].attention.heads == 12
    )
    assert layers[0].crossattention.self.key.weight.shape == (768, 1152)
    assert connector_tokens("resampler", 729) == connector_tokens("qformer", 729) == 128


def test_bare_parameters_start_random():
    latents = make("resampler", text_dim=512, num_queries=64, num_resampler_layers=1).latents
    queries = make(
        "qformer", **SMALL["qformer"] | {"num_queries": 64, "hidden_size": 510}
    ).query_tokens
    assert abs(latents.std() - 1) < 0.02 and abs(latents.mean()) < 0.02
    assert abs(queries.std() - 0.02) < 0.0004 and abs(queries.mean()) < 0.0004


def test_berts_positions_wait_in_the_spares():
    connector = make("qformer", **SMALL["qformer"])
    state = weights.tensors(connector) | {"bert.embeddings.position_ids": torch.arange(512)[None]}
    with weights.empty():
        empty = build_connector("qformer", 7, 11, **SMALL["qformer"])
    weights.load(empty, state)
    assert "bert.embeddings.position_ids" not in empty.state_dict()
    assert torch.equal(
        weights.tensors(empty)["bert.embeddings.position_ids"], torch.arange(512)[None]
    )
    with pytest.raises(
        UserError, match="bert.embeddings.word_embeddings.weight: a tensor this model has no place"
    ):
        weights.load(connector, state | {"bert.embeddings.word_embeddings.weight": torch.ones(1)})


RESAMPLER_OPTIONS = "one of num_queries, num_resampler_layers"
QFORMER_OPTIONS = (
    "one of num_queries, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size"
)
MISTAKES = [
    (
        "mlp2x_gelo",
        {},
        "model.connector: unknown 'mlp2x_gelo'; fix: one of identity, linear, mlp1x_gelu",
    ),
    ("mlp9x_gelu", {}, "model.connector: unknown 'mlp9x_gelu'"),
    (
        "resampler",
        {"queries": 9},
        f"model.connector_options.queries: unknown to resampler; fix: {RESAMPLER_OPTIONS}",
    ),
    (
        "qformer",
        {"layers": 9},
        f"model.connector_options.layers: unknown to qformer; fix: {QFORMER_OPTIONS}",
    ),
    (
        "mlp2x_gelu",
        {"depth": 3},
        "model.connector_options.depth: unknown to mlp2x_gelu; fix: remove it",
    ),
    (
        "resampler",
        {"num_resampler_layers": 0},
        "model.connector_options.num_resampler_layers: 0 is not a positive integer; "
        "fix: the default is 3",
    ),
    (
        "qformer",
        {"num_queries": "9"},
        "model.connector_options.num_queries: '9' is not a positive integer",
    ),
    (
        "qformer",
        {"num_queries": True},
        "model.connector_options.num_queries: True is not a positive integer",
    ),
]


@pytest.mark.parametrize("spec, options, message", MISTAKES)
def test_a_mistake_in_the_menu_is_named(spec, options, message):
    for call in (
        lambda: build_connector(spec, 8, 12, **options),
        lambda: connector_tokens(spec, 6, **options),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value)


def test_heads_divide_the_width():
    with pytest.raises(
        UserError,
        match="model.connector_options.num_attention_heads: 5 do not divide hidden_size 12; fix: ",
    ):
        build_connector("qformer", 8, 12, **SMALL["qformer"] | {"num_attention_heads": 5})


@pytest.mark.parametrize("spec", ["naiveresampler", "groupresampler"])
def test_video_resamplers_are_tinyllava_videos(spec):
    """Outputs to 1e-5, the input's gradient to 1e-4, by its own weights under their own names."""
    sizes = json.loads(shared("golden/video/config.json").read_text())[spec]
    io = load_file(shared("golden/video/connectors.safetensors"))
    options = {name: sizes[name] for name in CONNECTORS[spec].options}
    connector = build_connector(spec, sizes["vision_hidden_size"], sizes["hidden_size"], **options)
    weights.load(
        connector,
        {k: v for k, v in io.items() if ".weights." in k and k.startswith(spec)},
        (),
        f"{spec}.weights.",
    )
    x = io[f"{spec}.input"].requires_grad_()
    out = connector(x)
    assert (out - io[f"{spec}.output"]).abs().max() <= 1e-5
    (out * io[f"{spec}.output_weight"]).sum().backward()
    assert (x.grad - io[f"{spec}.input_grad"]).abs().max() <= 1e-4


@pytest.mark.parametrize("n", [3, 6, 7, 8])
def test_group_resampler_reads_stretches_apart(n):
    """Each stretch decides its own latents alone; a token more goes to the first ones."""
    connector = make("groupresampler", **SMALL["groupresampler"])
    x = torch.randn(2, n, 7)
    lengths = [len(s) for s in torch.arange(n).tensor_split(3)]
    start = lengths[0] + lengths[1]
    changed = x.clone()
    changed[:, start:] += 1
    same = (connector(x) - connector(changed)).abs().amax(-1) == 0
    assert same.tolist() == [[True] * 4 + [False] * 2] * 2


def test_groups_divide_the_queries():
    with pytest.raises(
        UserError, match="model.connector_options.group: 4 do not divide num_queries 6; fix: "
    ):
        build_connector("groupresampler", 8, 12, num_queries=6, group=4)
