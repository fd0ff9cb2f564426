"""How fast and in how much memory a checkpoint loads, beside transformers in the same run.

    python bench/load.py                # TinyLlama-1.1B's shape, 2.2 GB in a temporary folder
    python bench/load.py --repeats 5 --json out/load.json
    python bench/load.py --layers 2     # a small one, to try the script

It writes random bf16 weights. Then each loader loads them in turn, each time in a fresh process,
and touches every byte: a loader that reads lazily would cost nothing if nobody looked.

Seconds run from the call until the last byte is summed; imports do not count. Memory is the peak
resident size of the process (getrusage), as it is and less what the bare imports took.
Memory-mapped weights count as resident once they are touched. The cache is warm, because one round
that does not count comes first.

Targets: at most 3 s, and at most 1.15 x the weights' size above the imports.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
from bench.common import OURS, PEER, median_and_range, met, run_child, write_json  # noqa: E402

SHAPE = {  # config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOST_SECONDS = 3.0
MOST_MEMORY = 1.15  # above the imports, over the weights


# ---------------------------------------------------------------------- in a process of its own


def write(folder: str, layers: str):
    """Write a random checkpoint of SHAPE with that many layers."""
    import torch

    from checkpoints import weights
    from checkpoints.files import write_file
    from model import LanguageModel, lm_config

    shape = SHAPE | {"num_hidden_layers": int(layers)}
    with torch.device("meta"):
        empty = weights.tensors(LanguageModel(lm_config(shape)))

    torch.manual_seed(0)
    tensors = {}
    for name, tensor in empty.items():
        tensors[name] = torch.randn(tensor.shape, dtype=torch.bfloat16) * 0.02
    weights.save(Path(folder), tensors)
    write_file(Path(folder) / "config.json", json.dumps(shape))


def peak_memory() -> int:
    """Return the largest resident size of this process in bytes; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(load: Callable):
    """Time `load()` and a sum over every byte of its parameters; print one line of JSON."""
    import torch

    imports = peak_memory()
    start = time.perf_counter()
    parameters = list(load().parameters())
    loaded = time.perf_counter()

    # int64, because a sum over narrower numbers copies them.
    checksum = 0
    for p in parameters:
        checksum += int(p.detach().flatten().view(torch.int64).sum())
    touched = time.perf_counter()

    result = {
        "seconds": touched - start,
        "seconds_before_touching": loaded - start,
        "peak": peak_memory(),
        "imports": imports,
        "weights": sum(p.nbytes for p in parameters),
        "checksum": checksum,
        "dtypes": sorted({str(p.dtype) for p in parameters}),
    }
    print(json.dumps(result))


def load_ours(folder: str):
    from model import LanguageModel

    measure(lambda: LanguageModel.from_pretrained(folder, dtype=None))


def load_theirs(folder: str):
    # LlamaForCausalLM is imported lazily; without its name here that would be inside the time.
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    measure(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


LOADERS = {OURS: load_ours, PEER: load_theirs}


# ---------------------------------------------------------------------- the table


def table(runs: dict[str, list[dict]]) -> str:
    """Return what was measured, and whether the targets are met."""
    ours = runs[OURS]
    size = ours[0]["weights"]
    lines = [
        f"{size / 1e9:.2f} GB of weights, warm cache, median (range) of {len(ours)} runs",
        f"{'':14}{'seconds':>22}{'peak GB':>10}{'/ weights':>11}{'imports GB':>12}"
        f"{'above them / weights':>22}",
    ]

    middle = {}
    above = {}
    for name, results in runs.items():
        seconds = [r["seconds"] for r in results]
        peak = statistics.median(r["peak"] for r in results)
        imports = statistics.median(r["imports"] for r in results)
        middle[name] = statistics.median(seconds)
        above[name] = statistics.median(r["peak"] - r["imports"] for r in results)
        lines.append(
            f"{name:14}{median_and_range(seconds, '.2f'):>22}{peak / 1e9:10.2f}{peak / size:11.3f}"
            f"{imports / 1e9:12.2f}{above[name] / size:22.3f}"
        )

    faster = middle[OURS] / middle[PEER]
    leaner = above[OURS] / above[PEER]
    lines.append(
        f"{OURS} / {PEER}: {faster:.2f} of the seconds, {leaner:.2f} of the memory above imports"
    )

    # Targets hold for the worst run.
    worst_seconds = max(r["seconds"] for r in ours)
    worst_memory = max(r["peak"] - r["imports"] for r in ours) / size
    for what, value, most in (
        ("seconds", worst_seconds, MOST_SECONDS),
        ("memory / weights", worst_memory, MOST_MEMORY),
    ):
        lines.append(f"target {what} <= {most}: {met(value <= most)} ({value:.3f} at worst)")
    return "\n".join(lines)


def main(argv: list[str]):
    if argv[:1] == ["--child"]:
        task, *arguments = argv[1:]
        return {"write": write, **LOADERS}[task](*arguments)

    parser = command_line.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of each loader")
    parser.add_argument(
        "--layers", type=int, default=SHAPE["num_hidden_layers"], help="blocks of the model"
    )
    parser.add_argument("--json", type=Path, help="write every run's numbers to this file")
    args = parser.parse_args(argv)
    if min(args.repeats, args.layers) < 1:
        parser.error("--repeats and --layers start at 1")

    runs = {name: [] for name in LOADERS}
    with tempfile.TemporaryDirectory() as folder:
        run_child(__file__, "write", folder, args.layers)
        for turn in range(args.repeats + 1):
            for name in LOADERS:
                result = run_child(__file__, name, folder)
                if turn > 0:  # the first warms the cache
                    runs[name].append(result)

    checksums = {run["checksum"] for results in runs.values() for run in results}
    if len(checksums) > 1:
        raise RuntimeError(f"the loaders read different weights: {runs}")
    print(table(runs))
    if args.json:
        write_json(args.json, runs)


if __name__ == "__main__":
    command_line.cli(main, __doc__)
