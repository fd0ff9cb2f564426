"""Measures a model on a benchmark, beside chance and the nearest recipe's published number.

    torchrun evaluate.py --model out/demo --task world --data out/demo/world

    # The same, seeing nothing:
    torchrun evaluate.py --model out/demo --task world --data out/demo/world --blank

    torchrun --nproc-per-node 8 evaluate.py --model DIR --task pope --data playground/data/eval/pope
    python evaluate.py --model DIR --task mmvet --data DIR \\
        --judge https://api.openai.com/v1 --judge-model gpt-4-0613

Writes MODEL/eval/TASK.jsonl, one answer a line, MODEL/eval/TASK.json, the scores, and beside them
the file that the benchmark's own server or script takes. A killed run continues where it stopped
when the same command is given again. Answers of another model, or about other pictures, are not
used: they are kept under another name. Decoding is greedy.

A task is a file of evals/, whose docstring says which files it reads and how its scorer judges.
evals/__init__.py says what such a file offers, and how to add one.

This file, from top to bottom: the table of tasks; what a question shows to the model, and the
controls that hide it; how many are asked at once; scores; the command line. Answers on disk are in
evals/kept.py, and what they were made from in evals/origin.py.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import command_line
from checkpoints.files import resolve, write_file, writing
from checkpoints.owned import own
from command_line import within
from config import UserError, printable
from evals import (
    Example,
    Task,
    amber,
    chair,
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
from evals.kept import answer_examples, no_barrier
from evals.origin import check_file_of_answers, go_on_or_set_aside, origin, shown_names
from evals.published import add_published
from inference.answer import answer as answer_questions
from inference.answer import prompt_ids
from inference.engine import CACHE_STEP
from inputs.pictures import load_image
from inputs.sample import load_item
from inputs.tiling import TILED
from inputs.tokenizer import load_tokenizer
from inputs.video import probe
from kernels import default_dtype
from model import LLaVA
from packing import Item, ItemShape


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
    "chair": chair,
    "amber": amber,
    "amber-g": variant(amber, questions=False),
    "amber-d": variant(amber, descriptions=False),
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

# Questions answered at once without --batch, where memory allows it.
MOST_ROWS = 64

# How much of the free memory their keys and values may take. The rest is for the pictures, the
# prompts' hidden states, and the old cache while it is copied to a larger one.
CACHE_SHARE = 0.5


# ------------------------------------------------------------------------- what a question shows


def shown_files(example: Example) -> tuple[str, list[str]]:
    """Return "image" or "video", and the names of all that an example shows."""
    kind = "video" if example.get("video") else "image"
    return kind, shown_names(example)


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
    if not examples:
        fix = "--data: name a folder with the benchmark's files, or fetch them again"
        raise UserError(data_dir, "no questions in it", fix)

    ids = set()
    for example in examples:
        if example["id"] in ids:
            what = f"question {example['id']} is there twice"
            raise UserError(example["where"], what, "fetch the file again")
        ids.add(example["id"])

        # Opening is slow, so files that are there are taken on trust. This raises for one that is
        # missing, and looks into pictures that are no files but bytes in the example.
        _, named = shown_files(example)
        if not all(is_there(Path(data_dir) / name) for name in named):
            load_shown(example, data_dir, open_media)


def is_there(path: Path) -> bool:
    """Return whether there is such a file or folder; False for a name that no system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


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


# ------------------------------------------------------------------------- how many at once


