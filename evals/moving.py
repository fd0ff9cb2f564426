"""The moving demo world's held-out benchmark (demo/moving.py): which moved first, which moved left,
which way one moved.

Files: benchmark/moving.jsonl, videos/, both written by `python -m demo.moving OUT`.

Of each text, and of each frame between two moves, the file holds every answer equally often: chance
is what anyone reaches who sees no video, or only the middle of its three frames. An answer must be
the words themselves, but for case and a final period.
"""

from __future__ import annotations

from evals.files import find_first, read_rows
from evals.scores import Result, group_scores

MAX_NEW_TOKENS = 5  # two words and the end of the answer, with room for a wrong habit to show


def examples(data_dir):
    """Return the questions in the order of the file.

    Own keys: "kind", "choices". The clips of one pair of objects are a "group".
    """
    found = []
    for where, row in read_rows(find_first(data_dir, "benchmark/moving.jsonl")):
        example = {
            "id": f"moving-{row.identifier('question_id')}",
            "image": None,
            "video": f"videos/{row.file('video')}",
            "prompt": row.text("text"),
            "label": row.text("label"),
            "kind": row.text("kind"),
            "choices": row.options("choices"),
            "group": row.identifier("group"),
            "where": where,
        }
        found.append(example)
    return found


def score(examples, answers):
    """Return the accuracy of all questions and of each kind."""
    results = []
    for example, answer in zip(examples, answers, strict=True):
        right = answer.strip().lower().removesuffix(".") == example["label"]
        chance = 1 / len(example["choices"])
        results.append(Result(("moving", example["kind"]), right, chance))
    return group_scores(results)
