"""Connectors against TinyLLaVA's features, by its weights, and against arithmetic spelled out."""

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from checkpoints import weights
from config import UserError
from connectors import CONNECTORS, build_connector, connector_tokens
from export import export
from inputs.sample import Sample
from model import LLaVA
from packing import IGNORE, IMAGE_TOKEN, Item, ItemShape, pack_samples
from tests.tools.environment import shared
from tests.tools.small_llava import small

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
    "fourier": {"side": 2},
    "c_abstractor": {"num_queries": 4, "hidden_size": 12, "depth": 2},
    "cross_attention": {"num_queries": 5, "num_attention_heads": 2},
}
SPATIAL = [spec for spec, connector in CONNECTORS.items() if connector.spatial]
GRID = (4, 6)  # of what spatial connectors read; 2 views of it are an item


def make(spec, vision_dim=7, text_dim=11, grid=None, **options):
    torch.manual_seed(0)
    if spec in SPATIAL:
        grid = grid or GRID
    return build_connector(
        spec, vision_dim, vision_dim if spec == "identity" else text_dim, grid, **options
    )


def features(spec, n=6, vision_dim=7, grid=GRID):
    torch.manual_seed(1)
    if spec in SPATIAL:
        return torch.randn(2, 2, *grid, vision_dim)
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
    # that distance, never by more than the 1e-4 that all golden features are held to.
    exact = copy.deepcopy(connector).double()(x.double())
    error_of_reference = (want - exact).abs()
    limit = error_of_reference.max().clamp(min=2e-5, max=1e-4)
    assert (ours - want).abs().max() <= limit

    # Ours must be as close to the exact numbers as the reference is: on average, because the
    # largest of so many errors is another one on each processor.
    average = error_of_reference.mean().clamp(min=2e-6)
    assert (ours - exact).abs().mean() <= 1.1 * average

    assert connector_tokens(spec, x.size(-2), **options) == want.size(1)
    back = weights.tensors(connector, prefix=prefix)
    assert back.keys() == {k for k in source if k.startswith(prefix)}
    assert all(torch.equal(tensor, source[k]) for k, tensor in back.items())


@pytest.mark.parametrize("spec", CONNECTORS)
def test_every_entry_makes_the_tokens_it_declares(spec):
    options = SMALL.get(spec, {})
    for n, grid in ((1, (2, 4)), (6, GRID)):
        connector = make(spec, grid=grid if spec in SPATIAL else None, **options)
        x = features(spec, n, grid=grid).requires_grad_()
        tokens, views = (25, 2) if spec in SPATIAL else (n, 1)  # a token of 25 is no patch
        tokens = connector_tokens(spec, tokens, views, grid, **options)
        y = connector(x)
        assert y.shape == (2, tokens, 7 if spec == "identity" else 11)
        assert (connector(x[1:])[0] - y[1]).abs().max() < 1e-6  # images do not see each other
    used = torch.autograd.grad(y.sum(), [x, *connector.parameters()], allow_unused=True)
    assert all(gradient is not None for gradient in used)
    with weights.empty():
        empty = make(spec, **options)
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


# ---- spatial connectors


@pytest.mark.parametrize("spec", SPATIAL)
def test_views_do_not_see_each_other(spec):
    connector, x = make(spec, **SMALL.get(spec, {})), features(spec)
    first = connector(x[:, :1])
    changed = x.clone()
    changed[:, 1] += 1
    m = first.size(1)
    assert connector(x).size(1) == 2 * m
    assert (connector(changed)[:, :m] - first).abs().max() < 1e-6
    assert (connector(changed)[:, m:] - connector(x)[:, m:]).abs().max() > 1e-3


