"""One training step of this code beside the same model in transformers (and PEFT), in one run.

    python bench/training.py                # whole models on a CUDA GPU, 8 minutes on an H200
    python bench/training.py --cpu          # about 100M parameters, 15 minutes on two cores
    python bench/training.py --cpu "100M, full, bf16" --rounds 5
    python bench/training.py --json         # also into bench/results/MACHINE/training.json
    python bench/training.py --cpu --quick  # every case, the GPU's too, cut to a toy

The vision encoder is frozen. The connector and the language model train, or LoRA of rank 128 on the
language model's linears. Both paths have the same random weights by name and take the same rows:
nine of ten have a picture, text is 20 to 1300 tokens, half of it below 120, and the second half of
each text is supervised (training_cases.py).

barellava      train.py's own functions on micro-batches packed up to a token budget
               (training_ours.py)
transformers   as TinyLLaVA Factory's scripts drive it (training_peer.py): 8 padded rows a
               micro-batch (for full finetuning rows with and without a picture apart), a blank
               picture encoded for each row without one, gradient checkpointing of the language
               model, logits of all positions. In bf16 the arithmetic is DeepSpeed's: weights,
               activations and gradients in bf16, AdamW on float32 copies. Attention is
               FlashAttention-2 where it is installed on a GPU, else torch's
               scaled_dot_product_attention. Loading rows is left out, and what DeepSpeed costs.

A step is one optimizer step: forward, backward, clipping, AdamW. Each path has a process of its
own. On the CPU both are there at once and take turns, so that clocks drift alike. The first step
does not count. The loss of every step and the gradient norm of the first must agree, else the run
ends with exit code 1: they show that both compute the same.

Memory is the peak of the process above its imports (getrusage), on a GPU that of torch's allocator.
Share is the FLOPs that the rows ask for over the time, of the rate of a large product measured in
the same run. They count no padding, no recomputation, and the head for supervised tokens only
(training/estimate.py), and are the same number for both paths.

The file in order: what a child process does, the first process's side of it, numbers and tables,
the command.
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
from bench.common import OURS, PEER, RESULTS, name_versions, write_json  # noqa: E402
from bench.training_cases import CASES, Case, peak_memory, sizes, toy  # noqa: E402
from config import UserError  # noqa: E402

# How far the losses of all steps and the first gradient norm may be from the peer's, as a share.
LOSS = {"float32": 1e-4, "bfloat16": 1e-3}
NORM = {"float32": 1e-3, "bfloat16": 2e-2}
DROPOUT = 0.05  # of the adapters' inputs


# ---------------------------------------------------------------------- in a child


def make_path(name: str, case: Case, device: str, quick: bool):
    """Return a path, ready to step. Each imports only what it needs, which its memory shows."""
    if name == OURS:
        from bench.training_ours import Path as OurPath

        return OurPath(case, *sizes(case, quick), device)

    from bench.training_peer import Path as PeerPath

    return PeerPath(case, *sizes(case, quick), device)


def serve(name: str, device: str, quick: str, fields: str):
    """Build a path and print its facts, then make one step for every line that comes in."""
    case = Case(*json.loads(fields))
    path = make_path(name, case, device, quick == "quick")

    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what building took, a run does not
    print(json.dumps(path.facts), flush=True)

    for number, _ in enumerate(sys.stdin):
        torch.manual_seed(number)
        # Nothing is dropped in the first step, so that both compute the same.
        path.set_dropout(DROPOUT if number > 0 else 0.0)
        start = time.perf_counter()
        loss, norm = path.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        made = {"seconds": seconds, "loss": loss, "norm": norm, "peak": peak_memory(device)}
        print(json.dumps(made), flush=True)


def machine(device: str, quick: str):
    """Print the machine's name, the versions, and the FLOP/s that a large product reaches."""
    import torch

    from bench.kernels import Setting, race, versions

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("bench/training.py", "torch sees no CUDA GPU", "take --cpu")
    if device == "cuda":
        name = torch.cuda.get_device_name()
        side = 8192
        dtypes = ("bfloat16",)
    else:
        name = "cpu"
        side = 2048
        dtypes = ("float32", "bfloat16")
    if quick == "quick":
        side = 256

    rates = {}
    for dtype in dtypes:
        setting = Setting(device, getattr(torch, dtype), 1, 1.0, False)
        a = setting.randn(side, side)
        b = setting.randn(side, side)
        times = race({"product": lambda a=a, b=b: a @ b}, setting)["product"]
        rates[dtype] = 2 * side**3 / statistics.median(times) * 1e3
    facts = {
        "machine": name,
        "versions": versions() | {PEER: metadata.version(PEER)},
        "rates": rates,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(facts))


