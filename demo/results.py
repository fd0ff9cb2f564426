"""What the report of a demo run shows: the files of the run, read, and what is computed from them.

    run = read_run(Path("out/demo"))    # the recipe, the log, the answers with and without pictures
    samples, mistakes = choose_samples(run.examples, run.right)

report.py draws it. The scores are those that evaluate.py wrote (evals/world.py); only single
answers are judged again here, to mark them right or wrong.

The file in order: what a run consists of, reading it from the disk, what is computed for the page.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkpoints.files import parse_json
from checkpoints.json_lines import parse_row
from config import UserError
from evals import world
from training.run_log import read_log

# How many of the sample pictures show each kind of question.
SAMPLES = {
    "existence_random": 4,
    "existence_popular": 3,
    "existence_adversarial": 4,
    "colour": 3,
    "shape": 3,
    "count": 3,
    "relation": 4,
    "unseen_sizes": 2,
    "unseen_positions": 2,
    "unseen_backgrounds": 2,
    "unseen_objects": 2,
}
MISTAKES = 16  # further wrong answers


@dataclass
class StageResult:
    """One stage of training, from the log."""

    start: dict
    end: dict
    steps: list[dict]
    validations: list[dict]


@dataclass
class Evaluation:
    """What evaluate.py wrote of one run over the benchmark."""

    scores: dict[str, dict]  # name -> {"score", "chance", "text_only", "n"}
    answers: dict[str, str]  # id of the example -> answer
    seconds: float


@dataclass
class Run:
    """Everything that the page shows."""

    recipe: str
    stages: dict[str, StageResult]
    seeing: Evaluation
    blanked: Evaluation  # the same questions with every picture blanked
    data: Path  # the data set's folder
    facts: dict  # the data set's world.json
    examples: list[dict]  # of the benchmark, those that were answered
    right: dict[str, bool]  # id of the example -> whether the answer with pictures is right

    @property
    def parameters(self) -> dict[str, int]:
        """How many parameters each part of the model has: the same in every stage."""
        first_stage = next(iter(self.stages.values()))
        return first_stage.start["parameters"]


# ---------------------------------------------------------------------- reading


def read(file: Path, parse: Callable, fix: str):
    """Return parse(text of the file). Raise UserError if that fails; `fix` is what makes the file.

    A file that does not parse raises ValueError in `parse`.
    """
    try:
        return parse(file.read_text())
    except FileNotFoundError:
        raise UserError(file, "no such file", fix) from None
    except (OSError, ValueError) as error:
        raise UserError(file, f"cannot be read: {error}", fix) from None


def parse_answers(text: str) -> dict[str, str]:
    """Return {id: answer} of a file of answers, without the lines that are damaged."""
    rows = [parse_row(line, ("id", "answer")) for line in text.split("\n")]
    return {row["id"]: row["answer"] for row in rows if row is not None}


def read_run(folder: Path) -> Run:
    """Read a run's folder and its eval/. Raise UserError: which file is missing, what makes it."""
    train_first = "train first: torchrun train.py"
    recipe = read(folder / "recipe.toml", str, train_first)
    log = folder / "log.jsonl"
    if not log.is_file():
        raise UserError(log, "no such file", train_first)
    stages = stages_of_log(read_log(log), log)

    evaluate = f"torchrun evaluate.py --model {folder} --task world --data DIR"
    seeing, data = read_evaluation(folder, "world", evaluate)
    blanked, _ = read_evaluation(folder, "world-blank", f"{evaluate} --blank")

    # An evaluation with --limit answered only some of the benchmark.
    examples = []
    right = {}
    for example in world.examples(data):
        name = example["id"]
        if name in seeing.answers:
            examples.append(example)
            right[name] = world.is_right(example, seeing.answers[name])

    write_again = "write the data set again: python -m demo.world OUT"
    facts = read(data / "world.json", parse_json, write_again)
    return Run(recipe, stages, seeing, blanked, data, facts, examples, right)


def read_evaluation(folder: Path, name: str, fix: str) -> tuple[Evaluation, Path]:
    """Return an evaluation and the folder of its data."""
    result = read(folder / "eval" / f"{name}.json", parse_json, fix)
    answers = read(folder / "eval" / f"{name}.jsonl", parse_answers, fix)
    evaluation = Evaluation(result["scores"], answers, result["seconds"])
    return evaluation, Path(result["data"])


