"""Tokens per second of greedy decoding beside transformers and llama.cpp, in one run.

    python bench/generate.py                # Phi-2 and Qwen2-0.5B with SigLIP-so400m, on a GPU
    python bench/generate.py --cpu          # about 110M parameters, some minutes on two cores
    python bench/generate.py --json         # also into bench/results/MACHINE/generate.json
    python bench/generate.py --cpu --quick  # a toy, to try the script

decoding.py measures; this file has the cases, the targets and the table. All load the same random
weights from a temporary folder that has Hugging Face's LLaVA. Each case decodes from text prompts
of 32 tokens without stopping. They take turns: a round is one call of each, and a ratio is a
round's. A call is timed whole, prefill included. On a CPU each case runs with one thread, and with
all of torch's.

llama.cpp is there on a CPU where PyPI's `xllamacpp` and `gguf` are installed. Its weights have as
many bits as ours: F32, BF16, Q8_0 for int8, Q4_0 for NF4. Its cache is float16, ours float32.

In float32 all tokens must be equal to transformers', else the run ends with exit code 1. Otherwise
the table says how many are. Int8 and NF4 weights are beside transformers in bf16.

Bandwidth is what a step must read (weights, keys and values) over its median time, of the rate at
which the memory is read (on a GPU: of a large copy, bytes in and out) in the same run.

Questions: one picture and 16 questions of 16 tokens each, answered in 8 tokens one after the other.
The gain is the time of asking each on its own over that. K (v + i + q) / (v + i + K q) is possible
where the picture's encoding v, its prefill i and a question q take what they take alone.

Targets: on the CPU 2 x transformers at batch 1 and 2.5 x at batch 8 in bf16, 2 x at batch 1 with
int8 weights; 0.9 x llama.cpp in float32, 0.8 x in bf16 and 0.7 x with int8 weights at batch 1, and
1.2 x at batch 8 in bf16; on a GPU 6 x transformers and 75 % of the bandwidth at batch 1 in bf16;
0.8 of the possible gain.
"""

from __future__ import annotations

import datetime
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import command_line  # noqa: E402
import lora  # noqa: E402
from bench import llama_cpp  # noqa: E402
from bench.common import (  # noqa: E402
    LLAMA_CPP,
    OURS,
    PEER,
    RESULTS,
    median_and_range,
    met,
    write_json,
)
from bench.decoding import (  # noqa: E402
    MODELS,
    QUESTIONS,
    Setting,
    ask_questions,
    decode,
    dtype_of,
    load_theirs,
    memory_rate,
    write,
)
from config import UserError  # noqa: E402

# (kind of weights, batch) -> least ratio to transformers' tokens per second.
CPU = {
    ("float32", 1): None,
    ("float32", 8): None,
    ("bfloat16", 1): 2.0,
    ("bfloat16", 8): 2.5,
    ("int8", 1): 2.0,
    ("nf4", 1): None,
}
# The same, of llama.cpp's on a CPU.
OF_LLAMA_CPP = {
    ("float32", 1): 0.9,
    ("bfloat16", 1): 0.8,
    ("bfloat16", 8): 1.2,
    ("int8", 1): 0.7,
}
GPU = {
    ("float32", 1): None,
    ("bfloat16", 1): 6.0,
    ("bfloat16", 8): None,
    ("bfloat16", 64): None,
    ("int8", 1): 6.0,
    ("nf4", 1): 6.0,
}
LEAST_BANDWIDTH = 0.75  # on a GPU, in bf16 at batch 1
LEAST_GAIN = 0.8  # of what is possible


# ---------------------------------------------------------------------- the table


def judged(value: float, least: float | None, of: str = "") -> str:
    """Return the words about a target, if there is one; `of` says what it is a multiple of."""
    if least is None:
        return ""
    return f" target {least:g}{of}: {met(value >= least)}"


def row(case: dict, rate: float, cpu: bool) -> str:
    """Return the line of one case; `rate` is the memory's in bytes per second."""
    key = (case["kind"], case["batch"])
    ours = median_and_range(case["rates"][OURS], ".1f")
    bandwidth = case["bytes"] / case["step_ms"] * 1e3 / rate
    line = f"{case['kind']:9}{case['batch']:6}{case['threads']:8}{ours:>26}"

    goals = ""
    for peer, targets in ((PEER, CPU if cpu else GPU), (LLAMA_CPP, OF_LLAMA_CPP)):
        if peer not in case["rates"]:
            continue
        theirs = median_and_range(case["rates"][peer], ".1f")
        ratio = median_and_range(case["ratios"][peer], ".2f")
        line += f"{theirs:>26}{ratio:>22}{case['equal'][peer]:>6} of {case['tokens']:<5}"
        middle = statistics.median(case["ratios"][peer])
        goals += judged(middle, targets.get(key), f" x {peer}")

    if not cpu and key == ("bfloat16", 1):
        goals += judged(bandwidth, LEAST_BANDWIDTH)
    return f"{line}{case['step_ms']:9.2f}{bandwidth:11.0%}{goals}"


