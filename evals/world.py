"""The demo world's held-out benchmark (world.py): does an object exist, what colour, shape, count, relation.

Every question has a finite set of possible answers, and the file holds each of them equally often: 1 / (number
of choices) is what anyone reaches who does not look at the picture.
"""

import json
from pathlib import Path

from config import UserError
from evals import reading, rows
from evals.pope import yes_or_no

SPLITS = ("existence_random", "existence_popular", "existence_adversarial", "attributes")
MAX_NEW_TOKENS = 5  # one word and the end of the answer, with room for a wrong habit to show


def examples(data_dir):
    """[{"id", "image" (relative to data_dir), "prompt", "label", "kind", "choices", "split"}] in file order."""
    found = []
    for split in SPLITS:
        file = Path(data_dir) / "benchmark" / f"{split}.jsonl"
        if not file.is_file():
            raise UserError(
                file,
                "no such file",
                "write the data set with `python -m demo.world OUT`, give that OUT",
            )
        for where, row in rows(file):
            with reading(where):
                names = {
                    "id": f"{split}-{row['question_id']}",
                    "image": f"images/{row['image']}",
                    "split": split,
                }
                found.append(row | names | {"prompt": row["text"], "where": where})
    return found


def score(examples, answers):
    """{name: {"score" %, "chance" %, "n"}} for the three existence splits, all attributes, and each of their kinds."""
    groups = {split: [] for split in SPLITS}
    for example, answer in zip(examples, answers, strict=True):
        right = is_right(example, answer)
        for name in {example["split"], example["kind"]} - {"existence"}:
            groups.setdefault(name, []).append((right, 1 / len(example["choices"])))
    return {
        name: {
            "score": round(100 * sum(right for right, _ in group) / len(group), 2),
            "chance": round(100 * sum(chance for _, chance in group) / len(group), 2),
            "n": len(group),
        }
        for name, group in groups.items()
        if group
    }


def is_right(example, answer):
    """Existence is read as POPE reads it; the others must be the word itself, but for case and a final period."""
    if example["kind"] == "existence":
        return yes_or_no(answer) == example["label"]
    return answer.strip().lower().removesuffix(".") == example["label"]


def text_only(data_dir):
    """{name: %} that the best answer to the words alone reaches, as world.py computed it."""
    file = Path(data_dir) / "benchmark" / "text_only.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(file, f"cannot be read: {error}", "write the data set again") from None
