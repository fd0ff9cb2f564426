"""Solutions of chapter 6."""

from collections.abc import Callable, Sequence

from torch import Tensor


def accumulate(
    loss_of: Callable[[object], Tensor],
    count_of: Callable[[object], int],
    micro_batches: Sequence[object],
) -> float:
    """Add the gradient of one optimizer step to the parameters, and return the step's mean loss."""
    # Count first: the number of the whole step divides the loss of each micro-batch.
    supervised = sum(count_of(batch) for batch in micro_batches)

    total = 0.0
    for batch in micro_batches:
        loss = loss_of(batch) / supervised
        loss.backward()
        total += loss.item()  # a number: a tensor would keep the graph alive
    return total


def warmup_stable_decay(step: int, steps: int, warmup: int, decay: int) -> float:
    """Return the factor on the learning rate of step 0, 1, ..., steps - 1."""
    if step < warmup:
        return step / warmup
    left = steps - step  # steps that are still to be done, this one among them
    if left <= decay:
        return left / decay
    return 1.0
