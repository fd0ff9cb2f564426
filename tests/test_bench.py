"""The benchmarks: what they print and write without a GPU, that a wrong kernel is seen, and the page made of it."""

import json
import re
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT, run

import bench.kernels
import bench.report
from bench.kernels import OURS, PLAIN, measure
from bench.operations import LM, TOKENS, Bench, Setting, packed, sample_lengths, shapes
from config import UserError

SCRIPTS = [f"bench/{f.name}" for f in sorted((ROOT / "bench").glob("*.py")) if f.name != "operations.py"]
CPU = Setting("cpu", torch.float32, 64, 0.01, False)


def test_sizes_are_within_their_limits():
    for name, limit in {"kernels.py": 400, "operations.py": 400, "report.py": 160, "training.py": 540}.items():
        assert len((ROOT / "bench" / name).read_text().splitlines()) <= limit


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_and_a_wrong_option_is_one_line(script):
    assert f"python {script}" in run(script, "--help").stdout
    wrong = run(script, "--no-such-option", ok=False).stderr.strip().splitlines()
    assert len(wrong) == 1 and wrong[0].startswith("error: ") and "; fix: " in wrong[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [("bench/kernels.py",), ("-m", "kernels.norms")], ids=" ".join)
def test_without_a_gpu_it_says_so_in_a_line(command):
    (line,) = run(*command, ok=False).stderr.strip().splitlines()
    assert line.startswith("error: ") and "CUDA" in line and "; fix: " in line


def test_every_kernel_file_is_measured():
    assert set(shapes()) == {f.stem for f in (ROOT / "kernels").glob("*.py")} - {"__init__"}


def test_results_of_the_cpu_become_a_page(tmp_path, capsys):
    """The public functions against plain torch; a second run replaces its own operation only."""
    results = tmp_path / "results" / "cpu" / "kernels.json"
    for operations in (["norms", "decode"], ["norms"]):
        bench.kernels.main([*operations, "--cpu", "--quick", "--json", str(results)])
        printed = capsys.readouterr().out
    assert "norms: RMS, 16384 x 2048, residual, training" in printed and "decode" not in printed
    found = json.loads(results.read_text())["operations"]
    assert list(found) == ["norms", "decode"]
    for operation, modes in (("norms", ("forward", "training")), ("decode", ("forward",))):
        (shape,) = found[operation]["shapes"].values()
        assert tuple(m for m in shape if m != "targets") == modes
        for mode in modes:
            assert all(shape[mode][path]["ms"] > 0 and shape[mode][path]["error"] < 1e-6 for path in (OURS, PLAIN))
    page = tmp_path / "page.md"
    page.write_text((ROOT / "PERFORMANCE.md").read_text())
    bench.report.main(["--results", str(tmp_path / "results"), "--page", str(page)])
    text = page.read_text()
    assert "| on a GPU | shapes | |" in text and "1/64 of the tokens" in text
    assert re.search(r"\| RMS, 16384 x 2048, residual \| training \| \d+\.\d{3} \|", text)
    assert "| RMS, 16384 x 2048 | forward | not measured yet |" in text


def product(ours=lambda x, y: x * y, **peers) -> Bench:
    args = torch.rand(9, 5), torch.rand(9, 5)
    return Bench(args, (0, 1), ours, lambda x, y: x * y, peers, (45.0, 540.0), (90.0, 900.0))


def test_a_wrong_kernel_is_seen_and_a_wrong_peer_has_no_time():
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

    def missing():
        import no_such_package  # noqa: F401

    def refuses(x, y):
        raise RuntimeError("not this shape\nand more")

    cells, wrong = measure(CPU, product(), True, (1e6, 1e6))
    assert not wrong and cells[OURS]["share"] == pytest.approx(1e3 * 1440e-6 / cells[OURS]["ms"])
    peers = {"wrong": lambda: Wrong.apply, "missing": missing, "refuses": lambda: refuses,
             "half (bound)": lambda: lambda x, y: x / 2}  # fmt: skip
    cells, wrong = measure(CPU, product(Wrong.apply, **peers), True, None)
    assert len(wrong) == 1 and "error 5.0e-01" in wrong[0]
    assert not measure(CPU, product(Wrong.apply), False, None)[1]  # the forward pass alone is right
    assert cells["wrong"]["reason"] == "ArithmeticError: another result: 5.0e-01 away from the reference"
    assert cells["missing"]["reason"] == "not installed: no_such_package"
    assert cells["refuses"]["reason"] == "RuntimeError: not this shape"
    assert cells["half (bound)"]["ratio"] == pytest.approx(cells["half (bound)"]["ms"] / cells[OURS]["ms"])
    assert measure(CPU, product(refuses), False, None)[1] == ["RuntimeError: not this shape"]


