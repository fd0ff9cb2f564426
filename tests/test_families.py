"""Every language model family against transformers: two small random configurations each."""

import copy

import pytest
import torch

from checkpoints import weights
from checkpoints.files import read_json
from checkpoints.names import as_tuple, rename
from config import UserError
from inference.cache import Cache
from model import FAMILIES, LanguageModel, lm_config, rope_table
from packing import pack_rows, packed_attention
from tests.tools.environment import ROOT, shared
from tests.tools.fuzz import ODD
from tests.tools.small_language_models import CONFIGS, OPENELM, SIZES, filled
from training import planner

transformers = pytest.importorskip(
    "transformers", reason="the oracle is a development dependency: pip install .[dev]"
)


@pytest.fixture(
    scope="module",
    params=[(kind, i) for kind in CONFIGS for i in range(len(CONFIGS[kind]))],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def pair(request, tmp_path_factory):
    """A random model of transformers, no weight at a value that hides a mistake, and ours."""
    kind, i = request.param
    folder = tmp_path_factory.mktemp(kind)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | CONFIGS[kind][i]))
    torch.manual_seed(i)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim == 1:  # norms and biases start at 1 and 0
                p.add_(0.2 * torch.randn_like(p))
    theirs.save_pretrained(folder)
    return theirs, LanguageModel.from_pretrained(folder), folder


