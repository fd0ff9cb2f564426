"""Data at scale: the index of a large JSON file, full micro-batches, pictures/s, parquet files.

    python bench/data.py                                    # all; 6 GB in a temporary folder
    python bench/data.py --rows 20000 --repeats 1           # a small one, to try the script
    python bench/data.py --only images --json out/data.json # other parts keep what the file has

Rows and pictures are made up (rows.py).

index     seconds and peak memory of json.load and of this code's Rows, each in a fresh process and
          less what the imports took. Rows are opened for the first time (the file is scanned) and
          again (the index is mapped). Then the memory of a loader's worker that makes steps.
packing   fill is tokens / (micro-batches x budget). Balance is the mean of the ranks' tokens in a
          step / the most that one has. `dealt` gives a rank every n-th sample, `shared` shares by
          token counts. `possible` is the fewest micro-batches that could hold a step's tokens, the
          same number on each rank, if samples could be cut anywhere.
images    JPEG files to batches of normalized pixels (images.py), in the main process and through a
          DataLoader, beside transformers' processor (its Pillow version). Both must give the same
          pixels.
parquet   the same rows as 200 files of 20 columns (parquet.py): seconds of a start, first and
          later, and the memory of a worker.
decoded   rows/s from parquet to pixels and ids, beside the library `datasets` (parquet.py).

Targets: first start <= 60 s, later <= 2 s, <= 300 MB a worker; fill >= 97 %; >= 1.5 x the
processor's pictures/s; of parquet, later start <= 10 s, <= 400 MB a worker, >= 1.5 x the rows/s of
`datasets`.

The file in order: for each part what its own process does, then its table; at last the command.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
from bench.common import (  # noqa: E402
    installed,
    median_and_range,
    name_versions,
    run_child,
    verdict,
    write_json,
)
from bench.images import images, images_lines  # noqa: E402
from bench.micro_batches import IMAGE_TOKENS, packing, packing_lines  # noqa: E402
from bench.parquet import (  # noqa: E402
    PEERS,
    PHOTOGRAPHS,
    decoded,
    decoded_lines,
    parquet_lines,
    start,
    write_many,
    write_photographs,
)
from bench.rows import write  # noqa: E402


def child(*arguments: object) -> dict:
    """Run one function of CHILDREN in a process of its own; return what it prints."""
    return run_child(__file__, *arguments)


# ---------------------------------------------------------------------- index


def measure(load: Callable):
    """Time `load()`; print one line of JSON with it and the peak memory above the imports."""
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = load()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_mb": (peak - imports) / 1024, "rows": len(result)}))


def json_load(folder: str):
    """Read the rows as a script without an index would."""
    with open(Path(folder, "rows.json")) as file:
        measure(lambda: json.load(file))


def rows(folder: str):
    """Open the rows and read a hundred of them."""
    from inputs.rows import open_rows

    def load():
        opened = open_rows(Path(folder, "rows.json"))
        for i in range(0, len(opened), max(1, len(opened) // 100)):
            opened[i]
        return opened

    measure(load)


def memory_of(pid: int) -> dict[str, float]:
    """Return the MB of a process: resident, and with shared pages divided among the sharers."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kib = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return {"rss_mb": int(kib["Rss"]) / 1024, "pss_mb": int(kib["Pss"]) / 1024}


def workers(folder: str, name: str):
    """Print the most memory that one of two workers has while they make 60 steps of 16 rows."""
    import multiprocessing

    from config import Stage, Train
    from data import Steps, loader, make_spec
    from inputs.image_processor import ImageProcessor
    from inputs.rows import open_rows
    from inputs.tiling import Tiling

    tiling = Tiling(IMAGE_TOKENS, processor=ImageProcessor(336, 336))
    spec = make_spec("", "phi", max_tokens=100_000, views=tiling)
    opened = open_rows(Path(folder, name))
    steps = Steps(opened, spec, Stage(global_batch=16, steps=60), Train())

    worst = {"rss_mb": 0.0}
    for _ in loader(steps, workers=2):
        for process in multiprocessing.active_children():
            now = memory_of(process.pid)
            if now["rss_mb"] > worst["rss_mb"]:
                worst = now
    print(json.dumps(worst))


def index_part(folder: Path, repeats: int) -> dict:
    """Return every run of each way to open the rows, and the memory of a worker."""
    file = folder / "rows.json"
    runs = {"json.load": [], "first start": [], "later start": []}
    for _ in range(repeats):
        runs["json.load"].append(child("json_load", folder))
        Path(f"{file}.index").unlink(missing_ok=True)
        runs["first start"].append(child("rows", folder))
        runs["later start"].append(child("rows", folder))
    return {
        "bytes": file.stat().st_size,
        "runs": runs,
        "worker": child("workers", folder, file.name),
    }


