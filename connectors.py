"""Connectors: from the encoder's tokens to the language model's width.

    build_connector("mlp2x_gelu", vision_dim=1152, text_dim=2560)

N images, n tokens per image, C vision width, D text width. Parameter names are TinyLLaVA's.
"""

from __future__ import annotations

from torch import nn

from config import UserError


def _identity(vision_dim: int, text_dim: int) -> nn.Module:
    if vision_dim != text_dim:
        raise UserError(
            "model.connector", f"identity needs equal widths, not {vision_dim} and {text_dim}", "use linear"
        )
    return nn.Identity()


def _mlp(depth: int):
    """LLaVA-1.5's connector: `depth` linears with GELU between them."""

    def build(vision_dim: int, text_dim: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(vision_dim, text_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(text_dim, text_dim)]
        return nn.Sequential(*layers)

    return build


CONNECTORS = {
    "identity": _identity,
    "linear": nn.Linear,
    **{f"mlp{depth}x_gelu": _mlp(depth) for depth in range(1, 9)},
}


def build_connector(spec: str, vision_dim: int, text_dim: int, **options) -> nn.Module:
    """A module (N, n, C) -> (N, m, D); `spec` is an exact name of CONNECTORS. Raises UserError for another one."""
    if spec not in CONNECTORS:
        raise UserError("model.connector", f"unknown {spec!r}", f"one of {', '.join(CONNECTORS)}")
    return CONNECTORS[spec](vision_dim, text_dim, **options)


def connector_tokens(spec: str, tokens: int, **options) -> int:
    """How many positions an image of `tokens` encoder tokens takes in the language model."""
    return tokens
