"""How fast and in how much memory a checkpoint loads, beside transformers in the same run.

    python bench/load.py                           # TinyLlama-1.1B's shape, about 2.2 GB in a temporary folder
    python bench/load.py --repeats 5 --json out/load.json
    python bench/load.py --layers 2                # a small one, to try the script

Writes random bf16 weights, then loads them with each loader in turn, each time in a fresh process, and touches
every byte: reading lazily and never looking would cost nothing. Counted are the seconds from the call until the
last byte was summed, imports not, and the peak resident memory of the process (getrusage), as it is and less what
the bare imports took. Memory-mapped weights count as resident once touched. The cache is warm: one uncounted
round comes first.

Targets: at most 3 s, and at most 1.15 x the weights' size above the imports.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkpoints.files import write_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from config import UserError  # noqa: E402

SHAPE = {  # config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SECONDS, MEMORY = 3.0, 1.15  # the targets


def write(folder: str, layers: str):
    """A random checkpoint of SHAPE with that many layers."""
    import torch

    from checkpoints import weights
    from model import LanguageModel, lm_config

    hf = SHAPE | {"num_hidden_layers": int(layers)}
    with torch.device("meta"):
        shapes = weights.tensors(LanguageModel(lm_config(hf)))
    torch.manual_seed(0)
    weights.save(
        Path(folder),
        {k: torch.randn(t.shape, dtype=torch.bfloat16) * 0.02 for k, t in shapes.items()},
    )
    write_file(Path(folder) / "config.json", json.dumps(hf))


def measure(load):
    """Time `load()` and a sum over every byte of its parameters; print one line of JSON."""
    import torch

    def peak() -> int:
        return (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )  # bytes (Linux counts in KiB)

    imports, start = peak(), time.perf_counter()
    parameters = list(load().parameters())
    loaded = time.perf_counter()
    checksum = sum(
        int(p.detach().flatten().view(torch.int64).sum()) for p in parameters
    )  # a narrower sum copies
    print(json.dumps({
        "seconds": time.perf_counter() - start, "seconds_before_touching": loaded - start, "peak": peak(),
        "imports": imports, "weights": sum(p.nbytes for p in parameters), "checksum": checksum,
        "dtypes": sorted({str(p.dtype) for p in parameters}),
    }))  # fmt: skip


def barellava(folder: str):
    from model import LanguageModel

    measure(lambda: LanguageModel.from_pretrained(folder, dtype=None))


def transformers(folder: str):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 (else it is imported inside the time)

    measure(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


LOADERS = {"barellava": barellava, "transformers": transformers}


def child(*arguments: str) -> str:
    """Run one function of this file in a process of its own; its output."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", *arguments], capture_output=True, text=True
    )
    if "ModuleNotFoundError: No module named 'transformers'" in done.stderr:
        raise UserError("bench/load.py", "the peer transformers is missing", 'pip install ".[dev]"')
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}\n{done.stderr}")
    return done.stdout


def table(runs: dict[str, list[dict]]) -> str:
    ours, size = runs["barellava"], runs["barellava"][0]["weights"]

    def median(name: str, value) -> float:
        return statistics.median(value(run) for run in runs[name])

    seconds = {name: median(name, lambda r: r["seconds"]) for name in runs}
    above = {name: median(name, lambda r: r["peak"] - r["imports"]) for name in runs}
    lines = [
        f"{size / 1e9:.2f} GB of weights, warm cache, median (range) of {len(ours)} runs",
        f"{'':14}{'seconds':>22}{'peak GB':>10}{'/ weights':>11}{'imports GB':>12}{'above them / weights':>22}",
    ]
    for name, results in runs.items():
        times, peak = [r["seconds"] for r in results], median(name, lambda r: r["peak"])
        spread = f"{seconds[name]:.2f} ({min(times):.2f} to {max(times):.2f})"
        imports = median(name, lambda r: r["imports"])
        lines.append(f"{name:14}{spread:>22}{peak / 1e9:10.2f}{peak / size:11.3f}{imports / 1e9:12.2f}"
                     f"{above[name] / size:22.3f}")  # fmt: skip
    faster, leaner = (value["barellava"] / value["transformers"] for value in (seconds, above))
    lines.append(
        f"barellava / transformers: {faster:.2f} of the seconds, {leaner:.2f} of the memory above imports"
    )
    worst_seconds, worst_above = (
        max(r["seconds"] for r in ours),
        max(r["peak"] - r["imports"] for r in ours) / size,
    )
    for what, value, target in (
        ("seconds", worst_seconds, SECONDS),
        ("memory / weights", worst_above, MEMORY),
    ):
        lines.append(
            f"target {what} <= {target}: {'met' if value <= target else 'MISSED'} ({value:.3f} at worst)"
        )
    return "\n".join(lines)


def main(argv: list[str]):
    if argv[:1] == ["--child"]:
        return {"write": write, **LOADERS}[argv[1]](*argv[2:])
    parser = config.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of each loader")
    parser.add_argument(
        "--layers", type=int, default=SHAPE["num_hidden_layers"], help="blocks of the model"
    )
    parser.add_argument("--json", type=Path, help="write every run's numbers to this file")
    args = parser.parse_args(argv)
    if min(args.repeats, args.layers) < 1:
        parser.error("--repeats and --layers start at 1")
    # This process stays small and imports no torch: a child's peak starts at its parent's.
    with tempfile.TemporaryDirectory() as folder:
        child("write", folder, str(args.layers))
        runs: dict[str, list[dict]] = {name: [] for name in LOADERS}
        for turn in range(args.repeats + 1):
            for name in LOADERS:
                result = json.loads(child(name, folder).splitlines()[-1])
                if turn:
                    runs[name].append(result)
    if len({run["checksum"] for results in runs.values() for run in results}) > 1:
        raise RuntimeError(f"the loaders read different weights: {runs}")
    print(table(runs))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    config.cli(main, __doc__)