def test_logits_equal_transformers(pair):
    theirs, ours, _ = pair
    ids = torch.randint(0, 131, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(ids).logits
        assert (ours(ids) - want).abs().max().item() <= 1e-4
        assert want.std().item() > 0.1  # otherwise 1e-4 would say little


def test_bf16_logits_are_within_two_percent(pair):
    theirs, _, folder = pair
    ids = torch.randint(0, 131, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(ids).logits
        got = LanguageModel.from_pretrained(folder, torch.bfloat16)(ids).float()
    assert ((got - want).norm() / want.norm()).item() <= 2e-2


def test_every_gradient_equals_transformers(pair):
    theirs, ours, _ = pair
    theirs = copy.deepcopy(theirs)
    # From 1: a transformers embedding gives its padding token, 0 for Gemma, no gradient.
    ids = torch.randint(1, 131, (2, 11), generator=torch.Generator().manual_seed(2))
    theirs(ids).logits.square().mean().backward()
    ours(ids).square().mean().backward()
    got = {name: p.grad for name, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        parts = as_tuple(rename(name, ours.rename))  # several of ours may be one of theirs
        grad = torch.cat([got.pop(part) for part in parts])
        assert (grad - p.grad).norm().item() <= 1e-4 * max(1e-3, p.grad.norm().item()), name
    assert not got
    ours.zero_grad()


def test_cached_decoding_equals_the_full_forward(pair):
    _, ours, _ = pair
    ids = torch.randint(0, 131, (1, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        full = ours(ids)[0]
        x = ours.model.embed_tokens(ids[0])
        cache = Cache(ours.config, 1, 9, x)
        packed = pack_rows([ids[0, :4]])
        first = ours.lm_head(ours.model(x[:4], packed.positions, cache.prefill(packed)))
        steps = [
            ours.lm_head(ours.model(x[t : t + 1], torch.tensor([t]), cache.step()))
            for t in range(4, 9)
        ]
    assert (torch.cat([first, *steps]) - full).abs().max().item() <= 1e-5


def test_saved_under_hugging_faces_names_bit_for_bit(pair):
    _, ours, folder = pair
    source = weights.Checkpoint(folder)
    out = weights.tensors(ours, ours.rename)
    assert out.keys() == set(source)
    assert all(torch.equal(out[k], source[k]) for k in source)


def test_openelm_is_checked_against_its_golden_case():
    """transformers has no OpenELM; tests/test_model.py compares it with Apple's own code."""
    assert set(FAMILIES) == {*CONFIGS, "openelm"}


# Published parameter counts (model cards and papers; tied heads once).
REAL = {
    "TinyLlama--TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "microsoft--phi-2": 2_779_683_840,
    "Qwen--Qwen2-0.5B": 494_032_768,
    "Qwen--Qwen2.5-0.5B": 494_032_768,
    "Qwen--Qwen2.5-3B": 3_085_938_688,
    "google--gemma-2b": 2_506_172_416,
    "stabilityai--stablelm-2-zephyr-1_6b": 1_644_515_328,
    "apple--OpenELM-270M-Instruct": 271_527_168,
    "apple--OpenELM-450M-Instruct": 457_179_136,
    "apple--OpenELM-1_1B-Instruct": 1_079_891_456,
}


@pytest.mark.parametrize("name", REAL)
def test_real_configurations_have_the_published_number_of_parameters(name):
    hf = read_json(shared("assets/configs") / name / "config.json")
    with torch.device("meta"):
        model = LanguageModel.from_hf(hf)
    assert sum(p.numel() for p in model.parameters()) == REAL[name]


KNOWN = {
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_configurations_have_the_published_number_of_parameters(name):
    hf = read_json(planner.KNOWN)[name]
    with torch.device("meta"):
        model = LanguageModel.from_hf(hf)
    assert sum(p.numel() for p in model.parameters()) == KNOWN[name]


SMALL = SIZES | {"num_attention_heads": 6, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("lama", {}, "no language model known"),
        ("gemma2", {}, "soft-capped"),
        ("llama", {"hidden_act": "relu"}, "hidden_act"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling.type"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act"),
        ("phi", {"hidden_act": "gelu"}, "hidden_act"),
        ("stablelm", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ("openelm", {"ffn_with_glu": False}, "ffn_with_glu"),
        ("openelm", {"activation_fn_name": "gelu"}, "activation_fn_name"),
        ("phi", {"hidden_size": None}, "hidden_size"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_scaling.rope_type"),
        ("openelm", OPENELM | {"rope_scaling": {"type": "linear"}}, "'linear' is not supported"),
        ("phi3", {"rope_scaling": {"type": "llama3"}}, "'llama3' is not supported for phi3"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation: 'silu'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("gemma3_text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type: 'yarn'"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters.rope_theta: "),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}},
            "rope_parameters.sliding_attention.rope_type: 'linear'",
        ),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_a_config_that_would_change_the_arithmetic_is_refused(kind, change, message):
    hf = {"model_type": kind} | SMALL | change
    with pytest.raises(ValueError, match=message) as error:
        lm_config({k: v for k, v in hf.items() if v is not None})
    assert "; fix: " in str(error.value)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_field_of_a_wrong_kind_or_size_is_named(kind):
    """Each field with each odd value: a usable model, or an error that names file and field."""
    good = {"model_type": kind} | SMALL | {"tie_word_embeddings": False, "rope_theta": 1e4}
    good |= {"head_dim": 10, "rms_norm_eps": 1e-6, "layer_norm_eps": 1e-6, "attention_bias": False}
    good |= {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "layer_types": None}
    good |= {"partial_rotary_factor": 0.4, "qk_layernorm": False, "lm_head_bias": True}
    good |= {"use_qkv_bias": True, "use_parallel_residual": False}
    good |= {"sliding_window": None, "max_position_embeddings": 512}
    good |= {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 3, "mlp_bias": False}
    if kind == "openelm":
        good = OPENELM
    if kind == "gemma3_text":
        kinds = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
        kinds["sliding_attention"] = {"rope_type": "default", "rope_theta": 1e4}
        good |= {"rope_parameters": kinds, "rope_local_base_freq": 1e4, "sliding_window": 5}
        good |= {"query_pre_attn_scalar": 256, "sliding_window_pattern": 6, "rope_scaling": None}
        good |= {"layer_types": ["sliding_attention"] * 3, "partial_rotary_factor": 1.0}
    lm_config(good)

    for key in good:
        for value in ODD:
            is_usable_or_names_a_field(good | {key: value})


def is_usable_or_names_a_field(hf: dict):
    try:
        config = lm_config(hf, "config.json")
    except UserError as e:
        names_a_field = str(e).startswith("config.json:")
        assert names_a_field and str(e).isprintable() and len(str(e)) < 700
        return
    numbers = [config.rope_theta, config.init_std, config.embed_scale]
    if config.rope_scaling is not None:
        numbers += [*config.rope_scaling.short, *config.rope_scaling.long]
        numbers += [config.rope_scaling.amplitude, config.rope_scaling.switch or 2]
        assert len(config.rope_scaling.short) == config.rotary_dim // 2
    assert all(0 <= number < float("inf") for number in numbers)
    assert len(config.layers) <= 512 and config.vocab <= 2**21 and config.width <= 2**16
    assert 2 <= config.rotary_dim <= config.head_dim and config.rotary_dim % 2 == 0
    assert all(layer.heads % layer.kv_heads == 0 for layer in config.layers)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1, 1.1, 1.2, 2, 3]}
LONGROPE |= {"long_factor": [1.5, 2, 3, 4, 7]}


@pytest.mark.parametrize(
    "rope", [LLAMA3, LONGROPE, {"rope_type": "linear", "factor": 3.5}], ids=lambda r: r["rope_type"]
)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_a_field_of_a_scaled_rotation_of_a_wrong_kind_or_size_is_named(rope, place):
    good = {"model_type": "llama"} | SMALL | {"max_position_embeddings": 512}
    rope = rope | {"original_max_position_embeddings": 64, "rope_theta": 1e4}
    if rope["rope_type"] == "longrope":
        rope |= {"attention_factor": 1.5, "factor": 8}
    assert lm_config(good | {place: rope}).rope_scaling is not None
    for key in rope:
        for value in ODD:
            is_usable_or_names_a_field(good | {place: rope | {key: value}})


# Files of all kinds, in which the same thing is said in several places.
ROPES = {
    "llama3, transformers 5": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e3}}),
    "llama3, older": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "llama3, type": ("llama", {"rope_scaling": {"type": "llama3", **LLAMA3}}),
    "llama3, a context": (
        "llama",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 100}},
    ),
    "llama3, two contexts": (
        "llama",
        {
            "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 100},
            "original_max_position_embeddings": 70,
        },
    ),
    "both tables": (
        "llama",
        {
            "rope_scaling": LLAMA3,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 33.0},
            "rope_theta": 1e3,
        },
    ),
    "an empty table": (
        "llama",
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    ),
    "linear": ("qwen3", {"rope_scaling": {"type": "linear", "factor": 4.0}, "head_dim": 10}),
    "longrope of a Llama": (
        "llama",
        {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 16}},
    ),
    "longrope, a factor": (
        "llama",
        {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 16, "factor": 2.5}},
    ),
    "phi3": ("phi3", {"rope_scaling": {**LONGROPE}, "original_max_position_embeddings": 16}),
    "phi3, su": (
        "phi3",
        {
            "rope_scaling": LONGROPE | {"rope_type": "su", "original_max_position_embeddings": 30},
            "original_max_position_embeddings": 16,
        },
    ),
    "phi3, a context below": (
        "phi3",
        {
            "rope_scaling": LONGROPE | {"original_max_position_embeddings": 16},
            "max_position_embeddings": 8192,
        },
    ),
    "phi3, no longer than before": (
        "phi3",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 600},
    ),
    "phi3, part of a head": (
        "phi3",
        {
            "rope_scaling": LONGROPE | {"short_factor": [1.0, 2], "long_factor": [3.0, 4]},
            "partial_rotary_factor": 0.4,
        },
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_the_rotation_is_that_of_transformers(name):
    """The tables of cos and sin of a short and of a long sample."""
    kind, change = ROPES[name]
    file = {"model_type": kind, "max_position_embeddings": 512, "pad_token_id": 0} | SMALL | change
    config = lm_config(copy.deepcopy(file), "config.json")
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(file))
    rotary = transformers.AutoModelForCausalLM.from_config(theirs).model.rotary_emb
    for length in (16, 17, 40, 5000):
        positions = torch.arange(length)
        want = rotary(torch.zeros(1, dtype=torch.float32), positions[None])
        got = rope_table(
            positions,
            config.rotary_dim,
            config.rope_theta,
            config.rope_scaling,
            torch.tensor([0, length]),
        )
        for ours, table in zip(got, want, strict=True):
            assert (ours[:, 0] - table[0]).abs().max() <= 2e-7 * length


