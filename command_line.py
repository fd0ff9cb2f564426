"""The command line of every script, and how each of them ends.

    if __name__ == "__main__":
        cli(main, __doc__)

`cli` calls main with the words of the command line. A mistake of the user ends with one line,

    error: <file>:<row or key>: <what>; fix: <action>

which is also the last line under torchrun. `parser` and `within` are for a script's own options.
The second half is about what a terminal gets: any text prints in any encoding, and no text from
outside steers the terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import select
import subprocess
import sys
import typing
import unicodedata
from collections.abc import Callable
from pathlib import Path

from config import UserError, help_table, printable

# ---------------------------------------------------------------------------- a script, its options


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints in the one-line form."""

    def error(self, message: str):
        """End with one line, where argparse would also print the usage."""
        line = f"error: command line: {printable(message)}; fix: see python {self.prog} --help"
        sys.exit(line)


def parser(doc: str) -> Parser:
    """Return a parser for a script; `--help` prints its docstring as it stands."""
    return Parser(description=doc, formatter_class=argparse.RawTextHelpFormatter)


def within(kind: type, low: float, high: float) -> Callable[[str], float]:
    """Return the argparse type of a number from `low` to `high`; kind: int or float."""
    name = "a whole number" if kind is int else "a number"

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")  # in no range
        if not low <= value <= high:
            what = f"{printable(text, 40)} is not {name} from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(what)
        return value

    return read


