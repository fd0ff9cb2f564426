"""Fuzz what evaluation reads: every benchmark's files, kept answers, a judge's replies.

    python -m tests.tools.fuzz.evaluation --count 500 --seed 0

A case writes the files of a benchmark, changes one of them, and runs what evaluate.py runs: read
the questions, check what they show, answer them all, score the answers, write the official files.
A score that is not finite is a violation, and so is a file of the benchmark that has changed.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import sys
from pathlib import Path

import evaluate
from config import UserError
from evals.judge import read_replies, reply_in
from evals.kept import answer_examples
from evals.lmms_eval import generate_options
from evals.published import add_published
from tests.tools import video_benchmark_files
from tests.tools.benchmark_files import FILES, PYARROW, put, pyarrow_for_tests
from tests.tools.fuzz import Case, Violation, main, mutate, mutate_bytes, odd_json

ANSWERS = ("yes", "No.", "A", "(B)", "The answer is C.", "red", "", "3", "\x1b[2J", "x" * 5000)
REPLIES = ("0.5", "1.0", "8 6\nwell", "nan", "inf inf\n", "", "x", "-1", "9" * 400)
CELLS = ("", "nan", "x", "-1", "0", "9" * 5000, '"', "A" * 70, "\x00", "\ud83d", "é" * 100_000)


def world(folder: Path):
    """Write the demo world's benchmark, two questions a split."""
    from evals.world import SPLITS

    for split in SPLITS:
        rows = []
        for i, label in enumerate(("yes", "no")):
            row = {"question_id": i, "image": "a.png", "text": f"Is it {i}?", "label": label}
            rows.append(row | {"kind": "existence", "choices": ["yes", "no"]})
        put(folder / "benchmark" / f"{split}.jsonl", rows)
    put(folder / "benchmark" / "text_only.json", {"existence_random": 50.0})
    put(folder / "images" / "a.png", b"x")


def moving(folder: Path):
    """Write the moving world's benchmark."""
    row = {"question_id": 1, "group": 0, "video": "a", "text": "Which?", "label": "left"}
    row |= {"kind": "way", "choices": ["left", "right"]}
    put(folder / "benchmark" / "moving.jsonl", [row, row | {"question_id": 2}])
    put(folder / "videos" / "a" / "0.png", b"x")


def write_files(task: str, folder: Path, rng: random.Random):
    """Write the files of a task in one of its layouts."""
    if task in FILES:
        layouts = [llava for llava in (True, False) if FILES[task][1 if llava else 2]]
        FILES[task][0](folder, rng.choice(layouts))
    elif task in video_benchmark_files.TASKS:
        video_benchmark_files.write(task, folder)
    elif task == "world":
        world(folder)
    else:
        moving(folder)


def change(file: Path, rng: random.Random) -> str:
    """Change a file of a benchmark, and return what was done to it."""
    content = file.read_bytes()
    if rng.random() < 0.25:
        changed, what = mutate_bytes(content, rng)
    elif file.suffix == ".tsv":
        changed, what = change_table(content, rng)
    elif file.suffix == ".parquet" and PYARROW:
        changed, what = mutate_bytes(content, rng)
    elif file.suffix in (".json", ".jsonl", ".parquet"):
        changed, what = change_json(content, rng)
    else:
        changed, what = mutate_bytes(content, rng)
    file.write_bytes(changed)
    return what


