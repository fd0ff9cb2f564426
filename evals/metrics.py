"""How an answer is compared with the true ones: what it earns, 0 to 1.

    exact(" Red.", ["red"])                         # 1.0
    f1("a big red ball", ["the red ball"])          # 0.8
    anls("barelava", ["barellava", "lava"])         # 0.89

Where several answers are true, the best of them counts. METRICS has those that
`evaluate.py --task rows --metric` takes, and what each says of itself. `relaxed` is ChartQA's.
`choose` finds the metric for a list of true answers.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from evals.pope import yes_or_no

# ANLS: an answer that is less like the truth than this earns nothing.
LEAST_LIKENESS = 0.5

# ChartQA: a number may be off by this share of the true one.
TOLERANCE = 0.05

# `choose`: a set of answers has at most so many, each of so many words, on average given twice.
MOST_ANSWERS = 100
MOST_WORDS = 5

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()

# Digits, or the same with commas between thousands; then decimals.
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
NUMBER = re.compile(rf"(?<![\w.])[-+]?(?:{DIGITS}(?:\.\d+)?|\.\d+)")
NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(NUMBER_WORDS)})\b")


# ------------------------------------------------------------------------------------- the metrics


def exact(answer: str, truths: Sequence[str]) -> float:
    """Return 1 for an answer that is a true one, but for case, space and a final period; else 0."""
    return float(plain(answer) in [plain(truth) for truth in truths])


def contains(answer: str, truths: Sequence[str]) -> float:
    """Return 1 for an answer in which a true one stands as whole words, in any case; else 0."""
    text = plain(answer)
    for truth in truths:
        words = re.escape(plain(truth))
        if words and re.search(rf"(?<!\w){words}(?!\w)", text):
            return 1.0
    return 0.0


def f1(answer: str, truths: Sequence[str]) -> float:
    """Return the F1 of the words that answer and truth share, as SQuAD 2.0's script has it.

    Case, punctuation and articles do not count (Rajpurkar et al., 2018).
    """
    said = squad_words(answer)
    best = 0.0
    for truth in truths:
        true = squad_words(truth)
        if not said or not true:
            best = max(best, float(said == true))
            continue
        common = (Counter(said) & Counter(true)).total()
        if common:
            precision = common / len(said)
            recall = common / len(true)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def anls(answer: str, truths: Sequence[str]) -> float:
    """Return the normalised Levenshtein similarity, 0 below LEAST_LIKENESS (Biten et al., 2019).

    As DocVQA's script has it: case does not count, and several spaces are one. The trap: the
    distance is divided by the length before that is done, so spaces too many help.
    """
    said = " ".join(answer.strip().lower().split())
    distances = []
    for truth in truths:
        true = " ".join(truth.strip().lower().split())
        length = max(len(truth.upper()), len(answer.upper()))
        distance = 0.0
        if length:
            distance = levenshtein(true, said) / length
        distances.append(distance)

    likeness = 1 - min(distances)
    if likeness < LEAST_LIKENESS:
        return 0.0
    return likeness


def number(answer: str, truths: Sequence[str]) -> float:
    """Return 1 if the first number in an answer equals a true one, else 0.

    Commas between thousands do not count, and zero to twelve may be words. Units and % are not
    looked at.
    """
    said = first_number(answer)
    if said is None:
        return 0.0
    for truth in truths:
        true = whole_number(truth)
        if true is not None and math.isclose(said, true, rel_tol=1e-9):
            return 1.0
    return 0.0


def yesno(answer: str, truths: Sequence[str]) -> float:
    """Return 1 if an answer says what is true, yes or no, as POPE reads it (pope.py); else 0."""
    return float(yes_or_no(answer) in [plain(truth) for truth in truths])


def relaxed(answer: str, truths: Sequence[str]) -> float:
    """Return ChartQA's relaxed accuracy (Methani et al., 2020; Masry et al., 2022), 1 or 0.

    A number may be off by TOLERANCE of the true one, and x % is x / 100. All else, and a number
    where the true one is 0, must be the same but for case.
    """
    for truth in truths:
        said_number = float_of(answer)
        true_number = float_of(truth)
        if said_number is not None and true_number:
            right = abs(said_number - true_number) / abs(true_number) <= TOLERANCE
        else:
            right = answer.lower() == truth.lower()
        if right:
            return 1.0
    return 0.0


class Metric(NamedTuple):
    """A way to compare answers, and what is said of it in a sentence."""

    credit: Callable[[str, Sequence[str]], float]
    says: str


METRICS = {
    "exact": Metric(exact, "the true answer itself, but for case, space and a final period"),
    "contains": Metric(contains, "the true answer stands in it as whole words"),
    "f1": Metric(f1, "F1 of the words shared with the true answer, as SQuAD has it"),
    "anls": Metric(anls, "likeness of the letters, 0 below one half, as DocVQA has it"),
    "number": Metric(number, "the first number in it equals the true one"),
    "yesno": Metric(yesno, "yes or no, as POPE reads it: yes unless the first sentence denies"),
}


def choose(truths_of_each: Sequence[Sequence[str]]) -> tuple[str, str]:
    """Return the metric for questions with these true answers, and the reason in words."""
    everything = [truth for truths in truths_of_each for truth in truths]
    if all(is_yes_or_no(truth) for truth in everything):
        return "yesno", "every true answer is yes or no"
    if all(is_number(truth) for truth in everything):
        return "number", "every true answer is a number"

    different = {plain(truth) for truth in everything}
    if max(len(one.split()) for one in different) > MOST_WORDS:
        return "f1", "the true answers are free text"
    if not form_a_set(truths_of_each):
        return "f1", "the true answers are no set that is given again and again"
    if len(different) == 1:
        return "exact", "the true answer is always the same, a short one"
    return "exact", f"the true answers are a set of {len(different)} short ones"


def form_a_set(truths_of_each: Sequence[Sequence[str]]) -> bool:
    """Say whether questions share a small set of true answers, each given twice on average."""
    different = {plain(truth) for truths in truths_of_each for truth in truths}
    return len(different) <= min(MOST_ANSWERS, len(truths_of_each) / 2)


# ---------------------------------------------------------------------------------- their parts


def plain(text: str) -> str:
    """Return a text in small letters, on one line, without space around it or a final period."""
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return text.removesuffix(".").rstrip()


def is_yes_or_no(truth: str) -> bool:
    """Say whether a true answer is yes or no, in any case."""
    return plain(truth) in ("yes", "no")


def is_number(truth: str) -> bool:
    """Say whether a true answer is a number, maybe with a currency or % beside it."""
    return whole_number(truth) is not None


def squad_words(text: str) -> list[str]:
    """Return the words of a text in small letters, without punctuation and articles."""
    text = "".join(one for one in text.lower() if one not in string.punctuation)
    return ARTICLES.sub(" ", text).split()


def first_number(text: str) -> float | None:
    """Return the first number in a text; None without any."""
    text = text.lower().replace("\u2212", "-")  # the minus sign of typographers
    digits = NUMBER.search(text)
    word = NUMBER_WORD.search(text)
    if word and (digits is None or word.start() < digits.start()):
        return float(NUMBER_WORDS.index(word[0]))
    if digits:
        return float(digits[0].replace(",", ""))
    return None


def whole_number(text: str) -> float | None:
    """Return the number that a text is, maybe with a currency or % beside it; None if it is not."""
    text = plain(text).strip("$€£% ").replace("\u2212", "-")
    if text in NUMBER_WORDS or NUMBER.fullmatch(text):
        return first_number(text)
    return None


def float_of(text: str) -> float | None:
    """Return a text as a number as Python reads it, x % as x / 100; None if it is none."""
    try:
        if text.endswith("%"):
            return float(text.rstrip("%")) / 100
        return float(text)
    except ValueError:
        return None


def levenshtein(a: str, b: str) -> int:
    """Return how many letters must be changed, put in or left out to make one text the other."""
    if len(a) > len(b):
        a, b = b, a

    # above[i]: the distance between the first i letters of a and those of b so far.
    above = list(range(len(a) + 1))
    for j, letter in enumerate(b, 1):
        row = [j]
        for i, other in enumerate(a, 1):
            if letter == other:
                row.append(above[i - 1])
            else:
                row.append(1 + min(above[i - 1], above[i], row[-1]))
        above = row
    return above[-1]
