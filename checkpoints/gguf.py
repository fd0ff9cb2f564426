"""GGUF, the files of llama.cpp: `model.gguf`, and `mmproj.gguf` for pictures.

    python export.py --model DIR --to gguf OUT                    # in the type of the weights
    python export.py --model DIR --to gguf OUT --dtype q8_0       # or q4_0, float16, ...
    python export.py --model DIR --to gguf OUT --check            # read back, asked in llama.cpp

The text model has keys, such as `llama.block_count`, and tensors, such as `blk.0.attn_q.weight`.
An architecture of llama.cpp is a graph in its own code. FAMILIES says for each of our families
which of them computes the same, what the tensors are called there, and which of them change:
llama's graph, for one, turns neighbours in a head where ours turns halves.

Read `write`, then `text_fields` and `text_tensors`. gguf_tokenizer.py makes the tokenizer's keys,
gguf_vision.py the file of encoder and connector.

D width of the language model, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoints import gguf_tokenizer, gguf_vision
from checkpoints.fields import Fields
from checkpoints.gguf_file import ARCHITECTURE, QUANTIZED, FileTensor, compare, write_gguf
from checkpoints.names import Table, matches, rename
from config import UserError

MODEL = "model.gguf"
MMPROJ = "mmproj.gguf"

# A context that config.json does not state.
CONTEXT = 4096

# -------------------------------------------------------------------------------------- families

# A change of a tensor: (tensor, the language model) -> what the file has, of the same shape.
Change = Callable[[Tensor, nn.Module], Tensor]


def neighbours(tensor: Tensor, lm: nn.Module) -> Tensor:
    """Return rows of queries or keys in the order in which llama's graph turns them.

    Our rotation turns number i of a head together with number i + d/2; that graph turns numbers 2i
    and 2i + 1. So the rows of each head, (d, D) of a weight or (d,) of a bias, are interleaved.
    """
    d = lm.config.head_dim
    halves = tensor.unflatten(0, (-1, 2, d // 2))  # (H, 2, d/2, ...)
    return halves.transpose(1, 2).reshape(tensor.shape)


def plus_one(tensor: Tensor, lm: nn.Module) -> Tensor:
    """Return the factor of Gemma's norms: its files hold the factor less 1."""
    return 1 + tensor


def with_score_scale(tensor: Tensor, lm: nn.Module) -> Tensor:
    """Return the norm of queries such that their scores have Gemma-3's scale.

    That graph multiplies queries by 1 / sqrt(d), whatever config.json says.
    """
    c = lm.config
    return plus_one(tensor, lm) * (c.score_scale * c.head_dim**0.5)


class Family(NamedTuple):
    """How llama.cpp knows a family."""

    architecture: str

    # Our names and its names, in pairs, where they are not those of NAMES. Several of ours that get
    # one name are one tensor there: matrices along dimension 0, vectors as rows.
    names: Table = ()

    # Those of its names.
    fused: tuple[str, ...] = ()

    # Its names, and what becomes of such a tensor: the first that matches.
    changes: tuple[tuple[str, Change], ...] = ()

    # Its names of the linears whose biases it adds.
    biases: tuple[str, ...] = ()

    # Whether it wants a head of its own ("stored"), has none ("tied"), or takes both.
    head: str = "both"

    # Whether it takes other heads than H x d = D, and a rotation of only a part of a head.
    any_heads: bool = False
    partial_rotary: bool = False


NAMES: Table = (
    ("model.embed_tokens.*", "token_embd.*"),
    ("model.norm.*", "output_norm.*"),
    ("lm_head.*", "output.*"),
    ("model.layers.*.self_attn.q_proj.*", "blk.*.attn_q.*"),
    ("model.layers.*.self_attn.k_proj.*", "blk.*.attn_k.*"),
    ("model.layers.*.self_attn.v_proj.*", "blk.*.attn_v.*"),
    ("model.layers.*.self_attn.o_proj.*", "blk.*.attn_output.*"),
    ("model.layers.*.self_attn.q_norm.*", "blk.*.attn_q_norm.*"),
    ("model.layers.*.self_attn.k_norm.*", "blk.*.attn_k_norm.*"),
    ("model.layers.*.input_layernorm.*", "blk.*.attn_norm.*"),
    ("model.layers.*.post_attention_layernorm.*", "blk.*.ffn_norm.*"),
    ("model.layers.*.mlp.gate_proj.*", "blk.*.ffn_gate.*"),
    ("model.layers.*.mlp.up_proj.*", "blk.*.ffn_up.*"),
    ("model.layers.*.mlp.down_proj.*", "blk.*.ffn_down.*"),
)
FUSED_QKV: Table = (
    ("model.layers.*.self_attn.q_proj.*", "blk.*.attn_qkv.*"),
    ("model.layers.*.self_attn.k_proj.*", "blk.*.attn_qkv.*"),
    ("model.layers.*.self_attn.v_proj.*", "blk.*.attn_qkv.*"),
)

