"""How fast every kernel is and how much memory it takes, beside named peers in the same run.

    python bench/kernels.py                        # everything, meant to fit in 8 minutes on an H200
    python bench/kernels.py attention lora         # some; or python -m kernels.norms for one
    python bench/kernels.py --quick                # one shape of each, nothing that torch.compile must make first
    python bench/kernels.py --json                 # also into bench/results/<gpu>/kernels.json, for bench/report.py
    python bench/kernels.py --cpu                  # small shapes in float32: the public functions beside plain torch

Shapes, costs and peers are in bench/operations.py. Inputs are random bf16 numbers; each path has its own copy, because
some overwrite theirs. "forward" is without autograd, "training" forward and backward. A time is the GPU's, between two
CUDA events, the median (least to most) of rounds in which every path takes its turn, so that clocks drift alike.
Before each the L2 cache is overwritten, while the GPU is kept waiting until the CPU has launched the work. Memory is
the peak above the inputs: outputs and gradients count.

Share is the least time that the machine could take, the larger of FLOPs / peak rate and bytes / bandwidth, over the
time taken. A ratio is the path's time over ours. The error is the largest over outputs and gradients of
|x - exact| / |exact|, exact being the reference in float32. Ours may have twice plain torch's and half a rounding of
bf16; where it has more the run ends with exit code 1. A peer that is missing or refuses a shape is listed with its
reason; "(bound)" marks what does only part of the work. The file is written after every shape, and what an operation
had in it from an earlier run is replaced.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from checkpoints.files import write_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from bench.operations import Bench, Setting, shapes  # noqa: E402

RESULTS = ROOT / "bench" / "results"
OURS, PLAIN, COMPILED = "barellava", "plain torch", "torch.compile"
UNCHECKED = ("PEFT",)  # draws another dropout
SLOW = (COMPILED, "flex_attention")  # to compile, so once only
# FLOP/s in bf16 and bytes/s. The H200's and the H100's are measured (a product of 8192^3, a copy of 4 GB, counted in
# and out), the others are of their datasheets. A GPU that is not here has no share.
MACHINES = {
    "NVIDIA H200": (790e12, 4.3e12),
    "NVIDIA H100 80GB HBM3": (798e12, 3.0e12),
    "NVIDIA B200": (2250e12, 8.0e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 1.56e12),
    "NVIDIA L40S": (362e12, 0.864e12),
    "NVIDIA GeForce RTX 4090": (165e12, 1.01e12),
}


def reason(error: Exception, warned: list) -> str:
    """Why there is no number, in a line; what torch's attention refuses, it says in warnings."""
    if isinstance(error, ImportError):
        return f"not installed: {error.name or error}"
    lines = [str(error), *(str(w.message) for w in warned)]
    said = dict.fromkeys(
        line.strip().split("\n")[0].split(" (Triggered")[0] for line in lines if line.strip()
    )
    return (type(error).__name__ + ": " + " ".join(said))[:240]


class Run:
    """One path with its own copy of the inputs; in training also the gradients of all that have one."""

    def __init__(
        self, function: Callable, bench: Bench, train: bool, dtype: torch.dtype | None = None
    ):
        self.function, self.train, self.douts = function, train, []
        self.args = [a.to(dtype or a.dtype, copy=True) for a in bench.args]
        self.leaves = [self.args[i].requires_grad_() for i in bench.grads] if train else []

    def __call__(self) -> list[torch.Tensor]:
        with torch.set_grad_enabled(self.train):
            outs = self.function(*self.args)
            outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
        if not self.train:
            return outs
        if not self.douts:  # the same for every path, whatever its dtype
            g = torch.Generator(outs[0].device).manual_seed(1)
            self.douts = [
                torch.randn(o.shape, generator=g, device=o.device).bfloat16().to(o.dtype)
                for o in outs
            ]
        # What a bound leaves out has no gradient; ours and its peers are compared, and fail, if one is missing.
        grads = torch.autograd.grad(outs, self.leaves, self.douts, allow_unused=True)
        return [o.detach() for o in outs] + list(grads)


def relative(made: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((m.float() - e).norm() / e.norm()) for m, e in zip(made, exact, strict=True)]


