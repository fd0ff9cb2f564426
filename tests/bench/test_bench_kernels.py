"""The kernels' benchmark on small CPU shapes: what it measures, writes, and sees that is wrong."""

import json
import re

import pytest
import torch

import bench.kernels
import bench.report
from bench.kernels import OURS, PLAIN, Machine, measure
from bench.operations import LM, TOKENS, Bench, Cost, Setting, packed, sample_lengths, shapes
from tests.tools.environment import ROOT, run

CPU = Setting("cpu", torch.float32, 64, 0.01, False)
FACTS = {"date": "2026-01-01 00:00", "versions": {"torch": "2.11"}}


def test_without_a_gpu_it_says_so_in_a_line():
    (line,) = run("bench/kernels.py", ok=False).stderr.strip().splitlines()
    assert line.startswith("error: ") and "CUDA" in line and "; fix: " in line


def test_every_kernel_file_is_measured():
    files = {file.stem for file in (ROOT / "kernels").glob("*.py")}
    assert set(shapes()) == files - {"__init__", "tiles"}


def test_results_become_a_page(tmp_path, capsys):
    """The public functions against plain torch; a second run replaces its own operation only."""
    file = tmp_path / "results" / "made-up" / "kernels.json"
    for operations in (["norms", "decode"], ["norms"]):
        failures = bench.kernels.measure_all(
            operations, "Made-up GPU", CPU, None, FACTS, quick=True, file=file
        )
        assert not failures
        printed = capsys.readouterr().out
    assert "norms: RMS, 16384 x 2048, residual, training" in printed and "decode" not in printed

    found = json.loads(file.read_text())["operations"]
    assert list(found) == ["norms", "decode"]
    for operation, modes in (("norms", ("forward", "training")), ("decode", ("forward",))):
        (shape,) = found[operation]["shapes"].values()
        assert tuple(m for m in shape if m != "targets") == modes
        for mode in modes:
            for path in (OURS, PLAIN):
                assert shape[mode][path]["ms"] > 0 and shape[mode][path]["error"] < 1e-6

    page = tmp_path / "page.md"
    page.write_text((ROOT / "PERFORMANCE.md").read_text())
    bench.report.main(["--results", str(tmp_path / "results"), "--page", str(page)])
    text = page.read_text()
    assert "### Made-up GPU, float32" in text
    assert re.search(r"\| RMS, 16384 x 2048, residual \| training \| \d+\.\d{3} \|", text)
    assert "| RMS, 16384 x 2048 | forward | not measured yet |" in text


def multiply(x, y):
    return x * y


def product(ours=multiply, **peers) -> Bench:
    """A product of two small matrices, as an operation with these peers."""
    args = (torch.rand(9, 5), torch.rand(9, 5))
    return Bench(args, (0, 1), ours, multiply, peers, Cost(45.0, 540.0), Cost(90.0, 900.0))


class Wrong(torch.autograd.Function):
    """The product, with the gradient of the second factor halved."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, d):
        x, y = ctx.saved_tensors
        return d * y, d * x / 2


def test_a_wrong_kernel_is_seen_and_a_wrong_peer_has_no_time():
    def missing():
        import no_such_package  # noqa: F401

    def refuses(x, y):
        raise RuntimeError("not this shape\nand more")

    cells, wrong = measure(CPU, product(), True, Machine(1e6, 1e6))
    assert not wrong and cells[OURS]["share"] == pytest.approx(1e3 * 1440e-6 / cells[OURS]["ms"])

    peers = {
        "wrong": lambda: Wrong.apply,
        "missing": missing,
        "refuses": lambda: refuses,
        "half (bound)": lambda: lambda x, y: x / 2,
    }
    cells, wrong = measure(CPU, product(Wrong.apply, **peers), True, None)
    assert len(wrong) == 1 and "error 5.0e-01" in wrong[0]
    assert not measure(CPU, product(Wrong.apply), False, None)[1]  # the forward pass alone is right
    said = "ArithmeticError: another result: 5.0e-01 away from the reference"
    assert cells["wrong"]["reason"] == said
    assert cells["missing"]["reason"] == "not installed: no_such_package"
    assert cells["refuses"]["reason"] == "RuntimeError: not this shape"
    ratio = cells["half (bound)"]["ms"] / cells[OURS]["ms"]
    assert cells["half (bound)"]["ratio"] == pytest.approx(ratio)
    assert measure(CPU, product(refuses), False, None)[1] == ["RuntimeError: not this shape"]


def test_rows_have_realistic_samples_and_equal_ones_are_a_dense_batch():
    lengths = sample_lengths(TOKENS, 729)
    assert sum(lengths) == TOKENS and min(lengths) > 0 and max(lengths) <= 729 + 1300
    assert 10 < len(lengths) < 40

    made = packed(CPU, LM(4, 2, 64, 64, 256, 512, 1000), TOKENS, True)
    exact = made.reference(*made.args)
    assert torch.allclose(made.peers["barellava, dense"]()(*made.args), exact, atol=1e-6)
    # 8 samples of 32 tokens, 4 heads of 64: half of 4 * 32^2 * 4 * 64 FLOPs each
    assert made.forward.flops == 8 * 2 * 32**2 * 4 * 64
    assert made.backward.flops == 2.5 * made.forward.flops
