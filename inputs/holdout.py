"""The rows of a stage: what it trains on, and what it holds out for the validation loss.

    rows = open_stage(recipe.stage["finetune"], "stage.finetune")
    rows.training, rows.held_out    # as inputs/rows.py offers rows; held_out may be None
    rows.notes                      # ["980 rows to train on, 20 held out by content"]

`at_least = {relevance_min = 4}` leaves rows that have so much in a column. A row without a number
there is left out.

`validation` names a file of held-out rows, or says how many of the rows to hold out: a share
(0.02), a number of rows (500), or "auto" (a tenth, 1 to 500). Which ones is decided by their
content and by nothing else: by a hash of a row's pictures, or of what the humans say where it has
none (content.py). So

    all rows of one picture stand on one side, as do duplicates
    neither the order of rows and files, nor their format, nor the seed, nor the ranks decide it
    of a share, a row that is held out stays so when rows are added

A share holds out the rows whose hash is below that share of all hashes. A number holds out those of
the smallest hashes, with all rows of the same pictures, so it may become a few more. In a mixture
both are of the rows of all sources, and a source's weight is of what is left of it.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import NamedTuple

import numpy as np

from config import AUTO, Source, Stage, UserError, printable
from inputs.content import FEW_ROWS, UNREADABLE, row_keys
from inputs.measure import measure_rows
from inputs.rows import RowMixture, Rows, open_rows
from inputs.subset import RowSubset

HASHES = 2**63  # a hash is smaller

FIX_VALIDATION = 'write a file, a share (0.02), a number of rows (500), or "" for none'


class StageRows(NamedTuple):
    """What a stage trains on, and what it holds out."""

    training: Rows
    held_out: Rows | None
    notes: list[str]  # what to say about the choice of rows, without the stage's name


def open_stage(stage: Stage, where: str, workers: int = 0) -> StageRows:
    """Open the rows of a stage of a recipe. Raise UserError.

    where: what messages call the stage. workers: processes that read every picture, where a share
    or a number of rows is held out and the hashes are not kept yet.
    """
    check_validation(stage, where)
    sources = sources_of(stage, where)

    # Open all before any is read to the end, so that a wrong path shows at once.
    opened = {}
    for name, source in sources.items():
        opened[name] = open_rows(source.data, source.images, source.columns)
    held_out = None
    validation = stage.validation
    if validation_file(stage):
        held_out = open_rows(stage.validation, stage.images, stage.columns)

    # Rows that are rated well enough.
    notes = []
    for name, source in sources.items():
        if source.at_least:
            rows = opened[name]
            opened[name] = rated_rows(rows, source.at_least, place_of(where, name), workers)
            found = f"at_least: {len(opened[name])} of {len(rows)} rows"
            notes.append(" ".join(filter(None, (name, found))))

    # Rows that are held out of these.
    if validation == AUTO:
        validation = how_many_to_hold_out(sum(len(rows) for rows in opened.values()))
    if validation and held_out is None:
        opened, held_out, note = split(opened, validation, where, workers)
        notes.append(note)

    # A stage with `data` has one source, which is no mixture.
    if stage.data:
        return StageRows(opened[""], held_out, notes)
    weights = [source.weight for source in sources.values()]
    return StageRows(RowMixture(list(opened.values()), weights), held_out, notes)


def sources_of(stage: Stage, where: str) -> dict[str, Stage | Source]:
    """Return what says where rows are, by its name in a mixture; "" is the stage's own data.

    Raise UserError unless there is either data or a mixture.
    """
    if bool(stage.data) == bool(stage.mixture):
        what = "set beside a mixture" if stage.data else "not set"
        fix = "name a file or folder of rows, or sources of a mixture"
        raise UserError(f"{where}.data", what, fix)
    if stage.data:
        return {"": stage}
    if stage.at_least:
        fix = "write it for the sources that have this column"
        raise UserError(f"{where}.at_least", "set beside a mixture", fix)
    return stage.mixture


def place_of(where: str, name: str) -> str:
    """Return what messages call a source of a stage."""
    if not name:
        return where
    return f"{where}.mixture.{name}"


# -------------------------------------------------------------------------------------- holding out


def validation_file(stage: Stage) -> str:
    """Return the file of a stage's held-out rows; "" if it has none, or says how many."""
    if isinstance(stage.validation, str) and stage.validation != AUTO:
        return stage.validation
    return ""


def how_many_to_hold_out(n: int) -> float | str:
    """Return how many of n rows "auto" holds out: a tenth, 1 to 500; "" of a single row."""
    if n < 2:
        return ""
    return float(min(500, max(1, round(n / 10))))


def check_validation(stage: Stage, where: str):
    """Raise UserError for a number that is neither a share nor a whole number of rows."""
    value = stage.validation
    if isinstance(value, str):
        return
    is_share = 0 < value < 1
    is_count = value >= 1 and value == int(value)
    if not is_share and not is_count:
        what = f"{value:g} is neither a share below 1 nor a whole number of rows"
        raise UserError(f"{where}.validation", what, FIX_VALIDATION)