INTERLEAVED = (
    ("blk.*.attn_q.*", neighbours),
    ("blk.*.attn_k.*", neighbours),
)
QKV = ("blk.*.attn_q", "blk.*.attn_k", "blk.*.attn_v")
MLP = ("blk.*.ffn_gate", "blk.*.ffn_up", "blk.*.ffn_down")

LLAMA = Family(
    "llama",
    changes=INTERLEAVED,
    biases=(*QKV, "blk.*.attn_output", *MLP),
    any_heads=True,
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "smollm3": Family("smollm3", changes=INTERLEAVED, any_heads=True),
    "qwen2": Family("qwen2", biases=QKV),
    "qwen3": Family("qwen3", any_heads=True),
    "gemma": Family(
        "gemma",
        changes=(("**_norm.weight", plus_one),),
        head="tied",
        any_heads=True,
    ),
    "gemma3_text": Family(
        "gemma3",
        names=(
            ("model.layers.*.post_attention_layernorm.*", "blk.*.post_attention_norm.*"),
            ("model.layers.*.pre_feedforward_layernorm.*", "blk.*.ffn_norm.*"),
            ("model.layers.*.post_feedforward_layernorm.*", "blk.*.post_ffw_norm.*"),
        ),
        changes=(
            ("blk.*.attn_q_norm.weight", with_score_scale),
            ("**_norm.weight", plus_one),
        ),
        any_heads=True,
    ),
    "stablelm": Family(
        "stablelm",
        names=(
            ("model.layers.*.self_attn.q_norm.norms.*.weight", "blk.*.attn_q_norm.weight"),
            ("model.layers.*.self_attn.k_norm.norms.*.weight", "blk.*.attn_k_norm.weight"),
        ),
        biases=("output_norm", "blk.*.attn_norm", "blk.*.ffn_norm", *QKV),
        head="stored",
        partial_rotary=True,
    ),
    "phi": Family(
        "phi2",
        names=(
            ("model.layers.*.mlp.fc1.*", "blk.*.ffn_up.*"),
            ("model.layers.*.mlp.fc2.*", "blk.*.ffn_down.*"),
        ),
        biases=("output", "output_norm", "blk.*.attn_norm", *QKV, "blk.*.attn_output", *MLP),
        head="stored",
        partial_rotary=True,
    ),
    "phi3": Family(
        "phi3",
        names=(
            *FUSED_QKV,
            ("model.layers.*.mlp.gate_proj.*", "blk.*.ffn_up.*"),
            ("model.layers.*.mlp.up_proj.*", "blk.*.ffn_up.*"),
        ),
        fused=("blk.*.attn_qkv.weight", "blk.*.ffn_up.weight"),
        partial_rotary=True,
    ),
    "openelm": Family(
        "openelm",
        names=FUSED_QKV,
        fused=("blk.*.attn_qkv.weight",),
        head="tied",
        any_heads=True,
        partial_rotary=True,
    ),
}

# The kinds of scaled rotation that need tensors, and the architectures that read them.
FREQUENCIES = ("llama",)  # rope_freqs.weight: one divisor for each pair
LONG_ROPE = ("phi3",)  # rope_factors_short.weight and rope_factors_long.weight

FIX = "train with a language model that it has, or export to barellava"

SMOLLM3_STEP = 4  # every such layer of its graph has no rotation

# --------------------------------------------------------------------------------------- writing


def write(folder: Path, model, tokenizer, file_type: str | None = None):
    """Write the two files of a LLaVA into a folder. Weights go out tensor by tensor.

    file_type: one of gguf_file.FILE_TYPES; None for that of the weights. Raises UserError, before
    anything is written, for what llama.cpp cannot express.
    """
    check_expressible(model)
    if file_type is None:
        file_type = dtype_of(model)
    write_gguf(folder / MODEL, text_fields(model, tokenizer), text_tensors(model), file_type)
    gguf_vision.write(folder / MMPROJ, model, file_type)


def check(folder: Path, model, tokenizer, file_type: str | None = None):
    """Raise UserError unless the files of a folder hold the model, its tokens and its template."""
    if file_type is None:
        file_type = dtype_of(model)
    fields = text_fields(model, tokenizer)
    compare(folder / MODEL, fields, text_tensors(model), file_type)
    gguf_tokenizer.check_tokens(fields["tokenizer.ggml.tokens"], tokenizer)
    gguf_vision.check(folder / MMPROJ, model, file_type)


def check_expressible(model):
    """Raise UserError naming the part of a LLaVA that llama.cpp has no place for.

    The model may be without values.
    """
    check_text(model)
    gguf_vision.check_expressible(model)


