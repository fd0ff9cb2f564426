"""GQA, balanced test-dev (Hudson & Manning, 2019): one word about objects, attributes, relations.

Files, in LLaVA's layout: llava_gqa_testdev_balanced.jsonl, data/testdev_balanced_questions.json,
data/images/ (in TinyLLaVA Factory's, the last two are one folder higher). In the original layout
(cs.stanford.edu/people/dorarad/gqa): testdev_balanced_questions.json (or questions1.2/...),
images/.

Scored as GQA's eval.py scores the predictions that LLaVA writes for it. Questions that query are
`open`, all others `binary`. Chance is what the best constant answer gets.

The trap: the match is exact. LLaVA takes the final period away and writes lower case; an article
or a plural makes an answer wrong.
"""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints.files import write_file
from config import UserError
from evals.files import find_first, read_rows, read_table
from evals.options import WORD
from evals.scores import OpenResult, open_scores

MAX_NEW_TOKENS = 128
PUBLISHED = ("all", "GQA")
QUESTIONS = "testdev_balanced_questions.json"


def examples(data_dir):
    """Return the questions in the order of the file. Own key: "type", open or binary."""
    folder = find_first(data_dir, "data/images", "images").relative_to(data_dir)
    # GQA's own file has the labels and types, in either layout.
    file = find_first(
        data_dir,
        f"data/{QUESTIONS}",
        QUESTIONS,
        f"data/questions1.2/{QUESTIONS}",
        f"questions1.2/{QUESTIONS}",
    )
    found = read_questions(file, folder)

    # LLaVA's file, if it is there, decides the order and the prompts.
    llava = Path(data_dir) / "llava_gqa_testdev_balanced.jsonl"
    if llava.exists():
        return ask_as_llava(found, llava, file, folder)
    return list(found.values())


def read_questions(file, folder):
    """Return {id: example} of GQA's own file."""
    found = {}
    for number, row in read_table(file).items():
        # The scorer knows only these two kinds.
        kind = "binary"
        if row.table("types").text("structural") == "query":
            kind = "open"
        number = str(number)
        found[number] = {
            "id": number,
            "image": f"{folder}/{row.identifier('imageId')}.jpg",
            "prompt": row.text("question") + WORD,
            "label": row.words("answer"),
            "type": kind,
            "where": row.where,
        }
    return found


def ask_as_llava(found, llava, file, folder):
    """Return the questions of LLaVA's file, in its order and with its prompts."""
    asked = []
    for where, row in read_rows(llava):
        number = str(row.identifier("question_id"))
        image = f"{folder}/{row.file('image')}"
        if number not in found:
            what = f"question {number} is not in {file.name}"
            raise UserError(where, what, "take both of the same version")
        asked.append(found[number] | {"image": image, "prompt": row.text("text"), "where": where})
    return asked


def prediction(answer):
    """Return an answer as LLaVA's convert_gqa_for_eval.py writes it."""
    return answer.rstrip(".").lower()


def score(examples, answers):
    """Return the share of exact matches: of all, of binary and of open questions."""
    results = []
    for example, answer in zip(examples, answers, strict=True):
        label = example["label"]
        groups = ("all", example["type"])
        results.append(OpenResult(groups, prediction(answer) == label, {label: 1}))
    return open_scores(results)


def write(examples, answers, stem, data_dir):
    """Write the predictions as GQA's eval.py takes them."""
    predictions = []
    for example, answer in zip(examples, answers, strict=True):
        predictions.append({"questionId": example["id"], "prediction": prediction(answer)})

    file = Path(f"{stem}-testdev_balanced_predictions.json")
    write_file(file, json.dumps(predictions))
    return [file]
