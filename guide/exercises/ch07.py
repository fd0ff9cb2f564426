"""Chapter 7, two stages: fill in both functions, then run

python -m pytest guide/exercises/test_ch07.py -o addopts=""
"""

from config import Tune
from model import LLaVA


def shares(model: LLaVA, tune: Tune) -> dict[str, float]:
    """Return which share of the parameters of each of model.PARTS trains in a stage, 0 to 1.

    tune: what the stage says; train.py:set_trainable reads it.
    """
    raise NotImplementedError


def operations_per_token(parts: list[tuple[int, bool]]) -> int:
    """Return the operations of one token, forward and backward, in a chain of parts.

    parts: for each part, in the order of the forward pass, how many parameters it has in matrices,
    and whether it trains. Forward costs 2 N. The gradient of a part's input costs 2 N, and is
    computed only if something before the part trains. The gradient of its weights costs 2 N, and
    is computed only if the part itself trains.
    """
    raise NotImplementedError
