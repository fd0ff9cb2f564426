"""What bench/kernels.py measures: each operation at shapes of the models trained here.

A `Bench` is one operation at one shape: inputs, our function, the reference in plain torch,
peers, the cost, and the ratios that are aimed at. Each function below makes one; `shapes()` at
the end names them all. A cost is what the docstring says is counted: every input read once, every
output written once, with two bytes to a number where nothing else is said. Small tensors are left
out.

    T tokens    B batch    H query heads    K key-value heads    d head width
    D width    V vocabulary    N outputs of a linear, K its inputs
"""

from __future__ import annotations

import importlib
import inspect
import math
import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import attention, cross_entropy, glu, int8, lora, nf4, norms, rope
from kernels import decode as decoding

FLASH = SDPBackend.FLASH_ATTENTION
CUDNN = SDPBackend.CUDNN_ATTENTION
IMAGES = 32  # of a batch of an encoder
TOKENS = 16384  # of a packed row
RANK = 128  # of an adapter
DROPOUT = 0.05


class Cost(NamedTuple):
    """What an operation has to compute and to move."""

    flops: float
    bytes: float


class Bench(NamedTuple):
    """One operation at one shape. `ours`, `reference` and the peers take `args`."""

    args: tuple[Tensor, ...]
    grads: tuple[int, ...]  # the numbers of the args that have gradients
    ours: Callable
    reference: Callable
    peers: dict[str, Callable[[], Callable]]  # called to make the function; raises what it lacks
    forward: Cost
    backward: Cost = Cost(0, 0)
    targets: dict[str, float] = {}  # least ratio by peer, or "share", in training (else forward)


class Setting(NamedTuple):
    """Where, how large and for how long to measure."""

    device: str
    dtype: torch.dtype
    cut: int  # divides tokens, batches and vocabularies; 1 but in tests
    seconds: float  # of measuring, for each shape, forward and training
    compiles: bool  # what takes seconds to compile takes part

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=self.device)).to(self.dtype)

    def compiled(self, function: Callable) -> Callable:
        if not self.compiles:
            raise RuntimeError("left out of --quick")
        return torch.compile(function, dynamic=False)


class LM(NamedTuple):
    """The sizes of a language model."""

    heads: int
    kv_heads: int
    head: int  # width
    rotary: int  # width
    width: int
    mlp: int  # width
    vocabulary: int


class Encoder(NamedTuple):
    """The sizes of a vision encoder."""

    tokens: int
    heads: int
    head: int
    width: int
    mlp: int


LMS = {
    "Phi-2": LM(32, 32, 80, 32, 2560, 10240, 51200),
    "TinyLlama": LM(32, 4, 64, 64, 2048, 5632, 32000),
    "Qwen2.5-3B": LM(16, 2, 128, 128, 2048, 11008, 151936),
    "Gemma-2B": LM(8, 1, 256, 256, 2048, 16384, 256000),
}
ENCODERS = {
    "SigLIP-so400m": Encoder(729, 16, 72, 1152, 4304),
    "CLIP-L-336": Encoder(577, 16, 64, 1024, 4096),
}


def forced(backend: SDPBackend, function: Callable) -> Callable:
    """Return plain torch with one of its attention kernels or none."""

    def run(*args):
        with sdpa_kernel(backend):
            return function(*args)

    return run


def liger(name: str, call: Callable) -> Callable:
    """Return what makes args -> call(Liger's function, *args)."""

    def make():
        functions = importlib.import_module("liger_kernel.transformers.functional")
        return partial(call, getattr(functions, name))

    return make


# ------------------------------------------------------------------ attention

# Least ratios to FlashAttention-2 and to cuDNN, by head width.
ATTENTION_TARGETS = {
    64: (1.2, 0.9),
    72: (1.3, 1.0),
    80: (1.3, 1.0),
    128: (1.1, 0.75),
    256: (1.0, 0.7),
}


