"""Every kernel is as exact as plain torch against fp64, and touches nothing that is not its own.

Without a GPU the kernels run in Triton's interpreter, in fp32 and fp16. With one they run on it, in
bf16 too.
"""

import math

import pytest
import torch

from kernels import attention
from tests.kernels.cases import OPERATIONS, cases_file
from tests.tools.kernel_accuracy import DEVICE, DTYPES, as_outputs, run, wrong

pytestmark = pytest.mark.gpu

CASES = []
for operation in OPERATIONS:
    for case in cases_file(operation).CASES:
        CASES.append(pytest.param(case, id=f"{operation}: {case.name}"))
GRADS = [param for param in CASES if param.values[0].grads]
ATTENTION = cases_file("attention").CASES

MARGIN = 4096  # elements on either side of a tensor that must stay what they are


def is_float32(a) -> bool:
    return isinstance(a, torch.Tensor) and a.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_plain_torch(case, dtype):
    assert not wrong(case, dtype)


@pytest.mark.parametrize("case", ATTENTION, ids=lambda c: c.name)
def test_attention_in_the_blocks_of_other_gpus(case, monkeypatch):
    """A Hopper's blocks are tested above, without a GPU too."""
    monkeypatch.setattr(attention, "is_hopper", lambda _: False)
    assert not wrong(case, torch.float16)


@pytest.mark.parametrize("case", GRADS)
def test_gradients_of_the_reference_are_those_of_its_formula(case):
    """torch.autograd.gradcheck in float64, by one random direction per input (its fast mode)."""
    args = []
    for a in case.inputs(torch.Generator().manual_seed(0)):
        args.append(a.double() if is_float32(a) else a)
    for i in case.grads:
        args[i].requires_grad_()
    if sum(args[i].numel() for i in case.grads):
        assert torch.autograd.gradcheck(case.reference, args, fast_mode=True)


@pytest.mark.parametrize("case", GRADS)
def test_nothing_given_or_saved_is_changed(case):
    """Two backward passes of one graph give the same gradients, and inputs are what they were."""
    args = []
    for a in case.inputs(torch.Generator().manual_seed(0)):
        args.append(a.to(DEVICE) if isinstance(a, torch.Tensor) else a)
    leaves = [args[i].requires_grad_() for i in case.grads]
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    before = [a.detach().clone() for a in tensors]

    outs = as_outputs(case.fused(*args))
    loss = sum(o.square().sum() for o in outs)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_or_written_outside_of_a_tensor(case, monkeypatch):
    """Arguments and what is allocated for results lie between 4,096 NaNs (77s) on either side.

    These reach no result and are there afterwards.
    """
    want = run(case.fused, case, torch.float32)
    full = torch.full
    kept = []  # each tensor with its margins, and its elements

    def empty(shape, dtype):
        fill = float("nan") if dtype.is_floating_point else 77
        elements = math.prod(shape)
        whole = full((elements + 2 * MARGIN,), fill, dtype=dtype, device=DEVICE)
        kept.append((whole, elements))
        return whole[MARGIN : MARGIN + elements].view(shape)

    def empty_like(x, dtype=None, **_):
        return empty(x.shape, dtype or x.dtype)

    def new_empty(x, *size, dtype=None, **_):
        if not all(isinstance(n, int) for n in size):
            size = tuple(size[0])
        return empty(size, dtype or x.dtype)

    def new_zeros(x, *size, dtype=None, **_):
        return new_empty(x, *size, dtype=dtype).zero_()

    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    got = run(case.fused, case, torch.float32, lambda a: empty(a.shape, a.dtype).copy_(a))
    monkeypatch.undo()

    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for whole, elements in kept:
        for margin in (whole[:MARGIN], whole[MARGIN + elements :]):
            untouched = margin.isnan() if whole.is_floating_point() else margin == 77
            assert untouched.all()
