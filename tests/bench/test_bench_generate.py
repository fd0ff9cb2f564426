"""bench/generate.py on a toy: what it prints and writes, and how it judges."""

import json

import pytest
import torch

from bench import llama_cpp
from bench.common import LLAMA_CPP, OURS, PEER
from bench.decoding import TINY, TOY, step_bytes, write
from bench.generate import CPU, OF_LLAMA_CPP, heading, row
from config import Model
from model import LLaVA, init_weights
from tests.tools.environment import ROOT, run


def test_a_toy_is_measured_beside_transformers(tmp_path):
    pytest.importorskip("transformers")
    cases = ["float32-8", "int8-1"]
    out = run(
        "bench/generate.py", "--cpu", "--quick", "--json", tmp_path / "g.json", "--cases", *cases
    ).stdout
    assert "192 of 192" in out and "16 questions, float32" in out and "answers equal" in out
    (found,) = json.loads((tmp_path / "g.json").read_text())["models"].values()
    peers = [PEER]
    if llama_cpp.installed():
        peers.append(LLAMA_CPP)
    measured = [(c["kind"], c["batch"]) for c in found["cases"] if c["threads"] == 1]
    assert measured == [("float32", 8), ("int8", 1)] and found["memory"]["1"] > 0
    for case in found["cases"]:
        ours = case["rates"][OURS]
        assert list(case["ratios"]) == peers and len(ours) == 2
        for peer in peers:
            ratios = [a / b for a, b in zip(ours, case["rates"][peer], strict=True)]
            assert case["ratios"][peer] == pytest.approx(ratios)


def test_llama_cpp_has_the_same_weights(tmp_path):
    """In float32 it gives our tokens, of each sequence of a batch."""
    if not llama_cpp.installed():
        pytest.skip("xllamacpp and gguf are not installed")
    torch.manual_seed(0)
    text = TOY | {"num_key_value_heads": 2}
    model = LLaVA.from_parts(Model(llm_config=text, vision_config=TINY), "plain").eval()
    init_weights(model.language_model, 0.3)
    llama_cpp.write(model, "float32", tmp_path / "toy.gguf")
    prompts = torch.randint(3, 320, (3, 12))
    theirs = llama_cpp.LlamaCpp(tmp_path / "toy.gguf", 3, 1).decode(prompts, 8)
    assert torch.equal(theirs, model.generate(prompts, max_new_tokens=8))


def test_a_number_below_its_target_is_called_missed():
    key = ("bfloat16", 1)
    case = {
        "kind": "bfloat16",
        "batch": 1,
        "threads": 1,
        "rates": {OURS: [5.0], PEER: [4.0]},
        "ratios": {PEER: [CPU[key] - 0.01], LLAMA_CPP: [OF_LLAMA_CPP[key]]},
        "step_ms": 1.0,
        "bytes": 10,
        "equal": {PEER: 1, LLAMA_CPP: 1},
        "tokens": 1,
    }
    assert row(case, 1e6, True).endswith("target 2 x transformers: MISSED")
    assert "llama.cpp" not in heading([case])
    both = case | {"rates": case["rates"] | {LLAMA_CPP: [5.0]}}
    assert row(both, 1e6, True).endswith("MISSED target 0.8 x llama.cpp: met")
    assert len(heading([both])) == len(row(both, 1e6, True).split(" target")[0])
    on_a_gpu = row(case | {"ratios": {PEER: [7.0]}, "bytes": 76}, 100e3, False)
    assert " 76%" in on_a_gpu
    assert on_a_gpu.endswith("target 6 x transformers: met target 0.75: met")


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
