"""MME: two yes-or-no questions about each picture, in ten tasks of perception and four of cognition.

LLaVA layout: llava_mme.jsonl and MME_Benchmark_release_version/. Original layout (the benchmark's archive):
MME_Benchmark_release_version/, or that folder itself: TASK/*.txt with `question<TAB>answer` lines beside the
pictures, or in questions_answers_YN/ beside images/.

Scored as MME's calculation.py: a task gets 100 x accuracy + 100 x the share of pictures with both questions right,
and perception and cognition are sums over their tasks. Chance is a coin: 75 a task.
"""

from pathlib import Path

from checkpoints.files import write_file
from config import UserError
from evals import WORD, first, reading, rows

MAX_NEW_TOKENS = 128
PUBLISHED = ("Perception", "MME")
GROUPS = {
    "Perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
                   "OCR"),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
TASKS = [task for tasks in GROUPS.values() for task in tasks]
ENDING = "Please answer yes or no."


def examples(data_dir):
    """[{"id", "image", "prompt", "label": Yes or No, "task", "group": its picture, "question"}], pairs together."""
    release = first(data_dir, "MME_Benchmark_release_version", *TASKS)
    release = release.parent if release.name in TASKS else release
    found = list(official(data_dir, release))
    if not found:
        raise UserError(
            release, "no questions in it", f"--data: a folder with {release.name}/TASK/*.txt"
        )
    llava = Path(data_dir) / "llava_mme.jsonl"
    if not llava.exists():
        return found
    known, asked = {(e["group"], bare(e["question"])): e for e in found}, []
    for where, row in rows(llava):
        with reading(where):
            name = Path(row["question_id"])  # TASK/PICTURE or TASK/images/PICTURE
            key = f"{name.parts[0]}/{name.stem}", bare(row["text"].replace(WORD, ""))
            if key not in known:
                raise UserError(
                    where,
                    f"its question is not in {release.name}/{name.parts[0]}",
                    "fetch both again",
                )
            image = (release / row["image"]).relative_to(data_dir)
            asked.append(known[key] | {"prompt": row["text"], "image": str(image), "where": where})
    return asked


def official(data_dir, release):
    """The examples as the archive has them."""
    for task in TASKS:
        folder = release / task
        texts = (
            folder / "questions_answers_YN"
            if (folder / "questions_answers_YN").exists()
            else folder
        )
        pictures = {
            f.stem: f
            for f in (folder / "images" if texts != folder else folder).glob("*.[jp][pn]*g")
        }
        for file in sorted(texts.glob("*.txt")):
            lines = file.read_text(encoding="utf-8").strip().split("\n")
            for number, line in enumerate(lines):
                where, parts = f"{file}:{number}", line.rstrip().split("\t")
                if len(parts) != 2 or parts[1] not in ("Yes", "No") or len(lines) != 2:
                    raise UserError(
                        where, "not two lines of `question<TAB>Yes or No`", "fetch the file again"
                    )
                if file.stem not in pictures:
                    raise UserError(
                        where,
                        f"no picture {file.stem}.jpg or .png for it",
                        "fetch the archive again",
                    )
                yield {
                    "id": f"{task}/{file.stem}/{number}",
                    "image": str(pictures[file.stem].relative_to(data_dir)),
                    "prompt": bare(parts[0]) + WORD,
                    "label": parts[1],
                    "task": task,
                    "group": f"{task}/{file.stem}",
                    "question": parts[0],
                    "where": where,
                }


def bare(question):
    return question.replace(ENDING, "").strip()


def parse(answer):
    """calculation.py: yes or no if the answer's first four letters hold the word, else other."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score(examples, answers):
    pictures = {task: {} for task in TASKS}
    for example, answer in zip(examples, answers, strict=True):
        right = parse(answer) == example["label"].lower()
        pictures[example["task"]].setdefault(example["group"], []).append(right)
    scores = {}
    for task, asked in pictures.items():
        if asked:
            every = [right for both in asked.values() for right in both]
            points = 100 * (sum(every) / len(every)) + 100 * (
                sum(map(all, asked.values())) / len(asked)
            )
            scores[task] = {"score": points, "chance": 75.0, "n": len(every)}
    sums = {}
    for name, tasks in GROUPS.items():
        if mine := [scores[task] for task in tasks if task in scores]:
            sums[name] = {key: sum(s[key] for s in mine) for key in ("score", "chance", "n")}
    return sums | scores


def write(examples, answers, stem, data_dir):
    """TASK.txt files as MME's calculation.py reads them (--results_dir)."""
    lines = {}
    for e, answer in zip(examples, answers, strict=True):
        cells = Path(e["image"]).name, e["question"], e["label"], " ".join(answer.split())
        lines.setdefault(e["task"], []).append("\t".join(cells) + "\n")
    files = [Path(f"{stem}-results") / f"{task}.txt" for task in lines]
    for file, text in zip(files, lines.values(), strict=True):
        write_file(file, "".join(text))
    return files
