"""Before any test: one thread, no GPU unless a test asks for it, and the long tests only when they are asked for."""

import os

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # for these sizes threads only wait for each other; scripts inherit it

import torch  # noqa: E402

from tests.tools.environment import GPU  # noqa: E402

if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before any test file imports the kernels


@pytest.fixture(autouse=True)
def only_when_asked(request):
    """The long ones run with `make test-full`, that is pytest -m full."""
    if request.node.get_closest_marker("full") and "full" not in request.config.getoption(
        "markexpr"
    ):
        pytest.skip("long: make test-full")


@pytest.fixture(autouse=True)
def hidden_gpu(request, monkeypatch):
    """Only tests that are marked see it: the others compare numbers of the CPU, or have more ranks than it has room."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