def heading(cases: list[dict]) -> str:
    """Return the line above the cases."""
    line = f"{'weights':9}{'batch':>6}{'threads':>8}{OURS + ' tokens/s':>26}"
    for peer in (PEER, LLAMA_CPP):
        if peer in cases[0]["rates"]:
            line += f"{peer + ' tokens/s':>26}{'ratio':>22}{'equal':>10}     "
    return f"{line}{'step ms':>9}{'bandwidth':>11}"


def questions_line(asked: dict) -> str:
    """Return the line about the questions on one picture."""
    middle = {}
    for key in ("v", "i", "q", "gain", "possible"):
        middle[key] = statistics.median(numbers[key] for numbers in asked["rounds"])
    parts = ", ".join(f"{part} {1e3 * middle[part]:.0f} ms" for part in ("v", "i", "q"))
    return (
        f"{QUESTIONS} questions, {asked['kind']}: {parts}, gain {middle['gain']:.2f} of "
        f"{middle['possible']:.2f}, share {median_and_range(asked['shares'], '.2f')}, "
        f"answers {'equal' if asked['equal'] else 'DIFFER'}"
        f"{judged(statistics.median(asked['shares']), LEAST_GAIN)}"
    )


def table(result: dict) -> str:
    """Return what was measured of each model."""
    lines = [f"{result['date']}, torch {result['torch']}"]
    for name, model in result["models"].items():
        rates = []
        for threads, rate in model["memory"].items():
            rates.append(f"{threads}: {rate / 1e9:.1f} GB/s")
        lines.append(
            f"{name}, {model['parameters'] / 1e6:.0f} million in the language model; "
            f"the memory gives, by threads, {', '.join(rates)}"
        )
        if model["cases"]:
            lines.append(heading(model["cases"]))
        for case in model["cases"]:
            rate = model["memory"][str(case["threads"])]
            lines.append(row(case, rate, result["machine"] == "cpu"))
        lines.append(questions_line(model["questions"]))
    return "\n".join(lines)


# ---------------------------------------------------------------------- the command


def measure(name: str, cases: list[tuple[str, int]], args, folder: Path) -> dict:
    """Return all numbers of one model."""
    device = "cpu" if args.cpu else "cuda"
    write(name, folder)
    found = {"memory": {}, "cases": []}
    all_threads = torch.get_num_threads()
    counts = sorted({1, all_threads}) if args.cpu else [all_threads]

    theirs = None
    for threads in counts:
        torch.set_num_threads(threads)
        found["memory"][str(threads)] = memory_rate(device)
        has_llama_cpp = args.cpu and llama_cpp.installed()
        setting = Setting(folder, device, args.rounds, args.tokens, threads, has_llama_cpp)

        # Cases of one dtype stand together, so the peer is loaded once for each.
        dtype = None
        for kind, batch in cases:
            if dtype != dtype_of(kind):
                dtype = dtype_of(kind)
                theirs = load_theirs(folder, dtype, device)
            found["cases"].append(decode(kind, batch, setting, theirs))

    kind = "float32" if args.cpu else "bfloat16"
    found["questions"] = ask_questions(folder, kind, args.rounds, device)
    found["parameters"] = lora.count(theirs.model.language_model) if theirs else 0
    return found


def choose_models(args) -> list[str]:
    """Return the names of the models that fit the machine."""
    if args.quick:
        return ["toy"]
    if args.cpu:
        return ["Llama-110M"]
    return [name for name in MODELS if name not in ("toy", "Llama-110M")]


def main(argv: list[str]):
    parser = command_line.parser(__doc__)
    parser.add_argument("--cpu", action="store_true", help="about 110M parameters on the CPU")
    parser.add_argument(
        "--quick", action="store_true", help="a toy of few tokens, to try the script"
    )
    parser.add_argument("--cases", nargs="*", default=[], help="only these, as bfloat16-1 int8-1")
    parser.add_argument("--rounds", type=int, default=3, help="counted calls of each (3)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each prompt (64)")
    parser.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="write every number, to FILE if given"
    )
    args = parser.parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        raise UserError("bench/generate.py", "there is no CUDA GPU", "give --cpu")
    if args.quick:
        args.rounds = 2
        args.tokens = 8

    cases = list(CPU if args.cpu else GPU)
    if args.cases:
        cases = [(kind, batch) for kind, batch in cases if f"{kind}-{batch}" in args.cases]
    machine = "cpu" if args.cpu else torch.cuda.get_device_name().replace(" ", "-")
    result = {
        "machine": machine,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "models": {},
    }
    for name in choose_models(args):
        with tempfile.TemporaryDirectory() as folder:
            result["models"][name] = measure(name, cases, args, Path(folder) / "model")

    print(table(result))
    if args.json is not None:
        file = Path(args.json) if args.json else RESULTS / machine / "generate.json"
        write_json(file, result)
    for model in result["models"].values():
        for case in model["cases"]:
            if case["kind"] == "float32" and case["equal"][PEER] < case["tokens"]:
                sys.exit(1)


if __name__ == "__main__":
    command_line.cli(main, __doc__)
