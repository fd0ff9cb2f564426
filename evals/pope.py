"""POPE on COCO: is there such an object? Three splits differ in which absent objects are asked for.

LLaVA layout: llava_pope_test.jsonl, coco/coco_pope_SPLIT.json, val2014/. Original layout (AoiDragon/POPE,
output/coco): coco_pope_SPLIT.json, val2014/.

Scored as POPE's evaluate.py. The published number is the mean F1 of the splits. Chance is always saying yes.
"""

from pathlib import Path

from config import UserError
from evals import WORD, first, reading, rows

MAX_NEW_TOKENS = 128
PUBLISHED = ("F1", "POPE")
SAYS = {"yes": "yes", "no": "no"}
SPLITS = ("random", "popular", "adversarial")


def examples(data_dir):
    """[{"id", "image", "prompt", "label": yes or no, "split"}], split after split."""
    llava, found = Path(data_dir) / "llava_pope_test.jsonl", []
    asked = {split: [] for split in SPLITS}
    for where, row in rows(llava) if llava.exists() else []:
        with reading(where):
            asked[row["category"]].append((where, row["image"], row["text"]))
    for split in SPLITS:
        file, here = first(data_dir, f"coco/coco_pope_{split}.json", f"coco_pope_{split}.json"), []
        for where, row in rows(file, lines=True):
            with reading(where):
                here.append(
                    {
                        "id": f"{split}-{row['question_id']}",
                        "image": f"val2014/{row['image']}",
                        "where": where,
                    }
                )
                here[-1] |= {
                    "prompt": row["text"] + WORD,
                    "split": split,
                    "label": SAYS[row["label"]],
                }
        if llava.exists():  # matched row by row, as the official script does
            if len(asked[split]) != len(here):
                what = f"{len(asked[split])} questions of {split}, but {file.name} has {len(here)}"
                raise UserError(llava, what, "take both of the same version")
            for example, (where, image, text) in zip(here, asked[split], strict=True):
                if (
                    example["image"] != f"val2014/{image}"
                    or text.split("\n")[0] not in example["prompt"]
                ):
                    raise UserError(
                        where,
                        f"not the question of {example['where']}",
                        "take both of the same version",
                    )
                example |= {"prompt": text, "where": where}
        found += here
    return found


def yes_or_no(answer):
    """POPE's evaluate.py: of the first sentence, "no" if it has the word No, no or not, else "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"


def counts(said, labels):
    """{"TP", "FP", "TN", "FN", "acc", "precision", "recall", "f1", "yes_ratio"}; a ratio of nothing is 0."""
    pairs = list(zip(said, labels, strict=True))
    tp, fp, tn, fn = (
        pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"))
    )
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    f1 = 2 * precision * recall / ((precision + recall) or 1)
    return {"TP": tp, "FP": fp, "TN": tn, "FN": fn, "acc": (tp + tn) / len(pairs), "precision": precision,
            "recall": recall, "f1": f1, "yes_ratio": (tp + fp) / len(pairs)}  # fmt: skip


def score(examples, answers):
    scores, f1 = {}, []
    for split in SPLITS:
        pairs = [
            (yes_or_no(a), e["label"])
            for e, a in zip(examples, answers, strict=True)
            if e["split"] == split
        ]
        if not pairs:
            continue
        said, labels = zip(*pairs, strict=True)
        got, blind = counts(said, labels), counts(["yes"] * len(labels), labels)
        for key, name in (("f1", "F1"), ("acc", "accuracy"), ("precision", "precision"), ("recall", "recall"),
                          ("yes_ratio", "says yes")):  # fmt: skip
            scores[f"{split} {name}"] = {
                "score": 100 * got[key],
                "chance": 100 * blind[key],
                "n": len(pairs),
            }
        f1.append(scores[f"{split} F1"])
    mean = {key: sum(s[key] for s in f1) / len(f1) for key in ("score", "chance")}
    return {"F1": mean | {"n": sum(s["n"] for s in f1)}} | scores
