"""MMMU, validation (Yue et al., 2023): college questions of thirty subjects, most of them multiple
choice, some with up to seven pictures.

Files, in TinyLLaVA Factory's layout (LLaVA's evaluation has none): anns_for_eval.json,
eval/answer_dict_val.json, all_images/. Its rows with several pictures have none; they are asked
without, and scored as Factory scores them: a guess. In the original layout (MMMU/MMMU on Hugging
Face): SUBJECT/validation-*.parquet, read with pyarrow. A question with several pictures gets them
all, each where it is mentioned.

Scored as MMMU's eval_utils.py does it (github.com/MMMU-Benchmark/MMMU). Chance is 1 / number of
choices, and 0 for open answers.

The trap: a choice that cannot be read off an answer is guessed. It is guessed here too, with the
same generator in the same order, so that the same answers always have the same score.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from evals.files import (
    MOST_OPTIONS,
    as_text,
    errors_at,
    find_first,
    parse_list,
    read_parquet,
    read_rows,
    read_table,
)
from evals.options import LETTER, WORD, parse_choice, with_letters
from evals.scores import Result, group_scores, in_order

MAX_NEW_TOKENS = 1024
PUBLISHED = ("Overall", "MMMU")
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": ("Basic_Medical_Science", "Clinical_Medicine",
                            "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health"),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": ("Agriculture", "Architecture_and_Engineering", "Computer_Science",
                             "Electronics", "Energy_and_Power", "Materials",
                             "Mechanical_Engineering"),
}  # fmt: skip
DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}
MOST_PICTURES = 7
UNREAD = "give no letter, or are about pictures that are missing: a guess counts in their place"


# --------------------------------------------------------------------------------------- examples


def examples(data_dir):
    """Return the questions in the order of the files. "label" is a letter, a text or several texts.

    Own keys: "choices": {letter: text}, {} for an open question; "subject".
    """
    file = Path(data_dir) / "anns_for_eval.json"
    if file.exists():
        return read_factory(data_dir, file)
    return read_original(data_dir)


def read_factory(data_dir, file):
    """Return the questions of TinyLLaVA Factory's files."""
    truth = read_table(find_first(data_dir, "eval/answer_dict_val.json", "answer_dict_val.json"))
    find_first(data_dir, "all_images")

    found = []
    for where, row in read_rows(file):
        with errors_at(where):
            name = row.text("id")
            image = row.file("image", default=None)
            if image:
                image = f"all_images/{image}"
            true_row = truth[name]
            if isinstance(true_row.values.get("ground_truth"), list):
                label = true_row.texts("ground_truth")
            else:
                label = true_row.words("ground_truth")
            choices = {}
            if row.text("question_type") == "multiple-choice":
                choices = row.lettered("index2ans")
            found.append(
                {
                    "id": name,
                    "image": image,
                    "prompt": row.text("prompt"),
                    "label": label,
                    "choices": choices,
                    "subject": subject(name),
                    "where": where,
                }
            )
    return found


def read_original(data_dir):
    """Return the questions of MMMU's own files, subject after subject."""
    files = []
    for name in DOMAIN_OF:
        files += sorted(Path(data_dir).glob(f"{name}/validation-*.parquet"))
    if not files:
        # Say what is missing: this raises.
        find_first(data_dir, "anns_for_eval.json", "Accounting/validation-00000-of-00001.parquet")

    found = []
    for file in files:
        for where, row in read_parquet(file):
            with errors_at(where):
                found.append(original_example(where, row))
    return found


def original_example(where, row):
    """Return the example of a row of MMMU's own files, which hold the pictures."""
    name = row.text("id")
    question = row.text("question")
    choices = {}
    if row.text("question_type") == "multiple-choice":
        # The options are a list as Python writes it.
        listed = parse_list(row.text("options"))
        listed = [as_text(option, row, "options") for option in listed]
        if not 1 <= len(listed) <= MOST_OPTIONS:
            raise row.refuse("options", f"not a list of 1 to {MOST_OPTIONS} options")
        choices = with_letters(listed)
        options = "".join(f"({letter}) {option}\n" for letter, option in choices.items())
        prompt = f"{question}\n{options}{LETTER}"
    else:
        prompt = question + WORD

    there = [i for i in range(1, MOST_PICTURES + 1) if row.values.get(f"image_{i}")]
    numbers, prompt = place_pictures(prompt, there)
    pictures = [row.picture(f"image_{i}") for i in numbers]

    # Several answers may be right: then they are written as a list in Python, too.
    label = row.words("answer")
    if label.startswith("["):
        label = [as_text(answer, row, "answer") for answer in parse_list(label)]
    return {
        "id": name,
        "image": [f"{name}:{i}" for i in numbers],
        "pictures": pictures,
        "prompt": prompt,
        "label": label,
        "choices": choices,
        "subject": subject(name),
        "where": where,
    }


