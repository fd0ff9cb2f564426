"""From rows to batches: the order of samples, optimizer steps, the loader; and a check beforehand.

    python data.py check --data FOLDER     # of pictures, with a metadata.csv beside them, as

        file_name,question,answer
        bella.jpg,Who is this?,Bella

    python data.py check recipes/demo.toml [section.key=value ...]   # all rows, as training will
    python data.py check --data rows.json --images folder [--model DIR]   # as that model sees them
    python data.py check --data rows.json --images folder [--tokenizer DIR --template phi]
    python data.py check recipes/demo.toml --against MMBENCH [...]   # and: is a benchmark in them?
    python data.py inspect recipes/demo.toml [--rows 3] [--page FILE.html]   # the first samples
    python data.py inspect --data rows.json --tokenizer DIR --template phi [--row 7]
    python data.py shard rows.json NEW_FOLDER [--images folder --size 1000]   # tars of 1000 MB

Rows may be JSON, JSON lines, CSV, parquet or tar shards; a folder or a glob of them; a folder of
pictures with metadata.csv or with captions; or a Hugging Face id. With --data,
--columns image=photo question=query names columns that have other names.

inputs/rows.py reads rows, and inputs/sample.py makes samples of them. From top to bottom:

    make_spec, stage_spec, model_spec    how a row becomes a sample: tokenizer, template, limits
    Order                    which row is the k-th sample of training: a permutation for each epoch,
                             of blocks and within them where rows are read by blocks
    Steps, Step              global_batch rows for each optimizer step, packed into micro-batches
    loader                   worker processes that make steps ahead
    token_counts             the length of every row, so that ranks can share tokens evenly
    main                     the command; training/check.py does what `check` and `inspect` ask for

What training sees at step i is a function of (seed, i) and of nothing else: it is the same on any
number of ranks and workers, and after any restart.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import command_line
import config
from checkpoints.files import resolve
from checkpoints.layouts import config_from_recipe, load_recipe_tokenizer, read_config
from command_line import within
from config import UserError, printable
from inputs import templates
from inputs.forms import columns_of
from inputs.measure import measure_rows
from inputs.rows import Blocks, Part, Rows, open_rows
from inputs.sample import Sample, SampleSpec, make_samples, user_error
from inputs.shards import shard
from inputs.templates import byte_tokenizer
from inputs.tiling import Tiling
from inputs.tokenizer import Tokenizer, load_tokenizer
from model import tiling_of, vocabulary_of
from packing import IGNORE, Batch, bin_pack, pack_samples, split_by_tokens

# Every worker is a process of several. Threads in its tokenizer would fight for the same cores, and
# warn at each fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# So many unusable rows one after the other mean that the data set is wrong, not a row of it.
GIVE_UP = 100


def make_spec(source: str, template: str, max_tokens: int, views: Tiling) -> SampleSpec:
    """Return a spec for a tokenizer (a folder or Hugging Face id) and a template that fits it.

    Without a tokenizer, a token is a byte. Raises UserError for a tokenizer that cannot be loaded,
    and for a template that is unknown or does not fit.
    """
    try:
        if source:
            tokenizer = load_tokenizer(resolve(source, small=True))
        else:
            tokenizer = byte_tokenizer()
    except ValueError as e:
        raise user_error(source or "command line", e) from None
    return fitting_spec(tokenizer, source, template, max_tokens, views)


def fitting_spec(
    tokenizer: Tokenizer, source: str, template: str, max_tokens: int, views: Tiling
) -> SampleSpec:
    """Return a spec of these. Raises UserError for a template that is unknown or does not fit.

    source: where the tokenizer came from, for messages.
    """
    try:
        templates.choose_template(template, tokenizer)
    except ValueError as e:
        raise user_error(source or "command line", e) from None
    return SampleSpec(tokenizer, template, max_tokens, views)


def stage_spec(model: config.Model, stage: config.Stage) -> SampleSpec:
    """Return the spec of a recipe's stage, for training and `check` alike.

    Raises UserError for a missing tokenizer, template or encoder, and for a tokenizer with ids that
    the model has no embeddings for.
    """
    if not model.tokenizer_source:
        fix = "name a folder with tokenizer.json or tokenizer.model"
        raise UserError("model.tokenizer", "not set", fix)
    template = template_of(model, stage, "stage")
    c = config_from_recipe(model, template)
    source = model.tokenizer_source
    tokenizer = load_recipe_tokenizer(model)
    spec = fitting_spec(tokenizer, source, template, stage.max_tokens, tiling_of(c))

    # A GPU would say no more of such an id than that something failed.
    vocabulary = vocabulary_of(c)
    largest = templates.largest_id(spec.tokenizer, template)
    if vocabulary is not None and largest >= vocabulary:
        what = f"makes ids up to {largest}, and the model has {vocabulary}"
        raise UserError(f"model.tokenizer={source}", what, "give the tokenizer of this model")
    return spec


def model_spec(folder: Path, max_tokens: int = sys.maxsize) -> SampleSpec:
    """Return the spec of a finished model: its tokenizer, its template, how it sees pictures.

    Raises UserError for a folder without a model.
    """
    c = read_config(folder)
    return make_spec(str(folder), c.template, max_tokens, tiling_of(c))


def template_of(model: config.Model, stage: config.Stage, where: str) -> str:
    """Return the name of a stage's template: its own, or that of the model that it starts from.

    where: what messages call the stage. Raises UserError if neither has one.
    """
    if stage.template:
        return stage.template
    if not model.checkpoint:
        fix = f"name one of {', '.join(templates.TEMPLATES)}"
        raise UserError(f"{where}.template", "empty, and there is no model.checkpoint", fix)
    folder = resolve(model.checkpoint, "model.checkpoint", small=True)
    template = read_config(folder).template
    if not template:
        fix = f"name one of {', '.join(templates.TEMPLATES)}"
        raise UserError(f"{where}.template", f"empty, and {folder} names none", fix)
    return template


# --------------------------------------------------------------------------------- order of samples


class Order:
    """The endless stream of rows: order(k) is the k-th one's number, for k = 0, 1, 2, ...

    Each epoch is a permutation of n rows, a pure function of (seed, epoch).

    Where rows lie in `blocks`, a permutation has two levels: the blocks are permuted, and then the
    rows within each window of `at_once` blocks that come to follow each other. So whoever holds
    that many blocks reads each of them once in an epoch. Every worker of every rank does: a step
    has rows of the whole window, whoever makes it.

    In a mixture, `parts` says for each source how many rows it has and how many of them an epoch
    takes. Rows are numbered through all sources. Each source has an endless stream of its own rows,
    shuffled again whenever all were taken. An epoch takes the next ones of each, and permutes them.
    A source with blocks gets its places in the epoch from that permutation, as the others do, and
    fills them in the order of its own stream.

    Raises UserError for a negative seed, which numpy does not take.
    """

    def __init__(
        self, n: int, seed: int, parts: tuple[Part, ...] = (), blocks: Blocks | None = None
    ):
        if seed < 0:
            raise UserError("train.seed", f"{seed} is negative", "write 0 or more")
        self.seed = seed
        self.parts = parts
        self.blocks = blocks

        # How many samples an epoch has.
        self.n = n
        if parts:
            self.n = sum(part.per_epoch for part in parts)

        # Only one epoch's rows are kept: of millions of rows they take megabytes.
        self.epoch = -1
        self.rows = np.empty(0, np.int32)

    def __call__(self, k: int) -> tuple[int, int]:
        """Return (epoch, row) of the k-th sample."""
        epoch, place = divmod(k, self.n)
        if epoch != self.epoch:
            self.rows = self._epoch_rows(epoch)
            self.epoch = epoch
        return epoch, int(self.rows[place])

    def candidates(self, k: int) -> Iterator[int]:
        """Yield the row of sample k, then those that stand in for it if it is unusable.

        They are the rows that follow it in its epoch's permutation, and not in the file. Where a
        whole block of the file is bad, every row of it would else become the one after the block.
        Where rows lie in blocks, they are mostly of the window that is held.
        """
        epoch, place = divmod(k, self.n)
        first_of_epoch = epoch * self.n
        for j in range(min(self.n, GIVE_UP)):
            # From the end of the epoch on to its beginning: no other epoch is touched.
            _, row = self(first_of_epoch + (place + j) % self.n)
            yield row

    def _epoch_rows(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch in their order, (n,) integers."""
        if not self.parts:
            return self._permutation(self.n, self.blocks, epoch)
        order = self._permutation(self.n, None, epoch)

        # Sources are numbered from 1, because SeedSequence ignores zeros at the end of a key: a
        # source 0 would have the same permutation as the epochs themselves.
        taken = []
        first_row = np.int64(0)  # wider than a source's own numbers: all together may be many
        first_place = 0
        for source, part in enumerate(self.parts, 1):
            of_source = self._source_rows(source, part, epoch)
            taken.append(first_row + of_source)
            first_row += part.rows

            # A source with blocks keeps its order: among its places, the permutation is sorted.
            end_place = first_place + part.per_epoch
            if part.blocks is not None:
                is_here = (first_place <= order) & (order < end_place)
                order[is_here] = np.arange(first_place, end_place)
            first_place = end_place
        return np.concatenate(taken)[order]

    def _source_rows(self, source: int, part: Part, epoch: int) -> np.ndarray:
        """Return what an epoch takes of a source: the next `per_epoch` of its stream of rows."""
        begin = epoch * part.per_epoch
        end = begin + part.per_epoch

        # The stream is one permutation of the source after the other. Make those that are needed.
        first_turn = begin // part.rows
        last_turn = (end - 1) // part.rows
        turns = []
        for turn in range(first_turn, last_turn + 1):
            turns.append(self._permutation(part.rows, part.blocks, turn, source))
        stream = np.concatenate(turns)

        skipped = begin - first_turn * part.rows
        return stream[skipped : skipped + part.per_epoch]

    def _permutation(self, n: int, blocks: Blocks | None, *key: int) -> np.ndarray:
        """Return a permutation of range(n) that (seed, *key) decides, for ever; by blocks, if any.

        It ranks n raw draws of the generator. numpy promises that raw draws never change, so a run
        can be resumed years later. It promises nothing of the kind for `Generator.permutation`.
        """
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, *key]))
        if blocks is None:
            order = np.argsort(bits.random_raw(n), kind="stable")
        else:
            # Rank by window, and in a window by draws.
            window_of_block = ranks(bits.random_raw(len(blocks.ends))) // blocks.at_once
            rows_of_block = np.diff(blocks.ends, prepend=0)
            window = np.repeat(window_of_block, rows_of_block)
            order = np.lexsort((bits.random_raw(n), window))
        return order.astype(np.int32)  # half the memory, in every worker


