"""Measures a model on your own rows, or on a benchmark.

    # The score on your own questions, in any form that training takes; a page with the wrong ones:
    python evaluate.py --model out/mine --task rows --data test.jsonl

    # On the rows that its own run held out (validation = 0.02, say):
    python evaluate.py --model out/mine --task rows

    # The same with the pictures hidden, and compared with another model:
    python evaluate.py --model out/mine --task rows --data test.jsonl --blank --baseline out/demo

    # Benchmarks, beside chance and the nearest recipe's published number:
    python evaluate.py --model out/demo --task world --data out/demo/world [--blank]
    torchrun --nproc-per-node 8 evaluate.py --model DIR --task pope --data playground/data/eval/pope
    python evaluate.py --model DIR --task mmvet --data DIR \\
        --judge https://api.openai.com/v1 --judge-model gpt-4-0613

Of rows, every question with a true answer is asked, in the model's own template. evals/own_rows.py
says what is printed of them, and evals/metrics.py how answers are compared: by --metric, or by what
fits the true ones. `loss` is the mean over the supervised tokens of the rows, as training logs it;
it can be compared only with that of a model with the same tokenizer.

Writes MODEL/eval/TASK.jsonl, one answer a line, MODEL/eval/TASK.json, the scores, and beside them
rows.html, the page, or the file that the benchmark's own server or script takes. A killed run
continues where it stopped when the same command is given again. Answers of another model, or about
other pictures, are not used: they are kept under another name. Decoding is greedy.

Another task is a file of evals/, whose docstring says which files it reads and how its scorer
judges, or a row of the table in evals/row_files.py. evals/__init__.py says what such a file offers,
and how to add one.

This file, from top to bottom: the table of tasks; what is asked and shown, and the controls that
hide it; how many are asked at once; the command line; how a model is asked; benchmarks; own rows.
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import command_line
import config
from checkpoints.files import resolve, write_file, writing
from command_line import within
from config import UserError
from data import model_spec
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
    own_rows_report,
    pope,
    row_files,
    scienceqa,
    seedbench,
    textvqa,
    videomme,
    vqav2,
    world,
    world_hallucination,
)
from evals.judge import Judge
from evals.kept import Ranks, answer_examples
from evals.metrics import METRICS
from evals.origin import claim, go_on_or_set_aside, origin
from evals.published import add_published
from evals.scores import score_table
from evals.shown import check_examples, load_shown, shown_kind, shown_names
from inference.answer import answer as answer_questions
from inference.answer import prompt_ids
from inference.cache import free_memory, slots_of
from inference.engine import CACHE_STEP
from inputs.forms import columns_of
from inputs.holdout import open_stage
from inputs.rows import Rows, open_rows
from inputs.sample import load_item
from inputs.tiling import Tiling
from inputs.tokenizer import Tokenizer, load_tokenizer
from kernels import default_dtype
from model import LLaVA
from packing import Item, ItemShape


def variant(task: Task, max_new_tokens: int | None = None, **options) -> Task:
    """Return a task whose examples are read with options, maybe with a length of its own."""
    parts = dict(vars(task))
    parts["examples"] = partial(task.examples, **options)
    if max_new_tokens is not None:
        parts["MAX_NEW_TOKENS"] = max_new_tokens
    return SimpleNamespace(**parts)


TASKS: dict[str, Task] = {
    "world": world,
    "world-hallucination": world_hallucination,
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
    "amber-d": variant(amber, amber.QUESTION_TOKENS, descriptions=False),
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


# ----------------------------------------------------------------------- what is asked and shown


def question_of(example: Example) -> str | list[dict]:
    """Return what is asked: a text, or the turns of a conversation."""
    return example.get("conversation", example["prompt"])


def items_of_example(example: Example, data_dir, model: LLaVA) -> list[Item]:
    """Return what an example shows as the model sees it."""
    views = model.views.for_images(len(shown_names(example)))
    return load_shown(example, data_dir, partial(load_item, tiling=views))


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
    shown = [example for example in examples if shown_names(example)]
    step = max(1, len(shown) // MEAN_OF)
    means = []
    for example in shown[::step][:MEAN_OF]:
        for item in items_of_example(example, data_dir, model):
            pixels = model.vision_tower.processor.normalise(item.pixels)  # (v, 3, H, W)
            means.append(pixels.mean(0, keepdim=True))
    mean = torch.cat(means).mean(0)  # (3, H, W), in image mode native a patch

    def blank(item: Item) -> Item:
        return Item(mean.expand_as(item.pixels), item.shape)

    return blank


def middle_frame(item: Item) -> Item:
    """Return an item that shows its middle frame in place of all.

    So everything is gone that a video tells and one frame does not.
    """
    frames = item.pixels.unflatten(0, (item.shape.views, -1))  # (v, 1 or a frame's patches, ...)
    middle = frames[len(frames) // 2]
    return Item(middle.expand_as(frames).flatten(0, 1), item.shape)


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
        count = len(shown_names(example))
        most = most_tokens(model.views.for_images(count), shown_kind(example))
        longest_shown = max(longest_shown, count * most)
    return longest_text + longest_shown


def most_tokens(views: Tiling, kind: str) -> int:
    """Return how many tokens a picture or a video takes at most."""
    if kind == "video":
        return views.positions(ItemShape(views.frames))
    return max(views.positions(shape) for shape in views.largest())


# --------------------------------------------------------------------------------- command line


def arguments(argv: list[str]) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_line.parser(__doc__)
    option = parser.add_argument
    names = textwrap.fill(", ".join(TASKS), 76, break_on_hyphens=False)
    of_task = {"choices": ["rows", *TASKS], "metavar": "TASK"}
    option("--model", required=True, metavar="DIR", help="folder of the model")
    option("--task", required=True, **of_task, help=f"rows: your own; or a benchmark:\n{names}")
    of_data = "the rows, or folder of the benchmark's files; rows: default what the run held out"
    option("--data", default="", help=of_data)
    option(
        "--blank",
        dest="control",
        action="store_const",
        const="blank",
        default="",
        help="replace every picture by the mean of many, as a control; rows: beside the score",
    )
    option(
        "--one-frame",
        dest="control",
        action="store_const",
        const="one-frame",
        help="replace every frame of a video by its middle one, as a control",
    )
    count = within(int, 1, 10**9)
    option("--limit", type=count, help="only about so many examples, spread evenly over all")
    at_once = f"questions answered at once (default: as memory allows, at most {MOST_ROWS})"
    option("--batch", type=within(int, 1, 10**5), help=at_once)
    named = "file of the answers (default MODEL/eval/TASK.jsonl, or TASK-CONTROL.jsonl)"
    option("--out", metavar="FILE", help=named)

    option = parser.add_argument_group("--task rows").add_argument
    option("--images", metavar="DIR", help="folder of the pictures; default: the rows' own")
    option("--columns", nargs="+", metavar="PART=NAME", help="what they call image, question ...")
    metrics = f"{', '.join(METRICS)}; default: what fits the true answers"
    option("--metric", choices=METRICS, metavar="NAME", help=metrics)
    option("--baseline", metavar="DIR", help="another model that is asked the same, to compare")

    option = parser.add_argument_group("--task mmvet, llava_bench").add_argument
    option("--judge", metavar="URL", help="OpenAI-compatible, of the language model that judges")
    option(
        "--judge-model", default="gpt-4-0613", metavar="NAME", help="its name (default gpt-4-0613)"
    )
    args = parser.parse_args(argv)
    if not args.data and args.task != "rows":
        parser.error("the following arguments are required: --data")
    return args


def main(argv: list[str]):
    args = arguments(argv)
    check_options(args)
    ranks = Ranks()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        # To wait for each other, for as long as the slowest needs, and to add up losses.
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


# ------------------------------------------------------------------------ how a model is asked


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


def file_of_answers(args: argparse.Namespace, folder: Path, control: str) -> Path:
    """Return the file that --out names, or that of the task in the model's folder."""
    if args.out is not None:
        return Path(args.out)
    return folder / "eval" / f"{title(args.task, control, '-')}.jsonl"


