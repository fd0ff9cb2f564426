"""The folder of a run: one run at a time, enough room, a disk that fills up, the best model."""

import contextlib
import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import resume
from tests.tools.environment import run
from tests.tools.training_runs import SHORT, background, one_line, scripted, wait_for_steps


def test_two_runs_in_one_folder(recipe):
    file, out = recipe("twice")
    process = background(file, "stage.finetune.steps=9000")
    wait_for_steps(process, out, 1)
    line = one_line(run("train.py", file, "stage.finetune.steps=9000", ok=False))
    assert f"another run is training here (process {process.pid})" in line
    process.kill()
    process.communicate()
    assert not resume.lock(out).closed


def test_a_disk_too_small_for_the_run_is_one_line_at_the_start(recipe):
    file, out = recipe("small")
    patch = (
        "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 9, 500_000)"
    )
    assert "3 checkpoints and the model" in one_line(scripted(patch, file))
    assert not (out / "log.jsonl").exists()


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder])


def test_a_disk_that_fills_up(recipe):
    file, out = recipe("full")
    with mounted(out, "size=6m"):
        process = background(file, "stage.finetune.steps=4000")
        wait_for_steps(process, out, 12)
        with contextlib.suppress(OSError), open(out / "filler", "wb", buffering=0) as f:
            while f.write(bytes(4096)):
                pass
        _, errors = process.communicate()
        assert process.returncode == 1 and len(errors.strip().splitlines()) == 1, errors
        assert errors.startswith("error: ") and "; fix: make room" in errors
        assert resume.verify(resume.listed(out / "checkpoints")[-1])
        (out / "filler").unlink()
        process = background(file, "stage.finetune.steps=4000")
        assert "resumed: 1 of 2 stages done" in process.stdout.readline()
        process.kill()
        process.communicate()


def test_a_folder_that_cannot_be_written_is_one_line(recipe):
    file, out = recipe("readonly")
    with mounted(out, "ro"):
        assert "cannot be written: Read-only file system" in one_line(
            run("train.py", file, ok=False)
        )


def test_the_best_model_is_kept(recipe):
    file, out = recipe("best")
    climbing = (
        "stage.finetune.validation_every=1",
        "stage.finetune.learning_rate=3.0",
        "train.keep_best=true",
    )
    kept = """
import shutil
def rmtree(path, real=shutil.rmtree, **how):
    if not str(path).endswith("checkpoints"):
        real(path, **how)
shutil.rmtree = rmtree"""
    scripted(kept, file, *SHORT, *climbing, "train.keep=1", ok=True)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    loss, step = min((r["loss"], r["step"]) for r in rows if r["event"] == "validation")
    assert step < 4, "the newest one holds the best: choose a rate at which it diverges"
    tensors, state = resume.read(out / "checkpoints" / f"01-{step:08d}")
    assert state["validation"] == loss
    model = load_file(out / "best/model.safetensors")
    trained = {k.removeprefix("weight."): t for k, t in tensors.items() if k.startswith("weight.")}
    assert trained and all(torch.equal(model[k], t) for k, t in trained.items())
    assert (out / "best/config.json").exists() and (out / "best/tokenizer.json").exists()


def test_keep_best_without_validation_is_one_line(recipe):
    file, _ = recipe("blind")
    assert "keep_best" in one_line(
        run("train.py", file, "train.keep_best=true", "stage.finetune.validation=", ok=False)
    )


def test_an_explicit_checkpoint_of_a_run(recipe):
    file, out = recipe("explicit")
    same = ("stage.finetune.steps=300", "train.keep=9")
    process = background(file, *same)
    wait_for_steps(process, out, 20)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    first = resume.listed(out / "checkpoints")[0]
    (first / resume.TENSORS).write_bytes(b"short")
    line = one_line(run("train.py", file, *same, f"train.resume={first}", ok=False))
    assert "train.resume=" in line and "has 5 bytes" in line
