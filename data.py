"""LLaVA rows -> packed batches, the same for any number of ranks and workers; and a check of the rows beforehand.

    python data.py check recipes/demo.toml [section.key=value ...]      # every stage, as training will read it
    python data.py check --data rows.json --images folder [--tokenizer DIR --template phi --image-tokens 576]

A row is {"id": ..., "image": "a.jpg" | ["a.jpg", "b.jpg"] | absent, "conversations": [{"from": "human" | "gpt",
"value": "... <image> ..."}, ...]}. It becomes a Sample (ids with every image position in place, labels, pixels);
samples are packed into a Batch: one row of tokens, positions that restart, `cu_seqlens` where samples meet.

T tokens, S samples, N images, n tokens per image, H x W pixels. Ids hold IMAGE_TOKEN at each of an image's n
positions, labels hold IGNORE where nothing is learned.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import config
import templates
from config import UserError
from layouts import from_recipe, vision_spec
from templates import IGNORE, IMAGE_TOKEN
from weights import resolve

# Every worker is one process of several: threads inside its tokenizer would only fight, and warn at each fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MAX_RATIO = 500  # of an image's sides: with the shortest resized to 384, still within Pillow's limit of pixels
GIVE_UP = 100  # this many unusable rows one after the other: the data set is wrong, not a row of it

# ---------------------------------------------------------------------------------------------------- images


def looks_like(head: bytes) -> str:
    """What a file that should be something else is, from its first bytes; "" if that is not plain."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, the file itself was never fetched"
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if text.startswith((b"<?xml", b"<error", b"<svg")):
        return "an XML text"
    return "" if head.strip(b"\0") else "only zero bytes" if head else "empty file"


