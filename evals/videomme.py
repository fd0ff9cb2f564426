"""Video-MME: 900 clips of 11 seconds to an hour, three questions on each, with four options.

Files as published (lmms-lab/Video-MME on Hugging Face): videomme/test-00000-of-00001.parquet, read with pyarrow, and
data/ID.mp4, which videos_chunked_*.zip hold.

Asked without subtitles, with TinyLLaVA-Video's prompt and reading of an answer (evals/choices.py), not with the
benchmark's own, which asks "Select the best answer to the following multiple-choice question ...".
"""

from functools import partial

from evals import LETTER, choices, first, parquet_rows, reading

MAX_NEW_TOKENS = choices.MAX_NEW_TOKENS
PUBLISHED = ("all", "VideoMME")
LENGTHS = {
    "short": "short, to 2 min",
    "medium": "medium, 4 to 15 min",
    "long": "long, 30 to 60 min",
}


def examples(data_dir):
    """[{"id", "image": None, "video", "prompt", "label", "choices", "groups", "where"}] in file order."""
    found = []
    for where, row in parquet_rows(first(data_dir, "videomme/test-00000-of-00001.parquet")):
        with reading(where):
            options = dict(
                option.split(". ", 1) for option in row["options"]
            )  # ["A. Apples.", ...]
            label = choices.letter_of(row["answer"], {letter: letter for letter in options})
            texts = {letter: text.strip().removesuffix(".") for letter, text in options.items()}
            prompt = "\n".join([row["question"], *row["options"]]) + LETTER
            video = choices.clip(data_dir, f"data/{row['videoID']}.mp4")
            groups = ("all", LENGTHS[row["duration"]])
            found.append(
                choices.example(where, row["question_id"], video, prompt, texts, label, groups)
            )
    return found


score = partial(choices.score, order=("all", *LENGTHS.values()))