# ---------------------------------------------------------------------- in the first process


class Worker:
    """A process of a script, of this one by default. It answers a line with one of JSON."""

    def __init__(self, *arguments: str, script: str = __file__):
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, script, "--child", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def answer(self) -> dict:
        """Return what it says next, or as `reason` its last words if it has ended."""
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)

        self.errors.seek(0)
        said = self.errors.read().strip() or "it ended without a word"
        print(said, file=sys.stderr)
        return {"reason": said.splitlines()[-1][:300]}

    def step(self) -> dict:
        """Let it make a step."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def start_worker(name: str, case: Case, device: str, quick: bool) -> Worker:
    """Return the process of a path."""
    return Worker(name, device, "quick" if quick else "", json.dumps(case))


def race(case: Case, device: str, rounds: int, quick: bool) -> dict[str, dict]:
    """Return the facts and steps of each path, or the reason why there are none.

    The first step is there too, though it does not count.
    """
    groups = [(OURS, PEER)]
    if device == "cuda":
        groups = [(OURS,), (PEER,)]  # a GPU cannot hold both

    paths = {}
    for group in groups:
        workers = {name: start_worker(name, case, device, quick) for name in group}
        for name, worker in workers.items():
            paths[name] = {**worker.answer(), "steps": []}
        for turn in range(rounds + 1):
            for name in group if turn % 2 == 0 else reversed(group):
                if "reason" in paths[name]:
                    continue
                made = workers[name].step()
                if "reason" in made:
                    paths[name]["reason"] = made["reason"]
                else:
                    paths[name]["steps"].append(made)
        for worker in workers.values():
            worker.close()
    return paths


# ---------------------------------------------------------------------- numbers and tables


def numbers_of(path: dict, ours: dict, case: Case, rate: float) -> dict:
    """Return what the table says of a path. Both have the same rows, whose facts `ours` has."""
    seconds = [step["seconds"] for step in path["steps"][1:]]
    middle = statistics.median(seconds)
    return {
        "seconds": middle,
        "range": [min(seconds), max(seconds)],
        "rows/s": case.rows / middle,
        "supervised/s": ours["supervised"] / middle,
        "memory": path["steps"][-1]["peak"] - path["imports"],
        "share": ours["flops"] / middle / rate,
        "padding": path.get("padding", 0.0),
    }


def largest_loss_distance(ours: list[dict], theirs: list[dict]) -> float:
    """Return the largest distance of a step's losses, as a share. NaN is the largest of all."""
    distances = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True)]
    for distance in distances:
        if distance != distance:  # max() would not find it
            return distance
    return max(distances)


def judge(result: dict) -> tuple[dict[str, dict], list[str]]:
    """Return the numbers of each path of a case, and what is wrong with ours."""
    case = Case(*result["case"])
    paths = result["paths"]
    if "reason" in paths[OURS]:
        return {}, [paths[OURS]["reason"]]

    numbers = {}
    for name, path in paths.items():
        if "reason" not in path:
            numbers[name] = numbers_of(path, paths[OURS], case, result["rate"])
    if PEER not in numbers:
        return numbers, []

    # Ours beside the peer's.
    ours = numbers[OURS]
    theirs = numbers[PEER]
    our_steps = paths[OURS]["steps"]
    their_steps = paths[PEER]["steps"]
    ours["speed"] = theirs["seconds"] / ours["seconds"]
    ours["leaner"] = ours["memory"] / theirs["memory"]
    ours["loss"] = largest_loss_distance(our_steps, their_steps)
    ours["norm"] = abs(our_steps[0]["norm"] / their_steps[0]["norm"] - 1)

    wrong = []
    for what, value, most in (
        ("loss", ours["loss"], LOSS[case.dtype]),
        ("gradient norm", ours["norm"], NORM[case.dtype]),
    ):
        if not value <= most:  # not `>`: NaN is wrong, too
            wrong.append(f"{what} {value:.1e} away from the peer's")
    return numbers, wrong


def judged(case: Case, ours: dict) -> str:
    """Return our values beside their targets; a missed one is bold."""
    words = []
    for key, target in case.targets.items():
        if key not in ours:
            continue

        value = ours[key]
        if key == "speed":
            what = f"rows/s / {PEER}'"
            shown = f"{value:.2f} (≥ {target:.2f})"
            good = value >= target
        elif key == "leaner":
            what = f"memory / {PEER}'"
            shown = f"{value:.2f} (≤ {target:.2f})"
            good = value <= target
        else:
            what = key
            shown = f"{value:.0%} (≥ {target:.0%})"
            good = value >= target
        if not good:
            shown = f"**{shown}**"
        words.append(f"{what} {shown}")
    return "; ".join(words)


