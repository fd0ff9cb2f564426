"""How fast every kernel is and how much memory it takes, beside named peers in the same run.

    python bench/kernels.py                  # everything, meant to fit in 8 minutes on an H200
    python bench/kernels.py attention lora   # some operations
    python bench/kernels.py --quick          # one shape of each, without what takes long to compile
    python bench/kernels.py --json           # also into bench/results/<gpu>/kernels.json

It needs a CUDA GPU. Shapes, costs and peers are in bench/operations.py; bench/report.py makes the
page of the file. Inputs are random bf16 numbers; each path has its own copy, because some overwrite
theirs. "forward" is without autograd, "training" forward and backward.

A time is the GPU's, between two CUDA events: the median (least to most) of rounds in which every
path takes its turn, so that clocks drift alike. Before each the L2 cache is overwritten, while the
GPU is kept waiting until the CPU has launched the work. Memory is the peak above the inputs:
outputs and gradients count.

Share is the least time that the machine could take, the larger of FLOPs / peak rate and bytes /
bandwidth, over the time taken. A ratio is the path's time over ours. The error is the largest
over outputs and gradients of |x - exact| / |exact|, exact being the reference in float32. Ours
may have twice plain torch's and half a rounding of bf16; where it has more the run ends with exit
code 1. A peer that is missing or refuses a shape is listed with its reason; "(bound)" marks what
does only part of the work. The file is written after every shape, and what an operation had in it
from an earlier run is replaced.

The file in order: `Run` (one path), `race` (times in turns), `measure` (one shape), the machine,
the file, the command.
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
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
from bench.operations import Bench, Cost, Setting, shapes  # noqa: E402
from checkpoints.files import write_file  # noqa: E402

STARTED = time.perf_counter()
RESULTS = ROOT / "bench" / "results"
OURS = "barellava"
PLAIN = "plain torch"
COMPILED = "torch.compile"
UNCHECKED = ("PEFT",)  # draws another dropout
SLOW = (COMPILED, "flex_attention")  # to compile, so in training only


class Machine(NamedTuple):
    """What a GPU can do at most."""

    flops: float  # FLOP/s in bf16
    bandwidth: float  # bytes/s


# The H200's and the H100's are measured (a product of 8192^3, a copy of 4 GB, counted in and out),
# the others are of their datasheets. A GPU that is not here has no share.
MACHINES = {
    "NVIDIA H200": Machine(790e12, 4.3e12),
    "NVIDIA H100 80GB HBM3": Machine(798e12, 3.0e12),
    "NVIDIA B200": Machine(2250e12, 8.0e12),
    "NVIDIA A100-SXM4-80GB": Machine(312e12, 2.04e12),
    "NVIDIA A100-SXM4-40GB": Machine(312e12, 1.56e12),
    "NVIDIA L40S": Machine(362e12, 0.864e12),
    "NVIDIA GeForce RTX 4090": Machine(165e12, 1.01e12),
}


# ------------------------------------------------------------------ one path


class Run:
    """One path with its own copy of the inputs.

    A call returns the outputs; in training also the gradients of all inputs that have one.
    """

    def __init__(
        self, function: Callable, bench: Bench, train: bool, dtype: torch.dtype | None = None
    ):
        self.function = function
        self.train = train
        self.args = [a.to(dtype or a.dtype, copy=True) for a in bench.args]
        self.leaves = []
        if train:
            self.leaves = [self.args[i].requires_grad_() for i in bench.grads]
        self.douts = []  # made in the first call

    def __call__(self) -> list[torch.Tensor]:
        with torch.set_grad_enabled(self.train):
            outs = self.function(*self.args)
        outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
        if not self.train:
            return outs

        if not self.douts:
            self.douts = random_like(outs)
        # What a bound leaves out has no gradient; ours and its peers are compared, and fail, if one
        # is missing.
        grads = torch.autograd.grad(outs, self.leaves, self.douts, allow_unused=True)
        return [o.detach() for o in outs] + list(grads)


def random_like(outs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return gradients of outputs: the same for every path, whatever its dtype."""
    g = torch.Generator(outs[0].device).manual_seed(1)
    douts = []
    for o in outs:
        dout = torch.randn(o.shape, generator=g, device=o.device)
        douts.append(dout.bfloat16().to(o.dtype))
    return douts


