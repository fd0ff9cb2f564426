"""Every file of kernels/: as exact as plain torch against fp64, on every target, and no mistake goes unseen.

Without a GPU the kernels run in Triton's interpreter (in fp32 and fp16: its bf16 dot is wrong in triton 3.9) and are
compiled, not run, for four generations of GPUs. With one they run on it, in bf16 too.
"""

import importlib
import importlib.util
import math
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import attention
from tests.tools import environment
from tests.tools.environment import GPU

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.gpu
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU

MODULES = [
    importlib.import_module(f"kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)
]
CASES = [(m, c) for m in MODULES for c in getattr(m, "CASES", ())]
GRADS = [(m, c) for m, c in CASES if c.grads]
MUTATIONS = [(m, x) for m in MODULES for x in getattr(m, "MUTATIONS", ())]


def run(function, case, dtype, place=lambda a: a):
    """Outputs and gradients of a function on the case's inputs, rounded to bf16 first: every dtype sees the same."""
    g = torch.Generator().manual_seed(0)
    args = []
    for i, a in enumerate(case.inputs(g)):
        if isinstance(a, torch.Tensor) and a.dtype == torch.float32:
            a = place(a.bfloat16().to(DEVICE, dtype)).requires_grad_(i in case.grads)
        elif isinstance(a, torch.Tensor):
            a = place(a.to(DEVICE))
        args.append(a)
    out = function(*args)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    if case.grads:
        weights = [torch.randn(o.shape, generator=g).to(o) for o in outs]
        sum((o * w).sum() for o, w in zip(outs, weights, strict=True)).backward()
    return [o.detach() for o in outs] + [args[i].grad for i in case.grads]


def errors(case, dtype):
    """[(what, error of fused, error of reference)], Frobenius norms of the distance to fp64, relative to its norm."""
    exact = run(case.reference, case, torch.float64)
    plain, ours = run(case.reference, case, dtype), run(case.fused, case, dtype)
    rows = []
    for i, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        what = (
            f"output {i}"
            if i < len(exact) - len(case.grads)
            else f"gradient of argument {case.grads[i - len(exact)]}"
        )
        assert o is not None and o.shape == e.shape, what
        size = e.double().norm().clamp(min=1e-30)
        rows.append((what, *((x.double() - e).norm().div(size).item() for x in (o, p))))
    return rows


def wrong(case, dtype) -> list[str]:
    """What of the fused path is further from fp64 than twice plain torch; a rounding to dtype is always granted."""
    grant = torch.finfo(dtype).eps
    return [
        f"{what}: {o:.2e}, plain torch {p:.2e}"
        for what, o, p in errors(case, dtype)
        if not o <= 2 * p + grant / 2
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module, case", CASES, ids=[f"{m.__name__}: {c.name}" for m, c in CASES])
def test_as_exact_as_plain_torch(module, case, dtype):
    assert not wrong(case, dtype)


@pytest.mark.parametrize("case", attention.CASES, ids=lambda c: c.name)
def test_attention_in_the_blocks_of_other_gpus(case, monkeypatch):
    """Of a Hopper they are tested above, without a GPU too."""
    monkeypatch.setattr(attention, "hopper", lambda _: False)
    assert not wrong(case, torch.float16)


@pytest.mark.parametrize(
    "module, mutation", MUTATIONS, ids=[f"{m.__name__}: {x.old[:40]}" for m, x in MUTATIONS]
)
def test_a_mistake_is_seen(module, mutation, tmp_path):
    """The file with one mistake put in fails the comparison above."""
    source = Path(module.__file__).read_text()
    code, mark, table = source.partition("\nCASES = ")
    assert code.count(mutation.old) >= 1, "the mutation no longer matches the file"
    name = "mutant_" + module.__name__.split(".")[-1]
    code = code.replace(mutation.old, mutation.new).replace(
        "barellava::", f"{tmp_path.name.replace('-', '_')}::"
    )
    file = tmp_path / f"{name}.py"
    file.write_text(code + mark + table)
    spec = importlib.util.spec_from_file_location(name, file)
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[name] = mutant
    spec.loader.exec_module(mutant)
    (case,) = [c for c in mutant.CASES if c.name == mutation.case]
    assert wrong(case, torch.float32)


@pytest.mark.parametrize("module, case", GRADS, ids=[f"{m.__name__}: {c.name}" for m, c in GRADS])
def test_gradients_of_the_reference_are_those_of_its_formula(module, case):
    """torch.autograd.gradcheck in float64, by one random direction per input (its fast mode)."""
    args = [a.double() if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a
            for a in case.inputs(torch.Generator().manual_seed(0))]  # fmt: skip
    for i in case.grads:
        args[i].requires_grad_()
    if sum(args[i].numel() for i in case.grads):
        assert torch.autograd.gradcheck(case.reference, args, fast_mode=True)


@pytest.mark.parametrize("module, case", GRADS, ids=[f"{m.__name__}: {c.name}" for m, c in GRADS])
def test_nothing_given_or_saved_is_changed(module, case):
    """Two backward passes of one graph give the same gradients, and the inputs are what they were."""
    args = [
        a.to(DEVICE) if isinstance(a, torch.Tensor) else a
        for a in case.inputs(torch.Generator().manual_seed(0))
    ]
    leaves = [args[i].requires_grad_() for i in case.grads]
    before = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
    out = case.fused(*args)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    loss = sum(o.square().sum() for o in outs)
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, torch.Tensor)
    )


