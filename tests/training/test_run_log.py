"""What a progress line costs, and what it says of parts."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from config import Tune
from tests.tools.small_llava import small
from training.ranks import Ranks
from training.run_log import PROBED, RunLog


class Transfers(TorchDispatchMode):
    """Counts single numbers that are asked for: each one waits for the GPU."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


def test_a_line_takes_its_numbers_in_one_transfer(tmp_path):
    """Two of them for each trainable tensor made the CPU wait hundreds of times."""
    model = small()
    train.set_trainable(model, Tune(llm="full", connector="full"))
    trainable = train.trainable_parameters(model)
    log = RunLog(tmp_path / "log.jsonl", "stage", 3, trainable, Ranks(0, 1, torch.device("cpu")))

    before = {part: [p.detach().clone() for p in ps] for part, ps in trainable.items()}
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.5)
            p.mul_(1 + 0.01 * i)

    with Transfers() as transfers:
        norms = log.gradient_norms()
        change = log._weight_change()
    assert transfers.count == 0

    assert norms.keys() == change.keys() == {"llm", "connector"}
    for part, parameters in log.trainable.items():
        count = sum(p.numel() for p in parameters)
        assert norms[part] == pytest.approx(0.5 * math.sqrt(count), rel=1e-5)
        moved = size = 0.0
        for now, then in zip(parameters, before[part], strict=True):
            then = then.flatten()[:PROBED]
            difference = now.detach().flatten()[:PROBED] - then
            moved += difference.square().sum().item()
            size += then.square().sum().item()
        assert change[part] == math.sqrt(moved / size)
