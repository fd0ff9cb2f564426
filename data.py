"""LLaVA rows -> packed batches, the same for any number of ranks and workers; and a check of the rows beforehand.

    python data.py check recipes/demo.toml [section.key=value ...]      # every stage, as training will read it
    python data.py check --data rows.json --images folder [--tokenizer DIR --template phi --image-tokens 576]
    python data.py inspect recipes/demo.toml [--rows 3] [--page FILE.html]    # the first samples as training sees them
    python data.py shard rows.json NEW_FOLDER [--images folder --size 1000]   # as WebDataset tars of 1000 MB

A row is {"id": ..., "image": "a.jpg" | ["a.jpg", "b.jpg"] | absent, "conversations": [{"from": "human" | "gpt",
"value": "... <image> ..."}, ...]}, or has "video" in place of "image". rows.py reads it, samples.py makes a sample of
it and packs samples into batches; here they are put in order, made into optimizer steps, and loaded by workers.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # comes with tokenizers

import config
from checkpoints.files import resolve, write_file
from checkpoints.layouts import config_from_recipe
from config import UserError
from inputs import templates
from inputs.image_processor import ImageProcessor
from inputs.index import kept
from inputs.rows import Mixture, Rows, shard
from inputs.sample import Sample, SampleSpec, encode_row, make_sample, user_error
from inputs.templates import byte_tokenizer
from inputs.tiling import TILED, Tiling
from inputs.tokenizer import load_tokenizer
from model import tiling_of
from packing import IGNORE, Batch, bin_pack, pack_samples, split_by_tokens


def make_spec(tokenizer: str, template: str, **rest) -> SampleSpec:
    """A spec whose tokenizer (folder or Hugging Face id) and template fit. Raises UserError."""
    folder = resolve(tokenizer, small=True) if tokenizer else None
    try:
        tok = load_tokenizer(folder) if folder else byte_tokenizer()
        templates.resolve(template, tok)
    except ValueError as e:
        raise user_error(tokenizer or "command line", e) from None
    return SampleSpec(tok, template, **rest)


def stage_spec(model: config.Model, stage: config.Stage) -> SampleSpec:
    """The spec that training and `check` share. Raises UserError for a missing tokenizer, template or encoder."""
    if not model.text:
        raise UserError(
            "model.tokenizer", "not set", "name a folder with tokenizer.json or tokenizer.model"
        )
    views = tiling_of(config_from_recipe(model, stage.template))
    return make_spec(model.text, stage.template, max_tokens=stage.max_tokens, views=views)


PIXEL = ImageProcessor(1, resample=Image.Resampling.NEAREST)
# Every worker is one process of several: threads inside its tokenizer would only fight, and warn at each fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GIVE_UP = 100  # this many unusable rows one after the other: the data set is wrong, not a row of it

# ------------------------------------------------------------------------------------------- order and steps


class Order:
    """The endless stream of n rows: each epoch a permutation, a pure function of (seed, epoch).

    It ranks n raw draws of PCG64(SeedSequence([seed, epoch])). Raw, because numpy promises those never to change,
    and `Generator.permutation` it does not.

    parts, of a mixture: (rows, how many an epoch takes) of each source, whose rows are numbered on from the one
    before. A source's rows are a stream of their own; an epoch permutes the next of each.
    """

    def __init__(self, n: int, seed: int, parts: tuple[tuple[int, int], ...] = ()):
        if seed < 0:
            raise UserError("train.seed", f"{seed} is negative", "write 0 or more")
        self.n, self.seed, self.parts, self.epoch = (
            sum(count for _, count in parts) or n,
            seed,
            parts,
            -1,
        )

    def _permutation(self, n: int, *key: int) -> np.ndarray:
        draws = np.random.PCG64(np.random.SeedSequence([self.seed, *key])).random_raw(n)
        return np.argsort(draws, kind="stable").astype(np.int32)  # half the memory, in every worker

    def _rows(self, epoch: int) -> np.ndarray:
        order = self._permutation(self.n, epoch)
        first, taken = np.int64(0), []
        for source, (n, count) in enumerate(
            self.parts, 1
        ):  # from 1: a key that ends in 0 is the key without it
            turns = range(epoch * count // n, ((epoch + 1) * count - 1) // n + 1)
            stream = np.concatenate([self._permutation(n, turn, source) for turn in turns])
            start = epoch * count - turns[0] * n
            taken.append(first + stream[start : start + count])
            first += n
        return np.concatenate(taken)[order] if taken else order

    def __call__(self, k: int) -> tuple[int, int]:
        """(epoch, row) of the stream's k-th sample."""
        epoch = k // self.n
        if epoch != self.epoch:  # only one is kept: for millions of rows it is megabytes
            self.rows, self.epoch = self._rows(epoch), epoch
        return epoch, int(self.rows[k % self.n])

    def candidates(self, k: int) -> Iterator[int]:
        """The row of sample k, then those that can stand in for it: the ones after it in its epoch's permutation.

        Not those after it in the file: where a whole block of rows is bad, all of it would become the one row behind.
        """
        first = k - k % self.n
        yield from (self(first + (k + j) % self.n)[1] for j in range(min(self.n, GIVE_UP)))


