"""The rows of a recipe or a file before training: `data.py check` and `data.py inspect`.

    row_sets = row_sets_of_recipe(["recipes/demo.toml"])        # of each stage, and those held out
    check_row_sets(row_sets, "recipes/demo.toml", against=[])   # every bad row, and a summary
    inspect_row_sets(row_sets, args)                            # the first samples, as text

`check` goes through data.Steps, as training does: so what it lets pass, trains. `inspect` also
writes a page with the pictures as the encoder gets them.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image
from tqdm import tqdm  # comes with tokenizers

import command_line
import config
from checkpoints.files import open_regular, resolve, write_file, writing
from config import UserError, printable
from data import Order, Steps, loader, make_spec, model_spec, stage_spec
from inputs import templates
from inputs.duplicates import print_duplicates
from inputs.forms import columns_of
from inputs.holdout import open_stage
from inputs.image_processor import ImageProcessor
from inputs.overlaps import Benchmark, has_imagehash, print_overlaps
from inputs.preview import html_page, image_tag, mark_supervised, show_supervised
from inputs.rows import Rows, open_rows
from inputs.sample import Sample, SampleSpec, make_samples
from inputs.summary import Summary
from inputs.tiling import Tiling
from packing import IGNORE

# How pictures are seen without a recipe: as the square that CLIP-L/14-336 gets.
WITHOUT_RECIPE = ImageProcessor(336)

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; color: #1c2430 }
h2 { font-size: 1em; margin: 2em 0 .5em }
img { margin-right: 8px; border: 1px solid #dde2e8 }
pre { white-space: pre-wrap; background: #f4f6f8; padding: 1em }
mark { background: #bfe8c5 }
"""
LEGEND = """<p>Pictures as the encoder gets them, before normalisation. What is <mark>marked</mark>
is supervised.</p>"""


@dataclass
class RowSet:
    """A set of rows for `check` or `inspect`."""

    name: str
    rows: Rows
    spec: SampleSpec
    order: Order | None = None  # in which `inspect` shows them; None = that of the file
    notes: tuple[str, ...] = ()  # how they were chosen


def check_or_inspect(args):
    """Do what the command line of data.py says, with the rows of --data or of a recipe."""
    if args.data:
        where = args.data
        row_sets = row_sets_of_options(args)
    else:
        where = args.recipe[0]
        row_sets = row_sets_of_recipe(args.recipe)

    if args.command == "check":
        check_row_sets(row_sets, where, args.against)
    else:
        inspect_row_sets(row_sets, args)


def row_sets_of_options(args) -> list[RowSet]:
    """Return the rows of --data, as the options beside it say."""
    if args.max_tokens:
        limit = args.max_tokens
    elif args.tokenizer or args.model:
        limit = 2048
    else:
        limit = sys.maxsize  # bytes are several times as many as tokens, so 2048 would cut rows

    if args.model:
        spec = model_spec(resolve(args.model), limit)
    else:
        # Without a model, the tiling knows only how many tokens a picture takes. A resampler makes
        # that number of whatever an encoder gives.
        views = Tiling(0, "resampler", {"num_queries": args.image_tokens}, WITHOUT_RECIPE)
        spec = make_spec(args.tokenizer, args.template, limit, views)

    name = args.data
    if not args.tokenizer and not args.model:
        name += ", in bytes (no --tokenizer)"
    rows = open_rows(args.data, args.images, columns_of(args.columns))
    return [RowSet(name, rows, spec)]


def row_sets_of_recipe(arguments: list[str]) -> list[RowSet]:
    """Return the rows of each stage of a recipe, and those that it holds out.

    All are opened before any is read to the end, so that a wrong path shows at once.
    """
    recipe, path = config.load(arguments, arguments[0])
    seed = recipe.train.seed
    row_sets = []
    for name, stage in recipe.stage.items():
        spec = stage_spec(recipe.model, stage)
        opened = open_stage(stage, f"{path}:stage.{name}", workers=os.cpu_count() or 1)
        rows = opened.training
        notes = tuple(f"stage {name}: {note}" for note in opened.notes)
        order = Order(len(rows), seed, rows.parts, rows.blocks)
        row_sets.append(RowSet(f"stage {name}", rows, spec, order, notes))
        if opened.held_out is not None:
            rows = opened.held_out
            order = Order(len(rows), seed, blocks=rows.blocks)
            row_sets.append(RowSet(f"stage {name}, validation", rows, spec, order))
    return row_sets


# -------------------------------------------------------------------------------------------- check


def check_row_sets(row_sets: list[RowSet], where: str, against: list[str]):
    """Check all rows, and against benchmarks. Raises UserError if some are bad."""
    # Those first, so that a wrong path shows before hours of reading.
    workers = os.cpu_count() or 1
    if against and not has_imagehash():
        print("note: pictures that were resized or saved as JPEG are not found without ImageHash")
        print("  pip install ImageHash")
    benchmarks = [Benchmark.of(Path(name), workers) for name in against]

    bad = 0
    total = 0
    for row_set in row_sets:
        print(f"== {printable(row_set.name, 1000)}")
        print(f"recognised: {printable(row_set.rows.recognised, 1000)}")
        for note in row_set.notes:
            print(note)
        bad += check_rows(row_set.rows, row_set.spec)
        print_duplicates(row_set.rows, workers)
        for benchmark in benchmarks:
            print_overlaps(row_set.rows, benchmark, workers)
        total += len(row_set.rows)
    if bad:
        fix = "mend or remove them, or set train.on_bad_row=skip"
        raise UserError(where, f"{bad} of {total} rows are bad", fix)