@pytest.mark.parametrize("module, case", CASES, ids=[f"{m.__name__}: {c.name}" for m, c in CASES])
def test_nothing_is_read_or_written_outside_of_a_tensor(module, case, monkeypatch):
    """Arguments and what is allocated for results lie between 4,096 NaNs (77s) on either side, which reach no result
    and are there afterwards."""
    want, kept, full, margin = run(case.fused, case, torch.float32), [], torch.full, 4096

    def empty(shape, dtype):
        fill, n = (float("nan") if dtype.is_floating_point else 77), math.prod(shape)
        kept.append((full((n + 2 * margin,), fill, dtype=dtype, device=DEVICE), n))
        return kept[-1][0][margin : margin + n].view(shape)

    def sizes(size):
        return size if all(isinstance(n, int) for n in size) else tuple(size[0])

    monkeypatch.setattr(
        torch, "empty_like", lambda x, dtype=None, **_: empty(x.shape, dtype or x.dtype)
    )
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda x, *n, dtype=None, **_: empty(sizes(n), dtype or x.dtype)
    )
    monkeypatch.setattr(
        torch.Tensor,
        "new_zeros",
        lambda x, *n, dtype=None, **_: x.new_empty(*n, dtype=dtype).zero_(),
    )
    got = run(case.fused, case, torch.float32, lambda a: empty(a.shape, a.dtype).copy_(a))
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for whole, n in kept:
        for part in (whole[:margin], whole[margin + n :]):
            assert (part.isnan() if whole.is_floating_point() else part == 77).all()


def test_every_kernel_file_has_cases_and_mistakes():
    for module in MODULES:
        assert module.CASES and module.MUTATIONS and module.BUILDS, module.__name__
        assert "def reference" in Path(module.__file__).read_text()


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("target", [80, 89, 90, 100])
def test_compiles_without_spilling(module, target):
    """To machine code, in a process of its own: the interpreter and the compiler do not share one."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, ROOT / "tests" / "tools" / "compile_kernels.py", module.__name__, str(target)],
                          capture_output=True, text=True, cwd=ROOT, env=env)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


LENGTHS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from kernels import attention, cross_entropy, glu, lora, norms, rope

class NoGPU:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, device=None: 0
    get_active_torch_device = lambda self: torch.device("cpu")

driver.set_active(NoGPU())
launch, made = JITFunction.run, set()
def compile_only(self, *args, warmup, **options):
    made.add((self, launch(self, *args, warmup=True, **options).hash))
JITFunction.run = compile_only
for lengths in ([1], [16], [17, 47]):
    T = sum(lengths)
    x, q = (torch.randn(T, *n, dtype=torch.bfloat16, requires_grad=True) for n in ((64,), (4, 64)))
    A, B, W = (torch.randn(n, requires_grad=True) for n in ((16, 64), (64, 16), (64, 64)))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    turned = rope.triton_rope(q, q, *rope._table(torch.arange(T), 64))
    attention.triton_packed(*turned, q, cu, max(lengths)).sum().backward()
    lora.triton_linears(x, [W], [None], [A], [B], [1.0], 0.1, torch.tensor([3]))[0].sum().backward()
    glu._glu(norms.triton_norm(x, x, W[0], W[1], 1e-5, "layer", x.dtype)[0], x, "silu").sum().backward()
    cross_entropy._run(x, W.bfloat16(), None, torch.zeros(T, dtype=torch.long), 1 << 20, True).backward()
names = sorted(f"{kernel.__module__}.{kernel.__name__}" for kernel, _ in made)
assert len(names) == len(set(names)) == 12, names
"""


def test_a_kernel_is_compiled_once_for_all_lengths():
    """No packed row or batch of another size stops training to compile."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LENGTHS], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]


PEAK = """
import resource, sys, torch
import torch.nn.functional as F
from kernels.cross_entropy import linear_cross_entropy
hidden = torch.randn(2048, 64, requires_grad=True)
weight = torch.randn(151936, 64).mul_(0.1).requires_grad_()
targets = torch.randint(0, 151936, (2048,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "ours":
    loss = linear_cross_entropy(hidden, weight, None, targets)
else:
    loss = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_loss_takes_a_quarter_of_the_memory_of_all_logits():
    """Forward and backward, 2,048 tokens, 152k words: the peak above the inputs, each in a process of its own."""
    ours, plain = (int(environment.run("-c", PEAK, which).stdout) for which in ("ours", "plain"))
    assert ours <= plain / 4
    assert plain > 2048 * 151936 * 4 / 1024  # KiB: it did hold them
