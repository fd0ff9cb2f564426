"""MMBench: multiple choice in twenty abilities, each question in every rotation of its options.

Both layouts are one file, which holds its pictures: mmbench_dev_20230712.tsv, or MMBench_DEV_EN.tsv,
MMBench_TEST_EN.tsv or their _legacy (opencompass). A rotation has the index of its question plus a multiple of 10^6.

`circular`, the published number, counts a question as right when all its rotations are; `vanilla` counts the
questions as first asked. An answer is read as VLMEvalKit reads one before it asks GPT: a single letter, `answer is
X`, or the text of a single option; anything else is wrong. No scores where the file has no answers: the server's
file (.tsv, and .xlsx where openpyxl is installed) has LLaVA's columns. Chance is 1 / number of choices, for each.
"""

import base64
import csv
import importlib.util
import io
import re
import sys
from pathlib import Path

from checkpoints.files import write_file
from config import UserError
from evals import LETTER, first, grouped, lettered, reading

MAX_NEW_TOKENS = 1024
PUBLISHED = ("circular", {"LLaVA-1.5-7B": 64.3, "LLaVA-1.5-13B": 67.7})
FILES = ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN_legacy.tsv", "MMBench_DEV_EN.tsv", "mmbench_test_20230712.tsv",
         "MMBench_TEST_EN_legacy.tsv", "MMBench_TEST_EN.tsv")  # fmt: skip
DROPPED = {"hint", "category", "source", "image", "comment", "l2-category"}  # by LLaVA's converter
# What pandas, with which LLaVA reads the file, takes for an empty cell, and LLaVA's own two.
EMPTY = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
         "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "none"}  # fmt: skip


def examples(data_dir):
    """[{"id", "image": a name, "pictures": [bytes], "prompt", "label", "choices": {letter: text}, "group", "row"}]."""
    file, found, pictures = first(data_dir, *FILES), [], {}
    csv.field_size_limit(sys.maxsize)
    with open(file, encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines, delimiter="\t")):
            with reading(f"{file}:{number}"):
                index, choices = int(row["index"]), {}
                for letter in "ABCD":
                    if row[letter] in EMPTY:
                        break
                    choices[letter] = row[letter]
                picture = row.pop("image")
                if len(picture) > 64:
                    pictures[index] = base64.b64decode(picture)
                else:  # some files hold each picture once, and name that row elsewhere
                    pictures[index] = pictures[int(picture)]
                text = row["question"] + lettered(choices.values()) + LETTER
                text = text if row["hint"] in EMPTY else f"{row['hint']}\n{text}"
                label = row.get("answer") or None
                found.append(
                    {
                        "id": str(index),
                        "image": f"{file.name}:{index}",
                        "prompt": text,
                        "label": label,
                    }
                )
                found[-1] |= {
                    "pictures": [pictures[index]],
                    "choices": choices,
                    "group": index % 10**6,
                }
                found[-1] |= {"row": row, "where": f"{file}:{number}"}
    if not found:
        raise UserError(file, "no questions in it", "fetch it again")
    return found


def parse(answer, choices):
    """The letter among `choices` {letter: text} that an answer gives, or None."""
    tokens = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    said = [letter for letter in choices if letter in tokens]
    if len(said) == 1 and tokens.index(said[0]) > len(tokens) - 5:
        return said[0]
    if not said and "Z" in tokens:  # for none of them
        return None
    if (match := re.search(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", answer)) and match[
        1
    ].upper() in choices:
        return match[1].upper()
    if len(answer) > 2 * sum(map(len, choices.values())):
        return None
    said = [letter for letter, text in choices.items() if text.lower() in answer.lower()]
    return said[0] if len(said) == 1 else None


def score(examples, answers):
    groups = {}
    for example, answer in zip(examples, answers, strict=True):
        if example["label"]:
            right = parse(answer, example["choices"]) == example["label"]
            groups.setdefault(example["group"], []).append((example, right))
    results = []
    for group in groups.values():
        example, right = group[0]
        chance = 1 / len(example["choices"])
        results.append(
            (
                ("circular", example["row"].get("category")),
                all(r for _, r in group),
                chance ** len(group),
            )
        )
        results.append((("vanilla",), right, chance))
    scores = grouped(results)
    return {
        name: scores[name]
        for name in sorted(scores, key=lambda name: name not in ("circular", "vanilla"))
    }


def write(examples, answers, stem, data_dir):
    """The server's file: the question file's columns without DROPPED, the seventh is the prediction."""
    columns = [name for name in examples[0]["row"] if name not in DROPPED]
    table = [columns[:6] + ["prediction"] + columns[6:]]
    for example, answer in zip(examples, answers, strict=True):
        cells = ["" if example["row"][name] in EMPTY else example["row"][name] for name in columns]
        table.append(cells[:6] + [answer] + cells[6:])
    text, files = io.StringIO(), [Path(f"{stem}-server.tsv")]
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(table)
    write_file(files[0], text.getvalue())
    if importlib.util.find_spec("openpyxl"):
        from openpyxl import Workbook

        book = Workbook()
        for row in table:
            book.active.append(row)
        files.append(Path(f"{stem}-server.xlsx"))
        write_file(files[1], book.save)
    return files
