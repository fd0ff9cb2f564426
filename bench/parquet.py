"""Parts of bench/data.py: a million rows in 200 parquet files, and rows decoded per second.

parquet   files of 20 columns, small pictures among them. A start is opening the files, what
          training/made_from.py looks at, the order and the first step.
decoded   rows to pixels and tokens through two workers, beside the library `datasets` on the same
          files. Both resize with the same code and make the same ids.
"""

from __future__ import annotations

import io
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from bench.common import median_and_range, verdict
from bench.rows import make_words

SHARDS = 200
GROUP = 500  # rows of a row group
PICTURE_GROUP = 100  # the same, where pictures are large: what `datasets` writes
WORKERS = 2
BATCH = 16
PHOTOGRAPHS = 4096  # rows
BUFFER = 1000  # examples that `datasets` shuffles when it streams, its default

# How `datasets` reads, and whose code resizes.
PEERS = {
    "datasets streaming, our resize": ("streaming", "same"),
    "datasets mapped, our resize": ("mapped", "same"),
    "datasets streaming, transformers'": ("streaming", "own"),
    "datasets mapped, transformers'": ("mapped", "own"),
}

# ---------------------------------------------------------------------- files


def write_many(folder: str, count: str):
    """Write `count` rows of 20 columns to SHARDS files."""
    import numpy as np
    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet

    noise = np.random.default_rng(0)
    pictures = []
    for _ in range(1024):
        stored = io.BytesIO()
        pixels = noise.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(stored, "JPEG")
        pictures.append(stored.getvalue())

    r = random.Random(0)
    words = make_words(r)
    texts = [" ".join(r.choices(words, k=r.randint(2, 30))) for _ in range(8192)]

    out = Path(folder, "many")
    out.mkdir()
    rows = int(count) // SHARDS
    for shard in range(SHARDS):
        names = [f"{shard:03d}-{i:06d}" for i in range(rows)]
        columns = {
            "image": pa.array(
                [{"bytes": r.choice(pictures), "path": f"{name}.jpg"} for name in names]
            ),
            "question": r.choices(texts, k=rows),
            "answer": r.choices(texts, k=rows),
            "id": names,
            "embedding": list(noise.standard_normal((rows, 16), np.float32)),
            "histogram": list(noise.integers(0, 99, (rows, 16))),
        }
        for k in range(5):
            columns[f"text_{k}"] = r.choices(texts, k=rows)
            columns[f"rating_{k}"] = noise.integers(0, 5, rows)
        for k in range(4):
            columns[f"score_{k}"] = noise.standard_normal(rows)
        table = pa.table(columns)
        parquet.write_table(table, out / f"{shard:03d}-of-{SHARDS}.parquet", row_group_size=GROUP)


def write_photographs(folder: str, count: str):
    """Write `count` rows of a picture of about 100 kB, a question and an answer, to four files."""
    import pyarrow as pa
    from pyarrow import parquet

    pictures = [path.read_bytes() for path in sorted(Path(folder, "images").glob("*.jpg"))]
    r = random.Random(0)
    words = make_words(r)

    out = Path(folder, "photographs")
    out.mkdir()
    for shard in range(4):
        rows = []
        for i in range(shard, int(count), 4):
            picture = {"bytes": pictures[i % len(pictures)], "path": f"{i}.jpg"}
            question = " ".join(r.choices(words, k=20))
            answer = " ".join(r.choices(words, k=60))
            rows.append({"image": picture, "question": question, "answer": answer})
        table = pa.Table.from_pylist(rows)
        parquet.write_table(table, out / f"{shard}.parquet", row_group_size=PICTURE_GROUP)


# ---------------------------------------------------------------------- a million rows


def start(folder: str):
    """Print the seconds of each part of a start."""
    from config import Stage, Train
    from data import Steps
    from inputs.rows import open_rows
    from training.made_from import contents_of_pictures, contents_of_rows

    seconds = {}
    begin = time.perf_counter()

    def mark(name: str):
        nonlocal begin
        now = time.perf_counter()
        seconds[name] = now - begin
        begin = now

    rows = open_rows(Path(folder, "many"))
    mark("open")
    contents_of_rows(rows)
    contents_of_pictures(rows)
    mark("made from")
    Steps(rows, spec_of_bench(), Stage(global_batch=BATCH, steps=1), Train())[0]
    mark("first step")
    print(json.dumps({"rows": len(rows), "seconds": seconds}))


def spec_of_bench():
    """Return how both libraries make samples: 384 x 384 pixels, a token a byte."""
    from data import make_spec
    from inputs.image_processor import ImageProcessor
    from inputs.tiling import Tiling

    tiling = Tiling(576, processor=ImageProcessor(384))
    return make_spec("", "phi", max_tokens=100_000, views=tiling)