def notes(folder: Path, model, file_type: str | None) -> list[str]:
    """Return what is worth to know about the files of a folder, in lines."""
    lines = [f"llama-server -m {folder / MODEL} --mmproj {folder / MMPROJ} --jinja"]
    if file_type not in QUANTIZED:
        small = folder / "model-q4_k_m.gguf"
        lines.append(f"K-quants: llama-quantize {folder / MODEL} {small} Q4_K_M")
    context = context_length(model)
    if context < stated_context(model):
        lines.append(f"context: {context} tokens, as far as llama.cpp computes the same")
    return lines


def dtype_of(model) -> str:
    """Return the type of a model's weights."""
    dtype = model.language_model.model.embed_tokens.weight.dtype
    return str(dtype).removeprefix("torch.")


def check_text(model):
    """Raise UserError naming the part of the language model that llama.cpp has no place for."""
    lm = model.language_model
    c = lm.config
    kind = model.config.text["model_type"]
    if kind not in FAMILIES:
        raise refusal(f"{kind}: llama.cpp has no graph that computes it")
    family = FAMILIES[kind]
    if kind == "phi" and not isinstance(lm.blocks[0].self_attn.q_norm, nn.Identity):
        raise refusal("qk_layernorm: llama.cpp has no norm of queries and keys in phi")
    for ours in lm.state_dict():
        name = file_name(ours.replace(".base_layer", ""), family)  # of a linear with an adapter
        if ours.endswith(".bias") and not matches(name.removesuffix(".bias"), family.biases):
            raise refusal(f"{ours}: llama.cpp adds no such bias in {kind}")

    heads = {layer.heads for layer in c.layers}
    rotary = [layer.rotary for layer in c.layers]
    if family.head == "tied" and not c.tied:
        raise refusal(f"a head of its own: llama.cpp's {kind} takes the embeddings")
    if not family.any_heads and heads != {c.width // c.head_dim}:
        raise refusal(f"heads that are not as wide as the model: llama.cpp has no such {kind}")
    if not family.partial_rotary and c.rotary_dim != c.head_dim:
        raise refusal(f"a rotation of a part of each head: llama.cpp has no such {kind}")
    if kind == "smollm3":
        theirs = [(index + 1) % SMOLLM3_STEP != 0 for index in range(len(c.layers))]
        if rotary != theirs:
            raise refusal(f"layers without rotation that are not every {SMOLLM3_STEP}th")
    if kind == "gemma3_text":
        window_pattern(c)
    check_rotation(c, family)


def refusal(reason: str, fix: str = FIX) -> UserError:
    """Return the error for what llama.cpp cannot compute."""
    return UserError("--to gguf", reason, fix)


def check_rotation(c, family: Family):
    """Raise UserError for a scaled rotation that the graph of a family has no place for."""
    scaling = c.rope_scaling
    if scaling is None or is_linear(scaling):
        return
    is_long = scaling.switch is not None
    readers = LONG_ROPE if is_long else FREQUENCIES
    if family.architecture not in readers or (scaling.amplitude != 1 and not is_long):
        raise refusal(f"a scaled rotation that llama.cpp does not read in {family.architecture}")


def is_linear(scaling) -> bool:
    """Return whether all pairs of a head turn slower by one factor."""
    one_factor = len(set(scaling.short)) == 1
    return one_factor and scaling.switch is None and scaling.amplitude == 1


def text_fields(model, tokenizer) -> dict:
    """Return the keys of a text model and its tokenizer."""
    return graph_fields(model) | gguf_tokenizer.tokenizer_fields(model, tokenizer)


def graph_fields(model) -> dict:
    """Return the keys of a text model: what its graph is built from."""
    lm = model.language_model
    c = lm.config
    family = FAMILIES[model.config.text["model_type"]]
    (layer, *_) = c.layers

    epsilon = "layer_norm_rms_epsilon"
    if isinstance(lm.model.norm, nn.LayerNorm):
        epsilon = "layer_norm_epsilon"
    own = {
        "context_length": context_length(model),
        "embedding_length": c.width,
        "block_count": len(c.layers),
        "feed_forward_length": layer.intermediate,
        "vocab_size": c.vocab,
        "attention.head_count": layer.heads,
        "attention.head_count_kv": layer.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        f"attention.{epsilon}": lm.model.norm.eps,
        "rope.freq_base": c.rope_theta,
        "rope.dimension_count": c.rotary_dim,
    }

    # OpenELM's layers have numbers of their own.
    if family.architecture == "openelm":
        own["feed_forward_length"] = [layer.intermediate for layer in c.layers]
        own["attention.head_count"] = [layer.heads for layer in c.layers]
        own["attention.head_count_kv"] = [layer.kv_heads for layer in c.layers]
    if family.architecture == "stablelm":
        has_second_norm = hasattr(lm.blocks[0], "post_attention_layernorm")
        own["use_parallel_residual"] = not has_second_norm
    if family.architecture == "gemma3":
        own |= window_pattern(c)
    own |= scaling_fields(c.rope_scaling)

    fields = {ARCHITECTURE: family.architecture, "general.type": "model"}
    for key, value in own.items():
        fields[f"{family.architecture}.{key}"] = value
    return fields


def context_length(model) -> int:
    """Return the longest context in which llama.cpp computes what we compute.

    Its Llama and Phi-3 have no sliding window: within one the two are the same. Its Phi-3 has the
    long divisors of LongRoPE for all samples, once a context is opened that is long enough for
    them. So it is told of the shorter one.
    """
    c = model.language_model.config
    lengths = [stated_context(model)]
    if model.config.text["model_type"] != "gemma3_text":
        lengths += [layer.window for layer in c.layers if layer.window is not None]
    if c.rope_scaling is not None and c.rope_scaling.switch is not None:
        lengths.append(c.rope_scaling.switch)
    return min(lengths)


def stated_context(model) -> int:
    """Return how many tokens a model is for, as its config.json says."""
    text = Fields(model.config.text, "llm_config")
    return text.integer("max_position_embeddings", 2, 2**31 - 1, default=CONTEXT)


def window_pattern(c) -> dict:
    """Return the keys of Gemma-3's windows: every n-th layer has none. Raises UserError."""
    depth = len(c.layers)
    windows = [layer.window for layer in c.layers]
    period = depth + 1
    if None in windows:
        period = windows.index(None) + 1

    sizes = {window for window in windows if window is not None}
    thetas = {layer.rope_theta for layer in c.layers if layer.window is not None}
    for index, window in enumerate(windows):
        is_full = (index + 1) % period == 0
        if is_full != (window is None) or len(sizes) > 1:
            raise refusal(
                "layers without a window that are not every n-th: llama.cpp has only such"
            )
    if not sizes:
        return {}
    return {
        "attention.sliding_window": sizes.pop(),
        "attention.sliding_window_pattern": period,
        "rope.freq_base_swa": thetas.pop(),
    }


def scaling_fields(scaling) -> dict:
    """Return the keys of a scaled rotation. Divisors that differ are tensors."""
    if scaling is None:
        return {}
    if is_linear(scaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.short[0]}
    if scaling.switch is None:
        return {}
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.attn_factor": scaling.amplitude,
        "rope.scaling.original_context_length": scaling.switch,
    }


