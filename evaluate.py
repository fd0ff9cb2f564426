"""Measures a model on a benchmark, beside chance and beside what the question alone gives away.

    torchrun evaluate.py --model out/demo --task world --data out/demo/world
    torchrun evaluate.py --model out/demo --task world --data out/demo/world --blank   # the same, seeing nothing
    torchrun --nproc-per-node 8 evaluate.py --model DIR --task world --data DIR

Writes MODEL/eval/TASK.jsonl, one answer a line, and MODEL/eval/TASK.json, the scores. A killed run continues
where it stopped when the same command is given again; a model saved since then starts it afresh.

A task is a file of evals/ with
    examples(data_dir) -> [{"id", "image" (path from data_dir, or None), "prompt", "label", ...}]
    score(examples, answers) -> {name: {"score": %, "chance": %, "n": int}}
    text_only(data_dir) -> {name: %}      what answering without the pictures can reach
    MAX_NEW_TOKENS
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import config
import weights
from config import UserError
from data import load_image
from evals import world
from model import LLaVA
from templates import encode_prompt, load_tokenizer, stop_id

TASKS = {"world": world}
MEAN_OF = 64  # pictures whose mean a blanked one is


def answerer(model, tok, data_dir, max_new_tokens, blank=None):
    """A function from a list of examples to the model's answers. `blank`: pixels that stand for every picture."""
    transform, mode, template = model.vision_tower.transform, model.config.image_mode, model.config.template
    stop = stop_id(tok, template)

    def pixels(example):
        if blank is not None:
            return blank
        try:
            return transform(load_image(Path(data_dir) / example["image"]), mode)
        except ValueError as error:
            raise UserError(Path(data_dir) / example["image"], str(error), "restore the picture") from None

    def answer(examples):
        prompts = []
        for example in examples:
            question = ("<image>\n" if example["image"] else "") + example["prompt"]
            prompts.append(torch.tensor(encode_prompt([{"from": "human", "value": question}], tok, template)))
        images = [pixels(example) for example in examples if example["image"]]
        images = torch.stack(images) if images else None
        new = model.generate(prompts, images=images, max_new_tokens=max_new_tokens, eos_token_id=stop)
        rows = [row[: row.index(stop)] if stop in row else row for row in new.tolist()]
        return [tok.decode(row).strip() for row in rows]

    return answer


