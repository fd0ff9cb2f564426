"""Measures a model on a benchmark, beside chance and the published number of the recipe that is nearest.

    torchrun evaluate.py --model out/demo --task world --data out/demo/world
    torchrun evaluate.py --model out/demo --task world --data out/demo/world --blank   # the same, seeing nothing
    torchrun --nproc-per-node 8 evaluate.py --model DIR --task pope --data playground/data/eval/pope
    python evaluate.py --model DIR --task mmvet --data DIR --judge https://api.openai.com/v1 --judge-model gpt-4-0613

Writes MODEL/eval/TASK.jsonl, one answer a line, MODEL/eval/TASK.json, the scores, and beside them the file that the
benchmark's own server or script takes. A killed run continues where it stopped when the same command is given
again; a model saved since then starts it afresh. Decoding is greedy.

A task is a file of evals/, whose docstring says which files it reads, with
    examples(data_dir) -> [{"id", "image" (path from data_dir, or several, or None), "prompt", "label", "where", ...}]
        "video" in place of "image": a file or a folder of frames, of which "rate" a second; "span": only that part of
        it, (from, to) in seconds
        "pictures": [bytes], where the pictures are no files; "group": examples that --limit keeps together
        a prompt may say <image> where a picture goes; else they go before it
    MAX_NEW_TOKENS
    score(examples, answers) -> {name: {"score", "chance", "n"}}
and, where there is such a thing,
    PUBLISHED = (name of a score, a recipe's key in [published] or {model: number})
    judge(examples, answers, ask, stem, data_dir) -> as score, for answers that a language model judges (evals/judge.py)
    write(examples, answers, stem, data_dir) -> files for the official server or script, their names begin with `stem`
    text_only(data_dir) -> {name: %}      what answering without the pictures can reach
"""

import json
import os
import sys
import time
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
from inputs.pictures import load_image
from inputs.sample import load_item
from inputs.templates import IMAGE, encode_prompt, stop_id
from inputs.tokenizer import load_tokenizer
from inputs.video import probe
from model import LLaVA
from packing import Item


def variant(task, **options):
    """A task whose examples are read with options."""
    return SimpleNamespace(**vars(task) | {"examples": partial(task.examples, **options)})


