"""One benchmark per file: examples, score, chance. `evaluate.py` says what such a file offers; here is what they share.

Each reads two layouts of its files from one folder: the one that LLaVA's eval.zip and TinyLLaVA Factory use
(`playground/data/eval/NAME`), and the one that the benchmark itself is published in. Those about videos
read only the latter.
"""

import contextlib
import json
from pathlib import Path

from config import UserError

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def first(data_dir, *names):
    """The first of these files or folders that `data_dir` has. Raises UserError."""
    for name in names:
        if (path := Path(data_dir) / name).exists():
            return path
    raise UserError(
        Path(data_dir) / names[0],
        "no such file or folder",
        f"--data: a folder with {' or '.join(names)}",
    )


def table(file, lines=False, part=None):
    """{row's number or name: row} of a JSON file: one row a line (`lines`, and .jsonl), a list or a table; of the
    file's value only `part`. Raises UserError."""
    at = None
    try:
        text = Path(file).read_text(encoding="utf-8")
        if lines or Path(file).suffix == ".jsonl":
            found = {}
            for at, line in enumerate(text.rstrip("\n").split("\n")):  # noqa: B020
                found[at] = json.loads(line)
            return found
        value = json.loads(text)
        value = value[part] if part else value
        return dict(value.items() if isinstance(value, dict) else enumerate(value))
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = file if at is None else f"{file}:{at}"
        raise UserError(
            where, f"cannot be read: {words(error)}", "mend it, or fetch it again"
        ) from None


def rows(file, lines=False, part=None):
    """[("file:row", row)] of what `table` reads; wrap what is done with a row in `reading(where)`."""
    return [(f"{file}:{at}", row) for at, row in table(file, lines, part).items()]


def parquet_rows(file):
    """[("file:row", row)] of a .parquet file. Raises UserError, also where pyarrow is not installed."""
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError("pyarrow", f"reads {file}, not installed", "pip install pyarrow") from None
    try:
        return [
            (f"{file}:{at}", row) for at, row in enumerate(parquet.read_table(file).to_pylist())
        ]
    except (OSError, ValueError) as error:
        raise UserError(
            file, f"cannot be read: {words(error)}", "mend it, or fetch it again"
        ) from None


@contextlib.contextmanager
def reading(where):
    """Whatever a row that is not as published makes fail in here is a UserError that names the row."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            where, f"not as published: {words(error)}", "mend the row, or fetch the file again"
        ) from None


def words(error):
    missing = isinstance(error, KeyError)
    return f"it has no {error}" if missing else " ".join(str(error).split())


def lettered(choices):
    """ "\\nA. ...\\nB. ..." as LLaVA lists options."""
    return "".join(f"\n{chr(65 + i)}. {choice}" for i, choice in enumerate(choices))


def grouped(results):
    """[(names, right 0..1, chance 0..1)] -> {name: {"score" %, "chance" %, "n"}}, names in order of appearance."""
    groups = {}
    for names, right, chance in results:
        for name in names:
            groups.setdefault(name, []).append((right, chance))
    return {
        name: {
            "score": 100 * sum(right for right, _ in group) / len(group),
            "chance": 100 * sum(chance for _, chance in group) / len(group),
            "n": len(group),
        }
        for name, group in groups.items()
    }


def best_constant(credits):
    """Of [{answer: its credit for a question}]: the share 0..1 that the best single answer to all of them earns."""
    totals = {}
    for credit in credits:
        for answer, value in credit.items():
            totals[answer] = totals.get(answer, 0) + value
    return max(totals.values(), default=0) / len(credits)


def open_scores(results):
    """[(names, right 0..1, {answer: credit})] -> scores as `grouped`; chance is what the best constant answer gets."""
    credits = {}
    for names, _, credit in results:
        for name in names:
            credits.setdefault(name, []).append(credit)
    chance = {name: best_constant(group) for name, group in credits.items()}
    scores = grouped((names, right, 0) for names, right, _ in results)
    return {name: s | {"chance": 100 * chance[name]} for name, s in scores.items()}
