"""NF4 and int8 are bitsandbytes' bytes; the dropout of adapters is one good mask everywhere.

That the kernels are exact, in value and gradient, is test_accuracy.py. Here: equality of every
bit.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kernels import int8, lora, nf4, tl, triton
from tests.tools.environment import GPU, shared
from tests.tools.fuzz import ODD

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [
    torch.bfloat16
] * GPU  # the interpreter cuts bfloat16 off, unrounded


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def golden(name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(shared("golden/nf4/bnb.safetensors"))
    return {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}


@pytest.mark.parametrize("name, double", [("a", False), ("b", True), ("c", True)])
def test_nf4_is_bitsandbytes_byte_for_byte(name, double):
    expected = golden(name)
    state = nf4.quantize(expected["weight_fp"], double).state()
    assert set(state) == {k for k in expected if k.startswith("weight") and k != "weight_fp"}
    assert [k for k, t in state.items() if not same(t, expected[k])] == []
    read = nf4.NF4.from_state({k: expected[k] for k in state})
    assert [k for k, t in read.state().items() if not same(t, expected[k])] == []


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("function", [nf4.reference, nf4.triton_dequantize])
def test_nf4_dequantized_is_bitsandbytes(name, function):
    expected = golden(name)
    q = nf4.NF4.from_state(expected).to(DEVICE)
    w = function(q, torch.bfloat16) if GPU else function(q, torch.float32).bfloat16()
    assert same(w.cpu(), expected["dequantized"])


def test_rows_that_are_not_whole_blocks():
    """bitsandbytes' CPU code quantizes these in flat blocks, then reads each row as one begun anew.

    We do not.
    """
    expected = golden("c")
    q, (rows, width) = nf4.NF4.from_state(expected), expected["weight_fp"].shape
    scale = (q.nested_quant_map[q.absmax.int()] * q.nested_absmax + q.nested_offset)[
        : rows * width // 64
    ]
    codes = q.quant_map[torch.cat([q.packed >> 4, q.packed & 15], 1).int()].view(rows, width)
    row, column = torch.arange(rows)[:, None], torch.arange(width)
    assert same((codes * scale[row + column // 64]).bfloat16(), expected["dequantized"])
    ours = nf4.dequantize(q, torch.bfloat16)
    assert same(ours, (codes * scale[(row * width + column) // 64]).bfloat16())
    error = [
        (w.float() - expected["weight_fp"].float()).norm() for w in (ours, expected["dequantized"])
    ]
    assert error[0] < 0.6 * error[1]


def test_nf4_by_hand():
    """Every code once, doubled; 17 more numbers make a ragged block and an odd count."""
    codes = torch.tensor(nf4.NF4_CODE)
    w = torch.cat([2 * codes.repeat(4), 0.5 * codes, torch.zeros(1)]).view(3, 27)
    q = nf4.quantize(w, double=False)
    pairs = [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert q.packed.tolist() == [[b] for b in pairs * 5] + [[0x77]]
    assert q.absmax.tolist() == [2.0, 0.5]
    assert same(nf4.dequantize(q, torch.float32), w)
    zero = nf4.quantize(torch.zeros(2, 64))
    assert same(nf4.dequantize(zero, torch.float32), torch.zeros(2, 64))


def test_double_quantization_by_hand():
    """absmax 1, 2, 3, 6: less their mean 3 they are -2, -1, 0, 3, of which 3 is the largest."""
    q = nf4.quantize(torch.tensor([1.0, 2.0, 3.0, 6.0])[:, None].repeat(1, 64))
    assert q.nested_offset == 3 and q.nested_absmax.tolist() == [3.0]
    code = q.nested_quant_map[q.absmax.int()]
    assert (code - torch.tensor([-2 / 3, -1 / 3, 0, 1])).abs().max() < 0.008 and code[3] == 1
    assert (q.nested_quant_map.diff() > 0).all() and q.nested_quant_map.abs().max() == 1
    assert same(nf4.dequantize(q, torch.float32)[:, 0], code * 3 + 3)
    equal = nf4.quantize(torch.ones(4, 64))
    assert equal.absmax.tolist() == [0, 0, 0, 0] and same(
        nf4.dequantize(equal, torch.float32), torch.ones(4, 64)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_nf4_kernel_gives_the_same_bits(dtype, double):
    g = torch.Generator().manual_seed(0)
    for shape in [(5, 129), (1, 1), (40, 130)]:
        w = torch.randn(shape, generator=g).to(DEVICE, dtype)
        w[0] = 0
        q = nf4.quantize(w, double)
        assert same(nf4.triton_dequantize(q, dtype), nf4.reference(q, dtype))


def test_a_large_weight_is_quantized_in_parts():
    w = torch.randn(66000, 64, generator=torch.Generator().manual_seed(0))
    whole, halves = (
        nf4.quantize(w, double=False),
        [nf4.quantize(h, double=False) for h in w.split(33000)],
    )
    assert same(whole.packed, torch.cat([h.packed for h in halves]))
    assert same(whole.absmax, torch.cat([h.absmax for h in halves]))


def test_nf4_of_another_kind_is_refused():
    state = nf4.quantize(torch.ones(2, 64)).state()
    key = "weight.quant_state.bitsandbytes__nf4"
    for old, new in ((b'"nf4"', b'"fp4"'), (b'blocksize": 256', b'blocksize": 128')):
        text = bytes(state[key].tolist()).replace(old, new)
        with pytest.raises(ValueError, match="only nf4"):
            nf4.NF4.from_state(state | {key: torch.tensor(list(text), dtype=torch.uint8)})


@pytest.mark.parametrize("double", [True, False])
def test_nf4_facts_that_do_not_fit_are_refused(double):
    """Every fact with every odd value: ValueError, or a weight that can be unpacked."""
    state = nf4.quantize(torch.ones(4, 64), double).state()
    key = "weight.quant_state.bitsandbytes__nf4"
    facts = json.loads(bytes(state[key].tolist()))

    def with_facts(text: str) -> dict:
        return state | {key: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    for name in facts:
        for value in ODD:
            try:
                text = json.dumps(facts | {name: value})
                q = nf4.NF4.from_state(with_facts(text))
            except ValueError:
                continue
            assert nf4.reference(q, torch.float32).shape == (4, 64)

    for text in ("", "[]", "3", "[" * 50_000, '{"shape": [4, 64, 1]}'):
        with pytest.raises(ValueError):
            nf4.NF4.from_state(with_facts(text))
    for name, tensor in state.items():
        for wrong in (tensor[:-1], tensor.to(torch.float16)):
            with pytest.raises(ValueError):
                nf4.NF4.from_state(state | {name: wrong})


def test_int8_tensors_that_do_not_fit_are_refused():
    state = int8.quantize(torch.ones(4, 64)).state()
    for change in ({"weight": torch.ones(4, 64)}, {"SCB": torch.ones(5)}, {"SCB": None}):
        with pytest.raises(ValueError):
            int8.Int8.from_state(state | change)


def test_int8_is_bitsandbytes_byte_for_byte():
    expected = golden("int8")
    q = int8.quantize(expected["weight_fp"])
    assert same(q.weight, expected["weight"]) and same(q.SCB, expected["SCB"])
    assert same(
        int8.dequantize(q, torch.float32),
        expected["weight"] * expected["SCB"][:, None] * 7.874015718698502e-3,
    )


def test_int8_by_hand():
    q = int8.quantize(torch.tensor([[127.0, -126.0, 1.5, 2.5], [0, 0, 0, 0], [2, -1, 0.5, 0]]))
    assert q.weight.tolist() == [
        [127, -126, 2, 2],
        [0, 0, 0, 0],
        [127, -64, 32, 0],
    ]  # ties go to even
    assert q.SCB.tolist() == [127.0, 0.0, 2.0]
    assert same(int8.dequantize(q, torch.float16)[0], torch.tensor([127.0, -126, 2, 2]).half())
    state = int8.Int8.from_state(q.state()).state()
    assert {k: t.dtype for k, t in state.items()} == {
        "weight": torch.int8,
        "SCB": torch.float32,
        "weight_format": torch.uint8,
    }
    with pytest.raises(ValueError, match="weight_format 2"):
        int8.Int8.from_state(state | {"weight_format": torch.tensor(2, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="not finite"):
        int8.quantize(torch.tensor([[1e5, 1.0]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_kernel_gives_the_same_bits(dtype):
    q = int8.quantize(torch.randn(5, 1100, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    assert same(int8.triton_dequantize(q, dtype), int8.reference(q, dtype))


@triton.jit
def mask_kernel(SEED, MASK, first, K, threshold, BLOCK: tl.constexpr):
    """One row of lora.kept per program."""
    k = tl.arange(0, BLOCK)
    row = first + tl.program_id(0) + tl.zeros((1,), tl.int64)
    mask = lora.kept(SEED, row[:, None], k[None, :], K, threshold)
    tl.store(MASK + tl.program_id(0) * K + k[None, :], mask, (k < K)[None, :])


def triton_mask(seed, first, rows, columns, p):
    mask = torch.zeros(rows, columns, dtype=torch.int8, device=DEVICE)
    mask_kernel[(rows,)](
        seed, mask, first, columns, round(p * 2**16), triton.next_power_of_2(columns)
    )
    return mask.bool()


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**62 + 12345, -7])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_mask_is_the_same_in_torch_and_triton(seed, p):
    seed = torch.tensor(seed, device=DEVICE)
    assert same(triton_mask(seed, 0, 50, 77, p), lora.keep_mask(seed, 50, 77, p))


def test_mask_wraps_after_32_bits():
    """Row 2^32 / 2048 has the counters of row 0, of 2,048 pairs."""
    seed = torch.tensor(5, device=DEVICE)
    assert same(triton_mask(seed, 2**32 // 2048, 3, 4096, 0.5), lora.keep_mask(seed, 3, 4096, 0.5))


@pytest.mark.parametrize("p", [0.05, 0.25])
@pytest.mark.parametrize("shape", [(512, 1024), (301, 1023)])
def test_mask_is_random(p, shape):
    """Its rate, its flat power spectrum, and no relation between two seeds.

    A flat spectrum: no period, row or column stands out.
    """
    n = shape[0] * shape[1]

    def centred(seed):
        return (lora.keep_mask(torch.tensor(seed), *shape, p).double() - (1 - p)) / (
            p * (1 - p)
        ) ** 0.5

    def peak(v):
        return (
            torch.fft.fft2((v - v.mean()) / v.std()).abs().square().max() / n
        )  # of noise: about log n = 13

    for seed in (0, 1, 2**40):
        a = centred(seed)
        assert abs(a.mean()) * n**0.5 < 4
        assert peak(a) < 20
        for other in (seed + 1, seed + 2**32):
            both = a * centred(other)
            assert abs(both.mean()) * n**0.5 < 4
            assert peak(both) < 30


def _adapters(form, K=64, widths=(24, 40), ranks=(5, 16), dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    make = {"plain": lambda w: w.to(dtype), "nf4": nf4.quantize, "int8": int8.quantize}[form]

    def randn(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=g)).to(DEVICE)

    weights = [make(randn(n, K, scale=K**-0.5)) for n in widths]
    As = [randn(r, K, scale=K**-0.5).requires_grad_() for r in ranks]
    Bs = [randn(n, r).requires_grad_() for n, r in zip(widths, ranks, strict=True)]
    biases = [randn(widths[0]).requires_grad_(), None]
    return randn(3, 5, K).to(dtype).requires_grad_(), weights, biases, As, Bs, [2.0, 0.5]


@pytest.mark.parametrize("form", ["plain", "nf4", "int8"])
def test_adapters_are_pefts_formula(form):
    x, weights, biases, As, Bs, scales = _adapters(form)
    seeds = torch.tensor([3, 4], device=DEVICE)
    for p in (0.0, 0.3):
        ys = lora.lora_linears(x, weights, biases, As, Bs, scales, p, seeds)
        for y, W, b, A, B, s, seed in zip(ys, weights, biases, As, Bs, scales, seeds, strict=True):
            keep = lora.keep_mask(seed, 15, 64, p).view(3, 5, 64) if p else 1
            expected = (
                F.linear(x, lora.dense(W, x.dtype), b) + s * ((x * keep / (1 - p)) @ A.t()) @ B.t()
            )
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_adapters_in_float32_beside_bf16():
    """They are rounded to x's dtype, as under autocast; their gradients keep their own."""
    x, weights, biases, As, Bs, scales = _adapters("plain", dtype=torch.bfloat16)
    ys = lora.triton_linears(x, weights, biases, As, Bs, scales, 0.0, None)
    rounded = lora.reference(
        x, weights, biases, *([t.bfloat16() for t in ts] for ts in (As, Bs)), scales, 0.0, None
    )
    assert [same(a, b) for a, b in zip(ys, rounded, strict=True)] == [True, True]
    sum(y.float().square().sum() for y in ys).backward()
    assert {t.grad.dtype for t in (*As, *Bs, biases[0])} == {
        torch.float32
    } and x.grad.dtype == torch.bfloat16
    dys, h = [y[0].detach() for y in ys], x.new_zeros(5, 32)
    arguments = (dys, x[0], weights, [0, 0], As, Bs, h, scales, 0.0, None, [True, True, False])
    torch.library.opcheck(lora._lora_backward._opoverload, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("fused", [False, True])
def test_adapters_follow_autocast(fused, monkeypatch):
    monkeypatch.setattr(lora, "fused", lambda x: fused)
    x, weights, biases, As, Bs, scales = _adapters("nf4")
    with torch.autocast(DEVICE, torch.bfloat16):
        ys = lora.lora_linears(x, weights, biases, As, Bs, scales)
    assert {y.dtype for y in ys} == {torch.bfloat16}
    (ys[0].float().sum() + ys[1].float().sum()).backward()
    assert x.grad.dtype == torch.float32 and As[1].grad.abs().sum() > 0


@pytest.mark.parametrize("function", [lora.triton_linears, lora.lora_linears])
@pytest.mark.parametrize("form", ["plain", "nf4", "int8"])
def test_adapters_survive_compile(function, form):
    """In one graph, with the same numbers, and without a change to any argument."""
    x, weights, biases, As, Bs, scales = _adapters(form)
    if form == "plain":
        weights[1].requires_grad_()
    leaves = [
        t
        for t in (x, biases[0], *As, *Bs, *weights)
        if isinstance(t, torch.Tensor) and t.requires_grad
    ]

    def loss(seeds):
        first, second = function(x, weights, biases, As, Bs, scales, 0.25, seeds)
        return first.square().sum() + second.sin().sum()

    seeds = torch.tensor([3, 4], device=DEVICE)
    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        y = f(seeds)
        results.append((y, *torch.autograd.grad(y, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert {t._version for t in leaves} == {0}


def test_an_unused_output_and_a_frozen_input():
    x, weights, biases, As, Bs, scales = _adapters("plain")
    x = x.detach()
    first, _ = lora.triton_linears(x, weights, biases, As, Bs, scales, 0.0, None)
    first.sum().backward()
    assert (
        As[0].grad.abs().sum() > 0
        and As[1].grad.abs().sum() == 0
        and x.grad is None
        and biases[0].grad is not None
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_of_the_reference(p):
    x, weights, _, As, Bs, scales = (
        [t.detach().double().requires_grad_() for t in v if torch.is_tensor(t)]
        if isinstance(v, list)
        else v
        for v in _adapters("plain", K=6, widths=(3, 4), ranks=(1, 2))
    )
    seeds = torch.tensor([3, 4], device=DEVICE)

    def function(x, *flat):
        return lora.reference(x, flat[:2], [None, None], flat[2:4], flat[4:], [2.0, 0.5], p, seeds)

    assert torch.autograd.gradcheck(
        function, (x.detach().double().requires_grad_(), *weights, *As, *Bs)
    )
