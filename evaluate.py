"""Measures a model on a benchmark, beside chance and the nearest recipe's published number.

    torchrun evaluate.py --model out/demo --task world --data out/demo/world

    # The same, seeing nothing:
    torchrun evaluate.py --model out/demo --task world --data out/demo/world --blank

    torchrun --nproc-per-node 8 evaluate.py --model DIR --task pope --data playground/data/eval/pope
    python evaluate.py --model DIR --task mmvet --data DIR \\
        --judge https://api.openai.com/v1 --judge-model gpt-4-0613

Writes MODEL/eval/TASK.jsonl, one answer a line, MODEL/eval/TASK.json, the scores, and beside them
the file that the benchmark's own server or script takes. A killed run continues where it stopped
when the same command is given again; a model saved since then starts it afresh. Decoding is greedy.

A task is a file of evals/, whose docstring says which files it reads and how its scorer judges.
evals/__init__.py says what such a file offers, and how to add one.

This file, from top to bottom: the table of tasks; what a question shows to the model, and the
controls that hide it; answers on disk, resumed and shared by ranks; scores; the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import config
from checkpoints.files import resolve, write_file
from config import UserError
from evals import (
    Example,
    Task,
    gqa,
    llava_bench,
    longvideobench,
    mlvu,
    mmbench,
    mme,
    mmmu,
    mmvet,
    mmvu,
    moving,
    mvbench,
    pope,
    scienceqa,
    seedbench,
    textvqa,
    videomme,
    vqav2,
    world,
)
from evals.judge import Judge
from evals.published import add_published
from inference.answer import answer as answer_questions
from inputs.pictures import load_image
from inputs.sample import load_item
from inputs.tokenizer import load_tokenizer
from inputs.video import probe
from kernels import default_dtype
from model import LLaVA
from packing import Item


def variant(task: Task, **options) -> Task:
    """Return a task whose examples are read with options."""
    parts = dict(vars(task))
    parts["examples"] = partial(task.examples, **options)
    return SimpleNamespace(**parts)


TASKS: dict[str, Task] = {
    "world": world,
    "vqav2": vqav2,
    "vqav2-val": variant(vqav2, split="val2014"),
    "gqa": gqa,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "textvqa-plain": variant(textvqa, ocr=False),
    "pope": pope,
    "mme": mme,
    "mmmu": mmmu,
    "mmvet": mmvet,
    "llava_bench": llava_bench,
    "mmbench": mmbench,
    "seedbench": seedbench,
    "videomme": videomme,
    "mvbench": mvbench,
    "mvbench-19": variant(mvbench, without=("Fine-grained Pose",)),
    "longvideobench": longvideobench,
    "longvideobench-plain": variant(longvideobench, subtitles=False),
    "mlvu": mlvu,
    "mmvu": mmvu,
    "moving": moving,
}

# How many pictures or videos the mean of --blank is taken of.
MEAN_OF = 64

# Seconds between two lines of progress where there is no terminal.
QUIET_SECONDS = 30


# ------------------------------------------------------------------------- what a question shows


def shown_files(example: Example) -> tuple[str, list[str]]:
    """Return "image" or "video", and the names of all that an example shows."""
    kind = "video" if example.get("video") else "image"
    named = example[kind] or []
    if isinstance(named, str):
        named = [named]
    return kind, named


def load_shown(example: Example, data_dir, load: Callable) -> list:
    """Return load(source, kind, **part) of each of an example's pictures or videos.

    `source` is a path or the bytes of a picture; `part` has the span and rate of a video.
    Raise UserError that names the example's row and the file, where `load` raises ValueError.
    """
    part = {key: example[key] for key in ("span", "rate") if key in example}
    kind, named = shown_files(example)

    loaded = []
    for i, name in enumerate(named):
        path = Path(data_dir) / name
        source = path
        if "pictures" in example:
            source = example["pictures"][i]
        try:
            loaded.append(load(source, kind, **part))
        except UserError:
            raise
        except ValueError as error:
            where = example.get("where", path)
            raise UserError(where, f"{path}: {error}", "restore it") from None
    return loaded


def items_of_example(example: Example, data_dir, model: LLaVA) -> list[Item]:
    """Return what an example shows as the model sees it."""
    return load_shown(example, data_dir, partial(load_item, tiling=model.views))


def check_examples(examples: list[Example], data_dir):
    """Raise UserError for two examples of one id, or a picture or video that is not there.

    This is done before a model is loaded.
    """
    ids = set()
    for example in examples:
        if example["id"] in ids:
            what = f"question {example['id']} is there twice"
            raise UserError(example["where"], what, "fetch the file again")
        ids.add(example["id"])

        # Opening is slow, so files that are there are taken on trust. This raises for one that is
        # missing, and looks into pictures that are no files but bytes in the example.
        _, named = shown_files(example)
        if not all((Path(data_dir) / name).exists() for name in named):
            load_shown(example, data_dir, open_media)


def open_media(source, kind: str, **part):
    """Open a picture or a video without a model. Raise ValueError(what is wrong with it)."""
    if kind == "image":
        load_image(source)
    else:
        probe(source)


def answerer(
    model: LLaVA,
    tokenizer,
    data_dir,
    max_new_tokens: int,
    change: Callable[[Item], Item] | None = None,
) -> Callable[[list[Example]], list[str]]:
    """Return a function from a list of examples to the model's answers.

    change: returns what is shown in place of an item, for the controls below.
    """

    def answer(examples: list[Example]) -> list[str]:
        questions = []
        items_of_each = []
        for example in examples:
            items = items_of_example(example, data_dir, model)
            if change:
                items = [change(item) for item in items]
            questions.append(example["prompt"])
            items_of_each.append(items)
        return answer_questions(
            model, tokenizer, questions, items_of_each, max_new_tokens=max_new_tokens
        )

    return answer


# ------------------------------------------------------------------------------------- controls


def blank_with_mean(examples: list[Example], data_dir, model: LLaVA) -> Callable[[Item], Item]:
    """Return a function that shows the mean of some pictures and videos in place of an item.

    The mean is the same for all, so it tells nothing. One plain colour would not do: that is a
    picture of an empty scene, and a model that sees it rightly answers "zero".
    """
    shown = [example for example in examples if shown_files(example)[1]]
    step = max(1, len(shown) // MEAN_OF)
    means = []
    for example in shown[::step][:MEAN_OF]:
        for item in items_of_example(example, data_dir, model):
            pixels = model.vision_tower.processor.normalise(item.pixels)  # (P, 3, H, W)
            means.append(pixels.mean(0, keepdim=True))
    mean = torch.cat(means).mean(0)  # (3, H, W)

    def blank(item: Item) -> Item:
        return Item(mean.expand_as(item.pixels), item.shape)

    return blank


def middle_frame(item: Item) -> Item:
    """Return an item that shows its middle frame in place of all.

    So everything is gone that a video tells and one frame does not.
    """
    middle = item.pixels[len(item.pixels) // 2]
    return Item(middle.expand_as(item.pixels), item.shape)


def control_of(
    name: str, examples: list[Example], data_dir, model: LLaVA
) -> Callable[[Item], Item] | None:
    """Return what --blank or --one-frame shows in place of an item; None without a control."""
    if name == "blank":
        return blank_with_mean(examples, data_dir, model)
    if name == "one-frame":
        return middle_frame
    return None


def limit_examples(examples: list[Example], limit: int | None) -> list[Example]:
    """Return about so many examples, spread evenly over all; those of a group stay together."""
    if not limit or limit >= len(examples):
        return examples

    group_of = [example.get("group", example["id"]) for example in examples]
    groups = list(dict.fromkeys(group_of))
    count = max(1, limit * len(groups) // len(examples))
    chosen = {groups[i * len(groups) // count] for i in range(count)}
    return [e for e, group in zip(examples, group_of, strict=True) if group in chosen]


# ------------------------------------------------------------------------------- answers on disk


def no_barrier():
    """Wait for nobody: there is one rank."""


def answer_examples(
    examples: list[Example],
    chosen: list[Example],
    answer: Callable[[list[Example]], list[str]],
    file: Path,
    batch: int = 64,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable = no_barrier,
) -> list[str] | None:
    """Return the answers to the examples `chosen`, in their order; on ranks other than 0 None.

    `examples` are all of the task's: answers to those not chosen now stay in the file. Each rank
    appends to a file of its own, so that nothing has to travel between them; rank 0 puts them
    together.
    """
    # Every rank has read what is there before any of them writes.
    known = read_all_answers(file, examples)
    barrier()

    # Answer this rank's part of the rest.
    mine = chosen[rank::world_size]
    todo = [example for example in mine if example["id"] not in known]
    own = file
    if rank > 0:
        own = file.with_name(f"{file.name}.rank{rank}")
    append_answers(todo, answer, own, batch, done=len(mine) - len(todo), quiet=rank > 0)
    barrier()
    if rank > 0:
        return None

    # One file, in the order of the examples.
    known |= read_all_answers(file, examples)
    rows = [known[example["id"]] for example in examples if example["id"] in known]
    write_file(file, "".join(json.dumps(row) + "\n" for row in rows))
    for part in files_of_other_ranks(file):
        part.unlink()
    return [known[example["id"]]["answer"] for example in chosen]


def files_of_other_ranks(file: Path) -> list[Path]:
    """Return the files to which the other ranks append, of this run or of a killed one."""
    return sorted(file.parent.glob(f"{file.name}.rank*"))


def read_all_answers(file: Path, examples: list[Example]) -> dict[str, dict]:
    """Return {id: row} of the answers to these examples, of all ranks."""
    asked = {example["id"]: example for example in examples}
    known = {}
    for part in [file, *files_of_other_ranks(file)]:
        known |= read_answers(part, asked)
    return known


def read_answers(file: Path, asked: dict[str, Example]) -> dict[str, dict]:
    """Return {id: row} of the answers in a file to the examples {id: example}.

    An answer to another question or about another picture does not count, whatever its id. The last
    line may be half written; it is no answer.
    """
    if not file.exists():
        return {}
    found = {}
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        example = asked.get(row["id"])
        if not example:
            continue
        if row["question"] == example["prompt"] and row["image"] == shown_name(example):
            found[row["id"]] = row
    return found


def shown_name(example: Example):
    """Return what a row of answers says that its question was about."""
    return example.get("video") or example["image"]


def append_answers(
    todo: list[Example],
    answer: Callable[[list[Example]], list[str]],
    file: Path,
    batch: int,
    done: int = 0,
    quiet: bool = False,
):
    """Answer the examples `todo` and append each batch to the file before the next is asked.

    done: how many examples had an answer before, for the printed progress; quiet: print none.
    """
    # Shortest questions first: so those of a batch are of about the same length.
    todo = sorted(todo, key=lambda example: (len(example["prompt"]), example["id"]))
    progress = Progress(done, len(todo), quiet)

    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as lines:
        end_last_line(lines)
        for begin in range(0, len(todo), batch):
            part = todo[begin : begin + batch]
            for example, text in zip(part, answer(part), strict=True):
                row = {
                    "id": example["id"],
                    "question": example["prompt"],
                    "answer": text,
                    "label": example["label"],
                    "image": shown_name(example),
                }
                lines.write(json.dumps(row).encode() + b"\n")
            lines.flush()
            progress.show(begin + len(part))


def end_last_line(lines):
    """End the last line of a file opened for appending, where a killed run has left half of it."""
    if lines.tell() == 0:
        return
    lines.seek(-1, os.SEEK_END)
    if lines.read(1) != b"\n":
        lines.write(b"\n")


class Progress:
    """The line that says how many answers there are: one that changes on a terminal, else some."""

    def __init__(self, done: int, todo: int, quiet: bool):
        self.done = done
        self.todo = todo
        self.quiet = quiet
        self.started = time.monotonic()
        self.shown = 0.0  # when a line was last shown, in seconds since the start

    def show(self, count: int):
        """Print that `count` of those to do are done, unless it is too soon for another line."""
        if self.quiet:
            return
        terminal = sys.stdout.isatty()
        finished = count == self.todo
        seconds = time.monotonic() - self.started
        if not (terminal or finished or seconds - self.shown > QUIET_SECONDS):
            return
        self.shown = seconds

        rate = count / max(seconds, 1e-9)
        left = (self.todo - count) / rate
        of_all = f"{self.done + count}/{self.done + self.todo}"
        line = f"{of_all} answers, {rate:.1f}/s, {left:.0f} s left"
        if not terminal:
            print(line, flush=True)
        elif finished:
            print(f"\r{line}   ", flush=True)
        else:
            print(f"\r{line}   ", end="", flush=True)


def discard_older_answers(file: Path, folder: Path):
    """Remove the answers of all ranks if the oldest are older than the model in the folder."""
    saved = max((weights.stat().st_mtime for weights in folder.glob("*.safetensors")), default=0)

    # A killed run of several ranks may have left only another rank's part.
    parts = list(file.parent.glob(f"{file.name}*"))
    if not parts:
        return
    if min(part.stat().st_mtime for part in parts) < saved:
        print(f"{file.name}: older than the model, starting afresh", flush=True)
        for part in parts:
            part.unlink()


# --------------------------------------------------------------------------------------- scores


def compute_scores(
    task: Task, examples: list[Example], answers: list[str], file: Path, args: argparse.Namespace
) -> dict[str, dict]:
    """Return the scores; {} where the true answers are not public, or no judge is named.

    file: that of the answers, beside which the judge's replies are kept.
    """
    if not hasattr(task, "judge"):
        scores = task.score(examples, answers)
    elif args.judge:
        print(f"asking {args.judge_model} at {args.judge}", flush=True)
        ask = Judge(args.judge, args.judge_model, file.with_name(f"{file.stem}-judge.jsonl"))
        scores = task.judge(examples, answers, ask, file.with_suffix(""), args.data)
    else:
        scores = {}

    if hasattr(task, "text_only"):
        for name, percent in task.text_only(args.data).items():
            if name in scores:
                scores[name]["text_only"] = percent
    return scores


def score_table(scores: dict[str, dict]) -> str:
    """Return the scores as lines of text; a column only where there is something in it."""
    columns = []
    for column in ("score", "chance", "text_only", "published"):
        if any(column in score for score in scores.values()):
            columns.append(column)

    width = max(24, *(len(name) + 1 for name in scores))
    head = " " * width
    for column in columns:
        head += f"{column.replace('_', ' '):>11}"
    lines = [head + f"{'n':>8}"]

    for name, score in scores.items():
        line = f"{name:{width}}"
        for column in columns:
            cell = ""
            if score.get(column) is not None:
                cell = f"{score[column]:.2f}"
            line += f"{cell:>11}"
        lines.append(line + f"{score['n']:8}")

    for score in scores.values():
        if "published" in score:
            lines.append(f"published: {score['published_of']}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------- command line


def arguments(argv: list[str]) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = config.parser(__doc__)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--task", required=True, choices=TASKS, help="the benchmark")
    parser.add_argument("--data", required=True, help="folder of the benchmark's files")
    parser.add_argument(
        "--blank",
        dest="control",
        action="store_const",
        const="blank",
        default="",
        help="replace every picture by the mean of many, as a control",
    )
    parser.add_argument(
        "--one-frame",
        dest="control",
        action="store_const",
        const="one-frame",
        help="replace every frame of a video by its middle one, as a control",
    )
    parser.add_argument(
        "--limit", type=int, help="only about so many examples, spread evenly over all"
    )
    parser.add_argument(
        "--batch", type=int, default=64, help="questions answered at once (default 64)"
    )
    parser.add_argument(
        "--out", help="file of the answers (default MODEL/eval/TASK.jsonl, or TASK-CONTROL.jsonl)"
    )
    parser.add_argument(
        "--judge", help="OpenAI-compatible URL of the language model that judges mmvet, llava_bench"
    )
    parser.add_argument("--judge-model", default="gpt-4-0613", help="its name (default gpt-4-0613)")
    return parser.parse_args(argv)


def main(argv: list[str]):
    args = arguments(argv)
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    barrier = no_barrier
    if world_size > 1:
        # Only to wait for each other, for as long as the slowest needs.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        barrier = dist.barrier

    # The questions, checked before anything slow happens.
    task = TASKS[args.task]
    folder = resolve(args.model)
    started = time.monotonic()
    examples = task.examples(args.data)
    chosen = limit_examples(examples, args.limit)
    check_examples(chosen, args.data)

    # Where the answers go.
    file = folder / "eval" / f"{title(args, '-')}.jsonl"
    if args.out:
        file = Path(args.out)
    if rank == 0:
        discard_older_answers(file, folder)
    barrier()

    # The answers.
    device = "cpu"
    dtype = torch.float32
    if torch.cuda.is_available():
        # Triton launches its kernels on the current device, whatever the device of their tensors.
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        dtype = default_dtype(torch.device(device))
    model = LLaVA.from_pretrained(folder, dtype=dtype, device=device).eval()
    tokenizer = load_tokenizer(folder)
    change = control_of(args.control, examples, args.data, model)
    answer = answerer(model, tokenizer, args.data, task.MAX_NEW_TOKENS, change)
    answers = answer_examples(examples, chosen, answer, file, args.batch, rank, world_size, barrier)

    # What follows from them.
    if rank == 0:
        print(f"{title(args, ', ')}: {len(answers)} answers in {file}")
        if hasattr(task, "write") and len(chosen) == len(examples):
            written = task.write(chosen, answers, file.with_suffix(""), args.data)
            print(f"in the official format: {', '.join(str(path) for path in written)}")

        scores = compute_scores(task, chosen, answers, file, args)
        add_published(scores, task, model.config)
        if scores:
            seconds = time.monotonic() - started
            write_scores(scores, file.with_suffix(".json"), seconds, args)
            print(score_table(scores))
        elif hasattr(task, "judge"):
            print("no score: that takes --judge URL --judge-model NAME")
        else:
            print("no score: that takes the server, which has the answers")

    if world_size > 1:
        dist.destroy_process_group()


def title(args: argparse.Namespace, separator: str) -> str:
    """Return the name of the task, and of the control if there is one."""
    if args.control:
        return f"{args.task}{separator}{args.control}"
    return args.task


def write_scores(scores: dict[str, dict], file: Path, seconds: float, args: argparse.Namespace):
    """Write the scores, and what they are of."""
    result = {
        "task": args.task,
        "data": args.data,
        "control": args.control,
        "seconds": round(seconds, 1),
        "scores": scores,
    }
    write_file(file, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    config.cli(main, __doc__, to_save_memory="lower --batch")
