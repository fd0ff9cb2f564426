"""Running a grid: each run is train.py and then evaluate.py, as processes of their own.

    prepare(grid)                       # what the grid's data are made by
    run_all(grid, workers=2)

A run has a folder, OUTPUT/CELL/seed-N, which is train.output. What its processes said is beside it
in seed-N.txt, and why it failed in seed-N.error. A run that is finished is passed over; one that
was killed goes on where train.py and evaluate.py go on. So the same command ends what was begun.

Every process has as many CPU threads as the grid says, one unless it says more, however many runs
go on at once: sums depend on the number of threads, so the bits of a run would, too. With several
workers and several GPUs each worker has one GPU.

The laboratory may be killed without its processes. A training that is left behind holds its folder
(checkpoints/resume.py), so the next start waits for its end and then goes on.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO

import torch

import config
from checkpoints import seal
from checkpoints.files import write_file, writing
from config import UserError, printable
from laboratory.grid import Grid, Measure, Run

ROOT = Path(__file__).resolve().parents[1]


class Failed(Exception):
    """A process of a run has failed. Its text is one line."""


# ------------------------------------------------------------------------------ what there is


def answers_file(run: Run, measure: Measure, control: str) -> Path:
    """Return the file of the answers to a measure; the scores are beside it, as .json.

    control: "blank" or "".
    """
    folder = run.folder / "eval"
    if measure.name != measure.task:
        folder = run.folder / f"eval-{measure.name}"
    if control:
        return folder / f"{measure.task}-{control}.jsonl"
    return folder / f"{measure.task}.jsonl"


def controls(measure: Measure) -> list[str]:
    """Return how often a model is asked: "" is as it is, "blank" with blanked pictures."""
    if measure.blank:
        return ["", "blank"]
    return [""]


def is_measured(run: Run, measure: Measure, control: str) -> bool:
    """Say whether a run has the scores of a measure."""
    return answers_file(run, measure, control).with_suffix(".json").is_file()


def is_trained(grid: Grid, run: Run) -> bool:
    """Say whether the model of a run is there, and is certainly of its recipe."""
    if not (run.folder / "config.json").is_file():
        return False
    try:
        saved = (run.folder / "recipe.toml").read_text(encoding="utf-8")
        deciding, _ = config.differences(saved, grid.recipe_of(run))
    except (OSError, ValueError):
        return False
    return not deciding


def is_finished(grid: Grid, run: Run) -> bool:
    """Say whether nothing of a run is left to do."""
    if not is_trained(grid, run):
        return False
    for measure in grid.measures:
        for control in controls(measure):
            if not is_measured(run, measure, control):
                return False
    return True


def said_file(run: Run) -> Path:
    """Return the file of what the processes of a run said when it was last started."""
    return run.folder.with_name(f"{run.folder.name}.txt")


def error_file(run: Run) -> Path:
    """Return the file of why a run failed."""
    return run.folder.with_name(f"{run.folder.name}.error")


def error_of(run: Run) -> str:
    """Return why a run failed when it was last started, in one line; "" if it did not."""
    try:
        return printable(error_file(run).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return ""


# ---------------------------------------------------------------------------- the commands


def commands(grid: Grid, run: Run) -> Iterator[list[str]]:
    """Yield the command lines of a run, without those of what is finished."""
    if not is_trained(grid, run):
        yield ["train.py", *grid.arguments_of(run)]
    for measure in grid.measures:
        for control in controls(measure):
            if is_measured(run, measure, control):
                continue
            command = ["evaluate.py", "--model", str(run.folder), "--task", measure.task]
            command += ["--data", measure.data, *measure.arguments]
            if measure.name != measure.task:
                command += ["--out", str(answers_file(run, measure, control))]
            if control:
                command.append(f"--{control}")
            yield command


def print_commands(grid: Grid):
    """Print a line of shell for each run that is not finished, as an array job takes them."""
    for command in grid.prepare.values():
        print(f"# first: {command}")
    for run in grid.runs():
        parts = []
        for command in commands(grid, run):
            parts.append(f"OMP_NUM_THREADS={grid.threads} python {shlex.join(command)}")
        if parts:
            print(" && ".join(parts))
    print(f"# last: python lab.py {shlex.quote(str(grid.file))} --table")


def environment(threads: int, gpu: str = "") -> dict[str, str]:
    """Return the environment of a process: its threads, its GPU, and this Python as python."""
    variables = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        variables[name] = str(threads)
    if gpu:
        variables["CUDA_VISIBLE_DEVICES"] = gpu
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return variables


# -------------------------------------------------------------------------------- running


@contextlib.contextmanager
def alone(grid: Grid) -> Iterator[None]:
    """Hold the folder of a grid. Raises UserError if another laboratory has it."""
    with open(grid.output / ".lock", "a+") as file:
        try:
            seal.lock(file, wait=False)
        except (BlockingIOError, PermissionError):
            what = "another laboratory is at work there"
            raise UserError(grid.output, what, "wait for it, or name another output") from None
        yield


def prepare(grid: Grid):
    """Run the command of each file or folder that is absent. Raises UserError if one fails.

    While a command runs, a file NAME.unfinished is beside what it makes. If it is killed, the next
    start runs it again: train.py goes on then, and demo.world leaves nothing half made.
    """
    for name, command in grid.prepare.items():
        path = Path(name)
        unfinished = path.with_name(f"{path.name}.unfinished")
        if path.exists() and not unfinished.exists():
            continue

        print(f"prepares {name}: {command}", flush=True)
        with writing(path):
            write_file(unfinished, f"{command}\n")
        wait_for_orphan(path)
        code = subprocess.run(command, shell=True, env=environment(grid.threads)).returncode
        if code != 0 or not path.exists():
            what = f"not made by its command (exit code {code}): {command}"
            raise UserError(f"{grid.file}:prepare.{name}", what, "mend the command, or remove it")
        unfinished.unlink()


class Laboratory:
    """The runs of a grid under way."""

    def __init__(self, grid: Grid, workers: int):
        self.grid = grid
        self.workers = workers
        self.stops = threading.Event()  # no further process is started
        self.processes: set[subprocess.Popen] = set()
        self.gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
        for gpu in gpus_of_workers(workers):
            self.gpus.put(gpu)

    def run(self, todo: list[Run], done: int):
        """Do the runs, `workers` at once, and print a line for each. done: how many were before."""
        total = done + len(todo)
        begin = time.monotonic()
        with ThreadPoolExecutor(self.workers) as pool, self.stopping():
            futures = {pool.submit(self.one, run): run for run in todo}
            try:
                for count, future in enumerate(as_completed(futures), 1):
                    error = future.result()
                    seconds = time.monotonic() - begin
                    left = seconds / count * (len(todo) - count)
                    ended = error or "finished"
                    line = f"[{done + count}/{total}] {futures[future]}: {ended}"
                    print(f"{line}; {in_words(seconds)} so far, {in_words(left)} left", flush=True)
            except BaseException:
                self.stop()
                raise

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Hear SIGTERM as Ctrl-C: both end the processes, which save what they have."""

        def interrupt(signum, frame):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def stop(self):
        """Start nothing more, and tell the processes to end."""
        self.stops.set()
        for process in list(self.processes):
            process.terminate()

    def one(self, run: Run) -> str:
        """Do what is left of a run; return its one-line error, or ""."""
        gpu = self.gpus.get()
        try:
            with writing(run.folder):
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                said_file(run).write_text("")
                error_file(run).unlink(missing_ok=True)
            wait_for_orphan(run.folder)
            for command in commands(self.grid, run):
                self.call(command, run, environment(self.grid.threads, gpu))
            if not is_finished(self.grid, run):
                raise Failed("it stopped before its end; the same command goes on")
        except (Failed, UserError) as e:
            error = str(e)
            if not self.stops.is_set():
                write_file(error_file(run), error + "\n")
            return error
        finally:
            self.gpus.put(gpu)
        return ""

    def call(self, command: list[str], run: Run, variables: dict[str, str]):
        """Run a script of this project. Raises Failed if it does not end well."""
        if self.stops.is_set():
            raise Failed("stopped")
        with open(said_file(run), "ab") as said:
            process = launch(command, said, variables)
            self.processes.add(process)
            code = process.wait()
            self.processes.discard(process)
        if code != 0:
            raise Failed(why(said_file(run), command[0], code))


