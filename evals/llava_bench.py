"""LLaVA-Bench, In-the-Wild (Liu et al., 2023): 60 open questions about 24 pictures, judged by a
language model beside GPT-4's answers.

Both layouts are the data set as published (liuhaotian/llava-bench-in-the-wild): questions.jsonl,
context.jsonl, answers_gpt4.jsonl, images/.

The answers are written in LLaVA's format. With --judge they are judged as LLaVA's
eval_gpt_review_bench.py does it, its reviews are kept, and they are summed up as
summarize_gpt_review.py does it: 100 x mean score / mean score of GPT-4's answers. The papers' judge
is gpt-4-0314.

The trap: a review that does not begin with two scores counts -1 for both, as there.
"""

from __future__ import annotations

import math
from pathlib import Path

from config import UserError
from evals.files import errors_at, find_first, read_rows, write_json_lines

MAX_NEW_TOKENS = 1024
PUBLISHED = ("all", {"LLaVA-1.5-7B": 65.4, "LLaVA-1.5-13B": 72.5})

# The official prompt (rule.json), to the letter. It is the same for all categories.
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
RULE = """\
We would like to request your feedback on the performance of two AI assistants in response to \
the user question displayed above. The user asks the question on observing an image. For your \
reference, the visual content in the image is represented with a few sentences describing the \
image. \n\
Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each \
assistant receives an overall score on a scale of 1 to 10, where a higher score indicates \
better overall performance.
Please first output a single line containing only two values indicating the scores for \
Assistant 1 and 2, respectively. The two scores are separated by a space.
In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding \
any potential bias and ensuring that the order in which the responses were presented does not \
affect your judgment."""
CATEGORIES = ("conv", "detail", "complex")
TEMPERATURE = 0.2
REVIEW_TOKENS = 1024
UNREAD = [-1, -1]


def examples(data_dir):
    """Return the questions in the order of the file; "label" is GPT-4's answer.

    Own keys: "category"; "context": what the picture shows, in words; "question_id".
    """
    find_first(data_dir, "images")

    # What the pictures show, in words: the judge sees no pictures.
    contexts = {}
    for _, row in read_rows(find_first(data_dir, "context.jsonl")):
        if isinstance(row.values.get("caption"), list):
            caption = "\n".join(row.texts("caption"))
        else:
            caption = row.text("caption")
        contexts[row.file("image")] = caption

    # GPT-4's answers, which the judge compares with.
    reference = {}
    for _, row in read_rows(find_first(data_dir, "answers_gpt4.jsonl")):
        reference[row.identifier("question_id")] = row.text("text")

    found = []
    for where, row in read_rows(find_first(data_dir, "questions.jsonl")):
        with errors_at(where):
            number = row.identifier("question_id")
            image = row.file("image")
            category = row.text("category")
            if category not in CATEGORIES:
                what = f"category {category!r} has no rule"
                raise UserError(where, what, f"one of {', '.join(CATEGORIES)}")
            found.append(
                {
                    "id": str(number),
                    "image": f"images/{image}",
                    "prompt": row.text("text"),
                    "label": reference[number],
                    "context": contexts[image],
                    "category": category,
                    "question_id": number,
                    "where": where,
                }
            )
    return found


def write(examples, answers, stem, data_dir):
    """Write the answers as LLaVA's scripts take them."""
    rows = []
    for example, answer in zip(examples, answers, strict=True):
        rows.append(
            {
                "question_id": example["question_id"],
                "prompt": example["prompt"],
                "text": answer,
                "answer_id": example["id"],
                "model_id": Path(stem).parent.parent.name,
                "metadata": {},
            }
        )
    file = Path(f"{stem}-answers.jsonl")
    write_json_lines(file, rows)
    return [file]


def content(example, answer):
    """Return what the judge reads: GPT-4 is assistant 1, the model assistant 2."""
    return (
        f"[Context]\n{example['context']}\n\n"
        f"[Question]\n{example['prompt']}\n\n"
        f"[Assistant 1]\n{example['label']}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{RULE}\n\n"
    )


def parse(review):
    """Return the two scores that a review begins with, else [-1, -1]."""
    pair = review.split("\n")[0].replace(",", " ").split(" ")
    if len(pair) != 2:
        return UNREAD
    try:
        scores = [float(pair[0]), float(pair[1])]
    except ValueError:
        return UNREAD

    # "nan" is a number to Python, and would make the mean of all reviews one.
    if not all(math.isfinite(score) for score in scores):
        return UNREAD
    return scores


def summary(reviews):
    """Return the scores of all reviews and of each category.

    reviews: [(category, [GPT-4's score, the model's])]. A score has two keys more: "gpt4" and
    "model", the means of both times ten.
    """
    groups = {"all": [pair for _, pair in reviews]}
    for category, pair in reviews:
        groups.setdefault(category, []).append(pair)

    scores = {}
    for name, pairs in groups.items():
        # The means are rounded before they are divided, as officially.
        gpt4 = round(sum(pair[0] for pair in pairs) / len(pairs), 3)
        model = round(sum(pair[1] for pair in pairs) / len(pairs), 3)
        relative = 0.0
        if gpt4:
            relative = round(model / gpt4 * 100, 1)
        scores[name] = {
            "score": relative,
            "chance": None,
            "n": len(pairs),
            "gpt4": round(gpt4 * 10, 1),
            "model": round(model * 10, 1),
        }
    return scores


def judge(examples, answers, ask, stem, data_dir):
    """Return `summary` of the judge's reviews, and write them to STEM-reviews.jsonl."""
    rows = []
    reviews = []
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True), 1):
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": content(example, answer)},
        ]
        review = ask(messages, TEMPERATURE, REVIEW_TOKENS)
        pair = parse(review)
        reviews.append((example["category"], pair))
        rows.append(
            {
                "id": number,
                "question_id": example["question_id"],
                "category": f"llava_bench_{example['category']}",
                "content": review,
                "tuple": pair,
            }
        )
    write_json_lines(Path(f"{stem}-reviews.jsonl"), rows)
    return summary(reviews)
