"""GQA, balanced test-dev: one word about objects, attributes and relations.

LLaVA layout: llava_gqa_testdev_balanced.jsonl, data/testdev_balanced_questions.json, data/images/ (in TinyLLaVA
Factory's, both are one folder higher). Original layout (cs.stanford.edu/people/dorarad/gqa):
testdev_balanced_questions.json (or questions1.2/...), images/.

Scored as GQA's eval.py scores the predictions that LLaVA writes for it (lower case, no final period): exact match;
questions that query are `open`, all others `binary`. Chance is what the best constant answer gets.
"""

import json
from pathlib import Path

from checkpoints.files import write_file
from config import UserError
from evals import WORD, first, open_scores, reading, rows, table

MAX_NEW_TOKENS = 128
PUBLISHED = ("all", "GQA")


def examples(data_dir):
    """[{"id", "image", "prompt", "label", "type": open or binary}] in file order."""
    folder = first(data_dir, "data/images", "images").relative_to(data_dir)
    name = "testdev_balanced_questions.json"
    file = first(
        data_dir, f"data/{name}", name, f"data/questions1.2/{name}", f"questions1.2/{name}"
    )
    found = {}
    for number, row in table(file).items():
        with reading(f"{file}:{number}"):
            kind = "open" if row["types"]["structural"] == "query" else "binary"
            found[number] = {
                "id": number,
                "image": f"{folder}/{row['imageId']}.jpg",
                "where": f"{file}:{number}",
            }
            found[number] |= {
                "prompt": row["question"] + WORD,
                "label": row["answer"],
                "type": kind,
            }
    llava = Path(data_dir) / "llava_gqa_testdev_balanced.jsonl"
    if not llava.exists():
        return list(found.values())
    asked = []
    for where, row in rows(llava):
        with reading(where):
            number, image = str(row["question_id"]), f"{folder}/{row['image']}"
            if number not in found:
                raise UserError(
                    where,
                    f"question {number} is not in {file.name}",
                    "take both of the same version",
                )
            asked.append(found[number] | {"image": image, "prompt": row["text"], "where": where})
    return asked


def prediction(answer):
    return answer.rstrip(".").lower()


def score(examples, answers):
    pairs = zip(examples, answers, strict=True)
    return open_scores(
        [(("all", e["type"]), prediction(a) == e["label"], {e["label"]: 1}) for e, a in pairs]
    )


def write(examples, answers, stem, data_dir):
    """The predictions as GQA's eval.py takes them."""
    file = Path(f"{stem}-testdev_balanced_predictions.json")
    made = [
        {"questionId": e["id"], "prediction": prediction(a)}
        for e, a in zip(examples, answers, strict=True)
    ]
    write_file(file, json.dumps(made))
    return [file]