def peak(run: Run) -> int:
    """Bytes that the GPU's allocator gave out at once during a call, above what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def race(runs: dict[str, Callable], s: Setting) -> dict[str, list[float]]:
    """Milliseconds of every round, in turns, for about s.seconds in all."""
    cuda, launch, total = s.device == "cuda", {}, 0.0
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        launch[name] = time.perf_counter() - start
        if cuda:
            torch.cuda.synchronize()
        total += time.perf_counter() - start
    rounds, took = int(min(400, max(6, s.seconds / total))), {name: [] for name in runs}
    flush = torch.empty(256 << 20, dtype=torch.int8, device=s.device) if cuda else None
    for i in range(rounds):
        # Forwards and backwards in turn: what comes after a large one finds other memory freed.
        for name, run in list(runs.items())[:: 1 - i % 2 * 2]:
            if cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(int(min(1.2 * launch[name], 0.01) * 2e9))  # cycles
                flush.zero_()
                begin.record()
                run()
                end.record()
                took[name].append((begin, end))
            else:
                start = time.perf_counter()
                run()
                took[name].append(1e3 * (time.perf_counter() - start))
    if cuda:
        torch.cuda.synchronize()
        took = {
            name: [begin.elapsed_time(end) for begin, end in events]
            for name, events in took.items()
        }
    return took


def measure(
    s: Setting, bench: Bench, train: bool, limits: tuple[float, float] | None
) -> tuple[dict, list[str]]:
    """-> the numbers of every path, and what is wrong with ours."""
    exact = Run(bench.reference, bench, train, torch.float32)()
    paths = {
        OURS: lambda: bench.ours,
        PLAIN: lambda: bench.reference,
        COMPILED: lambda: s.compiled(bench.reference),
    }
    runs, cells, errors = {}, {}, {}
    for name, make in (paths | bench.peers).items():
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                if name in SLOW and bench.grads and not train:
                    raise RuntimeError("measured in training only: compiling takes long")
                run = Run(make(), bench, train)
                made = run()
                if not name.endswith("(bound)") and name not in UNCHECKED:
                    errors[name] = relative(made, exact)
                    if name != OURS and not max(errors[name]) < 0.1:
                        raise ArithmeticError(
                            f"another result: {max(errors[name]):.1e} away from the reference"
                        )
                made = None
                cells[name] = {"megabytes": peak(run) / 1e6 if s.device == "cuda" else None}
                runs[name] = run
            except Exception as e:  # whatever a peer throws, its cell says it
                cells[name] = {"reason": reason(e, warned)}
    del exact
    flops, moved = (
        (sum(x) for x in zip(bench.forward, bench.backward, strict=True))
        if train
        else bench.forward
    )
    floor = 1e3 * max(flops / limits[0], moved / limits[1]) if limits else None
    for name, times in race(runs, s).items():
        ms = statistics.median(times)
        cells[name] |= {"ms": ms, "range": [min(times), max(times)], "share": floor and floor / ms,
                        "error": max(errors[name]) if name in errors else None}  # fmt: skip
    for cell in cells.values():
        cell["ratio"] = (
            cell["ms"] / cells[OURS]["ms"] if "ms" in cell and "ms" in cells[OURS] else None
        )
    if "reason" in cells[OURS]:
        return cells, [cells[OURS]["reason"]]
    if PLAIN not in errors:
        return cells, ["nothing to compare with: " + cells[PLAIN]["reason"]]
    # tests/test_kernels.py grants the same
    pairs, grant = zip(errors[OURS], errors[PLAIN], strict=True), torch.finfo(s.dtype).eps / 2
    return cells, [
        f"error {o:.1e}, plain torch's {p:.1e}" for o, p in pairs if not o <= 2 * p + grant
    ]


def show(cells: dict):
    for name, c in cells.items():
        if "reason" in c:
            print(f"  {name:26}{c['reason']}")
            continue
        size = "" if c["megabytes"] is None else f"{c['megabytes']:9.0f} MB"
        share = f"{c['share']:7.0%}" if c["share"] else ""
        error = "" if c["error"] is None else f"   error {c['error']:.1e}"
        spread = f"({c['range'][0]:.3f} to {c['range'][1]:.3f})"
        print(
            f"  {name:26}{c['ms']:10.3f} ms {spread:22}{share}{size}{c['ratio'] or 0:8.2f} x{error}",
            flush=True,
        )


def ceilings(s: Setting) -> dict[str, float]:
    """What this very machine does now: a product of 8192^3 on random data in FLOP/s, a copy of 4 GB in bytes/s."""
    a, big = s.randn(8192, 8192), torch.empty(4 << 30, dtype=torch.int8, device=s.device).random_()
    times = race({"product": lambda: a @ a, "copy": big.clone}, s)
    return {"product, FLOP/s": 2 * 8192**3 / statistics.median(times["product"]) * 1e3,
            "copy, bytes/s": 2 * big.nbytes / statistics.median(times["copy"]) * 1e3}  # fmt: skip


def versions() -> dict[str, str | None]:
    found = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": None,
    }
    for package in ("triton", "liger-kernel", "bitsandbytes", "peft", "nvidia-cudnn-cu13"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[
            0
        ]
    return found


def main(argv: list[str]):
    every = shapes()
    parser = config.parser(__doc__)
    parser.prog = "bench/kernels.py"
    parser.add_argument(
        "operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(every)}; without: all"
    )
    parser.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="write the numbers to a file"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the first shape of each operation, short"
    )
    parser.add_argument("--cpu", action="store_true", help="on the CPU")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.operations if name not in every]:
        parser.error(f"{unknown[0]} is not an operation of {', '.join(every)}")
    if args.quick and args.json == "":
        parser.error("--quick --json would replace a whole result; name a file")
    if not args.cpu and not torch.cuda.is_available():
        parser.error("the kernels are measured on a CUDA GPU and torch sees none, or take --cpu")
    gpu = "CPU" if args.cpu else torch.cuda.get_device_name()
    seconds = 0.1 if args.quick else 0.6
    s = (Setting("cpu", torch.float32, 64, 3 * seconds, False) if args.cpu
         else Setting("cuda", torch.bfloat16, 1, seconds, not args.quick))  # fmt: skip
    limits = None if args.cpu else MACHINES.get(gpu)
    started, facts = (
        time.perf_counter(),
        {"date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "versions": versions()},
    )
    print(
        f"{gpu}, {facts['date']},", ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)
    )
    if not args.cpu:
        facts["ceilings"] = ceilings(s)
        shares = (
            f"shares are of {limits[0]:.3g} and {limits[1]:.3g}"
            if limits
            else "no shares: it is not in MACHINES"
        )
        print("; ".join(f"{k} {v:.3g}" for k, v in facts["ceilings"].items()) + ";", shares)
    else:
        print(f"1/{s.cut} of the tokens, batches and vocabularies that the names say")
    file = (
        Path(args.json) if args.json else RESULTS / gpu.lower().replace(" ", "-") / "kernels.json"
    )
    found = (
        json.loads(file.read_text())
        if args.json is not None and file.exists()
        else {"operations": {}}
    )
    found |= {
        "gpu": gpu,
        "limits": limits,
        "dtype": str(s.dtype).removeprefix("torch."),
        "cut": s.cut,
    }
    failures = []
    for operation in args.operations or every:
        found["operations"][operation] = done = facts | {"shapes": {}}
        for name, make in list(every[operation].items())[: 1 if args.quick else None]:
            if s.compiles:
                torch._dynamo.reset()  # it would stop compiling after some shapes
            torch.manual_seed(0)
            try:
                bench = make(s)
                if args.cpu:
                    bench = bench._replace(peers={})  # they are GPUs' libraries
                done["shapes"][name] = {"targets": bench.targets, "forward": {}}
                for mode in ("forward", "training")[: 2 if bench.grads else 1]:
                    print(
                        f"\n{operation}: {name}, {mode}  [{time.perf_counter() - started:.0f} s]",
                        flush=True,
                    )
                    cells, wrong = measure(s, bench, mode == "training", limits)
                    done["shapes"][name][mode] = cells
                    show(cells)
                    failures += [f"{operation}: {name}, {mode}: {w}" for w in wrong]
            except torch.OutOfMemoryError as e:
                failures.append(f"{operation}: {name}: {reason(e, [])}")
                print("  " + failures[-1])
            bench = cells = None
            gc.collect()
            if s.device == "cuda":
                torch.cuda.empty_cache()
            if args.json is not None:
                write_file(file, json.dumps(found, indent=1) + "\n")
    print(
        f"\n{time.perf_counter() - started:.0f} s"
        + (f", {file} written" if args.json is not None else "")
    )
    if failures:
        sys.exit(
            f"error: bench/kernels.py: {'; '.join(failures)}; fix: python -m pytest tests/test_kernels.py"
        )


if __name__ == "__main__":
    config.cli(main, __doc__)
