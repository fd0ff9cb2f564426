"""Benchmarks, one a file: each makes questions of a benchmark's files and scores the answers.

Those that are rows and a metric are entries of one table, in row_files.py: ChartQA, DocVQA,
InfoVQA, AI2D, OCRBench, MMStar.

`Task` below says what such a file offers to evaluate.py, and `Example` what a question is. What
the files share:

    files.py          rows of the benchmark's files, and errors that name a row
    options.py        options with letters: how they are listed, which letter an answer means
    shown.py          the pictures and videos of a question, and whether they are there
    scores.py         a score and its chance level, for each group of questions; their table
    metrics.py        one answer compared with the true ones
    intervals.py      intervals of a score, and of the difference of two models
    vqa.py            answers compared with those of ten humans
    words.py          words of captions, by nltk and spaCy
    video_choices.py  multiple choice about a clip
    kept.py           answers on disk: resumed after a kill, shared by ranks
    origin.py         what they were made from, and that nothing else is written over
    judge.py          a language model that judges answers
    published.py      the published number beside a score
    lmms_eval.py      the way in for lmms-eval, which has many more benchmarks

Two files are no benchmark, but make one of a user's rows: own_rows.py has the questions, their
scores and the loss, own_rows_report.py what is printed, and the page with the wrong answers.

Read moving.py first, the shortest, then pope.py, which reads its questions in two layouts.

To add a benchmark, write evals/NAME.py with the parts of `Task`, name it in the table TASKS of
evaluate.py, and add its files and expected questions to the tests. If it is rows and a metric, an
entry of row_files.py's table is all that it takes.

Most benchmarks are read in two layouts of their files, from one folder: the layout that LLaVA's
eval.zip and TinyLLaVA Factory use (playground/data/eval/NAME), and the one that the benchmark
itself is published in. Those about videos are read only in the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict


class Example(TypedDict, total=False):
    """One question. A task may add keys of its own, which only its `score`, `judge`, `write` read.

    All have "id", "image", "prompt", "label" and "where"; the others stand where they are needed.
    """

    id: str  # unique in the task
    where: str  # "file:row" it was read from, for error messages
    prompt: str  # may say <image> where a picture goes; otherwise pictures go before it
    conversation: list[dict]  # the turns that are asked in place of `prompt`, <image> in its place
    label: Any  # the true answer or answers, as `score` wants them; None if they are not public

    # What the question is about. Paths are relative to the data folder.
    image: str | list[str] | None  # one path, several, or None for no picture
    video: str | list[str]  # in place of an image: a file, or a folder of frames
    rate: float  # frames a second of such a folder
    span: tuple[float, float]  # only this part of the video, (from, to) in seconds

    # Pictures or videos that are no files of the data folder: their bytes, or their paths. All may
    # be too many for the memory, so some tasks read one when it is asked for. "image" or "video"
    # has names for them; in a file of rows a name is unique in its row only.
    pictures: Sequence[bytes | Path]
    row: int  # the number of that row

    # What belongs together, such as all questions about a picture. --limit takes all of a group or
    # none, and an interval counts it as one draw.
    group: Hashable
    groups: Sequence[str]  # the names of the scores that it counts in, where tasks use this key


class Task(Protocol):
    """What evaluate.py asks of a file of evals/, or of a variant of one.

    Every task has MAX_NEW_TOKENS and `examples`, and either `score` or `judge`. The rest is
    optional: a file leaves out what its benchmark does not have.

    Scores are {name: {"score", "chance", "n"}}: a number, mostly percent; what an answer reaches
    without a look at the picture, None if unknown; the number of questions. They are printed in
    this order.
    """

    # The longest answer, in tokens.
    MAX_NEW_TOKENS: int

    # Optional: the name of a score, and its published number. That is the column of a recipe's
    # [published] table, or {model: number} if recipes have none; the first model is shown.
    PUBLISHED: tuple[str, str | dict[str, float]]

    # Beside `unread`.
    UNREAD: str

    def examples(self, data_dir: str | Path) -> list[Example]:
        """Return the questions in the data folder.

        Raise UserError for a file that is missing, or a row that is not as published.
        """

    def score(self, examples: list[Example], answers: list[str]) -> dict[str, dict]:
        """Return the scores of one answer to each example; {} if no example has a label."""

    def judge(
        self, examples: list[Example], answers: list[str], ask: Callable, stem: Path, data_dir: str
    ) -> dict[str, dict]:
        """Return the scores of answers that a language model judges.

        `ask` is a judge.Judge. Files that this writes have names that begin with `stem`.
        """

    def write(
        self, examples: list[Example], answers: list[str], stem: Path, data_dir: str
    ) -> list[Path]:
        """Write the answers as the benchmark's server or script takes them; return the files.

        Optional. Their names begin with `stem`.
        """

    def unread(self, examples: list[Example], answers: list[str]) -> int:
        """Return how many answers the official rule cannot read. Optional.

        UNREAD says what becomes of them, to go on after "3 of 9 answers".
        """

    def text_only(self, data_dir: str | Path) -> dict[str, float]:
        """Return {name of a score: what the best answers to the words alone reach}. Optional."""
