"""TextVQA, validation 0.5.1 (Singh et al., 2019): questions about what is written in a picture.

The task `textvqa` names in the prompt the words that Rosetta's OCR found in the picture, as LLaVA
does; `textvqa-plain` does not.

Files, in LLaVA's layout: llava_textvqa_val_v051_ocr.jsonl, TextVQA_0.5.1_val.json, train_images/.
In the original layout (textvqa.org): TextVQA_0.5.1_val.json, train_images/, and for `textvqa`
TextVQA_Rosetta_OCR_v0.2_val.json.

Scored as LLaVA's eval_textvqa.py does it: M4C's normalisation of answer and truth, then the soft
accuracy over ten human answers (evals/vqa.py). Chance is what the best constant answer gets.

The trap: in LLaVA's file a row's question_id is the id of the picture, so that two questions about
one picture have the same. A question is known by picture and text, in lower case.
"""

from __future__ import annotations

from pathlib import Path

from config import UserError
from evals import vqa
from evals.files import errors_at, find_first, read_rows
from evals.options import WORD
from evals.scores import OpenResult, open_scores

MAX_NEW_TOKENS = 128
PUBLISHED = ("all", "TextVQA")
OCR = "\nReference OCR token: "


def examples(data_dir, ocr=True):
    """Return the questions in the order of the file; "label" has the ten answers.

    ocr: whether the prompt names what OCR found. Own key: "key", the picture and the question.
    """
    folder = find_first(data_dir, "train_images", "train_val_images/train_images")
    folder = folder.relative_to(data_dir)
    file = find_first(data_dir, "TextVQA_0.5.1_val.json")
    llava = Path(data_dir) / "llava_textvqa_val_v051_ocr.jsonl"

    # LLaVA's file has the words in its prompts already.
    tokens = {}
    if ocr and not llava.exists():
        tokens = read_ocr(find_first(data_dir, "TextVQA_Rosetta_OCR_v0.2_val.json"))

    found = read_questions(file, folder, tokens, ocr)
    if llava.exists():
        return ask_as_llava(found, llava, file, folder, ocr)
    return found


def read_questions(file, folder, tokens, ocr):
    """Return the questions of TextVQA's own file, with prompts as LLaVA writes them."""
    found = []
    for where, row in read_rows(file, part="data"):
        question = row.text("question")
        picture = row.identifier("image_id")
        prompt = question.capitalize()
        if ocr:
            prompt += OCR + ", ".join(tokens.get(picture, []))
        found.append(
            {
                "id": str(row.identifier("question_id")),
                "image": f"{folder}/{picture}.jpg",
                "prompt": prompt + WORD,
                "label": row.texts("answers", least=1),
                "key": (picture, question.lower()),
                "where": where,
            }
        )
    return found


def read_ocr(file):
    """Return {picture's id: words that OCR found}."""
    found = {}
    for _, row in read_rows(file, part="data"):
        found[row.identifier("image_id")] = row.texts("ocr_tokens")
    return found


def ask_as_llava(found, llava, file, folder, ocr):
    """Return the questions of LLaVA's file, in its order and with its prompts."""
    known = {example["key"]: example for example in found}

    asked = []
    for where, row in read_rows(llava):
        with errors_at(where):
            question, *rest = row.text("text").split("\n")
            key = (
                row.identifier("question_id"),
                question.lower(),
            )  # the picture's id: see the trap above
            if key not in known:
                what = f"its question is not in {file.name}"
                raise UserError(where, what, "take both of the same version")

            # LLaVA's prompt has a line of OCR tokens, which `textvqa-plain` does not show.
            if not ocr:
                rest = [line for line in rest if not line.startswith(OCR.strip())]
            changes = {
                "prompt": "\n".join([question, *rest]),
                "image": f"{folder}/{row.file('image')}",
                "where": where,
            }
            asked.append(known[key] | changes)
    return asked


def score(examples, answers):
    """Return the soft accuracy of all questions."""
    results = []
    for example, answer in zip(examples, answers, strict=True):
        # Both sides are normalised, in contrast to VQAv2.
        humans = [vqa.m4c(text) for text in example["label"]]
        credit = vqa.soft_accuracy(vqa.m4c(answer), humans)
        results.append(OpenResult(("all",), credit, vqa.credit_of(humans)))
    return open_scores(results)
