"""Measures a model on your own rows, or on a benchmark.

    # The score on your own questions, in any form that training takes; a page with the wrong ones:
    python evaluate.py --model out/mine --task rows --data test.jsonl

    # The same seeing nothing, and compared with another model:
    python evaluate.py --model out/mine --task rows --data test.jsonl --blank --baseline out/demo

    # Benchmarks, beside chance and the nearest recipe's published number:
    python evaluate.py --model out/demo --task world --data out/demo/world [--blank]
    torchrun --nproc-per-node 8 evaluate.py --model DIR --task pope --data playground/data/eval/pope
    python evaluate.py --model DIR --task mmvet --data DIR \\
        --judge https://api.openai.com/v1 --judge-model gpt-4-0613

Of rows, every question with a true answer is asked. evals/own_rows.py says what is printed of them,
evals/metrics.py how answers are compared: by --metric, or by what fits the true ones. The template
is the model's own, so none is named. `loss` is the mean over the supervised tokens of the rows, as
training logs it; only that of a model with the same tokenizer can be compared.

Writes MODEL/eval/TASK.jsonl, one answer a line, MODEL/eval/TASK.json, the scores, and beside them
rows.html, the page, or the file that the benchmark's own server or script takes. A killed run
continues where it stopped when the same command is given again. Answers of another model, or about
other pictures, are not used: they are kept under another name. Decoding is greedy.

Another task is a file of evals/, whose docstring says which files it reads and how its scorer
judges, or a row of the table in evals/row_files.py. evals/__init__.py says what such a file offers,
and how to add one.

This file, from top to bottom: the table of tasks; what a question shows to the model, and the
controls that hide it; how many are asked at once; scores; the command line; benchmarks; own rows.
Answers on disk are in evals/kept.py, and what they were made from in evals/origin.py.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import Image

import command_line
from checkpoints.files import resolve, write_file, writing
from checkpoints.owned import own
from command_line import within
from config import UserError, printable
from data import columns_of, model_spec
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
    own_rows,
    pope,
    row_files,
    scienceqa,
    seedbench,
    textvqa,
    videomme,
    vqav2,
    world,
)
from evals.judge import Judge
from evals.kept import answer_examples, no_barrier
from evals.metrics import METRICS
from evals.origin import check_file_of_answers, go_on_or_set_aside, origin, shown_names, sources
from evals.published import add_published
from inference.answer import answer as answer_questions
from inference.answer import prompt_ids
from inference.cache import slots_of
from inference.engine import CACHE_STEP
from inputs.pictures import load_image
from inputs.rows import Rows, open_rows
from inputs.sample import SampleSpec, load_item
from inputs.tiling import TILED
from inputs.tokenizer import Tokenizer, load_tokenizer
from inputs.video import probe, stream
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
    **row_files.TASKS,
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
    for name, source in zip(named, sources(example, data_dir), strict=True):
        try:
            loaded.append(load(source, kind, **part))
        except UserError:
            raise
        except ValueError as error:
            path = Path(data_dir) / name
            if isinstance(source, Path):
                path = source
            where = example.get("where", path)
            raise UserError(where, f"{path}: {error}", "restore it") from None
    return loaded


def question_of(example: Example) -> str | list[dict]:
    """Return what is asked: a text, or the turns of a conversation."""
    return example.get("conversation", example["prompt"])


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
    checked = set()
    for example in examples:
        if example["id"] in ids:
            what = f"question {example['id']} is there twice"
            raise UserError(example["where"], what, "fetch the file again")
        ids.add(example["id"])

        # Opening is slow, so files that are there are taken on trust. This raises for one that is
        # missing, and looks into pictures that are no files but bytes in the example. Questions may
        # share a picture, which is looked into once; names are of one row, where there are rows.
        _, named = shown_files(example)
        shown = (example.get("row"), *named)
        if shown in checked:
            continue
        if not all(is_there(source) for source in sources(example, data_dir)):
            load_shown(example, data_dir, open_media)
        checked.add(shown)


def is_there(source: Path | bytes) -> bool:
    """Return whether there is such a file or folder; False for a name that no system takes."""
    if isinstance(source, bytes):
        return False
    try:
        return source.exists()
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
            questions.append(question_of(example))
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
    vectors = 0  # keys and values
    for layer in lm.config.layers:
        vectors += 2 * layer.kv_heads * slots_of(layer.window, slots)
    bytes_of_row = vectors * lm.config.head_dim * bytes_of_number
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
        ids = prompt_ids(question_of(example), 0, tokenizer, model.config.template)
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


class Column(NamedTuple):
    """A column of the table of scores."""

    head: str
    width: int
    form: str


COLUMNS = {
    "score": Column("score", 11, "{:.2f}"),
    "interval": Column("95 % interval", 17, "[{0[0]:.2f}, {0[1]:.2f}]"),
    "chance": Column("chance", 11, "{:.2f}"),
    "text_only": Column("text only", 11, "{:.2f}"),
    "loss": Column("loss", 11, "{:.4f}"),
    "published": Column("published", 11, "{:.2f}"),
}


def score_table(scores: dict[str, dict]) -> str:
    """Return the scores as lines of text; a column only where there is something in it."""
    columns = []
    for key in COLUMNS:
        if any(key in score for score in scores.values()):
            columns.append(key)

    # Some names are of the benchmark's files.
    names = {name: printable(name, 60) for name in scores}
    width = max(24, *(len(name) + 1 for name in names.values()))
    head = " " * width
    for key in columns:
        head += f"{COLUMNS[key].head:>{COLUMNS[key].width}}"
    lines = [head + f"{'n':>8}"]

    for name, score in scores.items():
        line = f"{names[name]:{width}}"
        for key in columns:
            cell = ""
            if score.get(key) is not None:
                cell = COLUMNS[key].form.format(score[key])
            line += f"{cell:>{COLUMNS[key].width}}"
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
    parser.add_argument(
        "--task", required=True, choices=["rows", *TASKS], help="rows: your own; or a benchmark"
    )
    parser.add_argument(
        "--data", required=True, help="the rows, or folder of the benchmark's files"
    )
    parser.add_argument("--images", help="rows: folder of their pictures; default: the rows' own")
    parser.add_argument(
        "--columns", nargs="+", metavar="PART=NAME", help="rows: what they call image, question ..."
    )
    parser.add_argument(
        "--metric",
        choices=METRICS,
        help="rows: how answers are compared; default: by the true ones",
    )
    parser.add_argument(
        "--baseline", metavar="DIR", help="rows: another model that is asked the same, to compare"
    )
    parser.add_argument(
        "--blank",
        dest="control",
        action="store_const",
        const="blank",
        default="",
        help="replace every picture by the mean of many, as a control; rows: beside the score",
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
    check_options(args)
    ranks = Ranks()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        # Only to wait for each other, for as long as the slowest needs.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        ranks = Ranks(int(os.environ["RANK"]), world_size, dist.barrier)

    if args.task == "rows":
        evaluate_rows(args, ranks)
    else:
        evaluate_benchmark(args, ranks)

    if world_size > 1:
        dist.destroy_process_group()


def check_options(args: argparse.Namespace):
    """Raise UserError for an option that the task does not have."""
    if args.judge and not hasattr(TASKS.get(args.task), "judge"):
        judged = " and ".join(name for name, one in TASKS.items() if hasattr(one, "judge"))
        raise UserError("--judge", f"nothing judges {args.task}", f"leave it out; {judged} take it")
    for option in ("images", "columns", "metric", "baseline"):
        if args.task != "rows" and getattr(args, option) is not None:
            raise UserError(f"--{option}", f"not for {args.task}", "leave it out; rows take it")


class Ranks(NamedTuple):
    """The processes that share the questions, and which of them this one is."""

    rank: int = 0
    size: int = 1
    barrier: Callable = no_barrier


@dataclass
class Asking:
    """Some questions, and how they are put to one model."""

    args: argparse.Namespace
    ranks: Ranks
    examples: list[Example]
    chosen: list[Example]  # those of them that --limit leaves
    max_new_tokens: int
    folder: Path  # the model's
    control: str  # the name of what hides the pictures, or ""
    file: Path  # of the answers
    is_out: bool  # whether --out names it

    def prepare(self, dtype: torch.dtype):
        """Make room for the answers; those of anything else than this model go aside.

        Raise UserError if they would go over what this program did not write.
        """
        if self.ranks.rank == 0:
            claim(self.file, self.is_out)
            options = {
                "task": self.args.task,
                "control": self.control,
                "max_new_tokens": self.max_new_tokens,
                "precision": str(dtype).removeprefix("torch."),
            }
            made = origin(self.folder, self.examples, self.args.data, options)
            go_on_or_set_aside(self.file, made)
        self.ranks.barrier()

    def answers(self, model: LLaVA, tokenizer: Tokenizer, change: Callable) -> list[str] | None:
        """Return the model's answers to those chosen; on ranks other than 0 None.

        change: what control_of returns.
        """
        answer = answerer(model, tokenizer, self.args.data, self.max_new_tokens, change)
        batch = self.args.batch
        if batch is None:
            free = free_memory(str(model.language_model.lm_head.weight.device))
            batch = rows_that_fit(model, tokenizer, self.chosen, self.max_new_tokens, free)
        return answer_examples(self.examples, self.chosen, answer, self.file, batch, *self.ranks)


def device_and_dtype() -> tuple[str, torch.dtype]:
    """Return where this rank's model is, and in which precision."""
    if not torch.cuda.is_available():
        return "cpu", torch.float32

    # Triton launches its kernels on the current device, whatever the device of their tensors.
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    torch.cuda.set_device(device)
    return device, default_dtype(torch.device(device))