def index_lines(found: dict) -> list[str]:
    runs = found["runs"]
    one, *_ = runs["json.load"]
    count = len(runs["json.load"])
    lines = [
        f"{one['rows']} rows, {found['bytes'] / 1e9:.2f} GB, median (range) of {count} runs",
        f"{'':14}{'seconds':>22}{'most MB above imports':>22}",
    ]
    for name, results in runs.items():
        seconds = median_and_range([r["seconds"] for r in results], ".2f")
        peak = max(r["peak_mb"] for r in results)
        lines.append(f"{name:14}{seconds:>22}{peak:22.0f}")

    resident = found["worker"]["rss_mb"]
    divided = found["worker"]["pss_mb"]
    first = max(r["seconds"] for r in runs["first start"])
    later = max(r["seconds"] for r in runs["later start"])
    return [
        *lines,
        f"a worker: {resident:.0f} MB resident, {divided:.0f} MB with shared pages divided",
        verdict("first start <= 60 s", first, first <= 60),
        verdict("later <= 2 s", later, later <= 2),
        verdict("<= 300 MB a worker", resident, resident <= 300),
    ]


# ---------------------------------------------------------------------- packing


def packing_part(folder: Path, repeats: int) -> dict:
    return child("packing", folder)


# ---------------------------------------------------------------------- images


def images_part(folder: Path, repeats: int) -> dict:
    """Return every run of both, by kind and workers. Raise RuntimeError if the pixels differ."""
    results = {}
    for kind in ("clip", "siglip"):
        for processes in (0, 2):
            runs = {"ours": [], "theirs": []}
            for _ in range(repeats):
                for who in runs:
                    runs[who].append(child("images", folder, who, kind, processes))

            sums = [run["checksum"] for some in runs.values() for run in some]
            if max(sums) - min(sums) > 1e-7 * sum(map(abs, sums)):
                raise RuntimeError(f"not the same pixels: {runs}")
            results[f"{kind}, {processes} workers"] = runs
    return results


# ---------------------------------------------------------------------- parquet


def parquet_part(folder: Path, repeats: int) -> dict:
    """Return the parts of each start of a million rows in parquet, and the memory of a worker."""
    many = folder / "many"
    starts = {"first": [], "later": []}
    for _ in range(repeats):
        for index in many.glob("*.index"):
            index.unlink()
        for name in starts:
            one = child("start", folder)
            starts[name].append(one["seconds"])
    return {
        "rows": one["rows"],
        "bytes": sum(file.stat().st_size for file in many.glob("*.parquet")),
        "starts": starts,
        "worker": child("workers", folder, many.name),
    }


def decoded_part(folder: Path, repeats: int) -> dict:
    """Return rows/s of every run of this code and of `datasets`, in turn."""
    runs = {"ours": [], **{name: [] for name in PEERS}}
    for _ in range(repeats):
        runs["ours"].append(child("decoded", folder, "ours", ""))
        for name, (way, processor) in PEERS.items():
            runs[name].append(child("decoded", folder, way, processor))
    return runs


# ---------------------------------------------------------------------- the command

CHILDREN = {
    "write": write,
    "write_many": write_many,
    "write_photographs": write_photographs,
    "start": start,
    "decoded": decoded,
    "json_load": json_load,
    "rows": rows,
    "workers": workers,
    "packing": packing,
    "images": images,
}
# Each part: what measures it, and what makes lines of that.
PARTS = {
    "index": (index_part, index_lines),
    "packing": (packing_part, packing_lines),
    "images": (images_part, images_lines),
    "parquet": (parquet_part, parquet_lines),
    "decoded": (decoded_part, decoded_lines),
}


def table(result: dict) -> str:
    """Return what was measured of each part that the result has."""
    blocks = []
    for name, (_, lines_of) in PARTS.items():
        if name in result:
            part = result[name]
            facts = ", ".join([part["date"], *name_versions(part["versions"])])
            lines = [f"{name}: {facts}", *lines_of(part["results"])]
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main(argv: list[str]):
    if argv[:1] == ["--child"]:
        task, *arguments = argv[1:]
        return CHILDREN[task](*arguments)

    parser = command_line.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--repeats", type=int, default=3, help="of each: medians count, of pictures/s the best"
    )
    parser.add_argument(
        "--only", choices=PARTS, help="one of the parts; the others keep what FILE has of them"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every run's numbers to this file"
    )
    args = parser.parse_args(argv)
    if args.rows < 1024 or args.repeats < 1:
        parser.error("--rows start at 1024, --repeats at 1")

    result = {}
    if args.json and args.json.exists():
        result = json.loads(args.json.read_text())
    facts = {
        "date": datetime.date.today().isoformat(),
        "versions": installed("torch", "pillow", "transformers", "pyarrow", "datasets"),
    }
    names = [args.only] if args.only else list(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        reads_json = "index" in names or "packing" in names
        child("write", folder, args.rows if reads_json else 1024)
        if "parquet" in names:
            child("write_many", folder, args.rows)
        if "decoded" in names:
            child("write_photographs", folder, min(args.rows, PHOTOGRAPHS))

        for name in names:
            measure_part, _ = PARTS[name]
            result[name] = {**facts, "results": measure_part(Path(folder), args.repeats)}
            print(table({name: result[name]}), flush=True)
            if args.json:
                write_json(args.json, result)


if __name__ == "__main__":
    command_line.cli(main, __doc__)