def attention_targets(d: int) -> dict[str, float]:
    flash, cudnn = ATTENTION_TARGETS[d]
    return {"FlashAttention-2": flash, "cuDNN": cudnn}


def attention_costs(
    lengths: list[int], heads: int, kv_heads: int, d: int, causal: bool
) -> tuple[Cost, Cost]:
    """Two products of n^2 d per head forward (half if causal), five backward.

    q, k, v, o are moved forward, backward their gradients too.
    """
    flops = 4 * heads * d * sum(n * n for n in lengths)
    if causal:
        flops /= 2
    elements = 2 * sum(lengths) * d * (heads + kv_heads)
    return Cost(flops, 2 * elements), Cost(2.5 * flops, 4 * elements)


def dense(s: Setting, encoder: Encoder) -> Bench:
    """Attention of an encoder: a batch of images, no mask."""
    B = max(1, IMAGES // s.cut)
    n, H, d = encoder.tokens, encoder.heads, encoder.head
    plain = partial(attention.reference, causal=False)
    forward, backward = attention_costs([n] * B, H, H, d, causal=False)
    return Bench(
        args=tuple(s.randn(B, n, H, d) for _ in range(3)),
        grads=(0, 1, 2),
        ours=partial(attention.attention, causal=False),
        reference=plain,
        peers={
            "FlashAttention-2": lambda: forced(FLASH, plain),
            "cuDNN": lambda: forced(CUDNN, plain),
        },
        forward=forward,
        backward=backward,
        targets=attention_targets(d),
    )


def sample_lengths(tokens: int, image: int) -> list[int]:
    """Return the lengths of the samples of a packed row.

    Nine of ten have an image; texts are 20 to 1300 tokens, half of them below 120.
    """
    draw = random.Random(0)
    lengths = []
    left = tokens
    while left > 0:
        text = min(max(20, int(draw.lognormvariate(math.log(120), 0.8))), 1300)
        with_image = draw.random() < 0.9
        length = min(left, text + image if with_image else text)
        lengths.append(length)
        left -= length
    return lengths


def varlen_attention(cu_seqlens: Tensor, longest: int) -> Callable:
    """Return torch's own attention of packed rows, which is FlashAttention-2."""
    from torch.nn.attention.varlen import varlen_attn

    # Newer versions ask for grouped heads by name.
    options = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True

    def run(q, k, v):
        return varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), **options
        )

    return run


