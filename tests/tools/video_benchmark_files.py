"""The files of the five benchmarks about clips as they are published, a few rows each."""

from evals import longvideobench, mlvu, mmvu, mvbench, videomme
from tests.tools.benchmark_files import parquet, put


def videomme_rows():
    first = {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
        "videoID": "fFjv93ACGo8",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "Which kind of decoration is the most?",
        "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. St. Nicholas."],
        "answer": "C",
    }
    again = {"question_id": "001-2", "answer": "D"}
    other = {"duration": "long", "videoID": "-Xy_z", "question_id": "601-1", "answer": "A",
             "options": ["A. Yes", "B. 3.5 m.", "C. No.", "D. None"]}  # fmt: skip
    return {"videomme/test-00000-of-00001.parquet": [first, first | again, first | other]}


def mvbench_rows():
    """One question a task; of these tasks two, or one that is not plain."""
    plain = {
        "video": "v.mp4",
        "question": "What happened?",
        "candidates": ["one", "two", "three"],
        "answer": "two",
    }
    files = {
        f"json/{task.lower().replace(' ', '_').replace('-', '_')}.json": [plain]
        for task in mvbench.TASKS
    }
    yes = {
        "video": "20.webm",
        "question": "Is it so?\n",
        "candidates": ["no", "yes"],
        "answer": "no",
    }
    twins = plain | {"candidates": ["two", "one", "two", ""]}
    moved = {"video": "only_in_0613.mp4", "start": 0.0, "end": 7}
    frames = {
        "video": "castle_s01e02_seg02_clip_00",
        "start": 12.5,
        "end": 40.0,
        "subtitle": "Castle : Hi.",
    }
    timed = {"start": 1.5, "end": 9.0, "accurate_start": 2.0}
    for name in (
        "action_sequence",
        "action_prediction",
        "object_interaction",
        "action_localization",
    ):
        files[f"json/{name}.json"] = [plain | timed]
    files["json/action_sequence.json"].append(plain | moved)
    files["json/action_antonym.json"] = [yes, twins]
    files["json/episodic_reasoning.json"] = [plain | frames]
    files["json/state_change.json"] = [plain | timed]  # but the benchmark asks about the whole clip
    return files


def mlvu_rows():
    plain = {"video": "movie101_66.mp4", "duration": 246, "question": "What colour is it?",
             "candidates": ["Yellow", "Red", "Green", "Blue"], "answer": "Yellow"}  # fmt: skip
    files = {f"json/{task}.json": [plain] for task in mlvu.FILES}
    files["json/1_plotQA.json"] = [
        plain,
        plain | {"candidates": ["Blue", "Red", "Blue", ""], "answer": "Blue"},
    ]
    files["json/2_needle.json"] = [
        plain
        | {
            "candidates": ["Fishing", "Catching the drone", "Swimming", "Sunbathing"],
            "answer": "Catching a flying drone quadcopter",
        }
    ]
    files["json/8_sub_scene.json"] = [
        {"video": "subPlot_1.mp4", "question": "Describe it.", "answer": "A man."}
    ]
    return files


def longvideobench_rows():
    first = {
        "video_id": "86CxyhFV9MI",
        "question": "Which subtitles appear?",
        "question_wo_referring_query": "Which?",
        "candidates": ["one", "two", "three", "four", "five"],
        "correct_choice": 4,
        "position": [854],
        "topic_category": "NP-News-Programs",
        "question_category": "TOS",
        "level": "L2-Relation",
        "id": "86CxyhFV9MI_0",
        "video_path": "86CxyhFV9MI.mp4",
        "subtitle_path": "86CxyhFV9MI_en.json",
        "duration_group": 600,
        "starting_timestamp_for_subtitles": 0,
        "duration": 160.0,
    }
    second = first | {
        "id": "x_1",
        "video_path": "@x.1.mp4",
        "subtitle_path": "x_en.json",
        "duration_group": 15,
        "duration": 4.5,
        "starting_timestamp_for_subtitles": 60,
        "candidates": ["a", "b"],
        "correct_choice": 0,
        "question": "What is he doing?",
    }
    said = [
        (0.0, 9.0, "unseen "),
        (9.5, 12.0, "at 10, "),
        (40.2, 40.4, "brief at 40, "),
        (95.0, None, "to the end, "),
        (145.0, 153.0, "at 150"),
    ]
    spoken = [{"timestamp": [start, end], "text": text} for start, end, text in said]
    said = [("00:01:00.600", "00:01:01.200", "at 1 "), ("00:01:03.000", "00:01:03.900", "at 3.375")]
    listed = [{"start": start, "end": end, "line": text} for start, end, text in said]
    return {
        "lvb_val.json": [first, second],
        "subtitles/86CxyhFV9MI_en.json": spoken,
        "subtitles/x_en.json": listed,
    }


SORTS = ("heap", "quick", "merge", "bubble", "radix")


def mmvu_rows():
    site = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos"
    choice = {
        "id": "validation_3",
        "video": f"{site}/Computer_Science/1.mp4",
        "youtube_url": "",
        "question_type": "multiple-choice",
        "metadata": {"subject": "Computer Science"},
        "answer": "E",
        "question": "Which sort?",
        "choices": dict(zip("ABCDE", SORTS, strict=True)),
    }
    blank = {"question_type": "open-ended", "choices": dict.fromkeys("ABCDE", "")}
    art = blank | {
        "id": "validation_0",
        "video": f"{site}/Art/0.mp4",
        "question": "Which technique?",
        "answer": "Dolly Zoom",
    }
    nerve = blank | {
        "id": "validation_305",
        "video": f"{site}/Clinical_Medicine/2.mp4",
        "question": "Which nerve?",
        "answer": "cranial nerve III ",
    }
    return {"validation.json": [choice | art, choice, choice | nerve]}


TASKS = {
    "videomme": (videomme, videomme_rows),
    "mvbench": (mvbench, mvbench_rows),
    "mlvu": (mlvu, mlvu_rows),
    "longvideobench": (longvideobench, longvideobench_rows),
    "mmvu": (mmvu, mmvu_rows),
}
CLIPS = {
    "videomme": ["data/fFjv93ACGo8.mp4", "data/-Xy_z.mp4"],
    "mvbench": [
        f"video/{folder}/v.mp4"
        for folder in sorted({*mvbench.TASKS.values()} - {"tvqa/frames_fps3_hq"})
    ]
    + [
        "video/ssv2_video/20.webm",
        "video/data0613/star/Charades_v1_480/only_in_0613.mp4",
        "video/tvqa/frames_fps3_hq/castle_s01e02_seg02_clip_00/00001.jpg",
    ],
    "mlvu": [f"video/{task}/movie101_66.mp4" for task in mlvu.FILES],
    "longvideobench": ["videos/86CxyhFV9MI.mp4", "videos/@x.1.mp4"],
    "mmvu": ["videos/Computer_Science/1.mp4", "videos/Art/0.mp4", "videos/Clinical_Medicine/2.mp4"],
}


def write(task, folder, files=None):
    for name, rows in (files or TASKS[task][1]()).items():
        (parquet if name.endswith(".parquet") else put)(folder / name, rows)
    for name in CLIPS[task]:
        put(folder / name, b"a clip")
