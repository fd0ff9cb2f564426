"""The moving demo world's held-out benchmark (moving.py): which moved first, which moved left, which way one moved.

Of each text, and of each frame between two moves, the file holds every answer equally often: chance is what anyone
reaches who sees no video, or only the middle of its three frames.
"""

from evals import first, grouped, reading, rows

MAX_NEW_TOKENS = 5  # two words and the end of the answer, with room for a wrong habit to show


def examples(data_dir):
    """[{"id", "image": None, "video" (relative to data_dir), "prompt", "label", "kind", "choices", "where"}] in file
    order, with the clips of one pair of objects as a "group"."""
    found = []
    for where, row in rows(first(data_dir, "benchmark/moving.jsonl")):
        with reading(where):
            names = {
                "id": f"moving-{row['question_id']}",
                "image": None,
                "video": f"videos/{row['video']}",
            }
            found.append(row | names | {"prompt": row["text"], "where": where})
    return found


def score(examples, answers):
    """{name: {"score" %, "chance" %, "n"}} of all and of each kind: the words, but for case and a final period."""
    return grouped(
        (
            ("moving", e["kind"]),
            answer.strip().lower().removesuffix(".") == e["label"],
            1 / len(e["choices"]),
        )
        for e, answer in zip(examples, answers, strict=True)
    )
