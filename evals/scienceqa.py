"""ScienceQA, test: multiple choice with and without a picture; `IMG` are those with one, the published number.

LLaVA layout: llava_test_CQM-A.json, problems.json, pid_splits.json, images/test/. Original layout
(lupantech/ScienceQA, data/scienceqa): the same without the first file, pictures at images/test/ID/image.png.

Scored as LLaVA's eval_science_qa.py: the letter alone, `X. ...`, or exactly one "The answer is X." Anything else is
wrong. The other names are those of ScienceQA's own evaluate_acc.py. Chance is 1 / number of choices.
"""

import re
from pathlib import Path

from evals import LETTER, first, grouped, lettered, reading, rows, table

MAX_NEW_TOKENS = 1024
PUBLISHED = ("IMG", "SQA-I")
LETTERS = ("A", "B", "C", "D", "E")


def examples(data_dir):
    """[{"id", "image" or None, "prompt", "label": letter, "choices", "names": groups it counts in}] in file order."""
    file, llava, found = (
        first(data_dir, "problems.json"),
        Path(data_dir) / "llava_test_CQM-A.json",
        [],
    )
    problems = table(file)
    if llava.exists():
        asked = rows(llava)
    else:
        asked = [
            (f"{file}:{number}", number)
            for _, number in rows(first(data_dir, "pid_splits.json"), part="test")
        ]
    for where, row in asked:
        with reading(where):
            number = row["id"] if llava.exists() else row
            problem = problems[number]
            if llava.exists():
                image, text = (
                    row.get("image"),
                    row["conversations"][0]["value"].replace("<image>", "").strip(),
                )
            else:
                image = problem["image"] and f"{number}/{problem['image']}"
                text = f"Context: {problem['hint']}\n" * bool(problem["hint"]) + problem["question"]
                text += lettered(problem["choices"])
            image, label = image and f"images/test/{image}", LETTERS[problem["answer"]]
            found.append(
                {
                    "id": number,
                    "image": image,
                    "prompt": text + LETTER,
                    "label": label,
                    "where": where,
                }
            )
            found[-1] |= {"choices": problem["choices"], "names": names(problem)}
    return found


def names(problem):
    grade = "grades 1-6" if int(problem["grade"].removeprefix("grade")) <= 6 else "grades 7-12"
    context = [
        name for name, has in (("text", problem["hint"]), ("IMG", problem["image"])) if has
    ] or ["no context"]
    return ["all", *context, problem["subject"], grade, problem["topic"]]


def parse(answer):
    """The letter that an answer gives, or None."""
    if answer in LETTERS or (answer[:1] in LETTERS and answer[1:3] == ". "):
        return answer[0]
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else None


def score(examples, answers):
    pairs = zip(examples, answers, strict=True)
    return grouped((e["names"], parse(a) == e["label"], 1 / len(e["choices"])) for e, a in pairs)