def mean_picture(examples, data_dir, model):
    """The mean of some pictures as the encoder gets them, (3, H, W): the same for all, so it tells nothing of any.

    Not one plain colour: that is a picture of an empty scene, and a model that sees it rightly answers "zero".
    """
    paths = [example["image"] for example in examples if example["image"]]
    paths = paths[:: max(1, len(paths) // MEAN_OF)][:MEAN_OF]
    pictures = [load_image(Path(data_dir) / path) for path in paths]
    return torch.stack([model.vision_tower.transform(p, model.config.image_mode) for p in pictures]).mean(0)


def read_answers(file, examples):
    """{id: row} of the answers in `file` that belong to these examples. A half-written last line is no answer."""
    asked, found = {example["id"]: example for example in examples}, {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        example = asked.get(row["id"])
        if example and (row["question"], row["image"]) == (example["prompt"], example["image"]):
            found[row["id"]] = row
    return found


def collect(todo, answer, file, batch, done=0, quiet=False):
    """Answers the examples `todo` and appends each batch to `file`, shortest questions first so that none is ragged."""
    todo = sorted(todo, key=lambda example: (len(example["prompt"]), example["id"]))
    total, started, shown = done + len(todo), time.monotonic(), 0.0
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as lines:
        if lines.tell():  # a killed run may have left half a line: end it, `read_answers` passes over it
            lines.seek(-1, os.SEEK_END)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
        for at in range(0, len(todo), batch):
            part = todo[at : at + batch]
            for example, text in zip(part, answer(part), strict=True):
                row = {"id": example["id"], "question": example["prompt"], "answer": text}
                row |= {"label": example["label"], "image": example["image"]}
                lines.write(json.dumps(row).encode() + b"\n")
            lines.flush()
            count, seconds = at + len(part), time.monotonic() - started
            tty = sys.stdout.isatty()
            if not quiet and (tty or seconds - shown > 30 or count == len(todo)):
                shown, rate = seconds, count / max(seconds, 1e-9)
                line = f"{done + count}/{total} answers, {rate:.1f}/s, {(len(todo) - count) / rate:.0f} s left"
                print(f"\r{line}   " if tty else line, end="" if tty and count < len(todo) else "\n", flush=True)


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
    weights.write_file(file, "".join(json.dumps(row) + "\n" for row in rows))
    for part in parts[1:]:
        part.unlink()
    return [known[example["id"]]["answer"] for example in chosen]


def table(scores):
    """The scores as lines of text."""
    lines = [f"{'':24}{'score':>8}{'chance':>8}{'text only':>11}{'n':>7}"]
    for name, s in scores.items():
        words = f"{s['text_only']:.1f}" if "text_only" in s else ""
        lines.append(f"{name:24}{s['score']:8.1f}{s['chance']:8.1f}{words:>11}{s['n']:7}")
    return "\n".join(lines)


def arguments(argv):
    parser = config.parser(__doc__)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--task", required=True, choices=TASKS, help="the benchmark")
    parser.add_argument("--data", required=True, help="folder of the benchmark's files")
    parser.add_argument("--blank", action="store_true", help="replace every picture by the mean of many, as a control")
    parser.add_argument("--limit", type=int, help="only so many examples, spread evenly over all")
    parser.add_argument("--batch", type=int, default=64, help="questions answered at once (default 64)")
    parser.add_argument("--out", help="file of the answers (default MODEL/eval/TASK.jsonl, or TASK-blank.jsonl)")
    return parser.parse_args(argv)


def main(argv):
    args = arguments(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    barrier = lambda: None  # noqa: E731
    if world_size > 1:  # only to wait for each other, for as long as the slowest needs
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        barrier = dist.barrier
    task, folder, started = TASKS[args.task], weights.resolve(args.model), time.monotonic()
    examples = task.examples(args.data)
    chosen = examples
    if args.limit and args.limit < len(examples):
        chosen = [examples[i * len(examples) // args.limit] for i in range(args.limit)]
    file = Path(args.out or folder / "eval" / f"{args.task}{'-blank' if args.blank else ''}.jsonl")
    saved = max((f.stat().st_mtime for f in folder.glob("*.safetensors")), default=0)
    if rank == 0 and file.exists() and file.stat().st_mtime < saved:
        print(f"{file.name}: older than the model, starting afresh", flush=True)
        for part in [file, *file.parent.glob(f"{file.name}.rank*")]:
            part.unlink()
    barrier()

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, tok = LLaVA.from_pretrained(folder, dtype=dtype, device=device), load_tokenizer(folder)
    blank = mean_picture(examples, args.data, model) if args.blank else None
    answer = answerer(model.eval(), tok, args.data, task.MAX_NEW_TOKENS, blank)
    answers = evaluate(examples, chosen, answer, file, args.batch, rank, world_size, barrier)
    if rank == 0:
        scores, words = task.score(chosen, answers), task.text_only(args.data)
        for name in scores.keys() & words.keys():
            scores[name]["text_only"] = words[name]
        result = {
            "task": args.task,
            "data": args.data,
            "blank": args.blank,
            "seconds": round(time.monotonic() - started, 1),
        }
        weights.write_file(file.with_suffix(".json"), json.dumps({**result, "scores": scores}, indent=2) + "\n")
        print(f"{args.task}{', pictures blanked' if args.blank else ''}: {len(answers)} answers in {file}")
        print(table(scores))
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    config.cli(main, __doc__)
