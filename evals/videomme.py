"""Video-MME (Fu et al., 2024): 900 clips of 11 seconds to an hour, three questions on each, with
four options.

Files as published (lmms-lab/Video-MME on Hugging Face): videomme/test-00000-of-00001.parquet, read
with pyarrow, and data/ID.mp4, which videos_chunked_*.zip hold.

Prompt and reading of an answer are TinyLLaVA-Video's (evals/video_choices.py). The trap: they are
not the benchmark's own, which asks "Select the best answer to the following multiple-choice
question ...". No subtitles are shown.
"""

from __future__ import annotations

from evals import video_choices
from evals.files import errors_at, find_first, read_parquet
from evals.options import LETTER

MAX_NEW_TOKENS = video_choices.MAX_NEW_TOKENS
UNREAD = video_choices.UNREAD
unread = video_choices.unread
PUBLISHED = ("all", "VideoMME")
LENGTHS = {
    "short": "short, to 2 min",
    "medium": "medium, 4 to 15 min",
    "long": "long, 30 to 60 min",
}


def examples(data_dir):
    """Return the questions in the order of the file. Own keys: those of video_choices."""
    found = []
    for where, row in read_parquet(find_first(data_dir, "videomme/test-00000-of-00001.parquet")):
        with errors_at(where):
            # The options are written with their letters: "A. Apples."
            listed = row.options("options")
            options = dict(option.split(". ", 1) for option in listed)
            letters = {letter: letter for letter in options}
            label = video_choices.letter_of(row.values.get("answer"), letters)

            choices = {}
            for letter, text in options.items():
                choices[letter] = text.strip().removesuffix(".")

            prompt = "\n".join([row.text("question"), *listed]) + LETTER
            video = video_choices.find_clip(data_dir, f"data/{row.file('videoID')}.mp4")
            groups = ("all", LENGTHS[row.text("duration")])
            name = str(row.identifier("question_id"))
            found.append(
                video_choices.video_example(where, name, video, prompt, choices, label, groups)
            )
    return found


def score(examples, answers):
    """Return the scores of all questions and of each length of clips."""
    return video_choices.score(examples, answers, order=("all", *LENGTHS.values()))
