"""Data at scale: the index of a large JSON file, how full packing makes micro-batches, and pictures per second.

    python bench/data.py                                       # all three; writes about 1.6 GB to a temporary folder
    python bench/data.py --rows 20000 --repeats 1              # a small one, to try the script
    python bench/data.py --only images --json out/data.json    # the other parts keep what the file has of them

index     rows shaped like LLaVA-665k's, as one JSON list: seconds and peak memory of json.load and of Rows, the first
          time (the index is scanned) and later (it is mapped), each in a fresh process without what the imports took;
          then the resident memory of each worker of a loader that makes steps of these rows.
packing   fill: tokens / (micro-batches x budget). balance: a rank's mean tokens of a step / the most that one has.
          `dealt` gives a rank every world-th sample, `shared` shares by token counts. `possible`: the fewest
          micro-batches that could hold a step's tokens, as many on each rank, if samples could be cut anywhere.
images    JPEG files to batches of normalised pixels in the main process, through a DataLoader with as many workers for
          both: this code beside transformers' processor (its Pillow version), the same pixels.

Targets: first start <= 60 s, later <= 2 s, <= 300 MB a worker; fill >= 97 %; >= 1.5 x the processor's pictures/s.
"""

from __future__ import annotations

import datetime
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from config import UserError  # noqa: E402

# What LLaVA-665k is made of, about: thousands of rows, pictures, questions in a row, words of a question, of an answer.
SOURCES = [
    (40, 0, 4, 40, 160), (58, 1, 4, 11, 28), (77, 1, 1, 13, 115), (23, 1, 1, 9, 100), (83, 1, 5, 15, 1),
    (72, 1, 12, 17, 1), (80, 1, 5, 12, 4), (75, 1, 1, 40, 1), (22, 1, 1, 40, 12), (48, 1, 7, 14, 6), (86, 1, 10, 14, 7),
]  # fmt: skip
SIZES = [
    (640, 480),
    (480, 640),
    (640, 427),
    (640, 640),
    (500, 375),
    (640, 425),
]  # of COCO's most frequent ones
BUDGET, IMAGE_TOKENS, MAX_TOKENS, SYSTEM = 8192, 576, 2048, 35
PICTURES = 192


def conversation(r: random.Random, words: list[str]) -> list[dict]:
    _, images, turns, asked, said = r.choices(SOURCES, [s[0] for s in SOURCES])[0]
    made = []
    for _turn in range(max(1, round(r.expovariate(1 / turns)) if turns > 1 else 1)):
        for speaker, n in (("human", asked), ("gpt", said)):
            text = " ".join(r.choices(words, k=max(1, round(r.lognormvariate(0, 0.4) * n))))
            made.append({"from": speaker, "value": "<image>\n" * (images and not made) + text})
    return made


