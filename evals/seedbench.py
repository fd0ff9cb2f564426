"""SEED-Bench (Li et al., 2023), its image part: multiple choice in nine kinds of understanding.

Its video questions are left out.

Files, in LLaVA's layout: llava-seed-bench.jsonl, SEED-Bench.json, SEED-Bench-image/. In the
original layout (AILab-CVC/SEED-Bench on Hugging Face): the same without the first file.

Scored as LLaVA's convert_seed_for_submission.py does it. Chance is 1 / 4.

The trap: the answer must be the letter and nothing else; "B." is wrong.
"""

from __future__ import annotations

from pathlib import Path

from evals.files import Row, errors_at, find_first, read_rows, read_values, write_json_lines
from evals.options import LETTER, list_options
from evals.scores import Result, group_scores

MAX_NEW_TOKENS = 128
PUBLISHED = ("all", {"LLaVA-1.5-7B": 66.1, "LLaVA-1.5-13B": 68.2})
CHANCE = 1 / 4


def examples(data_dir):
    """Return the questions in the order of the file. Own keys: "kind", "question_id"."""
    file = find_first(data_dir, "SEED-Bench.json")
    # A question says the number of its kind; the file says the names of all.
    kinds = {}
    named = Row(read_values(file, part="question_type"), f"{file}:question_type")
    for name in named.values:
        kinds[named.integer(name, 0, 1000)] = name
    find_first(data_dir, "SEED-Bench-image")

    llava = Path(data_dir) / "llava-seed-bench.jsonl"
    asked = {}
    if llava.exists():
        asked = read_llava(llava)

    found = []
    for where, row in read_rows(file, part="questions"):
        with errors_at(where):
            if row.text("data_type") != "image":
                continue
            question_id = row.identifier("question_id")
            number = str(question_id)
            options = [row.words(f"choice_{letter}") for letter in "abcd"]
            # The prompt as LLaVA's converter writes it, or LLaVA's own.
            as_asked = {
                "image": f"SEED-Bench-image/{row.file('data_id')}",
                "prompt": row.text("question") + list_options(options) + LETTER,
                "where": where,
            }
            if asked:
                as_asked = asked[number]
            rest = {
                "id": number,
                "label": row.text("answer"),
                "kind": kinds[row.integer("question_type_id", 0, 1000)],
                "question_id": question_id,
            }
            found.append(as_asked | rest)
    return found


def read_llava(file):
    """Return {id: the picture and the prompt of LLaVA's file}."""
    asked = {}
    for where, row in read_rows(file):
        asked[str(row.identifier("question_id"))] = {
            "image": row.file("image"),
            "prompt": row.text("text"),
            "where": where,
        }
    return asked


def score(examples, answers):
    """Return the accuracy of all questions and of each kind."""
    results = []
    for example, answer in zip(examples, answers, strict=True):
        right = answer == example["label"]
        results.append(Result(("all", example["kind"]), right, CHANCE))
    return group_scores(results)


def write(examples, answers, stem, data_dir):
    """Write the predictions as the leaderboard takes them."""
    rows = []
    for example, answer in zip(examples, answers, strict=True):
        rows.append({"question_id": example["question_id"], "prediction": answer})

    file = Path(f"{stem}-predictions.jsonl")
    write_json_lines(file, rows)
    return [file]
