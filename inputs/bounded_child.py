"""The process in which programs from outside run: chat templates and the rules of tokenizers.

bounded.py starts it as a script. It imports nothing of the project. A request is a line of JSON on
standard input, and so is the reply on standard output:

    {"job": "render", "source": Jinja, "conversations": [{name: value}, ...]}
        {"texts": [...]}        the template's text of each conversation
        {"refused": why}        the template, or its language, refuses one
        {"not_jinja": why}
    {"job": "split", "tokenizer": the text of a tokenizer.json, "samples": [text, ...]}
        {}                      its rules work on every sample
        {"refused": why}
    {"over": "memory" | "output"}   a reply of both: the request needs more than it may have

A request that takes too long ends the process by the signal SIGPROF. The clock counts the time that
this process computes, so a busy machine, or one that sleeps, breaks nothing.
"""

import datetime
import faulthandler
import functools
import json
import os
import re
import signal
import sys


class OverLimit(Exception):
    """What was made is longer than it may be."""


def main(limits: dict):
    """Answer requests until standard input ends. limits: bounded.py's, and where packages are."""
    sys.path[:] = limits["path"]

    # Nothing else may write between the replies, nor what a library prints when it panics.
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    limit_memory(limits["memory"])
    for line in sys.stdin.buffer:
        start_clock(limits["seconds"])
        most = limits["factor"] * len(line) + limits["spare"]
        reply = answer(json.loads(line), most)
        stop_clock()
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def limit_memory(memory: int):
    """Let this process have `memory` bytes of addresses, where the system can limit them."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard != resource.RLIM_INFINITY:
            memory = min(memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # Windows has none, and macOS takes not every value
        pass


def start_clock(seconds: float):
    """End this process once it has computed for so long."""
    if not hasattr(signal, "setitimer"):
        # Windows: so long by the clock on the wall.
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
        return

    # Whoever started this process may have left the signal ignored or blocked.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    signal.setitimer(signal.ITIMER_PROF, seconds)


def stop_clock():
    """Undo `start_clock`."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, 0)
    else:
        faulthandler.cancel_dump_traceback_later()


def answer(request: dict, most: int) -> dict:
    """Return the reply to a request. most: how many characters may come of it in all."""
    try:
        if request["job"] == "render":
            return render(request["source"], request["conversations"], most)
        return split(request["tokenizer"], request["samples"], most)
    except MemoryError:
        return {"over": "memory"}
    except OverLimit:
        return {"over": "output"}
    except BaseException as error:  # what a template raises; a library's panic is no Exception
        return {"refused": describe(error)}


def describe(error: BaseException) -> str:
    """Return what an error says, or its name, on one line."""
    return " ".join(str(error)[:1000].split()) or type(error).__name__


# --------------------------------------------------------------------------------- chat templates


def render(source: str, conversations: list[dict], most: int) -> dict:
    """Return what a chat template makes of each conversation."""
    try:
        template = compile_jinja(source)
    except MemoryError:
        raise
    except Exception as error:  # Jinja's own, or Python's about the code that Jinja makes of it
        return {"not_jinja": describe(error)}

    texts = []
    for names in conversations:
        text = template.render(names)
        most -= len(text)
        if most < 0:
            raise OverLimit
        texts.append(text)
    return {"texts": texts}


@functools.lru_cache(4)
def compile_jinja(source: str):
    """Return a template, to `render` in a sandbox with the names that transformers gives it."""
    import jinja2.sandbox

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    # {% generation %} around an answer is transformers' own tag, which Jinja does not know. Here
    # it becomes {% if true %}, which writes what is inside.
    source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # Jinja's own tojson escapes HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)


# ------------------------------------------------------------------------------ rules of tokenizers


def split(content: str, samples: list[str], most: int) -> dict:
    """Normalize, split and join each sample by the rules of a tokenizer."""
    import tokenizers

    model = tokenizers.Tokenizer.from_str(content)
    for text in samples:
        if model.normalizer is not None:
            text = model.normalizer.normalize_str(text)
        most -= len(text)
        if most < 0:
            raise OverLimit

        pieces = [text]
        if model.pre_tokenizer is not None:
            pieces = [piece for piece, _ in model.pre_tokenizer.pre_tokenize_str(text)]
        if model.decoder is not None:
            pieces.append(model.decoder.decode(pieces))
        most -= sum(map(len, pieces))
        if most < 0:
            raise OverLimit
    return {}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