def stages_of_log(rows: list[dict], file: Path) -> dict[str, StageResult]:
    """Return the stages of a log by name. Raise UserError if one did not finish; it names `file`.

    A row of the log is an event: a stage starts, a step, a validation, a stage ends.
    """
    # The log also has events of other kinds, which the page does not show.
    by_stage = {}  # stage -> event -> rows
    for row in rows:
        event = row["event"]
        if event in ("start", "step", "validation", "end"):
            events = by_stage.setdefault(row["stage"], defaultdict(list))
            events[event].append(row)

    stages = {}
    for name, events in by_stage.items():
        if not (events["start"] and events["step"] and events["end"]):
            what = "this stage did not finish"
            raise UserError(f"{file}:{name}", what, "train on: torchrun train.py")

        # A run that was resumed starts again, and its last start and end count.
        stages[name] = StageResult(
            start=events["start"][-1],
            end=events["end"][-1],
            steps=one_per_step(events["step"]),
            validations=one_per_step(events["validation"]),
        )
    return stages


def one_per_step(rows: list[dict]) -> list[dict]:
    """Return one row for each step, in order.

    A run that was resumed logs some steps twice; the later row counts.
    """
    by_step = {}
    for row in rows:
        by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)]


# ---------------------------------------------------------------------- computing


def group_of(example: dict) -> str:
    """Return the row of the scores that an example belongs to."""
    if example["split"] == "attributes":
        return example["kind"]
    return example["split"]


def margin(score: dict) -> float:
    """Return half the width of a score's 95 % interval, in points.

    It is Wilson's interval, whose width is not zero at 100 %.
    """
    p = score["score"] / 100
    n = score["n"]
    z = 1.96  # standard deviations to either side that hold 95 % of a normal distribution
    variance = p * (1 - p) / n + z * z / (4 * n * n)
    shrinkage = 1 + z * z / n
    return 100 * z / shrinkage * math.sqrt(variance)


def running_mean(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return each point as the mean of its neighbours, a twentieth of the run to either side.

    At the ends it reaches less far, by the same on both sides.
    """
    losses = [loss for _, loss in points]
    reach = max(1, len(points) // 20)
    means = []
    for i, (step, _) in enumerate(points):
        left_of_it = i
        right_of_it = len(points) - 1 - i
        near = min(reach, left_of_it, right_of_it)
        window = losses[i - near : i + near + 1]
        means.append((step, sum(window) / len(window)))
    return means


def round_together(expected: dict[str, float]) -> dict[str, int]:
    """Return whole numbers near these whose sum is the rounded sum.

    This is the method of largest remainders, by which parliaments share out seats: each has its
    whole part, and what is left goes to those with the largest remainders, one each.
    """
    whole = {name: int(value) for name, value in expected.items()}
    left = round(sum(expected.values())) - sum(whole.values())

    # The negative remainder, so that the largest comes first and equal ones keep their order.
    by_remainder = sorted(expected, key=lambda name: whole[name] - expected[name])
    for name in by_remainder[:left]:
        whole[name] += 1
    return whole


def choose_samples(examples: list[dict], right: dict[str, bool]) -> tuple[list[dict], list[dict]]:
    """Return the samples to show, and further mistakes.

    Every kind of question appears as often as SAMPLES says, and wrong answers as often as the model
    gives them. The same run always shows the same ones.
    """
    rng = random.Random(0)

    # Examples by kind of question, those that were answered rightly and the others.
    good = defaultdict(list)
    bad = defaultdict(list)
    for example in examples:
        group = group_of(example)
        if right[example["id"]]:
            good[group].append(example)
        else:
            bad[group].append(example)
    for group in SAMPLES:
        rng.shuffle(good[group])
        rng.shuffle(bad[group])

    # How many samples of each kind are wrong answers follows from its error rate.
    expected = {}
    for group, size in SAMPLES.items():
        total = len(good[group]) + len(bad[group])
        expected[group] = size * len(bad[group]) / max(1, total)
    wrong = round_together(expected)

    # What is not shown of the wrong answers is left for the further mistakes.
    samples = []
    left = []
    for group, size in SAMPLES.items():
        samples += good[group][: size - wrong[group]]
        for _ in range(wrong[group]):
            samples.append(bad[group].pop())
        left += bad[group]
    rng.shuffle(samples)
    mistakes = rng.sample(left, min(MISTAKES, len(left)))
    return samples, mistakes
