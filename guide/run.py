"""Run the blocks of the guide's chapters, and compare what they print with what stands there.

It also checks quotes of our code, names, pictures and links (check.py).

    python -m guide.run                  # every chapter, without the blocks that have a tag
    python -m guide.run 1 12             # chapters 1 and 12
    python -m guide.run 1 --tag demo     # with the blocks that need out/demo (make demo)
    python -m guide.run --all            # everything, as `make test-guide` does
    python -m guide.run 1 --write        # puts what they print into the chapter

blocks.py says how a chapter is written. The python blocks of a chapter run in one Python, the sh
blocks in bash, in order, in the repository's folder. A chapter keeps its files in out/guide/NN,
which is emptied before it runs.

--write touches an output only where it no longer holds. So one in which a line `...` stands for
others stays as it is.
"""

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import command_line
from config import UserError
from guide.blocks import GUIDE, ROOT, TAGS, Block, chapters, read_blocks, same_output
from guide.check import Problem, check_chapter

LIMIT = 900  # seconds that a command may take
NO_READER = 141  # what a command ends with whose reader went away, as `| head` does


class Done(NamedTuple):
    """What came of a block."""

    output: str
    error: str  # "" if it ended well


# ---------------------------------------------------------------------------------------- running


def environment() -> dict[str, str]:
    """Return the variables of a reader's shell in which the environment is active.

    One thread unless OMP_NUM_THREADS says otherwise: with models this small, threads only wait.
    """
    folder = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",
        "COLUMNS": "100",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONUNBUFFERED": "1",  # so that errors stand among the output where a terminal has them
    }


class Session:
    """The Python of a chapter. It starts with the first block."""

    def __init__(self):
        self.process = None

    def run(self, block: Block) -> Done:
        """Run a python block."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "guide.session"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment(),
            )
        request = {"name": block.chapter.name, "line": block.first + 1, "code": block.text}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            return Done("", f"its Python ended with {self.process.returncode}")
        return Done(**json.loads(answer))

    def close(self):
        """End it."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def run_command(block: Block) -> Done:
    """Run a sh block: what it prints and what it complains about, as a terminal shows them."""
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", block.text],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        timeout=LIMIT,
    )
    error = ""
    if done.returncode not in (0, NO_READER):
        error = f"it ended with {done.returncode}"
    return Done(done.stdout, error)


def judge(block: Block, done: Done) -> tuple[str, str]:
    """Return the output to compare, and what is wrong before any comparison, or ""."""
    if block.language == "sh":
        if "fails" in block.words:
            return done.output, "" if done.error else "it ended well and should have failed"
        if done.error:
            return done.output, f"{done.error}:\n{done.output}"
        return done.output, ""

    expected = block.options.get("raises")
    if not expected:
        return done.output, done.error

    # The last line of a traceback is the error itself.
    if not done.error:
        return done.output, f"it raised nothing and should raise {expected}"
    last = done.error.strip().splitlines()[-1]
    name = last.partition(":")[0]
    if name.rpartition(".")[2] != expected:
        return done.output, f"it should raise {expected}:\n{done.error}"
    return done.output + last + "\n", ""


def run_chapter(chapter: Path, tags: set[str], write: bool = False) -> list[Problem]:
    """Run the blocks of a chapter whose tags are among `tags`; return what is wrong.

    write: put new outputs into the chapter. A block that fails is a problem all the same.
    """
    shutil.rmtree(ROOT / "out" / "guide" / chapter.name[:2], ignore_errors=True)
    session = Session()
    problems = []
    outputs = []
    try:
        for block in read_blocks(chapter):
            if block.source or not block.tags <= tags:
                continue
            done = session.run(block) if block.language == "python" else run_command(block)
            output, wrong = judge(block, done)
            if wrong:
                problems.append(Problem(block.where, wrong))
                break  # what comes after it needs its names
            difference = compare(block, output)
            if difference and write:
                outputs.append((block, output))
            elif difference:
                problems.append(Problem(block.where, difference))
    finally:
        session.close()
    if outputs:
        write_outputs(chapter, outputs)
    return problems


def compare(block: Block, output: str) -> str:
    """Return how an output differs from the one that stands below the block, "" if it does not."""
    shown = ""
    tolerance = None
    if block.output is not None:
        shown = block.output.text
        for word in block.output.info:
            key, _, value = word.partition("=")
            if key == "tolerance":
                tolerance = float(value)
    if same_output(shown, output, tolerance):
        return ""
    lines = difflib.unified_diff(
        shown.splitlines(), output.splitlines(), "in the chapter", "printed", lineterm=""
    )
    return "it prints something else; --write takes it over\n" + "\n".join(lines)


def write_outputs(chapter: Path, outputs: list[tuple[Block, str]]):
    """Put outputs into a chapter, each below its block."""
    lines = chapter.read_text().splitlines()

    # From the end, so that the numbers of the lines before stay true.
    for block, output in reversed(outputs):
        first, last = block.last, block.last  # in `lines`: from where to where to replace
        info = "output"
        if block.output is not None:
            info = " ".join(block.output.info)
            first, last = block.output.first - 1, block.output.last
        text = [line.rstrip() for line in output.strip("\n").splitlines()]
        new = [f"```{info}", *text, "```"] if text else []
        if block.output is None and text:
            new = ["", *new]
        lines[first:last] = new
    chapter.write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------- command


def choose(names: list[str]) -> list[Path]:
    """Return the chapters that the command line names, by number or by name; all if it names none.

    Raise UserError for a chapter that does not exist.
    """
    if not names:
        return chapters()
    chosen = []
    for name in names:
        stem = Path(name).stem
        number = f"{int(stem):02d}-" if re.fullmatch(r"\d+", stem) else stem
        found = [chapter for chapter in chapters() if chapter.name.startswith(number)]
        if len(found) != 1:
            known = ", ".join(chapter.stem for chapter in chapters())
            raise UserError("command line", f"{name} is no chapter", f"use one of {known}")
        chosen += found
    return chosen


def main(argv: list[str]):
    parser = command_line.parser(__doc__)
    parser.prog = "-m guide.run"
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help="number or name")
    parser.add_argument("--write", action="store_true", help="put outputs into the chapters")
    parser.add_argument("--tag", action="append", default=[], choices=TAGS, help="run these, too")
    parser.add_argument("--all", action="store_true", help="run every block")
    options = parser.parse_args(argv)
    tags = set(TAGS) if options.all else set(options.tag)

    wrong = 0
    for chapter in choose(options.chapters):
        begun = time.monotonic()
        problems = check_chapter(chapter) + run_chapter(chapter, tags, options.write)
        seconds = time.monotonic() - begun
        print(f"{chapter.stem:<24} {seconds:5.1f} s  {'wrong' if problems else 'holds'}")
        for problem in problems:
            print(f"\n{problem}\n")
        wrong += len(problems)
    if wrong:
        fix = "mend what it says above"
        raise UserError(GUIDE.name, f"{wrong} things are not as the chapters say", fix)


if __name__ == "__main__":
    command_line.cli(main, __doc__)
