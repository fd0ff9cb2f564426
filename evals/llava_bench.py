"""LLaVA-Bench (In-the-Wild): 60 open questions about 24 pictures, judged by a language model beside GPT-4's answers.

Both layouts are the data set as published (liuhaotian/llava-bench-in-the-wild): questions.jsonl, context.jsonl,
answers_gpt4.jsonl, images/.

The answers are written in LLaVA's format. With --judge they are judged as eval_gpt_review_bench.py does it, its
reviews kept, and summed up as summarize_gpt_review.py does: 100 x mean score / mean score of GPT-4's answers. A
review that does not begin with two scores counts -1 for both, as there. The papers' judge is gpt-4-0314.
"""

import json
from pathlib import Path

from checkpoints.files import write_file
from config import UserError
from evals import first, reading, rows

MAX_NEW_TOKENS = 1024
PUBLISHED = ("all", {"LLaVA-1.5-7B": 65.4, "LLaVA-1.5-13B": 72.5})
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
RULE = """\
We would like to request your feedback on the performance of two AI assistants in response to the user question \
displayed above. The user asks the question on observing an image. For your reference, the visual content in the \
image is represented with a few sentences describing the image. \n\
Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an \
overall score on a scale of 1 to 10, where a higher score indicates better overall performance.
Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, \
respectively. The two scores are separated by a space.
In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias \
and ensuring that the order in which the responses were presented does not affect your judgment."""
CATEGORIES = ("conv", "detail", "complex")


def examples(data_dir):
    """[{"id", "image", "prompt", "label": GPT-4's answer, "category", "context", "question_id"}] in file order."""
    contexts, reference, found = {}, {}, []
    first(data_dir, "images")
    for where, row in rows(first(data_dir, "context.jsonl")):
        with reading(where):
            text = row["caption"]
            contexts[row["image"]] = "\n".join(text) if isinstance(text, list) else text
    for where, row in rows(first(data_dir, "answers_gpt4.jsonl")):
        with reading(where):
            reference[row["question_id"]] = row["text"]
    for where, row in rows(first(data_dir, "questions.jsonl")):
        with reading(where):
            number, image, category = row["question_id"], row["image"], row["category"]
            if category not in CATEGORIES:
                raise UserError(
                    where, f"category {category!r} has no rule", f"one of {', '.join(CATEGORIES)}"
                )
            found.append(
                {
                    "id": str(number),
                    "image": f"images/{image}",
                    "prompt": row["text"],
                    "where": where,
                }
            )
            found[-1] |= {
                "label": reference[number],
                "context": contexts[image],
                "category": category,
            }
            found[-1] |= {"question_id": number}
    return found


def write(examples, answers, stem, data_dir):
    """The answers as LLaVA's scripts take them."""
    made = []
    for e, answer in zip(examples, answers, strict=True):
        made.append(
            {
                "question_id": e["question_id"],
                "prompt": e["prompt"],
                "text": answer,
                "answer_id": e["id"],
            }
        )
        made[-1] |= {"model_id": Path(stem).parent.parent.name, "metadata": {}}
    file = Path(f"{stem}-answers.jsonl")
    write_file(file, "".join(json.dumps(row) + "\n" for row in made))
    return [file]


def content(example, answer):
    """What the judge reads."""
    said = "".join(
        f"[Assistant {i}]\n{text}\n\n[End of Assistant {i}]\n\n"
        for i, text in enumerate((example["label"], answer), 1)
    )
    return f"[Context]\n{example['context']}\n\n[Question]\n{example['prompt']}\n\n{said}[System]\n{RULE}\n\n"


def parse(review):
    """The two scores that a review begins with, else [-1, -1]."""
    pair = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        return [float(pair[0]), float(pair[1])] if len(pair) == 2 else [-1, -1]
    except ValueError:
        return [-1, -1]


def summary(reviews):
    """[(category, [GPT-4's score, the model's])] -> {name: {"score": relative %, "gpt4", "model": x 10, "n"}}."""
    groups = {"all": [pair for _, pair in reviews]}
    for category, pair in reviews:
        groups.setdefault(category, []).append(pair)
    scores = {}
    for name, pairs in groups.items():
        theirs, ours = (round(sum(column) / len(pairs), 3) for column in zip(*pairs, strict=True))
        scores[name] = {
            "score": round(ours / theirs * 100, 1) if theirs else 0.0,
            "chance": None,
            "n": len(pairs),
        }
        scores[name] |= {"gpt4": round(theirs * 10, 1), "model": round(ours * 10, 1)}
    return scores


def judge(examples, answers, ask, stem, data_dir):
    made = []
    for i, (example, answer) in enumerate(zip(examples, answers, strict=True), 1):
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": content(example, answer)},
        ]
        review, category = ask(messages, 0.2, 1024), f"llava_bench_{example['category']}"
        made.append(
            {
                "id": i,
                "question_id": example["question_id"],
                "category": category,
                "content": review,
            }
        )
        made[-1]["tuple"] = parse(review)
    write_file(Path(f"{stem}-reviews.jsonl"), "".join(json.dumps(row) + "\n" for row in made))
    return summary([(row["category"].removeprefix("llava_bench_"), row["tuple"]) for row in made])
