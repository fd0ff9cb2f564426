"""Rename tables: from the names in a file to ours, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

Names = str | tuple[str, ...]

Table = tuple[tuple[Names, Names], ...]  # (theirs, ours), see the docstring above


@cache
def _pattern(glob: str) -> re.Pattern:
    parts = re.split(r"(\*\*|\*)", glob)
    return re.compile("".join({"**": "(.+)", "*": r"([^.]+)"}.get(p, re.escape(p)) for p in parts))


def _fill(glob: str, parts: Iterable[str]) -> str:
    parts = iter(parts)
    return re.sub(r"\*\*|\*", lambda _: next(parts), glob)


def rename(key: str, table: Table) -> Names:
    """The first pair whose left side matches decides; a key that none matches keeps its name.

    A tuple on the right gives a tuple of names; of a tuple on the left, any name matches.
    """
    for left, right in table:
        for glob in (left,) if isinstance(left, str) else left:
            if match := _pattern(glob).fullmatch(key):
                parts = match.groups()
                return (
                    _fill(right, parts)
                    if isinstance(right, str)
                    else tuple(_fill(r, parts) for r in right)
                )
    return key


def reverse(table: Table) -> Table:
    return tuple((ours, theirs) for theirs, ours in table)


def matches(key: str, globs: Iterable[str]) -> bool:
    return any(_pattern(g).fullmatch(key) for g in globs)