def relative(made: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """Return the distance of each tensor from what is exact, over its norm."""
    return [float((m.float() - e).norm() / e.norm()) for m, e in zip(made, exact, strict=True)]


def peak(run: Run) -> int:
    """Return the most bytes that were allocated at once during a call, above those before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def reason(error: Exception, warned: list) -> str:
    """Return in a line why there is no number; torch's attention says it in warnings."""
    if isinstance(error, ImportError):
        return f"not installed: {error.name or error}"

    said = {}  # a dict keeps the order, and each sentence once
    for text in (str(error), *(str(w.message) for w in warned)):
        if text.strip():
            first_line = text.strip().split("\n")[0]
            said[first_line.split(" (Triggered")[0]] = None
    return (type(error).__name__ + ": " + " ".join(said))[:240]


# ------------------------------------------------------------------ times


def launch_times(runs: dict[str, Callable], cuda: bool) -> tuple[dict[str, float], float]:
    """Call each once; return the seconds until it was launched, and of all until they had ended."""
    launch = {}
    total = 0.0
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        launch[name] = time.perf_counter() - start
        if cuda:
            torch.cuda.synchronize()
        total += time.perf_counter() - start
    return launch, total


def race(runs: dict[str, Callable], s: Setting) -> dict[str, list[float]]:
    """Return the milliseconds of every round, in turns, for about s.seconds in all."""
    cuda = s.device == "cuda"
    launch, total = launch_times(runs, cuda)
    rounds = int(min(400, max(6, s.seconds / total)))
    timer = GPUTimer(launch) if cuda else CPUTimer()

    # Forwards and backwards in turn: what comes after a large one finds other memory freed.
    names = list(runs)
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            timer.time(name, runs[name])
    return timer.milliseconds()


class CPUTimer:
    """Times by the clock."""

    def __init__(self):
        self.took = {}

    def time(self, name: str, run: Callable):
        start = time.perf_counter()
        run()
        self.took.setdefault(name, []).append(1e3 * (time.perf_counter() - start))

    def milliseconds(self) -> dict[str, list[float]]:
        return self.took


class GPUTimer:
    """Times between two CUDA events, which the CPU need not wait for."""

    def __init__(self, launch: dict[str, float]):
        self.launch = launch
        self.events = {}
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def time(self, name: str, run: Callable):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)

        # The GPU sleeps for as long as the CPU needs to launch the work, then empties its L2 cache.
        cycles = int(min(1.2 * self.launch[name], 0.01) * 2e9)
        torch.cuda._sleep(cycles)
        self.flush.zero_()
        begin.record()
        run()
        end.record()
        self.events.setdefault(name, []).append((begin, end))

    def milliseconds(self) -> dict[str, list[float]]:
        torch.cuda.synchronize()
        took = {}
        for name, events in self.events.items():
            took[name] = [begin.elapsed_time(end) for begin, end in events]
        return took


# ------------------------------------------------------------------ one shape


def prepare(
    name: str, make: Callable, bench: Bench, train: bool, exact: list[torch.Tensor]
) -> tuple[Run, list[float] | None]:
    """Return a path that has run once, and its errors; raise what it refuses or lacks.

    A peer that computes something else is refused, too. Bounds have no errors.
    """
    if name in SLOW and bench.grads and not train:
        raise RuntimeError("measured in training only: compiling takes long")
    run = Run(make(), bench, train)
    made = run()
    if name.endswith("(bound)") or name in UNCHECKED:
        return run, None

    error = relative(made, exact)
    if name != OURS and not max(error) < 0.1:
        raise ArithmeticError(f"another result: {max(error):.1e} away from the reference")
    return run, error


def faults(cells: dict, errors: dict[str, list[float]], dtype: torch.dtype) -> list[str]:
    """Return what is wrong with ours. tests/kernels/test_accuracy.py grants it the same errors."""
    if "reason" in cells[OURS]:
        return [cells[OURS]["reason"]]
    if PLAIN not in errors:
        return ["nothing to compare with: " + cells[PLAIN]["reason"]]

    found = []
    grant = torch.finfo(dtype).eps / 2
    for ours, plain in zip(errors[OURS], errors[PLAIN], strict=True):
        if not ours <= 2 * plain + grant:  # not `>`: an error that is no number is a fault
            found.append(f"error {ours:.1e}, plain torch's {plain:.1e}")
    return found


