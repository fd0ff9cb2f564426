"""ScienceQA, test (Lu et al., 2022): multiple choice of school science, with and without a picture.

Files, in LLaVA's layout: llava_test_CQM-A.json, problems.json, pid_splits.json, images/test/. In
the original layout (data/scienceqa of github.com/lupantech/ScienceQA): the same without the first
file, pictures at images/test/ID/image.png.

Scored as LLaVA's eval_science_qa.py does it. `IMG`, the published number, are the questions with a
picture; the other names are those of ScienceQA's own evaluate_acc.py. Chance is 1 / number of
choices.

The trap: an answer must be the letter alone, or begin with it as in "B. dog", or hold exactly one
"The answer is B." with the period. "B." and "The answer is B" are wrong.
"""

from __future__ import annotations

import re
from pathlib import Path

from evals.files import errors_at, find_first, read_rows, read_table, read_values
from evals.options import LETTER, list_options
from evals.scores import Result, group_scores

MAX_NEW_TOKENS = 1024
PUBLISHED = ("IMG", "SQA-I")
UNREAD = "give no letter, and are wrong"
LETTERS = ("A", "B", "C", "D", "E")


def examples(data_dir):
    """Return the questions in the order of the file.

    Own keys: "choices": the texts; "names": the scores that the question counts in.
    """
    file = find_first(data_dir, "problems.json")
    problems = read_table(file)

    llava = Path(data_dir) / "llava_test_CQM-A.json"
    if llava.exists():
        return read_llava(llava, problems)

    # The original layout: prompts are made as LLaVA's converter makes them.
    found = []
    splits = find_first(data_dir, "pid_splits.json")
    for number in read_values(splits, part="test").values():
        number = str(number)
        where = f"{file}:{number}"
        with errors_at(where):
            problem = problems[number]
            text = problem.text("question") + list_options(problem.options("choices"))
            hint = problem.text("hint", default="")
            if hint:
                text = f"Context: {hint}\n{text}"
            image = problem.text("image", default="")
            if image:
                image = f"{number}/{image}"
            found.append(make_example(where, number, text, image, problem))
    return found


def read_llava(file, problems):
    """Return the questions of LLaVA's file, in its order and with its prompts."""
    found = []
    for where, row in read_rows(file):
        with errors_at(where):
            number = str(row.identifier("id"))
            problem = problems[number]
            first = row.rows("conversations", least=1)[0]
            text = first.text("value").replace("<image>", "").strip()
            image = row.file("image", default=None)
            found.append(make_example(where, number, text, image, problem))
    return found


def make_example(where, number, text, image, problem):
    """Return the example of a problem; image: its path in images/test, or None."""
    if image:
        image = f"images/test/{image}"
    else:
        image = None
    choices = problem.options("choices")
    right = problem.integer("answer", 0, min(len(choices), len(LETTERS)) - 1)
    known = {key: problem.text(key, default="") for key in ("hint", "image")}
    if not re.fullmatch(r"grade\d{1,2}", problem.text("grade")):
        raise problem.refuse("grade", "not grade1 to grade12")
    known |= {key: problem.text(key) for key in ("subject", "grade", "topic")}
    return {
        "id": number,
        "image": image,
        "prompt": text + LETTER,
        "label": LETTERS[right],
        "choices": choices,
        "names": group_names(known),
        "where": where,
    }


def group_names(problem):
    """Return the scores that a problem {"hint", "image", "subject", "grade", "topic"} counts in."""
    # By what the question comes with; it may be both.
    names = ["all"]
    if problem["hint"]:
        names.append("text")
    if problem["image"]:
        names.append("IMG")
    if len(names) == 1:
        names.append("no context")

    # By subject, grade and topic.
    names.append(problem["subject"])
    if int(problem["grade"].removeprefix("grade")) <= 6:
        names.append("grades 1-6")
    else:
        names.append("grades 7-12")
    names.append(problem["topic"])
    return names


def parse(answer):
    """Return the letter that an answer gives, or None."""
    if answer in LETTERS:
        return answer
    if answer[:1] in LETTERS and answer[1:3] == ". ":
        return answer[0]

    # The period stands for any character here, as in the official script.
    found = re.findall(r"The answer is ([A-Z]).", answer)
    if len(found) == 1:
        return found[0]
    return None


def unread(examples, answers):
    """Return how many answers give no letter."""
    return sum(parse(answer) is None for answer in answers)


def score(examples, answers):
    """Return the accuracy of each group of questions."""
    results = []
    for example, answer in zip(examples, answers, strict=True):
        right = parse(answer) == example["label"]
        chance = 1 / len(example["choices"])
        results.append(Result(example["names"], right, chance))
    return group_scores(results)