def place_pictures(text, numbers):
    """Return the numbers of the pictures in the order in which they are shown, and the prompt.

    A single picture goes to the front, and its mention <image 1> stays, as LLaVA's evaluation has
    it. Of several, each stands where its mentions are, and those not mentioned go to the front.
    """
    if len(numbers) < 2:
        return numbers, text

    mentioned = []
    for number in re.findall(r"<image (\d)>", text):
        if int(number) in numbers:
            mentioned.append(int(number))
    front = [number for number in numbers if number not in mentioned]

    for number in numbers:
        text = text.replace(f"<image {number}>", "<image>")
    return front + mentioned, "<image>\n" * len(front) + text


def subject(name):
    """Return the subject of a question's id. Raise KeyError if there is no such subject.

    For example "Art_Theory" of "validation_Art_Theory_12".
    """
    parts = name.split("_")
    found = "_".join(parts[1:-1])
    if found not in DOMAIN_OF:
        raise KeyError(found)
    return found


# ------------------------------------------------------------------------------------ open answers

# Numbers with commas between thousands; in scientific notation; any other.
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)

# What a model says before it names its result.
BEFORE = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def parse_open(answer):
    """Return the set of all that an open answer may mean: lower-case texts, and numbers.

    These are what stands behind BEFORE in its sentences, or the whole of it, and the numbers in it.
    """
    answer = answer.strip().strip(".").lower()

    # Only line breaks part sentences: after `lower` no capital follows a period. So officially.
    sentences = re.split(r"\.\s(?=[A-Z])|\n", answer)
    texts = []
    for i, sentence in enumerate(sentences):
        signs = BEFORE
        if i == len(sentences) - 1:
            signs += ("=",)
        result = shortest_tail(sentence, signs)
        if result and result not in (":", ",", ".", "!", "?", ";", "'"):
            texts.append(result)
    if not texts:
        texts = [answer]

    # A sentence may hold several numbers: each may be the answer.
    numbers = []
    for text in texts:
        for pattern in NUMBERS:
            numbers += re.findall(pattern, text)

    meanings = set()
    for text in texts + numbers:
        meanings.update(comparable(text))
    return meanings


def shortest_tail(sentence, signs):
    """Return the shortest text behind the last of one of the signs; "" if it has none of them."""
    shortest = ""
    for sign in signs:
        if sign not in sentence:
            continue
        tail = sentence.split(sign)[-1].strip()
        if not shortest or len(tail) < len(shortest):
            shortest = tail
    return shortest


def comparable(text):
    """Return what a text is compared as: a number with two digits, or the text in lower case.

    A single letter is found in an answer only with a space at its side.
    """
    text = text.strip()
    value = number(text)
    if value is not None:
        return [value]
    lower = text.lower()
    if len(text) == 1:
        return [f" {lower}", f"{lower} "]
    return [lower]


def number(text):
    """Return a number rounded to two digits, or None if the text is none."""
    try:
        return round(float(text.replace(",", "")), 2)
    except ValueError:
        return None


def open_right(answer, label):
    """Return whether an open answer holds a true text, or is a true number."""
    # The true answers, each as text and as number, whichever it is.
    truths = label
    if not isinstance(label, list):
        truths = [label]
    true_values = []
    for truth in truths:
        true_values += comparable(truth)
    true_texts = [value for value in true_values if isinstance(value, str)]

    # A text may stand anywhere in what was said; a number must be equal.
    for said in parse_open(answer):
        if isinstance(said, str):
            if any(text in said for text in true_texts):
                return True
        elif said in true_values:
            return True
    return False


# ------------------------------------------------------------------------------------------- score


def unread(examples, answers):
    """Return how many answers to multiple choice give no letter."""
    count = 0
    for example, answer in zip(examples, answers, strict=True):
        if example["choices"]:
            count += not example["image"] or parse_choice(answer, example["choices"]) is None
    return count


def score(examples, answers):
    """Return the accuracy of all questions, of those without a picture, of domains and subjects."""
    # MMMU's own seed. One draw for each choice that cannot be read, in the order of the questions.
    rng = random.Random(42)

    results = []
    for example, answer in zip(examples, answers, strict=True):
        has_picture = bool(example["image"])
        names = ["Overall", DOMAIN_OF[example["subject"]], example["subject"]]
        if not has_picture:
            names.append("pictures missing")

        # An answer about pictures that were not shown is not read: a choice is guessed.
        choices = example["choices"]
        if choices:
            said = None
            if has_picture:
                said = parse_choice(answer, choices)
            if said is None:
                said = rng.choice(list(choices))
            right = said == example["label"]
            chance = 1 / len(choices)
        else:
            right = has_picture and open_right(answer, example["label"])
            chance = 0
        results.append(Result(names, right, chance))

    order = ["Overall", "pictures missing"]
    for domain, subjects in DOMAINS.items():
        order += [domain, *subjects]
    return in_order(group_scores(results), order)