def load_model(folder: Path, device: str, dtype: torch.dtype) -> tuple[LLaVA, Tokenizer]:
    """Return the model in a folder, and its tokenizer."""
    model = LLaVA.from_pretrained(folder, dtype=dtype, device=device).eval()
    return model, load_tokenizer(folder)


# ------------------------------------------------------------------------------------ benchmarks


def evaluate_benchmark(args: argparse.Namespace, ranks: Ranks):
    """Ask a model the questions of a benchmark, and print and write what it reaches."""
    # The questions, checked before anything slow happens.
    task = TASKS[args.task]
    folder = resolve(args.model)
    started = time.monotonic()
    examples = task.examples(args.data)
    chosen = limit_examples(examples, args.limit)
    check_examples(chosen, args.data)
    if hasattr(task, "text_only"):
        task.text_only(args.data)

    # The answers.
    device, dtype = device_and_dtype()
    file = file_of_answers(args, folder, args.control)
    is_out = args.out is not None
    room = task.MAX_NEW_TOKENS
    asking = Asking(args, ranks, examples, chosen, room, folder, args.control, file, is_out)
    asking.prepare(dtype)
    model, tokenizer = load_model(folder, device, dtype)
    change = control_of(args.control, examples, args.data, model)
    answers = asking.answers(model, tokenizer, change)
    if ranks.rank > 0:
        return

    # What follows from them.
    print(f"{title(args.task, args.control, ', ')}: {len(answers)} answers in {file}")
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