def flex_attention_packed(s: Setting, lengths: list[int], grouped: bool) -> Callable:
    """Return torch's flex_attention with a block mask of the samples."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = sum(lengths)
    if tokens < TOKENS // s.cut:
        raise RuntimeError("measured at 16k tokens only: compiling takes long")
    run = s.compiled(flex_attention)
    sample = torch.repeat_interleave(torch.tensor(lengths, device=s.device))  # of each token

    def visible(b, h, i, j):
        return (i >= j) & (sample[i] == sample[j])

    mask = create_block_mask(visible, None, None, tokens, tokens, device=s.device)

    def packed_flex(*qkv):
        q, k, v = (x.transpose(0, 1)[None] for x in qkv)
        return run(q, k, v, block_mask=mask, enable_gqa=grouped)[0].transpose(0, 1)

    return packed_flex


def as_batch(function: Callable) -> Callable:
    """Return a dense attention of 8 samples of one length that lie in a row."""

    def run(*qkv):
        q, k, v = (x.unflatten(0, (8, -1)) for x in qkv)
        return function(q, k, v, True).flatten(0, 1)

    return run


def packed(s: Setting, lm: LM, tokens: int, equal: bool) -> Bench:
    """Causal attention of a packed row: realistic samples, or 8 of one length, a dense batch."""
    tokens = tokens // s.cut
    H, K, d = lm.heads, lm.kv_heads, lm.head
    lengths = [tokens // 8] * 8 if equal else sample_lengths(tokens, 729 // s.cut)
    ends = torch.tensor(lengths, device=s.device).cumsum(0)
    cu_seqlens = F.pad(ends, (1, 0)).to(torch.int32)
    row = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths)}
    plain = partial(attention.reference_packed, **row)

    targets = attention_targets(d)
    if equal:
        targets["barellava, dense"] = 0.95
        peers = {
            "FlashAttention-2": lambda: forced(FLASH, as_batch(attention.reference)),
            "cuDNN": lambda: forced(CUDNN, as_batch(attention.reference)),
            "barellava, dense": lambda: as_batch(attention.attention),
        }
    else:
        peers = {
            "FlashAttention-2": lambda: varlen_attention(cu_seqlens, max(lengths)),
            "cuDNN": lambda: forced(CUDNN, plain),
            "flex_attention": lambda: flex_attention_packed(s, lengths, K < H),
        }
    forward, backward = attention_costs(lengths, H, K, d, causal=True)
    return Bench(
        args=(s.randn(tokens, H, d), s.randn(tokens, K, d), s.randn(tokens, K, d)),
        grads=(0, 1, 2),
        ours=partial(attention.attention_packed, **row),
        reference=plain,
        peers=peers,
        forward=forward,
        backward=backward,
        targets=targets,
    )


def decode(s: Setting, lm: LM, full: bool) -> Bench:
    """One token against 16 caches: the filled part is read once; two products of one row."""
    B = 16
    L = 4096 // s.cut
    H, K, d = lm.heads, lm.kv_heads, lm.head
    if full:
        lengths = torch.full((B,), L, device=s.device)
    else:
        lengths = torch.linspace(L / 4, L, B, device=s.device).long()
    reference = partial(decoding.reference, lengths=lengths)

    def unmasked(q, k, v):
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=K < H)[:, :, 0]

    # A full cache needs no mask, which FlashAttention-2 does not know.
    plain = unmasked if full else reference
    filled = int(lengths.sum())
    return Bench(
        args=(s.randn(B, H, d), s.randn(B, K, L, d), s.randn(B, K, L, d)),
        grads=(),
        ours=partial(attention.attention_decode, lengths=lengths),
        reference=reference,
        peers={
            "FlashAttention-2": lambda: forced(FLASH, plain),
            "cuDNN": lambda: forced(CUDNN, plain),
        },
        forward=Cost(4 * filled * H * d, 4 * filled * K * d + 4 * B * H * d),
    )


# ------------------------------------------------------------------ the loss


def loss(s: Setting, lm: LM, tokens: int, supervised: float) -> Bench:
    """One product forward, two backward, over n supervised rows.

    Their hidden states and the head are moved, then the gradients.
    """
    T = tokens // s.cut
    V = lm.vocabulary // s.cut
    D = lm.width
    targets = torch.randint(0, V, (T,), device=s.device)
    targets = targets.masked_fill(torch.rand(T, device=s.device) >= supervised, -100)
    at = (targets >= 0).nonzero()[:, 0]
    n = len(at)
    rest = {"bias": None, "targets": targets}

    def liger_sum(function, h, w):
        return function(h, w, targets, reduction="sum")

    goals = {"cuBLAS products (bound)": 0.92}
    if supervised == 1:
        goals["Liger"] = 4.0
    return Bench(
        args=(s.randn(T, D), s.randn(V, D, scale=D**-0.5)),
        grads=(0, 1),
        ours=partial(cross_entropy.linear_cross_entropy, **rest),
        reference=partial(cross_entropy.reference, **rest),
        peers={
            "Liger": liger("liger_fused_linear_cross_entropy", liger_sum),
            "cuBLAS products (bound)": lambda: lambda h, w: h[at] @ w.T,
        },
        forward=Cost(2 * n * D * V, 2 * (n * D + V * D)),
        backward=Cost(4 * n * D * V, 2 * (T * D + V * D)),
        targets=goals,
    )


# ------------------------------------------------------------------ adapters


def peft_linears(s: Setting, weights: list[Tensor], base: str) -> Callable:
    """Return the same linears and adapters by PEFT, on bitsandbytes' weights where they are NF4."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = []
    for w in weights:
        N, K = w.shape
        if base == "NF4":
            from bitsandbytes.nn import Linear4bit, Params4bit

            layer = Linear4bit(K, N, bias=False, compute_dtype=s.dtype, quant_type="nf4")
            layer.weight = Params4bit(
                w.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
        else:
            layer = torch.nn.Linear(K, N, bias=False, device="meta")
            layer.weight = torch.nn.Parameter(w, requires_grad=False)
        layers.append(layer)

    names = [str(g) for g in range(len(weights))]
    box = torch.nn.Module()
    box.linears = torch.nn.ModuleList(layers).to(s.device)
    options = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=DROPOUT, target_modules=names)
    inject_adapter_in_model(options, box)
    box.train()
    box.forward = lambda x: tuple(linear(x) for linear in box.linears)

    slots = [f"linears.{g}.lora_A.default.weight" for g in names]
    slots += [f"linears.{g}.lora_B.default.weight" for g in names]

    def run(x, *adapters):
        return torch.func.functional_call(box, dict(zip(slots, adapters, strict=True)), (x,))

    return run