def load_image(path: str | Path) -> Image.Image:
    """The first frame in RGB as Pillow converts it, upright by its EXIF. Raises ValueError(what is wrong with it)."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError as e:
        raise ValueError(e.strerror.lower()) from None
    if what := looks_like(head):
        raise ValueError(what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd palettes and metadata: the pixels are right all the same
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                try:
                    image = ImageOps.exif_transpose(image)
                except Exception:
                    pass  # damaged EXIF (SyntaxError, TypeError, struct.error ...): good pixels, as stored
                image = image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit against bombs") from None
    except UnidentifiedImageError:
        raise ValueError("not an image, or one with a damaged header or a side of zero pixels") from None
    except Exception as e:  # Pillow's decoders raise nearly anything on a damaged file
        what = "truncated" if "truncated" in str(e).lower() else f"damaged: {' '.join(str(e).split())}"
        raise ValueError(what) from None
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels, a side ratio over {MAX_RATIO}")
    return image


# ------------------------------------------------------------------------------------------------------ rows


class Rows:
    """A .json list or a .jsonl file: `rows[i]` is a dict, `rows.where(i)` its name in messages.

    Callers see len(), [i] and where(i) only, so that an index of byte offsets can replace the list in memory.
    Messages count rows of a list from 0, as `json.load(file)[i]` does, and lines from 1, as editors do.
    """

    def __init__(self, file: str | Path, images: str | Path = ""):
        self.file = Path(file)
        self.images = Path(images) if images else self.file.parent
        try:
            raw = self.file.read_bytes()
        except OSError as e:
            raise UserError(self.file, e.strerror.lower(), "name a .json or .jsonl file of rows") from None
        if not raw.strip():
            raise UserError(self.file, "empty file", "write the rows again")
        if not self.images.is_dir():
            raise UserError(self.images, "no such folder of images", "set the stage's images, or --images")
        self.lines: list[int] = []
        if self.file.suffix == ".jsonl":  # rows stay bytes until asked for: a bad line is one bad row
            self.lines = [number for number, line in enumerate(raw.split(b"\n"), 1) if line.strip()]
            self.rows = [line for line in raw.split(b"\n") if line.strip()]
            return
        self.rows = self._parse(raw, str(self.file))
        if not isinstance(self.rows, list) or not self.rows:
            what = "no rows" if self.rows == [] else f"a JSON {type(self.rows).__name__}, not a list of rows"
            raise UserError(self.file, what, "write [row, row, ...], or one row per line in a .jsonl file")

    @staticmethod
    def _parse(raw: bytes, where: str):
        try:
            return json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as e:
            raise UserError(where, f"not UTF-8 at byte {e.start}", "save it as UTF-8") from None
        except json.JSONDecodeError as e:
            what = looks_like(raw[:256]) or f"not JSON at line {e.lineno} column {e.colno}: {e.msg}"
            fix = "one row per line belongs into a .jsonl file" if e.msg == "Extra data" else "mend it there"
            raise UserError(where, what, fix) from None

    def __len__(self) -> int:
        return len(self.rows)

    def _place(self, i: int) -> str:
        return f"{self.file}:line {self.lines[i]}" if self.lines else f"{self.file}:row {i}"

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        row = self._parse(row, self._place(i)) if isinstance(row, bytes) else row
        if not isinstance(row, dict):
            raise UserError(self._place(i), f"a JSON {type(row).__name__}, not a row", "write {...}, or remove it")
        return row

    def where(self, i: int) -> str:
        name = self[i].get("id")
        return self._place(i) if name is None else f"{self._place(i)} (id {name})"


# --------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class SampleSpec:
    """All that decides how a row becomes a sample. Without a transform pictures are decoded and dropped (check)."""

    tokenizer: templates.Tokenizer
    template: str
    max_tokens: int
    image_tokens: int  # n
    image_mode: str = "square"
    transform: Callable[[Image.Image, str], Tensor] | None = None


def make_spec(tokenizer: str, template: str, **rest) -> SampleSpec:
    """A spec whose tokenizer (folder or Hugging Face id) and template fit. Raises UserError."""
    folder = resolve(tokenizer, small=True) if tokenizer else None
    try:
        tok = templates.load_tokenizer(folder) if folder else byte_tokenizer()
        templates.resolve(template, tok)
    except ValueError as e:
        raise _user_error(tokenizer or "command line", e) from None
    return SampleSpec(tok, template, **rest)


def stage_spec(model: config.Model, stage: config.Stage) -> SampleSpec:
    """The spec that training and `check` share. Raises UserError for a missing tokenizer, template or encoder."""
    tokenizer = model.tokenizer or model.llm
    if not tokenizer:
        raise UserError("model.tokenizer", "not set", "name a folder with tokenizer.json or tokenizer.model")
    transform, n = vision_spec(from_recipe(model, stage.template))
    rest = dict(max_tokens=stage.max_tokens, image_tokens=n, image_mode=model.image_mode, transform=transform)
    return make_spec(tokenizer, stage.template, **rest)


def _user_error(where, error: ValueError) -> UserError:
    what, _, fix = str(error).partition("; fix: ")
    return UserError(where, what, fix or "mend the row, or remove it")


@dataclass
class Sample:
    ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, not shifted; the first is IGNORE
    images: list[Tensor]  # (3, H, W) float32 each, in order of occurrence
    row: int
    cut: int  # tokens taken off the tail


def make_sample(rows: Rows, i: int, spec: SampleSpec) -> Sample:
    """Row i, ready for the model. Raises UserError `file:row i (id X): what; fix: action` if it cannot be."""
    row, where = rows[i], rows.where(i)
    if "video" in row:
        raise UserError(where, "a row with a video, only pictures can be read", "remove the row")
    names = row.get("image") or []
    names = names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) for name in names):
        raise UserError(where, f'"image" is {row["image"]!r}', "write a file name or a list of them")
    try:
        tokens = templates.encode(row.get("conversations"), spec.tokenizer, spec.template)
    except ValueError as e:
        raise _user_error(where, e) from None
    except TypeError as e:  # what `tokenizers` says of half a surrogate pair ("\ud83d"), which JSON may hold
        raise UserError(where, f"text that is not Unicode ({e})", "mend the row, or remove it") from None

    marks = tokens[0].count(IMAGE_TOKEN)
    if marks != len(names):
        what = f"{marks} <image> in what the humans say but {len(names)} images in the row"
        raise UserError(where, what, "write one <image> for each, or remove the row")
    ids, labels, images_end = [], [], 0
    for token, label in zip(*tokens, strict=True):
        n = spec.image_tokens if token == IMAGE_TOKEN else 1  # the one place where tiles or frames will differ
        ids += [token] * n
        labels += [IGNORE if token == IMAGE_TOKEN else label] * n
        images_end = len(ids) if token == IMAGE_TOKEN else images_end

    # Text may go, from the tail. Part of an image may not: it would have more features than positions.
    limit = spec.max_tokens
    if images_end > limit:
        what = f"image cut, it ends at token {images_end} and max_tokens is {limit}"
        raise UserError(where, what, "raise max_tokens, or split the row")
    cut = max(0, len(ids) - limit)
    ids, labels = ids[:limit], labels[:limit]
    labels[:1] = [IGNORE]  # nothing stands before it; packed, the token to its left is another sample's
    if all(label == IGNORE for label in labels):
        what = f"nothing supervised in the first {len(labels)} of its {len(labels) + cut} tokens"
        raise UserError(where, what, "write an answer, raise max_tokens, or remove the row")

    images = []
    for name in names:
        try:
            image = load_image(rows.images / name)
        except ValueError as e:
            fix = "fetch the picture again, or remove the row"
            raise UserError(where, f"image {rows.images / name}: {e}", fix) from None
        images += [spec.transform(image, spec.image_mode)] if spec.transform else []
    return Sample(torch.tensor(ids), torch.tensor(labels), images, i, cut)


# --------------------------------------------------------------------------------------------------- packing


@dataclass
class Batch:
    """S samples in one row of T tokens."""

    input_ids: Tensor  # (T,) int64, IMAGE_TOKEN at image positions
    labels: Tensor  # (T,) int64, NOT shifted, IGNORE where unsupervised
    positions: Tensor  # (T,) int64, from 0 in each sample
    cu_seqlens: Tensor  # (S+1,) int32, where samples begin; the last is T
    max_seqlen: int
    images: Tensor | None  # (N, 3, H, W) float32, in order of occurrence
    rows: list[int]  # S row numbers

    @property
    def supervised(self) -> int:
        """Targets that count: no sample's first token is one, so the model's shift loses none. Waits for a GPU."""
        return int((self.labels != IGNORE).sum())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, **{k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def to(self, device) -> Batch:
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def part(self, samples: slice, images: slice) -> Batch:
        """Some of its samples, with their images, as views."""
        cu = self.cu_seqlens[samples.start : samples.stop + 1]
        t, cu = slice(int(cu[0]), int(cu[-1])), cu - cu[0]
        pixels = self.images[images] if images.stop > images.start else None
        ids, labels, positions = self.input_ids[t], self.labels[t], self.positions[t]
        return Batch(ids, labels, positions, cu, int(cu.diff().max()), pixels, self.rows[samples])


def pack(samples: list[Sample]) -> Batch:
    """Samples one after the other, in the order given."""
    lengths = [len(s.ids) for s in samples]
    images = [image for s in samples for image in s.images]
    return Batch(
        input_ids=torch.cat([s.ids for s in samples]),
        labels=torch.cat([s.labels for s in samples]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
        images=torch.stack(images) if images else None,
        rows=[s.row for s in samples],
    )


def fill(lengths: list[int], budget: int) -> list[list[int]]:
    """Which samples share a micro-batch of at most `budget` tokens: longest first, each into the first it fits.

    A sample longer than the budget is alone; with budget 0 every one is. Inside, stream order.
    """
    bins, room = [], []
    for j in sorted(range(len(lengths)), key=lambda j: -lengths[j]):
        b = next((b for b, free in enumerate(room) if free >= lengths[j]), len(bins))
        if b == len(bins):
            bins.append([])
            room.append(budget)
        bins[b].append(j)
        room[b] -= lengths[j]
    return sorted(sorted(b) for b in bins)


# ------------------------------------------------------------------------------------------- order and steps


class Order:
    """The endless stream of n rows: each epoch a permutation, a pure function of (seed, epoch).

    It ranks n raw draws of PCG64(SeedSequence([seed, epoch])). Raw, because numpy promises those never to change,
    and `Generator.permutation` it does not.
    """

    def __init__(self, n: int, seed: int):
        if seed < 0:
            raise UserError("train.seed", f"{seed} is negative", "write 0 or more")
        self.n, self.seed, self.epoch = n, seed, -1

    def __call__(self, k: int) -> tuple[int, int]:
        """(epoch, row) of the stream's k-th sample."""
        epoch = k // self.n
        if epoch != self.epoch:  # only one is kept: for millions of rows it is megabytes
            draws = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.n)
            self.permutation, self.epoch = np.argsort(draws, kind="stable"), epoch
        return epoch, int(self.permutation[k % self.n])

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
    parts: list[tuple[slice, slice]] = field(default_factory=list)  # which samples and images a micro-batch has
    skipped: list[str] = field(default_factory=list)  # a message for each row left out by on_bad_row = "skip"
    cut: list[tuple[int, int]] = field(default_factory=list)  # over-long rows, tokens taken off their tails
    seconds: float = 0.0  # that making it took
    error: str = ""  # why training must stop; an exception in a worker would arrive as a page of traceback

    @property
    def batches(self) -> list[Batch]:
        return [self.packed.part(*part) for part in self.parts]

    def pin_memory(self) -> Step:
        return replace(self, packed=self.packed and self.packed.pin_memory())


