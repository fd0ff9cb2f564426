"""What bench/kernels.py measures: each operation at the shapes of the models trained here, its cost, its peers.

A cost is (FLOPs, bytes), forward and then backward; the docstrings say what is counted: every input read once, every
output written once, with two bytes to a number where nothing else is said. Small tensors are left out.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import attention, cross_entropy, glu, int8, lora, nf4, norms, rope
from kernels import decode as decoding

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION


class Bench(NamedTuple):
    """One operation at one shape. `ours`, `reference` and the peers take args; `grads` are those with gradients."""

    args: tuple
    grads: tuple[int, ...]
    ours: Callable
    reference: Callable
    peers: dict[str, Callable[[], Callable]]  # called to make the function; raises what it lacks
    forward: tuple[float, float]  # FLOPs, bytes
    backward: tuple[float, float] = (0, 0)
    targets: dict[
        str, float
    ] = {}  # least ratio by peer, or least "share", in training (else forward)


class Setting(NamedTuple):
    """Where, how large (`cut` divides tokens, batches and vocabularies) and for how long to measure."""

    device: str
    dtype: torch.dtype
    cut: int
    seconds: float  # of measuring, for each shape, forward and training
    compiles: bool  # what takes seconds to compile takes part

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, device=self.device)).to(self.dtype)

    def compiled(self, function) -> Callable:
        if not self.compiles:
            raise RuntimeError("left out of --quick and --cpu")
        return torch.compile(function, dynamic=False)


class LM(NamedTuple):
    heads: int
    kv_heads: int
    head: int
    rotary: int
    width: int
    mlp: int
    vocabulary: int


LMS = {
    "Phi-2": LM(32, 32, 80, 32, 2560, 10240, 51200),
    "TinyLlama": LM(32, 4, 64, 64, 2048, 5632, 32000),
    "Qwen2.5-3B": LM(16, 2, 128, 128, 2048, 11008, 151936),
    "Gemma-2B": LM(8, 1, 256, 256, 2048, 16384, 256000),
}
ENCODERS = {
    "SigLIP-so400m": (729, 16, 72, 1152, 4304),
    "CLIP-L-336": (577, 16, 64, 1024, 4096),
}  # tokens, heads, ...
IMAGES, TOKENS = 32, 16384


def forced(backend: SDPBackend, function) -> Callable:
    """Plain torch with one of its attention kernels or none."""

    def run(*args):
        with sdpa_kernel(backend):
            return function(*args)

    return run


def liger(name: str, call: Callable) -> Callable:
    """Makes args -> call(Liger's function, *args)."""
    return lambda: partial(
        call, getattr(importlib.import_module("liger_kernel.transformers.functional"), name)
    )


def attention_cost(lengths: list[int], heads: int, kv_heads: int, d: int, causal: bool):
    """Two products of n^2 d per head forward (half if causal), five backward; q, k, v, o, then their gradients too."""
    flops = 4 * heads * d * sum(n * n for n in lengths) / (2 if causal else 1)
    elements = 2 * sum(lengths) * d * (heads + kv_heads)
    return (flops, 2 * elements), (2.5 * flops, 4 * elements)


def attention_targets(d: int) -> dict[str, float]:
    flash, cudnn = {
        64: (1.2, 0.9),
        72: (1.3, 1.0),
        80: (1.3, 1.0),
        128: (1.1, 0.75),
        256: (1.0, 0.7),
    }[d]
    return {"FlashAttention-2": flash, "cuDNN": cudnn}


def dense(s: Setting, n: int, H: int, d: int) -> Bench:
    plain = partial(attention.reference, causal=False)
    peers = {
        "FlashAttention-2": lambda: forced(FLASH, plain),
        "cuDNN": lambda: forced(CUDNN, plain),
    }
    B = max(1, IMAGES // s.cut)
    return Bench(tuple(s.randn(B, n, H, d) for _ in range(3)), (0, 1, 2), partial(attention.attention, causal=False),
                 plain, peers, *attention_cost([n] * B, H, H, d, False), attention_targets(d))  # fmt: skip


def sample_lengths(tokens: int, image: int) -> list[int]:
    """A packed row: nine of ten samples have an image, texts are 20 to 1300 tokens, half of them below 120."""
    draw, lengths = random.Random(0), []
    while (left := tokens - sum(lengths)) > 0:
        text = min(max(20, int(draw.lognormvariate(math.log(120), 0.8))), 1300)
        lengths.append(min(left, text + image * (draw.random() < 0.9)))
    return lengths


def packed(s: Setting, c: LM, tokens: int, equal: bool) -> Bench:
    tokens, (H, K, d) = tokens // s.cut, c[:3]
    lengths = [tokens // 8] * 8 if equal else sample_lengths(tokens, 729 // s.cut)
    cu = F.pad(torch.tensor(lengths, device=s.device).cumsum(0), (1, 0)).to(torch.int32)
    rest = {"cu_seqlens": cu, "max_seqlen": max(lengths)}
    sample = torch.repeat_interleave(torch.tensor(lengths, device=s.device))

    def batch(function):  # samples of one length are a dense batch
        return lambda *qkv: function(*(x.unflatten(0, (8, -1)) for x in qkv), True).flatten(0, 1)

    def varlen():
        from torch.nn.attention.varlen import varlen_attn

        more = (
            {"enable_gqa": True}
            if "enable_gqa" in inspect.signature(varlen_attn).parameters
            else {}
        )
        place = cu, cu, max(lengths), max(lengths)
        return lambda q, k, v: varlen_attn(q, k, v, *place, window_size=(-1, 0), **more)

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if tokens < TOKENS // s.cut:
            raise RuntimeError("measured at 16k tokens only: compiling takes long")
        run = s.compiled(flex_attention)
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (sample[i] == sample[j]), None, None, tokens, tokens,
                                 device=s.device)  # fmt: skip
        return lambda *qkv: run(*(x.transpose(0, 1)[None] for x in qkv), block_mask=mask,
                                enable_gqa=K < H)[0].transpose(0, 1)  # fmt: skip

    plain, targets = partial(attention.reference_packed, **rest), attention_targets(d)
    if equal:
        peers = {"FlashAttention-2": lambda: forced(FLASH, batch(attention.reference)),
                 "cuDNN": lambda: forced(CUDNN, batch(attention.reference)),
                 "barellava, dense": lambda: batch(attention.attention)}  # fmt: skip
        targets |= {"barellava, dense": 0.95}
    else:
        peers = {
            "FlashAttention-2": varlen,
            "cuDNN": lambda: forced(CUDNN, plain),
            "flex_attention": flex,
        }
    return Bench((s.randn(tokens, H, d), s.randn(tokens, K, d), s.randn(tokens, K, d)), (0, 1, 2),
                 partial(attention.attention_packed, **rest), plain, peers, *attention_cost(lengths, H, K, d, True),
                 targets)  # fmt: skip


def decode(s: Setting, c: LM, full: bool) -> Bench:
    """The filled part of the cache is read once; two products of one row."""
    B, L, (H, K, d) = 16, 4096 // s.cut, c[:3]
    lengths = (
        torch.full((B,), L, device=s.device)
        if full
        else torch.linspace(L / 4, L, B, device=s.device).long()
    )

    def plain(q, k, v):  # a full cache needs no mask, which FlashAttention-2 does not know
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=K < H)[:, :, 0]

    same = plain if full else partial(decoding.reference, lengths=lengths)
    peers = {"FlashAttention-2": lambda: forced(FLASH, same), "cuDNN": lambda: forced(CUDNN, same)}
    cost = 4 * int(lengths.sum()) * H * d, 4 * int(lengths.sum()) * K * d + 4 * B * H * d
    return Bench((s.randn(B, H, d), s.randn(B, K, L, d), s.randn(B, K, L, d)), (),
                 partial(attention.attention_decode, lengths=lengths), partial(decoding.reference, lengths=lengths),
                 peers, cost)  # fmt: skip


def loss(s: Setting, c: LM, tokens: int, supervised: float) -> Bench:
    """One product forward, two backward, over n supervised rows; their hidden states and the head, then gradients."""
    T, V, D = tokens // s.cut, c.vocabulary // s.cut, c.width
    targets = torch.randint(0, V, (T,), device=s.device).masked_fill(
        torch.rand(T, device=s.device) >= supervised, -100
    )
    at = (targets >= 0).nonzero()[:, 0]
    rest, n = {"bias": None, "targets": targets}, len(at)
    args = s.randn(T, D), s.randn(V, D, scale=D**-0.5)
    peers = {"Liger": liger("liger_fused_linear_cross_entropy", lambda f, h, w: f(h, w, targets, reduction="sum")),
             "cuBLAS products (bound)": lambda: lambda h, w: h[at] @ w.T}  # fmt: skip
    goals = {"cuBLAS products (bound)": 0.92} | ({"Liger": 4.0} if supervised == 1 else {})
    return Bench(args, (0, 1), partial(cross_entropy.linear_cross_entropy, **rest),
                 partial(cross_entropy.reference, **rest), peers, (2 * n * D * V, 2 * (n * D + V * D)),
                 (4 * n * D * V, 2 * (T * D + V * D)), goals)  # fmt: skip


def adapters(s: Setting, K: int, widths: tuple[int, ...], base: str) -> Bench:
    """Frozen product, A and B forward; dx, and both products of A and of B backward; x, W, y, then dy, x, W, dx."""
    T, G, r, p = TOKENS // s.cut, len(widths), 128, 0.05
    plain = [s.randn(n, K, scale=K**-0.5) for n in widths]
    frozen = [nf4.quantize(w) for w in plain] if base == "NF4" else plain
    seeds = torch.randint(2**62, (G,), device=s.device)

    def of(function):
        return lambda x, *AB: function(x, frozen, [None] * G, AB[:G], AB[G:], [2.0] * G, p, seeds)

    def peft():
        from peft import LoraConfig, inject_adapter_in_model

        if base == "NF4":
            from bitsandbytes.nn import Linear4bit, Params4bit

            layers = [
                Linear4bit(K, n, bias=False, compute_dtype=s.dtype, quant_type="nf4")
                for n in widths
            ]
            for layer, w in zip(layers, plain, strict=True):
                layer.weight = Params4bit(
                    w.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
                )
        else:
            layers = [torch.nn.Linear(K, n, bias=False, device="meta") for n in widths]
            for layer, w in zip(layers, plain, strict=True):
                layer.weight = torch.nn.Parameter(w, requires_grad=False)
        box = torch.nn.Module()
        box.linears, names = torch.nn.ModuleList(layers).to(s.device), [str(g) for g in range(G)]
        options = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=names)
        inject_adapter_in_model(options, box)
        box.train().forward = lambda x: tuple(linear(x) for linear in box.linears)
        slots = [f"linears.{g}.lora_{part}.default.weight" for part in "AB" for g in names]
        return lambda x, *AB: torch.func.functional_call(
            box, dict(zip(slots, AB, strict=True)), (x,)
        )

    def linears():
        return lambda x, *_: tuple(F.linear(x, lora.dense(w, x.dtype)) for w in frozen)

    N = sum(widths)
    stored, small = K * N * (0.516 if base == "NF4" else 2), 2 * r * (G * K + N)
    low = 2 * T * r * (G * K + N)
    As, Bs = (
        [s.randn(r, K, scale=K**-0.5) for _ in widths],
        [s.randn(n, r, scale=r**-0.5) for n in widths],
    )
    return Bench((s.randn(T, K), *As, *Bs), tuple(range(1 + 2 * G)), of(lora.lora_linears), of(lora.reference),
                 {"PEFT": peft, "frozen linears (bound)": linears},
                 (2 * T * K * N + low, 2 * T * (K + N) + stored + small),
                 (2 * T * K * N + 2 * low, 2 * T * (2 * K + N) + stored + 2 * small),
                 {"frozen linears (bound)": 1 / 1.1, "PEFT": 1.3})  # fmt: skip