def adapters(s: Setting, K: int, widths: tuple[int, ...], base: str) -> Bench:
    """Frozen product, A and B forward; dx, and both products of A and of B backward.

    x, W, y are moved forward; dy, x, W, dx backward.
    """
    T = TOKENS // s.cut
    G = len(widths)
    N = sum(widths)
    weights = [s.randn(n, K, scale=K**-0.5) for n in widths]
    frozen = weights
    if base == "NF4":
        frozen = [nf4.quantize(w) for w in weights]
    seeds = torch.randint(2**62, (G,), device=s.device)
    As = [s.randn(RANK, K, scale=K**-0.5) for _ in widths]
    Bs = [s.randn(n, RANK, scale=RANK**-0.5) for n in widths]

    def of(function):
        def run(x, *AB):
            return function(x, frozen, [None] * G, AB[:G], AB[G:], [2.0] * G, DROPOUT, seeds)

        return run

    def linears(x, *_):
        return tuple(F.linear(x, lora.dense(w, x.dtype)) for w in frozen)

    product = 2 * T * K * N
    low_rank = 2 * T * RANK * (G * K + N)
    stored = K * N * (0.516 if base == "NF4" else 2)
    small = 2 * RANK * (G * K + N)  # A and B
    return Bench(
        args=(s.randn(T, K), *As, *Bs),
        grads=tuple(range(1 + 2 * G)),
        ours=of(lora.lora_linears),
        reference=of(lora.reference),
        peers={
            "PEFT": lambda: peft_linears(s, weights, base),
            "frozen linears (bound)": lambda: linears,
        },
        forward=Cost(product + low_rank, 2 * T * (K + N) + stored + small),
        backward=Cost(product + 2 * low_rank, 2 * T * (2 * K + N) + stored + 2 * small),
        targets={"frozen linears (bound)": 1 / 1.1, "PEFT": 1.3},
    )


# ------------------------------------------------------------------ quantized weights


def stored_bytes(q) -> int:
    """Return the bytes of a quantized weight."""
    return sum(t.nbytes for t in q if isinstance(t, Tensor))


def unpack(s: Setting, module, N: int, K: int) -> Bench:
    """The packed weight and its scales in, bf16 out."""
    w = s.randn(N, K, scale=K**-0.5)
    q = module.quantize(w)

    def bitsandbytes():
        import bitsandbytes.functional as bnb

        if module is nf4:
            code, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
            return lambda: bnb.dequantize_4bit(code, state)
        return lambda: bnb.int8_vectorwise_dequant(q.weight, q.SCB).to(s.dtype)

    return Bench(
        args=(),
        grads=(),
        ours=lambda: module.dequantize(q, s.dtype),
        reference=lambda: module.reference(q, s.dtype),
        peers={"bitsandbytes": bitsandbytes},
        forward=Cost(0, stored_bytes(q) + 2 * N * K),
        targets={"share": 0.8},
    )