@dataclass
class Step:
    """This rank's part of one optimizer step. It comes from a worker as a few large tensors: hundreds of
    micro-batches with five tensors each would use up the files that a process may have open."""

    packed: Batch | None = None  # all its samples, micro-batch after micro-batch; None = none
    parts: list[tuple[slice, slice]] = field(
        default_factory=list
    )  # which samples and items a micro-batch has
    skipped: list[str] = field(
        default_factory=list
    )  # a message for each row left out by on_bad_row = "skip"
    cut: list[tuple[int, int]] = field(
        default_factory=list
    )  # over-long rows, tokens taken off their tails
    seconds: float = 0.0  # that making it took
    error: str = (
        ""  # why training must stop; an exception in a worker would arrive as a page of traceback
    )

    @property
    def batches(self) -> list[Batch]:
        return [self.packed.part(*part) for part in self.parts]

    def pin_memory(self) -> Step:
        return replace(self, packed=self.packed and self.packed.pin_memory())


class Steps(Dataset):
    """`steps[i]` is this rank's part of optimizer step i: of the stream's positions i*global_batch and on, those
    with position % world == rank. A function of i alone, so that any worker can make any step, at any time.

    With `counts`, the rows' tokens as token_counts gives them, it is those that leave all ranks with as many tokens.
    All ranks must have the same.
    validation=True: instead every row once, in file order; a rank's part may be empty, a bad row has no stand-in.
    """

    def __init__(
        self,
        rows: Rows | Mixture,
        spec,
        stage,
        train,
        rank=0,
        world=1,
        validation=False,
        counts=None,
    ):
        self.size = stage.global_batch
        if self.size < world:
            raise UserError(
                "stage.global_batch", f"{self.size}, for {world} ranks", f"write {world} or more"
            )
        self.rows, self.spec, self.stage, self.validation = rows, spec, stage, validation
        self.stop_at_bad, self.rank, self.world = train.on_bad_row == "stop", rank, world
        self.order, self.counts = Order(len(rows), train.seed, rows.parts), counts

    def __len__(self) -> int:
        """Epochs rounded up to whole steps, so that every row is seen; what is over begins the next epoch."""
        if self.validation:
            return math.ceil(len(self.rows) / self.size)
        return self.stage.steps or max(
            1, math.ceil(round(self.stage.epochs * self.order.n) / self.size)
        )

    def __getitem__(self, i: int) -> Step:
        begin, step, samples = time.perf_counter(), Step(), []
        try:
            for k in self._mine(i):
                samples += self._sample(k, step.skipped)
        except UserError as e:
            return Step(error=str(e))
        bins = bin_pack([len(s.ids) for s in samples], self.stage.micro_batch_tokens)
        step.packed = pack_samples([samples[j] for b in bins for j in b]) if samples else None
        s = n = 0
        for b in bins:
            s, n, s0, n0 = s + len(b), n + sum(len(samples[j].items) for j in b), s, n
            step.parts.append((slice(s0, s), slice(n0, n)))
        step.cut = [(s.row, s.cut) for s in samples if s.cut]
        step.seconds = time.perf_counter() - begin
        return step

    def _mine(self, i: int) -> list[int]:
        """The stream's positions of step i that this rank makes."""
        stop = min((i + 1) * self.size, len(self.rows)) if self.validation else (i + 1) * self.size
        ks = range(i * self.size, stop)
        if self.counts is None:
            return [k for k in ks if k % self.world == self.rank]
        lengths = [int(self.counts[self.order(k)[1], 0]) for k in ks]
        return [ks[j] for j in split_by_tokens(lengths, self.world)[self.rank]]

    def _sample(self, k: int, skipped: list[str]) -> list[Sample]:
        """The stream's k-th sample, or its first usable stand-in."""
        for row in [k] if self.validation else self.order.candidates(k):
            try:
                return [make_sample(self.rows, row, self.spec)]
            except UserError as e:
                if self.stop_at_bad:
                    raise
                skipped.append(str(e))
        if self.validation:
            return []
        what = f"no usable row among {min(len(self.rows), GIVE_UP)}, the last one: {skipped[-1].partition('; fix:')[0]}"
        raise UserError(self.rows.file, what, "mend what `python data.py check` lists")