def text_tensors(model) -> list[FileTensor]:
    """Return the tensors of a language model as llama.cpp's graph for its family wants them."""
    lm = model.language_model
    family = FAMILIES[model.config.text["model_type"]]
    stacks: dict[str, list[Tensor]] = {}
    for ours, tensor in lm.state_dict().items():
        if ours not in lm.tied or family.head == "stored":
            stacks.setdefault(file_name(ours, family), []).append(tensor)

    # Phi's graph adds a bias to the logits in any case.
    if family.architecture == "phi2":
        stacks.setdefault("output.bias", [torch.zeros(lm.config.vocab)])
    stacks |= divisor_tensors(lm.config.rope_scaling)

    return [stacked(name, parts, family, lm) for name, parts in stacks.items()]


def file_name(ours: str, family: Family) -> str:
    """Return llama.cpp's name of a parameter."""
    return rename(ours, family.names + NAMES)


def stacked(name: str, parts: list[Tensor], family: Family, lm: nn.Module) -> FileTensor:
    """Return one tensor of the file, of one or several of ours."""
    rows = sum(len(part) for part in parts)
    shape = (rows, *parts[0].shape[1:])
    join = torch.cat
    if parts[0].dim() == 1 and len(parts) > 1:
        shape = (len(parts), len(parts[0]))
        join = torch.stack

    def make() -> Tensor:
        tensor = join([part.detach().cpu().float() for part in parts])
        return changed(tensor, name, family, lm)

    is_float32 = len(shape) == 1 or name.endswith("_norm.weight")
    return FileTensor(name, shape, make, is_float32)


def changed(tensor: Tensor, name: str, family: Family, lm: nn.Module) -> Tensor:
    """Return what the file has under a name in place of our numbers."""
    for pattern, change in family.changes:
        if matches(name, [pattern]):
            return change(tensor, lm)
    return tensor


def divisor_tensors(scaling) -> dict[str, list[Tensor]]:
    """Return the divisors of a scaled rotation, (d/2,) each, under llama.cpp's names."""
    if scaling is None or is_linear(scaling):
        return {}
    short = torch.tensor(scaling.short)
    if scaling.switch is None:
        return {"rope_freqs.weight": [short]}
    long = torch.tensor(scaling.long)
    return {"rope_factors_short.weight": [short], "rope_factors_long.weight": [long]}
