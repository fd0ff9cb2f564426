"""What a checkpoint holds, and how it comes from a GPU. The GPU here is a pretended one."""

import torch
from torch import nn

from tests.tools.small_llava import small
from training import state
from training.ranks import Ranks


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU, and notes how it is copied from there."""

    is_cuda = True
    events: list = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty_like:
            cls.events.append(("pinned", kwargs.pop("pin_memory", False)))
        elif function in (torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.cpu):
            cls.events.append(("copied", kwargs.get("non_blocking", False)))
        out = super().__torch_function__(function, types, args, kwargs)
        if function is torch.empty_like:
            return out.as_subclass(torch.Tensor)
        return out


def test_a_snapshot_waits_for_the_gpu_once(monkeypatch):
    """Not for each tensor, while all ranks wait for the first; and only the first copies."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: OnGPU.events.append(device))
    model = nn.Linear(4, 4)
    want = {f"weight.{name}": p.detach().clone() for name, p in model.named_parameters()}
    model.named_parameters = lambda: [
        (name, nn.Parameter(p.detach().as_subclass(OnGPU)))
        for name, p in nn.Module.named_parameters(model)
    ]
    gpu = torch.device("cuda", 0)

    OnGPU.events.clear()
    tensors = state.snapshot(model, {}, None, Ranks(0, 2, gpu))
    assert OnGPU.events == [("pinned", True), ("copied", True)] * 2 + [gpu]
    assert tensors.keys() == want.keys()
    assert all(torch.equal(tensors[key], want[key]) for key in want)

    OnGPU.events.clear()
    assert state.snapshot(model, {}, None, Ranks(1, 2, gpu)) == {}
    assert OnGPU.events == []


def test_a_snapshot_is_a_copy():
    model = small()
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors = state.snapshot(model, {}, None, Ranks(0, 1, torch.device("cpu")))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(torch.equal(tensors[f"weight.{name}"], t) for name, t in want.items())
