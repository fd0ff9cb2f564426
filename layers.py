"""The layers that models share, over the kernels: normalisations, scales and MLPs. T tokens, H heads, d head width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.glu import gelu, glu
from kernels.norms import norm


class _Norm:
    """forward(x) normalises; add(x, residual) normalises their sum and returns that sum too, in one pass."""

    kind: str

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.bias, eps=self.eps, kind=self.kind)[0]

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x, self.weight, self.bias, eps=self.eps, kind=self.kind, residual=residual)


class LayerNorm(_Norm, nn.LayerNorm):
    kind = "layer"


class RMSNorm(_Norm, nn.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019), statistics in float32."""

    kind, start, bias = "rms", 1.0, None

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((width,), self.start)), eps


class OffsetRMSNorm(RMSNorm):
    """Gemma's: the weight is stored less 1."""

    kind, start = "rms1", 0.0


class LayerNormPerHead(nn.Module):
    """StableLM-2's: every head has a LayerNorm of its own. (T, H, d) -> (T, H, d)."""

    def __init__(self, heads: int, width: int, eps: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps, bias=False) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([norm(x[:, i]) for i, norm in enumerate(self.norms)], 1)


class LayerScale(nn.Module):
    """A learnt factor per channel (Touvron et al., 2021)."""

    def __init__(self, width: int, start: float):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((width,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(x, "gelu")


class GLU(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, 2020): SwiGLU with `silu`, GeGLU with `gelu_tanh`."""

    def __init__(self, width: int, intermediate: int, act: str = "silu"):
        super().__init__()
        self.act = act
        self.gate_proj = nn.Linear(width, intermediate, bias=False)
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.act))


class MLP(nn.Module):
    """Phi's: two linears with biases and a GELU (tanh) between them."""

    def __init__(self, width: int, intermediate: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, intermediate), nn.Linear(intermediate, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), "gelu_tanh"))
