"""TextVQA, validation 0.5.1: `textvqa` names Rosetta's OCR tokens in the prompt, as LLaVA does, `textvqa-plain` not.

LLaVA layout: llava_textvqa_val_v051_ocr.jsonl, TextVQA_0.5.1_val.json, train_images/. Original layout
(textvqa.org): TextVQA_0.5.1_val.json, TextVQA_Rosetta_OCR_v0.2_val.json, train_images/.

Scored as LLaVA's eval_textvqa.py: M4C's normalisation, accuracy over ten human answers. Chance is what the best
constant answer gets.
"""

from pathlib import Path

from config import UserError
from evals import WORD, first, open_scores, reading, rows, vqa

MAX_NEW_TOKENS = 128
PUBLISHED = ("all", "TextVQA")
OCR = "\nReference OCR token: "


def examples(data_dir, ocr=True):
    """[{"id", "image", "prompt", "label": ten answers}] in file order."""
    folder = first(data_dir, "train_images", "train_val_images/train_images").relative_to(data_dir)
    file, llava = (
        first(data_dir, "TextVQA_0.5.1_val.json"),
        Path(data_dir) / "llava_textvqa_val_v051_ocr.jsonl",
    )
    tokens = ocr_tokens(data_dir) if ocr and not llava.exists() else {}
    found = []
    for where, row in rows(file, part="data"):
        with reading(where):
            seen = OCR + ", ".join(tokens.get(row["image_id"], [])) if ocr else ""
            prompt = row["question"].capitalize() + seen + WORD
            found.append(
                {
                    "id": str(row["question_id"]),
                    "image": f"{folder}/{row['image_id']}.jpg",
                    "prompt": prompt,
                }
            )
            found[-1] |= {
                "label": row["answers"],
                "key": (row["image_id"], row["question"].lower()),
                "where": where,
            }
    if not llava.exists():
        return found
    known, asked = {example["key"]: example for example in found}, []
    for where, row in rows(llava):
        with reading(where):
            question, *rest = row["text"].split("\n")
            key = (
                row["question_id"],
                question.lower(),
            )  # the picture's id, as the official script looks it up
            if key not in known:
                raise UserError(
                    where, f"its question is not in {file.name}", "take both of the same version"
                )
            kept = [line for line in rest if ocr or not line.startswith(OCR.strip())]
            asked.append(known[key] | {"prompt": "\n".join([question, *kept]), "where": where})
            asked[-1]["image"] = f"{folder}/{row['image']}"
    return asked


def ocr_tokens(data_dir):
    found = {}
    for where, row in rows(first(data_dir, "TextVQA_Rosetta_OCR_v0.2_val.json"), part="data"):
        with reading(where):
            found[row["image_id"]] = row["ocr_tokens"]
    return found


def score(examples, answers):
    results = []
    for example, answer in zip(examples, answers, strict=True):
        humans = [vqa.m4c(text) for text in example["label"]]
        results.append((("all",), vqa.soft(vqa.m4c(answer), humans), vqa.credits(humans)))
    return open_scores(results)