def file_of_answers(args: argparse.Namespace, folder: Path, control: str) -> Path:
    """Return the file that --out names, or that of the task in the model's folder."""
    if args.out is not None:
        return Path(args.out)
    return folder / "eval" / f"{title(args.task, control, '-')}.jsonl"


def claim(file: Path, is_out: bool):
    """Raise UserError if answers and scores would go over what this program did not write.

    MODEL/eval is ours by a mark, as all folders are that this program writes into. A file that
    --out names may lie among others, so its own name decides.
    """
    if is_out:
        check_file_of_answers(file)
    else:
        own(file.parent, "evaluation")


def title(task: str, control: str, separator: str) -> str:
    """Return the name of the task, and of the control if there is one."""
    if control:
        return f"{task}{separator}{control}"
    return task


def write_scores(
    scores: dict[str, dict],
    file: Path,
    seconds: float,
    args: argparse.Namespace,
    more: dict | None = None,
):
    """Write the scores, and what they are of; `more` of them stands behind."""
    result = {
        "task": args.task,
        "data": args.data,
        "control": args.control,
        "seconds": round(seconds, 1),
        "scores": scores,
        **(more or {}),
    }
    with writing(file):
        write_file(file, json.dumps(result, indent=2) + "\n")


# -------------------------------------------------------------------------------------- own rows

# What the table says of a control.
HIDDEN = {"blank": "pictures blanked", "one-frame": "one frame only"}

# Frames of a video on the page.
PAGE_FRAMES = 3