def write(folder: str, count: str):
    """rows.json with that many rows, and the pictures that they name."""
    import numpy as np
    from PIL import Image

    r, noise = random.Random(0), np.random.default_rng(0)
    words = [
        "".join(r.choices("etaoinshrdlucmf", k=min(12, 1 + round(r.expovariate(0.25)))))
        for _ in range(3000)
    ]
    words += [
        '"quoted"',
        "line\nbreak",
        "caf\u00e9",
        "\u56fe\u7247",
        "[brackets]",
        "{braces}",
        "\\",
    ]
    texts = [conversation(r, words) for _ in range(8192)]
    pool = [("<image>" in t[0]["value"], json.dumps(t)) for t in texts]
    Path(folder, "images").mkdir()
    for i in range(PICTURES):
        w, h = SIZES[i % len(SIZES)]
        coarse = Image.fromarray(noise.integers(0, 255, (h // 8, w // 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((w, h), Image.Resampling.BICUBIC), np.int16)
        fine = np.clip(smooth + noise.integers(-12, 12, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(fine).save(Path(folder, "images", f"{i:012d}.jpg"), quality=90)
    with open(Path(folder, "rows.json"), "w") as f:
        for i in range(int(count)):
            image, text = pool[r.randrange(len(pool))]
            name = f'"image": "images/{i % PICTURES:012d}.jpg", ' if image else ""
            f.write(f'{", " if i else "["}{{"id": "{i:012d}", {name}"conversations": {text}}}')
        f.write("]")


def measure(load):
    """Time `load()`; print one line of JSON with it and the peak memory above the imports."""
    imports, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    result = load()
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_mb": (peak - imports) / 1024, "rows": len(result)}))


def json_load(folder: str):
    with open(Path(folder, "rows.json")) as f:
        measure(lambda: json.load(f))


def rows(folder: str):
    from inputs.rows import open_rows

    def load():
        made = open_rows(Path(folder, "rows.json"))
        for i in range(0, len(made), max(1, len(made) // 100)):
            made[i]
        return made

    measure(load)


def resident(pid: int) -> dict[str, float]:
    """MB of a process: resident, and with what it shares divided among those that share it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kb = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return {"rss_mb": int(kb["Rss"]) / 1024, "pss_mb": int(kb["Pss"]) / 1024}


def workers(folder: str):
    """The memory of two workers after they made 60 steps of 16 rows."""
    import multiprocessing

    from config import Stage, Train
    from data import Steps, loader, make_spec
    from inputs.image_processor import ImageProcessor
    from inputs.rows import open_rows
    from inputs.tiling import Tiling

    views = Tiling(IMAGE_TOKENS, processor=ImageProcessor(336, 336))
    spec = make_spec("", "phi", max_tokens=100_000, views=views)
    steps, worst = (
        Steps(
            open_rows(Path(folder, "rows.json")), spec, Stage(global_batch=16, steps=60), Train()
        ),
        {},
    )
    for _ in loader(steps, workers=2):
        for child in multiprocessing.active_children():
            now = resident(child.pid)
            worst = now if now["rss_mb"] > worst.get("rss_mb", 0) else worst
    print(json.dumps(worst))


def packing(folder: str):
    """How full and how balanced, by (samples of a step, ranks), over rows in the order of training."""
    from data import Order
    from inputs.rows import open_rows
    from packing import bin_pack, split_by_tokens

    found = open_rows(Path(folder, "rows.json"))
    order, lengths = Order(len(found), 0), []
    for k in range(min(len(found), 32768)):
        row = found[order(k)[1]]
        text = sum(len(turn["value"]) for turn in row["conversations"])
        lengths.append(min(MAX_TOKENS, SYSTEM + text // 4 + IMAGE_TOKENS * ("image" in row)))
    cases, tokens = (
        {},
        {"rows": len(lengths), "mean": statistics.fmean(lengths), "longest": max(lengths)},
    )
    for batch, world in ((128, 1), (256, 1), (512, 1), (128, 8), (256, 8)):
        used, most, seconds = (
            dict.fromkeys(("dealt", "shared", "possible"), 0),
            dict.fromkeys(("dealt", "shared"), 0),
            0,
        )
        steps = [lengths[i : i + batch] for i in range(0, len(lengths) - batch + 1, batch)]
        for step in steps:
            dealt = [range(batch)[r::world] for r in range(world)]
            for name, parts in (("dealt", dealt), ("shared", split_by_tokens(step, world))):
                start = time.perf_counter()
                used[name] += sum(len(bin_pack([step[j] for j in part], BUDGET)) for part in parts)
                seconds += time.perf_counter() - start
                most[name] += max(sum(step[j] for j in part) for part in parts)
            used["possible"] += world * -(-sum(step) // (BUDGET * world))
        total = sum(map(sum, steps))
        fills = {f"fill {name}": total / (n * BUDGET) for name, n in used.items()}
        balance = {f"balance {name}": total / (world * n) for name, n in most.items()}
        cases[f"{batch} samples, {world} ranks"] = (
            fills | balance | {"ms": 500 * seconds / len(steps)}
        )
    print(json.dumps({"tokens": tokens, "cases": cases}))


def images(folder: str, who: str, kind: str, processes: str):
    """Pictures per second, and a sum over all pixels: of `ours` or `theirs`, of a CLIP-336 or a SigLIP-384."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader

    from inputs.image_processor import ImageProcessor
    from inputs.pictures import load_image

    torch.set_num_threads(1)
    clip = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
    transform = ImageProcessor(336, 336, **clip) if kind == "clip" else ImageProcessor(384)
    if who == "theirs":
        import transformers

        name = "CLIPImageProcessor" if kind == "clip" else "SiglipImageProcessor"
        cls = getattr(transformers, f"{name}Pil", None) or getattr(
            transformers, name
        )  # the latter: transformers 4
        processor = cls(
            **{k: v for k, v in transform.to_hf().items() if k != "image_processor_type"}
        )

        def make(file):
            return processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"][
                0
            ]
    else:
        pixels = getattr(transform, "pixels", transform)  # uint8 where the transform is split

        def make(file):
            return pixels(load_image(file))

    files = sorted(Path(folder, "images").glob("*.jpg")) * 2

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, i):
            return make(files[i])

    def cpu() -> float:
        return sum(
            sum(resource.getrusage(who)[:2])
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )

    checksum, used, start = 0.0, cpu(), time.perf_counter()
    fork = (
        "fork" if int(processes) else None
    )  # what is defined here could not be sent to a spawned worker
    load = DataLoader(Files(), 16, num_workers=int(processes), multiprocessing_context=fork)
    for batch in load:
        batch = transform.normalise(batch) if batch.dtype == torch.uint8 else batch
        checksum += batch[:, :, ::7, ::7].sum(dtype=torch.float64).item()
    result = {"images_per_s": len(files) / (time.perf_counter() - start), "checksum": checksum}
    print(json.dumps(result | {"cpu_ms": 1000 * (cpu() - used) / len(files)}))


PARTS = {f.__name__: f for f in (write, json_load, rows, workers, packing, images)}


def child(*arguments: object) -> dict:
    """Run one function of this file in a process of its own; what it prints."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No module named 'transformers'" in done.stderr:
        raise UserError("bench/data.py", "the peer transformers is missing", 'pip install ".[dev]"')
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def verdict(what: str, value: float, good: bool) -> str:
    return f"target {what}: {'met' if good else 'MISSED'} ({value:.3g})"


def index_part(folder: Path, repeats: int) -> dict:
    file = folder / "rows.json"
    runs = {"json.load": [], "first start": [], "later start": []}
    for _ in range(repeats):
        runs["json.load"].append(child("json_load", folder))
        Path(f"{file}.index").unlink(missing_ok=True)
        runs["first start"].append(child("rows", folder))
        runs["later start"].append(child("rows", folder))
    return {"bytes": file.stat().st_size, "runs": runs, "worker": child("workers", folder)}


def index_lines(found: dict) -> list[str]:
    runs, memory = found["runs"], found["worker"]
    some = runs["json.load"]
    lines = [f"{some[0]['rows']} rows, {found['bytes'] / 1e9:.2f} GB, median (range) of {len(some)} runs",
             f"{'':14}{'seconds':>22}{'most MB above imports':>22}"]  # fmt: skip
    for name, results in runs.items():
        seconds, peak = ([r[k] for r in results] for k in ("seconds", "peak_mb"))
        spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        lines.append(f"{name:14}{spread:>22}{max(peak):22.0f}")
    lines.append(
        f"a worker: {memory['rss_mb']:.0f} MB resident, {memory['pss_mb']:.0f} MB with shared pages divided"
    )
    first, later = (max(r["seconds"] for r in runs[k]) for k in ("first start", "later start"))
    lines += [
        verdict("first start <= 60 s", first, first <= 60),
        verdict("later <= 2 s", later, later <= 2),
    ]
    return [*lines, verdict("<= 300 MB a worker", memory["rss_mb"], memory["rss_mb"] <= 300)]


def packing_part(folder: Path, repeats: int) -> dict:
    return child("packing", folder)


def packing_lines(found: dict) -> list[str]:
    tokens, cases = found["tokens"], found["cases"]
    names = [name for name in next(iter(cases.values())) if name != "ms"]
    lines = [f"{BUDGET} tokens; {tokens['rows']} rows of {tokens['mean']:.0f} on average, {tokens['longest']} at most",
             f"{'':21}" + "".join(f"{name:>16}" for name in names) + f"{'ms a step':>11}"]  # fmt: skip
    for name, values in cases.items():
        shares = "".join(f"{values[k]:16.1%}" for k in names)
        lines.append(f"{name:21}{shares}{values['ms']:11.1f}")
    for name in ("128 samples, 1 ranks", "256 samples, 1 ranks"):
        value = cases[name]["fill dealt"]
        lines.append(verdict(f"fill >= 97 %, {name}", value, value >= 0.97))
    return lines


def images_part(folder: Path, repeats: int) -> dict:
    results: dict = {}
    for kind in ("clip", "siglip"):
        for processes in (0, 2):
            runs = {"ours": [], "theirs": []}
            for _ in range(repeats):
                for who in runs:
                    runs[who].append(child("images", folder, who, kind, processes))
            sums = [r["checksum"] for rs in runs.values() for r in rs]
            if max(sums) - min(sums) > 1e-7 * sum(map(abs, sums)):
                raise RuntimeError(f"not the same pixels: {runs}")
            results[f"{kind}, {processes} workers"] = runs
    return results


def images_lines(found: dict) -> list[str]:
    lines = [f"JPEG files to pixels, best of {len(next(iter(found.values()))['ours'])} runs",
             f"{'':19}{'ours/s':>8}{'theirs/s':>10}{'CPU ms, ours':>14}{'theirs':>8}{'theirs / ours':>15}"]  # fmt: skip
    for name, runs in found.items():
        ours, theirs = (max(r["images_per_s"] for r in runs[who]) for who in ("ours", "theirs"))
        mine, other = (min(r["cpu_ms"] for r in runs[who]) for who in ("ours", "theirs"))
        good = verdict(">= 1.5 x", ours / theirs, ours >= 1.5 * theirs)
        lines.append(
            f"{name:19}{ours:8.0f}{theirs:10.0f}{mine:14.1f}{other:8.1f}{other / mine:15.2f}  {good}"
        )
    return lines


KNOWN = {"index": (index_part, index_lines), "packing": (packing_part, packing_lines),
         "images": (images_part, images_lines)}  # fmt: skip


def table(result: dict) -> str:
    """The parts that there are."""
    blocks = []
    for name in (name for name in KNOWN if name in result):
        part = result[name]
        told = [part["date"], *(f"{k} {v}" for k, v in part["versions"].items() if v)]
        blocks.append("\n".join([f"{name}: {', '.join(told)}", *KNOWN[name][1](part["results"])]))
    return "\n\n".join(blocks)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in ("torch", "pillow", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def main(argv: list[str]):
    if argv[:1] == ["--child"]:
        return PARTS[argv[1]](*argv[2:])
    parser = config.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="runs of each: medians are printed, of pictures/s the best",
    )
    parser.add_argument(
        "--only", choices=KNOWN, help="one of the parts; the others keep what FILE has of them"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every run's numbers to this file"
    )
    args = parser.parse_args(argv)
    if min(args.rows // 1024, args.repeats) < 1:
        parser.error("--rows start at 1024, --repeats at 1")
    found = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    made, facts = {}, {"date": datetime.date.today().isoformat(), "versions": versions()}
    # This process stays small and imports no torch: a child's peak starts at its parent's.
    with tempfile.TemporaryDirectory() as folder:
        child("write", folder, args.rows if args.only != "images" else 1024)
        for name in [args.only] if args.only else KNOWN:
            made[name] = facts | {"results": KNOWN[name][0](Path(folder), args.repeats)}
            print(table({name: made[name]}), flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(found | made, indent=1) + "\n")


if __name__ == "__main__":
    config.cli(main, __doc__)
