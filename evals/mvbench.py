"""MVBench (Li et al., 2023): twenty tasks of 200 questions each about what happens in short clips.

Files as published (OpenGVLab/MVBench on Hugging Face): json/TASK.json and video/, where its zips
unpack to the folders below, some clips to video/data0613/. The clips of Fine-grained Pose are
NTU RGB+D's, which its makers give out; without them run `mvbench-19`, which leaves that task out.

Where the benchmark asks about a part of a clip, "span" is that part. The clips of Episodic
Reasoning are folders of frames. The mean over the tasks is the published number.

Prompt and reading of an answer are TinyLLaVA-Video's (evals/video_choices.py). The trap: they are
not the benchmark's own, which begins the answer with "Best option:(". And TinyLLaVA-Video heeds
only the spans of Episodic Reasoning, where the benchmark and this file heed all.
"""

from __future__ import annotations

from evals import video_choices
from evals.files import errors_at, find_first, read_rows
from evals.options import LETTER, with_letters
from evals.scores import mean_score

MAX_NEW_TOKENS = video_choices.MAX_NEW_TOKENS
UNREAD = video_choices.UNREAD
unread = video_choices.unread
PUBLISHED = ("mean", "MVBench")

# Task, and the folder of its clips.
TASKS = {
    "Action Sequence": "star/Charades_v1_480",
    "Action Prediction": "star/Charades_v1_480",
    "Action Antonym": "ssv2_video",
    "Fine-grained Action": "Moments_in_Time_Raw/videos",
    "Unexpected Action": "FunQA_test/test",
    "Object Existence": "clevrer/video_validation",
    "Object Interaction": "star/Charades_v1_480",
    "Object Shuffle": "perception/videos",
    "Moving Direction": "clevrer/video_validation",
    "Action Localization": "sta/sta_video",
    "Scene Transition": "scene_qa/video",
    "Action Count": "perception/videos",
    "Moving Count": "clevrer/video_validation",
    "Moving Attribute": "clevrer/video_validation",
    "State Change": "perception/videos",
    "Fine-grained Pose": "nturgbd",
    "Character Order": "perception/videos",
    "Egocentric Navigation": "vlnqa",
    "Episodic Reasoning": "tvqa/frames_fps3_hq",
    "Counterfactual Inference": "clevrer/video_validation",
}

# Tasks that ask about a part of a clip: the keys "start" and "end", in seconds.
WITH_SPAN = {
    "Action Sequence",
    "Action Prediction",
    "Object Interaction",
    "Action Localization",
    "Episodic Reasoning",
}

LONGEST_CLIP = 10**6  # seconds

# Tasks whose clips are folders of frames, and how many of these are a second.
RATES = {"Episodic Reasoning": 3}


def examples(data_dir, without=()):
    """Return the questions, task after task, but for the tasks `without`."""
    found = []
    for task in TASKS:
        if task not in without:
            found += read_task(data_dir, task)
    return found


def read_task(data_dir, task):
    """Return the questions of a task. Own keys: those of video_choices."""
    folder = TASKS[task]
    file_name = task.lower().replace(" ", "_").replace("-", "_")

    found = []
    rows = read_rows(find_first(data_dir, f"json/{file_name}.json"))
    for number, (where, row) in enumerate(rows):
        with errors_at(where):
            choices = with_letters(row.options("candidates"))
            label = video_choices.letter_of(row.words("answer"), choices)
            question = row.text("question")
            prompt = video_choices.with_bracketed_options(question, choices) + LETTER
            clip = f"{folder}/{row.file('video')}"
            video = video_choices.find_clip(data_dir, f"video/{clip}", f"video/data0613/{clip}")
            example = video_choices.video_example(
                where, f"{file_name}-{number}", video, prompt, choices, label, (task,)
            )
            if task in WITH_SPAN:
                example["span"] = (
                    row.number("start", 0, LONGEST_CLIP),
                    row.number("end", 0, LONGEST_CLIP),
                )
            if task in RATES:
                example["rate"] = RATES[task]
            found.append(example)
    return found


def score(examples, answers):
    """Return the mean over the tasks, then the score of each."""
    scores = video_choices.score(examples, answers, order=TASKS)
    return {"mean": mean_score(scores)} | scores
