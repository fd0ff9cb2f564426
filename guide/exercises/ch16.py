"""Chapter 16, the real recipe: fill in both functions, then run

python -m pytest guide/exercises/test_ch16.py -o addopts=""
"""


def learning_rate(step: int, steps: int, warmup_ratio: float) -> float:
    """Return the factor on the peak rate at step 0, 1, ..., steps - 1.

    The warm-up takes warmup_ratio * steps steps, rounded up. In it the factor rises linearly from 0
    at step 0 and would be 1 at its end. Then it falls along half a cosine, and would be 0 at step
    `steps`.
    """
    raise NotImplementedError


def training_bytes(trained: int, frozen: int, gpus: int) -> float:
    """Return the bytes on each of several GPUs of a model whose weights are sharded over them.

    trained: weights that train. Each has a float32 weight, a float32 gradient and AdamW's two
        float32 numbers, all sharded.
    frozen: weights that do not. Each is kept in bfloat16, sharded, too.

    Copies in bfloat16 and activations do not count.
    """
    raise NotImplementedError