def unpack(s: Setting, module, N: int, K: int) -> Bench:
    """The packed weight and its scales in, bf16 out."""
    w = s.randn(N, K, scale=K**-0.5)
    q = module.quantize(w)

    def bitsandbytes():
        import bitsandbytes.functional as bnb

        if module is nf4:
            return partial(
                bnb.dequantize_4bit,
                *bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True),
            )
        return lambda: bnb.int8_vectorwise_dequant(q.weight, q.SCB).to(s.dtype)

    size = sum(t.nbytes for t in q if isinstance(t, torch.Tensor))
    return Bench((), (), partial(module.dequantize, q, s.dtype), partial(module.reference, q, s.dtype),
                 {"bitsandbytes": bitsandbytes}, (0, size + 2 * N * K), targets={"share": 0.8})  # fmt: skip


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

    size = sum(t.nbytes for t in q if isinstance(t, torch.Tensor))
    return Bench((s.randn(rows, K),), (), lambda x: module.matmul(x, q),
                 lambda x: module.reference_matmul(x, q),
                 {"bitsandbytes": bitsandbytes, "cuBLAS, unpacked weight": lambda: lambda x: x @ unpacked.T},
                 (2 * rows * N * K, size + 2 * rows * (N + K)))  # fmt: skip


def norm(s: Setting, kind: str, rows: int, D: int, residual: bool) -> Bench:
    """x (and the residual) in, y (and the sum) out; then dy, the sum (and its gradient) in, dx out."""
    T, n = rows // s.cut, 2 if residual else 1
    streams, w = [s.randn(T, D) for _ in range(n)], s.randn(D, scale=0.3) + float(kind != "rms1")
    args = (*streams, w, s.randn(D)) if kind == "layer" else (*streams, w)

    def of(function):
        def run(x, *more):
            r, (w, *b) = (more[0], more[1:]) if residual else (None, more)
            out = function(x, w, *b, eps=1e-5, kind=kind, residual=r)
            return out if residual else out[0]

        return run

    def plain(x, w, b=None, *, eps, kind, residual):
        return norms.reference(x, residual, w, b, eps, kind, x.dtype)

    # Liger's may not overwrite dy, which is used again.
    rms = {"eps": 1e-5, "offset": float(kind == "rms1"), "casting_mode": "gemma" if kind == "rms1" else "llama",
           "in_place": False}  # fmt: skip
    calls = {(True, False): ("liger_layer_norm", lambda f, x, w, b: f(x, w, b, 1e-5)),
             (True, True): ("liger_layer_norm", lambda f, x, r, w, b: (f(x + r, w, b, 1e-5), x + r)),
             (False, False): ("liger_rms_norm", lambda f, x, w: f(x, w, **rms)),
             (False, True): ("liger_fused_add_rms_norm", lambda f, x, r, w: f(x, r, w, **rms))}  # fmt: skip
    elements = 2 * T * D
    return Bench(args, tuple(range(len(args))), of(norms.norm), of(plain),
                 {"Liger": liger(*calls[kind == "layer", residual])},
                 (0, elements * 2 * n), (0, elements * (2 + n)), {"share": 0.85})  # fmt: skip


