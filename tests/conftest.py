"""Before any test: one thread, no GPU unless a test asks for it, long tests only when asked for."""

import os

import pytest

# For these sizes threads only wait for each other. Scripts inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from tests.tools.environment import GPU  # noqa: E402

if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before any test file imports the kernels

from tests.tools.training_runs import recipe, tiny_world, whole_run  # noqa: E402, F401


@pytest.fixture(autouse=True)
def only_when_asked(request):
    """Skip the long ones unless `make test-full`, that is pytest -m full, asks for them."""
    if request.node.get_closest_marker("full") and "full" not in request.config.getoption(
        "markexpr"
    ):
        pytest.skip("long: make test-full")


@pytest.fixture(autouse=True)
def hidden_gpu(request, monkeypatch):
    """Hide the GPU from tests without its mark, which compare numbers of the CPU or need ranks."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
