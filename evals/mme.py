"""MME (Fu et al., 2023): two yes-or-no questions about each picture, in ten tasks of perception and
four of cognition. The true answer to one of the two is yes, to the other no.

Files, in LLaVA's layout: llava_mme.jsonl and MME_Benchmark_release_version/. In the original layout
(the benchmark's archive): MME_Benchmark_release_version/, or that folder itself. It holds
TASK/*.txt with `question<TAB>answer` lines, beside the pictures, or in questions_answers_YN/ with
the pictures in images/.

Scored as MME's eval_tool/calculation.py does it: a task gets 100 x accuracy + 100 x the share of
pictures with both questions right. Perception, the published number, and cognition are sums over
their tasks. Chance is a coin: 50 + 25 a task.

The trap: an answer is read by its first four letters, in lower case. "It's no" is neither yes nor
no, and "eyes" is a yes.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints.files import write_file
from config import UserError
from evals.files import errors_at, find_first, read_rows, read_text
from evals.options import WORD

MAX_NEW_TOKENS = 128
PUBLISHED = ("Perception", "MME")
CHANCE = 75.0

GROUPS = {
    "Perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene",
                   "landmark", "artwork", "OCR"),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation",
                  "code_reasoning"),
}  # fmt: skip
TASKS = [*GROUPS["Perception"], *GROUPS["Cognition"]]

UNREAD = "begin with neither yes nor no, and are wrong"

ENDING = "Please answer yes or no."


def examples(data_dir):
    """Return the questions, the two of a picture together.

    Own keys: "task"; "group": the picture; "question": as the archive has it.
    """
    # The data folder holds the archive's folder, or is that folder: then it holds the tasks.
    release = find_first(data_dir, "MME_Benchmark_release_version", *TASKS)
    if release.name in TASKS:
        release = release.parent

    found = []
    for task in TASKS:
        found += read_task(data_dir, release, task)
    if not found:
        fix = f"--data: a folder with {release.name}/TASK/*.txt"
        raise UserError(release, "no questions in it", fix)

    llava = Path(data_dir) / "llava_mme.jsonl"
    if llava.exists():
        return ask_as_llava(found, llava, data_dir, release)
    return found


def read_task(data_dir, release, task):
    """Return the questions of a task as the archive has them, with LLaVA's end of a prompt."""
    # Some tasks of the archive keep questions and pictures apart, the others side by side.
    texts = release / task / "questions_answers_YN"
    images = release / task / "images"
    if not texts.exists():
        texts = release / task
        images = release / task
    pictures = {file.stem: file for file in images.glob("*.[jp][pn]*g")}

    found = []
    for file in sorted(texts.glob("*.txt")):
        lines = read_text(file).strip().split("\n")
        for number, line in enumerate(lines):
            where = f"{file}:{number}"
            cells = line.rstrip().split("\t")
            if len(lines) != 2 or len(cells) != 2 or cells[1] not in ("Yes", "No"):
                what = "not two lines of `question<TAB>Yes or No`"
                raise UserError(where, what, "fetch the file again")
            if file.stem not in pictures:
                what = f"no picture {file.stem}.jpg or .png for it"
                raise UserError(where, what, "fetch the archive again")

            question, label = cells
            found.append(
                {
                    "id": f"{task}/{file.stem}/{number}",
                    "image": str(pictures[file.stem].relative_to(data_dir)),
                    "prompt": bare(question) + WORD,
                    "label": label,
                    "task": task,
                    "group": f"{task}/{file.stem}",
                    "question": question,
                    "where": where,
                }
            )
    return found


def ask_as_llava(found, llava, data_dir, release):
    """Return the questions of LLaVA's file, in its order and with its prompts."""
    # LLaVA's rows have no number: a question is known by its picture and its text.
    known = {(example["group"], bare(example["question"])): example for example in found}

    asked = []
    for where, row in read_rows(llava):
        with errors_at(where):
            name = Path(row.file("question_id"))  # TASK/PICTURE or TASK/images/PICTURE
            prompt = row.text("text")
            task = name.parts[0]
            key = f"{task}/{name.stem}", bare(prompt.replace(WORD, ""))
            if key not in known:
                what = f"its question is not in {release.name}/{task}"
                raise UserError(where, what, "fetch both again")
            image = (release / row.file("image")).relative_to(data_dir)
            changes = {"prompt": prompt, "image": str(image), "where": where}
            asked.append(known[key] | changes)
    return asked


def bare(question):
    """Return a question without its request to answer yes or no."""
    return question.replace(ENDING, "").strip()


def parse(answer):
    """Return "yes" or "no" if the first four letters hold that word, else "other"."""
    start = answer.lower()[:4]
    if "yes" in start:
        return "yes"
    if "no" in start:
        return "no"
    return "other"


def unread(examples, answers):
    """Return how many answers are neither yes nor no."""
    return sum(parse(answer) == "other" for answer in answers)


def score(examples, answers):
    """Return the sums of perception and cognition, then a score a task."""
    # {task: {picture: whether each of its answers is right}}
    pictures = {task: {} for task in TASKS}
    for example, answer in zip(examples, answers, strict=True):
        right = parse(answer) == example["label"].lower()
        pictures[example["task"]].setdefault(example["group"], []).append(right)

    scores = {}
    for task, answered in pictures.items():
        if answered:
            scores[task] = task_score(list(answered.values()))

    sums = {}
    for name, tasks in GROUPS.items():
        parts = [scores[task] for task in tasks if task in scores]
        if parts:
            sums[name] = {
                "score": sum(part["score"] for part in parts),
                "chance": sum(part["chance"] for part in parts),
                "n": sum(part["n"] for part in parts),
            }
    return sums | scores


def task_score(pictures):
    """Return the score of a task; pictures: whether each answer is right, a list a picture."""
    # A picture counts once more if all of its answers are right.
    answers = []
    both_right = 0
    for of_picture in pictures:
        answers += of_picture
        both_right += all(of_picture)

    accuracy = sum(answers) / len(answers)
    accuracy_plus = both_right / len(pictures)
    points = 100 * accuracy + 100 * accuracy_plus
    return {"score": points, "chance": CHANCE, "n": len(answers)}


def write(examples, answers, stem, data_dir):
    """Write STEM-results/TASK.txt as MME's calculation.py reads them (--results_dir)."""
    # Tabs and line breaks of an answer would be taken for cells and rows.
    lines = {}
    for example, answer in zip(examples, answers, strict=True):
        one_line = " ".join(answer.split())
        cells = [Path(example["image"]).name, example["question"], example["label"], one_line]
        lines.setdefault(example["task"], []).append("\t".join(cells) + "\n")

    files = []
    for task, of_task in lines.items():
        file = Path(f"{stem}-results") / f"{task}.txt"
        write_file(file, "".join(of_task))
        files.append(file)
    return files
