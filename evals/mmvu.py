"""MMVU, validation (Zhao et al., 2025): 625 multiple-choice and 375 open questions about expert
clips of 27 subjects.

Files as published (yale-nlp/MMVU on Hugging Face): validation.json, videos/SUBJECT/. A subject is
the folder of the clip, in lmms-eval's disciplines.

Prompts and scores are those of TinyLLaVA-Video, which needs no judge. Letters are read as in
evals/video_choices.py. An open answer is right if it holds the true one or, where it is not longer,
is part of it, in lower case. The published number is over all questions. The chance of an open
question counts as 0.

The trap: GPT-4o judges all answers for the benchmark itself, so its numbers are others. And an
empty open answer, part of everything, is right in TinyLLaVA-Video, but wrong here.
"""

from __future__ import annotations

from evals import video_choices
from evals.files import errors_at, find_first, read_rows
from evals.options import LETTER, list_options
from evals.scores import Result

MAX_NEW_TOKENS = video_choices.MAX_NEW_TOKENS
UNREAD = video_choices.UNREAD
unread = video_choices.unread
PUBLISHED = ("all", "MMVU")
DIRECT = "\nAnswer the question directly without explanation."

# The published "question_type", and the name of its score.
KINDS = {"multiple-choice": "multiple choice", "open-ended": "open"}

DISCIPLINES = {
    "Science": ("Astronomy", "Biology", "Chemistry", "Electromagnetism", "Geography",
                "Materials_Science", "Mechanics", "Modern_Physics", "Neurobiology",
                "Thermodynamics"),
    "Healthcare": ("Basic_Medicine", "Clinical_Medicine", "Dentistry", "Pharmacy",
                   "Preventive_Medicine"),
    "Humanities and Social Science": ("Art", "Economics", "History", "Law", "Literature",
                                      "Management"),
    "Engineering": ("Biomedical_Engineering", "Civil_Engineering", "Computer_Science",
                    "Electrical_Engineering", "Electronics_and_Communication",
                    "Mechanical_Engineering"),
}  # fmt: skip
DISCIPLINE_OF = {name: field for field, names in DISCIPLINES.items() for name in names}


def examples(data_dir):
    """Return the questions in the order of the file.

    Own keys: those of video_choices; an open question has no choices, {}.
    """
    found = []
    for where, row in read_rows(find_first(data_dir, "validation.json")):
        with errors_at(where):
            # Open questions have choices as well, all of them empty.
            kind = KINDS[row.text("question_type")]
            label = row.text("answer").strip()
            question = row.text("question")
            if kind == "multiple choice":
                choices = row.lettered("choices")
                letters = {letter: letter for letter in choices}
                label = video_choices.letter_of(label, letters)
                prompt = question + list_options(choices.values()) + LETTER
            else:
                choices = {}
                prompt = question + DIRECT

            # Published as an address; the path in the repository comes behind the branch.
            path = row.file("video").split("/resolve/main/")[-1]
            video = video_choices.find_clip(data_dir, path)
            subject = video.split("/")[-2]
            groups = ("all", kind, DISCIPLINE_OF[subject])
            name = str(row.identifier("id"))
            found.append(
                video_choices.video_example(where, name, video, prompt, choices, label, groups)
            )
    return found


def grade(answer, example):
    """Return what an answer earns, and a guess."""
    if example["choices"]:
        return video_choices.grade(answer, example)
    return Result(example["groups"], open_right(answer, example["label"]))


def open_right(answer, label):
    """Return whether an open answer holds the true one, or is a part of it."""
    said = answer.strip().lower()
    truth = label.lower()
    if not said:
        return False
    if len(said) > len(truth):
        return truth in said
    return said in truth


def score(examples, answers):
    """Return the scores of all questions, of both kinds and of each discipline."""
    order = ("all", *KINDS.values(), *DISCIPLINES)
    return video_choices.score(examples, answers, order, grade)