def multiply(s: Setting, module, rows: int, N: int, K: int) -> Bench:
    """The packed weight, x and y once."""
    w = s.randn(N, K, scale=K**-0.5)
    q = module.quantize(w)
    unpacked = module.reference(q, s.dtype)

    def bitsandbytes():
        import bitsandbytes as bnb

        if module is int8:
            raise RuntimeError("another function: LLM.int8 rounds activations to 8 bits too")
        code, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        return lambda x: bnb.matmul_4bit(x, code.t(), quant_state=state)

    return Bench(
        args=(s.randn(rows, K),),
        grads=(),
        ours=lambda x: module.matmul(x, q),
        reference=lambda x: module.reference_matmul(x, q),
        peers={
            "bitsandbytes": bitsandbytes,
            "cuBLAS, unpacked weight": lambda: lambda x: x @ unpacked.T,
        },
        forward=Cost(2 * rows * N * K, stored_bytes(q) + 2 * rows * (N + K)),
    )


# ------------------------------------------------------------------ norms, activations, rope


def liger_norm(kind: str, residual: bool) -> Callable:
    """Return what makes Liger's function of a norm, with the addition where it has one."""
    if kind == "layer":
        if residual:
            return liger("liger_layer_norm", lambda f, x, r, w, b: (f(x + r, w, b, 1e-5), x + r))
        return liger("liger_layer_norm", lambda f, x, w, b: f(x, w, b, 1e-5))

    options = {
        "eps": 1e-5,
        "offset": float(kind == "rms1"),
        "casting_mode": "gemma" if kind == "rms1" else "llama",
        "in_place": False,  # it may not overwrite dy, which is used again
    }
    if residual:
        return liger("liger_fused_add_rms_norm", lambda f, x, r, w: f(x, r, w, **options))
    return liger("liger_rms_norm", lambda f, x, w: f(x, w, **options))


def norm(s: Setting, kind: str, rows: int, D: int, residual: bool) -> Bench:
    """x (and the residual) in, y (and the sum) out; then dy, s (and its gradient) in, dx out."""
    T = rows // s.cut
    streams = [s.randn(T, D) for _ in range(2 if residual else 1)]
    weight = s.randn(D, scale=0.3) + float(kind != "rms1")
    args = [*streams, weight]
    if kind == "layer":
        args.append(s.randn(D))

    def of(function):
        """The arguments are x, perhaps the residual, the weight, perhaps the bias."""

        def run(x, *rest):
            if not residual:
                return function(x, *rest, eps=1e-5, kind=kind, residual=None)[0]
            r, *parameters = rest
            return function(x, *parameters, eps=1e-5, kind=kind, residual=r)

        return run

    def plain(x, w, b=None, *, eps, kind, residual):
        return norms.reference(x, residual, w, b, eps, kind, x.dtype)

    n = len(streams)
    elements = 2 * T * D
    return Bench(
        args=tuple(args),
        grads=tuple(range(len(args))),
        ours=of(norms.norm),
        reference=of(plain),
        peers={"Liger": liger_norm(kind, residual)},
        forward=Cost(0, elements * 2 * n),
        backward=Cost(0, elements * (2 + n)),
        targets={"share": 0.85},
    )


