"""POPE on COCO (Li et al., 2023): is there such an object in the picture?

Each of three splits asks 3000 questions, half of them with the answer no. They differ in which
absent objects are asked for: random ones, the most frequent, or those that mostly stand beside what
the picture shows ("adversarial"). A model that hallucinates says yes too often.

Files, in LLaVA's layout: llava_pope_test.jsonl, coco/coco_pope_SPLIT.json, val2014/. In the
original layout (output/coco of github.com/AoiDragon/POPE): coco_pope_SPLIT.json, val2014/.

Scored as POPE's evaluate.py does it. The published number is the mean F1 of the splits. Chance is
what always saying yes gets.

The trap: only the first sentence counts, and it means yes unless it has the word No, no or not.
So "NO", "nothing" and an empty answer are a yes. How many answers said neither is printed beside
the official scores, as percent of each split: they are in "says yes", too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from config import UserError
from evals.files import errors_at, find_first, read_rows
from evals.options import WORD
from evals.scores import mean_score

MAX_NEW_TOKENS = 128
PUBLISHED = ("F1", "POPE")
SPLITS = ("random", "popular", "adversarial")
UNREAD = "say neither yes nor no, and count as yes"
LABELS = ("yes", "no")  # any other label of a row is an error
SAME_VERSION = "take both of the same version"

# What is printed of a split, in this order: the key in `counts`, and the name of the score.
PRINTED = {
    "f1": "F1",
    "acc": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "yes_ratio": "says yes",
}


def examples(data_dir):
    """Return the questions, split after split. Own key: "split"."""
    # LLaVA's file, if it is there, decides the prompts; POPE's own files have the labels.
    llava = Path(data_dir) / "llava_pope_test.jsonl"
    asked = None
    if llava.exists():
        asked = read_llava(llava)

    found = []
    for split in SPLITS:
        file = find_first(data_dir, f"coco/coco_pope_{split}.json", f"coco_pope_{split}.json")
        questions = read_split(file, split)
        if asked:
            questions = ask_as_llava(questions, asked[split], llava, file, split)
        found += questions
    return found


def read_split(file, split):
    """Return the questions of a split as POPE publishes them, with a prompt as LLaVA writes it."""
    found = []
    for where, row in read_rows(file, lines=True):
        found.append(
            {
                "id": f"{split}-{row.identifier('question_id')}",
                "image": f"val2014/{row.file('image')}",
                "prompt": row.text("text") + WORD,
                "label": row.text("label", LABELS),
                "split": split,
                "where": where,
            }
        )
    return found


@dataclass(frozen=True)
class LlavaRow:
    """What LLaVA's file says of a question: the picture, and the prompt word for word."""

    where: str
    image: str
    text: str


def read_llava(file):
    """Return {split: rows of LLaVA's file}, in its order."""
    asked = {split: [] for split in SPLITS}
    for where, row in read_rows(file):
        with errors_at(where):
            of_split = asked[row.text("category")]
            of_split.append(LlavaRow(where, row.file("image"), row.text("text")))
    return asked


def ask_as_llava(questions, rows, llava, file, split):
    """Return the questions of a split with LLaVA's prompts.

    LLaVA's ids are others: question and row are matched by their order, as its script does it.
    Raise UserError if they do not belong together.
    """
    if len(rows) != len(questions):
        what = f"{len(rows)} questions of {split}, but {file.name} has {len(questions)}"
        raise UserError(llava, what, SAME_VERSION)

    found = []
    for question, row in zip(questions, rows, strict=True):
        same_picture = question["image"] == f"val2014/{row.image}"
        same_text = row.text.split("\n")[0] in question["prompt"]
        if not (same_picture and same_text):
            raise UserError(row.where, f"not the question of {question['where']}", SAME_VERSION)
        found.append(question | {"prompt": row.text, "where": row.where})
    return found


def yes_or_no(answer):
    """Return "no" if the first sentence has the word No, no or not, else "yes" (evaluate.py)."""
    sentence = answer.split(".")[0].replace(",", "")
    words = sentence.split(" ")
    if "No" in words or "no" in words or "not" in words:
        return "no"
    return "yes"


def unread(examples, answers):
    """Return how many answers say neither yes nor no: `yes_or_no` takes them for a yes."""
    return sum(says_neither(answer) for answer in answers)


def says_neither(answer):
    """Return whether the first sentence of an answer has no yes, no or not, in any case."""
    words = re.findall(r"[a-z]+", answer.split(".")[0].lower())
    return not any(word in ("yes", "no", "not") for word in words)


def counts(said, labels):
    """Return the numbers that POPE's evaluate.py prints; a ratio of nothing is 0.

    The keys: TP, FP, TN, FN (a positive is a yes), acc, precision, recall, f1, yes_ratio.
    """
    # True and false positives and negatives.
    pairs = list(zip(said, labels, strict=True))
    tp = pairs.count(("yes", "yes"))
    fp = pairs.count(("yes", "no"))
    tn = pairs.count(("no", "no"))
    fn = pairs.count(("no", "yes"))

    # The denominators of at least 1 make a ratio of nothing 0.
    precision = tp / max(tp + fp, 1)
    recall = tp / max(tp + fn, 1)
    f1 = 2 * precision * recall / ((precision + recall) or 1)
    return {
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "acc": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": (tp + fp) / len(pairs),
    }


def score(examples, answers):
    """Return the mean F1, and for each split F1, accuracy, precision, recall and share of yes.

    Of each split also the share of answers that say neither.
    """
    scores = {}
    f1_scores = {}
    for split in SPLITS:
        said = []
        labels = []
        neither = 0
        for example, answer in zip(examples, answers, strict=True):
            if example["split"] == split:
                said.append(yes_or_no(answer))
                labels.append(example["label"])
                neither += says_neither(answer)
        if not labels:
            continue

        # Chance is the same split, answered with yes throughout.
        reached = counts(said, labels)
        always_yes = counts(["yes"] * len(labels), labels)
        for key, name in PRINTED.items():
            scores[f"{split} {name}"] = {
                "score": 100 * reached[key],
                "chance": 100 * always_yes[key],
                "n": len(labels),
            }
        scores[f"{split} says neither"] = {
            "score": 100 * neither / len(labels),
            "chance": 0.0,
            "n": len(labels),
        }
        f1_scores[split] = scores[f"{split} F1"]
    return {"F1": mean_score(f1_scores)} | scores