def test_each_sample_of_a_packed_row_turns_by_its_own_length(tmp_path):
    """LongRoPE switches for a sample of 13 tokens and not for those of 12 beside it."""
    lm = filled(LanguageModel.from_hf({"model_type": "phi3"} | SIZES | CONFIGS["phi3"][0]))
    rows = [torch.arange(n) + n for n in (12, 13, 1, 30, 12)]
    packed = pack_rows(rows)
    attend = packed_attention(packed.cu_seqlens, packed.max_seqlen)
    with torch.no_grad():
        x = lm.model.embed(packed.input_ids)
        hidden = lm.model(x, packed.positions, attend, packed.cu_seqlens)
        got = lm.lm_head(hidden).split([len(row) for row in rows])
        for row, logits in zip(rows, got, strict=True):
            assert (logits - lm(row[None])[0]).abs().max() <= 1e-5
        first = lm(rows[1][None, :12])[0]
    assert (got[1][:12] - first).abs().max() > 0.01  # the switch changes what is before it, too


@pytest.mark.parametrize("kind, i", [("gemma3_text", 0), ("gemma3_text", 1), ("mistral", 1)])
def test_windows_end_where_a_sample_of_a_packed_row_begins(kind, i):
    """Each sample as it is alone, logits and gradients, and no window without effect."""
    lm = filled(LanguageModel.from_hf({"model_type": kind} | SIZES | CONFIGS[kind][i]))
    rows = [torch.arange(n) + n for n in (1, 13, 2, 30, 5)]
    packed = pack_rows(rows)
    attend = packed_attention(packed.cu_seqlens, packed.max_seqlen)
    hidden = lm.model(lm.model.embed(packed.input_ids), packed.positions, attend)
    got = lm.lm_head(hidden).split([len(row) for row in rows])
    sum(logits.square().sum() for logits in got).backward()
    gradients = [p.grad for p in lm.parameters()]

    lm.zero_grad()
    for row, logits in zip(rows, got, strict=True):
        want = lm(row[None])[0]
        want.square().sum().backward()
        assert (logits - want).abs().max() <= 1e-5
    for p, gradient in zip(lm.parameters(), gradients, strict=True):
        assert (p.grad - gradient).norm() <= 1e-5 * gradient.norm()

    for block in lm.blocks:
        block.self_attn.window = None
    assert (lm(rows[3][None])[0] - got[3]).abs().max() > 0.01


