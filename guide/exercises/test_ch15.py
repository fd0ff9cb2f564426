"""Chapter 15: frames of a film, and tiles as one picture."""

import torch

from connectors import anyres_order
from guide.exercises import chosen
from packing import ItemShape

ch = chosen("ch15")


def test_middle_frames():
    assert ch.middle_frames(30, 3) == [5, 15, 25]
    assert ch.middle_frames(10, 4) == [1, 3, 6, 8]
    assert ch.middle_frames(1, 1) == [0]
    assert ch.middle_frames(2, 4) == [0, 0, 1, 1]
    assert ch.middle_frames(1800, 1) == [900]


def test_join_tiles_is_anyres():
    torch.manual_seed(0)
    side, width = 3, 5
    newline = torch.randn(width)
    for rows, columns in ((1, 3), (2, 2), (3, 1)):
        count = rows * columns
        tiles = torch.randn(count, side, side, width)
        joined = ch.join_tiles(tiles, rows, columns, newline)

        # The order of LLaVA-NeXT counts the whole picture first, which is not asked for here.
        n = side * side
        order = anyres_order(ItemShape(1 + count, rows, columns), n)[n:]
        whole = torch.zeros(n, width)
        tokens = torch.cat([whole, tiles.reshape(-1, width), newline[None]])
        torch.testing.assert_close(joined, tokens[order])
