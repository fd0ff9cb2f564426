"""SEED-Bench, its image part: multiple choice in nine kinds of understanding. Its video questions are left out.

LLaVA layout: llava-seed-bench.jsonl, SEED-Bench.json, SEED-Bench-image/. Original layout (AILab-CVC/SEED-Bench):
the same without the first file.

Scored as LLaVA's convert_seed_for_submission.py: the answer must be the letter and nothing else. Chance is 1 / 4.
"""

import json
from pathlib import Path

from checkpoints.files import write_file
from evals import LETTER, first, grouped, lettered, reading, rows, table

MAX_NEW_TOKENS = 128
PUBLISHED = ("all", {"LLaVA-1.5-7B": 66.1, "LLaVA-1.5-13B": 68.2})


def examples(data_dir):
    """[{"id", "image", "prompt", "label": letter, "kind", "question_id"}] in file order."""
    file, llava = first(data_dir, "SEED-Bench.json"), Path(data_dir) / "llava-seed-bench.jsonl"
    kinds = {number: name for name, number in table(file, part="question_type").items()}
    first(data_dir, "SEED-Bench-image")
    prompts, found = {}, []
    for where, row in rows(llava) if llava.exists() else []:
        with reading(where):
            prompts[str(row["question_id"])] = where, row["image"], row["text"]
    for where, row in rows(file, part="questions"):
        with reading(where):
            if row["data_type"] != "image":
                continue
            number, choices = (
                str(row["question_id"]),
                [row[f"choice_{letter}"] for letter in "abcd"],
            )
            plain = (
                where,
                f"SEED-Bench-image/{row['data_id']}",
                row["question"] + lettered(choices) + LETTER,
            )
            where, image, text = prompts[number] if prompts else plain
            found.append(
                {
                    "id": number,
                    "image": image,
                    "prompt": text,
                    "label": row["answer"],
                    "where": where,
                }
            )
            found[-1] |= {"kind": kinds[row["question_type_id"]], "question_id": row["question_id"]}
    return found


def score(examples, answers):
    pairs = zip(examples, answers, strict=True)
    return grouped((("all", e["kind"]), a == e["label"], 1 / 4) for e, a in pairs)


def write(examples, answers, stem, data_dir):
    """The predictions as the leaderboard takes them."""
    file = Path(f"{stem}-predictions.jsonl")
    made = [
        {"question_id": e["question_id"], "prediction": a}
        for e, a in zip(examples, answers, strict=True)
    ]
    write_file(file, "".join(json.dumps(row) + "\n" for row in made))
    return [file]
