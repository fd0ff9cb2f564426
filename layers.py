"""Layers that encoders, connectors and language models share: norms, LayerScale, GELU and two MLPs.

    input_norm = RMSNorm(width, eps=1e-6)
    normed = input_norm(x)                          # (..., D) -> (..., D)
    normed, x = input_norm.add(attended, x)         # x = x + attended, and the norm of that sum

    LayerNorm, RMSNorm, OffsetRMSNorm    norms, which can also add a residual
    LayerNormPerHead, LayerScale         what StableLM-2 does to heads, DINOv2 to branches
    GELU, GLU, MLP                       the second half of a transformer's block

T tokens, D width, H heads, d head width. `norm`, `gelu` and `glu` are functions of kernels/: each
call is one fused Triton kernel on a GPU, and plain PyTorch elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.glu import gelu, glu
from kernels.norms import norm

# -------------------------------------------------------------------------------------------- norms


class _Norm:
    """The calls that the norms share. Each norm brings weight, bias, eps and `kind`."""

    kind: str  # by which the kernel knows the norm

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., D), normalised over its last dimension."""
        normed, _ = norm(x, self.weight, self.bias, eps=self.eps, kind=self.kind)
        return normed

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return norm(x + residual) and x + residual, (..., D) each."""
        # One kernel for both, so that the sum is not read back from memory.
        return norm(x, self.weight, self.bias, eps=self.eps, kind=self.kind, residual=residual)


class LayerNorm(_Norm, nn.LayerNorm):
    """Layer normalisation (Ba et al., 2016): mean 0 and variance 1, then weight and bias."""

    kind = "layer"


class RMSNorm(_Norm, nn.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019), with statistics in float32."""

    kind = "rms"
    start = 1.0  # of each weight
    bias = None  # the kernel takes one for LayerNorm

    def __init__(self, width: int, eps: float):
        super().__init__()
        weight = torch.full((width,), self.start)
        self.weight = nn.Parameter(weight)
        self.eps = eps


class OffsetRMSNorm(RMSNorm):
    """Gemma's RMSNorm: the factor is 1 + weight, so a weight starts at 0."""

    kind = "rms1"
    start = 0.0


class LayerNormPerHead(nn.Module):
    """StableLM-2's norm of queries and keys: each head has a LayerNorm of its own, without bias."""

    def __init__(self, heads: int, width: int, eps: float):
        super().__init__()
        self.norms = nn.ModuleList()
        for _ in range(heads):
            self.norms.append(nn.LayerNorm(width, eps, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (T, H, d), each head normalised by its own norm."""
        normed = []
        for i, head_norm in enumerate(self.norms):
            head = x[:, i]  # (T, d)
            normed.append(head_norm(head))
        return torch.stack(normed, dim=1)


class LayerScale(nn.Module):
    """A learnt factor per channel (Touvron et al., 2021), on what a block adds to its input."""

    def __init__(self, width: int, start: float):
        super().__init__()
        factors = torch.full((width,), float(start))
        self.lambda1 = nn.Parameter(factors)  # called like this in DINOv2's files

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., D) times the factors (D,)."""
        return x * self.lambda1


# --------------------------------------------------------------------------------------------- MLPs


class GELU(nn.Module):
    """GELU with erf (Hendrycks and Gimpel, 2016), as a module for nn.Sequential."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x * Phi(x), Phi the standard normal distribution function."""
        return gelu(x, "gelu")


class GLU(nn.Module):
    """A gated MLP (Shazeer, 2020): SwiGLU with act "silu", GeGLU with "gelu_tanh"."""

    def __init__(self, width: int, intermediate: int, act: str = "silu", bias: bool = False):
        super().__init__()
        self.act = act

        self.gate_proj = nn.Linear(width, intermediate, bias=bias)
        self.up_proj = nn.Linear(width, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return down(act(gate(x)) * up(x)), (..., D) -> (..., D)."""
        gate = self.gate_proj(x)
        up = self.up_proj(x)

        # One kernel. Backward computes act(gate) again, so it is not stored.
        hidden = glu(gate, up, self.act)  # act(gate) * up
        return self.down_proj(hidden)


class MLP(nn.Module):
    """Phi's MLP: two linears with biases and a GELU (its tanh approximation) between them."""

    def __init__(self, width: int, intermediate: int):
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate)
        self.fc2 = nn.Linear(intermediate, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return fc2(gelu(fc1(x))), (..., D) -> (..., D)."""
        hidden = gelu(self.fc1(x), "gelu_tanh")
        return self.fc2(hidden)
