"""Operations: what nothing used has no gradient, and only torch.compile pays for torch.library."""

import pytest
import torch

from kernels import attention, cross_entropy, glu, int8, lora, norms, rope
from tests.kernels.cases.rope import table
from tests.tools.environment import GPU

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if GPU else "cpu"


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


def test_a_norm_of_which_only_one_output_is_used():
    x, residual, weight = randn(3, 16), randn(3, 16), randn(16)
    y, s = norms.triton_norm(x, residual, weight, None, 1e-5, "rms", torch.float32)
    expected, _ = norms.reference(x, residual, weight, None, 1e-5, "rms", torch.float32)
    leaves = (x, residual, weight)
    found = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    exact = torch.autograd.grad(expected.square().sum(), leaves)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    dx, dresidual, dweight = torch.autograd.grad(s.sum(), leaves)
    assert (dx == 1).all() and (dresidual == 1).all() and (dweight == 0).all()


@pytest.mark.parametrize("used", [0, 1])
def test_rope_of_which_only_one_output_is_used(used):
    q, k = randn(3, 4, 16), randn(3, 2, 16)
    cos, sin = table(torch.arange(3, device=DEVICE), 16)
    found = rope.triton_rope(q, k, cos, sin)[used].square().sum()
    exact = rope.reference(q, k, cos, sin)[used].square().sum()
    gradients = torch.autograd.grad(found, (q, k), allow_unused=True)
    assert gradients[1 - used] is None
    expected = torch.autograd.grad(exact, (q, k)[used])
    torch.testing.assert_close(gradients[used], *expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_arrives_as_a_tensor_of_zeros(monkeypatch):
    """The backward operations get None for what nothing used: zeros would be made and read."""
    given = []

    def watch(operation):
        real = operation.recorded.__self__.backward

        def backward(ctx, *grads):
            given.append([g is not None for g in grads])
            return real(ctx, *grads)

        monkeypatch.setattr(operation.recorded.__self__, "backward", staticmethod(backward))

    for operation in (
        norms._norm,
        attention._attention,
        rope._rope,
        cross_entropy._linear_cross_entropy,
    ):
        watch(operation)
    x, weight, q = randn(3, 16), randn(16), randn(3, 1, 16)
    norms.triton_norm(x, None, weight, None, 1e-5, "rms", x.dtype)[0].sum().backward()
    attention.triton_attention(q[None], q[None], q[None], True).sum().backward()
    rope.triton_rope(q, q, *table(torch.arange(3, device=DEVICE), 16))[0].sum().backward()
    targets = torch.tensor([1, 2, 3], device=DEVICE)
    cross_entropy.chunked(x, randn(8, 16), None, targets, 1 << 20, True).backward()
    one = [True, False]
    assert given == [[True, False, False, False], one, one, [True, False, False, False]]


def test_rows_that_are_given_make_the_loss_that_is_found():
    """With and without kernels, to the bit: value and gradients."""
    hidden, weight = randn(6, 16), randn(8, 16)
    targets = torch.tensor([-100, 2, -100, 5, 7, -100], device=DEVICE)
    rows = torch.tensor([1, 3, 4], device=DEVICE)
    for kernel in (True, False):
        results = []
        for given in (None, rows):
            loss = cross_entropy.chunked(hidden, weight, None, targets, 64, kernel, given)
            results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_operation_is_called_through_torch_library_but_in_a_graph(monkeypatch):
    """What torch.library registers takes the CPU 100 microseconds a call."""
    operations = [norms._norm, norms._norm_backward, glu._glu, glu._glu_backward, lora._lora]
    operations += [lora._lora_backward, attention._attention, attention._attention_backward]

    def refuse(*_):
        raise AssertionError("called")

    for operation in operations:
        monkeypatch.setattr(operation, "registered", refuse)
    x, weight = randn(3, 16), randn(16)
    y, _ = norms.triton_norm(x, None, weight, None, 1e-5, "rms", x.dtype)
    y = glu.triton_glu(y, y, "silu")
    W, A, B = randn(16, 16), randn(4, 16), randn(16, 4)
    (y,) = lora.triton_linears(y, [W], [None], [A], [B], [1.0], 0.0, None)
    q = y.view(1, 3, 1, 16)
    attention.triton_attention(q, q, q, True).sum().backward()
    assert x.grad is not None and A.grad is not None


def test_what_has_no_gradient_refuses_to_give_one():
    """Nothing is silently cut off from autograd, not even a second derivative."""
    x = randn(2, 64)
    y = int8.triton_matmul(x, int8.quantize(torch.randn(32, 64, device=DEVICE)))
    with pytest.raises(RuntimeError, match="autograd"):
        y.sum().backward()

    y = glu.triton_glu(x, None, "gelu").square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dx.sum().backward()


WINDOW, TOKENS = 40, 460


def windowed():
    """Return q, k and v of one sample, and attention of it with a window."""
    cu_seqlens = torch.tensor([0, TOKENS], dtype=torch.int32, device=DEVICE)

    def attend(q, k, v):
        return attention.triton_packed(q, k, v, cu_seqlens, TOKENS, window=WINDOW)

    return randn(TOKENS, 1, 16), randn(TOKENS, 1, 16), randn(TOKENS, 1, 16), attend


def test_keys_before_a_window_are_not_read():
    """NaN and infinity in far keys and values reach no query, forward and backward."""
    q, k, v, attend = windowed()
    with torch.no_grad():
        k[:200] = float("nan")
        v[:200] = float("inf")
    near = slice(400, TOKENS)  # no block of these queries begins before key 256
    o = attend(q, k, v)[near]
    expected = attention.reference(q[None, 200:], k[None, 200:], v[None, 200:], True, None, WINDOW)
    expected = expected[0, 200:]
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)

    found = torch.autograd.grad(o.sum(), (q, k, v))
    exact = torch.autograd.grad(expected.sum(), (q, k, v))
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a[near], b[near], rtol=1e-5, atol=1e-5)


def test_queries_behind_a_window_are_not_read():
    """NaN in far queries' gradients reaches no key."""
    q, k, v, attend = windowed()
    do = torch.randn(TOKENS, 1, 16, device=DEVICE)
    do[330:] = float("nan")
    found = torch.autograd.grad(attend(q, k, v), (q, k, v), do)
    expected = attention.reference(q[None, :200], k[None, :200], v[None, :200], True, None, WINDOW)
    exact = torch.autograd.grad(expected[0], (q, k, v), do[:200])
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a[:128], b[:128], rtol=1e-5, atol=1e-5)
