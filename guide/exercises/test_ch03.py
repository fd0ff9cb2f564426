"""Chapter 3's exercises are done when these tests pass."""

import torch

from connectors import CONNECTORS, Connector, build_connector, connector_tokens, cut_squares
from guide.exercises import chosen

ch = chosen("ch03")


def test_unshuffle_brings_the_grid_back():
    x = torch.randn(2, 6, 4, 5)
    for factor in (1, 2):
        tokens = cut_squares(x, factor).flatten(3).flatten(1, 2)
        back = ch.unshuffle(tokens, factor, 6 // factor, 4 // factor)
        assert torch.equal(back, x)


def test_average_is_a_connector(monkeypatch):
    entry = Connector(ch.Average, options={"every": 4}, tokens=ch.one_of_every)
    monkeypatch.setitem(CONNECTORS, "average", entry)
    connector = build_connector("average", 6, 10, every=3)
    x = torch.randn(2, 11, 6)

    # 11 tokens are three groups of three; two are left over.
    out = connector(x)
    assert out.shape == (2, 3, 10)
    assert connector_tokens("average", 11, every=3) == 3
    assert connector_tokens("average", 576) == 144
    torch.testing.assert_close(out[:, 1], connector.proj(x[:, 3:6].mean(1)))
