"""VQAv2: short answers to open questions. `vqav2` is test-dev, which only the server can score, `vqav2-val` val2014.

LLaVA layout: llava_vqav2_mscoco_test-dev2015.jsonl, llava_vqav2_mscoco_test2015.jsonl (the rows of the server file),
test2015/. Original layout (visualqa.org): v2_OpenEnded_mscoco_SPLIT_questions.json,
v2_mscoco_SPLIT_annotations.json where the answers are public, pictures in test2015/ or val2014/.

Scored as VQA's vqaEval.py scores the server file, whose answers M4C's processor has normalised before.
Chance is what the best constant answer gets.
"""

import json
from pathlib import Path

from checkpoints.files import write_file
from evals import WORD, first, open_scores, reading, rows, vqa

MAX_NEW_TOKENS = 128
PUBLISHED = ("all", "VQAv2")


def examples(data_dir, split="test-dev2015"):
    """[{"id", "image", "prompt", "label": ten answers or None, "question_id", "type"}] in file order."""
    pictures = split.replace("-dev", "")
    folder = first(data_dir, pictures)
    file = first(
        data_dir, f"llava_vqav2_mscoco_{split}.jsonl", f"v2_OpenEnded_mscoco_{split}_questions.json"
    )
    humans = annotations(Path(data_dir) / f"v2_mscoco_{split}_annotations.json")
    llava, found = file.suffix == ".jsonl", []
    for where, row in rows(file, part=None if llava else "questions"):
        with reading(where):
            number = row["question_id"]
            name = row["image"] if llava else f"COCO_{pictures}_{row['image_id']:012d}.jpg"
            text = row["text"] if llava else row["question"] + WORD
            label, kind = humans.get(number, (None, None))
            found.append(
                {
                    "id": str(number),
                    "image": f"{folder.name}/{name}",
                    "prompt": text,
                    "label": label,
                }
            )
            found[-1] |= {"type": kind, "question_id": number, "where": where}
    return found


def annotations(file):
    """{question id: (ten answers, type of answer)}, empty where the answers are not public."""
    found = {}
    for where, row in rows(file, part="annotations") if file.exists() else []:
        with reading(where):
            found[row["question_id"]] = [a["answer"] for a in row["answers"]], row["answer_type"]
    return found


def score(examples, answers):
    results = []
    for example, answer in zip(examples, answers, strict=True):
        if humans := example["label"]:
            normalise, humans = vqa.prepared(humans)
            right = vqa.soft(normalise(vqa.m4c(answer)), humans)
            results.append((("all", example["type"]), right, vqa.credits(humans)))
    return open_scores(results)


def write(examples, answers, stem, data_dir):
    """The file for the server: every question of test2015, with an empty answer where none was asked."""
    answered = {
        e["question_id"]: vqa.m4c(answer) for e, answer in zip(examples, answers, strict=True)
    }
    asked, whole = list(answered), Path(data_dir) / "llava_vqav2_mscoco_test2015.jsonl"
    if whole.exists():
        asked = [row["question_id"] for _, row in rows(whole)]
    elif (whole := Path(data_dir) / "v2_OpenEnded_mscoco_test2015_questions.json").exists():
        asked = [row["question_id"] for _, row in rows(whole, part="questions")]
    file = Path(f"{stem}-server.json")
    write_file(file, json.dumps([{"question_id": n, "answer": answered.get(n, "")} for n in asked]))
    return [file]
