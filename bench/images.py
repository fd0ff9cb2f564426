"""A part of bench/data.py: pictures per second, beside transformers' image processor."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

from bench.common import verdict


def their_processor(processor) -> Callable:
    """Return transformers' processor of the same options, as a function of a picture in RGB."""
    import transformers

    options = processor.to_hf()
    name = options.pop("image_processor_type")
    if hasattr(transformers, f"{name}Pil"):  # transformers 5; 4 has one processor of each kind
        name = f"{name}Pil"
    theirs = getattr(transformers, name)(**options)

    return lambda image: theirs(image, return_tensors="pt")["pixel_values"][0]


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has ended."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def images(folder: str, who: str, kind: str, processes: str):
    """Print pictures per second and a sum over pixels, of a CLIP-336 or a SigLIP-384."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader

    from inputs.image_processor import ImageProcessor
    from inputs.pictures import load_image

    torch.set_num_threads(1)
    if kind == "clip":
        mean = (0.48145466, 0.4578275, 0.40821073)
        std = (0.26862954, 0.26130258, 0.27577711)
        processor = ImageProcessor(336, 336, mean=mean, std=std)
    else:
        processor = ImageProcessor(384)
    if who == "theirs":
        theirs = their_processor(processor)

        def load(file: Path):
            return theirs(Image.open(file).convert("RGB"))
    else:

        def load(file: Path):
            return processor.pixels(load_image(file))

    files = sorted(Path(folder, "images").glob("*.jpg")) * 2

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, i):
            return load(files[i])

    # What is defined here could not be sent to a spawned worker.
    count = int(processes)
    context = "fork" if count else None
    loader = DataLoader(Files(), 16, num_workers=count, multiprocessing_context=context)

    checksum = 0.0
    used = cpu_seconds()
    start = time.perf_counter()
    for batch in loader:
        if batch.dtype == torch.uint8:  # ours: a batch is normalized as a whole, after the workers
            batch = processor.normalise(batch)
        checksum += batch[:, :, ::7, ::7].sum(dtype=torch.float64).item()
    seconds = time.perf_counter() - start
    result = {
        "images_per_s": len(files) / seconds,
        "checksum": checksum,
        "cpu_ms": 1000 * (cpu_seconds() - used) / len(files),
    }
    print(json.dumps(result))


def images_lines(found: dict) -> list[str]:
    first = next(iter(found.values()))
    lines = [
        f"JPEG files to pixels, best of {len(first['ours'])} runs",
        f"{'':19}{'ours/s':>8}{'theirs/s':>10}{'CPU ms, ours':>14}{'theirs':>8}"
        f"{'theirs / ours':>15}",
    ]
    for name, runs in found.items():
        ours = max(run["images_per_s"] for run in runs["ours"])
        theirs = max(run["images_per_s"] for run in runs["theirs"])
        cpu_ours = min(run["cpu_ms"] for run in runs["ours"])
        cpu_theirs = min(run["cpu_ms"] for run in runs["theirs"])
        good = verdict(">= 1.5 x", ours / theirs, ours >= 1.5 * theirs)
        lines.append(
            f"{name:19}{ours:8.0f}{theirs:10.0f}{cpu_ours:14.1f}{cpu_theirs:8.1f}"
            f"{cpu_theirs / cpu_ours:15.2f}  {good}"
        )
    return lines
