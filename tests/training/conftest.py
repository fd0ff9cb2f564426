"""Fixtures of several files here."""

from tests.tools.stopped_runs import killed_once, stopped  # noqa: F401
