"""MLVU, the multiple-choice part of its dev set (Zhou et al., 2024): seven tasks about clips of
three minutes to two hours.

Files as published (MLVU/MVLU on Hugging Face, the folder MLVU): json/N_TASK.json, video/N_TASK/.
Its two tasks of generation, 8_sub_scene and 9_summary, which a language model judges, are left out.

M-Avg, the published number, is the mean over the tasks.

Prompt and reading of an answer are TinyLLaVA-Video's (evals/video_choices.py). The trap: they are
not the benchmark's own, which begins the answer with "Best Option: (". And to two questions no
answer is right: see NO_CHOICE.
"""

from __future__ import annotations

from evals import video_choices
from evals.files import errors_at, find_first, read_rows
from evals.options import LETTER, with_letters
from evals.scores import mean_score

MAX_NEW_TOKENS = video_choices.MAX_NEW_TOKENS
UNREAD = video_choices.UNREAD
unread = video_choices.unread
PUBLISHED = ("M-Avg", "MLVU")

# The files; a task's name is that of its file without the number.
FILES = (
    "1_plotQA",
    "2_needle",
    "3_ego",
    "4_count",
    "5_order",
    "6_anomaly_reco",
    "7_topic_reasoning",
)
TASKS = [name.split("_", 1)[1] for name in FILES]

# The true answer to two questions of 2_needle, but none of their choices.
NO_CHOICE = "Catching a flying drone quadcopter"


def examples(data_dir):
    """Return the questions, task after task. Own keys: those of video_choices."""
    found = []
    for name, task in zip(FILES, TASKS, strict=True):
        rows = read_rows(find_first(data_dir, f"json/{name}.json"))
        for number, (where, row) in enumerate(rows):
            with errors_at(where):
                choices = with_letters(row.options("candidates"))
                answer = row.words("answer")
                label = None
                if answer != NO_CHOICE:
                    label = video_choices.letter_of(answer, choices)
                question = row.text("question")
                prompt = video_choices.with_bracketed_options(question, choices) + LETTER
                video = video_choices.find_clip(data_dir, f"video/{name}/{row.file('video')}")
                found.append(
                    video_choices.video_example(
                        where, f"{name}-{number}", video, prompt, choices, label, (task,)
                    )
                )
    return found


def score(examples, answers):
    """Return the mean over the tasks, then the score of each."""
    scores = video_choices.score(examples, answers, order=TASKS)
    return {"M-Avg": mean_score(scores)} | scores