def least_milliseconds(bench: Bench, train: bool, limits: Machine | None) -> float | None:
    """Return the least time that the machine could take, if it is known."""
    if limits is None:
        return None
    cost = bench.forward
    if train:
        cost = Cost(
            bench.forward.flops + bench.backward.flops, bench.forward.bytes + bench.backward.bytes
        )
    return 1e3 * max(cost.flops / limits.flops, cost.bytes / limits.bandwidth)


def measure(
    s: Setting, bench: Bench, train: bool, limits: Machine | None
) -> tuple[dict[str, dict], list[str]]:
    """Return a cell of numbers, or a reason, for every path, and what is wrong with ours."""
    exact = Run(bench.reference, bench, train, torch.float32)()
    paths = {
        OURS: lambda: bench.ours,
        PLAIN: lambda: bench.reference,
        COMPILED: lambda: s.compiled(bench.reference),
        **bench.peers,
    }

    # Run each once, for its errors and its memory.
    runs = {}
    cells = {}
    errors = {}
    for name, make in paths.items():
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                run, error = prepare(name, make, bench, train, exact)
                megabytes = peak(run) / 1e6 if s.device == "cuda" else None
            except Exception as e:  # whatever a peer throws, its cell says it
                cells[name] = {"reason": reason(e, warned)}
                continue
        runs[name] = run
        cells[name] = {"megabytes": megabytes}
        if error is not None:
            errors[name] = error
    del exact  # it may be large

    # Then their times.
    least = least_milliseconds(bench, train, limits)
    for name, times in race(runs, s).items():
        ms = statistics.median(times)
        cells[name]["ms"] = ms
        cells[name]["range"] = [min(times), max(times)]
        cells[name]["share"] = None if least is None else least / ms
        cells[name]["error"] = max(errors[name]) if name in errors else None

    for cell in cells.values():
        cell["ratio"] = None
        if "ms" in cell and "ms" in cells[OURS]:
            cell["ratio"] = cell["ms"] / cells[OURS]["ms"]
    return cells, faults(cells, errors, s.dtype)


def show(cells: dict[str, dict]):
    """Print a line per path."""
    for name, cell in cells.items():
        if "reason" in cell:
            print(f"  {name:26}{cell['reason']}")
            continue
        low, high = cell["range"]
        words = f"  {name:26}{cell['ms']:10.3f} ms {f'({low:.3f} to {high:.3f})':22}"
        if cell["share"]:
            words += f"{cell['share']:7.0%}"
        if cell["megabytes"] is not None:
            words += f"{cell['megabytes']:9.0f} MB"
        words += f"{cell['ratio'] or 0:8.2f} x"
        if cell["error"] is not None:
            words += f"   error {cell['error']:.1e}"
        print(words, flush=True)


# ------------------------------------------------------------------ the machine


def ceilings(s: Setting) -> dict[str, float]:
    """Return what this very machine does now: a product of 8192^3 in FLOP/s, a copy in bytes/s.

    The product is of random numbers, on which a GPU is slower than on zeros; the copy is of 4 GB.
    """
    a = s.randn(8192, 8192)
    big = torch.empty(4 << 30, dtype=torch.int8, device=s.device).random_()
    times = race({"product": lambda: a @ a, "copy": big.clone}, s)
    product = statistics.median(times["product"]) / 1e3
    copy = statistics.median(times["copy"]) / 1e3
    return {"product, FLOP/s": 2 * 8192**3 / product, "copy, bytes/s": 2 * big.nbytes / copy}


def versions() -> dict[str, str | None]:
    """Return the versions of all that takes part; None for what is not installed."""
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
        said = subprocess.run(query, capture_output=True, text=True).stdout
        found["driver"] = said.split("\n")[0]  # the first GPU's
    return found


# ------------------------------------------------------------------ the file


