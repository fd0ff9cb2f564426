"""Chapter 12, from formula to Triton: fill in both functions, then run

python -m pytest guide/exercises/test_ch12.py -o addopts=""
"""

from torch import Tensor


def online_cross_entropy(logits: Tensor, target: int, block: int) -> Tensor:
    """Return the loss of one token, logsumexp(logits) - logits[target], as a tensor of no size.

    logits (V,); no more than `block` of them may be looked at together, from the first to the
    last, and each once. No power of e may be above 1.
    """
    raise NotImplementedError


def scores_that_show(version: str) -> Tensor | None:
    """Return finite scores (M,) on which a version of the kernel is wrong; None if there are none.

    version: a name in guide/exercises/ch12_kernels.py:VERSIONS. The test runs it with blocks of 32
    keys. M may be anything from 1 to 200, a score anything from -1e4 to 1e4.
    """
    raise NotImplementedError
