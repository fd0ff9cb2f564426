"""Chapter 16, the real recipe: a solution."""

import math


def learning_rate(step: int, steps: int, warmup_ratio: float) -> float:
    """Return the factor on the peak rate at step 0, 1, ..., steps - 1."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return (1 + math.cos(math.pi * done)) / 2


def training_bytes(trained: int, frozen: int, gpus: int) -> float:
    """Return the bytes on each of several GPUs of a model whose weights are sharded over them."""
    float32 = 4
    bfloat16 = 2
    copies = 4  # weight, gradient, two moments
    return (trained * copies * float32 + frozen * bfloat16) / gpus