def test_prompts_that_continue_beyond_a_window():
    """A cache that is filled in pieces of all lengths, in several rows, is the full forward."""
    lm = filled(LanguageModel.from_hf({"model_type": "gemma3_text"} | SIZES | GEMMA3))
    rows = [torch.randint(1, 131, (n,)) for n in (31, 26)]
    for starts in ((1, 2), (5, 3), (4, 12), (17, 11)):
        with torch.no_grad():
            cache = Cache(lm.config, 3, 40, lm.model.embed(rows[0]))
            assert cache.k[0].size(2) == 5 and cache.k[1].size(2) == 40
            first = pack_rows([row[:start] for row, start in zip(rows, starts, strict=True)])
            attend = cache.prefill(first, torch.tensor([2, 0]))
            lm.model(lm.model.embed(first.input_ids), first.positions, attend)
            for new in ((1, 3), (7, 2), (2, 9)):
                ends = [start + n for start, n in zip(starts, new, strict=True)]
                ids = [row[a:b] for row, a, b in zip(rows, starts, ends, strict=True)]
                positions = torch.cat(
                    [torch.arange(a, b) for a, b in zip(starts, ends, strict=True)]
                )
                attend = cache.extend([2, 0], list(starts), list(new), positions)
                x = lm.model.embed(torch.cat(ids))
                got = lm.lm_head(lm.model(x, positions, attend)).split(new)
                for row, a, b, logits in zip(rows, starts, ends, got, strict=True):
                    assert (lm(row[None, :b])[0, a:] - logits).abs().max() <= 1e-5
                starts = ends


GEMMA3 = CONFIGS["gemma3_text"][1]


def test_older_and_newer_files_of_gemma3_say_the_same():
    """The fields of older transformers, and what version 5 makes of them."""
    older = {"model_type": "gemma3_text", "pad_token_id": 0} | SIZES | GEMMA3
    newer = transformers.AutoConfig.for_model(**older).to_dict()
    assert "rope_local_base_freq" not in newer and "layer_types" in newer
    numbers = []
    for file in (older, newer):
        config = lm_config(file)
        numbers.append((config.layers, config.rope_theta, config.rope_scaling, config.score_scale))
    assert numbers[0] == numbers[1]
    layers, theta, scaling, scale = numbers[0]
    assert [layer.window for layer in layers] == [5, None, 5, None, 5]
    assert [layer.rope_theta for layer in layers] == [321.5, None, 321.5, None, 321.5]
    assert (theta, scaling.short, scale) == (5e4, (2.5,) * 5, 30**-0.5)


