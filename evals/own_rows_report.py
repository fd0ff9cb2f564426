"""What is told of the answers to one's own rows: a few lines, a table, a page with the wrong ones.

    answers = {"model": [...], "pictures blanked": [...], "out/other": [...]}
    report = make_report(scale, examples, answers, losses)
    print(report.text)
    page = wrong_page("out/mine on mine.jsonl", report.text, scale, examples, answers, pictures)

The first of `answers` is the model that all is about. Each other, the same model without a look at
the pictures or another model, gets a sentence that says whether the questions tell the two apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from PIL import Image

from config import printable
from evals import Example, pope
from evals.intervals import Difference
from evals.own_rows import Scale
from evals.scores import score_table
from evals.shown import load_shown
from inputs.conversation import IMAGE
from inputs.pictures import load_image
from inputs.preview import html_page, image_tag
from inputs.video import stream

# How many wrong answers the page shows, how wide a picture is there, and frames of a video.
MOST_SHOWN = 100
PAGE_WIDTH = 240
PAGE_FRAMES = 3

# A small picture is enlarged so many times at most.
ENLARGED = 4


# ----------------------------------------------------------------------------------------- lines


@dataclass
class Report:
    """What some answers reach, and how they compare."""

    scores: dict[str, dict]  # {name: a score as evals/scores.py has it}
    differences: dict[str, list[float]]  # {who: [mean, low, high] in percent, of the first to it}
    text: str  # what the scores are of, their table, and a sentence for each difference


def make_report(
    scale: Scale, examples: list[Example], answers: dict[str, list[str]], losses: dict[str, float]
) -> Report:
    """Return the scores of all answers, and how the first differ from each of the others.

    answers, losses: {who: the answers, or the mean loss}.
    """
    model, *others = answers

    scores = {}
    for who, said in answers.items():
        name = scale.name
        if who != model:
            name = f"{scale.name}, {who}"
        scores[name] = scale.score(examples, said) | {"loss": losses[who]}

    differences = {}
    lines = [*introduction(scale, answers[model]), score_table(scores)]
    for who in others:
        found = scale.compare(examples, answers[model], answers[who])
        differences[who] = [100 * value for value in found]
        lines.append(sentence(found, who, len(examples)))
    return Report(scores, differences, "\n".join(lines))


def introduction(scale: Scale, answers: list[str]) -> list[str]:
    """Return the lines before the table: what the metric and its controls are of these answers."""
    lines = [f"{scale.name}: {scale.metric.says} ({scale.reason})"]
    if scale.constant:
        lines.append(f"chance: always {printable(scale.constant, 60)!r}")
    if scale.name == "yesno":
        count = pope.unread([], answers)
        lines.append(f"{count} of {len(answers)} answers {pope.UNREAD}")
    return lines


def sentence(found: Difference, than: str, n: int) -> str:
    """Return a difference in words; than: what the model is compared with."""
    points = f"{abs(100 * found.mean):.1f} points"
    if found.low > 0:
        return f"better than {than} by {points} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    if found.high < 0:
        low, high = -100 * found.high, -100 * found.low
        return f"worse than {than} by {points} [{low:.1f}, {high:.1f}]"
    seen = f"{100 * found.mean:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    shown_by = "1 question"
    if n > 1:
        shown_by = f"{n} questions"
    return f"no difference from {than} that {shown_by} could show: {seen}"


# ------------------------------------------------------------------------------------------ page

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
  color: #1c2430 }
h1 { font-size: 1.5em; overflow-wrap: anywhere }
pre { background: #f4f6f8; padding: 1em; overflow-x: auto }
article { display: flex; flex-wrap: wrap; gap: 1.2em; padding: 1em 0;
  border-top: 1px solid #dde2e8 }
.shown { flex: 0 0 240px }
.shown img { display: block; margin-bottom: 4px; border: 1px solid #dde2e8 }
.said { flex: 1 1 20em; min-width: 0; overflow-wrap: anywhere }
.said p { margin: 0; white-space: pre-wrap }
.said .asked { font-weight: bold; margin-bottom: .5em }
dl { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: .1em 1em; margin: 0 }
dt, .before, .where { color: #5b6572 }
dd { margin: 0; white-space: pre-wrap }
.where { font-size: .85em }
"""


def wrong_page(
    title: str,
    text: str,
    scale: Scale,
    examples: list[Example],
    answers: dict[str, list[str]],
    pictures: Callable[[Example], list[Image.Image]],
) -> str:
    """Return a page with the answers that do not earn all: evenly of them, at most MOST_SHOWN.

    text: what stands above them. answers: {who: what it says}, first whom the page is about.
    pictures: returns what an example shows, videos as some of their frames.
    """
    credits = scale.credits(examples, next(iter(answers.values())))
    wrong = [k for k, credit in enumerate(credits) if credit < 1]
    count = min(len(wrong), MOST_SHOWN)
    shown = [wrong[i * len(wrong) // count] for i in range(count)]

    how = "wrong"
    if scale.name in ("f1", "anls"):
        how = "not wholly right"
    said = f"{len(wrong)} of {len(examples)} answers are {how}"
    if count < len(wrong):
        said += f"; {count} of them, spread evenly, are shown"

    body = [f"<h1>{escape(title)}</h1>", f"<pre>{escape(text)}</pre>", f"<p>{said}.</p>"]
    for k in shown:
        of_each = {who: texts[k] for who, texts in answers.items()}
        body.append(article(examples[k], of_each, pictures(examples[k])))
    return html_page(title, "\n".join(body), STYLE)


def article(example: Example, answers: dict[str, str], images: list[Image.Image]) -> str:
    """Return a question as HTML: what it shows, the turns before it, the true and other answers."""
    *before, asked = example["conversation"]
    said = ""
    if before:
        turns = "\n".join(f"{turn['from']}: {without_marks(turn)}" for turn in before)
        said += f'<p class="before">{escape(turns)}</p>'
    said += f'<p class="asked">{escape(without_marks(asked))}</p>'

    said += "<dl>"
    for who, answer in [("true", " | ".join(example["label"])), *answers.items()]:
        said += f"<dt>{escape(who)}</dt><dd>{escape(answer)}</dd>"
    said += "</dl>"
    said += f'<p class="where">{escape(printable(example["where"], 1000))}</p>'

    shown = ""
    if images:
        shown = f'<div class="shown">{"".join(small_image(image) for image in images)}</div>'
    return f'<article>{shown}<div class="said">{said}</div></article>'


def without_marks(turn: dict) -> str:
    """Return the text of a turn without <image>: the pictures stand beside it."""
    return turn["value"].replace(IMAGE, "").strip()


def small_image(image: Image.Image) -> str:
    """Return a picture as HTML, no larger than the page shows it."""
    small = image.copy()
    small.thumbnail((2 * PAGE_WIDTH, 2 * PAGE_WIDTH))
    return image_tag(small, min(PAGE_WIDTH, ENLARGED * image.width))


def pictures_of(data_dir) -> Callable[[Example], list[Image.Image]]:
    """Return a function from an example to what a page shows of it: of a video some frames."""

    def load(source, kind: str, **part) -> list[Image.Image]:
        if kind == "image":
            return [load_image(source)]
        return list(stream(source, PAGE_FRAMES, **part))

    def pictures(example: Example) -> list[Image.Image]:
        return [image for shown in load_shown(example, data_dir, load) for image in shown]

    return pictures
