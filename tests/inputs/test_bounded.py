"""bounded.py: chat templates that loop, grow or crash end their own process and are named.

python -m pytest tests/inputs/test_bounded.py
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from config import UserError
from inputs import bounded, templates
from inputs.templates import byte_tokenizer, encode
from inputs.tokenizer import JsonTokenizer
from tests.tools.environment import ROOT
from tests.tools.vocabularies import turns

CHATML = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SQUARE = "{% set n = namespace(s='aa') %}{% for i in range(9) %}{% set n.s = "


def chat(template):
    """A byte tokenizer with that chat template."""
    files = byte_tokenizer().files | {"chat_template.jinja": template.encode()}
    return JsonTokenizer(files)


def is_alive(pid):
    """Whether a process is there and has not ended."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "template, why",
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "computes for more than 2 seconds",
        ),
        ("{{ 9 ** (9 ** 9) }}", "computes for more than 2 seconds"),
        (
            "{% macro m(x) %}{% if x %}{{ m(x - 1) + m(x - 1) }}{% endif %}{% endmacro %}"
            "{{ m(60) }}",
            "computes for more than 2 seconds",
        ),
        ("{{ 'a' * 10**10 }}", "more than 1 GB of memory"),
        ("{{ [messages[0].content] * 10**10 }}", "more than 1 GB of memory"),
        ("{{ '%9999999999d' | format(1) }}", "more than 1 GB of memory"),
        ("{{ 'a' | center(10**10) }}", "more than 1 GB of memory"),
        (SQUARE + "n.s.join(n.s) %}{% endfor %}{{ n.s | length }}", "more than 1 GB of memory"),
        ("{{ messages[0].content * 10**7 }}", "64 times as much text as it gets"),
        ("{{ lipsum(n=9999) }}", "64 times as much text as it gets"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "is not Jinja: too many"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "is not Jinja"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses them: .*recursion"),
    ],
)
def test_a_template_without_an_end_is_named(template, why):
    with pytest.raises(UserError, match=f"chat template .*{why}.*; fix: "):
        encode(turns("Hi", "Yo"), chat(template), "chat")

    # The next template gets a process that works.
    assert encode(turns("Hi", "Yo"), chat(CHATML), "chat")[0]


def test_a_template_is_given_up_once():
    """Rows that come later do not wait for the limit again, whichever template is used between."""
    hangs_later = CHATML + (
        "{% if messages[0].content == 'hang' %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    )
    tok = chat(hangs_later)
    assert encode(turns("Hi", "Yo"), tok, "chat")[0]
    for _ in range(2):
        with pytest.raises(UserError, match="computes for more than 2 seconds"):
            encode(turns("hang", "Yo"), tok, "chat")
    child = bounded._child.process
    with pytest.raises(UserError, match="computes for more than 2 seconds"):
        encode(turns("Hi", "Yo"), tok, "chat")
    assert bounded._child.process is child  # none was asked


def test_a_child_that_was_ended_is_started_again():
    """A signal to all processes of a job is not the template's fault."""
    tok = chat(CHATML)
    expected = encode(turns("Hi", "Yo"), tok, "chat")
    for number in (signal.SIGTERM, signal.SIGKILL):
        bounded._child.process.send_signal(number)
        bounded._child.process.wait()
        assert encode(turns("Hi", "Yo"), tok, "chat") == expected


def test_ctrl_c_during_a_rendering_leaves_no_reply_behind(monkeypatch):
    tok = chat(CHATML)
    expected = encode(turns("Hi", "Yo"), tok, "chat")

    class Interrupted:
        """A pipe whose reader is interrupted once."""

        def readline(self):
            raise KeyboardInterrupt

    process = bounded._child.process
    monkeypatch.setattr(process, "communicate", lambda: process.wait())
    monkeypatch.setattr(process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        encode(turns("Other", "row"), tok, "chat")
    assert encode(turns("Hi", "Yo"), tok, "chat") == expected


def _encode_in_fork(queue):
    ids, _ = encode(turns("Hi", "Yo"), chat(CHATML), "chat")
    queue.put((ids, bounded._child.process.pid))


def test_a_fork_has_a_child_of_its_own():
    """As torch's data workers: two processes on one pipe would read each other's replies."""
    ids, _ = encode(turns("Hi", "Yo"), chat(CHATML), "chat")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_encode_in_fork, args=(queue,))
    worker.start()
    found, pid = queue.get(timeout=60)
    worker.join()
    assert found == ids and pid != bounded._child.process.pid
    assert encode(turns("Hi", "Yo"), chat(CHATML), "chat")[0] == ids


def test_the_child_ends_with_its_parent():
    code = (
        "from tests.inputs.test_bounded import CHATML, chat, encode, turns, bounded\n"
        "encode(turns('Hi', 'Yo'), chat(CHATML), 'chat')\n"
        "import os, signal\n"
        "print(bounded._child.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(done.stdout)
    for _ in range(600):
        if not is_alive(pid):
            break
        time.sleep(0.05)
    assert not is_alive(pid)


def test_many_turns_are_no_overrun():
    """The prompts of a long row are together much longer than the row."""
    conversation = turns(*["Who is it, and why?", "A dog, as it barks."] * 300)
    ids, labels = encode(conversation, chat(CHATML), "chat")
    assert len(ids) == len(labels) > 300 * 40


def test_long_runs_of_space_are_fast():
    """To look for the end of a text from each of its spaces would take minutes."""
    question = "a" + " " * 60_000 + "b"
    form = templates.choose_template("chat", chat(CHATML))
    text, answers, _ = templates.render(turns(question, "Yo  "), form)
    assert text == f"user: {question}<|im_end|>assistant: Yo  <|im_end|>"
    assert text[slice(*answers[0])] == "Yo  <|im_end|>"


def test_the_environment_of_the_child(monkeypatch):
    """Signals that this process ignores or blocks end the child all the same."""
    monkeypatch.setattr(bounded, "_child", bounded.Child())
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    try:
        with pytest.raises(UserError, match="computes for more than 2 seconds"):
            encode(turns("Hi", "Yo"), chat("{{ 8 ** (9 ** 9) }}"), "chat")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGPROF, before)
    assert os.getpid() == bounded._child.owner