def evaluate_rows(args: argparse.Namespace, ranks: Ranks):
    """Ask a model the questions of one's own rows, and print and write what it reaches.

    It is asked once more with a control, and so is the model of --baseline.
    """
    # The questions, checked before anything slow happens.
    started = time.monotonic()
    folder = resolve(args.model)
    rows = open_rows(args.data, args.images or "", columns_of(args.columns or []))
    spec = model_spec(folder)
    examples = own_rows.read_questions(rows, spec)
    chosen = limit_examples(examples, args.limit)
    check_examples(chosen, args.data)
    scale = own_rows.choose_scale(chosen, args.metric or "")
    if args.control and not any(shown_files(example)[1] for example in chosen):
        raise UserError(f"--{args.control}", f"no picture in {args.data}", "leave it out")

    # Who is asked, and what is hidden then.
    file = file_of_answers(args, folder, "")
    is_out = args.out is not None
    room = own_rows.room_for_answers(examples, spec.tokenizer)
    asked = partial(Asking, args, ranks, examples, chosen)
    askings = {scale.name: asked(room, folder, "", file, is_out)}
    if args.control:
        blank = file.with_name(title(file.stem, args.control, "-") + file.suffix)
        name = f"{scale.name}, {HIDDEN[args.control]}"
        askings[name] = asked(room, folder, args.control, blank, is_out)
    if args.baseline:
        other = resolve(args.baseline)
        other_spec = model_spec(other)
        own_rows.read_questions(rows, other_spec)  # its template may not take all of them
        room = own_rows.room_for_answers(examples, other_spec.tokenizer)
        name = f"{scale.name}, {args.baseline}"
        askings[name] = asked(room, other, "", other / "eval" / "rows.jsonl", False)

    # The losses and the answers, with one model in memory.
    device, dtype = device_and_dtype()
    for asking in askings.values():
        asking.prepare(dtype)
    losses = {}
    answers = {}
    model = loaded = None
    for name, asking in askings.items():
        if asking.folder != loaded:
            model = None  # its memory is free now
            model, tokenizer = load_model(asking.folder, device, dtype)
            loaded = asking.folder
        change = control_of(asking.control, chosen, args.data, model)
        losses[name] = mean_loss(model, rows, chosen, model_spec(asking.folder), change, ranks)
        answers[name] = asking.answers(model, tokenizer, change)
    if ranks.rank > 0:
        return

    # What follows from them.
    scores = {}
    for name, said in answers.items():
        scores[name] = scale.score(chosen, said) | {"loss": losses[name]}
    print(f"rows: {len(chosen)} answers in {file}")
    print(f"{scale.name}: {scale.metric.says} ({scale.reason})")
    if scale.constant:
        print(f"chance: always {printable(scale.constant, 60)!r}")
    unread = own_rows.unread(scale, answers[scale.name])
    if unread:
        print(unread)
    table = score_table(scores)

    # The model against each of the others.
    mine, *others = answers
    said = {"model": answers[mine]}
    differences = {}
    for name in others:
        than = name.removeprefix(f"{scale.name}, ")
        said[than] = answers[name]
        found = scale.compare(chosen, answers[mine], answers[name])
        differences[than] = [100 * value for value in found]
        table += "\n" + own_rows.sentence(found, than, len(chosen))
    print(table)

    seconds = time.monotonic() - started
    more = {"metric": scale.name, "differences": differences}
    write_scores(scores, file.with_suffix(".json"), seconds, args, more)
    heading = f"{args.model} on {args.data}"
    pictures = pictures_of(args.data)
    page = own_rows.wrong_page(heading, table, scale, chosen, said, pictures)
    with writing(file):
        write_file(file.with_suffix(".html"), page)
    print(f"the wrong answers: {file.with_suffix('.html')}")


def mean_loss(
    model: LLaVA,
    rows: Rows,
    chosen: list[Example],
    spec: SampleSpec,
    change: Callable[[Item], Item] | None,
    ranks: Ranks,
) -> float:
    """Return the mean loss over the supervised tokens of the rows of some questions."""
    numbers = list(dict.fromkeys(example["row"] for example in chosen))
    mine = numbers[ranks.rank :: ranks.size]
    total = torch.tensor(own_rows.sum_of_losses(model, rows, mine, spec, change)).double()
    if ranks.size > 1:
        dist.all_reduce(total)
    loss, supervised = total.tolist()
    return loss / supervised


def pictures_of(data_dir) -> Callable[[Example], list[Image.Image]]:
    """Return a function from an example to what a page shows of it: of a video some frames."""

    def load(source, kind: str, **part) -> list[Image.Image]:
        if kind == "image":
            return [load_image(source)]
        return list(stream(source, PAGE_FRAMES, **part))

    def pictures(example: Example) -> list[Image.Image]:
        return [image for shown in load_shown(example, data_dir, load) for image in shown]

    return pictures


if __name__ == "__main__":
    command_line.cli(main, __doc__, to_save_memory="lower --batch")
