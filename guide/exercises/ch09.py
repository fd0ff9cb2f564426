"""Chapter 9, answering: fill in both functions, then run

python -m pytest guide/exercises/test_ch09.py -o addopts=""
"""


def cache_bytes(
    tokens: int, windows: list[int | None], kv_heads: int, head_dim: int, bytes_of_number: int = 2
) -> int:
    """Return how many bytes the keys and values of a row of tokens take.

    windows: for each layer, how many keys a query sees there; None: all of them. A layer with a
    window needs to keep no more tokens than that.
    """
    raise NotImplementedError


def refill_steps(lengths: list[int], rows: int) -> int:
    """Return how many steps of decoding continuous batching takes for answers of these lengths.

    At most `rows` answers are decoded at once, each gets one token a step. When an answer has all
    of its tokens, the next one waiting takes its row, from the next step on.
    """
    raise NotImplementedError