def split(
    sources: dict[str, Rows], validation: float, where: str, workers: int
) -> tuple[dict[str, Rows], Rows, str]:
    """Return what is left of each source, the rows that are held out, and a note on both.

    Raise UserError if nothing is held out, or everything of a source.
    """
    keys = np.concatenate([row_keys(rows, workers) for rows in sources.values()])
    is_held = choose_held_out(keys, validation, f"{where}.validation")

    left = {}
    held = []
    begin = 0
    for name, rows in sources.items():
        of_source = is_held[begin : begin + len(rows)]
        begin += len(rows)
        if of_source.all():
            what = f"{validation:g} holds out all {len(rows)} rows of {printable(rows.file)}"
            fix = "write a smaller one, or leave this source out"
            raise UserError(f"{where}.validation", what, fix)
        left[name] = chosen_rows(rows, ~of_source)
        if of_source.any():
            held.append(chosen_rows(rows, of_source))

    held_out = held[0]
    if len(held) > 1:
        held_out = RowMixture(held, [1.0] * len(held))

    count = int(is_held.sum())
    note = f"{len(keys) - count} rows to train on, {count} held out by content"
    if validation >= 1 and count != validation:
        note += f" ({validation:.0f} and the others of their pictures)"
    return left, held_out, note


def choose_held_out(keys: np.ndarray, validation: float, where: str) -> np.ndarray:
    """Return (n,) bool: which rows are held out.

    keys: (n, 3) of content.row_keys. validation: a share below 1, or a number of rows.
    Raise UserError if that would be none or all.
    """
    # What a row is placed by: its pictures, or its question.
    placed_by = np.where(keys[:, 0] == 0, keys[:, 1], keys[:, 0])
    n = len(placed_by)

    if validation < 1:
        is_held = placed_by < int(validation * HASHES)
    elif validation < n:
        last = int(validation) - 1
        largest_held = np.partition(placed_by, last)[last]
        is_held = placed_by <= largest_held
    else:
        raise UserError(where, f"{validation:g}, of {n} rows", f"write a number below {n}")

    # Nothing is known of a row that cannot be read. Training says what is wrong with it.
    is_held &= placed_by != UNREADABLE

    pictures = len(np.unique(placed_by))
    known = f"{n} rows, which have {pictures} different pictures or questions"
    if not is_held.any():
        what = f"{validation:g} holds out none of {known}"
        raise UserError(where, what, "write a larger share, or a number of rows")
    if is_held.all():
        what = f"{validation:g} holds out all of {known}"
        raise UserError(where, what, "write a smaller one, or name a file of other rows")
    return is_held


def chosen_rows(rows: Rows, is_chosen: np.ndarray) -> RowSubset:
    """Return the rows of a source, or of a subset of one, for which (n,) bool says so."""
    chosen = np.flatnonzero(is_chosen)
    if isinstance(rows, RowSubset):
        return RowSubset(rows.rows, rows.chosen[chosen])
    return RowSubset(rows, chosen)


# ----------------------------------------------------------------------------------------- at_least

# What `measure_number` finds in a column of a row.
MISSING, NUMBER, OTHER, UNREAD = range(4)


def rated_rows(rows: Rows, at_least: dict, where: str, workers: int) -> RowSubset:
    """Return the rows that have so much in all columns of `at_least`, {column: number}.

    A row without a number there is none of them. Raise UserError at `where` if none is left, or
    for a column that holds something else or that no row has.
    """
    is_chosen = np.ones(len(rows), bool)
    for column, least in at_least.items():
        place = f"{where}.at_least.{column}"
        if isinstance(least, bool) or not isinstance(least, int | float):
            raise UserError(place, f"{printable(repr(least), 60)} is no number", "write a number")
        is_chosen &= numbers_of(rows, column, place, workers) >= least  # NaN is not

    if not is_chosen.any():
        raise UserError(f"{where}.at_least", f"none of {len(rows)} rows has so much", "lower it")
    return chosen_rows(rows, is_chosen)


def numbers_of(rows: Rows, column: str, where: str, workers: int) -> np.ndarray:
    """Return (len(rows),) float64: what each row has in a column; NaN if nothing.

    A row that cannot be read has infinity: it stays, and training says what is wrong with it.
    Raise UserError at `where` for a column that holds something else or that no row has.
    """
    # A column of a parquet file is read without the others.
    if hasattr(rows, "numbers"):
        return rows.numbers(column)

    kind = ""
    if len(rows) >= FEW_ROWS:
        key = hashlib.sha256(repr((column, getattr(rows, "columns", None))).encode()).hexdigest()
        kind = f"{key[:12]}.numbers"
    measure = partial(measure_number, column=column)
    doing = f"reading {printable(column, 100)} of its rows"
    measured = measure_rows(rows, lambda _: kind, measure, workers, doing)
    found = measured[:, 0]
    numbers = np.ascontiguousarray(measured[:, 1]).view(np.float64)

    others = np.flatnonzero(found == OTHER)
    if len(others):
        i = int(others[0])
        row = rows[i]
        what = f"{printable(column, 100)} is {printable(repr(row[column]), 60)}, and no number"
        raise UserError(rows.where(i, row), what, "write a number or null, or mend at_least")
    if not (found == NUMBER).any():
        what = f"no row has a number there, they have {names_of_columns(rows)}"
        raise UserError(where, what, "name a column of numbers")
    return numbers


def measure_number(rows: Rows, i: int, column: str) -> tuple[int, int, int]:
    """Return what row i has in a column: one of the four above, the bits of the number, and 0."""
    number = np.nan
    try:
        value = rows[i].get(column)
        found = NUMBER
        if value is None or value == "":
            found = MISSING
        elif isinstance(value, bool) or not isinstance(value, int | float | str):
            found = OTHER
        else:
            number = float(value)  # a cell of a table is a text
    except UserError:
        found = UNREAD
        number = np.inf
    except (ValueError, OverflowError):
        found = OTHER
    return found, int(np.float64(number).view(np.int64)), 0


def names_of_columns(rows: Rows) -> str:
    """Return the keys that some rows have, for a message."""
    names: dict[str, None] = {}
    for i in range(min(len(rows), 20)):
        try:
            names.update(dict.fromkeys(rows[i]))
        except UserError:
            continue
    return printable(", ".join(names), 300)
