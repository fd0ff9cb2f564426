"""The Python in which the python blocks of one chapter run: `python -m guide.session`.

It reads a JSON object {"name", "line", "code"} a line from standard input, runs the code in a
namespace that stays, and answers with an object {"output", "error"} a line: what the code and the
programs that it started have printed, and the traceback, or "" if there was none.
"""

import json
import linecache
import os
import sys
import tempfile
import traceback
import types


def run_code(code: str, name: str, line: int, module: types.ModuleType) -> str:
    """Run a block in a module and return its traceback, or "".

    name, line: the chapter and the line of the block's first line, for the traceback.
    """
    # Triton and inspect read the source of a function from the line cache.
    file = f"<{name}:{line}>"
    padded = "\n" * (line - 1) + code
    linecache.cache[file] = (len(padded), None, padded.splitlines(keepends=True), file)
    try:
        exec(compile(padded, file, "exec"), vars(module))
    except Exception:
        kind, error, trace = sys.exc_info()
        return "".join(traceback.format_exception(kind, error, trace.tb_next))
    return ""


def main():
    """Answer until the input ends."""
    # What blocks print goes to a file, on the level of the descriptor: programs write to it, too.
    answers = os.fdopen(os.dup(1), "w")
    printed = tempfile.TemporaryFile("w+")
    os.dup2(printed.fileno(), 1)

    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = [""]
    for request in sys.stdin:
        asked = json.loads(request)
        os.ftruncate(1, 0)
        os.lseek(1, 0, os.SEEK_SET)
        error = run_code(asked["code"], asked["name"], asked["line"], module)
        sys.stdout.flush()
        printed.seek(0)
        answers.write(json.dumps({"output": printed.read(), "error": error}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