def cli(
    main: Callable[[list[str]], object],
    doc: str,
    fields_help: bool = False,
    to_save_memory: str = "take a smaller model, picture or batch",
):
    """Run a script: call main with the command line; end with one line if the user made a mistake.

    The line goes to stderr, and the exit code is 1. The user's mistakes are

    - a ValueError or OSError that says its fix: a UserError, or what inputs/templates.py raises
    - an OSError of the user's world, as a full disk (OF_THE_WORLD)
    - too little memory, of which to_save_memory says what to do about it

    Any other exception is a mistake of ours and keeps its traceback. Ctrl-C ends with a line and
    130. A reader that goes away, as `| head`, ends it without a word.

    fields_help: answer --help here, with the docstring and every field of a recipe. Otherwise
    main's own parser answers it.
    """
    prepare_streams()
    argv = sys.argv[1:]
    asks_for_help = "-h" in argv or "--help" in argv
    line = ""
    try:
        if asks_for_help and fields_help:
            print(doc.strip() + "\n" + help_table())
        else:
            _check_utf8(argv)
            main(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        if _has_no_reader(e):
            sys.exit(141)  # as a shell says of a program that SIGPIPE has ended
        line = one_line(e, to_save_memory)
        if not line:
            raise
    finally:
        _flush()  # what was printed before stays above the error

    if line:
        _repeat_after_torchrun(line)
        sys.exit(line)


def _check_utf8(argv: list[str]):
    """Raise UserError for a word with bytes that are no text: no tokenizer and no file takes it."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError("command line", f"{word!r} is not UTF-8", "write it in UTF-8") from None


# What to do about an OSError that the program cannot help.
OF_THE_WORLD = {
    errno.ENOSPC: "make room there, or name another place",
    errno.EDQUOT: "make room there, or name another place",
    errno.EROFS: "name a place that can be written to",
    errno.EACCES: "allow it, or name another file or folder",
    errno.EPERM: "allow it, or name another file or folder",
    errno.ENOENT: "correct the name",
    errno.ENOTDIR: "name a folder where one is meant",
    errno.EISDIR: "name a file where one is meant",
    errno.EEXIST: "name another file or folder",
    errno.ENAMETOOLONG: "name it shorter",
    errno.ELOOP: "remove the circle of links",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the file system again",
    errno.EFBIG: "name a place that takes large files",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs, or raise the system's limit on open files",
}


def one_line(e: Exception, to_save_memory: str) -> str:
    """Return the line for an exception that the user can do something about; "" for any other."""
    if isinstance(e, UserError):
        return f"error: {e}"  # which is safe and short already
    if isinstance(e, (ValueError, OSError)) and "; fix: " in str(e):
        return f"error: {printable(e, 2000)}"

    if isinstance(e, OSError) and e.errno in OF_THE_WORLD:
        # An error while writing to an open file does not know the file's name.
        where = e.filename or "writing or reading a file"
        if e.filename is None and _flush_error(sys.stdout):
            where = "standard output"
        if e.filename is None and e.errno == errno.ENOENT:
            return ""
        return f"error: {UserError(where, e.strerror, OF_THE_WORLD[e.errno])}"

    # torch has an error of its own for a GPU. Of the CPU's memory it raises a RuntimeError.
    is_memory = isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError"
    if is_memory or "DefaultCPUAllocator: can't allocate memory" in str(e):
        what = str(e) or "too little for this"
        return f"error: {UserError('memory', printable(what, 200), to_save_memory)}"
    return ""


# ----------------------------------------------------------------------------- what a terminal gets


class Terminal:
    """A text stream to a terminal that shows what would steer the terminal, in place of obeying it.

    What a model says, and what rows hold, must not move the cursor or set a title. A line break
    and a tab stay, and the \\r in front of a progress line, which only the start of a text can be.
    Whoever colours a safe text writes it to `stream`.
    """

    def __init__(self, stream: typing.TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        shown = []
        for place, character in enumerate(text):
            is_meant = character in "\n\t" or (character == "\r" and place == 0)
            if is_meant or unicodedata.category(character) != "Cc":
                shown.append(character)
            else:
                shown.append(printable(character))
        self.stream.write("".join(shown))
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def prepare_streams():
    """Make the standard streams take any text, and a terminal obey none of it.

    A file or a pipe gets the true text. A character that the stream's encoding does not have
    (ASCII, in some locales; half a surrogate pair in any) becomes an escape.
    """
    # A program that was started without the stream, as by `>&-`.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")

    # Tests put streams of their own here, which have no such method.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # it has been read from
            sys.stdin.reconfigure(errors="replace")
    if sys.stdout.isatty() and not isinstance(sys.stdout, Terminal):
        sys.stdout = Terminal(sys.stdout)


def colours() -> typing.TextIO:
    """Return standard output as it is, for a text that is safe and has our own colours."""
    return getattr(sys.stdout, "stream", sys.stdout)


def _flush_error(stream: typing.TextIO) -> OSError | None:
    """Return why a stream cannot take what was printed to it; None if it can."""
    try:
        stream.flush()
    except OSError as e:
        return e
    return None


def _has_no_reader(e: Exception) -> bool:
    """Say whether an exception comes from a standard stream that nobody reads any more."""
    if not isinstance(e, BrokenPipeError):
        return False
    return _is_unread(sys.stdout) or _is_unread(sys.stderr)  # other pipes break, too


def _is_unread(stream: typing.TextIO) -> bool:
    """Say whether the other end of a standard stream is closed."""
    if not hasattr(select, "poll"):  # Windows
        return isinstance(_flush_error(stream), BrokenPipeError)
    asked = select.poll()
    asked.register(stream.fileno(), 0)
    return bool(asked.poll(0))  # it answers unasked only then


def _flush():
    """Flush what was printed; if that fails, let Python's own flush at its end say nothing."""
    for stream in (sys.stdout, sys.stderr):
        if _flush_error(stream):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())


# Waits for the end of the process that file descriptor argv[1] means, at most a minute.
AFTERWARDS = """
import select, sys
ended, _, _ = select.select([int(sys.argv[1])], [], [], 60)
if ended:
    print(sys.argv[2], file=sys.stderr)
"""


def _repeat_after_torchrun(line: str):
    """Under torchrun, print the line once more when torchrun has ended.

    For a rank that fails, torchrun prints thirty lines of its own, as its last act: its traceback,
    and a table that quotes the message in the file TORCHELASTIC_ERROR_FILE. Nothing that a rank
    prints can come after that, so a small process stays behind. Of several ranks that fail only
    the first does this.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file or not hasattr(os, "pidfd_open"):
        return

    # torchrun makes a folder for each rank, side by side, and removes them.
    of_all_ranks = Path(error_file).parent.parent
    try:
        os.mkdir(of_all_ranks / "has_said_why")
        launcher = os.pidfd_open(os.getppid())
    except OSError:
        return  # another rank was first, or there is no torchrun any more
    with open(error_file, "w") as f:
        json.dump({"message": line}, f)
    subprocess.Popen(
        [sys.executable, "-S", "-c", AFTERWARDS, str(launcher), line],
        stdin=subprocess.DEVNULL,
        pass_fds=[launcher],
        start_new_session=True,  # torchrun stops what is in the session of its ranks
    )