def ranks(draws: np.ndarray) -> np.ndarray:
    """Return the place of each draw among all of them, from 0 for the smallest."""
    places = np.empty(len(draws), np.int64)
    places[np.argsort(draws, kind="stable")] = np.arange(len(draws))
    return places


# ---------------------------------------------------------------------------------- optimizer steps


class MicroBatch(NamedTuple):
    """Which samples and which items of `Step.packed` form a micro-batch."""

    samples: slice
    items: slice


class Size(NamedTuple):
    """How many tokens a sample has."""

    kept: int  # what training sees
    supervised: int  # of these
    cut: int  # off the tail


class Reading(NamedTuple):
    """What `check` says of a row that can be trained on."""

    row: int
    items: int  # pictures and videos
    samples: list[Size]
    cut: int  # tokens of it that max_tokens leaves out, in all its samples
    notes: tuple[str, ...]  # how it was read
    unread: tuple[str, ...]  # its keys that nothing reads

    @classmethod
    def of(cls, samples: list[Sample]) -> Reading:
        """Return what there is to say of the samples of a row."""
        sizes = []
        for sample in samples:
            supervised = int((sample.labels != IGNORE).sum())
            sizes.append(Size(len(sample.ids), supervised, sample.cut))
        last = samples[-1]  # it shows the most items
        cut = sum(size.cut for size in sizes) + last.lost
        return cls(last.row, len(last.items), sizes, cut, last.notes, last.unread)


