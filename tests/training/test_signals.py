"""A run that is told to stop saves and ends; the next start goes on as if nothing had been."""

import signal

import pytest

from tests.tools.environment import run, run_warm
from tests.tools.training_runs import background, losses, wait_for_steps

FULL = pytest.mark.full


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=FULL)])
def test_told_to_stop_it_saves_and_goes_on_as_if_nothing_had_been(recipe, ranks):
    many = ("stage.finetune.steps=30", "train.save_every=1000")
    file, out = recipe("stopped")
    process = background(file, *many, ranks=ranks)
    wait_for_steps(process, out, 9)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate()
    assert "stops: SIGTERM" in said and "preempted: saved in" in said
    if ranks == 1:  # torchrun has its own opinion of a signal
        assert process.returncode == 0 and errors == ""
    assert (out / "PREEMPTED").exists() and not (out / "config.json").exists()
    done = len(losses(out))
    assert 9 <= done < 36
    again = run("train.py", file, *many)
    assert f"resumed: 1 of 2 stages done, {done - 6} steps of the next" in again.stdout
    assert len(losses(out)) == 36 and not (out / "PREEMPTED").exists()
    file, whole = recipe("whole")
    run("train.py", file, *many)
    if ranks == 1:
        assert (out / "model.safetensors").read_bytes() == (
            whole / "model.safetensors"
        ).read_bytes()
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)


def test_without_blocked_signals_the_handler_hears_them():
    """Windows has neither pthread_sigmask nor sigpending."""
    code = """
import os, signal
del signal.pthread_sigmask, signal.sigpending
from training import signals
signals.hold()
os.kill(os.getpid(), signal.SIGINT)
print(signals.heard())
"""
    assert run_warm(code, ["signals"]).stdout == "['SIGINT']\n"