def _start_worker(_: int):
    torch.set_num_threads(
        1
    )  # the ranks own the cores; and a forked thread pool must not be entered again


def loader(
    steps: Steps, start: int = 0, workers: int = 0, pin_memory: bool = False
) -> Iterator[tuple[Step, float]]:
    """(step, seconds waited for it), from step `start` on. `workers` processes make them ahead and change nothing
    else. Raises UserError at a bad row that must stop training."""
    loaded = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, len(steps)),
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # it draws a seed when it starts: not from the generator that dropout uses
    )
    made = iter(loaded)
    try:
        while True:
            begin = time.perf_counter()
            step = next(made, None)
            if step is None:
                return
            if step.error:
                raise UserError.__new__(
                    UserError, step.error
                )  # the line is complete, UserError() would compose it
            yield step, time.perf_counter() - begin
    finally:
        del made  # ends the workers now: found by the garbage collector later, they take five seconds each to end


def validation_batches(rows, spec, stage, train, rank=0, world=1, log=print) -> Iterator[Batch]:
    """Every row of the held-out file once, this rank's share in file order. `log` gets a line per skipped row."""
    steps = Steps(rows, spec, stage, train, rank, world, validation=True)
    for step, _ in loader(steps, workers=min(train.workers, len(steps))):
        for message in step.skipped:
            log(message)
        yield from step.batches


# ---------------------------------------------------------------------------------------------- token counts


class Counts(Dataset):
    """Chunks of rows -> their samples' tokens, views and supervised tokens; zeros for a row that makes none."""

    def __init__(self, rows: Rows, spec: SampleSpec, begin: int, end: int):
        self.rows, self.spec, self.ranges = (
            rows,
            spec,
            [range(i, min(i + 256, end)) for i in range(begin, end, 256)],
        )

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.array([self._count(k) for k in self.ranges[i]], np.int64)

    def _count(self, i: int) -> tuple[int, int, int]:
        try:
            ids, labels, shapes, _ = encode_row(self.rows, i, self.rows[i], "", self.spec)
        except UserError:
            return 0, 0, 0  # making the sample says why
        return len(ids), sum(shape.views for shape in shapes), len(labels) - labels.count(IGNORE)


def token_counts(rows: Rows | Mixture, spec: SampleSpec, workers: int = 0) -> np.ndarray:
    """(len(rows), 3) int64: tokens, views and supervised tokens of each row's sample, for Steps. Kept beside the
    rows' files for this tokenizer, template and limits; the first time all rows are tokenized, by `workers`."""
    if isinstance(rows, Mixture):
        return np.concatenate([token_counts(source, spec, workers) for source in rows.sources])
    what = repr((spec.template, spec.max_tokens, spec.views, sorted(spec.tokenizer.files.items())))
    key, made = hashlib.sha256(what.encode()).hexdigest()[:12], []
    for file, begin, end in zip(rows.files, [0, *rows.ends], rows.ends, strict=False):
        chunks = Counts(rows, spec, int(begin), int(end))
        load = DataLoader(
            chunks,
            batch_size=None,
            num_workers=min(workers, len(chunks)),
            generator=torch.Generator(),
        )

        def count(file=file, load=load):
            print(f"{file}: counting the tokens of its rows, once", flush=True)
            return np.concatenate(list(tqdm(load, unit="chunk", disable=None, leave=False)))

        made.append(kept(file, f"{key}.counts", count))
    return made[0] if len(made) == 1 else np.concatenate(made)