@dataclass
class Step:
    """One rank's share of an optimizer step, cut into micro-batches.

    A worker sends it as the few large tensors of `packed`. Each tensor that is sent takes an open
    file, and hundreds of micro-batches with seven tensors each would use up what a process may
    open.
    """

    # All its samples, micro-batch after micro-batch; None where there are none.
    packed: Batch | None = None
    micro_batches: list[MicroBatch] = field(default_factory=list)

    # A message for each row that on_bad_row = "skip" left out.
    skipped: list[str] = field(default_factory=list)

    # What there is to say of each of its rows.
    readings: list[Reading] = field(default_factory=list)

    seconds: float = 0.0  # it took to make

    # Why training must stop, or "". An exception in a worker would arrive as a page of traceback.
    error: str = ""

    @property
    def cut(self) -> int:
        """Tokens that were taken off over-long rows."""
        return sum(reading.cut for reading in self.readings)

    @cached_property
    def batches(self) -> list[Batch]:
        """The micro-batches themselves, as slices of `packed`; cut once, not at every use."""
        return [self.packed.part(batch.samples, batch.items) for batch in self.micro_batches]

    def pin_memory(self) -> Step:
        """Return it in pinned memory, which is fast to copy to a GPU. The DataLoader calls it."""
        if self.packed is None:
            return self
        return replace(self, packed=self.packed.pin_memory())


