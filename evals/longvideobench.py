"""LongVideoBench, validation (Wu et al., 2024): clips of 8 seconds to an hour, and what is said in
them.

The task `longvideobench` shows the subtitles too; `longvideobench-plain` asks without them and
needs no subtitles/.

Files as published (longvideobench/LongVideoBench on Hugging Face): lvb_val.json, videos/,
subtitles/ (both unpacked).

Prompt and reading of an answer are TinyLLaVA-Video's (evals/video_choices.py). The trap: the
benchmark puts the subtitles between the frames that they are seen in. TinyLLaVA-Video shows the
clip first, then the subtitles in one line, with a mark for each of 16 frames, whatever number the
model sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from evals import video_choices
from evals.files import errors_at, find_first, read_rows
from evals.options import LETTER, list_options, with_letters

MAX_NEW_TOKENS = video_choices.MAX_NEW_TOKENS
UNREAD = video_choices.UNREAD
unread = video_choices.unread
PUBLISHED = ("all", "LongVideoBench")

# The published "duration_group", and the name of its score.
LENGTHS = {15: "8 to 15 s", 60: "15 to 60 s", 600: "3 to 10 min", 3600: "15 to 60 min"}

LONGEST_CLIP = 10**6  # seconds; no clip and no subtitle is later
FRAMES = 16
MARK = "[image]"


def examples(data_dir, subtitles=True):
    """Return the questions in the order of the file. Own keys: those of video_choices."""
    found = []
    for where, row in read_rows(find_first(data_dir, "lvb_val.json")):
        with errors_at(where):
            choices = with_letters(row.options("candidates"))
            right = row.integer("correct_choice", 0, len(choices) - 1)
            label = list(choices)[right]

            prompt = row.text("question")
            if subtitles:
                duration = row.number("duration", 0, LONGEST_CLIP)
                said = interleave(read_subtitles(data_dir, row), duration)
                prompt = f"subtitles:{said}\nquestion: \n{prompt}"
            prompt += list_options(choices.values()) + LETTER

            video = video_choices.find_clip(data_dir, f"videos/{row.file('video_path')}")
            groups = ("all", LENGTHS[row.integer("duration_group", 0, 3600)])
            name = str(row.identifier("id"))
            found.append(
                video_choices.video_example(where, name, video, prompt, choices, label, groups)
            )
    return found


@dataclass(frozen=True)
class Subtitle:
    """What is said in a part of a clip; start and end in seconds of the clip."""

    start: float
    end: float
    text: str


def read_subtitles(data_dir, row):
    """Return the subtitles of a question's clip, which are published in two forms.

    Either {"timestamp": [start, end] in seconds, "text"}, where the last may have no end, or
    {"start": "h:m:s", "end", "line"}. Their clock began some time before the clip.
    """
    file = find_first(data_dir, f"subtitles/{row.file('subtitle_path')}")
    offset = row.number("starting_timestamp_for_subtitles", -LONGEST_CLIP, LONGEST_CLIP)

    found = []
    for where, line in read_rows(file):
        with errors_at(where):
            if "timestamp" in line:
                start, end = line.values["timestamp"]
                text = line.text("text")
                # The last may have no end: it is seen until the clip ends.
                if not isinstance(end, float):
                    end = row.number("duration", 0, LONGEST_CLIP)
                start = checked_seconds(start)
                end = checked_seconds(end)
            else:
                start = seconds(line.text("start"))
                end = seconds(line.text("end"))
                text = line.text("line")
            found.append(Subtitle(start - offset, end - offset, text))
    return found


def seconds(clock):
    """Return the seconds of "h:m:s"."""
    hours, minutes, rest = clock.split(":")
    return checked_seconds(int(hours) * 3600 + int(minutes) * 60 + float(rest))


def checked_seconds(time):
    """Return a time of a clip, in seconds. Raise ValueError for what is none."""
    is_number = isinstance(time, int | float) and not isinstance(time, bool)
    if is_number and abs(time) <= LONGEST_CLIP:  # false for NaN
        return time
    raise ValueError(f"{time!r} is no time in seconds")


def interleave(subtitles, duration):
    """Return the subtitles that are seen in FRAMES even frames of a clip, with MARK for each frame.

    A clip shorter than FRAMES seconds has a frame for each whole second.
    """
    count = max(1, min(FRAMES, int(duration)))
    frames = [duration / count * i for i in range(count)]

    text = ""
    marked = 0
    for subtitle in subtitles:
        start = subtitle.start
        end = subtitle.end
        middle = (start + end) / 2

        # First the frames up to its middle.
        before = sum(time <= middle for time in frames[marked:])
        text += MARK * before
        marked += before

        # One that is shorter than a second lasts for that second around its middle.
        if end - start < 1:
            start = middle - 0.5
            end = middle + 0.5
        if any(start < time < end for time in frames):
            text += subtitle.text
    return text + MARK * (count - marked)


def score(examples, answers):
    """Return the scores of all questions and of each length of clips."""
    return video_choices.score(examples, answers, order=("all", *LENGTHS.values()))
