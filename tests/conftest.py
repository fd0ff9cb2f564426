"""Before any test: one thread, no GPU unless a test asks for it, long tests only when asked for."""

import os
from pathlib import Path

import pytest

# For these sizes threads only wait for each other. Scripts inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from tests.tools.environment import GPU  # noqa: E402

if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before any test file imports the kernels

    from tests.tools import interpreter

    interpreter.patch_once()

from tests.tools.training_runs import recipe, tiny_world, whole_run  # noqa: E402, F401

# The files that take half a minute or more of one core.
LONG_FILES = (
    "bench/test_bench_nanovlm.py",
    "bench/test_bench_training.py",
    "checkpoints/test_hf_llava.py",
    "checkpoints/test_llava_onevision.py",
    "checkpoints/test_nanovlm.py",
    "checkpoints/test_smolvlm.py",
    "kernels/test_accuracy.py",
    "kernels/test_compile.py",
    "kernels/test_mutations.py",
    "laboratory/test_lab.py",
    "laboratory/test_runs.py",
    "test_guide.py",
    "test_lora.py",
    "test_model.py",
    "test_serve.py",
    "test_train.py",
    "training/test_output.py",
    "training/test_parallel.py",
    "training/test_starts.py",
)


def pytest_collection_modifyitems(items):
    """Put the long files first, so that no process is left with one when the others have ended.

    pytest-xdist hands out files in this order where it is told --no-loadscope-reorder.
    """
    long = {Path(__file__).parent / name for name in LONG_FILES}
    items.sort(key=lambda item: item.path not in long)


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
