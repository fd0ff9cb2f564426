"""One training step of this code beside nanoVLM's own, as the users of each run it, in one run.

    git clone https://github.com/huggingface/nanoVLM /tmp/nanovlm
    python bench/nanovlm.py /tmp/nanovlm           # 6 minutes on two quiet cores, 6 GB
    python bench/nanovlm.py /tmp/nanovlm --json    # also into bench/results/cpu/nanovlm.json
    python bench/nanovlm.py /tmp/nanovlm --quick   # a toy, to try the script

The model has the shape of nanoVLM's default (SmolLM2-360M, SigLIP2-B/16-512, pixel shuffle 4), with
half of its widths and of its pixels along an edge, and a quarter of its blocks. So a view has 16
tokens for 64, and texts and sequences, too, are a quarter as long. Every picture becomes 13 to 17
views, as there. nanoVLM's code writes the weights, and checkpoints/nanovlm.py reads them. All parts
train.

First each row is a batch by itself, in float32: the losses and the gradient norm must be equal,
else the run ends with exit code 1. Then an optimizer step on all rows, in bf16 under autocast:

barellava   train.py's own functions on micro-batches packed up to the tokens of one sequence of
            nanoVLM. The loss of a step does not depend on how many micro-batches it has, so their
            size is free: it decides how much memory is taken
nanoVLM     what its train.py does: its ConstantLengthDataset packs rows into sequences, its
            VQACollator fills these up to the full length, two of them are a batch. It packs a
            buffer of eight lengths into five sequences more than they need, so more than a third
            of the positions is empty

nanoVLM's packed rows see each other, and the loss of each batch counts alike, whatever is
supervised in it: the losses of the step are not the same, and are not compared. Loading, resizing
and packing rows is left out on both sides.

Each path has a process of its own. Both are there at once and take turns, and a ratio is of one
round. The first step does not count. Memory is the peak of the process above its imports.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
from bench.common import (  # noqa: E402
    OURS,
    RESULTS,
    installed,
    median_and_range,
    name_versions,
    verdict,
    write_json,
)
from bench.training import Worker  # noqa: E402
from bench.training_cases import peak_memory  # noqa: E402
from config import UserError  # noqa: E402

THEIRS = "nanoVLM"

# Fields of nanoVLM's config.json.
SMALL = {
    "vit_hidden_dim": 384,
    "vit_inter_dim": 1536,
    "vit_img_size": 256,
    "vit_n_heads": 6,
    "vit_n_blocks": 3,
    "lm_hidden_dim": 480,
    "lm_inter_dim": 1280,
    "lm_n_blocks": 8,
    "lm_max_length": 1024,
    "mp_image_token_length": 16,
    "max_img_size": 1024,
}
TOY = {
    "vit_hidden_dim": 32,
    "vit_inter_dim": 48,
    "vit_img_size": 64,
    "vit_n_heads": 2,
    "vit_n_blocks": 2,
    "lm_hidden_dim": 60,
    "lm_inter_dim": 80,
    "lm_n_blocks": 2,
    "lm_base_vocab_size": 400,
    "lm_vocab_size": 466,
    "lm_max_length": 256,
    "mp_image_token_length": 1,
    "max_img_size": 256,
}

BATCH = 2  # sequences: TrainConfig.batch_size
BUFFER = 4 * BATCH  # sequences that ConstantLengthDataset collects before it packs them
LEARNING_RATE = 5e-5
CONNECTOR_RATE = 0.00512
ALONE = 4  # rows whose losses are compared
LARGEST_CONTROL = (
    330  # the tokenizer of the benchmark is a small one, and text has no control token
)

# Photographs are wide, tall or square. Their views are 4 x 3 or 4 x 4 tiles and the whole picture.
PICTURES = ((640, 480), (480, 640), (600, 600), (640, 426))

LOSS = 1e-4  # how far a loss or the gradient norm may be from nanoVLM's, as a share
SPEED = 1.5
LEANER = 0.7

# ---------------------------------------------------------------------- what both have


def make_rows(folder: Path) -> list:
    """Return the samples of a step: as many as fill a buffer of nanoVLM.

    Each has a picture of noise and some text, half of which is supervised.
    """
    import torch
    from PIL import Image

    from checkpoints.files import read_json
    from checkpoints.layouts import read_config
    from inputs.sample import Sample
    from model import tiling_of
    from packing import IGNORE, IMAGE_TOKEN

    c = read_json(folder / "config.json")
    views = tiling_of(read_config(folder))
    draw = random.Random(0)
    items = []
    for width, height in PICTURES:
        pixels = draw.randbytes(3 * width * height)
        items.append(views.picture(Image.frombytes("RGB", (width, height), pixels)))

    g = torch.Generator().manual_seed(0)
    rows = []
    total = 0
    while total < BUFFER * c["lm_max_length"]:
        item = items[len(rows) % len(items)]
        positions = views.positions(item.shape)
        most = c["lm_max_length"] // 4
        length = min(max(8, round(draw.lognormvariate(3.6, 0.7))), most)  # half below 37

        words = torch.randint(LARGEST_CONTROL, c["lm_base_vocab_size"], (length,), generator=g)
        ids = torch.cat([words[:3], torch.full((positions,), IMAGE_TOKEN), words[3:]])
        labels = ids.index_fill(0, torch.arange(len(ids) - length // 2), IGNORE)
        rows.append(Sample(ids, labels, [item], len(rows), 0))
        total += len(ids) + 1  # nanoVLM puts a token behind each
    return rows


class OurPath:
    """train.py's functions on packed micro-batches."""

    def __init__(self, folder: Path):
        import train
        from checkpoints.files import read_json
        from config import Rates, Stage, Tune
        from model import LLaVA
        from packing import bin_pack

        imports = peak_memory("cpu")
        self.train = train
        self.model = LLaVA.from_pretrained(folder)
        self.stage = Stage(
            tune=Tune(llm="full", vision="full"),
            learning_rate=LEARNING_RATE,
            rate=Rates(connector=CONNECTOR_RATE),
            weight_decay=0.01,
            warmup_ratio=0.0,
        )
        train.set_trainable(self.model, self.stage.tune)
        self.optimizer = train.make_optimizer(self.model, self.stage)
        self.rows = make_rows(folder)

        lengths = [len(row.ids) for row in self.rows]
        sequence = read_json(folder / "config.json")["lm_max_length"]
        self.batches = bin_pack(lengths, sequence)
        self.supervised = sum(int((row.labels >= 0).sum()) for row in self.rows)
        self.facts = {
            "imports": imports,
            "rows": len(self.rows),
            "tokens": sum(lengths),
            "views": sum(row.items[0].shape.views for row in self.rows),
            "supervised": self.supervised,
            "batches": len(self.batches),
            "positions": sum(lengths),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def alone(self) -> dict:
        """Return the loss of each of the first rows, and the norm of their mean's gradient."""
        from packing import pack_samples
        from training.parallel import gradient_norm

        losses = []
        for row in self.rows[:ALONE]:
            batch = pack_samples([row])
            loss = self.model.loss(batch) / batch.supervised
            (loss / ALONE).backward()
            losses.append(loss.item())
        norm = gradient_norm(list(self.model.parameters())).item()
        self.optimizer.zero_grad()
        return {"losses": losses, "norm": norm}

    def step(self) -> float:
        """Make an optimizer step; return its loss."""
        import torch

        from packing import pack_samples

        losses = []
        for numbers in self.batches:
            batch = pack_samples([self.rows[i] for i in numbers])
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model.loss(batch) / self.supervised
                loss.backward()
            losses.append(loss.detach())
        self.train.update(self.optimizer, self.stage, 0, 10**9)
        return sum(losses).item()


# ---------------------------------------------------------------------- in a child


def prepare(folder: str, peer: str, quick: str):
    """Write a model of nanoVLM with random weights, and a tokenizer beside it."""
    from bench import nanovlm_peer
    from inputs import templates

    folder = Path(folder)
    templates.byte_tokenizer().save(folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = TOY if quick == "quick" else SMALL
    nanovlm_peer.write_model(Path(peer), folder, sizes | {"lm_tokenizer": str(folder)})
    print("{}")


def serve(name: str, folder: str, peer: str):
    """Build a path, print its facts and the losses of rows alone, then step for every line."""
    if name == OURS:
        path = OurPath(Path(folder))
    else:
        from bench.nanovlm_peer import Path as TheirPath

        path = TheirPath(Path(peer), Path(folder))
    print(json.dumps(path.facts | path.alone()), flush=True)

    for _ in sys.stdin:
        start = time.perf_counter()
        loss = path.step()
        seconds = time.perf_counter() - start
        made = {"seconds": seconds, "loss": loss, "peak": peak_memory("cpu")}
        print(json.dumps(made), flush=True)


# ---------------------------------------------------------------------- numbers and table


def judge(result: dict) -> tuple[dict, list[str]]:
    """Return ratios of each round and of memory, and what is wrong."""
    ours = result["paths"][OURS]
    theirs = result["paths"][THEIRS]
    pairs = list(zip(ours["steps"], theirs["steps"], strict=True))[1:]
    memory = {
        name: path["steps"][-1]["peak"] - path["imports"] for name, path in result["paths"].items()
    }
    found = {
        "speed": [b["seconds"] / a["seconds"] for a, b in pairs],
        "memory": memory,
        "leaner": memory[OURS] / memory[THEIRS],
    }

    wrong = []
    told = [("gradient norm", ours["norm"], theirs["norm"])]
    for i, (a, b) in enumerate(zip(ours["losses"], theirs["losses"], strict=True)):
        told.append((f"loss of row {i}", a, b))
    found["apart"] = max(abs(a / b - 1) for _, a, b in told)
    for what, a, b in told:
        if not abs(a / b - 1) <= LOSS:  # not `>`: NaN is wrong, too
            wrong.append(f"{what} {a:.6g}, nanoVLM's is {b:.6g}")
    return found, wrong


def table(result: dict) -> str:
    """Return a line per path, the ratios and what they were meant to be."""
    found, wrong = judge(result)
    ours = result["paths"][OURS]
    lines = [
        f"{result['date']}, {', '.join(name_versions(result['versions']))}, "
        f"{result['threads']} threads",
        f"{ours['parameters'] / 1e6:.0f} million parameters; {ours['rows']} rows a step, "
        f"{ours['tokens']} tokens, {ours['views']} views, {ours['supervised']} supervised tokens",
        f"{'':12}{'seconds a step (range)':>26}{'rows/s':>8}{'batches':>9}{'empty':>7}{'GB':>7}",
    ]
    for name, path in result["paths"].items():
        seconds = [step["seconds"] for step in path["steps"][1:]]
        empty = 1 - ours["tokens"] / path["positions"]
        lines.append(
            f"{name:12}{median_and_range(seconds, '.2f'):>26}"
            f"{ours['rows'] / statistics.median(seconds):8.2f}{path['batches']:9}{empty:7.0%}"
            f"{found['memory'][name] / 1e9:7.2f}"
        )
    lines.append(
        f"rows alone, float32: losses and gradient norm {found['apart']:.0e} apart at most"
    )
    lines += wrong
    lines.append(f"rows/s / nanoVLM's: {median_and_range(found['speed'], '.2f')}")
    speed = statistics.median(found["speed"])
    if result["quick"]:
        return "\n".join(lines)
    lines.append(verdict(f"rows/s / nanoVLM's >= {SPEED}", speed, speed >= SPEED))
    leaner = found["leaner"]
    lines.append(verdict(f"memory / nanoVLM's <= {LEANER}", leaner, leaner <= LEANER))
    return "\n".join(lines)


# ---------------------------------------------------------------------- the command


def race(folder: Path, peer: Path, rounds: int) -> dict[str, dict]:
    """Return the facts and steps of each path. Raise UserError for one that ends before."""
    workers = {}
    for name in (OURS, THEIRS):
        workers[name] = Worker(name, str(folder), str(peer), script=__file__)

    def answer_of(name: str, answer: dict) -> dict:
        if "reason" in answer:
            raise UserError("bench/nanovlm.py", f"{name}: {answer['reason']}", "see above")
        return answer

    paths = {}
    for name, worker in workers.items():
        paths[name] = {**answer_of(name, worker.answer()), "steps": []}
    for turn in range(rounds + 1):
        order = list(workers) if turn % 2 == 0 else list(reversed(workers))
        for name in order:
            paths[name]["steps"].append(answer_of(name, workers[name].step()))
    for worker in workers.values():
        worker.close()
    return paths


def main(argv: list[str]):
    if argv[:1] == ["--child"]:
        task, *arguments = argv[1:]
        if task == "prepare":
            return prepare(*arguments)
        return serve(task, *arguments)

    parser = command_line.parser(__doc__)
    parser.add_argument("peer", type=Path, help="folder of nanoVLM's code")
    parser.add_argument("--quick", action="store_true", help="a toy, to try the script")
    parser.add_argument("--rounds", type=int, default=3, help="counted steps of each path (3)")
    parser.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="write every number, to FILE if given"
    )
    args = parser.parse_args(argv)
    if not (args.peer / "models" / "vision_language_model.py").is_file():
        fix = "git clone https://github.com/huggingface/nanoVLM there"
        raise UserError(args.peer, "has no code of nanoVLM", fix)
    if args.quick and args.json == "":
        parser.error("--quick --json would replace a whole result; name a file")

    with tempfile.TemporaryDirectory() as folder:
        quick = "quick" if args.quick else ""
        prepared = Worker("prepare", folder, str(args.peer.resolve()), quick, script=__file__)
        if "reason" in prepared.answer():
            sys.exit("error: bench/nanovlm.py: nanoVLM's code does not run; fix: see above")
        prepared.close()
        paths = race(Path(folder), args.peer.resolve(), args.rounds)

    result = {
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "versions": installed("torch", "transformers"),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
        "quick": args.quick,
        "paths": paths,
    }
    print(table(result))
    if args.json is not None:
        write_json(Path(args.json) if args.json else RESULTS / "cpu" / "nanovlm.json", result)
    _, wrong = judge(result)
    if wrong:
        what = "; ".join(wrong)
        fix = "python -m pytest tests/checkpoints/test_nanovlm.py"
        sys.exit(f"error: bench/nanovlm.py: {what}; fix: {fix}")


if __name__ == "__main__":
    command_line.cli(main, __doc__)
