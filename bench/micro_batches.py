"""A part of bench/data.py: how full packing makes micro-batches, and how balanced ranks."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

from bench.common import verdict

BUDGET = 8192  # tokens of a micro-batch
IMAGE_TOKENS = 576
MAX_TOKENS = 2048  # of a sample
SYSTEM_TOKENS = 35


def sample_lengths(folder: str) -> list[int]:
    """Return about the tokens of the first rows in the order of training."""
    from data import Order
    from inputs.rows import open_rows

    opened = open_rows(Path(folder, "rows.json"))
    order = Order(len(opened), 0)
    lengths = []
    for k in range(min(len(opened), 32768)):
        _, number = order(k)
        row = opened[number]
        characters = sum(len(turn["value"]) for turn in row["conversations"])
        tokens = SYSTEM_TOKENS + characters // 4
        if "image" in row:
            tokens += IMAGE_TOKENS
        lengths.append(min(MAX_TOKENS, tokens))
    return lengths


def pack(lengths: list[int], batch: int, ranks: int) -> dict[str, float]:
    """Return fill and balance of steps of `batch` samples, each way, and the milliseconds taken."""
    from packing import bin_pack, split_by_tokens

    steps = [lengths[i : i + batch] for i in range(0, len(lengths) - batch + 1, batch)]
    micro_batches = {"dealt": 0, "shared": 0, "possible": 0}
    most = {"dealt": 0, "shared": 0}  # tokens of the fullest rank, summed over the steps
    seconds = 0.0
    for step in steps:
        ways = {
            "dealt": [range(batch)[rank::ranks] for rank in range(ranks)],
            "shared": split_by_tokens(step, ranks),
        }
        for way, parts in ways.items():
            start = time.perf_counter()
            for part in parts:
                micro_batches[way] += len(bin_pack([step[j] for j in part], BUDGET))
            seconds += time.perf_counter() - start
            most[way] += max(sum(step[j] for j in part) for part in parts)

        # Rounded up.
        micro_batches["possible"] += ranks * -(-sum(step) // (BUDGET * ranks))

    total = sum(map(sum, steps))
    found = {}
    for way, count in micro_batches.items():
        found[f"fill {way}"] = total / (count * BUDGET)
    for way, tokens in most.items():
        found[f"balance {way}"] = total / (ranks * tokens)
    found["ms"] = 1000 * seconds / 2 / len(steps)  # of one of the two ways
    return found


def packing(folder: str):
    """Print how full and how balanced steps are, by their samples and ranks."""
    lengths = sample_lengths(folder)
    cases = {}
    for batch, ranks in ((128, 1), (256, 1), (512, 1), (128, 8), (256, 8)):
        cases[f"{batch} samples, {ranks} ranks"] = pack(lengths, batch, ranks)
    tokens = {
        "rows": len(lengths),
        "mean": statistics.fmean(lengths),
        "longest": max(lengths),
    }
    print(json.dumps({"tokens": tokens, "cases": cases}))


def packing_lines(found: dict) -> list[str]:
    tokens = found["tokens"]
    cases = found["cases"]
    names = [name for name in next(iter(cases.values())) if name != "ms"]
    lines = [
        f"{BUDGET} tokens; {tokens['rows']} rows of {tokens['mean']:.0f} on average, "
        f"{tokens['longest']} at most",
        f"{'':21}" + "".join(f"{name:>16}" for name in names) + f"{'ms a step':>11}",
    ]
    for case, values in cases.items():
        shares = "".join(f"{values[name]:16.1%}" for name in names)
        lines.append(f"{case:21}{shares}{values['ms']:11.1f}")
    for case in ("128 samples, 1 ranks", "256 samples, 1 ranks"):
        fill = cases[case]["fill dealt"]
        lines.append(verdict(f"fill >= 97 %, {case}", fill, fill >= 0.97))
    return lines