def activation(s: Setting, act: str, rows: int, width: int, gated: bool) -> Bench:
    """x (and up) in, y out; then dy, x (and up) in, dx (and du) out."""
    T = rows // s.cut
    elements = 2 * T * width
    if gated:
        args = (s.randn(T, width), s.randn(T, width))
        ours = partial(glu.glu, act=act)
        name = "liger_swiglu" if act == "silu" else "liger_geglu"
        peers = {"Liger": liger(name, lambda f, *args: f(*args))}
    else:
        args = (s.randn(T, width),)
        ours = partial(glu.gelu, kind=act)
        peers = {}

    def plain(x, up=None):
        return glu.reference(x, up, act)

    return Bench(
        args=args,
        grads=tuple(range(len(args))),
        ours=ours,
        reference=plain,
        peers=peers,
        forward=Cost(0, elements * (3 if gated else 2)),
        backward=Cost(0, elements * (5 if gated else 3)),
        targets={"share": 0.85},
    )


def rotary_table(tokens: int, rotary: int, device: str) -> tuple[Tensor, Tensor]:
    """Return cos and sin (T, 1, r) float32 of positions 0 .. T - 1, with equal halves."""
    exponent = -torch.arange(0, rotary, 2, device=device) / rotary
    angle = torch.arange(tokens, device=device)[:, None, None].float() * 100.0**exponent
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotary(s: Setting, lm: LM) -> Bench:
    """q and k in and out, half of the float32 table; backward the same."""
    T = TOKENS // s.cut
    H, K, d, r = lm.heads, lm.kv_heads, lm.head, lm.rotary
    cos, sin = rotary_table(T, r, s.device)

    def liger_layout(function, q, k):
        """Liger's is (B, heads, T, d), and (B, T, r) of the table."""
        q = q.transpose(0, 1)[None]
        k = k.transpose(0, 1)[None]
        turned = function(q, k, cos.transpose(0, 1), sin.transpose(0, 1))
        return tuple(x[0].transpose(0, 1) for x in turned)

    cost = Cost(0, 4 * T * d * (H + K) + 4 * T * r)
    return Bench(
        args=(s.randn(T, H, d), s.randn(T, K, d)),
        grads=(0, 1),
        ours=lambda q, k: rope.rope(q, k, cos, sin),
        reference=lambda q, k: rope.reference(q, k, cos, sin),
        peers={"Liger": liger("liger_rope", liger_layout)},
        forward=cost,
        backward=cost,
        targets={"share": 0.85},
    )


# ------------------------------------------------------------------ all shapes

Make = Callable[[Setting], Bench]

# Base model and linears, inputs, outputs of each, weights.
ADAPTERS = [
    ("Phi-2 q, k, v", 2560, (2560, 2560, 2560), "bf16"),
    ("Phi-2 q, k, v", 2560, (2560, 2560, 2560), "NF4"),
    ("TinyLlama q, k, v", 2048, (2048, 256, 256), "NF4"),
    ("TinyLlama gate, up", 2048, (5632, 5632), "bf16"),
    ("Qwen2.5-3B gate, up", 2048, (11008, 11008), "NF4"),
]
# Supervised part of a row, by the answers of each model's mix.
SUPERVISED = {"Phi-2": 0.2, "TinyLlama": 0.3, "Qwen2.5-3B": 0.1, "Gemma-2B": 0.2}
SIGLIP_ROWS = IMAGES * ENCODERS["SigLIP-so400m"].tokens
CLIP_ROWS = IMAGES * ENCODERS["CLIP-L-336"].tokens
# Name, kind, rows, width, residual.
NORMS = [
    ("RMS", "rms", TOKENS, 2048, True),
    ("RMS", "rms", TOKENS, 2048, False),
    ("Gemma's RMS", "rms1", TOKENS, 2048, True),
    ("Layer", "layer", TOKENS, 2560, False),
    ("Layer", "layer", SIGLIP_ROWS, 1152, True),
]
# Name, activation, rows, width, gated.
ACTIVATIONS = [
    ("TinyLlama's SwiGLU", "silu", TOKENS, LMS["TinyLlama"].mlp, True),
    ("Qwen2.5's SwiGLU", "silu", TOKENS, LMS["Qwen2.5-3B"].mlp, True),
    ("Gemma's GeGLU", "gelu_tanh", TOKENS, LMS["Gemma-2B"].mlp, True),
    ("Phi-2's GELU", "gelu_tanh", TOKENS, LMS["Phi-2"].mlp, False),
    ("SigLIP's GELU", "gelu_tanh", SIGLIP_ROWS, 4304, False),
    ("CLIP's quick GELU", "quick_gelu", CLIP_ROWS, 4096, False),
]