class Steps(Dataset):
    """`steps[i]` is this rank's part of optimizer step i: of the stream's positions i*global_batch and on, those
    with position % world == rank. A function of i alone, so that any worker can make any step, at any time.

    validation=True: instead every row once, in file order; a rank's part may be empty, a bad row has no stand-in.
    """

    def __init__(self, rows: Rows, spec: SampleSpec, stage, train, rank=0, world=1, validation=False):
        self.size = stage.global_batch
        if self.size < world:
            raise UserError("stage.global_batch", f"{self.size}, for {world} ranks", f"write {world} or more")
        self.rows, self.spec, self.stage, self.validation = rows, spec, stage, validation
        self.stop_at_bad, self.rank, self.world = train.on_bad_row == "stop", rank, world
        self.order = Order(len(rows), train.seed)

    def __len__(self) -> int:
        """Epochs rounded up to whole steps, so that every row is seen; what is over begins the next epoch."""
        if self.validation:
            return math.ceil(len(self.rows) / self.size)
        return self.stage.steps or max(1, math.ceil(round(self.stage.epochs * len(self.rows)) / self.size))

    def __getitem__(self, i: int) -> Step:
        begin, step, samples = time.perf_counter(), Step(), []
        stop = min((i + 1) * self.size, len(self.rows)) if self.validation else (i + 1) * self.size
        try:
            for k in range(i * self.size, stop):
                if k % self.world == self.rank:
                    samples += self._sample(k, step.skipped)
        except UserError as e:
            return Step(error=str(e))
        bins = fill([len(s.ids) for s in samples], self.stage.micro_batch_tokens)
        step.packed = pack([samples[j] for b in bins for j in b]) if samples else None
        s = n = 0
        for b in bins:
            s, n, s0, n0 = s + len(b), n + sum(len(samples[j].images) for j in b), s, n
            step.parts.append((slice(s0, s), slice(n0, n)))
        step.cut = [(s.row, s.cut) for s in samples if s.cut]
        step.seconds = time.perf_counter() - begin
        return step

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
    torch.set_num_threads(1)  # the ranks own the cores; and a forked thread pool must not be entered again