def rows_that_fit(
    model: LLaVA, tokenizer, examples: list[Example], max_new_tokens: int, free: int
) -> int:
    """Return how many questions are answered at once, 1 to MOST_ROWS.

    So many that their keys and values take CACHE_SHARE of the `free` bytes, if each were as long
    as the longest. Decoding reads what is filled only, so room that is not needed costs no time.
    """
    lm = model.language_model
    slots = longest_prompt(model, tokenizer, examples) + max_new_tokens
    slots = -(-slots // CACHE_STEP) * CACHE_STEP  # the cache has a multiple of this

    # On a CPU the cache is float32, whatever the weights are.
    bytes_of_number = 4
    if lm.lm_head.weight.is_cuda:
        bytes_of_number = lm.lm_head.weight.element_size()
    heads = sum(layer.kv_heads for layer in lm.config.layers)
    bytes_of_row = 2 * heads * lm.config.head_dim * slots * bytes_of_number
    rows = int(free * CACHE_SHARE) // bytes_of_row
    return max(1, min(MOST_ROWS, rows))


def longest_prompt(model: LLaVA, tokenizer, examples: list[Example]) -> int:
    """Return a number of tokens that no prompt exceeds by much.

    It is that of the longest text, which is one of the texts with the most characters, and of the
    most pictures or videos, each as large as the model sees any.
    """
    by_length = sorted(examples, key=lambda example: len(example["prompt"]))
    longest_text = 0
    for example in by_length[-MOST_ROWS:]:
        ids = prompt_ids(example["prompt"], 0, tokenizer, model.config.template)
        longest_text = max(longest_text, len(ids))

    longest_shown = 0
    for example in examples:
        kind, named = shown_files(example)
        longest_shown = max(longest_shown, len(named) * most_tokens(model, kind))
    return longest_text + longest_shown


def most_tokens(model: LLaVA, kind: str) -> int:
    """Return how many tokens a picture or a video takes at most."""
    views = model.views
    if kind == "video":
        return views.positions(ItemShape(views.frames))
    most = views.positions()
    if views.mode in TILED:
        for rows, columns in views.grids:
            shape = ItemShape(1 + rows * columns)
            if views.mode == "anyres":
                shape = ItemShape(1 + rows * columns, rows, columns)
            most = max(most, views.positions(shape))
    return most


def free_memory(device: str) -> int:
    """Return how many bytes of a device's memory can be had."""
    if device != "cpu":
        free, _ = torch.cuda.mem_get_info(device)

        # What torch has taken from the device and does not use is free, too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    # As Linux counts it, caches of files included. A container may be allowed less.
    bounds = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                bounds.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        bounds.append(int(limit.read_text()) - int((group / "memory.current").read_text()))

    # Other systems do not say; the default number of rows was always taken there.
    return min(bounds, default=2**60)


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

    # Some names are of the benchmark's files.
    names = {name: printable(name, 60) for name in scores}
    width = max(24, *(len(name) + 1 for name in names.values()))
    head = " " * width
    for column in columns:
        head += f"{column.replace('_', ' '):>11}"
    lines = [head + f"{'n':>8}"]

    for name, score in scores.items():
        line = f"{names[name]:{width}}"
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
    parser = command_line.parser(__doc__)
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
        "--limit",
        type=within(int, 1, 10**9),
        help="only about so many examples, spread evenly over all",
    )
    parser.add_argument(
        "--batch",
        type=within(int, 1, 10**5),
        help=f"questions answered at once (default: as memory allows, at most {MOST_ROWS})",
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
    if args.judge and not hasattr(task, "judge"):
        judged = " and ".join(name for name, one in TASKS.items() if hasattr(one, "judge"))
        raise UserError("--judge", f"nothing judges {args.task}", f"leave it out; {judged} take it")
    folder = resolve(args.model)
    started = time.monotonic()
    examples = task.examples(args.data)
    chosen = limit_examples(examples, args.limit)
    check_examples(chosen, args.data)
    if hasattr(task, "text_only"):
        task.text_only(args.data)

    device = "cpu"
    dtype = torch.float32
    if torch.cuda.is_available():
        # Triton launches its kernels on the current device, whatever the device of their tensors.
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        dtype = default_dtype(torch.device(device))

    # Where the answers go, and whether those that are there are of the same model and pictures.
    file = file_of_answers(args, folder)
    if rank == 0:
        claim(file, args)
        options = {
            "task": args.task,
            "control": args.control,
            "max_new_tokens": task.MAX_NEW_TOKENS,
            "precision": str(dtype).removeprefix("torch."),
        }
        go_on_or_set_aside(file, origin(folder, examples, args.data, options))
    barrier()

    # The answers.
    model = LLaVA.from_pretrained(folder, dtype=dtype, device=device).eval()
    tokenizer = load_tokenizer(folder)
    change = control_of(args.control, examples, args.data, model)
    answer = answerer(model, tokenizer, args.data, task.MAX_NEW_TOKENS, change)
    batch = args.batch
    if batch is None:
        free = free_memory(device)
        batch = rows_that_fit(model, tokenizer, chosen, task.MAX_NEW_TOKENS, free)
    answers = answer_examples(examples, chosen, answer, file, batch, rank, world_size, barrier)

    # What follows from them.
    if rank == 0:
        print(f"{title(args, ', ')}: {len(answers)} answers in {file}")
        if hasattr(task, "unread"):
            unread = task.unread(chosen, answers)
            print(f"{unread} of {len(answers)} answers {task.UNREAD}")
        if hasattr(task, "write") and len(chosen) == len(examples):
            with writing(file.parent):
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


def file_of_answers(args: argparse.Namespace, folder: Path) -> Path:
    """Return the file that --out names, or that of the task in the model's folder."""
    if args.out is not None:
        return Path(args.out)
    return folder / "eval" / f"{title(args, '-')}.jsonl"


def claim(file: Path, args: argparse.Namespace):
    """Raise UserError if answers and scores would go over what this program did not write.

    MODEL/eval is ours by a mark, as all folders are that this program writes into. A file that
    --out names may lie among others, so its own name decides.
    """
    if args.out is not None:
        check_file_of_answers(file)
    else:
        own(file.parent, "evaluation")


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
    with writing(file):
        write_file(file, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    command_line.cli(main, __doc__, to_save_memory="lower --batch")
