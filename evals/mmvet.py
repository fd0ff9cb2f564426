"""MM-Vet (Yu et al., 2023): open questions that need several capabilities at once, judged by a
language model.

Files, in LLaVA's layout: llava-mm-vet.jsonl, images/, and for the judge mm-vet.json (or
mm-vet/mm-vet.json). In the original layout (mm-vet.zip of github.com/yuweihao/MM-Vet): mm-vet.json,
images/.

The answers are written as mm-vet_evaluator.py takes them. With --judge they are judged as that
script does it: its prompt, three tokens at temperature 0. The score is the mean, of all questions
and of those of each capability. The papers' judge is gpt-4-0613.

The trap: a reply that is no number from 0 to 1 is asked for again up to four times, ever warmer,
and counts 0 after that.
"""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints.files import write_file
from config import UserError
from evals.files import errors_at, find_first, read_rows, read_table
from evals.scores import Result, group_scores

MAX_NEW_TOKENS = 1024
PUBLISHED = ("all", "MM-Vet")

# The official prompt, to the letter.
ICELAND = """\
Can you explain this meme? | This meme is poking fun at the fact that the names of the \
countries Iceland and Greenland are misleading. Despite its name, Iceland is known for its \
beautiful green landscapes, while Greenland is mostly covered in ice and snow. The meme is \
saying that the person has trust issues because the names of these countries do not accurately \
represent their landscapes. | """
PROMPT = f"""\
Compare the ground truth and prediction from AI models, to give a correctness score for the \
prediction. <AND> in the ground truth means it is totally right only when all elements in the \
ground truth are present in the prediction, and <OR> means it is totally right when any one \
element in the ground truth is present in the prediction. The correctness score is 0.0 (totally \
wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the \
last space of the correctness score.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0
What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0
{ICELAND}The meme talks about Iceland and Greenland. It's pointing out that despite their \
names, Iceland is not very icy and Greenland isn't very green. | 0.4
{ICELAND}The meme is using humor to point out the misleading nature of Iceland's and \
Greenland's names. Iceland, despite its name, has lush green landscapes while Greenland is \
mostly covered in ice and snow. The text 'This is why I have trust issues' is a playful way to \
suggest that these contradictions can lead to distrust or confusion. The humor in this meme is \
derived from the unexpected contrast between the names of the countries and their actual \
physical characteristics. | 1.0
"""
AGAIN = "\nPredict the correctness of the answer (digit): "
AGAIN_TEMPERATURES = (0.0, 0.5, 1.0, 1.5)
REPLY_TOKENS = 3


def examples(data_dir):
    """Return the questions in the order of the file; "id" is v1_0, v1_1, ...

    "label" is the true answer, None where mm-vet.json is missing. Own keys, where it is there:
    "question", "capability".
    """
    folder = find_first(data_dir, "images")
    llava = Path(data_dir) / "llava-mm-vet.jsonl"

    # MM-Vet's own file has the true answers; LLaVA's has only the questions.
    found = {}
    file = find_truth(data_dir)
    if file:
        found = read_truth(file, folder)
    elif not llava.exists():
        # Say what is missing: this raises.
        find_first(data_dir, "mm-vet.json", llava.name)

    if llava.exists():
        return ask_as_llava(found, llava, folder)
    return list(found.values())


def find_truth(data_dir):
    """Return MM-Vet's own file, or None."""
    for name in ("mm-vet.json", "mm-vet/mm-vet.json"):
        file = Path(data_dir) / name
        if file.exists():
            return file
    return None


def read_truth(file, folder):
    """Return {id: example} of MM-Vet's own file."""
    found = {}
    for number, row in read_table(file).items():
        where = f"{file}:{number}"
        with errors_at(where):
            found[number] = {
                "id": number,
                "image": f"{folder.name}/{row.file('imagename')}",
                "prompt": row.text("question"),
                "label": row.words("answer"),
                "question": row.text("question"),
                "capability": sorted(set(row.texts("capability"))),
                "where": where,
            }
    return found


def ask_as_llava(found, llava, folder):
    """Return the questions of LLaVA's file, in its order and with its prompts."""
    asked = []
    for where, row in read_rows(llava):
        with errors_at(where):
            number = f"v1_{str(row.identifier('question_id')).removeprefix('v1_')}"
            truth = found.get(number, {"label": None})
            changes = {
                "id": number,
                "image": f"{folder.name}/{row.file('image')}",
                "prompt": row.text("text"),
                "where": where,
            }
            asked.append(truth | changes)
    return asked


def write(examples, answers, stem, data_dir):
    """Write {question: answer}, which mm-vet_evaluator.py and its web page take."""
    answered = {}
    for example, answer in zip(examples, answers, strict=True):
        answered[example["id"]] = answer

    file = Path(f"{stem}-results.json")
    write_file(file, json.dumps(answered, indent=4))
    return [file]


def grade(example, answer, ask):
    """Return what the judge gives an answer, 0 to 1; ask(messages, temperature, tokens) asks it."""
    truth = example["label"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    row = " | ".join([example["question"], truth, answer, ""])
    question = f"{PROMPT}\n{row}"

    # As asked first, then again with a hint that a digit is wanted.
    requests = [(0.0, question)]
    for temperature in AGAIN_TEMPERATURES:
        requests.append((temperature, question + AGAIN))

    for temperature, text in requests:
        reply = ask([{"role": "user", "content": text}], temperature, REPLY_TOKENS)
        try:
            # "nan" is a number too, but lies in no range.
            value = float(reply.split(" ")[0].strip())
        except ValueError:
            continue
        if 0 <= value <= 1:
            return value
    return 0.0


def judge(examples, answers, ask, stem, data_dir):
    """Return the mean grade of all questions and of those of each capability."""
    results = []
    for example, answer in zip(examples, answers, strict=True):
        if example["label"] is None:
            fix = "put mm-vet.json of mm-vet.zip beside it"
            raise UserError(example["where"], "no ground truth for it", fix)
        groups = ("all", *example["capability"])
        results.append(Result(groups, grade(example, answer, ask)))

    scores = group_scores(results)
    for of_group in scores.values():
        of_group["chance"] = None  # unknown
    return scores