def check_rows(rows: Rows, spec: SampleSpec) -> int:
    """Read every row as training does, and return how many are bad.

    Print a line for each that is bad or cut, then a summary.
    """
    stage = config.Stage(global_batch=16)
    steps = Steps(rows, spec, stage, config.Train(on_bad_row="skip"), validation=True)
    workers = min(os.cpu_count() or 1, len(steps) // 4)

    summary = Summary()
    with tqdm(total=len(rows), unit="row", disable=None, leave=False) as progress:
        for step, _ in loader(steps, workers=workers):
            for line in step.skipped:
                tqdm.write(line)

            for reading in step.readings:
                if reading.cut:
                    note = f"note: over-long, loses {reading.cut} tokens of its tail"
                    where = printable(rows.where(reading.row), 1000)
                    tqdm.write(f"{where}: {note}; fix: raise max_tokens, or leave it so")
                summary.add_row(reading.items, reading.cut)
                summary.add_notes(reading.row, reading.notes, reading.unread)
                for size in reading.samples:
                    summary.add_sample(size.kept + size.cut, size.kept, size.supervised)

            summary.add_bad(len(step.skipped))
            progress.update(len(step.skipped) + len(step.readings))

    summary.print(printable(rows.file, 1000), spec.views.tokens_text, rows.where)
    return summary.bad


# ------------------------------------------------------------------------------------------ inspect


def inspect_row_sets(row_sets: list[RowSet], args):
    """Show some rows of each set, and write the page if one is asked for."""
    if args.page:
        check_page(Path(args.page))

    # Without a recipe, the text is what matters. Pictures may be missing, unless a page shows them.
    pixels = bool(args.recipe or args.page)
    body = [LEGEND]
    for row_set in row_sets:
        print(f"== {printable(row_set.name, 1000)}")
        html = inspect_rows(row_set.rows, row_set.spec, rows_to_show(row_set, args), pixels)
        body += [f"<h1>{escape(row_set.name)}</h1>", html]

    if args.page:
        page = html_page("Samples", "\n".join(body), STYLE)
        with writing(Path(args.page)):
            write_file(Path(args.page), page)
        print(f"{printable(args.page)} written")


def check_page(path: Path):
    """Raise UserError if something is at `path` that is no page: rows, or somebody's notes."""
    fix = "name another file for the page"
    with writing(path, fix):
        if not path.exists():
            return
        with open_regular(path) as file:
            if not file.read(20).lower().startswith(b"<!doctype html>"):
                raise UserError(path, "is there, and is no page", fix)


def rows_to_show(row_set: RowSet, args) -> list[int]:
    """Return the row of --row, or the first --rows of training or of the file.

    Raises UserError for a --row that is not there.
    """
    n = len(row_set.rows)
    if args.row is not None:
        if not 0 <= args.row < n:
            what = f"there is no row {args.row}, only {n} rows"
            raise UserError(row_set.rows.file, what, f"a --row from 0 to {n - 1}")
        return [args.row]

    if row_set.order is None:
        return list(range(min(args.rows, n)))
    shown = []
    for k in range(min(args.rows, row_set.order.n)):
        _, row = row_set.order(k)
        shown.append(row)
    return shown


def inspect_rows(rows: Rows, spec: SampleSpec, numbers: list[int], pixels: bool = True) -> str:
    """Print rows as training sees them, with the supervised text marked, and return them as HTML.

    With pixels=False, pictures are neither read nor in the HTML. Raises UserError for a bad row.
    """
    template = templates.choose_template(spec.template, spec.tokenizer)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    html = []
    total = 0
    total_supervised = 0

    for i in numbers:
        row = rows[i]
        where = printable(rows.where(i, row), 1000)
        samples = make_samples(rows, i, spec, pixels)

        # The texts, from the functions that made the samples' ids. Answers that begin beyond
        # max_tokens have a text and no sample; they are at the end.
        rendered = templates.render_samples(row["conversations"], template)
        for k, (sample, written) in enumerate(zip(samples, rendered, strict=False)):
            supervised = int((sample.labels != IGNORE).sum())
            total += len(sample.ids)
            total_supervised += supervised

            # The line above the text: how many tokens, and which views the encoder gets.
            name = where
            if len(rendered) > 1:
                name += f", answer {k + 1} of {len(rendered)}"
            head = f"{name}: {len(sample.ids)} tokens, {supervised} supervised"
            head += f", views: {describe_views(sample, spec.views, pixels)}"
            if sample.cut:
                head += f", {sample.cut} tokens cut off"
            if sample.lost:
                head += f", {sample.lost} tokens of later answers are beyond max_tokens"

            # The text itself.
            text, spans, marks = written
            _, labels, offsets = templates.tokenize(text, spans, marks, spec.tokenizer)
            print(f"--- {head}")
            print(show_supervised(text, labels, offsets, colour), file=command_line.colours())

            # The same for the page, with the pictures.
            html.append(f"<h2>{escape(head)}</h2>")
            if pixels:
                for item in sample.items:
                    for view in spec.views.seen(item):  # (3, H, W)
                        shown = spec.views.processor.shown(view)
                        image = Image.fromarray(shown.permute(1, 2, 0).numpy())
                        html.append(image_tag(image, width=240))
            html.append(f"<pre>{mark_supervised(text, labels, offsets)}</pre>")

    print(f"=== {len(numbers)} rows: {total} tokens, {total_supervised} supervised")
    return "\n".join(html)


def describe_views(sample: Sample, tiling: Tiling, pixels: bool) -> str:
    """Return how many views each item of a sample has, and of what size if pixels were read."""
    described = []
    for item in sample.items:
        if pixels:
            height, width = tiling.seen(item)[0].shape[1:]
            described.append(f"{item.shape.views} of {height} x {width}")
        else:
            described.append(str(item.shape.views))
    return ", ".join(described) or "none"