def activation(s: Setting, act: str, rows: int, width: int, gated: bool) -> Bench:
    """x (and up) in, y out; then dy, x (and up) in, dx (and du) out."""
    T = rows // s.cut
    args = (s.randn(T, width), s.randn(T, width)) if gated else (s.randn(T, width),)
    ours = partial(glu.glu, act=act) if gated else partial(glu.gelu, kind=act)

    def plain(x, up=None):
        return glu.reference(x, up, act)

    name = "liger_swiglu" if act == "silu" else "liger_geglu"
    return Bench(args, tuple(range(len(args))), ours, plain,
                 {"Liger": liger(name, lambda f, *args: f(*args))} if gated else {},
                 (0, 2 * T * width * (3 if gated else 2)), (0, 2 * T * width * (5 if gated else 3)),
                 {"share": 0.85})  # fmt: skip


def rotary(s: Setting, c: LM) -> Bench:
    """q and k in and out, half of the float32 table; backward the same."""
    T, (H, K, d, r) = TOKENS // s.cut, c[:4]
    table = rope._table(torch.arange(T, device=s.device), r)

    def turn(f, q, k):
        y = f(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *(t.transpose(0, 1) for t in table))
        return tuple(x[0].transpose(0, 1) for x in y)

    cost = 0, 4 * T * d * (H + K) + 4 * T * r
    return Bench((s.randn(T, H, d), s.randn(T, K, d)), (0, 1), lambda q, k: rope.rope(q, k, *table),
                 lambda q, k: rope.reference(q, k, *table), {"Liger": liger("liger_rope", turn)}, cost, cost,
                 {"share": 0.85})  # fmt: skip