def launch(command: list[str], said: BinaryIO, variables: dict[str, str]) -> subprocess.Popen:
    """Start a script of this project; what it says goes to a file."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / command[0]), *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=subprocess.STDOUT,
        env=variables,
    )


def run_all(grid: Grid, workers: int):
    """Do every run of a grid that is not finished. A run that fails stops no other one."""
    todo = []
    done = 0
    for run in grid.runs():
        if is_finished(grid, run):
            done += 1
        else:
            todo.append(run)
    print(f"{grid.file}: {done + len(todo)} runs, {done} of them finished", flush=True)
    Laboratory(grid, workers).run(todo, done)


def gpus_of_workers(workers: int) -> list[str]:
    """Return for each worker the GPU that it has; "" where it sees what this process sees."""
    count = torch.cuda.device_count()
    if workers == 1 or count == 0:
        return [""] * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(visible) != count:
        visible = [str(i) for i in range(count)]
    return [visible[i % count] for i in range(workers)]


def wait_for_orphan(folder: Path):
    """Wait until no training holds a folder: one that a killed laboratory has left behind."""
    lock = folder / ".lock"
    if not lock.is_file():
        return
    with writing(folder), open(lock, "a+") as file:
        seal.lock(file, wait=True)


def why(said: Path, script: str, code: int) -> str:
    """Return in one line why a script has failed: what it said last, its error if there is one."""
    lines = said.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return printable(errors[-1])
    if code < 0:
        return f"{script} was ended by signal {-code}"
    return printable(f"{script}: {lines[-1] if lines else f'exit code {code}'}")


def in_words(seconds: float) -> str:
    """Return a time for a reader: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