def title(task: str, control: str, separator: str) -> str:
    """Return the name of the task, and of the control if there is one."""
    if control:
        return f"{task}{separator}{control}"
    return task


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
        write_scores(args, file.with_suffix(".json"), started, scores=scores)
        print(score_table(scores))
    elif hasattr(task, "judge"):
        print("no score: that takes --judge URL --judge-model NAME")
    else:
        print("no score: that takes the server, which has the answers")


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


def write_scores(args: argparse.Namespace, file: Path, started: float, **found):
    """Write what was asked, the seconds since the monotonic time `started`, and what was found."""
    asked = {"task": args.task, "data": args.data, "control": args.control}
    asked["seconds"] = round(time.monotonic() - started, 1)
    with writing(file):
        write_file(file, json.dumps(asked | found, indent=2) + "\n")


# -------------------------------------------------------------------------------------- own rows

# What the table says of a control.
HIDDEN = {"blank": "pictures blanked", "one-frame": "one frame only"}


def evaluate_rows(args: argparse.Namespace, ranks: Ranks):
    """Ask a model the questions of one's own rows, and print and write what it reaches.

    It is asked once more with a control, and so is the model of --baseline.
    """
    # The questions, checked before anything slow happens.
    started = time.monotonic()
    if args.data:
        rows = open_rows(args.data, args.images or "", columns_of(args.columns or []))
    else:
        check_alone(args)
        rows = held_out_rows(resolve(args.model))
        args.data = f"{args.model}: held out"
    spec = model_spec(resolve(args.model))
    examples = own_rows.read_questions(rows, spec)
    chosen = limit_examples(examples, args.limit)
    check_examples(chosen, args.data, "restore it, or --images: name the folder of the pictures")
    check_control(args.control, chosen, args.data)
    scale = own_rows.choose_scale(chosen, args.metric or "")

    # The losses and the answers, with one model in memory.
    askings = askings_of_rows(args, ranks, rows, examples, chosen)
    device, dtype = device_and_dtype()
    for asking in askings.values():
        asking.prepare(dtype)
    losses = {}
    answers = {}
    model = loaded = None
    for who, asking in askings.items():
        if asking.folder != loaded:
            model = None  # its memory is free now
            model, tokenizer = load_model(asking.folder, device, dtype)
            loaded = asking.folder
        change = control_of(asking.control, chosen, args.data, model)
        spec = model_spec(asking.folder)
        losses[who] = own_rows.mean_loss(model, rows, chosen, spec, change, ranks)
        answers[who] = asking.answers(model, tokenizer, change)
    if ranks.rank > 0:
        return

    # What follows from them.
    file = askings["model"].file
    print(f"rows: {len(chosen)} answers in {file}")
    report = own_rows_report.make_report(scale, chosen, answers, losses)
    print(report.text)

    found = {"scores": report.scores, "metric": scale.name, "differences": report.differences}
    write_scores(args, file.with_suffix(".json"), started, **found)
    heading = f"{args.model} on {args.data}"
    pictures = own_rows_report.pictures_of(args.data)
    page = own_rows_report.wrong_page(heading, report.text, scale, chosen, answers, pictures)
    with writing(file):
        write_file(file.with_suffix(".html"), page)
    print(f"the wrong answers: {file.with_suffix('.html')}")


