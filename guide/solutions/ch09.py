"""Chapter 9, answering: a solution."""


def cache_bytes(
    tokens: int, windows: list[int | None], kv_heads: int, head_dim: int, bytes_of_number: int = 2
) -> int:
    """Return how many bytes the keys and values of a row of tokens take."""
    slots = 0  # of all layers
    for window in windows:
        if window is None:
            slots += tokens
        else:
            slots += min(tokens, window)

    # A slot has a key and a value.
    return 2 * slots * kv_heads * head_dim * bytes_of_number


def refill_steps(lengths: list[int], rows: int) -> int:
    """Return how many steps of decoding continuous batching takes for answers of these lengths."""
    waiting = list(lengths)
    decoding = []  # how many tokens each row still has to say
    steps = 0
    while waiting or decoding:
        while waiting and len(decoding) < rows:
            decoding.append(waiting.pop(0))
        decoding = [left - 1 for left in decoding if left > 1]
        steps += 1
    return steps
