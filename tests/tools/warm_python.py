"""A Python that has imported what is slow to import, and runs each script in a fork of itself.

Importing torch takes longer than most runs in the tests do. tests/tools/environment.py starts this
program once and writes it one job a line. A job is code and the processes to run it in:

    {"code": "print(1)", "argv": ["train.py"], "processes": [{"env": {}, "out": FILE, "err": FILE}]}

The answer to each job is one line, the exit codes of its processes. Nothing of the project is
imported here: a script that runs in a fork finds the modules that a fresh Python would import. Nor
is tokenizers, of which transformers 4 wants its own version.
"""

import faulthandler
import gc
import json
import os
import sys

import PIL.Image  # noqa: F401
import safetensors.torch  # noqa: F401
import sentencepiece  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import torch.utils.data  # noqa: F401

# What is imported by now stays. A collection in a fork need not look through it, which would copy
# the memory page by page. Triton, imported below, complains at the end where it is not collected.
gc.collect()
gc.freeze()

import torch._dynamo  # noqa: E402, F401, every optimizer imports it
import triton.language  # noqa: E402, F401


def fork(processes: list[dict]) -> dict | None:
    """Start the processes of a job. Return the own one in each of them, and None here."""
    children = []
    for process in processes:
        child = os.fork()
        if child == 0:
            return process
        children.append(child)

    codes = []
    for child in children:
        _, status = os.waitpid(child, 0)
        codes.append(os.waitstatus_to_exitcode(status))
    print(json.dumps(codes), flush=True)
    return None


def redirect(process: dict):
    """Give this process its environment, no input, and its files for output and errors."""
    os.environ.clear()
    os.environ.update(process["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(process["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(os.open(process["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)


def main():
    for line in sys.stdin:
        job = json.loads(line)
        process = fork(job["processes"])
        if process is not None:
            redirect(process)
            faulthandler.enable()  # a crash in native code then says where Python was
            sys.argv = job["argv"]
            sys.path[0] = os.getcwd()
            exec(job["code"], {"__name__": "__main__"})
            return


if __name__ == "__main__":
    main()