def test_rows_have_realistic_samples_and_equal_ones_are_a_dense_batch():
    lengths = sample_lengths(TOKENS, 729)
    assert sum(lengths) == TOKENS and min(lengths) > 0 and 10 < len(lengths) < 40 and max(lengths) <= 729 + 1300
    made = packed(CPU, LM(4, 2, 64, 64, 256, 512, 1000), TOKENS, True)
    exact = made.reference(*made.args)
    assert torch.allclose(made.peers["barellava, dense"]()(*made.args), exact, atol=1e-6)
    # 8 samples of 32 tokens, 4 heads of 64: half of 4 * 32^2 * 4 * 64 FLOPs each
    assert made.forward[0] == 8 * 2 * 32**2 * 4 * 64 and made.backward[0] == 2.5 * made.forward[0]


def cell(ms: float, ratio: float, share: float = 0.5) -> dict:
    return {"megabytes": 12.3, "ms": ms, "range": [ms, ms], "share": share, "error": 2e-3, "ratio": ratio}


def test_report_judges_targets_and_draws(tmp_path):
    shape = next(iter(shapes()["attention"]))
    cells = {OURS: cell(1.0, 1.0), "FlashAttention-2": cell(1.25, 1.25), "cuDNN": cell(0.8, 0.8),
             "half (bound)": cell(0.1, 0.1), "flex_attention": {"reason": "RuntimeError: not <this>"}}  # fmt: skip
    result = {"gpu": "Made-up GPU", "limits": [1.0, 1.0], "dtype": "bfloat16", "cut": 1, "operations": {"attention": {
        "date": "2026-01-01 00:00", "versions": {"torch": "2.11"}, "ceilings": {"product, FLOP/s": 7.9e14},
        "shapes": {shape: {"targets": {"FlashAttention-2": 1.2, "cuDNN": 0.9}, "forward": cells}}}}}  # fmt: skip
    (tmp_path / "made-up").mkdir()
    (tmp_path / "made-up" / "kernels.json").write_text(json.dumps(result))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- kernels -->\nold\n<!-- end -->\nbetween\n<!-- training -->\n<!-- end -->\n"
                    "<!-- load -->\n<!-- end -->\nafter\n")  # fmt: skip
    for _ in range(2):  # the second time changes nothing
        bench.report.main(["--results", str(tmp_path), "--page", str(page)])
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "\nbetween\n" in text and "old" not in text
        row = f"| {shape} | forward | 1.000 | 50% | 12 | 2e-03 | 1.25 (≥ 1.20) | **0.80** (≥ 0.90) | 0.10 | [1] |"
        assert text.count(row) == 1 and text.count("1. flex_attention: RuntimeError: not &lt;this&gt;") == 1
        assert "2026-01-01 00:00, torch 2.11, product, FLOP/s 7.9e+14\n" in text and "on a GPU" not in text
    assert "![each kernel beside its fastest peer](made-up/kernels.svg)" in text
    drawn = ElementTree.parse(tmp_path / "made-up" / "kernels.svg")
    texts = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "0.80 x" in texts and texts.count("not measured yet") == len(shapes()) - 1  # the bound is no peer
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) == 1
    page.write_text("no marks\n")
    with pytest.raises(UserError, match="no <!-- kernels -->.*; fix: "):
        bench.report.main(["--results", str(tmp_path), "--page", str(page)])
    assert page.read_text() == "no marks\n"


def test_the_page_holds_what_was_measured(tmp_path):
    """PERFORMANCE.md is what report.py makes of bench/results now."""
    text, again = (ROOT / "PERFORMANCE.md").read_text(), tmp_path / "PERFORMANCE.md"
    again.write_text(text)
    bench.report.main(["--page", str(again)])
    without_links = [re.sub(r"\]\([^)]*\)", "]", t) for t in (again.read_text(), text)]
    assert without_links[0] == without_links[1]