def parquet_lines(found: dict) -> list[str]:
    lines = [
        f"{found['rows']} rows of 20 columns in {SHARDS} files, {found['bytes'] / 1e9:.2f} GB, "
        f"median (range) of {len(found['starts']['later'])} starts, seconds",
        f"{'':14}{'open':>22}{'made from':>22}{'first step':>22}",
    ]
    for name, starts in found["starts"].items():
        cells = []
        for part in ("open", "made from", "first step"):
            cells.append(f"{median_and_range([one[part] for one in starts], '.2f'):>22}")
        lines.append(f"{name + ' start':14}" + "".join(cells))

    worker = found["worker"]
    later = max(sum(one.values()) for one in found["starts"]["later"])
    return [
        *lines,
        f"a worker: {worker['rss_mb']:.0f} MB resident, {worker['pss_mb']:.0f} MB with shared "
        "pages divided",
        verdict("later start <= 10 s", later, later <= 10),
        verdict("<= 400 MB a worker", worker["rss_mb"], worker["rss_mb"] <= 400),
    ]


# ---------------------------------------------------------------------- rows decoded


def ours(folder: str) -> Iterator[int]:
    """Yield the rows of each batch as training gets them."""
    from config import Stage, Train
    from data import Steps, loader
    from inputs.rows import open_rows

    rows = open_rows(Path(folder, "photographs"))
    stage = Stage(global_batch=BATCH, steps=len(rows) // BATCH, micro_batch_tokens=0)
    steps = Steps(rows, spec_of_bench(), stage, Train())
    for step, _ in loader(steps, workers=WORKERS):
        yield sum(len(batch.rows) for batch in step.batches)


def theirs(folder: str, way: str, processor: str) -> Iterator[int]:
    """Yield the rows of each batch of `datasets`, streamed or mapped as its users do.

    Pictures are resized with our code ("same") or by transformers' processor ("own").
    """
    import datasets
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.data import DataLoader

    from bench.images import their_processor
    from inputs.forms import one_question
    from inputs.templates import encode

    datasets.disable_progress_bars()
    spec = spec_of_bench()
    resize = spec.views.processor.pixels
    if processor == "own":
        resize = their_processor(spec.views.processor)

    def make(row: dict) -> dict:
        turns = one_question("<image>\n" + row["question"], row["answer"])
        ids, labels = encode(turns, spec.tokenizer, spec.template)
        pixels = resize(row["image"].convert("RGB"))
        return {"pixels": pixels, "ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    def make_several(rows: dict) -> dict:
        made = []
        for values in zip(*rows.values(), strict=True):
            made.append(make(dict(zip(rows, values, strict=True))))
        return {key: [one[key] for one in made] for key in made[0]}

    def collate(rows: list[dict]) -> dict:
        return {key: pad_sequence([row[key] for row in rows], True) for key in rows[0]}

    files = sorted(map(str, Path(folder, "photographs").glob("*.parquet")))
    streams = way == "streaming"
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=streams, cache_dir=f"{folder}/cache"
    )
    loaded = loaded.cast_column("image", datasets.Image())
    options = {"batch_size": BATCH, "num_workers": WORKERS, "collate_fn": collate}
    if streams:
        columns = loaded.column_names
        loaded = loaded.shuffle(seed=0, buffer_size=BUFFER).map(make, remove_columns=columns)
    else:
        loaded = loaded.with_transform(make_several)
        options["shuffle"] = True
    for batch in DataLoader(loaded, multiprocessing_context="fork", **options):
        yield len(batch["ids"])


def decoded(folder: str, who: str, processor: str):
    """Print rows per second of one of the three, from the first batch on, and CPU time per row."""
    import torch

    from bench.images import cpu_seconds

    torch.set_num_threads(1)
    if who == "ours":
        batches = ours(folder)
    else:
        batches = theirs(folder, who, processor)

    # Until the first batch, packages are imported and workers started.
    first = next(batches)
    used = cpu_seconds()
    begin = time.perf_counter()
    rows = sum(batches)
    seconds = time.perf_counter() - begin

    # That of the workers is known when they have ended, and has the first batch in it.
    cpu_ms = 1000 * (cpu_seconds() - used) / (first + rows)
    print(json.dumps({"rows_per_s": rows / seconds, "cpu_ms": cpu_ms}))


def decoded_lines(found: dict) -> list[str]:
    count = len(found["ours"])
    lines = [
        f"640 x 480 JPEG to 384 x 384 pixels and ids, {WORKERS} workers; medians of {count} runs",
        f"{'':36}{'rows/s (range)':>22}{'CPU ms a row':>14}{'ours / this':>13}{'in CPU':>9}",
    ]
    speed = {}
    cpu = {}
    for name, runs in found.items():
        speed[name] = statistics.median(run["rows_per_s"] for run in runs)
        cpu[name] = statistics.median(run["cpu_ms"] for run in runs)
        spread = median_and_range([run["rows_per_s"] for run in runs], ".0f")
        line = f"{name:36}{spread:>22}{cpu[name]:14.1f}"
        if name != "ours":
            ratio = speed["ours"] / speed[name]
            line += f"{ratio:13.2f}{cpu[name] / cpu['ours']:9.2f}"
            line += f"  {verdict('>= 1.5 x', ratio, ratio >= 1.5)}"
        lines.append(line)
    return lines
