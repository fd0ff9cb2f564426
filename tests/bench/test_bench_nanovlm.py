"""bench/nanovlm.py: what is judged, and both paths compute the same in a toy."""

import copy
import json

import pytest

from bench.common import OURS
from bench.nanovlm import SMALL, THEIRS, TOY, judge, table
from checkpoints.nanovlm import DEFAULTS
from tests.tools.environment import ROOT, run
from tests.tools.nanovlm import REFERENCE


def path(seconds: float, peak: float, norm: float) -> dict:
    """Return what a path tells of three steps, of which the first does not count."""
    steps = []
    for factor in (9.0, 1.0, 2.0):
        steps.append({"seconds": seconds * factor, "loss": 2.0, "peak": peak})
    return {
        "imports": 1e9,
        "batches": 3,
        "positions": 200,
        "losses": [1.5, 2.5],
        "norm": norm,
        "steps": steps,
    }


RESULT = {
    "date": "2026-01-01 00:00",
    "versions": {"torch": "2.13", "transformers": None},
    "threads": 2,
    "quick": False,
    "paths": {
        OURS: path(4.0, 3e9, 5.0)
        | {"rows": 12, "tokens": 150, "views": 9, "supervised": 30, "parameters": 7e6},
        THEIRS: path(6.0, 5e9, 5.0),
    },
}


def test_numbers_targets_and_what_is_wrong():
    found, wrong = judge(RESULT)
    assert found["speed"] == [1.5, 1.5] and found["leaner"] == 0.5 and wrong == []
    text = table(RESULT)
    assert "rows/s / nanoVLM's: 1.50 (1.50 to 1.50)" in text
    assert "target rows/s / nanoVLM's >= 1.5: met (1.5)" in text
    assert "target memory / nanoVLM's <= 0.7: met (0.5)" in text
    assert "torch 2.13, 2 threads" in text and "  25%" in text

    slow = copy.deepcopy(RESULT)
    slow["paths"][THEIRS]["steps"][2]["seconds"] = 4.0
    slow["paths"][THEIRS]["steps"][1]["seconds"] = 4.0
    assert "MISSED (0.75)" in table(slow)

    other = copy.deepcopy(RESULT)
    other["paths"][OURS]["losses"][1] = 2.501
    other["paths"][OURS]["norm"] = float("nan")
    assert judge(other)[1] == [
        "gradient norm nan, nanoVLM's is 5",
        "loss of row 1 2.501, nanoVLM's is 2.5",
    ]
    assert "loss of row 1 2.501" in table(other)


def test_sizes_are_half_of_nanovlm():
    """Widths and pixels along an edge; a quarter of blocks, tokens of a view and of a row."""
    for key, value in SMALL.items():
        assert value * 2 == DEFAULTS[key] or value * 4 == DEFAULTS[key], key
    quarter = {key for key, value in SMALL.items() if value * 4 == DEFAULTS[key]}
    assert quarter == {"lm_max_length", "mp_image_token_length", "vit_n_blocks", "lm_n_blocks"}
    assert TOY.keys() >= SMALL.keys()


def test_a_folder_without_nanovlm_is_one_line(tmp_path):
    said = run("bench/nanovlm.py", tmp_path, ok=False).stderr.strip()
    assert said.startswith("error: ") and "no code of nanoVLM; fix: git clone" in said
    assert len(said.splitlines()) == 1


def test_both_compute_the_same_and_it_becomes_a_page(tmp_path):
    if not (REFERENCE / "models" / "vision_language_model.py").is_file():
        pytest.skip(f"nanoVLM's code is not in {REFERENCE}; NANOVLM names its folder")
    file = tmp_path / "results" / "cpu" / "nanovlm.json"
    words = ("--quick", "--rounds", "1", "--json", file)
    out = run("bench/nanovlm.py", REFERENCE, *words).stdout
    result = json.loads(file.read_text())
    ours, theirs = result["paths"][OURS], result["paths"][THEIRS]
    found, wrong = judge(result)
    assert wrong == [] and found["apart"] <= 1e-5 and out.strip() == table(result)
    assert len(ours["steps"]) == len(theirs["steps"]) == 2
    assert ours["steps"][0]["loss"] != ours["steps"][1]["loss"]  # the weights have changed
    assert theirs["positions"] > ours["positions"] == ours["tokens"]
    assert min(found["memory"].values()) > 0

    page = tmp_path / "page.md"
    page.write_text((ROOT / "PERFORMANCE.md").read_text())
    run("bench/report.py", "--results", file.parent.parent, "--page", page)
    assert f"{ours['views']} views" in page.read_text()