def test_gemma3_1b_has_the_published_number_of_parameters():
    """999,885,952 (its safetensors index). 22 of 26 layers have a window."""
    known = read_json(ROOT / "training" / "known_configs.json")["google/gemma-3-1b-it"]
    with torch.device("meta"):
        model = LanguageModel.from_hf(known)
    assert sum(p.numel() for p in model.parameters()) == 999_885_952
    windows = [layer.window for layer in model.config.layers]
    assert windows == ([512] * 5 + [None]) * 4 + [512] * 2


@pytest.mark.parametrize("kind", ["gemma3_text", "mistral"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_window_is_as_long_as_that_of_transformers(kind, implementation):
    """Which keys the last token sees: those by which its logits change."""
    change = {"num_hidden_layers": 1, "sliding_window": 4}
    if kind == "gemma3_text":
        change["layer_types"] = ["sliding_attention"]
    config = transformers.AutoConfig.for_model(kind, **(SIZES | CONFIGS[kind][1] | change))
    theirs = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation
    ).eval()
    ours = filled(LanguageModel.from_hf(config.to_dict()))
    ids = torch.arange(1, 10)[None]
    for model in (lambda ids: theirs(ids).logits, ours):
        with torch.no_grad():
            want = model(ids)[0, -1]
            seen = []
            for i in range(9):
                other = ids.clone()
                other[0, i] = 77
                seen.append(not torch.equal(model(other)[0, -1], want))
        assert seen == [False] * 5 + [True] * 4


@pytest.mark.parametrize(
    "kind, change, message",
    [
        (
            "llama",
            {"num_attention_heads": 8},
            "num_attention_heads: 8 is no divisor of hidden_size",
        ),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads: 4 is no divisor of num_attent"),
        ("llama", {"head_dim": 9}, "partial_rotary_factor: rotates 9 of the 9"),
        ("phi", {"partial_rotary_factor": 0.1}, "partial_rotary_factor: rotates 1 of the 10"),
        ("qwen2", {"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta: 0 is not"),
        ("gemma", {"rms_norm_eps": float("nan")}, "rms_norm_eps: nan is not a number"),
        ("qwen3", {"num_hidden_layers": 2**40}, "num_hidden_layers: 1099511627776 is not"),
        ("llama", {"vocab_size": "32000"}, "vocab_size: '32000' is not a whole number"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers: .* a list of 2 for 3 layers"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types: .* list of 1 for 3"),
        ("gemma3_text", {"sliding_window": 0}, "sliding_window: 0 is not a whole number"),
        ("mistral", {"sliding_window": 2.5}, "sliding_window: 2.5 is not a whole number"),
        (
            "gemma3_text",
            {"rope_scaling": {"factor": 8.0}, "rope_parameters": {"full_attention": {}}},
            "rope_scaling: .* is beside rope_parameters",
        ),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4}},
            "rope_scaling.high_freq_factor: 4.0 is not above",
        ),
        (
            "phi3",
            {"rope_scaling": LONGROPE | {"long_factor": [1, 2]}, "max_position_embeddings": 64},
            "rope_scaling.long_factor: .* a list of 2, and 5 pairs",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(kind, change, message):
    with pytest.raises(UserError, match=f"^config.json:{message}.*; fix: "):
        lm_config({"model_type": kind} | SMALL | change, "config.json")


def test_openelm_has_an_entry_for_each_layer():
    with pytest.raises(UserError, match="num_kv_heads: .* a list of 1, and ffn_multipliers one of"):
        lm_config(OPENELM | {"num_kv_heads": [2]})
    with pytest.raises(UserError, match="num_kv_heads: .*: 4 of 6 heads"):
        lm_config(OPENELM | {"num_kv_heads": [2, 4]})


def test_published_values_are_in_range():
    """Values at the edges of what published models have."""
    llama = {"model_type": "llama", "head_dim": 128, "hidden_size": 16384, "vocab_size": 256000}
    llama |= {"intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
    config = lm_config(llama | {"num_key_value_heads": 8, "rope_theta": 1e7, "rms_norm_eps": 1e-5})
    assert (config.rope_theta, config.layers[0].kv_heads) == (1e7, 8)
    assert lm_config(llama | {"head_dim": None, "rope_parameters": None}).head_dim == 128
    phi = {"model_type": "phi"} | SMALL | {"partial_rotary_factor": 0.5, "num_attention_heads": 5}
    assert lm_config(phi | {"num_key_value_heads": None}).rotary_dim == 6
