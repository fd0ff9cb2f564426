"""MMMU, validation: college questions of thirty subjects, most of them multiple choice, some with up to seven pictures.

TinyLLaVA Factory's layout (LLaVA's evaluation has none): anns_for_eval.json, eval/answer_dict_val.json, all_images/.
Its rows with several pictures have none; they are asked without, and scored as Factory scores them: a guess.
Original layout (MMMU/MMMU on Hugging Face): SUBJECT/validation-*.parquet, read with pyarrow. A question with several
pictures gets them all, each where it is mentioned.

Scored as MMMU's eval_utils.py. A choice that cannot be read off an answer is guessed there; here with the same
generator in the same order, so that a score can be had again. Chance is 1 / number of choices, and 0 for open answers.
"""

import ast
import random
import re
from pathlib import Path

from evals import LETTER, WORD, first, grouped, parquet_rows, reading, rows, table

MAX_NEW_TOKENS = 1024
PUBLISHED = ("Overall", "MMMU")
DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
SUBJECTS = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects.split()}


def examples(data_dir):
    """[{"id", "image": names or None, "pictures": bytes if not files, "prompt", "label", "choices", "subject"}]."""
    file = Path(data_dir) / "anns_for_eval.json"
    return factory(data_dir, file) if file.exists() else original(data_dir)


def factory(data_dir, file):
    labels, found = table(first(data_dir, "eval/answer_dict_val.json", "answer_dict_val.json")), []
    first(data_dir, "all_images")
    for where, row in rows(file):
        with reading(where):
            image, label = row.get("image"), labels[row["id"]]["ground_truth"]
            choices = row["index2ans"] if row["question_type"] == "multiple-choice" else {}
            found.append(
                {"id": row["id"], "image": image and f"all_images/{image}", "prompt": row["prompt"]}
            )
            found[-1] |= {
                "label": label,
                "choices": choices,
                "subject": subject(row["id"]),
                "where": where,
            }
    return found


def original(data_dir):
    files = [
        file
        for name in SUBJECTS
        for file in sorted(Path(data_dir).glob(f"{name}/validation-*.parquet"))
    ]
    if not files:
        first(data_dir, "anns_for_eval.json", "Accounting/validation-00000-of-00001.parquet")
    found = []
    for file in files:
        for where, row in parquet_rows(file):
            with reading(where):
                options = ast.literal_eval(row["options"])
                choices = {chr(65 + i): option for i, option in enumerate(options)}
                if row["question_type"] == "multiple-choice":
                    listed = "".join(f"({letter}) {option}\n" for letter, option in choices.items())
                    text = f"{row['question']}\n{listed}{LETTER}"
                else:
                    text, choices = row["question"] + WORD, {}
                numbers, text = placed(text, [i for i in range(1, 8) if row.get(f"image_{i}")])
                label = (
                    ast.literal_eval(row["answer"])
                    if row["answer"].startswith("[")
                    else row["answer"]
                )
                found.append(
                    {
                        "id": row["id"],
                        "image": [f"{row['id']}:{i}" for i in numbers],
                        "prompt": text,
                    }
                )
                found[-1] |= {
                    "pictures": [row[f"image_{i}"]["bytes"] for i in numbers],
                    "label": label,
                }
                found[-1] |= {"choices": choices, "subject": subject(row["id"]), "where": where}
    return found


def placed(text, numbers):
    """Which pictures are shown in which order, and the text. One goes to the front, and its mention stays, as LLaVA's
    evaluation has it; of several, each stands where <image N> says, what is not mentioned at the front."""
    if len(numbers) < 2:
        return numbers, text
    mentioned = [int(n) for n in re.findall(r"<image (\d)>", text) if int(n) in numbers]
    front = [n for n in numbers if n not in mentioned]
    text = re.sub(r"<image (\d)>", lambda m: "<image>" if int(m[1]) in numbers else m[0], text)
    return front + mentioned, "<image>\n" * len(front) + text


def subject(name):
    return {s: s for s in SUBJECTS}["_".join(name.split("_")[1:-1])]


def parse_choice(answer, choices):
    """The letter among `choices` {letter: text} that an answer gives, or None where MMMU guesses."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    for form, said, everything in (
        ("({})", choices.keys(), answer),
        (" {} ", choices.keys(), answer),
        ("{}", choices.values(), answer.lower() if len(answer.split()) > 5 else None),
    ):
        if everything is None:
            continue
        texts = [form.format(text) for text in said]
        places = [everything.rfind(text if form != "{}" else text.lower()) for text in texts]
        if max(places, default=-1) >= 0:  # the last one counts
            return list(choices)[places.index(max(places))]
    return None


def number(text):
    try:
        return round(float(text.replace(",", "")), 2)
    except ValueError:
        return None


def normal(text):
    """A text to compare: a number to two digits, or lower case; one letter only with a space at its side."""
    text = text.strip()
    if number(text) is not None:
        return [number(text)]
    return [f" {text.lower()}", f"{text.lower()} "] if len(text) == 1 else [text.lower()]


NUMBER = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
          r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")  # fmt: skip
BEFORE = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def parse_open(answer):
    """All that an open answer may mean: what stands behind BEFORE in its sentences, and the numbers in that."""
    answer = answer.strip().strip(".").lower()
    parts, keys = re.split(r"\.\s(?=[A-Z])|\n", answer), []
    for i, part in enumerate(parts):
        signs, shortest = BEFORE + ("=",) * (i == len(parts) - 1), ""
        for sign in signs:
            tail = part.split(sign)[-1].strip()
            if sign in part and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            keys.append(shortest)
    keys = keys or [answer]
    texts = keys + [
        found for key in keys for pattern in NUMBER for found in re.findall(pattern, key)
    ]
    return {meaning for text in texts for meaning in normal(text)}


def open_right(answer, label):
    labels = [
        value for text in (label if isinstance(label, list) else [label]) for value in normal(text)
    ]
    words = [value for value in labels if isinstance(value, str)]
    said = parse_open(answer)
    return any(any(w in s for w in words) if isinstance(s, str) else s in labels for s in said)


def score(examples, answers):
    rng, results = random.Random(42), []
    for example, answer in zip(examples, answers, strict=True):
        names = ["Overall", SUBJECTS[example["subject"]], example["subject"]]
        if not example["image"]:
            names.append("pictures missing")
        if choices := example["choices"]:
            said = parse_choice(answer, choices) if example["image"] else None
            results.append(
                (names, (said or rng.choice(list(choices))) == example["label"], 1 / len(choices))
            )
        else:
            results.append(
                (names, bool(example["image"]) and open_right(answer, example["label"]), 0)
            )
    scores = grouped(results)
    order = [
        "Overall",
        "pictures missing",
        *(n for d, s in DOMAINS.items() for n in (d, *s.split())),
    ]
    return {name: scores[name] for name in order if name in scores}