def heads_of(name: str) -> str:
    lm = LMS[name]
    return f"{name}, {lm.heads}/{lm.kv_heads} x {lm.head}"


def attention_shapes() -> dict[str, Make]:
    made = {}
    for name, e in ENCODERS.items():
        shape = f"{name}, {IMAGES} x {e.tokens} x {e.heads} x {e.head}"
        made[shape] = partial(dense, encoder=e)
    rows = [("packed 8k", 8192, False), ("packed 16k", TOKENS, False), ("8 x 2k", TOKENS, True)]
    for what, tokens, equal in rows:
        for name, lm in LMS.items():
            made[f"{heads_of(name)}, {what}"] = partial(packed, lm=lm, tokens=tokens, equal=equal)
    return made


def decode_shapes() -> dict[str, Make]:
    made = {}
    for what, full in (("1k to 4k", False), ("4k", True)):
        for name, lm in LMS.items():
            made[f"{heads_of(name)}, 16 caches of {what}"] = partial(decode, lm=lm, full=full)
    return made


def loss_shapes() -> dict[str, Make]:
    made = {}
    for name, lm in LMS.items():
        part = SUPERVISED[name]
        shape = f"{name}, {lm.vocabulary / 1000:.0f}k words, {part:.0%} of 16k tokens"
        made[shape] = partial(loss, lm=lm, tokens=TOKENS, supervised=part)
    qwen = LMS["Qwen2.5-3B"]
    made["Qwen2.5-3B, 152k words, all of 8k tokens"] = partial(
        loss, lm=qwen, tokens=8192, supervised=1
    )
    return made


def quantized_shapes(module) -> dict[str, Make]:
    made = {}
    for N, K in ((10240, 2560), (16384, 2048)):
        made[f"unpack {N} x {K}"] = partial(unpack, module=module, N=N, K=K)
    for N, K in ((10240, 2560), (2560, 10240)):
        for rows in (1, 16, 64):
            shape = f"{rows} x {K} by {N} x {K}"
            made[shape] = partial(multiply, module=module, rows=rows, N=N, K=K)
    return made


def shapes() -> dict[str, dict[str, Make]]:
    """Return operation -> name of the shape -> what makes it. --quick takes the first of each."""
    made = {"attention": attention_shapes(), "decode": decode_shapes(), "lora": {}}
    for name, K, widths, base in ADAPTERS:
        made["lora"][f"{name} on {base}"] = partial(adapters, K=K, widths=widths, base=base)

    made["cross_entropy"] = loss_shapes()
    made["nf4"] = quantized_shapes(nf4)
    made["int8"] = quantized_shapes(int8)

    made["norms"] = {}
    for name, kind, rows, D, residual in NORMS:
        shape = f"{name}, {rows} x {D}"
        if residual:
            shape += ", residual"
        made["norms"][shape] = partial(norm, kind=kind, rows=rows, D=D, residual=residual)

    made["glu"] = {}
    for name, act, rows, width, gated in ACTIVATIONS:
        made["glu"][f"{name}, {rows} x {width}"] = partial(
            activation, act=act, rows=rows, width=width, gated=gated
        )

    made["rope"] = {}
    for name, lm in LMS.items():
        made["rope"][f"{heads_of(name)}, {lm.rotary} of {lm.head} turn"] = partial(rotary, lm=lm)
    return made
