"""How a run hears that it should stop: SIGTERM or SIGINT, while a step must not be interrupted.

    signals.hold()              # once, before the first step
    if signals.heard(): ...     # between two steps: the names of those that have come

torchrun sends SIGTERM to all ranks, a terminal's Ctrl-C sends SIGINT. train.py then saves.
"""

from __future__ import annotations

import signal

STOP = {signal.SIGTERM, signal.SIGINT}
CAN_BLOCK = hasattr(signal, "pthread_sigmask")  # not on Windows, where the handler must do
_delivered: list[str] = []  # names of the signals that the handler was called for


def hold():
    """Keep SIGTERM and SIGINT from ending this process from now on; `heard` tells of them.

    Blocked, a signal waits in the kernel as pending. Worker processes that the loader starts later
    inherit that. They need it: torchrun and terminals signal every process of a run, and a worker
    that died of it would take the step with it.

    Blocking holds for this thread and for threads that it starts later. A thread from before (of
    OpenMP, say) can still receive the signal. Python then runs the handler, which notes it.
    """
    # The handler comes first, because a thread from before may get a signal at any moment.
    for number in STOP:
        signal.signal(number, _note)
    if CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP)


def _note(number: int, _frame):
    """Note a signal that some thread has received, as Python calls a handler."""
    _delivered.append(signal.Signals(number).name)


def heard() -> list[str]:
    """Return the names of the signals that have come since `hold`, delivered or pending."""
    names = list(_delivered)
    if CAN_BLOCK:
        pending = signal.sigpending() & STOP
        names += [signal.Signals(number).name for number in pending]
    return names
