"""MVBench: twenty tasks of 200 questions each about what happens in short clips.

Files as published (OpenGVLab/MVBench on Hugging Face): json/TASK.json and video/, where its zips unpack to the folders
below, some clips to video/data0613/. The clips of Fine-grained Pose are NTU RGB+D's, which its makers give out; without
them run `mvbench-19`, which leaves that task out.

Where the benchmark asks about a part of a clip, "span" is that part in seconds, (start, end); the clips of Episodic
Reasoning are folders of frames, "rate" a second. Prompt and reading of an answer are TinyLLaVA-Video's
(evals/choices.py), not the benchmark's own, which begins the answer with "Best option:(". It heeds only the spans of
Episodic Reasoning. The mean over the tasks is the published number.
"""

from evals import LETTER, choices, first, reading, rows

MAX_NEW_TOKENS = choices.MAX_NEW_TOKENS
PUBLISHED = ("mean", "MVBench")
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
SPANS = {
    "Action Sequence",
    "Action Prediction",
    "Object Interaction",
    "Action Localization",
    "Episodic Reasoning",
}
FRAMES = {"Episodic Reasoning": 3}  # frames a second


def examples(data_dir, without=()):
    """[{"id", "image": None, "video", "prompt", "label", "choices", "groups", "where"}], task after task; "span" and
    "rate" where the benchmark says them."""
    found = []
    for task, folder in TASKS.items():
        if task in without:
            continue
        name = task.lower().replace(" ", "_").replace("-", "_")
        for number, (where, row) in enumerate(rows(first(data_dir, f"json/{name}.json"))):
            with reading(where):
                options = choices.letters(row["candidates"])
                label = choices.letter_of(row["answer"], options)
                prompt = choices.bracketed(row["question"], options) + LETTER
                clip = f"{folder}/{row['video']}"
                video = choices.clip(data_dir, f"video/{clip}", f"video/data0613/{clip}")
                found.append(
                    choices.example(
                        where, f"{name}-{number}", video, prompt, options, label, (task,)
                    )
                )
                if task in SPANS:
                    found[-1]["span"] = float(row["start"]), float(row["end"])
                if task in FRAMES:
                    found[-1]["rate"] = FRAMES[task]
    return found


def score(examples, answers):
    scores = choices.score(examples, answers, TASKS)
    return {"mean": choices.mean(scores)} | scores
