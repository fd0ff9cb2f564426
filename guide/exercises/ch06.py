"""Exercises of chapter 6: gradients that add up, and another schedule."""

from collections.abc import Callable, Sequence

from torch import Tensor


def accumulate(
    loss_of: Callable[[object], Tensor],
    count_of: Callable[[object], int],
    micro_batches: Sequence[object],
) -> float:
    """Add the gradient of one optimizer step to the parameters, and return the step's mean loss.

    loss_of(micro_batch) is the sum of the losses of its supervised tokens, count_of(micro_batch)
    their number. The result does not depend on how samples were dealt out to micro-batches. Only
    one micro-batch's graph is in memory at a time: call backward() for each.
    """
    raise NotImplementedError


def warmup_stable_decay(step: int, steps: int, warmup: int, decay: int) -> float:
    """Return the factor on the learning rate of step 0, 1, ..., steps - 1.

    It rises in a straight line, step / warmup, in the first `warmup` steps. Then it is 1. In the
    last `decay` steps it falls in a straight line, so that it is 1 / decay in the very last step
    (Hu et al., MiniCPM, 2024). warmup + decay <= steps.
    """
    raise NotImplementedError
