"""Tokens per second of greedy decoding beside transformers' generate: same weights, dtype and machine, in one run.

    python bench/generate.py                       # Phi-2 and Qwen2-0.5B with SigLIP-so400m, real sizes, on a GPU
    python bench/generate.py --cpu                 # about 110M parameters, some minutes on two cores
    python bench/generate.py --json                # also into bench/results/MACHINE/generate.json
    python bench/generate.py --cpu --quick         # a toy, to try the script

Random weights go into a temporary folder as Hugging Face's LLaVA, which both load. Each case decodes from text prompts
of 32 tokens without stopping; barellava and transformers take turns, a round is one call of each, and a ratio is a
round's. In float32 all tokens must be equal, else the run ends with exit code 1; in bf16 it is said how many are. Int8
and NF4 are barellava's alone, beside transformers in bf16. A call is timed whole, prefill included.

Bandwidth is the weights and keys and values that a step must read over its median time, of the rate of a large copy
(bytes in and out) in the same run. Questions: one picture and 16 questions of 16 tokens each, answered in 8 tokens one
after the other, against each question on its own: the gain, of the K (v + i + q) / (v + i + K q) that is possible where
the picture's encoding v, its prefill i and a question q take what they do alone.

Targets: on the CPU 1.3 x transformers at batch 1 and 2 x at batch 8 in bf16, 2 x at batch 1 with int8 weights; on a
GPU 6 x and 75 % of the bandwidth at batch 1 in bf16; 0.8 of the gain that is possible.
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
import lora  # noqa: E402
from config import Model, UserError  # noqa: E402
from export import export  # noqa: E402
from inference.engine import Engine, Request  # noqa: E402
from model import LLaVA  # noqa: E402
from packing import IMAGE_TOKEN

RESULTS = ROOT / "bench" / "results"
OURS, PEER = "barellava", "transformers"
PROMPT, QUESTIONS = 32, 16
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
          "num_attention_heads": 16, "patch_size": 14, "image_size": 384}  # fmt: skip
SMALL = SIGLIP | {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
                  "patch_size": 16, "image_size": 224}  # fmt: skip
# (config.json of the language model, of the encoder); Hugging Face's LLaVA has a head without a bias
MODELS = {
    "Phi-2-SigLIP": ({"model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
                      "num_hidden_layers": 32, "num_attention_heads": 32, "partial_rotary_factor": 0.4,
                      "max_position_embeddings": 4096, "lm_head_bias": False}, SIGLIP),
    "Qwen2-0.5B-SigLIP": ({"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
                           "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                           "rope_theta": 1e6, "max_position_embeddings": 4096, "tie_word_embeddings": True}, SIGLIP),
    "Llama-110M": ({"model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
                    "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 4096,
                    "tie_word_embeddings": True}, SMALL),
    "toy": ({"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96,
             "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 4096},
            SMALL | {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 64,
                     "image_size": 96}),
}  # fmt: skip
# (dtype or kind of weights, batch) -> least ratio to transformers
CPU = {("float32", 1): None, ("float32", 8): None, ("bfloat16", 1): 1.3, ("bfloat16", 8): 2.0, ("int8", 1): 2.0,
       ("nf4", 1): None}  # fmt: skip
GPU = {("float32", 1): None, ("bfloat16", 1): 6.0, ("bfloat16", 8): None, ("bfloat16", 64): None, ("int8", 1): 6.0,
       ("nf4", 1): 6.0}  # fmt: skip
SHARE, GAIN = 0.75, 0.8


def write(name: str, folder: Path):
    """Random weights of that shape, as Hugging Face's LLaVA."""
    text, vision = MODELS[name]
    export(
        LLaVA.from_parts(Model(llm_config=text, vision_config=vision), "plain"),
        None,
        "hf-llava",
        folder,
    )


def load(folder: Path, kind: str, device: str) -> LLaVA:
    model = LLaVA.from_pretrained(
        folder, torch.float32 if kind == "float32" else torch.bfloat16, device
    ).eval()
    if kind in lora.KINDS:
        lora.quantize(model.language_model, kind)
    return model


def peer(folder: Path, dtype: torch.dtype, device: str):
    try:
        from transformers import LlavaForConditionalGeneration
    except ImportError:
        raise UserError(
            "bench/generate.py", "the peer transformers is missing", 'pip install ".[dev]"'
        ) from None
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()


def clock(call: Callable, device: str) -> tuple[float, object]:
    """Seconds, and what was made."""
    start = time.perf_counter()
    made = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, made


