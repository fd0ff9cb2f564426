"""Benchmarks, one a file: each makes questions of a benchmark's files and scores the answers.

`Task` below says what such a file offers to evaluate.py, and `Example` what a question is. What
the files share:

    files.py          rows of the benchmark's files, and errors that name a row
    options.py        options with letters: how they are listed, which letter an answer means
    scores.py         a score and its chance level, for each group of questions
    vqa.py            answers compared with those of ten humans
    video_choices.py  multiple choice about a clip
    judge.py          a language model that judges answers
    published.py      the published number beside a score
    lmms_eval.py      the way in for lmms-eval, which has many more benchmarks

Read pope.py first: it has everything that a task needs and nothing else.

To add a benchmark, write evals/NAME.py with the parts of `Task`, name it in the table TASKS of
evaluate.py, and add its files and expected questions to the tests.

Most benchmarks are read in two layouts of their files, from one folder: the layout that LLaVA's
eval.zip and TinyLLaVA Factory use (playground/data/eval/NAME), and the one that the benchmark
itself is published in. Those about videos are read only in the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Protocol, TypedDict


class Example(TypedDict, total=False):
    """One question. A task may add keys of its own, which only its `score`, `judge`, `write` read.

    All have "id", "image", "prompt", "label" and "where"; the others stand where they are needed.
    """

    id: str  # unique in the task
    where: str  # "file:row" it was read from, for error messages
    prompt: str  # may say <image> where a picture goes; otherwise pictures go before it
    label: Any  # the true answer or answers, as `score` wants them; None if they are not public

    # What the question is about. Paths are relative to the data folder.
    image: str | list[str] | None  # one path, several, or None for no picture
    pictures: list[bytes]  # the pictures themselves if they are no files; "image" then names them
    video: str  # in place of an image: a file, or a folder of frames
    rate: float  # frames a second of such a folder
    span: tuple[float, float]  # only this part of the video, (from, to) in seconds

    group: Hashable  # --limit keeps examples of one group together


class Task(Protocol):
    """What evaluate.py asks of a file of evals/, or of a variant of one.

    Every task has `MAX_NEW_TOKENS` and `examples`, and either `score` or `judge`. The rest is
    optional: a file leaves out what its benchmark does not have.

    Scores are {name: {"score", "chance", "n"}}: a number (mostly percent), what an answer without
    looking at the picture reaches, and the number of questions. A "chance" of None is unknown. The
    first name is the first line of the printed table.
    """

    MAX_NEW_TOKENS: int

    # The name of a score, and its published number: the column of a recipe's [published] table, or
    # {model: number} where no recipe has it; the first model is shown.
    PUBLISHED: tuple[str, str | dict[str, float]]

    examples: Callable[[str | Path], list[Example]]
    """Return the questions in the data folder. Raise UserError for a file that is missing or a row
    that is not as published."""

    score: Callable[[list[Example], list[str]], dict[str, dict]]
    """Return the scores of one answer to each example; {} if no example has a label."""

    judge: Callable[..., dict[str, dict]]
    """judge(examples, answers, ask, stem, data_dir): as `score`, for answers that a language model
    judges; `ask` is a judge.Judge. What it writes has a name that begins with `stem`."""

    write: Callable[..., list[Path]]
    """write(examples, answers, stem, data_dir): write the answers as the benchmark's own server or
    script takes them, under names that begin with `stem`, and return the files."""

    text_only: Callable[[str | Path], dict[str, float]]
    """Return {name of a score: what the best answers to the words alone reach}."""
