"""Rename tables: from the names of tensors in a file to ours, and back.

    table = (("model.layers.*.attn.**", "blocks.*.self_attn.**"),)
    rename("model.layers.3.attn.q.weight", table)            # "blocks.3.self_attn.q.weight"
    rename("blocks.3.self_attn.q.weight", reverse(table))    # and back

A table is a sequence of pairs (theirs, ours). In a name `*` stands for one component between dots,
and `**` for one or more. What they stand for on the left is put in their places on the right.
Forwards, a table serves to load a checkpoint; reversed, to save one.

Where `ours` is a tuple of names, the file keeps those parameters as one tensor, stacked along
dimension 0: a fused qkv projection, for example.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

Names = str | tuple[str, ...]
Table = tuple[tuple[Names, Names], ...]

# What each wildcard stands for, as a regular expression.
WILDCARDS = {"**": r"(.+)", "*": r"([^.]+)"}

# Finds the wildcards of a pattern. The longer one comes first, so that `**` is not found as two.
WILDCARD = re.compile(r"(\*\*|\*)")


@cache
def compile_pattern(pattern: str) -> re.Pattern:
    """Return a regular expression that matches the same names, with a group for each wildcard."""
    expression = ""

    # A split at a group keeps what it splits at: "a.*.b" becomes "a.", "*" and ".b".
    for piece in WILDCARD.split(pattern):
        if piece in WILDCARDS:
            expression += WILDCARDS[piece]
        else:
            expression += re.escape(piece)
    return re.compile(expression)


def fill_pattern(pattern: str, values: Iterable[str]) -> str:
    """Return the pattern with the values in the places of its wildcards, from left to right."""
    remaining = iter(values)
    return WILDCARD.sub(lambda _: next(remaining), pattern)


def as_tuple(names: Names) -> tuple[str, ...]:
    """Return one name or several as a tuple."""
    if isinstance(names, str):
        return (names,)
    return names


def rename(key: str, table: Table) -> Names:
    """Return the new name of a key: that of the first pair whose left side matches.

    A key that no pair matches keeps its name. A tuple on the right gives a tuple of names. A tuple
    on the left matches with any of its names.
    """
    for left, right in table:
        for pattern in as_tuple(left):
            match = compile_pattern(pattern).fullmatch(key)
            if match is None:
                continue

            values = match.groups()
            if isinstance(right, str):
                return fill_pattern(right, values)
            return tuple(fill_pattern(name, values) for name in right)
    return key


def reverse(table: Table) -> Table:
    """Return the table that renames back."""
    back = []
    for theirs, ours in table:
        back.append((ours, theirs))
    return tuple(back)


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Say whether a key matches any of the patterns."""
    return any(compile_pattern(pattern).fullmatch(key) for pattern in patterns)