def copy_rate(device: str) -> float:
    """Bytes per second of a large copy, in and out, the best of some."""
    one = torch.zeros(
        (1 << 30) if device == "cuda" else (1 << 27), dtype=torch.uint8, device=device
    )
    two = torch.zeros_like(one)
    return max(2 * one.numel() / clock(lambda: two.copy_(one), device)[0] for _ in range(10))


def step_bytes(model: LLaVA, batch: int, filled: int) -> int:
    """What a step has to read: every weight once, but of a table that is no head only a row; and the cache."""
    lm, c = model.language_model, model.language_model.config
    tensors = {t.data_ptr(): t.nbytes for t in (*lm.parameters(), *lm.buffers())}
    table = 0 if c.tied else lm.model.embed_tokens.weight.nbytes
    width = lm.model.norm.weight.itemsize
    return (
        sum(tensors.values())
        - table
        + sum(2 * x.kv_heads * c.head_dim * batch * filled * width for x in c.layers)
    )


def step_seconds(model: LLaVA, prompts: torch.Tensor, new: int) -> float:
    """The median of the times between the tokens of a call."""
    at: list[float] = []
    model.generate(
        prompts, max_new_tokens=new, stream=lambda tokens: at.append(time.perf_counter())
    )
    return statistics.median(b - a for a, b in zip(at, at[1:], strict=False))