def row(name: str, path: str, numbers: dict, goals: str) -> str:
    """Return a row of the table."""
    low, high = numbers["range"]
    cells = [
        name,
        path,
        f"{numbers['seconds']:.2f} ({low:.2f} to {high:.2f})",
        f"{numbers['rows/s']:.2f}",
        f"{numbers['supervised/s']:.0f}",
        f"{numbers['padding']:.0%}",
        f"{numbers['share']:.0%}",
        f"{numbers['memory'] / 1e9:.2f}",
        goals,
    ]
    return "| " + " | ".join(cells) + " |"


def facts_line(name: str, result: dict, numbers: dict, wrong: list[str]) -> str:
    """Return when and with what a case was measured, and what is missing or wrong."""
    facts = [result["date"], f"{result['threads']} threads", *name_versions(result["versions"])]
    facts.append(f"products {result['rate'] / 1e12:.3g} TFLOP/s")
    if "loss" in numbers.get(OURS, {}):
        facts.append(f"losses {numbers[OURS]['loss']:.0e} apart")
    for path, found in result["paths"].items():
        if "reason" in found:
            facts.append(f"{path}: {found['reason']}")
    return f"- {name}: " + ", ".join(facts + wrong)


def table(result: dict) -> str:
    """Return the cases of a machine, as PERFORMANCE.md has them."""
    lines = [
        "| case | | seconds a step | rows/s | supervised tokens/s | padding | share | peak GB | |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    told = []
    for name, one in result["cases"].items():
        numbers, wrong = judge(one)
        for path, found in numbers.items():
            goals = judged(Case(*one["case"]), found) if path == OURS else ""
            lines.append(row(name, path, found, goals))
        told.append(facts_line(name, one, numbers, wrong))
    return "\n".join([*lines, "", *told])


# ---------------------------------------------------------------------- the command


def parse(argv: list[str]):
    every = "; ".join(name for cases in CASES.values() for name in cases)
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {every}; without: all of the machine's"
    )
    parser.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="write the numbers to a file"
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes, all cases")
    parser.add_argument("--cpu", action="store_true", help="on the CPU")
    parser.add_argument("--rounds", type=int, default=3, help="counted steps of each path")
    args = parser.parse_args(argv)

    args.device = "cpu" if args.cpu else "cuda"
    args.known = CASES["cpu"] | CASES["cuda"] if args.quick else CASES[args.device]
    for name in args.cases:
        if name not in args.known:
            parser.error(f"{name!r} is no case here, they are: {'; '.join(args.known)}")
    if args.rounds < 1:
        parser.error("--rounds starts at 1")
    if args.quick and args.json == "":
        parser.error("--quick --json would replace a whole result; name a file")
    return args


def result_file(args, machine_name: str) -> Path | None:
    """Return where the numbers go, if anywhere."""
    if args.json is None:
        return None
    if args.json:
        return Path(args.json)
    return RESULTS / machine_name.lower().replace(" ", "-") / "training.json"


def main(argv: list[str]):
    if argv[:1] == ["--child"]:
        task, *arguments = argv[1:]
        if task == "machine":
            return machine(*arguments)
        return serve(task, *arguments)

    args = parse(argv)
    facts = Worker("machine", args.device, "quick" if args.quick else "").answer()
    if "reason" in facts:
        sys.exit(facts["reason"])
    facts["date"] = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"

    # Cases that are not measured now keep what the file has of them.
    file = result_file(args, facts["machine"])
    found = {"cases": {}}
    if file and file.exists():
        found = json.loads(file.read_text())
    found["machine"] = facts["machine"]

    failures = []
    for name in args.cases or args.known:
        case = toy(args.known[name]) if args.quick else args.known[name]
        result = {
            **facts,
            "case": list(case),
            "rate": facts["rates"][case.dtype],
            "paths": race(case, args.device, args.rounds, args.quick),
        }
        found["cases"][name] = result
        print(table({"cases": {name: result}}), end="\n\n", flush=True)
        _, wrong = judge(result)
        failures += [f"{name}: {w}" for w in wrong]
        if file:
            write_json(file, found)
    if failures:
        what = "; ".join(failures)
        sys.exit(f"error: bench/training.py: {what}; fix: python -m pytest tests/test_train.py")


if __name__ == "__main__":
    command_line.cli(main, __doc__)
