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
import weights
from config import UserError
from data import load_image
from evals import gqa, llava_bench, mmbench, mme, mmmu, mmvet, pope, scienceqa, seedbench, textvqa, vqav2, world
from evals.judge import Judge
from evals.published import add_published
from model import LLaVA
from templates import IMAGE, encode_prompt, load_tokenizer, stop_id


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
}
MEAN_OF = 64  # pictures whose mean a blanked one is


def image_names(example):
    image = example["image"]
    return image if isinstance(image, list) else [image] if image else []


def picture(example, i, data_dir):
    """The i-th picture of an example. Raises UserError that names it, and the row it belongs to."""
    where = Path(data_dir) / image_names(example)[i]
    source = example["pictures"][i] if "pictures" in example else where
    try:
        return load_image(source)
    except ValueError as error:
        raise UserError(example.get("where", where), f"{where}: {error}", "restore the picture") from None


def check(examples, data_dir):
    """Raises UserError for two examples of one id, or a picture that is not there: before a model is loaded."""
    seen = set()
    for example in examples:
        if example["id"] in seen:
            raise UserError(example["where"], f"question {example['id']} is there twice", "fetch the file again")
        seen.add(example["id"])
        for i, name in enumerate(image_names(example)):
            if not (Path(data_dir) / name).is_file():  # it is missing, or in the file of questions
                picture(example, i, data_dir)


def generate(model, tok, questions, pictures, **options):
    """The model's answers to questions (texts) about pictures (for each a list of (3, H, W)); options: generate's."""
    template, prompts = model.config.template, []
    for question, seen in zip(questions, pictures, strict=True):
        if question.count(IMAGE) != len(seen):
            question = f"{IMAGE}\n" * len(seen) + question.replace(IMAGE, "")
        prompts.append(torch.tensor(encode_prompt([{"from": "human", "value": question}], tok, template)))
    images = [pixels for seen in pictures for pixels in seen]
    device, stop = model.language_model.lm_head.weight.device, stop_id(tok, template)
    images = torch.stack(images).to(device) if images else None
    new = model.generate(prompts, images=images, eos_token_id=stop, **options)
    rows = [row[: row.index(stop)] if stop in row else row for row in new.tolist()]
    return [tok.decode(row).strip() for row in rows]


def answerer(model, tok, data_dir, max_new_tokens, blank=None):
    """A function from a list of examples to the model's answers. `blank`: pixels that stand for every picture."""
    transform, mode = model.vision_tower.transform, model.config.image_mode

    def pixels(example):
        if blank is not None:
            return [blank] * len(image_names(example))
        return [transform(picture(example, i, data_dir), mode) for i in range(len(image_names(example)))]

    def answer(examples):
        pictures = [pixels(example) for example in examples]
        return generate(model, tok, [e["prompt"] for e in examples], pictures, max_new_tokens=max_new_tokens)

    return answer


def mean_picture(examples, data_dir, model):
    """The mean of some pictures as the encoder gets them, (3, H, W): the same for all, so it tells nothing of any.

    Not one plain colour: that is a picture of an empty scene, and a model that sees it rightly answers "zero".
    """
    seen = [(example, i) for example in examples for i in range(len(image_names(example)))]
    seen = seen[:: max(1, len(seen) // MEAN_OF)][:MEAN_OF]
    transform, mode = model.vision_tower.transform, model.config.image_mode
    return torch.stack([transform(picture(example, i, data_dir), mode) for example, i in seen]).mean(0)


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
    columns = [c for c in ("score", "chance", "text_only", "published") if any(c in s for s in scores.values())]
    width = max(24, *(len(name) + 1 for name in scores))
    lines = [" " * width + "".join(f"{c.replace('_', ' '):>11}" for c in columns) + f"{'n':>8}"]
    for name, s in scores.items():
        cells = ("" if s.get(c) is None else f"{s[c]:.2f}" for c in columns)
        lines.append(f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells) + f"{s['n']:8}")
    return "\n".join(lines + [f"published: {s['published_of']}" for s in scores.values() if "published" in s])


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
    parser.add_argument("--blank", action="store_true", help="replace every picture by the mean of many, as a control")
    parser.add_argument("--limit", type=int, help="only about so many examples, spread evenly over all")
    parser.add_argument("--batch", type=int, default=64, help="questions answered at once (default 64)")
    parser.add_argument("--out", help="file of the answers (default MODEL/eval/TASK.jsonl, or TASK-blank.jsonl)")
    parser.add_argument("--judge", help="OpenAI-compatible URL of the language model that judges mmvet, llava_bench")
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
    task, folder, started = TASKS[args.task], weights.resolve(args.model), time.monotonic()
    examples = task.examples(args.data)
    chosen = limited(examples, args.limit)
    check(chosen, args.data)
    file = Path(args.out or folder / "eval" / f"{args.task}{'-blank' if args.blank else ''}.jsonl")
    saved = max((f.stat().st_mtime for f in folder.glob("*.safetensors")), default=0)
    parts = sorted(file.parent.glob(f"{file.name}*"), key=lambda part: part.stat().st_mtime) if rank == 0 else []
    if parts and parts[0].stat().st_mtime < saved:  # also where only another rank's part is left of a killed run
        print(f"{file.name}: older than the model, starting afresh", flush=True)
        for part in parts:
            part.unlink()
    barrier()

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, tok = LLaVA.from_pretrained(folder, dtype=dtype, device=device), load_tokenizer(folder)
    blank = mean_picture(examples, args.data, model) if args.blank else None
    answer = answerer(model.eval(), tok, args.data, task.MAX_NEW_TOKENS, blank)
    answers = evaluate(examples, chosen, answer, file, args.batch, rank, world_size, barrier)
    if rank == 0:
        print(f"{args.task}{', pictures blanked' if args.blank else ''}: {len(answers)} answers in {file}")
        if hasattr(task, "write") and len(chosen) == len(examples):
            written = task.write(chosen, answers, file.with_suffix(""), args.data)
            print(f"in the official format: {', '.join(map(str, written))}")
        scores = scored(task, chosen, answers, file, args)
        add_published(scores, task, model.config)
        if scores:
            seconds = round(time.monotonic() - started, 1)
            result = {"task": args.task, "data": args.data, "blank": args.blank, "seconds": seconds, "scores": scores}
            weights.write_file(file.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
            print(table(scores))
        else:
            needs = "--judge URL --judge-model NAME" if hasattr(task, "judge") else "the server, which has the answers"
            print(f"no score: that takes {needs}")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    config.cli(main, __doc__)
