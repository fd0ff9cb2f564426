"""The choice of a token: its probabilities are those that the options ask for."""

import pytest
import torch

from inference.sampling import sample_tokens


def test_a_draw_has_the_probabilities_it_should():
    logits = (
        torch.tensor([0.45, 0.3, 0.2, 0.05]).log()[[2, 0, 3, 1]].expand(8000, -1)
    )  # at 1, 3, 0, 2

    def share(**options) -> list[float]:
        given = {"temperature": 1.0, "top_p": 1.0} | options
        drawn = sample_tokens(logits, generator=torch.Generator().manual_seed(0), **given)
        return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()

    assert share() == pytest.approx([0.2, 0.45, 0.05, 0.3], abs=0.02)
    assert share(top_k=2) == pytest.approx([0, 0.6, 0, 0.4], abs=0.02)
    assert share(top_p=0.74) == pytest.approx([0, 0.6, 0, 0.4], abs=0.02)
    assert share(top_p=0.76) == pytest.approx([0.2 / 0.95, 0.45 / 0.95, 0, 0.3 / 0.95], abs=0.02)
    assert share(top_k=2, top_p=0.55) == pytest.approx(
        [0, 1, 0, 0]
    )  # of the two, the first has 0.6
    half = torch.tensor([0.45, 0.3, 0.2, 0.05]).sqrt()
    assert share(temperature=2.0) == pytest.approx(
        (half / half.sum())[[2, 0, 3, 1]].tolist(), abs=0.02
    )
