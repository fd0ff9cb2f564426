"""Kill training runs at random instants, and change their data in between in every third one.

    python -m tests.tools.random_kills RECIPE FOLDER [--count 30 --seed 0]

RECIPE is the tiny one of training_runs.py; its data are copied. Each run is a process of its own,
killed with SIGKILL after a random time: while it imports, starts, trains, saves or exports. It is
started and killed again until it ends by itself, killed at least once. Then it has either

    the bits of a run that was never killed, on the data as they are at the end; or
    ended with one line that names what changed, its checkpoints are whole, and with the old data
    the same command ends with the bits of a run on those.

`make test-full` runs it. A line for each run, then the counts.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from checkpoints import seal
from tests.tools.environment import ROOT

SHORT = ("train.save_every=2", "train.workers=1", "stage.finetune.steps=8")
CHANGED = ("pretrain.json", "finetune.json")


def start(recipe: str, out: Path, seconds: float = 0.0) -> tuple[int, str]:
    """Run train.py in `out`, for at most so many seconds; return its exit code and what it said."""
    command = [sys.executable, "train.py", recipe, f"train.output={out}", *SHORT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(f"{out}.txt", "w") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        try:
            process.wait(seconds or None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    return process.returncode, Path(f"{out}.txt").read_text()


def edit(world: Path, rng: random.Random) -> tuple[Path, bytes]:
    """Swap two rows of a random file, which keeps its size and date; return it, and its content."""
    file = world / rng.choice(CHANGED)
    before = file.read_bytes()
    dates = file.stat()
    rows = json.loads(before)
    i, j = rng.sample(range(len(rows)), 2)
    rows[i], rows[j] = rows[j], rows[i]
    file.write_text(json.dumps(rows))
    os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    return file, before


def check_refusal(text: str, out: Path, changed: Path):
    """Raise AssertionError unless a run has ended with one line that names the changed file."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text, text
    assert changed.name in errors[0] and "; fix: " in errors[0], text
    for path in seal.listed(out / "checkpoints"):
        seal.verify(path)


class Whole(NamedTuple):
    """The run that was never killed, on the data as they were."""

    weights: bytes
    seconds: float


def one(recipe: str, world: Path, out: Path, whole: Whole, rng: random.Random, change: bool) -> str:
    """Kill a run until it ends, and check how it ended. Return that in words.

    change: whether to change the data after the first kill.
    """
    kills = 0
    changed = None
    seconds = whole.seconds
    while True:
        code, text = start(recipe, out, rng.uniform(0.0, 1.2) * seconds)
        if code == -signal.SIGKILL:
            kills += 1
            if change and changed is None:
                changed, before = edit(world, rng)
        elif kills:
            break
        else:
            # It ended before the first kill, which tests nothing: again, and sooner.
            assert code == 0, text
            shutil.rmtree(out)
            seconds *= 0.7

    ending = "the same bits"
    wanted = [whole.weights]
    if code:
        check_refusal(text, out, changed)
        changed.write_bytes(before)
        code, text = start(recipe, out)
        assert code == 0, text
        ending = f"refused by name ({changed.name}), then the same bits"
    elif changed is not None:
        # It began anew with these data, or the change came after they were needed.
        fresh = out.with_name(f"{out.name}-fresh")
        code, text = start(recipe, fresh)
        assert code == 0, text
        wanted.append((fresh / "model.safetensors").read_bytes())
        shutil.rmtree(fresh)
        changed.write_bytes(before)

    got = (out / "model.safetensors").read_bytes()
    assert got in wanted, f"{out}: the weights are those of neither data"
    shutil.rmtree(out)
    return f"{kills} kills, {ending}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # The data are changed, so they are a copy. The recipe's paths are made to name it.
    text = Path(args.recipe).read_text()
    world = next(line for line in text.splitlines() if line.startswith("tokenizer"))
    world = Path(json.loads(world.partition("=")[2])).parent
    copy = args.folder / "copy"
    shutil.copytree(world, copy)
    recipe = args.folder / "copy.toml"
    recipe.write_text(text.replace(str(world), str(copy)))

    begin = time.perf_counter()
    code, said = start(str(recipe), args.folder / "timed")
    assert code == 0, said
    seconds = time.perf_counter() - begin
    whole = Whole((args.folder / "timed/model.safetensors").read_bytes(), seconds)

    endings = collections.Counter()
    for i in range(args.count):
        rng = random.Random(args.seed * 1000 + i)
        ending = one(str(recipe), copy, args.folder / str(i), whole, rng, change=i % 3 == 2)
        endings[ending.partition(", ")[2].partition(" (")[0]] += 1
        print(f"run {i}: {ending}", flush=True)
    print(f"{args.count} runs: {dict(endings)}", flush=True)


if __name__ == "__main__":
    main()
