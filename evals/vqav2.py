"""VQAv2 (Goyal et al., 2017): short answers to open questions about COCO's pictures.

The task `vqav2` is test-dev, which only the benchmark's server can score; `vqav2-val` is val2014.

Files, in LLaVA's layout: llava_vqav2_mscoco_test-dev2015.jsonl, test2015/, and
llava_vqav2_mscoco_test2015.jsonl, which lists the rows of the server's file. In the original layout
(visualqa.org): v2_OpenEnded_mscoco_SPLIT_questions.json, v2_mscoco_SPLIT_annotations.json where the
answers are public, pictures in test2015/ or val2014/.

Scored as VQA's vqaEval.py scores the server's file: the soft accuracy over ten human answers
(evals/vqa.py). Chance is what the best constant answer gets.

The trap: an answer is normalised twice, first by M4C's processor, with which LLaVA writes the
server's file, then by the scorer. The scorer does so only where the ten humans differ: where all
ten said yes, Yes is right only because M4C's processor has written it in lower case.
"""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints.files import write_file
from evals import vqa
from evals.files import find_first, read_rows
from evals.options import WORD
from evals.scores import OpenResult, open_scores

MAX_NEW_TOKENS = 128
PUBLISHED = ("all", "VQAv2")


def examples(data_dir, split="test-dev2015"):
    """Return the questions in the order of the file.

    "label" has the ten answers, or is None. Own keys: "question_id"; "type": of the answer.
    """
    # The pictures of test-dev are some of test2015.
    pictures = split.replace("-dev", "")
    folder = find_first(data_dir, pictures)
    file = find_first(
        data_dir,
        f"llava_vqav2_mscoco_{split}.jsonl",
        f"v2_OpenEnded_mscoco_{split}_questions.json",
    )
    answers = read_annotations(Path(data_dir) / f"v2_mscoco_{split}_annotations.json")

    is_llava = file.suffix == ".jsonl"
    if is_llava:
        rows = read_rows(file)
    else:
        rows = read_rows(file, part="questions")

    found = []
    for where, row in rows:
        number = row.identifier("question_id")
        if is_llava:
            image = row.file("image")
            prompt = row.text("text")
        else:
            image = f"COCO_{pictures}_{row.integer('image_id', 0, 10**12 - 1):012d}.jpg"
            prompt = row.text("question") + WORD
        label, kind = answers.get(number, (None, None))
        found.append(
            {
                "id": str(number),
                "image": f"{folder.name}/{image}",
                "prompt": prompt,
                "label": label,
                "type": kind,
                "question_id": number,
                "where": where,
            }
        )
    return found


def read_annotations(file):
    """Return {question id: (ten answers, type of answer)}, {} where they are not public."""
    if not file.exists():
        return {}
    found = {}
    for _, row in read_rows(file, part="annotations"):
        humans = [answer.words("answer") for answer in row.rows("answers", least=1)]
        found[row.identifier("question_id")] = humans, row.text("answer_type")
    return found


def score(examples, answers):
    """Return the soft accuracy of all questions and of each type; {} without human answers."""
    results = []
    for example, answer in zip(examples, answers, strict=True):
        if not example["label"]:
            continue
        normalise, humans = vqa.prepare(example["label"])
        said = normalise(vqa.m4c(answer))
        credit = vqa.soft_accuracy(said, humans)
        groups = ("all", example["type"])
        results.append(OpenResult(groups, credit, vqa.credit_of(humans)))
    return open_scores(results)


def write(examples, answers, stem, data_dir):
    """Write the server's file: all questions of test2015, empty answers to those not asked here."""
    # The server takes answers as M4C's processor has them.
    answered = {}
    for example, answer in zip(examples, answers, strict=True):
        answered[example["question_id"]] = vqa.m4c(answer)

    # It also wants a row for each question of test2015, of which test-dev is a part.
    llava = Path(data_dir) / "llava_vqav2_mscoco_test2015.jsonl"
    original = Path(data_dir) / "v2_OpenEnded_mscoco_test2015_questions.json"
    if llava.exists():
        numbers = [row.identifier("question_id") for _, row in read_rows(llava)]
    elif original.exists():
        rows = read_rows(original, part="questions")
        numbers = [row.identifier("question_id") for _, row in rows]
    else:
        numbers = list(answered)

    rows = []
    for number in numbers:
        rows.append({"question_id": number, "answer": answered.get(number, "")})
    file = Path(f"{stem}-server.json")
    write_file(file, json.dumps(rows))
    return [file]