class Steps(Dataset):
    """`steps[i]` is this rank's share of optimizer step i.

    Step i has the rows i * global_batch, ..., (i + 1) * global_batch - 1 of the order. It is a
    function of i alone, so any worker can make any step, at any time.

    Its rows are dealt to the ranks in turn: rank r of `world` makes those whose number is r modulo
    `world`. With `counts` (of token_counts, the same on all ranks) they are shared so that all
    ranks have about as many tokens.

    A row is one sample, or one for each of its answers (sample.make_samples). They are in the same
    step and on the same rank, and are packed like those of other rows. So a step learns the same
    answers with every template.

    With validation=True there is every row once, in the order of the file. Then a bad row has no
    stand-in, and a rank's share may be empty.

    Raises UserError if there are more ranks than rows in a step.
    """

    def __init__(
        self,
        rows: Rows,
        spec: SampleSpec,
        stage: config.Stage,
        train: config.Train,
        rank: int = 0,
        world: int = 1,
        validation: bool = False,
        counts: np.ndarray | None = None,
    ):
        if stage.global_batch < world:
            what = f"{stage.global_batch}, for {world} ranks"
            raise UserError("stage.global_batch", what, f"write {world} or more")
        self.rows = rows
        self.spec = spec
        self.stage = stage
        self.size = stage.global_batch  # rows of a step, on all ranks
        self.stop_at_bad = train.on_bad_row == "stop"
        self.rank = rank
        self.world = world
        self.validation = validation
        self.counts = counts
        self.order = Order(len(rows), train.seed, rows.parts, rows.blocks)

    def __len__(self) -> int:
        """Return how many steps there are: as many as the stage says, or as its epochs take.

        Every step has global_batch rows. Where the epochs do not fill the last one, it also takes
        rows of the next epoch.
        """
        if self.validation:
            return math.ceil(len(self.rows) / self.size)
        if self.stage.steps:
            return self.stage.steps
        rows = round(self.stage.epochs * self.order.n)
        return max(1, math.ceil(rows / self.size))

    def __getitem__(self, i: int) -> Step:
        """Return this rank's share of step i."""
        begin = time.perf_counter()

        # Make the samples. A bad row that must stop training is reported in the step.
        samples = []
        skipped = []
        readings = []
        try:
            for k in self._share(i):
                samples_of_row = self._samples(k, skipped)
                if samples_of_row:
                    samples += samples_of_row
                    readings.append(Reading.of(samples_of_row))
        except UserError as e:
            return Step(error=str(e))

        # Cut them into micro-batches under the token budget, and line these up.
        lengths = [len(sample.ids) for sample in samples]
        ordered = []
        micro_batches = []
        first_item = 0
        for places in bin_pack(lengths, self.stage.micro_batch_tokens):
            first_sample = len(ordered)
            end_item = first_item
            for place in places:
                ordered.append(samples[place])
                end_item += len(samples[place].items)

            batch = MicroBatch(slice(first_sample, len(ordered)), slice(first_item, end_item))
            micro_batches.append(batch)
            first_item = end_item

        packed = None
        if ordered:
            packed = pack_samples(ordered)
        return Step(
            packed=packed,
            micro_batches=micro_batches,
            skipped=skipped,
            readings=readings,
            seconds=time.perf_counter() - begin,
        )

    def _share(self, i: int) -> list[int]:
        """Return the rows of step i, as numbers in the order, that this rank takes."""
        begin = i * self.size
        end = begin + self.size
        if self.validation:
            end = min(end, len(self.rows))

        # Without counts, deal them in turn.
        if self.counts is None:
            return [k for k in range(begin, end) if k % self.world == self.rank]

        # With counts, as many tokens for each. Every rank computes the same split.
        lengths = []
        for k in range(begin, end):
            _, row = self.order(k)
            lengths.append(int(self.counts[row, 0]))
        places_of_ranks = split_by_tokens(lengths, self.world)
        places = places_of_ranks[self.rank]
        return [begin + place for place in places]

    def _samples(self, k: int, skipped: list[str]) -> list[Sample]:
        """Return those of the k-th row, or of its first usable stand-in; [] if validation has none.

        Add a message to `skipped` for each unusable row. Raises UserError where one stops training.
        """
        if self.validation:
            candidates = [k]
        else:
            candidates = self.order.candidates(k)

        for row in candidates:
            try:
                return make_samples(self.rows, row, self.spec)
            except UserError as e:
                if self.stop_at_bad:
                    raise
                skipped.append(str(e))

        if self.validation:
            return []
        tried = min(len(self.rows), GIVE_UP)
        last, _, _ = skipped[-1].partition("; fix:")
        what = f"no usable row among {tried}, the last one: {last}"
        raise UserError(self.rows.file, what, "mend what `python data.py check` lists")