def loader(steps: Steps, start: int = 0, workers: int = 0, pin_memory: bool = False) -> Iterator[tuple[Step, float]]:
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
                raise UserError.__new__(UserError, step.error)  # the line is complete, UserError() would compose it
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


# ----------------------------------------------------------------------------------------------------- check


def byte_tokenizer() -> templates.Tokenizer:
    """One token per byte, and every template's eos: lets `check` see a row's structure where no tokenizer is named."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(sorted({t.eos for t in templates.TEMPLATES.values() if t.eos}))
    files = {"tokenizer.json": tok.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "</s>"}'}
    return templates.JsonTokenizer(files)


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
    from tqdm import tqdm  # comes with tokenizers

    stage, train = config.Stage(global_batch=16, micro_batch_tokens=0), config.Train(on_bad_row="skip")
    steps = Steps(rows, replace(spec, transform=None), stage, train, validation=True)
    images, lengths, bad, supervised, kept, cuts = Counter(), [], 0, 0, 0, []
    with tqdm(total=len(rows), unit="row", disable=None, leave=False) as progress:  # None: off unless on a terminal
        for step, _ in loader(steps, workers=min(os.cpu_count() or 1, len(steps) // 4)):
            for line in step.skipped:
                tqdm.write(line)
            for row, cut in step.cut:
                line = f"note: over-long, loses {cut} tokens of its tail; fix: raise max_tokens, or leave it so"
                tqdm.write(f"{rows.where(row)}: {line}")
            for batch in step.batches:  # of one sample each
                pictures = int((batch.input_ids == IMAGE_TOKEN).sum()) // spec.image_tokens
                images[min(pictures, 2)] += 1
                lengths.append(len(batch.labels) + dict(step.cut).get(batch.rows[0], 0))
                supervised, kept = supervised + batch.supervised, kept + len(batch.labels)
            bad, cuts = bad + len(step.skipped), cuts + [cut for _, cut in step.cut]
            progress.update(len(step.skipped) + len(step.parts))
    kinds = f"{images[0]} text-only, {images[1]} with one image, {images[2]} with several"
    print(f"{rows.file}: {len(rows)} rows, {bad} bad; the good ones: {kinds}")
    if lengths:
        low, median, high = np.percentile(lengths, [0, 50, 100])
        print(f"  tokens: {low:.0f} shortest, {median:.0f} median, {high:.0f} longest; {spec.image_tokens} per image")
        print(histogram(lengths))
        print(f"  supervised: {100 * supervised / kept:.1f} % of {kept} tokens")
        print(f"  over-long: {len(cuts)} rows lose {sum(cuts)} tokens of their tails")
    return bad


def main(argv: list[str]):
    parser = config.parser(__doc__)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("recipe", nargs="*", help="recipe.toml [section.key=value ...]")
    parser.add_argument("--data", help="instead of a recipe: a .json or .jsonl file of rows")
    parser.add_argument("--images", default="", help="folder of the pictures; default: the rows' own")
    parser.add_argument("--tokenizer", default="", help="its folder; without one, tokens are bytes and nothing is cut")
    parser.add_argument("--template", default="phi")
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--max-tokens", type=int)
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.recipe):
        parser.error("name a recipe, or rows with --data")
    jobs = []  # (name, rows, spec): all are opened before any is read to the end
    if args.data:
        limit = args.max_tokens or (2048 if args.tokenizer else sys.maxsize)
        spec = make_spec(args.tokenizer, args.template, max_tokens=limit, image_tokens=args.image_tokens)
        name = args.data if args.tokenizer else f"{args.data}, in bytes (no --tokenizer)"
        jobs.append((name, Rows(args.data, args.images), spec))
    else:
        recipe, path = config.load(args.recipe, args.recipe[0])
        for name, stage in recipe.stage.items():
            if not stage.data:
                raise UserError(f"{path}:stage.{name}.data", "not set", "name a .json or .jsonl file of rows")
            spec = stage_spec(recipe.model, stage)
            jobs.append((f"stage {name}", Rows(stage.data, stage.images), spec))
            if stage.validation:
                jobs.append((f"stage {name}, validation", Rows(stage.validation, stage.images), spec))
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
