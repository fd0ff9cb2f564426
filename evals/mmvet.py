"""MM-Vet: open questions that need several capabilities at once, judged by a language model.

LLaVA layout: llava-mm-vet.jsonl, images/, and for the judge mm-vet.json (or mm-vet/mm-vet.json). Original layout
(mm-vet.zip): mm-vet.json, images/.

The answers are written as mm-vet_evaluator.py takes them. With --judge they are judged as it does it: its prompt,
three tokens at temperature 0, asked again up to four times, ever warmer, where the reply is no number from 0 to 1,
and 0 after that; the score is the mean, of all and of the questions of each capability. The papers' judge is
gpt-4-0613.
"""

import json
from pathlib import Path

from checkpoints.files import write_file
from config import UserError
from evals import first, grouped, reading, rows, table

MAX_NEW_TOKENS = 1024
PUBLISHED = ("all", "MM-Vet")
_ICELAND = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland "
    "is mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of "
    "these countries do not accurately represent their landscapes. | "
)
PROMPT = f"""\
Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in the \
ground truth means it is totally right only when all elements in the ground truth are present in the prediction, and \
<OR> means it is totally right when any one element in the ground truth is present in the prediction. The correctness \
score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the \
last space of the correctness score.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0
What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0
{_ICELAND}The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very \
icy and Greenland isn't very green. | 0.4
{_ICELAND}The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, \
despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why \
I have trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The \
humor in this meme is derived from the unexpected contrast between the names of the countries and their actual \
physical characteristics. | 1.0
"""
AGAIN = "\nPredict the correctness of the answer (digit): "


def examples(data_dir):
    """[{"id": v1_0 ..., "image", "prompt", "label" or None, "question", "capability"}] in file order."""
    folder, llava = first(data_dir, "images"), Path(data_dir) / "llava-mm-vet.jsonl"
    files = [
        file
        for name in ("mm-vet.json", "mm-vet/mm-vet.json")
        if (file := Path(data_dir) / name).exists()
    ]
    if not files and not llava.exists():
        first(data_dir, "mm-vet.json", llava.name)
    found = {}
    for number, row in table(files[0]).items() if files else ():
        where = f"{files[0]}:{number}"
        with reading(where):
            found[number] = {
                "id": number,
                "image": f"{folder.name}/{row['imagename']}",
                "prompt": row["question"],
            }
            found[number] |= {"label": row["answer"], "question": row["question"], "where": where}
            found[number] |= {"capability": sorted(set(row["capability"]))}
    if not llava.exists():
        return list(found.values())
    asked = []
    for where, row in rows(llava):
        with reading(where):
            number = f"v1_{str(row['question_id']).removeprefix('v1_')}"
            asked.append(
                {"label": None} | found.get(number, {}) | {"id": number, "prompt": row["text"]}
            )
            asked[-1] |= {"image": f"{folder.name}/{row['image']}", "where": where}
    return asked


def write(examples, answers, stem, data_dir):
    """{question: answer}, the file that mm-vet_evaluator.py and its web page take."""
    file = Path(f"{stem}-results.json")
    made = {example["id"]: answer for example, answer in zip(examples, answers, strict=True)}
    write_file(file, json.dumps(made, indent=4))
    return [file]


def grade(example, answer, ask):
    truth = example["label"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    question = f"{PROMPT}\n" + " | ".join([example["question"], truth, answer, ""])
    for temperature, text in (
        (0.0, question),
        *((t, question + AGAIN) for t in (0.0, 0.5, 1.0, 1.5)),
    ):
        reply = ask([{"role": "user", "content": text}], temperature, 3)
        try:
            value = float(reply.split(" ")[0].strip())
        except ValueError:
            continue
        if 0 <= value <= 1:
            return value
    return 0.0


def judge(examples, answers, ask, stem, data_dir):
    results = []
    for example, answer in zip(examples, answers, strict=True):
        if example["label"] is None:
            raise UserError(
                example["where"],
                "no ground truth for it",
                "put mm-vet.json of mm-vet.zip beside it",
            )
        results.append((("all", *example["capability"]), grade(example, answer, ask), 0))
    return {name: s | {"chance": None} for name, s in grouped(results).items()}