TASKS = {
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
MEAN_OF = 64  # pictures whose mean a blanked one is


def names(example):
    """ "image" or "video", and the names of an example's."""
    kind = "video" if example.get("video") else "image"
    named = example[kind] or []
    return kind, named if isinstance(named, list) else [named]


def seen(example, data_dir, see):
    """What `see`, called with a file or its bytes and its kind, makes of each of an example's pictures or videos.
    Raises UserError that names it, and the row it belongs to."""
    kind, named = names(example)
    part, made = {key: example[key] for key in ("span", "rate") if key in example}, []
    for i, name in enumerate(named):
        where = Path(data_dir) / name
        try:
            made.append(
                see(example["pictures"][i] if "pictures" in example else where, kind, **part)
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                example.get("where", where), f"{where}: {error}", "restore it"
            ) from None
    return made


def check(examples, data_dir):
    """Raises UserError for two examples of one id, or a picture that is not there: before a model is loaded."""
    ids = set()
    for example in examples:
        if example["id"] in ids:
            raise UserError(
                example["where"], f"question {example['id']} is there twice", "fetch the file again"
            )
        ids.add(example["id"])
        if not all(
            (Path(data_dir) / name).exists() for name in names(example)[1]
        ):  # or they are in its own file
            seen(
                example,
                data_dir,
                lambda source, kind, **part: (
                    load_image(source) if kind == "image" else probe(source)
                ),
            )


def generate(model, tok, questions, shown, **options):
    """The model's answers to questions (texts) about what each is shown (a list of items); options: generate's."""
    template, prompts = model.config.template, []
    for question, items in zip(questions, shown, strict=True):
        if question.count(IMAGE) != len(items):
            question = f"{IMAGE}\n" * len(items) + question.replace(IMAGE, "")
        prompts.append(
            torch.tensor(encode_prompt([{"from": "human", "value": question}], tok, template))
        )
    stop = stop_id(tok, template)
    new = model.generate(
        prompts, images=[item for items in shown for item in items], eos_token_id=stop, **options
    )
    rows = [row[: row.index(stop)] if stop in row else row for row in new.tolist()]
    return [tok.decode(row).strip() for row in rows]


def answerer(model, tok, data_dir, max_new_tokens, change=lambda item: item):
    """A function from a list of examples to the model's answers. `change`: what is shown in place of an item."""

    def answer(examples):
        shown = [
            list(map(change, seen(e, data_dir, partial(load_item, views=model.views))))
            for e in examples
        ]
        return generate(
            model, tok, [e["prompt"] for e in examples], shown, max_new_tokens=max_new_tokens
        )

    return answer


def blanked(examples, data_dir, model):
    """What shows the mean of some pictures' and videos' views in place of each: the same for all, so it tells nothing.

    Not one plain colour: that is a picture of an empty scene, and a model that sees it rightly answers "zero".
    """
    some = [example for example in examples if names(example)[1]]
    some = some[:: max(1, len(some) // MEAN_OF)][:MEAN_OF]
    items = [
        item for e in some for item in seen(e, data_dir, partial(load_item, views=model.views))
    ]
    normalise = model.vision_tower.processor.normalise
    mean = torch.cat([normalise(item.pixels).mean(0, keepdim=True) for item in items]).mean(0)
    return lambda item: Item(mean.expand_as(item.pixels), item.shape)


def one_frame(item):
    """The view in the middle in place of all: what a video tells that one frame does not is gone."""
    return Item(item.pixels[len(item.pixels) // 2].expand_as(item.pixels), item.shape)


def about(example):
    """What a line of answers says that the question was about."""
    return example.get("video") or example["image"]


def read_answers(file, examples):
    """{id: row} of the answers in `file` that belong to these examples. A half-written last line is no answer."""
    asked, found = {example["id"]: example for example in examples}, {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        example = asked.get(row["id"])
        if example and (row["question"], row["image"]) == (example["prompt"], about(example)):
            found[row["id"]] = row
    return found


def collect(todo, answer, file, batch, done=0, quiet=False):
    """Answers the examples `todo` and appends each batch to `file`, shortest questions first so that none is ragged."""
    todo = sorted(todo, key=lambda example: (len(example["prompt"]), example["id"]))
    total, started, shown = done + len(todo), time.monotonic(), 0.0
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as lines:
        if (
            lines.tell()
        ):  # a killed run may have left half a line: end it, `read_answers` passes over it
            lines.seek(-1, os.SEEK_END)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
        for at in range(0, len(todo), batch):
            part = todo[at : at + batch]
            for example, text in zip(part, answer(part), strict=True):
                row = {"id": example["id"], "question": example["prompt"], "answer": text}
                row |= {"label": example["label"], "image": about(example)}
                lines.write(json.dumps(row).encode() + b"\n")
            lines.flush()
            count, seconds = at + len(part), time.monotonic() - started
            tty = sys.stdout.isatty()
            if not quiet and (tty or seconds - shown > 30 or count == len(todo)):
                shown, rate = seconds, count / max(seconds, 1e-9)
                line = f"{done + count}/{total} answers, {rate:.1f}/s, {(len(todo) - count) / rate:.0f} s left"
                print(
                    f"\r{line}   " if tty else line,
                    end="" if tty and count < len(todo) else "\n",
                    flush=True,
                )


def evaluate(examples, chosen, answer, file, batch=64, rank=0, world_size=1, barrier=lambda: None):
    """The answers to the examples `chosen`, in their order; on ranks other than 0 None.

    `examples` are all of the task's: answers to those not chosen now stay in the file. Each rank appends to a file
    of its own, so that nothing has to travel between them; rank 0 puts them together.
    """
    parts = [file, *sorted(file.parent.glob(f"{file.name}.rank*"))]
    known = {}
    for part in parts:
        known |= read_answers(part, examples)
    barrier()  # every rank has read before any of them writes
    mine = chosen[rank::world_size]
    todo = [example for example in mine if example["id"] not in known]
    own = file if rank == 0 else file.with_name(f"{file.name}.rank{rank}")
    collect(todo, answer, own, batch, done=len(mine) - len(todo), quiet=rank > 0)
    barrier()
    if rank:
        return None
    parts = [file, *sorted(file.parent.glob(f"{file.name}.rank*"))]
    for part in parts:
        known |= read_answers(part, examples)
    rows = [known[example["id"]] for example in examples if example["id"] in known]
    write_file(file, "".join(json.dumps(row) + "\n" for row in rows))
    for part in parts[1:]:
        part.unlink()
    return [known[example["id"]]["answer"] for example in chosen]


def limited(examples, limit):
    """So many examples, spread evenly over all; those of a group stay together."""
    if not limit or limit >= len(examples):
        return examples
    groups = list(dict.fromkeys(example.get("group", example["id"]) for example in examples))
    count = max(1, limit * len(groups) // len(examples))
    chosen = {groups[i * len(groups) // count] for i in range(count)}
    return [example for example in examples if example.get("group", example["id"]) in chosen]


def table(scores):
    """The scores as lines of text; a column only where there is something in it."""
    columns = [
        c
        for c in ("score", "chance", "text_only", "published")
        if any(c in s for s in scores.values())
    ]
    width = max(24, *(len(name) + 1 for name in scores))
    lines = [" " * width + "".join(f"{c.replace('_', ' '):>11}" for c in columns) + f"{'n':>8}"]
    for name, s in scores.items():
        cells = ("" if s.get(c) is None else f"{s[c]:.2f}" for c in columns)
        lines.append(f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells) + f"{s['n']:8}")
    return "\n".join(
        lines + [f"published: {s['published_of']}" for s in scores.values() if "published" in s]
    )


def scored(task, examples, answers, file, args):
    """The scores; {} where the answers are not public, or no judge is named."""
    if not hasattr(task, "judge"):
        scores = task.score(examples, answers)
    elif args.judge:
        print(f"asking {args.judge_model} at {args.judge}", flush=True)
        ask = Judge(args.judge, args.judge_model, file.with_name(f"{file.stem}-judge.jsonl"))
        scores = task.judge(examples, answers, ask, file.with_suffix(""), args.data)
    else:
        scores = {}
    for name, percent in task.text_only(args.data).items() if hasattr(task, "text_only") else ():
        if name in scores:
            scores[name]["text_only"] = percent
    return scores


def arguments(argv):
    parser = config.parser(__doc__)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--task", required=True, choices=TASKS, help="the benchmark")
    parser.add_argument("--data", required=True, help="folder of the benchmark's files")
    parser.add_argument("--blank", dest="control", action="store_const", const="blank", default="",
                        help="replace every picture by the mean of many, as a control")  # fmt: skip
    parser.add_argument("--one-frame", dest="control", action="store_const", const="one-frame",
                        help="replace every frame of a video by its middle one, as a control")  # fmt: skip
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


def main(argv):
    args = arguments(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    barrier = lambda: None  # noqa: E731
    if world_size > 1:  # only to wait for each other, for as long as the slowest needs
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        barrier = dist.barrier
    task, folder, started = TASKS[args.task], resolve(args.model), time.monotonic()
    examples = task.examples(args.data)
    chosen = limited(examples, args.limit)
    check(chosen, args.data)
    file = Path(
        args.out or folder / "eval" / f"{args.task}{args.control and f'-{args.control}'}.jsonl"
    )
    saved = max((f.stat().st_mtime for f in folder.glob("*.safetensors")), default=0)
    parts = (
        sorted(file.parent.glob(f"{file.name}*"), key=lambda part: part.stat().st_mtime)
        if rank == 0
        else []
    )
    if (
        parts and parts[0].stat().st_mtime < saved
    ):  # also where only another rank's part is left of a killed run
        print(f"{file.name}: older than the model, starting afresh", flush=True)
        for part in parts:
            part.unlink()
    barrier()

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, tok = LLaVA.from_pretrained(folder, dtype=dtype, device=device), load_tokenizer(folder)
    change = {"blank": partial(blanked, examples, args.data, model), "one-frame": lambda: one_frame}
    change = [change[args.control]()] if args.control else []
    answer = answerer(model.eval(), tok, args.data, task.MAX_NEW_TOKENS, *change)
    answers = evaluate(examples, chosen, answer, file, args.batch, rank, world_size, barrier)
    if rank == 0:
        print(
            f"{args.task}{args.control and f', {args.control}'}: {len(answers)} answers in {file}"
        )
        if hasattr(task, "write") and len(chosen) == len(examples):
            written = task.write(chosen, answers, file.with_suffix(""), args.data)
            print(f"in the official format: {', '.join(map(str, written))}")
        scores = scored(task, chosen, answers, file, args)
        add_published(scores, task, model.config)
        if scores:
            seconds = round(time.monotonic() - started, 1)
            result = {
                "task": args.task,
                "data": args.data,
                "control": args.control,
                "seconds": seconds,
                "scores": scores,
            }
            write_file(file.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
            print(table(scores))
        else:
            needs = (
                "--judge URL --judge-model NAME"
                if hasattr(task, "judge")
                else "the server, which has the answers"
            )
            print(f"no score: that takes {needs}")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    config.cli(main, __doc__)
