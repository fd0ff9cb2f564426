"""MMBench (Liu et al., 2023): multiple choice in twenty abilities, each question in every rotation
of its options.

Both layouts are one file, which holds its pictures: LLaVA's mmbench_dev_20230712.tsv, or
opencompass's MMBench_DEV_EN.tsv, MMBench_TEST_EN.tsv or their _legacy. A rotation has the index of
its question plus a multiple of 10^6.

`circular`, the published number, counts a question as right when all its rotations are; `vanilla`
counts the questions as first asked. Chance is 1 / number of choices, for each rotation. There are
no scores where the file has no answers. The server's file (.tsv, and .xlsx where openpyxl is
installed) has LLaVA's columns.

An answer is read as VLMEvalKit reads one before it asks GPT (can_infer in vlmeval/utils/
matching_util.py): a single letter, `answer is X`, or the text of a single option.

The traps: anything else is wrong here, where the official script would ask GPT. And an "A" early in
a long sentence is taken for the article: a letter counts only among the last words.
"""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import re
from pathlib import Path

from checkpoints.files import write_file
from config import UserError
from evals.files import errors_at, find_first, read_tsv
from evals.options import LETTER, list_options
from evals.scores import Result, group_scores

MAX_NEW_TOKENS = 1024
PUBLISHED = ("circular", {"LLaVA-1.5-7B": 64.3, "LLaVA-1.5-13B": 67.7})
FILES = (
    "mmbench_dev_20230712.tsv",
    "MMBench_DEV_EN_legacy.tsv",
    "MMBench_DEV_EN.tsv",
    "mmbench_test_20230712.tsv",
    "MMBench_TEST_EN_legacy.tsv",
    "MMBench_TEST_EN.tsv",
)
ROTATION = 10**6
UNREAD = "give no letter, and are wrong"

# Columns that LLaVA's converter (convert_mmbench_for_submission.py) leaves out.
DROPPED = {"hint", "category", "source", "image", "comment", "l2-category"}

# What pandas, with which LLaVA reads the file, takes for an empty cell, and LLaVA's own two.
EMPTY = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND",
         "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
         "none"}  # fmt: skip

# The text of the picture's cell is longer than this if it is a picture, not the index of a row.
LONGEST_INDEX = 64


def examples(data_dir):
    """Return the questions in the order of the file, all rotations.

    Own keys: "choices": {letter: text}; "group": the question; "cells": of its row.
    """
    file = find_first(data_dir, *FILES)

    found = []
    pictures = {}
    for row in read_tsv(file):
        with errors_at(row.where):
            index = int(row.text("index"))
            choices = read_choices(row)
            question = row.text("question")
            hint = row.text("hint")

            # Some files hold each picture once, and name that row elsewhere.
            cells = dict(row.values)
            picture = cells.pop("image")
            if len(picture) > LONGEST_INDEX:
                pictures[index] = base64.b64decode(picture)
            else:
                pictures[index] = pictures[int(picture)]

            prompt = question + list_options(choices.values()) + LETTER
            if hint not in EMPTY:
                prompt = f"{hint}\n{prompt}"

            found.append(
                {
                    "id": str(index),
                    "image": f"{file.name}:{index}",
                    "pictures": [pictures[index]],
                    "prompt": prompt,
                    "label": cells.get("answer") or None,
                    "choices": choices,
                    "group": index % ROTATION,
                    "cells": cells,
                    "where": row.where,
                }
            )
    if not found:
        raise UserError(file, "no questions in it", "fetch it again")
    return found


def read_choices(row):
    """Return {letter: text} of the options before the first empty one."""
    choices = {}
    for letter in "ABCD":
        text = row.text(letter)
        if text in EMPTY:
            break
        choices[letter] = text
    if not choices:
        raise row.refuse("A", "no option")
    return choices


def parse(answer, choices):
    """Return the letter among `choices` {letter: text} that an answer gives, or None."""
    # A single letter, as a word of its own, among the last four words.
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - 4:
        return letters[0]

    # Z says that it is none of them.
    if not letters and "Z" in words:
        return None

    # "The answer is B".
    match = re.search(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", answer)
    if match and match[1].upper() in choices:
        return match[1].upper()

    # The text of a single option, unless the answer is so long that it tells of all of them.
    if len(answer) > 2 * sum(len(text) for text in choices.values()):
        return None
    told = [letter for letter, text in choices.items() if text.lower() in answer.lower()]
    if len(told) == 1:
        return told[0]
    return None


def unread(examples, answers):
    """Return how many answers give no letter."""
    pairs = zip(examples, answers, strict=True)
    return sum(parse(answer, example["choices"]) is None for example, answer in pairs)


def score(examples, answers):
    """Return circular and vanilla accuracy, then the circular one of each ability."""
    # {question: (example, whether its answer is right) of each rotation}
    questions = {}
    for example, answer in zip(examples, answers, strict=True):
        if example["label"]:
            right = parse(answer, example["choices"]) == example["label"]
            questions.setdefault(example["group"], []).append((example, right))

    results = []
    for rotations in questions.values():
        # The first row of a question is the question as first asked.
        first, first_right = rotations[0]
        all_right = all(right for _, right in rotations)
        chance = 1 / len(first["choices"])
        groups = ["circular"]
        if first["cells"].get("category"):
            groups.append(first["cells"]["category"])
        results.append(Result(groups, all_right, chance ** len(rotations)))
        results.append(Result(("vanilla",), first_right, chance))

    # The two over all questions come first.
    scores = group_scores(results)
    totals = {}
    for name in list(scores):
        if name in ("circular", "vanilla"):
            totals[name] = scores.pop(name)
    return totals | scores


def write(examples, answers, stem, data_dir):
    """Write the server's file: LLaVA's columns, of which the seventh is the prediction."""
    columns = [name for name in examples[0]["cells"] if name not in DROPPED]
    table = [columns[:6] + ["prediction"] + columns[6:]]
    for example, answer in zip(examples, answers, strict=True):
        cells = []
        for name in columns:
            cell = example["cells"][name]
            if cell in EMPTY:
                cell = ""
            cells.append(cell)
        table.append(cells[:6] + [answer] + cells[6:])

    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(table)
    tsv = Path(f"{stem}-server.tsv")
    write_file(tsv, text.getvalue())
    if not importlib.util.find_spec("openpyxl"):
        return [tsv]

    from openpyxl import Workbook

    book = Workbook()
    for row in table:
        book.active.append(row)
    xlsx = Path(f"{stem}-server.xlsx")
    write_file(xlsx, book.save)
    return [tsv, xlsx]
