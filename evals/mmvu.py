"""MMVU, validation: 625 multiple-choice and 375 open questions about expert clips of 27 subjects.

Files as published (yale-nlp/MMVU on Hugging Face): validation.json, videos/SUBJECT/.

GPT-4o judges all answers for the benchmark. Prompts and scores here are those of TinyLLaVA-Video, which needs no judge:
letters as in evals/choices.py; an open answer is right if it holds the true one or, where it is not longer, is part of
it, in lower case (an empty one is right there, wrong here). The published number is over all questions. A subject is
the folder of the clip, in lmms-eval's disciplines. The chance of an open question counts as 0.
"""

from evals import LETTER, choices, first, lettered, reading, rows

MAX_NEW_TOKENS = choices.MAX_NEW_TOKENS
PUBLISHED = ("all", "MMVU")
DIRECT = "\nAnswer the question directly without explanation."
KINDS = {"multiple-choice": "multiple choice", "open-ended": "open"}
DISCIPLINES = {
    "Science": "Astronomy Biology Chemistry Electromagnetism Geography Materials_Science Mechanics Modern_Physics "
    "Neurobiology Thermodynamics",
    "Healthcare": "Basic_Medicine Clinical_Medicine Dentistry Pharmacy Preventive_Medicine",
    "Humanities and Social Science": "Art Economics History Law Literature Management",
    "Engineering": "Biomedical_Engineering Civil_Engineering Computer_Science Electrical_Engineering "
    "Electronics_and_Communication Mechanical_Engineering",
}
SUBJECTS = {
    subject: discipline
    for discipline, subjects in DISCIPLINES.items()
    for subject in subjects.split()
}


def examples(data_dir):
    """[{"id", "image": None, "video", "prompt", "label", "choices", "groups", "where"}] in file order; open questions
    have no choices, {}."""
    found = []
    for where, row in rows(first(data_dir, "validation.json")):
        with reading(where):
            kind, options, label, ask = (
                KINDS[row["question_type"]],
                {},
                row["answer"].strip(),
                DIRECT,
            )
            if kind == "multiple choice":
                options = row["choices"]
                label, ask = (
                    choices.letter_of(label, {letter: letter for letter in options}),
                    LETTER,
                )
            prompt = row["question"] + lettered(options.values()) + ask
            video = choices.clip(data_dir, row["video"].split("/resolve/main/")[-1])
            groups = ("all", kind, SUBJECTS[video.split("/")[-2]])
            found.append(choices.example(where, row["id"], video, prompt, options, label, groups))
    return found


def credit(answer, example):
    """(what an answer earns, what a guess does)."""
    if example["choices"]:
        return choices.credit(answer, example)
    said, truth = answer.strip().lower(), example["label"].lower()
    return bool(said) and (truth in said if len(said) > len(truth) else said in truth), 0


def score(examples, answers):
    return choices.score(examples, answers, ("all", *KINDS.values(), *DISCIPLINES), credit)
