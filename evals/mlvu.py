"""MLVU, the multiple-choice part of its dev set: seven tasks about clips of three minutes to two hours.

Files as published (MLVU/MVLU on Hugging Face, the folder MLVU): json/N_TASK.json, video/N_TASK/. Its two tasks of
generation, 8_sub_scene and 9_summary, which a language model judges, are left out.

Prompt and reading of an answer are TinyLLaVA-Video's (evals/choices.py), not the benchmark's own, which begins the
answer with "Best Option: (". M-Avg, the published number, is the mean over the tasks.
"""

from evals import LETTER, choices, first, reading, rows

MAX_NEW_TOKENS = choices.MAX_NEW_TOKENS
PUBLISHED = ("M-Avg", "MLVU")
TASKS = (
    "1_plotQA",
    "2_needle",
    "3_ego",
    "4_count",
    "5_order",
    "6_anomaly_reco",
    "7_topic_reasoning",
)
# The answer to two questions of 2_needle, but none of their choices: no answer is right, as officially.
NO_CHOICE = "Catching a flying drone quadcopter"


def examples(data_dir):
    """[{"id", "image": None, "video", "prompt", "label", "choices", "groups", "where"}], task after task."""
    found = []
    for task in TASKS:
        for number, (where, row) in enumerate(rows(first(data_dir, f"json/{task}.json"))):
            with reading(where):
                options = choices.letters(row["candidates"])
                label = (
                    None
                    if row["answer"] == NO_CHOICE
                    else choices.letter_of(row["answer"], options)
                )
                prompt = choices.bracketed(row["question"], options) + LETTER
                video = choices.clip(data_dir, f"video/{task}/{row['video']}")
                found.append(
                    choices.example(
                        where, f"{task}-{number}", video, prompt, options, label, (task[2:],)
                    )
                )
    return found


def score(examples, answers):
    scores = choices.score(examples, answers, [task[2:] for task in TASKS])
    return {"M-Avg": choices.mean(scores)} | scores
