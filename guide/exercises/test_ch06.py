"""Chapter 6's exercises are done when these tests pass."""

import pytest
import torch
import torch.nn.functional as F

from guide.exercises import chosen

ch = chosen("ch06")


def gradient_and_loss(tokens, targets, groups):
    """Return what `accumulate` makes of tokens that are dealt out to groups."""
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11)
    micro_batches = [(tokens[group], targets[group]) for group in groups]

    def loss_of(batch):
        return F.cross_entropy(head(batch[0]), batch[1], reduction="sum", ignore_index=-100)

    def count_of(batch):
        return int((batch[1] != -100).sum())

    loss = ch.accumulate(loss_of, count_of, micro_batches)
    return head.weight.grad, loss


def test_groups_do_not_matter():
    torch.manual_seed(1)
    tokens = torch.randn(12, 6)
    targets = torch.randint(11, (12,))
    targets[3:8] = -100  # nothing is learned there: a group has more to learn than another
    whole = [list(range(12))]
    grouped = [[0, 1, 2, 8], [3, 4, 9], [5, 6, 7, 10, 11]]
    gradient, loss = gradient_and_loss(tokens, targets, whole)
    other_gradient, other_loss = gradient_and_loss(tokens, targets, grouped)
    torch.testing.assert_close(other_gradient, gradient)
    assert other_loss == pytest.approx(loss)
    assert loss == pytest.approx(2.4, abs=1.0)  # near the logarithm of 11, of one token


def test_schedule_rises_stays_and_falls():
    factors = [ch.warmup_stable_decay(step, 10, 2, 4) for step in range(10)]
    assert factors == [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert ch.warmup_stable_decay(0, 5, 0, 0) == 1
