"""The process in which programs from outside run: chat templates and the rules of tokenizers.

bounded.py starts it as a script. It imports nothing of the project. A request is a line of JSON on
standard input, and so is the reply on standard output:

    {"job": "render", "source": Jinja, "names": {name: value}, "conversations": [messages, ...],
     "wanted": [[k, n, prompt], ...]}
        {"texts": [...]}        of the first n messages of conversation k, with or without the
                                beginning of an answer, for each that is wanted
        {"refused": why}        the template, or its language, refuses one
        {"not_jinja": why}
    {"job": "split", "tokenizer": the text of a tokenizer.json, "samples": [text, ...]}
    {"job": "pieces", "model": a tokenizer.model in base64, "samples": [text, ...]}
        {}                      its rules work on every sample
        {"refused": why}
    {"over": "memory" | "output"}   a reply of all: the request needs more than it may have

A rendering or a sample that takes too long ends the process by the signal SIGPROF. The clock counts
the time that this process computes, so a busy machine, or one that sleeps, breaks nothing.
"""

import base64
import datetime
import faulthandler
import functools
import json
import os
import re
import signal
import sys

MOST_IN_ALL = 2**28  # characters of one reply


class OverLimit(Exception):
    """What was made is longer than it may be."""


class Budget:
    """What the parts of a request may take: seconds for each part, characters for each and all."""

    def __init__(self, seconds: float, most: int):
        self.seconds = seconds
        self.most = most
        self.left = MOST_IN_ALL

    def begin(self):
        """Give the next part its time."""
        start_clock(self.seconds)

    def take(self, text: str):
        """Raise OverLimit if a text that was made is too long, or all of them are."""
        self.left -= len(text)
        if len(text) > self.most or self.left < 0:
            raise OverLimit


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
        budget = Budget(limits["seconds"], limits["factor"] * len(line) + limits["spare"])
        budget.begin()
        reply = answer(json.loads(line), budget)
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


def answer(request: dict, budget: Budget) -> dict:
    """Return the reply to a request."""
    try:
        if request["job"] == "render":
            return render(request, budget)
        if request["job"] == "pieces":
            return encode_pieces(request["model"], request["samples"], budget)
        return split(request["tokenizer"], request["samples"], budget)
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


def render(request: dict, budget: Budget) -> dict:
    """Return what a chat template makes of each conversation that is wanted."""
    try:
        template = compile_jinja(request["source"])
    except MemoryError:
        raise
    except Exception as error:  # Jinja's own, or Python's about the code that Jinja makes of it
        return {"not_jinja": describe(error)}

    texts = []
    for k, n, prompt in request["wanted"]:
        messages = request["conversations"][k][:n]
        names = request["names"] | {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        budget.begin()
        text = template.render(names)
        budget.take(text)
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


def split(content: str, samples: list[str], budget: Budget) -> dict:
    """Normalize, split and join each sample by the rules of a tokenizer."""
    import tokenizers

    model = tokenizers.Tokenizer.from_str(content)
    for text in samples:
        budget.begin()
        if model.normalizer is not None:
            text = model.normalizer.normalize_str(text)
        budget.take(text)

        pieces = [text]
        if model.pre_tokenizer is not None:
            pieces = [piece for piece, _ in model.pre_tokenizer.pre_tokenize_str(text)]
        budget.take("".join(pieces))
        if model.decoder is not None:
            budget.take(model.decoder.decode(pieces))
    return {}


def encode_pieces(content: str, samples: list[str], budget: Budget) -> dict:
    """Normalize and encode each sample with a SentencePiece vocabulary."""
    import sentencepiece

    proto = base64.b64decode(content)
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    for text in samples:
        budget.begin()
        budget.take(model.normalize(text))
        model.encode_as_offset_mapping(text)
    return {}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