# ----------------------------------------------------------------------------------------------------- check


def histogram(lengths: list[int], width: int = 40) -> str:
    """Bars of how many lengths fall into each of at most 16 ranges."""
    step = 1 << max(0, math.ceil(math.log2((max(lengths) + 1) / 16)))
    counts = Counter(length // step for length in lengths)
    lines = []
    for b in range(min(counts), max(counts) + 1):
        whole, eighths = divmod(math.ceil(8 * width * counts[b] / max(counts.values())), 8)
        bar = "█" * whole + "▏▎▍▌▋▊▉"[eighths - 1 : eighths] if counts[b] else ""
        lines.append(f"  {b * step:>7} – {(b + 1) * step - 1:<7} {bar} {counts[b]}")
    return "\n".join(lines)


def check(rows: Rows, spec: SampleSpec) -> int:
    """Reads every row as training will: a line for each that is bad or cut, then totals. Returns how many are bad."""
    stage, train = (
        config.Stage(global_batch=16, micro_batch_tokens=0),
        config.Train(on_bad_row="skip"),
    )
    if spec.views.mode not in TILED:  # of pictures only their decoding is tried: a pixel is enough
        spec = replace(spec, views=replace(spec.views, mode="square", transform=PIXEL))
    steps = Steps(rows, spec, stage, train, validation=True)
    items, lengths, bad, supervised, kept, cuts = Counter(), [], 0, 0, 0, []
    with tqdm(
        total=len(rows), unit="row", disable=None, leave=False
    ) as progress:  # None: off unless on a terminal
        for step, _ in loader(steps, workers=min(os.cpu_count() or 1, len(steps) // 4)):
            for line in step.skipped:
                tqdm.write(line)
            for row, cut in step.cut:
                line = f"note: over-long, loses {cut} tokens of its tail; fix: raise max_tokens, or leave it so"
                tqdm.write(f"{rows.where(row)}: {line}")
            for batch in step.batches:  # of one sample each
                items[min(len(batch.shapes), 2)] += 1
                lengths.append(len(batch.labels) + dict(step.cut).get(batch.rows[0], 0))
                supervised, kept = supervised + batch.supervised, kept + len(batch.labels)
            bad, cuts = bad + len(step.skipped), cuts + [cut for _, cut in step.cut]
            progress.update(len(step.skipped) + len(step.parts))
    kinds = f"{items[0]} text-only, {items[1]} with one image or video, {items[2]} with several"
    print(f"{rows.file}: {len(rows)} rows, {bad} bad; the good ones: {kinds}")
    if lengths:
        low, median, high = np.percentile(lengths, [0, 50, 100])
        print(
            f"  tokens: {low:.0f} shortest, {median:.0f} median, {high:.0f} longest; {spec.views.positions()} per image"
        )
        print(histogram(lengths))
        print(f"  supervised: {100 * supervised / kept:.1f} % of {kept} tokens")
        print(f"  over-long: {len(cuts)} rows lose {sum(cuts)} tokens of their tails")
    return bad


PAGE = """<!doctype html><meta charset="utf-8"><title>Samples</title><style>
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; color: #1c2430 }
h2 { font-size: 1em; margin: 2em 0 .5em } img { width: 240px; margin-right: 8px; border: 1px solid #dde2e8 }
pre { white-space: pre-wrap; background: #f4f6f8; padding: 1em } mark { background: #bfe8c5 }
</style><p>Pictures as the encoder gets them, before normalisation; what is <mark>marked</mark> is supervised.
"""


def inspect(rows: Rows | Mixture, spec: SampleSpec, seed: int, count: int) -> str:
    """Prints the first samples in the order of training, what is supervised marked; returns them as HTML."""
    order, form, html = (
        Order(len(rows), seed, rows.parts),
        templates.resolve(spec.template, spec.tokenizer),
        [],
    )
    for k in range(min(count, order.n)):
        i = order(k)[1]
        row, sample = rows[i], make_sample(rows, i, spec)
        text, spans, marks = templates.render(row["conversations"], form)
        _, labels, offsets = templates.tokenize(text, spans, marks, spec.tokenizer)
        sides = [f"{shape.views} of {p.size(2)} x {p.size(3)}" for p, shape in sample.items]
        head = f"{rows.where(i, row)}: {len(sample.ids)} tokens, {int((sample.labels != IGNORE).sum())} supervised"
        head += f", views: {', '.join(sides) or 'none'}" + f", {sample.cut} tokens cut off" * (
            sample.cut > 0
        )
        print(f"--- {head}\n{templates.show(text, labels, offsets, sys.stdout.isatty())}")
        html.append(f"<h2>{escape(head)}</h2>")
        for pixels in (view for item in sample.items for view in item.pixels):
            file = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
            html.append(
                f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
            )
        green = escape(
            templates.show(text, labels, offsets, True)
        )  # in escapes, which the text cannot hold
        html.append(
            f"<pre>{green.replace(chr(27) + '[32m', '<mark>').replace(chr(27) + '[0m', '</mark>')}</pre>"
        )
    return "\n".join(html)


def main(argv: list[str]):
    parser = config.parser(__doc__)
    parser.add_argument("command", choices=["check", "inspect", "shard"])
    parser.add_argument(
        "recipe", nargs="*", help="recipe.toml [section.key=value ...]; for shard: rows, new folder"
    )
    parser.add_argument("--data", help="instead of a recipe: a .json or .jsonl file of rows")
    parser.add_argument(
        "--images", default="", help="folder of the pictures; default: the rows' own"
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        help="its folder; without one, tokens are bytes and nothing is cut",
    )
    parser.add_argument("--template", default="phi")
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--rows", type=int, default=3, help="inspect: so many of each stage")
    parser.add_argument("--page", help="inspect: also write a page with the pictures")
    parser.add_argument("--size", type=int, default=1000, help="shard: megabytes of a tar file")
    args = parser.parse_args(argv)
    if args.command == "shard":
        if len(args.recipe) != 2:
            parser.error("shard takes rows and a new folder")
        rows, out = Rows(args.recipe[0], args.images), Path(args.recipe[1])
        print(f"{out}: {len(rows)} rows in {shard(rows, out, args.size * 10**6)} tar files")
        return
    if bool(args.data) == bool(args.recipe):
        parser.error("name a recipe, or rows with --data")
    jobs, seed = [], 0  # (name, rows, spec): all are opened before any is read to the end
    if args.data:
        limit = args.max_tokens or (2048 if args.tokenizer else sys.maxsize)
        views = Tiling(0, "resampler", {"num_queries": args.image_tokens}, PIXEL)
        spec = make_spec(args.tokenizer, args.template, max_tokens=limit, views=views)
        name = args.data if args.tokenizer else f"{args.data}, in bytes (no --tokenizer)"
        jobs.append((name, Rows(args.data, args.images), spec))
    else:
        recipe, path = config.load(args.recipe, args.recipe[0])
        seed = recipe.train.seed
        for name, stage in recipe.stage.items():
            spec = stage_spec(recipe.model, stage)
            jobs.append((f"stage {name}", Mixture.of(stage, f"{path}:stage.{name}"), spec))
            if stage.validation:
                jobs.append(
                    (f"stage {name}, validation", Rows(stage.validation, stage.images), spec)
                )
    if args.command == "inspect":
        page = [PAGE]
        for name, rows, spec in jobs:
            print(f"== {name}")
            page += [f"<h1>{escape(name)}</h1>", inspect(rows, spec, seed, args.rows)]
        if args.page:
            write_file(Path(args.page), "\n".join(page))
            print(f"{args.page} written")
        return
    bad = 0
    for name, rows, spec in jobs:
        print(f"== {name}")
        bad += check(rows, spec)
    if bad:
        what = f"{bad} of {sum(len(rows) for _, rows, _ in jobs)} rows are bad"
        where = args.data or args.recipe[0]
        raise UserError(where, what, "mend or remove them, or set train.on_bad_row=skip")


if __name__ == "__main__":
    config.cli(main, __doc__)