def decoding(
    folder: Path, kind: str, batch: int, new: int, rounds: int, device: str, theirs
) -> dict:
    """One case, in turns. Everything runs once before it counts."""
    model, seconds, equal = load(folder, kind, device), {OURS: [], PEER: []}, []
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    calls = {
        OURS: lambda ids: model.generate(ids, max_new_tokens=new),
        PEER: lambda ids: theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **options
        )[:, PROMPT:],
    }
    g = torch.Generator().manual_seed(batch)
    for i in range(
        rounds + 1
    ):  # other prompts each time: ours would begin with what it still has of the last
        # The last id is the token of images.
        ids = torch.randint(
            3, model.language_model.config.vocab - 1, (batch, PROMPT), generator=g
        ).to(device)
        made = {
            n: clock(partial(call, ids), device)
            for n, call in list(calls.items())[:: 1 - i % 2 * 2]
        }
        equal.append(int((made[OURS][1] == made[PEER][1]).sum()))
        for name in seconds if i else ():
            seconds[name].append(made[name][0])
    rates = {name: [batch * new / s for s in times] for name, times in seconds.items()}
    ratios = [a / b for a, b in zip(rates[OURS], rates[PEER], strict=True)]
    step = step_seconds(model, ids, new)
    return {
        "kind": kind, "batch": batch, "rates": rates, "ratios": ratios, "step_ms": 1e3 * step,
        "bytes": step_bytes(model, batch, PROMPT + new // 2),
        "equal": sum(equal), "tokens": len(equal) * batch * new,
    }  # fmt: skip


def questions(folder: Path, kind: str, rounds: int, device: str) -> dict:
    """The gain of asking one picture everything at once, and what is possible."""
    model, g = load(folder, kind, device), torch.Generator().manual_seed(0)
    side, vocab = model.vision_tower.processor.side, model.language_model.config.vocab - 1
    image = torch.randn(1, 3, side, side, generator=g).to(
        device, model.language_model.model.norm.weight.dtype
    )
    front = torch.tensor([5, IMAGE_TOKEN])
    asked = [
        torch.cat([front, torch.randint(3, vocab, (16,), generator=g)]) for _ in range(QUESTIONS)
    ]
    requests = [Request(ids, image, 8) for ids in asked]
    engine, fresh, made = Engine(model, 1, 1024), [], []

    def answer(which: list[Request], forget: bool) -> list[list[int]]:
        if forget:
            engine.forget()
        return [tokens for _, tokens in engine.serve(which)]

    prefill = Request(front, image, 1)
    answer(requests, True)
    for _ in range(rounds):
        v = clock(lambda: model.encode_images(image), device)[0]
        i = clock(lambda: answer([prefill], True), device)[0] - v
        answer(requests[:1], True)
        q = statistics.median(
            clock(lambda r=r: answer([r], False), device)[0] for r in requests[1:5]
        )
        alone, apart = clock(lambda: [answer([r], True)[0] for r in requests], device)
        together, joined = clock(lambda: answer(requests, True), device)
        possible = QUESTIONS * (v + i + q) / (v + i + QUESTIONS * q)
        fresh.append({"v": v, "i": i, "q": q, "gain": alone / together, "possible": possible})
        made.append(apart == joined)
    return {
        "kind": kind,
        "rounds": fresh,
        "equal": all(made),
        "shares": [r["gain"] / r["possible"] for r in fresh],
    }


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def judged(value: float, least: float | None) -> str:
    return "" if least is None else f" target {least:g}: {'met' if value >= least else 'MISSED'}"


def row(case: dict, rate: float, cpu: bool) -> str:
    key, ours, theirs = (
        (case["kind"], case["batch"]),
        *(spread(case["rates"][name], ".1f") for name in (OURS, PEER)),
    )
    share = case["bytes"] / case["step_ms"] * 1e3 / rate
    goals = judged(statistics.median(case["ratios"]), (CPU if cpu else GPU).get(key))
    goals += judged(share, SHARE if not cpu and key == ("bfloat16", 1) else None)
    return (f"{case['kind']:9}{case['batch']:6}{ours:>28}{theirs:>28}{spread(case['ratios'], '.2f'):>22}"
            f"{case['step_ms']:9.2f}{share:11.0%}{case['equal']:>7} of {case['tokens']}{goals}")  # fmt: skip


def table(result: dict) -> str:
    lines = [f"{result['date']}, torch {result['torch']}, {result['threads']} threads"]
    for name, m in result["models"].items():
        many, q = m["parameters"] / 1e6, m["questions"]
        lines.append(
            f"{name}, {many:.0f} million in the language model, a copy moves {m['copy'] / 1e9:.1f} GB/s"
        )
        lines.append(f"{'weights':9}{'batch':>6}{OURS + ' tokens/s':>28}{PEER + ' tokens/s':>28}{'ratio':>22}"
                     f"{'step ms':>9}{'bandwidth':>11}{'equal tokens':>14}")  # fmt: skip
        lines += [row(case, m["copy"], result["machine"] == "cpu") for case in m["cases"]]
        one = {
            k: statistics.median(r[k] for r in q["rounds"])
            for k in ("v", "i", "q", "gain", "possible")
        }
        parts = ", ".join(f"{k} {1e3 * one[k]:.0f} ms" for k in "viq")
        lines.append(f"{QUESTIONS} questions, {q['kind']}: {parts}, gain {one['gain']:.2f} of {one['possible']:.2f}, "
                     f"share {spread(q['shares'], '.2f')}, answers {'equal' if q['equal'] else 'DIFFER'}"
                     f"{judged(statistics.median(q['shares']), GAIN)}")  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str]):
    parser = config.parser(__doc__)
    parser.add_argument("--cpu", action="store_true", help="about 110M parameters on the CPU")
    parser.add_argument(
        "--quick", action="store_true", help="a toy of few tokens, to try the script"
    )
    parser.add_argument("--cases", nargs="*", default=[], help="only these, as bfloat16-1 int8-1")
    parser.add_argument("--rounds", type=int, default=5, help="counted calls of each (5)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each prompt (64)")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path(),
        help="write every number, to this file if given",
    )
    args = parser.parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        raise UserError("bench/generate.py", "there is no CUDA GPU", "give --cpu")
    if args.quick:
        args.rounds, args.tokens = 2, 8
    device = "cpu" if args.cpu else "cuda"
    machine = "cpu" if args.cpu else torch.cuda.get_device_name().replace(" ", "-")
    names = (
        ["toy"]
        if args.quick
        else [n for n in MODELS if n != "toy" and (n == "Llama-110M") == args.cpu]
    )
    result = {"machine": machine, "date": datetime.date.today().isoformat(), "torch": torch.__version__,
              "threads": torch.get_num_threads(), "models": {}}  # fmt: skip
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            write(name, Path(folder) / "model")
            m = result["models"][name] = {"copy": copy_rate(device), "cases": []}
            theirs, held = None, None
            for kind, batch in CPU if args.cpu else GPU:
                if args.cases and f"{kind}-{batch}" not in args.cases:
                    continue
                dtype = torch.float32 if kind == "float32" else torch.bfloat16
                if dtype != held:
                    theirs, held = peer(Path(folder) / "model", dtype, device), dtype
                case = decoding(
                    Path(folder) / "model", kind, batch, args.tokens, args.rounds, device, theirs
                )
                m["cases"].append(case)
            m["questions"] = questions(
                Path(folder) / "model", "float32" if args.cpu else "bfloat16", args.rounds, device
            )
            m["parameters"] = lora.count(theirs.model.language_model) if theirs else 0
    print(table(result))
    if args.json is not None:
        file = RESULTS / machine / "generate.json" if args.json == Path() else args.json
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [
        c
        for m in result["models"].values()
        for c in m["cases"]
        if c["kind"] == "float32" and c["equal"] < c["tokens"]
    ]
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    config.cli(main, __doc__)
