"""Chapter 7, two stages: a solution."""

from config import Tune
from model import LLaVA
from train import set_trainable


def shares(model: LLaVA, tune: Tune) -> dict[str, float]:
    """Return which share of the parameters of each of model.PARTS trains in a stage, 0 to 1."""
    set_trainable(model, tune)
    found = {}
    for name in model.PARTS:
        total = 0
        trained = 0
        for p in getattr(model, name).parameters():
            total += p.numel()
            if p.requires_grad:
                trained += p.numel()
        found[name] = trained / total
    return found


def operations_per_token(parts: list[tuple[int, bool]]) -> int:
    """Return the operations of one token, forward and backward, in a chain of parts."""
    total = 0
    something_before_trains = False
    for parameters, trains in parts:
        total += 2 * parameters
        if something_before_trains:
            total += 2 * parameters
        if trains:
            total += 2 * parameters
            something_before_trains = True
    return total
