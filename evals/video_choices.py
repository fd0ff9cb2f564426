"""Multiple choice about one clip: what the video benchmarks share.

Questions are asked and answers are read as TinyLLaVA-Video does it, whose numbers are the published
ones (tinyllava/eval of github.com/ZhangXJ199/TinyLLaVA-Video).

The trap: an answer that no letter can be read off is guessed there, so that a score changes from
run to run. Here such an answer earns what a guess earns on average. Chance is 1 / number of
choices, for each question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from evals.files import find_first
from evals.options import parse_choice, strip_marks
from evals.scores import Result, group_scores, in_order

MAX_NEW_TOKENS = 1024
UNREAD = "give no letter, and earn what a guess earns"


def video_example(
    where: str,
    name: str,
    video: str,
    prompt: str,
    choices: dict[str, str],
    label: str | None,
    groups: tuple[str, ...],
) -> dict:
    """Return an example about the clip `video` (path from data_dir).

    choices: {letter: text}; label: the right letter; groups: the scores that it counts for.
    """
    return {
        "id": name,
        "image": None,
        "video": video,
        "prompt": prompt,
        "label": label,
        "choices": choices,
        "groups": groups,
        "where": where,
    }


def find_clip(data_dir, *names: str) -> str:
    """Return the path from data_dir of the first of these files or folders that is there.

    Raise UserError if none is.
    """
    return find_first(data_dir, *names).relative_to(data_dir).as_posix()


def letter_of(answer: str, choices: dict[str, str]) -> str:
    """Return the letter of the choice that is this text, of the last where two are alike.

    Raise ValueError if none is.
    """
    found = [letter for letter, text in choices.items() if text == answer]
    if not found:
        raise ValueError(f"the answer {answer!r} is none of its choices")
    return found[-1]


def with_bracketed_options(question: str, choices: dict[str, str]) -> str:
    """Return the question, then "(A) ..." a line, as MVBench and MLVU list options."""
    lines = [question]
    lines += [f"({letter}) {text}" for letter, text in choices.items()]

    # The official script strips what ends the list: an empty last option loses its space.
    return "\n".join(lines).rstrip()


def parse(answer: str, choices: dict[str, str]) -> str | None:
    """Return the letter that an answer begins with, or else that MMMU's rule finds; or None.

    "Apples" begins with A: the first letter counts even where a word follows.
    """
    answer = answer.strip()
    # TinyLLaVA-Video looks at the first letter before it asks MMMU's rule.
    begin = strip_marks(answer)[:1]
    if begin in choices:
        return begin
    return parse_choice(answer, choices)


def unread(examples: list[dict], answers: list[str]) -> int:
    """Return how many answers to multiple choice give no letter."""
    count = 0
    for example, answer in zip(examples, answers, strict=True):
        if example["choices"]:
            count += parse(answer, example["choices"]) is None
    return count


def grade(answer: str, example: dict) -> Result:
    """Return what an answer earns: 1, 0, or what a guess earns if no letter can be read off it."""
    label = example["label"]
    choices = example["choices"]
    chance = 1 / len(choices)

    said = parse(answer, choices)
    if said:
        credit = said == label
    elif label in choices:
        credit = chance
    else:
        # No choice is right, so no guess is.
        credit = 0.0
    return Result(example["groups"], credit, chance)


def score(
    examples: list[dict],
    answers: list[str],
    order: Iterable[str],
    grade: Callable[[str, dict], Result] = grade,
) -> dict[str, dict]:
    """Return {group: score}, groups in this order."""
    results = []
    for example, answer in zip(examples, answers, strict=True):
        results.append(grade(answer, example))
    return in_order(group_scores(results), order)