# ------------------------------------------------------------------------------------------ loading


def loader(
    steps: Steps, start: int = 0, workers: int = 0, pin_memory: bool = False
) -> Iterator[tuple[Step, float]]:
    """Yield (step, seconds waited for it), from step `start` on.

    `workers` processes make steps ahead; with 0, this process makes each when it is asked for. The
    steps are the same. Raises UserError at a bad row that must stop training.
    """
    loaded = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, len(steps)),
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        # A DataLoader draws a seed when it starts. It must not come from dropout's generator.
        generator=torch.Generator(),
    )
    made = iter(loaded)
    try:
        while True:
            begin = time.perf_counter()
            step = next(made, None)
            if step is None:
                return
            if step.error:
                # The error is a complete line, and UserError(...) would want its three parts.
                raise UserError.__new__(UserError, step.error)
            waited = time.perf_counter() - begin
            yield step, waited
    finally:
        # This ends the workers now. Found later by the garbage collector, each takes five seconds.
        del made


def _start_worker(_: int):
    """Use one thread, because a pool of threads does not survive the fork of a worker.

    The cores belong to the ranks anyway.
    """
    torch.set_num_threads(1)


def validation_batches(
    rows: Rows,
    spec: SampleSpec,
    stage: config.Stage,
    train: config.Train,
    rank: int = 0,
    world: int = 1,
    log=print,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield this rank's share of held-out rows, each once. `log` gets a line per skipped row."""
    steps = Steps(rows, spec, stage, train, rank, world, validation=True)
    for step, _ in loader(steps, workers=min(train.workers, len(steps)), pin_memory=pin_memory):
        for message in step.skipped:
            log(message)
        yield from step.batches


# ------------------------------------------------------------------------------------- token counts


def measure_tokens(rows: Rows, row: int, spec: SampleSpec) -> tuple[int, int, int]:
    """Return the tokens, views and supervised tokens of a row; zeros if it is unusable."""
    try:
        samples = make_samples(rows, row, spec, pixels=False)
    except UserError:
        return 0, 0, 0  # training says why, when it makes the sample
    tokens = views = supervised = 0
    for sample in samples:
        tokens += len(sample.ids)
        views += sum(item.shape.views for item in sample.items)
        supervised += int((sample.labels != IGNORE).sum())
    return tokens, views, supervised


def token_counts(rows: Rows, spec: SampleSpec, workers: int = 0) -> np.ndarray:
    """Return (len(rows), 3) int64: tokens, views and supervised tokens of each row's samples.

    It is zeros for a row that makes none. All rows are tokenized once, by `workers` processes. The
    counts are kept beside the rows' files, for this tokenizer, this template and these limits.
    """
    # What the counts depend on is in the name of their file.
    tokenizer_files = sorted(spec.tokenizer.files.items())
    decides = repr((spec.template, spec.max_tokens, spec.views, tokenizer_files))
    if templates.choose_template(spec.template, spec.tokenizer).rewrites:
        decides += "a sample for each answer"  # not the counts of when such rows were refused

    def kind_of(source: Rows) -> str:
        columns = getattr(source, "columns", None) or ""
        key = hashlib.sha256(f"{decides}{columns}".encode()).hexdigest()[:12]
        return f"{key}.counts"

    measure = partial(measure_tokens, spec=spec)
    return measure_rows(rows, kind_of, measure, workers, "counting the tokens of its rows")


# -------------------------------------------------------------------------------------- the command


def main(argv: list[str]):
    """Do what the command line says: check, inspect or shard."""
    parser = command_line.parser(__doc__)
    add = parser.add_argument
    add("command", choices=["check", "inspect", "shard"])
    add("recipe", nargs="*", help="recipe.toml [section.key=value ...]; shard: rows, new folder")
    add("--data", help="instead of a recipe: rows, a file, folder, glob or Hugging Face id")
    add("--images", default="", help="folder of the pictures; default: the rows' own")
    add("--columns", nargs="+", default=[], help="columns of other names: image=photo answer=a")
    add("--model", help="a finished one: its tokenizer, its template, and how it sees pictures")
    add("--tokenizer", default="", help="its folder; else tokens are bytes and nothing is cut")
    add("--template", default="phi", help=", ".join(templates.TEMPLATES))
    add("--image-tokens", type=within(int, 1, 10**6), default=576)
    add("--max-tokens", type=within(int, 1, 10**7))
    add("--rows", type=within(int, 1, 10**6), default=3, help="inspect: so many of each stage")
    add("--row", type=int, help="inspect: only this row, counted from 0")
    add(
        "--against",
        nargs="+",
        default=[],
        metavar="BENCHMARK",
        help="check: folders or files whose pictures should not be among the rows'",
    )
    add("--page", help="inspect: also write a page with the pictures")
    add("--size", type=within(int, 1, 10**6), default=1000, help="shard: megabytes of a tar file")
    args = parser.parse_args(argv)

    # Rows into tar files.
    if args.command == "shard":
        if len(args.recipe) != 2:
            parser.error("shard takes rows and a new folder")
        source, out = args.recipe
        rows = open_rows(source, args.images, columns_of(args.columns))
        count = shard(rows, Path(out), args.size * 10**6)
        print(f"{printable(out)}: {len(rows)} rows in {count} tar files")
        return

    # Rows before training, from one of the two.
    if bool(args.data) == bool(args.recipe):
        parser.error("name a recipe, or rows with --data")
    if args.model and (args.tokenizer or not args.data):
        parser.error("--model stands beside --data, and brings its own tokenizer and template")

    # This file's script stands on a higher floor than the file itself: training/check.py uses it.
    from training import check

    check.check_or_inspect(args)


if __name__ == "__main__":
    command_line.cli(main, __doc__)
