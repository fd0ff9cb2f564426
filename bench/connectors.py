"""Tokens per image, seconds and memory of a training step, with each connector.

    python bench/connectors.py --json         # SmolLM2-360M and SigLIP2-base-384, on a CUDA GPU
    python bench/connectors.py --cpu --json   # about 23M parameters, on the CPU
    python bench/connectors.py --cpu --quick  # a toy, to try the script

All else is the same: language model and encoder with random weights, pictures of 24 x 24 patches,
and rows with one picture and so many tokens of text, of which half are supervised. A step is
forward, backward and AdamW in bf16 as train.py makes it; connector and language model train, the
encoder is frozen. Rows are packed as in training, so fewer tokens of a picture mean fewer tokens of
a micro-batch.

Each connector runs in a process of its own, which counts the steps behind its first one. A round is
one process of each, one after the other: what slows the machine down for minutes slows down all.
Times are the median over all steps. CPU seconds are those that the threads of the process ran, and
depend least on what else the machine does. Memory is the lowest peak of the rounds: on the CPU of
the process above its imports, on a GPU that of the allocator.

resampler, qformer, cross_attention, c_abstractor and fourier make 64 tokens, as many as the
squares of 3 x 3 do. Their other sizes are the defaults: the Q-Former is a bert-base.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
from bench.common import RESULTS, installed, median_and_range, run_child, write_json  # noqa: E402
from bench.training_cases import SMOLLM, VIT_S, peak_memory  # noqa: E402
from config import UserError  # noqa: E402

# What is measured: a name for the table -> connector and its options.
CASES = {
    "mlp2x_gelu": ("mlp2x_gelu", {}),
    "pixel_shuffle 2": ("pixel_shuffle", {"factor": 2}),
    "pixel_shuffle 3": ("pixel_shuffle", {"factor": 3}),
    "pixel_shuffle 4": ("pixel_shuffle", {"factor": 4}),
    "avg_pool 3": ("avg_pool", {"factor": 3}),
    "c_abstractor": ("c_abstractor", {"num_queries": 64}),
    "fourier": ("fourier", {"side": 8}),
    "cross_attention": ("cross_attention", {"num_queries": 64}),
    "resampler": ("resampler", {"num_queries": 64}),
    "qformer": ("qformer", {"num_queries": 64}),
}

# config.json of the models on the Hub; the small ones are those of bench/training.py.
SMOLLM2_360M = SMOLLM | {
    "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
    "num_attention_heads": 15, "num_key_value_heads": 5, "rope_theta": 100000.0,
}  # fmt: skip
SIGLIP2_BASE_384 = {
    "model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 384, "patch_size": 16,
}  # fmt: skip
FOUR_LAYERS = {"num_hidden_layers": 4, "vocab_size": 8192}
VIT_S_384 = VIT_S | {"image_size": 384}
TOY_TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 500,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TOY_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def sizes(machine: str) -> tuple[dict, dict, int, int, int]:
    """Return config.json of language model and encoder, rows, tokens of text and steps."""
    if machine == "cuda":
        return SMOLLM2_360M, SIGLIP2_BASE_384, 32, 128, 10
    if machine == "cpu":
        return SMOLLM | FOUR_LAYERS, VIT_S_384 | {"num_hidden_layers": 2}, 2, 32, 3
    return SMOLLM | TOY_TEXT, VIT_S_384 | TOY_VISION, 2, 8, 1


# ---------------------------------------------------------------------- in a process of its own


def measure(name: str, machine: str) -> dict:
    """Return what a connector takes: tokens, parameters, seconds of each step, peak in bytes."""
    import torch

    import lora
    import train
    from checkpoints import layouts
    from config import Model, Stage, Tune
    from inputs.sample import Sample
    from model import LLaVA, init_weights
    from packing import IGNORE, IMAGE_TOKEN, Item, pack_samples

    device = "cuda" if machine == "cuda" else "cpu"
    imports = peak_memory(device)
    text, vision, rows, length, steps = sizes(machine)
    connector, options = CASES[name]
    recipe = Model(
        llm_config=text,
        vision_config=vision,
        connector=connector,
        connector_options=options,
        feature_layer=-1,
        feature_select="cls_patch",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LLaVA(layouts.config_from_recipe(recipe, ""))
    init_weights(model, 0.02)
    stage = Stage(tune=Tune(llm="full"))
    train.set_trainable(model, stage.tune)
    train.round_frozen(model)
    optimizer = train.make_optimizer(model, stage)

    # The same text and pictures for every connector.
    g = torch.Generator().manual_seed(0)
    samples = []
    for i in range(rows):
        words = torch.randint(text["vocab_size"], (length,), generator=g)
        picture = torch.randn(1, 3, vision["image_size"], vision["image_size"], generator=g)
        ids = torch.cat([torch.full((model.image_tokens,), IMAGE_TOKEN), words])
        labels = ids.index_fill(0, torch.arange(len(ids) - length // 2), IGNORE)
        samples.append(Sample(ids, labels, [Item(picture)], i, 0))
    batch = pack_samples(samples).to(device)

    seconds = []
    processor = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        processor_start = time.process_time()
        with torch.autocast(device, torch.bfloat16):
            loss = model.loss(batch) / batch.supervised
            loss.backward()
        train.update(optimizer, stage, 0, 10**9)  # it waits for the GPU
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - processor_start)
    return {
        "tokens": model.image_tokens,
        "parameters": lora.count(model.connector),
        "others": lora.count(model) - lora.count(model.connector),
        "seconds": seconds[1:],
        "processor": processor[1:],
        "peak": peak_memory(device) - imports,
    }


# ---------------------------------------------------------------------- the table


def table(result: dict) -> str:
    """Return a line per connector, in the order of the measurement."""
    first = next(iter(result["cases"].values()))
    lines = [
        f"{result['date']}, torch {result['torch']}, {result['threads']} threads, "
        f"{result['rounds']} rounds; {first['others'] / 1e6:.0f} million parameters beside the "
        f"connector, {result['rows']} rows of {result['text']} tokens of text",
        f"{'connector':18}{'tokens':>8}{'parameters':>12}{'seconds a step (range)':>26}"
        f"{'CPU seconds':>24}{'GB':>7}",
    ]
    for name, case in result["cases"].items():
        lines.append(
            f"{name:18}{case['tokens']:8}{case['parameters'] / 1e6:10.1f} M"
            f"{median_and_range(case['seconds'], '.2f'):>26}"
            f"{median_and_range(case['processor'], '.2f'):>24}{min(case['peaks']) / 1e9:7.2f}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------- the command


def main(argv: list[str]):
    if argv[:1] == ["--child"]:
        print(json.dumps(measure(*argv[1:])))
        return

    parser = command_line.parser(__doc__)
    parser.add_argument("--cpu", action="store_true", help="a small model on the CPU")
    parser.add_argument("--quick", action="store_true", help="a toy, to try the script")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each connector (3)")
    parser.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="write every number, to FILE if given"
    )
    args = parser.parse_args(argv)

    import torch

    if not args.cpu and not torch.cuda.is_available():
        raise UserError("bench/connectors.py", "there is no CUDA GPU", "give --cpu")
    machine = "cpu" if args.cpu else "cuda"
    if args.quick:
        machine = "toy"
    folder = "cpu" if args.cpu else torch.cuda.get_device_name().replace(" ", "-")

    cases = {}
    for _ in range(args.rounds):
        for name in CASES:
            found = run_child(__file__, name, machine)
            case = cases.setdefault(name, found | {"seconds": [], "processor": [], "peaks": []})
            case["seconds"] += found["seconds"]
            case["processor"] += found["processor"]
            case["peaks"].append(found["peak"])
    _, _, rows, length, _ = sizes(machine)
    result = {
        "machine": folder,
        "date": datetime.date.today().isoformat(),
        **installed("torch"),
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "rows": rows,
        "text": length,
        "cases": cases,
    }
    print(table(result))
    if args.json is not None:
        write_json(Path(args.json) if args.json else RESULTS / folder / "connectors.json", result)


if __name__ == "__main__":
    command_line.cli(main, __doc__)