def check_alone(args: argparse.Namespace):
    """Raise UserError for an option that says how --data is read, where there is none."""
    for name in ("images", "columns"):
        if getattr(args, name):
            fix = "give --data, or leave it out: the recipe of the run says it"
            raise UserError(f"--{name}", "without --data", fix)


def held_out_rows(folder: Path) -> Rows:
    """Return the rows that the run in a folder held out, of its last stage that did.

    Raises UserError for a folder without a recipe, and for a recipe that holds nothing out.
    """
    file = folder / "recipe.toml"
    if not file.is_file():
        raise UserError(file, "no such file, so nobody knows what was held out", "give --data")
    recipe, _ = config.load([str(file)], file)
    for name, stage in reversed(recipe.stage.items()):
        held_out = open_stage(stage, f"{file}:stage.{name}").held_out
        if held_out is not None:
            return held_out
    raise UserError(file, "no stage held rows out (validation)", "give --data")


def check_control(control: str, examples: list[Example], data: str):
    """Raise UserError for a control that would hide nothing."""
    hidden = "picture"
    shown = [example for example in examples if shown_names(example)]
    if control == "one-frame":
        hidden = "video"
        shown = [example for example in shown if shown_kind(example) == "video"]
    if control and not shown:
        raise UserError(f"--{control}", f"no {hidden} in {data}", "leave it out")


def askings_of_rows(
    args: argparse.Namespace,
    ranks: Ranks,
    rows: Rows,
    examples: list[Example],
    chosen: list[Example],
) -> dict[str, Asking]:
    """Return {who: how it is asked}: the model, the same with a control, the one of --baseline."""
    asked = partial(Asking, args, ranks, examples, chosen)

    folder = resolve(args.model)
    file = file_of_answers(args, folder, "")
    is_out = args.out is not None
    room = own_rows.room_for_answers(examples, model_spec(folder).tokenizer)
    askings = {"model": asked(room, folder, "", file, is_out)}
    if args.control:
        hidden = file.with_name(title(file.stem, args.control, "-") + file.suffix)
        askings[HIDDEN[args.control]] = asked(room, folder, args.control, hidden, is_out)

    if args.baseline:
        other = resolve(args.baseline)
        spec = model_spec(other)
        own_rows.read_questions(rows, spec)  # its template may not take all of them
        room = own_rows.room_for_answers(examples, spec.tokenizer)
        who = args.baseline
        if who in askings:
            who = f"{who}/"  # a folder that is named "model", say
        askings[who] = asked(room, other, "", other / "eval" / "rows.jsonl", False)
    return askings


if __name__ == "__main__":
    command_line.cli(main, __doc__, to_save_memory="lower --batch")
