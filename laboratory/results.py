"""What the finished runs of a grid have shown: credits of every question, and what each run cost.

    found = read_results(grid)
    found.cells[0].answers["world relation"].credits      # (seeds, questions), 0 to 1
    found.errors[cell]                                    # why a cell cannot be compared

A run is compared with another only if nothing is different between them but what an axis names. So
the resolved recipe, the hashes of rows, pictures, tokenizer and weights (training/made_from.py),
the numbers of rows and steps, and the questions with their pictures are looked at, and the first
thing that differs is named.

A score of evaluate.py is a mean of what the answers earn, so the score of one question alone is
what that answer has earned. Which scores are such means is not known beforehand: it is tried, and
a score that is none (an F1, say) is compared over seeds alone.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from dataclasses import fields, is_dataclass

import numpy as np

import config
from checkpoints.fields import Fields
from checkpoints.files import read_json
from config import Recipe, UserError
from evals import Example, Task
from evals.kept import read_answers
from evals.origin import record_of
from evals.shown import shown_names
from evaluate import TASKS
from laboratory.cells import answers_file, controls, error_of, is_finished
from laboratory.found import CellResult, Results, RunCost
from laboratory.grid import OF_STEPS, Cell, Grid, Measure, Run
from laboratory.statistics import Answers
from training.made_from import CODE
from training.run_log import read_log

# evaluate.py's tasks round a score to two decimals.
ROUNDED = 0.00501

# The fields of a stage, and of the model, that say what files are read.
OF_DATA = ("data", "images", "columns", "at_least", "mixture", "validation")
OF_WEIGHTS = ("checkpoint", "llm", "vision", "vision2", "allow_pickle")


# ------------------------------------------------------------------------------- what is compared


def check_tasks(grid: Grid):
    """Raise UserError for a measure that gives no scores by itself."""
    known = [name for name, task in TASKS.items() if hasattr(task, "score")]
    for measure in grid.measures:
        if measure.task not in known:
            what = f"no task {measure.task!r} that gives scores by itself"
            fix = f"one of: {', '.join(known)}"
            raise UserError(f"{grid.file}:measure.{measure.name}", what, fix)


def read_results(grid: Grid) -> Results:
    """Return what the finished runs have shown. Raises UserError if the baseline's are not there.

    A cell is there if all its seeds are finished, and nothing differs that no axis names.
    """
    errors = {}
    finished = {}
    for cell in grid.cells:
        runs = grid.runs_of(cell, grid.seeds)
        if cell == grid.baseline:
            runs = grid.runs_of(cell, grid.seeds + grid.noise_seeds)
        error = unfinished(grid, runs)
        if error:
            errors[cell] = error
        else:
            finished[cell] = [Facts(grid, run) for run in runs]

    for cell, error in differing(grid, finished).items():
        errors[cell] = error
    if grid.baseline in errors:
        what = f"{grid.baseline}: {errors[grid.baseline]}"
        fix = "nothing can be compared without the baseline: python lab.py GRID goes on with it"
        raise UserError(grid.file, what, fix)

    asked = [Asked(measure) for measure in grid.measures]
    cells = []
    for cell in grid.cells:
        if cell in errors:
            continue
        runs = grid.runs_of(cell, grid.seeds)
        costs = [cost_of(run) for run in runs]
        result = CellResult(cell, read_cell(asked, runs), costs)
        if cell == grid.baseline and grid.noise_seeds:
            result.noise = read_cell(asked, grid.runs_of(cell, grid.noise_seeds))
        cells.append(result)
    return Results(cells, errors, notes_of(finished))


def unfinished(grid: Grid, runs: list[Run]) -> str:
    """Return why a cell cannot be compared yet; "" if all its runs are finished."""
    missing = 0
    for run in runs:
        if is_finished(grid, run):
            continue
        error = error_of(run)
        if error:
            return f"seed {run.seed}: {error}"
        missing += 1
    if missing:
        return f"{len(runs) - missing} of {len(runs)} runs are finished"
    return ""


class Facts:
    """What a run was made from and asked, each fact with the fields of a recipe that decide it."""

    def __init__(self, grid: Grid, run: Run):
        self.run = run
        self.values: dict[str, object] = {}
        self.decided_by: dict[str, tuple[str, ...]] = {}

        recipe, _ = config.load([str(run.folder / "recipe.toml")], grid.base)
        self.contents = read_json(run.folder / "made_from.json")
        self.code = self.contents.get(CODE)

        self.add_recipe(recipe)
        self.add_contents()
        self.add_sizes(run)
        self.add_questions(grid, run)

    def add(self, name: str, value, decided_by: Iterable[str] = ()):
        self.values[name] = value
        self.decided_by[name] = tuple(decided_by)

    def add_recipe(self, recipe: Recipe):
        """Add each field of the recipe that decides what is trained, except the seed."""
        for name, value in flat(recipe, ""):
            if name != "train.seed":
                self.add(name, value, [name])

    def add_contents(self):
        """Add the hashes of what the files of the recipe hold."""
        for name, hashes in self.contents.items():
            if name == CODE:
                continue
            decided_by = [f"model.{key}" for key in OF_WEIGHTS]
            if name == "tokenizer":
                decided_by.append("model.tokenizer")
            elif name.startswith("stage."):
                stage = name.split(" ")[0]
                decided_by = [f"{stage}.{key}" for key in (*OF_DATA, "lora.adapter")]
            self.add(f"what is in {name}", hashes, decided_by)

    def add_sizes(self, run: Run):
        """Add the numbers of rows and of optimizer steps of each stage."""
        for row in read_log(run.folder / "log.jsonl"):
            if row["event"] != "start":
                continue
            stage = f"stage.{row['stage']}"
            self.add(f"{stage} rows", row["rows"], [f"{stage}.{key}" for key in OF_DATA])
            self.add(f"{stage} steps", row["steps"], [f"{stage}.{key}" for key in OF_STEPS])

    def add_questions(self, grid: Grid, run: Run):
        """Add what was asked: the questions, their pictures, and the options of evaluate.py."""
        for measure in grid.measures:
            for control in controls(measure):
                what = measure.name
                if control:
                    what += f" {control}"

                file = answers_file(run, measure, control)
                record = read_json(record_of(file))
                self.add(f"the pictures of {what}", record.get("shown"))
                self.add(f"the options of {what}", record.get("options"))

                asked = []
                for line in file.read_text().splitlines():
                    row = json.loads(line)
                    asked.append((row["id"], row["question"], row["label"]))
                self.add(f"the questions of {what}", asked)


def flat(part, path: str) -> Iterable[tuple[str, object]]:
    """Yield (section.key, value) of all fields of a recipe that decide what is trained."""
    for f in fields(part):
        value = getattr(part, f.name)
        name = f"{path}.{f.name}" if path else f.name
        if is_dataclass(value):
            yield from flat(value, name)
        elif isinstance(value, dict) and value and all(map(is_dataclass, value.values())):
            for key, table in value.items():
                yield from flat(table, f"{name}.{key}")
        elif f.metadata["decides"]:
            yield name, value


def differing(grid: Grid, finished: dict[Cell, list[Facts]]) -> dict[Cell, str]:
    """Return the cells in which something differs that no axis names, and what.

    A fact may depend on the labels of those axes whose overrides name a field that decides it. Of
    the cells with the same such labels, all must have it as the first one has.
    """
    first: dict[Hashable, tuple[object, Run]] = {}
    errors = {}
    for cell, of_runs in finished.items():
        for facts in of_runs:
            for name, value in facts.values.items():
                fields = facts.decided_by[name]
                labels = grid.labels_that_decide(cell, fields)
                expected, other = first.setdefault((name, labels), (value, facts.run))
                if value == expected:
                    continue
                what = f"refused: seed {facts.run.seed}: {how(name, value, expected)} in {other}"
                if fields:
                    what += f", and no axis names {' or '.join(fields)}"
                errors.setdefault(cell, what)
    return errors


def how(name: str, value, expected) -> str:
    """Return in words how a fact differs; what is longer than a number or a name is not quoted."""
    for one in (value, expected):
        if not isinstance(one, (int, float, str)) or len(str(one)) > 60:
            return f"{name} not as"
    return f"{name} {value}, not {expected} as"


def notes_of(finished: dict[Cell, list[Facts]]) -> list[str]:
    """Return what a reader of the table should know, and what is no reason to refuse it."""
    versions = {json.dumps(facts.code, sort_keys=True) for of in finished.values() for facts in of}
    if len(versions) > 1:
        return [f"the runs are of {len(versions)} versions of the code"]
    return []


def cost_of(run: Run) -> RunCost:
    """Return what the log says of the steps, the seconds of training, and the peak memory.

    A stage that was interrupted has a start at another step than 0: the seconds before are not
    known, and nobody else's time is put in their place.
    """
    steps = 0
    seconds = 0.0
    is_whole = True
    memory = None
    for row in read_log(run.folder / "log.jsonl"):
        if row["event"] == "start":
            steps += row["steps"]
            is_whole = is_whole and row.get("step") == 0
        elif row["event"] == "end":
            seconds += row["seconds"]
        elif row["event"] == "step" and "memory_gb" in row:
            memory = max(memory or 0.0, row["memory_gb"])
    return RunCost(steps, seconds if is_whole else None, memory)


# ------------------------------------------------------------------------------------- credits


class Asked:
    """A measure with its questions."""

    def __init__(self, measure: Measure):
        """Read the questions. Raises UserError for files that are not there."""
        self.measure = measure
        self.task: Task = TASKS[measure.task]
        self.examples = self.task.examples(measure.data)

    def answers(self, run: Run, control: str) -> tuple[list[Example], list[str]]:
        """Return the examples that a run was asked, and what it answered."""
        rows = read_answers(answers_file(run, self.measure, control), self.examples)
        chosen = [example for example in self.examples if example["id"] in rows]
        return chosen, [rows[example["id"]]["answer"] for example in chosen]

    def scores(self, run: Run, control: str) -> dict[str, dict]:
        """Return the scores that evaluate.py wrote."""
        file = answers_file(run, self.measure, control).with_suffix(".json")
        table = Fields(read_json(file), file).table("scores")
        scores = {}
        for name in table.values:
            one = table.table(name)
            scores[name] = {
                "score": one.number("score", -1e9, 1e9),
                "chance": one.number("chance", -1e9, 1e9, default=None),
                "n": one.integer("n", 0, 10**9),
            }
        return scores


def read_cell(asked: list[Asked], runs: list[Run]) -> dict[str, Answers]:
    """Return the scores of some runs of a cell, by "MEASURE SCORE", or "SCORE" of one measure."""
    found = {}
    for one in asked:
        for name, answers in read_measure(one, runs).items():
            found[name if len(asked) == 1 else f"{one.measure.name} {name}"] = answers
    return found


def read_measure(asked: Asked, runs: list[Run]) -> dict[str, Answers]:
    """Return the scores of one measure, with what every question earned where that is known."""
    of_runs = [asked.scores(run, "") for run in runs]
    blanked = None
    if asked.measure.blank:
        blanked = [asked.scores(run, "blank") for run in runs]
    credits = [credits_of(asked.task, *asked.answers(run, "")) for run in runs]
    examples, _ = asked.answers(runs[0], "")
    clusters = clusters_of(examples)

    found = {}
    for name in asked.measure.scores or of_runs[0]:
        if name not in of_runs[0]:
            what = f"no such score of {asked.measure.task}"
            raise UserError(f"scores:{name}", what, f"one of: {', '.join(of_runs[0])}")
        answers = Answers(
            name=name,
            scores=np.array([scores[name]["score"] for scores in of_runs]),
            chance=of_runs[0][name]["chance"],
            questions=of_runs[0][name]["n"],
        )
        if blanked:
            answers.blank = np.array([scores[name]["score"] for scores in blanked])
        add_credits(answers, name, credits, clusters)
        found[name] = answers
    return found


def add_credits(answers: Answers, name: str, credits: list[dict], clusters: np.ndarray):
    """Add what each question earned, if the score is the mean of that in every run."""
    if any(name not in of_run for of_run in credits):
        return
    earned = np.stack([of_run[name][0] for of_run in credits])
    weights = np.stack([of_run[name][1] for of_run in credits])
    totals = weights.sum(1)
    if not totals.all():
        return
    means = 100 * (earned * weights).sum(1) / totals
    farthest = np.abs(means - answers.scores).max()
    if farthest > ROUNDED:
        return

    # Only the questions that count in this score, in any run.
    counts = weights.any(0)
    answers.scores = means
    answers.credits = earned[:, counts]
    answers.weights = weights[:, counts]
    answers.clusters = clusters[counts]


def credits_of(
    task: Task, examples: list[Example], answers: list[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {score: (what each answer earns in it, how much it counts)}; both of (questions,).

    That is the score of each question alone. A task that cannot score one alone has no credits.
    """
    found = {}
    for i, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        try:
            scores = task.score([example], [answer])
        except (ArithmeticError, LookupError, ValueError):
            return {}
        for name, score in scores.items():
            if name not in found:
                found[name] = (np.zeros(len(examples)), np.zeros(len(examples)))
            found[name][0][i] = score["score"] / 100
            found[name][1][i] = score["n"]
    return found


def clusters_of(examples: list[Example]) -> np.ndarray:
    """Return for each question the number of the picture that it is about."""
    numbers: dict[Hashable, int] = {}
    found = []
    for example in examples:
        shown = tuple(shown_names(example)) or example["id"]
        key = example.get("group", shown)
        found.append(numbers.setdefault(key, len(numbers)))
    return np.array(found)