@pytest.mark.parametrize("spec", SPATIAL)
def test_gradients_of_spatial_connectors_are_those_of_finite_differences(spec):
    options = SMALL.get(spec, {}) | ({"mlp_depth": 2} if spec == "pixel_shuffle" else {})
    connector = make(spec, 3, 4, (2, 4), **options)
    shake(connector)
    connector, x = connector.double(), features(spec, vision_dim=3, grid=(2, 4)).double()
    names, parameters = zip(*connector.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(connector, dict(zip(names, values, strict=True)), (x,))

    inputs = (x[:1, :1].requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("factor, side", [(2, 4), (3, 9)])
@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
def test_pixel_shuffle_is_that_of_transformers(name, factor, side):
    transformers = pytest.importorskip("transformers")
    module = getattr(transformers.models, name.lower())
    module = getattr(module, f"modeling_{name.lower()}")
    config = getattr(transformers, f"{name}Config")(
        vision_config={"hidden_size": 7, "num_attention_heads": 1},
        text_config={"model_type": "llama", "hidden_size": 10, "num_attention_heads": 1},
        scale_factor=factor,
    )
    theirs = getattr(module, f"{name}Connector")(config)
    ours = make("pixel_shuffle", 7, 10, (side, side), factor=factor)
    ours.proj.weight.data.copy_(theirs.modality_projection.proj.weight)

    x = torch.randn(3, side**2, 7)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = theirs(a)
    got = ours(b.unflatten(1, (side, side))[:, None])
    assert want.shape == (3, (side // factor) ** 2, 10) and torch.equal(got, want)
    weight = torch.randn_like(want)
    (want * weight).sum().backward()
    (got * weight).sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(ours.proj.weight.grad, theirs.modality_projection.proj.weight.grad)


@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_with_an_mlp_is_internvls(factor):
    transformers = pytest.importorskip("transformers")
    internvl = transformers.models.internvl.modeling_internvl
    text = {"model_type": "qwen2", "hidden_size": 11, "num_attention_heads": 1}
    config = transformers.InternVLConfig(
        vision_config={"hidden_size": 8, "num_attention_heads": 1},
        text_config=text,
        downsample_ratio=1 / factor,
    )
    theirs = internvl.InternVLMultiModalProjector(config)
    ours = make("pixel_shuffle", 8, grid=(8, 8), factor=factor, mlp_depth=2)
    shake(ours)
    names = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}  # InternVL's own: mlp1.0, ...
    for theirs_name, name in names.items():
        part = ours.proj.get_submodule(name).state_dict()
        theirs.get_submodule(theirs_name).load_state_dict(part)

    x = torch.randn(2, 8, 8, 8)
    shuffled = internvl.InternVLModel.pixel_shuffle(None, x, scale_factor=1 / factor)
    want = theirs(shuffled.flatten(1, 2))
    assert (ours(x[:, None]) - want).abs().max() < 1e-5


@pytest.mark.parametrize("factor", [2, 3])
def test_channels_of_a_square_are_in_the_order_that_is_stated(factor):
    """As the docstring has it, and as nanoVLM reshapes."""
    h, w = 2 * factor, 3 * factor
    connector = make("pixel_shuffle", 2, 2 * factor**2, grid=(h, w), factor=factor)
    connector.proj.weight.data.copy_(torch.eye(2 * factor**2))
    x = torch.randn(1, 1, h, w, 2)
    got = connector(x)[0].view(2, 3, -1)
    for row, column, i, j, c in itertools.product(
        range(2), range(3), range(factor), range(factor), range(2)
    ):
        want = x[0, 0, row * factor + i, column * factor + j, c]
        assert got[row, column, (i * factor + j) * 2 + c] == want

    nano = x[0].reshape(1, 2, factor, 3, factor, 2).permute(0, 1, 3, 2, 4, 5).reshape(1, 6, -1)
    assert torch.equal(got.flatten(0, 1), nano[0])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_avg_pool_is_a_mean_and_an_mlp(depth):
    connector, x = make("avg_pool", mlp_depth=depth), features("avg_pool")
    pooled = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 2)  # (4, 7, 2, 3)
    want = connector.proj(pooled.flatten(2).transpose(1, 2))
    assert len(connector.proj) == 2 * depth - 1
    assert (connector(x) - want.view(2, 12, 11)).abs().max() < 1e-6


def test_fourier_keeps_the_lowest_frequencies():
    """The sums of the DCT-II and of its inverse, as the paper writes them."""
    connector = make("fourier", side=3, mlp_depth=1).double()
    x = features("fourier").double()

    def wave(f, i, n):
        return math.sqrt((1 if f == 0 else 2) / n) * math.cos(math.pi * f * (2 * i + 1) / (2 * n))

    def table(n):
        waves = [[wave(f, i, n) for i in range(n)] for f in range(n)]
        return torch.tensor(waves, dtype=torch.float64)

    tables = {n: table(n) for n in (3, 4, 6)}
    spectrum = torch.einsum("fh,gw,nvhwc->nvfgc", tables[4], tables[6], x)
    lowest = spectrum[:, :, :3, :3]
    small = torch.einsum("fi,gj,nvfgc->nvijc", tables[3], tables[3], lowest)
    want = connector.proj(small.flatten(2, 3)).flatten(1, 2)
    assert (connector(x) - want).abs().max() < 1e-12

    # Equal tokens stay equal, and are not rescaled. All frequencies are the grid itself.
    connector = make("fourier", 7, 7, grid=(4, 4), side=2, mlp_depth=1).double()
    connector.proj[0].weight.data.copy_(torch.eye(7))
    connector.proj[0].bias.data.zero_()
    flat = torch.ones(1, 1, 4, 4, 7).double()
    assert (connector(flat) - 2).abs().max() < 1e-12
    connector.side = 4
    x = torch.randn(1, 1, 4, 4, 7).double()
    assert (connector(x) - x.flatten(1, 3)).abs().max() < 1e-12


def test_the_c_abstractor_is_honeybees():
    """Its blocks as timm builds them for Honeybee: RegStage with LayerNorm2d and SiLU."""
    connector, x = make("c_abstractor", **SMALL["c_abstractor"]), features("c_abstractor")
    w = shake(connector)

    def layer_norm(x, key):
        channels_last = x.permute(0, 2, 3, 1)
        normed = norm(channels_last, w[key + ".weight"], w[key + ".bias"])
        return normed.permute(0, 3, 1, 2)

    def conv(x, key, **options):
        return layer_norm(F.conv2d(x, w[key + ".conv.weight"], **options), key + ".bn")

    def block(x, key):
        z = F.silu(conv(x, key + ".conv1"))
        z = F.silu(conv(z, key + ".conv2", padding=1, groups=12))
        mean = z.mean((2, 3), keepdim=True)
        factors = F.silu(F.conv2d(mean, w[key + ".se.fc1.weight"], w[key + ".se.fc1.bias"]))
        factors = F.conv2d(factors, w[key + ".se.fc2.weight"], w[key + ".se.fc2.bias"])
        z = conv(z * factors.sigmoid(), key + ".conv3")
        shortcut = conv(x, key + ".downsample") if key == "net.0.b1" else x
        return F.silu(z + shortcut)

    z = x.double().flatten(0, 1).flatten(1, 2) + w["pos_emb"]  # (4, 24, 7)
    z = z.transpose(1, 2).view(4, 7, *GRID)
    z = block(block(z, "net.0.b1"), "net.0.b2")
    z = F.adaptive_avg_pool2d(z, (2, 2))
    z = block(block(z, "net.2.b1"), "net.2.b2").flatten(2).transpose(1, 2)
    z = F.silu(z @ w["readout.0.weight"].T + w["readout.0.bias"])
    want = z @ w["readout.2.weight"].T + w["readout.2.bias"]
    assert (connector.double()(x.double()) - want.view(2, 8, 11)).abs().max() < 1e-10

    # Squeezed to a quarter of the block's input, as timm has it; names are Honeybee's.
    assert w["net.0.b1.se.fc1.weight"].shape == (2, 12, 1, 1)
    assert w["net.0.b2.se.fc1.weight"].shape == (3, 12, 1, 1)
    assert w["net.0.b1.conv2.conv.weight"].shape == (12, 1, 3, 3)
    with weights.empty():
        published = build_connector("c_abstractor", 1024, 4096, (24, 24))
    assert published.pos_emb.shape == (1, 576, 1024) and len(published.net[0]) == 3
    assert published.net[0].b1.se.fc1.weight.shape == (256, 1024, 1, 1)


def test_cross_attention_reads_each_view_once_by_place():
    connector, x = make("cross_attention", **SMALL["cross_attention"]), features("cross_attention")
    w = shake(connector)
    tokens = norm(
        x.double().flatten(0, 1) @ w["linear.weight"].T,
        w["norm_tokens.weight"],
        w["norm_tokens.bias"],
    )

    def sinusoid(place, width):
        waves = []
        for channel in range(width):
            angle = place / 10000 ** (channel // 2 * 2 / width)
            waves.append(math.sin(angle) if channel % 2 == 0 else math.cos(angle))
        return waves

    places = [[sinusoid(y, 5) + sinusoid(z, 6) for z in range(6)] for y in range(4)]
    placed = (tokens + torch.tensor(places).double()).flatten(1, 2)
    q = norm(w["queries"], w["norm_queries.weight"], w["norm_queries.bias"]) @ w["to_q.weight"].T
    k, v = placed @ w["to_k.weight"].T, tokens.flatten(1, 2) @ w["to_v.weight"].T
    z = heads_one_by_one(q.expand(4, -1, -1), k, v, 2) @ w["to_out.weight"].T
    z = norm(z, w["norm.weight"], w["norm.bias"])
    want = z @ w["proj.weight"].T + w["proj.bias"]
    # Sinusoids are made in float32.
    assert (connector.double()(x.double()) - want.view(2, 10, 11)).abs().max() < 1e-5


NOT_ON_THE_GRID = [
    (
        "pixel_shuffle",
        {},
        "model.connector_options.factor: 2 does not divide the 27 x 27 tokens of a view; "
        "fix: one of 3, 9, 27",
    ),
    ("avg_pool", {"factor": 4}, "factor: 4 does not divide the 27 x 27 tokens of a view; fix: one"),
    ("fourier", {"side": 28}, "side: 28 is more than the 27 x 27 tokens of a view have; fix: at"),
    (
        "c_abstractor",
        {"num_queries": 140},
        "num_queries: 140 tokens form no square; fix: a square, as 121 or 144",
    ),
]


@pytest.mark.parametrize("spec, options, message", NOT_ON_THE_GRID)
def test_a_grid_that_does_not_fit_is_named(spec, options, message):
    for call in (
        lambda: build_connector(spec, 8, 12, (27, 27), **options),
        lambda: connector_tokens(spec, 729, 1, (27, 27), **options),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value)
    with pytest.raises(UserError, match="5 x 5 .*; fix: one of 5"):
        build_connector("avg_pool", 8, 12, (5, 5))
    with pytest.raises(UserError, match="2 x 3 .*; fix: take an encoder with another size"):
        build_connector("avg_pool", 8, 12, (2, 3))
    assert connector_tokens("pixel_shuffle", 729, 5, (27, 27), factor=3) == 5 * 81


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
    (
        "pixel_shuffle",
        {"order": 1},
        "model.connector_options.order: unknown to pixel_shuffle; fix: one of factor, mlp_depth",
    ),
    (
        "avg_pool",
        {"mlp_depth": 9},
        "model.connector_options.mlp_depth: 9 is more than 8; fix: the default is 2",
    ),
]


@pytest.mark.parametrize("spec, options, message", MISTAKES)
def test_a_mistake_in_the_menu_is_named(spec, options, message):
    for call in (
        lambda: build_connector(spec, 8, 12, GRID, **options),
        lambda: connector_tokens(spec, 24, 1, GRID, **options),
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


# ---- in a model


@pytest.mark.parametrize("spec", SPATIAL)
def test_a_model_with_a_spatial_connector_learns_and_comes_back(spec, tmp_path):
    options = SMALL.get(spec, {}) | ({"factor": 3} if "factor" in CONNECTORS[spec].options else {})
    model = small(connector=spec, connector_options=options).train()
    per_view = model.image_tokens
    assert per_view == connector_tokens(spec, 9, 1, (3, 3), **options)
    assert model.views.positions(ItemShape(2)) == 2 * per_view

    # A picture and a video of two frames in one row, each as it is alone.
    torch.manual_seed(3)
    items = [Item(torch.randn(1, 3, 12, 12)), Item(torch.randn(2, 3, 12, 12), ItemShape(2))]
    together = model.encode_items(items)
    for item, features in zip(items, together, strict=True):
        assert (model.encode_items([item])[0] - features).abs().max() < 1e-5
        alone = model.encode_images(item.pixels)
        assert alone.shape == (item.shape.views, per_view, 48)
        assert (alone.flatten(0, 1) - features).abs().max() < 1e-5

    ids = torch.tensor([5, *[IMAGE_TOKEN] * per_view, 7, *[IMAGE_TOKEN] * (2 * per_view), 9, 4])
    labels = torch.where(ids == IMAGE_TOKEN, IGNORE, ids)
    batch = pack_samples([Sample(ids, labels, items, 0, 0)])
    optimizer = torch.optim.AdamW(model.connector.parameters(), 1e-2)
    losses = []
    for _ in range(4):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.connector.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    model.eval().save(tmp_path / "saved")
    again = LLaVA.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again.encode_items(items)[1], model.encode_items(items)[1])
    for layout in ("hf-llava", "tinyllava"):
        with pytest.raises(UserError, match=f"{spec}.*; fix: "):
            export(model, None, layout, tmp_path / layout)


def test_the_class_token_is_apart():
    """CLIP's tokens with and without it are the same grid."""
    torch.manual_seed(4)
    pixels = torch.randn(2, 3, 12, 12)
    features = []
    for select in ("patch", "cls_patch"):
        model = small(connector="avg_pool", connector_options={"factor": 3}, feature_select=select)
        assert model.image_tokens == 1
        features.append(model.encode_images(pixels))
    assert torch.equal(*features)


def test_spatial_connectors_refuse_what_is_no_grid():
    options = {"connector": "pixel_shuffle", "connector_options": {"factor": 3}}
    with pytest.raises(UserError, match="patch drops the first of the 3 x 3 .*; fix: use cls_pat"):
        small(tower="siglip", **options)
    with pytest.raises(UserError, match="model.image_mode: anyres takes .*; fix: use one, or til"):
        small(image_mode="anyres", **options)
    with pytest.raises(UserError, match="factor: 2 does not divide the 3 x 3 .*; fix: one of 3"):
        small(connector="pixel_shuffle")
    for call in (build_connector, connector_tokens):
        arguments = ("avg_pool", 9, 1)
        with pytest.raises(UserError, match="avg_pool reads the grid of one encoder, and a mixtu"):
            call(*arguments)
