"""The demo world's held-out benchmark (demo/world.py): does an object exist, what colour, shape,
count, relation.

Files: benchmark/SPLIT.jsonl, benchmark/text_only.json, images/, all written by
`python -m demo.world OUT`.

Every question has a finite set of possible answers, and the file holds each of them equally often:
1 / number of choices is what anyone reaches who does not look at the picture.

Existence is read as POPE reads it, so that its trap is here too (evals/pope.py). All other answers
must be the word itself, but for case and a final period.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints.fields import Fields
from checkpoints.files import read_json
from config import UserError
from evals.files import check_file, read_rows
from evals.pope import yes_or_no
from evals.scores import Result, group_scores

SPLITS = (
    "existence_random",
    "existence_popular",
    "existence_adversarial",
    "attributes",
    "unseen_sizes",
    "unseen_positions",
    "unseen_backgrounds",
    "unseen_objects",
)
MAX_NEW_TOKENS = 5  # one word and the end of the answer, with room for a wrong habit to show


def examples(data_dir):
    """Return the questions in the order of the files.

    Own keys: "kind", "choices", "split"; "objects", the (colour, shape) of those in the picture.
    """
    found = []
    for split in SPLITS:
        file = Path(data_dir) / "benchmark" / f"{split}.jsonl"
        if not file.is_file():
            fix = "write the data set with `python -m demo.world OUT`, give that OUT"
            raise UserError(file, "no such file", fix)

        for where, row in read_rows(file):
            example = {
                "id": f"{split}-{row.identifier('question_id')}",
                "image": f"images/{row.file('image')}",
                "prompt": row.text("text"),
                "label": row.text("label"),
                "kind": row.text("kind"),
                "choices": row.options("choices"),
                "split": split,
                "objects": [(o.text("colour"), o.text("shape")) for o in row.rows("scene")],
                "where": where,
            }
            found.append(example)
    return found


def score(examples, answers):
    """Return the scores of each split, and of each kind of the attributes."""
    results = []
    for example, answer in zip(examples, answers, strict=True):
        # The kinds of the attributes have scores of their own.
        groups = [example["split"]]
        if example["split"] == "attributes":
            groups.append(example["kind"])
        results.append(Result(groups, is_right(example, answer), 1 / len(example["choices"])))
    scores = group_scores(results)

    # The splits come first, then the kinds in the order of their first question.
    ordered = {split: scores[split] for split in SPLITS if split in scores}
    ordered |= scores
    for of_group in ordered.values():
        of_group["score"] = round(of_group["score"], 2)
        of_group["chance"] = round(of_group["chance"], 2)
    return ordered


def is_right(example, answer):
    """Return whether an answer is the true one."""
    if example["kind"] == "existence":
        return yes_or_no(answer) == example["label"]
    return answer.strip().lower().removesuffix(".") == example["label"]


def text_only(data_dir):
    """Return {name: %} that the best answer to the words alone reaches, as demo/world.py has it."""
    file = Path(data_dir) / "benchmark" / "text_only.json"
    check_file(file)
    fields = Fields(read_json(file), file, fix="write the data set again")
    return {name: fields.number(name, 0, 100) for name in fields.values}
