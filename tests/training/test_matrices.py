"""The long matrices of `make test-full`: kills at every phase, ways to tune on ranks, two nodes."""

import os
import subprocess
import sys

import pytest

from tests.tools.environment import ROOT
from tests.tools.training_runs import losses

FULL = pytest.mark.full


@FULL
@pytest.mark.parametrize(
    "matrix", ["kill_matrix", "random_kills", "mode_matrix"], ids=["kill", "random", "modes"]
)
def test_matrix(recipe, tmp_path, matrix):
    file, _ = recipe("matrix")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    # Its lines are the report. With -s they are shown as they come.
    command = [sys.executable, "-m", f"tests.tools.{matrix}", file, tmp_path]
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


@FULL
def test_two_nodes_train_one_model(recipe, whole_run):
    file, out = recipe("nodes")
    where = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--master-addr=127.0.0.1",
        f"--master-port={20000 + os.getpid() % 9999}",
    ]
    node = [sys.executable, "-m", "torch.distributed.run", *where]
    started = [
        subprocess.Popen([*node, f"--node-rank={i}", "train.py", str(file)], cwd=ROOT)
        for i in range(2)
    ]
    assert [process.wait() for process in started] == [0, 0]
    assert losses(out) == pytest.approx(losses(whole_run), rel=1e-5)
