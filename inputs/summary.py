"""What `python data.py check` prints below the bad rows: how many there are, how read, how long.

    summary = Summary()
    summary.add_row(images=1, cut=0)
    summary.add_notes(7, ("read as conversations = messages", MARKS_FIRST), ("width",))
    summary.add_sample(tokens=700, kept=700, supervised=40)
    summary.add_bad(2)
    summary.print("rows.json", positions="576", where=rows.where)

It prints

    rows.json: 3 rows, 2 bad; the good ones: 0 text-only, 1 with one image or video, 0 with several
      1 row: read as conversations = messages
      1 row: no <image> mark, pictures stand first (first: rows.json:row 7)
      not read: width
      tokens: 700 shortest, 700 median, 700 longest; 576 per image
      ...a bar for each range of lengths
      supervised: 5.7 % of 700 tokens
      over-long: 0 rows lose 0 tokens of their tails
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from config import printable
from inputs.forms import READ_AS

BARS = 16  # at most
WIDTH = 40  # characters of the longest bar


class Summary:
    """Counts over a set of rows."""

    def __init__(self):
        self.bad = 0
        self.rows = 0  # that are good
        self.images = Counter()  # how many of them have 0, 1, and 2 or more pictures or videos
        self.over_long = 0  # of them that are cut
        self.cut = 0  # tokens that they lose
        self.notes = Counter()  # how many of them were read how (forms.Row.notes)
        self.first = {}  # the first row of each note
        self.unread = Counter()  # how many of them have a key that nothing reads
        self.lengths = []  # tokens of each sample, before it is cut
        self.kept = 0  # tokens of all samples, after they are cut
        self.supervised = 0  # of these

    def add_bad(self, count: int):
        """Count rows that make no sample."""
        self.bad += count

    def add_row(self, images: int, cut: int):
        """Count a good row with so many pictures or videos, which loses `cut` tokens."""
        self.rows += 1
        self.images[min(images, 2)] += 1
        if cut:
            self.over_long += 1
            self.cut += cut

    def add_sample(self, tokens: int, kept: int, supervised: int):
        """Count a sample of so many `tokens`, of which `kept` are left and `supervised` learned."""
        self.lengths.append(tokens)
        self.kept += kept
        self.supervised += supervised

    def add_notes(self, row: int, notes: tuple[str, ...], unread: tuple[str, ...]):
        """Count how a row was read, and its keys that nothing reads."""
        self.notes.update(notes)
        self.unread.update(unread)
        for note in notes:
            self.first.setdefault(note, row)

    def print(self, name: str, positions: str, where: Callable[[int], str]):
        """Print it all under the name of the rows.

        `positions` says how many tokens one picture takes; `where` says what messages call a row.
        """
        total = self.bad + self.rows
        text_only = f"{self.images[0]} text-only"
        one = f"{self.images[1]} with one image or video"
        several = f"{self.images[2]} with several"
        kinds = f"{text_only}, {one}, {several}"
        print(f"{name}: {total} rows, {self.bad} bad; the good ones: {kinds}")

        # Where no row is good, there are no lengths to speak of.
        if not self.rows:
            return

        samples = len(self.lengths)
        if samples > self.rows:
            why = "the chat template rewrites earlier turns"
            print(f"  {count_rows(self.rows)} became {samples} samples, one for each answer: {why}")
        self.print_notes(where)

        low, median, high = np.percentile(self.lengths, [0, 50, 100])
        lengths = f"{low:.0f} shortest, {median:.0f} median, {high:.0f} longest"
        print(f"  tokens: {lengths}; {positions} per image")
        print(histogram(self.lengths))

        share = 100 * self.supervised / self.kept
        print(f"  supervised: {share:.1f} % of {self.kept} tokens")
        print(f"  over-long: {self.over_long} rows lose {self.cut} tokens of their tails")

    def print_notes(self, where: Callable[[int], str]):
        """Print how rows were read, what is to be known of some, and which keys nothing reads."""
        common = self.notes.most_common()
        ways = [note for note, _ in common if note.startswith(READ_AS)]
        others = [note for note, _ in common if note not in ways]
        for note in ways:
            print(f"  {count_rows(self.notes[note])}: {note}")
        for note in others:
            first = printable(where(self.first[note]), 1000)
            print(f"  {count_rows(self.notes[note])}: {note} (first: {first})")

        if self.unread:
            keys = [printable(key, 60) for key, _ in self.unread.most_common(20)]
            more = len(self.unread) - len(keys)
            if more:
                keys.append(f"and {more} others")
            print(f"  not read: {', '.join(keys)}")


def count_rows(count: int) -> str:
    """Return "1 row", "2 rows"."""
    if count == 1:
        return "1 row"
    return f"{count} rows"


def histogram(lengths: list[int]) -> str:
    """Return one line for each range of lengths, its bar as long as the range has many.

    All ranges are of one size, a power of two, the smallest that needs at most BARS of them.
    """
    exponent = math.ceil(math.log2((max(lengths) + 1) / BARS))
    range_size = 1 << max(0, exponent)
    counts = Counter(length // range_size for length in lengths)
    most = max(counts.values())

    lines = []
    for number in range(min(counts), max(counts) + 1):
        count = counts[number]
        first = number * range_size
        last = first + range_size - 1
        lines.append(f"  {first:>7} – {last:<7} {bar(count / most)} {count}")
    return "\n".join(lines)


def bar(share: float) -> str:
    """Return a bar of this share of WIDTH, to an eighth of a character and rounded up."""
    whole, eighths = divmod(math.ceil(8 * WIDTH * share), 8)
    text = "█" * whole
    if eighths:
        text += "▏▎▍▌▋▊▉"[eighths - 1]
    return text
