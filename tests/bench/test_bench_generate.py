"""bench/generate.py on a toy: what it prints and writes, and how it judges."""

import json

import pytest

from bench.common import OURS, PEER
from bench.decoding import step_bytes, write
from bench.generate import CPU, row
from model import LLaVA
from tests.tools.environment import ROOT, run


def test_a_toy_is_measured_beside_transformers(tmp_path):
    pytest.importorskip("transformers")
    cases = ["float32-8", "int8-1"]
    out = run(
        "bench/generate.py", "--cpu", "--quick", "--json", tmp_path / "g.json", "--cases", *cases
    ).stdout
    assert "192 of 192" in out and "16 questions, float32" in out and "answers equal" in out
    (found,) = json.loads((tmp_path / "g.json").read_text())["models"].values()
    assert [(c["kind"], c["batch"]) for c in found["cases"]] == [("float32", 8), ("int8", 1)]
    for case in found["cases"]:
        rates = [case["rates"][name] for name in (OURS, PEER)]
        assert (
            case["ratios"] == pytest.approx([a / b for a, b in zip(*rates, strict=True)])
            and len(rates[0]) == 2
        )


def test_a_number_below_its_target_is_called_missed():
    case = {
        "kind": "bfloat16",
        "batch": 1,
        "rates": {OURS: [5.0], PEER: [4.0]},
        "ratios": [CPU["bfloat16", 1] - 0.01],
        "step_ms": 1.0,
        "bytes": 10,
        "equal": 1,
        "tokens": 1,
    }
    assert "MISSED" in row(case, 1e6, True)
    assert row(case | {"ratios": [CPU["bfloat16", 1]]}, 1e6, True).endswith("target 1.3: met")
    on_a_gpu = row(case | {"ratios": [7.0], "bytes": 76}, 100e3, False)
    assert " 76%" in on_a_gpu and on_a_gpu.endswith("target 6: met target 0.75: met")


def test_bytes_of_a_step(tmp_path):
    """The toy in float32: weights without the table of embeddings, and 40 slots of 2 sequences."""
    pytest.importorskip("transformers")
    write("toy", tmp_path / "toy")
    model = LLaVA.from_pretrained(tmp_path / "toy")
    weights = (
        2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 321 * 64 + 64
    )  # one row more, for the token of images
    assert step_bytes(model, 2, 40) == 4 * (weights + 2 * 2 * 2 * 64 * 40)


def test_it_is_not_long():
    assert len((ROOT / "bench" / "generate.py").read_text().splitlines()) <= 280