def change_json(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return a JSON file, or one with a value a line, with one value changed."""
    if rng.random() < 0.1:
        return odd_json(rng)
    try:
        value = json.loads(content)
    except ValueError:
        lines = content.decode().splitlines()
        at = rng.randrange(len(lines))
        if rng.random() < 0.2:
            lines.insert(at, rng.choice(["", "{}", "null", lines[at]]))
            return "\n".join(lines).encode(), f"a line more at {at}"
        value, what = mutate(json.loads(lines[at]), rng)
        lines[at] = json.dumps(value)
        return "\n".join(lines).encode(), what
    value, what = mutate(value, rng)
    return json.dumps(value).encode(), what


def change_table(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return a table with a cell changed, taken out or put in."""
    rows = list(csv.reader(io.StringIO(content.decode(), newline=""), delimiter="\t"))
    row = rows[rng.randrange(len(rows))]
    at = rng.randrange(len(row))
    way = rng.choice(("replace", "replace", "remove", "insert"))
    if way == "remove":
        del row[at]
    elif way == "insert":
        row.insert(at, rng.choice(CELLS))
    else:
        row[at] = rng.choice(CELLS)
    text = io.StringIO()
    csv.writer(text, delimiter="\t").writerows(rows)
    return text.getvalue().encode(errors="surrogatepass"), f"a cell: {way} at {at}"


def check_scores(scores: dict):
    """Raise Violation unless all scores are finite, and can be written and printed."""
    for name, score in scores.items():
        for key in ("score", "chance", "n", "text_only"):
            value = score.get(key)
            if value is not None and not math.isfinite(value):
                raise Violation(f"{name}: {key} is {value}")
    json.dumps(scores, allow_nan=False)
    if scores:
        evaluate.score_table(scores).encode()


def evaluate_files(task: str, folder: Path, seed: int):
    """Do what evaluate.py does with a benchmark, with drawn answers in the place of a model's."""
    rng = random.Random(seed)
    module = evaluate.TASKS[task]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    examples = module.examples(folder)
    evaluate.check_examples(examples, folder)
    if hasattr(module, "text_only"):
        module.text_only(folder)
    for example in examples:
        for text in (example["id"], example["prompt"]):
            if not isinstance(text, str):
                raise Violation(f"{text!r} is no text")
            text.encode()
        json.dumps(example["label"], allow_nan=False)

    out = folder.parent / "out"
    answers = answer_examples(
        examples, examples, lambda part: [rng.choice(ANSWERS) for _ in part], out / "a.jsonl"
    )
    if hasattr(module, "judge"):
        scores = module.judge(
            examples, answers, lambda *asked: rng.choice(REPLIES), out / "a", folder
        )
    else:
        scores = module.score(examples, answers)
    if hasattr(module, "unread"):
        module.unread(examples, answers)
    if hasattr(module, "write"):
        module.write(examples, answers, out / "a", folder)
    check_scores(scores)

    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if after != before:
        raise Violation("a file of the benchmark has changed")


def benchmark_case(rng: random.Random, folder: Path) -> Case:
    """Return a case in which a file of a benchmark is changed."""
    if not PYARROW:
        sys.modules["pyarrow"] = pyarrow_for_tests()
    task = rng.choice([*FILES, *video_benchmark_files.TASKS, "world", "moving"])
    data = folder / "data"
    data.mkdir()
    write_files(task, data, rng)
    kinds = {".json", ".jsonl", ".tsv", ".txt", ".parquet"}
    files = sorted(path for path in data.rglob("*") if path.suffix in kinds)
    file = rng.choice(files)
    what = f"{task}/{file.relative_to(data)}: {change(file, rng)}"
    seed = rng.randrange(2**32)
    return Case(f"benchmark {task}", what, lambda: evaluate_files(task, data, seed))


def kept_case(rng: random.Random, folder: Path) -> Case:
    """Return a case in which a file of kept answers is damaged."""
    examples = []
    rows = []
    for i in range(4):
        example = {"id": f"q{i}", "prompt": f"ask {i}", "label": i, "image": f"{i}.png"}
        examples.append(example)
        row = {"id": f"q{i}", "question": f"ask {i}", "answer": "kept", "image": f"{i}.png"}
        rows.append(json.dumps(row | {"label": i}))
    content = "".join(f"{row}\n" for row in rows).encode()
    if rng.random() < 0.5:
        content, what = change_json(content, rng)
    else:
        content, what = mutate_bytes(content, rng)
    file = folder / rng.choice(("a.jsonl", "a.jsonl.rank1"))
    file.write_bytes(content)

    def run():
        answers = answer_examples(
            examples, examples, lambda part: ["new"] * len(part), folder / "a.jsonl"
        )
        if not all(isinstance(answer, str) for answer in answers):
            raise Violation(f"answers are {answers}")
        again = answer_examples(examples, examples, lambda part: 1 / 0, folder / "a.jsonl")
        if again != answers:
            raise Violation("the second run has other answers")
        kept_aside = list(folder.glob("*damaged-1*"))
        if kept_aside and kept_aside[0].read_bytes() != content:
            raise Violation("the damaged file is not as it was")

    return Case("kept answers", what, run)


def judge_case(rng: random.Random, folder: Path) -> Case:
    """Return a case in which a judge's kept replies, or one that it sends, are damaged."""
    if rng.random() < 0.5:
        rows = [json.dumps({"key": f"k{i}", "reply": f"0.{i}"}) for i in range(4)]
        content, what = change_json("\n".join(rows).encode(), rng)
        if rng.random() < 0.5:
            content, what = mutate_bytes("\n".join(rows).encode(), rng)
        file = folder / "judge.jsonl"
        file.write_bytes(content)

        def read():
            for key, reply in read_replies(file).items():
                key.encode()
                reply.encode()

        return Case("judge's record", what, read)

    body = {"choices": [{"message": {"role": "assistant", "content": "0.5"}}], "usage": {"n": 1}}
    content, what = change_json(json.dumps(body).encode(), rng)

    def receive():
        # These are the errors after which Judge.ask asks again.
        try:
            reply_in(content).encode()
        except (ValueError, LookupError, TypeError) as error:
            raise UserError("judge", str(error), "ask again") from None

    return Case("judge's reply", what, receive)


def other_case(rng: random.Random, folder: Path) -> Case:
    """Return a case of lmms-eval's options, or of the names that published numbers go by."""
    if rng.random() < 0.5:
        asked = {"max_new_tokens": 8, "temperature": 0.5, "top_p": 0.9, "num_beams": 1}
        value, what = mutate(asked | {"do_sample": True, "until": ["\n"]}, rng)
        if not isinstance(value, dict):
            value = asked
        return Case("lmms-eval's options", what, lambda: generate_options(value))

    value, what = mutate({"model_type": "llama", "name": "Qwen/Qwen2-0.5B"}, rng)
    if not isinstance(value, dict):
        value = {"model_type": value}

    class Config:
        text = value
        vision = {"model_type": value.get("name")}
        sources = {"llm": value.get("name"), "vision": value.get("model_type")}

    class Task:
        PUBLISHED = ("all", "VQAv2")

    def run():
        scores = {"all": {"score": 1.0, "chance": 0.0, "n": 1}}
        add_published(scores, Task, Config)
        check_scores(scores)

    return Case("published", what, run)


def case(rng: random.Random, folder: Path) -> Case:
    """Return one case: mostly of the benchmarks' files."""
    kinds = (benchmark_case, kept_case, judge_case, other_case)
    (made,) = rng.choices(kinds, weights=(70, 14, 10, 6))
    return made(rng, folder)


if __name__ == "__main__":
    main(case, __doc__)
