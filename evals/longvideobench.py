"""LongVideoBench, validation: clips of 8 seconds to an hour, and what is said in them.

Files as published (longvideobench/LongVideoBench on Hugging Face): lvb_val.json, videos/, subtitles/ (both unpacked).

The benchmark puts the subtitles that are seen in the frames between those frames. As TinyLLaVA-Video does, whose prompt
and reading of an answer these are (evals/choices.py), the clip comes first, then the subtitles in one line, with a mark
for each of 16 frames, whatever number the model sees. `longvideobench-plain` asks without them and needs no subtitles/.
"""

from functools import partial

from evals import LETTER, choices, first, lettered, reading, rows, table

MAX_NEW_TOKENS = choices.MAX_NEW_TOKENS
PUBLISHED = ("all", "LongVideoBench")
LENGTHS = {15: "8 to 15 s", 60: "15 to 60 s", 600: "3 to 10 min", 3600: "15 to 60 min"}
FRAMES = 16


def examples(data_dir, subtitles=True):
    """[{"id", "image": None, "video", "prompt", "label", "choices", "groups", "where"}] in file order."""
    found = []
    for where, row in rows(first(data_dir, "lvb_val.json")):
        with reading(where):
            options, prompt = choices.letters(row["candidates"]), row["question"]
            label = list(options)[row["correct_choice"]]
            if subtitles:
                lines = table(first(data_dir, f"subtitles/{row['subtitle_path']}")).values()
                prompt = f"subtitles:{interleaved(lines, row)}\nquestion: \n{prompt}"
            prompt += lettered(options.values()) + LETTER
            video = choices.clip(data_dir, f"videos/{row['video_path']}")
            groups = ("all", LENGTHS[row["duration_group"]])
            found.append(choices.example(where, row["id"], video, prompt, options, label, groups))
    return found


def interleaved(lines, row):
    """The subtitles {"timestamp": seconds, "text"} or {"start", "end": h:m:s, "line"} that FRAMES even frames of a
    clip fall in, with "[image]" where these stand. A shorter one than a second lasts for that second around it."""
    duration, offset = row["duration"], row["starting_timestamp_for_subtitles"]
    count = max(1, min(FRAMES, int(duration)))
    frames = [duration / count * i for i in range(count)]
    text, shown = "", 0
    for line in lines:
        if "timestamp" in line:
            (start, end), said = line["timestamp"], line["text"]
            end = end if isinstance(end, float) else duration
        else:
            start, end, said = seconds(line["start"]), seconds(line["end"]), line["line"]
        start, end = start - offset, end - offset
        middle = (start + end) / 2
        before = sum(time <= middle for time in frames[shown:])
        text, shown = text + "[image]" * before, shown + before
        if end - start < 1:
            start, end = middle - 0.5, middle + 0.5
        if any(start < time < end for time in frames):
            text += said
    return text + "[image]" * (count - shown)


def seconds(clock):
    h, m, s = clock.split(":")
    return int(h) * 3600 + int(m) * 60 + float(s)


score = partial(choices.score, order=("all", *LENGTHS.values()))
