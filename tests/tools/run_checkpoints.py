"""Small checkpoints of a run, as resume.save and seal.py make them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import resume, seal


def write_checkpoint(folder: Path, name: str, step: int, **state) -> Path:
    """Write a checkpoint of two random tensors, with `step` as their seed."""
    g = torch.Generator().manual_seed(step)
    tensors = {
        "weight.a": torch.randn(7, 5, generator=g),
        "exp_avg.a": torch.randn(7, 5, generator=g),
    }
    temporary = folder / f".{name}.tmp"
    temporary.mkdir()
    save_file(tensors, temporary / resume.TENSORS)
    seal.seal(temporary, name, {"stage": 0, "step": step, **state})
    return folder / name


@pytest.fixture
def two(tmp_path):
    """An older and a newer checkpoint."""
    older = write_checkpoint(tmp_path, "00-00000004", 4)
    newer = write_checkpoint(tmp_path, "00-00000008", 8)
    return older, newer