def measure_operation(
    operation: str,
    made: dict[str, Callable],
    s: Setting,
    limits: Machine | None,
    measured: dict[str, dict],
    save: Callable[[], None],
) -> list[str]:
    """Add the shapes `made` of one operation to `measured`, and save() after each.

    Return what is wrong with ours.
    """
    failures = []
    for name, make in made.items():
        if s.compiles:
            torch._dynamo.reset()  # it would stop compiling after some shapes
        torch.manual_seed(0)
        try:
            bench = make(s)
            measured[name] = {"targets": bench.targets, "forward": {}}
            for mode in ("forward", "training") if bench.grads else ("forward",):
                seconds = time.perf_counter() - STARTED
                print(f"\n{operation}: {name}, {mode}  [{seconds:.0f} s]", flush=True)
                cells, wrong = measure(s, bench, mode == "training", limits)
                measured[name][mode] = cells
                show(cells)
                failures += [f"{operation}: {name}, {mode}: {w}" for w in wrong]
        except torch.OutOfMemoryError as e:
            failures.append(f"{operation}: {name}: {reason(e, [])}")
            print("  " + failures[-1])

        # The next shape finds all memory free.
        bench = None
        gc.collect()
        if s.device == "cuda":
            torch.cuda.empty_cache()
        save()
    return failures


def measure_all(
    operations: list[str],
    gpu: str,
    s: Setting,
    limits: Machine | None,
    facts: dict,
    quick: bool,
    file: Path | None,
) -> list[str]:
    """Measure these operations and write them into the file; return what is wrong with ours."""
    every = shapes()
    found = {"operations": {}}
    if file and file.exists():
        found = json.loads(file.read_text())
    found["gpu"] = gpu
    found["limits"] = limits
    found["dtype"] = str(s.dtype).removeprefix("torch.")
    found["cut"] = s.cut

    def save():
        if file:
            write_file(file, json.dumps(found, indent=1) + "\n")

    failures = []
    for operation in operations:
        made = every[operation]
        if quick:
            first = next(iter(made))
            made = {first: made[first]}
        measured = {}
        found["operations"][operation] = {**facts, "shapes": measured}
        failures += measure_operation(operation, made, s, limits, measured, save)
    return failures


# ------------------------------------------------------------------ the command


def parse(argv: list[str]):
    every = shapes()
    known = ", ".join(every)
    parser = command_line.parser(__doc__)
    parser.prog = "bench/kernels.py"
    parser.add_argument(
        "operations", nargs="*", metavar="OPERATION", help=f"of {known}; without: all"
    )
    parser.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="write the numbers to a file"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the first shape of each operation, short"
    )
    args = parser.parse_args(argv)
    for name in args.operations:
        if name not in every:
            parser.error(f"{name} is not an operation of {known}")
    if args.quick and args.json == "":
        parser.error("--quick --json would replace a whole result; name a file")
    if not torch.cuda.is_available():
        parser.error("the kernels are measured on a CUDA GPU and torch sees none")
    args.operations = args.operations or list(every)
    return args


def main(argv: list[str]):
    args = parse(argv)
    gpu = torch.cuda.get_device_name()
    limits = MACHINES.get(gpu)
    s = Setting("cuda", torch.bfloat16, 1, 0.1 if args.quick else 0.6, not args.quick)
    file = None
    if args.json == "":
        file = RESULTS / gpu.lower().replace(" ", "-") / "kernels.json"
    elif args.json is not None:
        file = Path(args.json)

    # What was measured, on what, and what the machine does today.
    facts = {
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "versions": versions(),
        "ceilings": ceilings(s),
    }
    installed = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)
    print(f"{gpu}, {facts['date']}, {installed}")
    reached = "; ".join(f"{k} {v:.3g}" for k, v in facts["ceilings"].items())
    if limits:
        print(f"{reached}; shares are of {limits.flops:.3g} and {limits.bandwidth:.3g}")
    else:
        print(f"{reached}; no shares: it is not in MACHINES")

    failures = measure_all(args.operations, gpu, s, limits, facts, args.quick, file)
    print(f"\n{time.perf_counter() - STARTED:.0f} s" + (f", {file} written" if file else ""))
    if failures:
        what = "; ".join(failures)
        sys.exit(f"error: bench/kernels.py: {what}; fix: python -m pytest tests/kernels")


if __name__ == "__main__":
    command_line.cli(main, __doc__)