def shapes() -> dict[str, dict[str, Callable[[Setting], Bench]]]:
    """Operation -> name of the shape -> what makes it. The first of each is the one of --quick."""
    phi, tiny, qwen, gemma = LMS.values()
    siglip, clip = (rows * IMAGES for rows, *_ in ENCODERS.values())
    heads = {name: f"{name}, {c.heads}/{c.kv_heads} x {c.head}" for name, c in LMS.items()}
    made = {"attention": {f"{name}, {IMAGES} x {e[0]} x {e[1]} x {e[2]}": partial(dense, n=e[0], H=e[1], d=e[2])
                          for name, e in ENCODERS.items()}}  # fmt: skip
    for what, tokens, equal in (
        ("packed 8k", 8192, False),
        ("packed 16k", TOKENS, False),
        ("8 x 2k", TOKENS, True),
    ):
        made["attention"] |= {f"{heads[n]}, {what}": partial(packed, c=c, tokens=tokens, equal=equal)
                              for n, c in LMS.items()}  # fmt: skip
    made["decode"] = {f"{heads[n]}, 16 caches of {what}": partial(decode, c=c, full=full)
                      for what, full in (("1k to 4k", False), ("4k", True)) for n, c in LMS.items()}  # fmt: skip
    made["lora"] = {f"{n} on {base}": partial(adapters, K=K, widths=widths, base=base) for n, K, widths, base in (
        ("Phi-2 q, k, v", 2560, (2560,) * 3, "bf16"), ("Phi-2 q, k, v", 2560, (2560,) * 3, "NF4"),
        ("TinyLlama q, k, v", 2048, (2048, 256, 256), "NF4"), ("TinyLlama gate, up", 2048, (5632,) * 2, "bf16"),
        ("Qwen2.5-3B gate, up", 2048, (11008,) * 2, "NF4"))}  # fmt: skip
    made["cross_entropy"] = {f"{n}, {c.vocabulary / 1000:.0f}k words, {share:.0%} of 16k tokens":
                             partial(loss, c=c, tokens=TOKENS, supervised=share)
                             for (n, c), share in zip(LMS.items(), (0.2, 0.3, 0.1, 0.2), strict=True)}  # fmt: skip
    made["cross_entropy"]["Qwen2.5-3B, 152k words, all of 8k tokens"] = partial(
        loss, c=qwen, tokens=8192, supervised=1
    )
    for name, module in (("nf4", nf4), ("int8", int8)):
        made[name] = {f"unpack {N} x {K}": partial(unpack, module=module, N=N, K=K)
                      for N, K in ((10240, 2560), (16384, 2048))}  # fmt: skip
        made[name] |= {f"{rows} x {K} by {N} x {K}": partial(multiply, module=module, rows=rows, N=N, K=K)
                       for N, K in ((10240, 2560), (2560, 10240)) for rows in (1, 16, 64)}  # fmt: skip
    made["norms"] = {f"{n}, {rows} x {D}{', residual' * add}": partial(norm, kind=kind, rows=rows, D=D, residual=add)
                     for n, kind, rows, D, add in (
                         ("RMS", "rms", TOKENS, 2048, True), ("RMS", "rms", TOKENS, 2048, False),
                         ("Gemma's RMS", "rms1", TOKENS, 2048, True), ("Layer", "layer", TOKENS, 2560, False),
                         ("Layer", "layer", siglip, 1152, True))}  # fmt: skip
    made["glu"] = {f"{n}, {rows} x {width}": partial(activation, act=act, rows=rows, width=width, gated=gated)
                   for n, act, rows, width, gated in (
                       ("TinyLlama's SwiGLU", "silu", TOKENS, tiny.mlp, True),
                       ("Qwen2.5's SwiGLU", "silu", TOKENS, qwen.mlp, True),
                       ("Gemma's GeGLU", "gelu_tanh", TOKENS, gemma.mlp, True),
                       ("Phi-2's GELU", "gelu_tanh", TOKENS, phi.mlp, False),
                       ("SigLIP's GELU", "gelu_tanh", siglip, 4304, False),
                       ("CLIP's quick GELU", "quick_gelu", clip, 4096, False))}  # fmt: skip
    made["rope"] = {
        f"{heads[n]}, {c.rotary} of {c.head} turn": partial(rotary, c=c) for n, c in LMS.items()
    }
    return made
