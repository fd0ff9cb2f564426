"""How VQAv2 and TextVQA compare an answer with those of ten humans.

    humans = [m4c(text) for text in ten_answers]
    soft_accuracy(m4c(answer), humans)             # 0 to 1

`official` is the normalisation of VQA's own scorer (vqaEval.py of github.com/GT-Vision-Lab/VQA);
`m4c` is the EvalAI processor of M4C, which LLaVA uses for TextVQA and to write VQAv2's server file.

The traps are habits of the official code, and kept: a comma between digits lets all punctuation of
the text vanish without a space; at most 32 periods go, because a flag stands where the count
belongs; a period goes unless a digit follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}

# Words with apostrophes. let's and she's are not on the official list.
WORDS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd
    you'd've you'll you're you've
""".split()


def _contractions() -> dict[str, str]:
    """Return {a word that has lost one of its apostrophes: the word}."""
    found = {}
    for word in WORDS:
        for place, mark in enumerate(word):
            if mark == "'":
                found[word[:place] + word[place + 1 :]] = word

    found["somebody'd"] = "somebodyd"  # this way round in the official list
    return found


CONTRACTIONS = _contractions()


def official(text: str) -> str:
    """Return an answer as VQA's own scorer compares it."""
    text = strip_space(text)

    # A mark beside a space vanishes, one within a word becomes a space.
    comma_between_digits = re.search(r"\d,\d", text)
    out = text
    for mark in PUNCTUATION:
        if f"{mark} " in text or f" {mark}" in text or comma_between_digits:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)

    # Numbers as digits, no articles, apostrophes where they belong.
    words = []
    for word in out.lower().split():
        word = NUMBERS.get(word, word)
        if word not in ARTICLES:
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def m4c(text: str) -> str:
    """Return an answer as M4C's EvalAI processor has it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return official(text.strip())


def prepare(humans: list[str]) -> tuple[Callable[[str], str], list[str]]:
    """Return how VQA's scorer normalises an answer to this question, and the human answers so.

    Only where the humans differ does it normalise more than space: ten times yes makes Yes wrong.
    """
    humans = [strip_space(text) for text in humans]
    if len(set(humans)) == 1:
        return strip_space, humans
    return official, [official(text) for text in humans]


def strip_space(text: str) -> str:
    """Return a text on one line, without space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def soft_accuracy(answer: str, humans: list[str]) -> float:
    """Return the accuracy of VQA and TextVQA, 0 to 1.

    It is the mean over the humans of min(1, n / 3), where n of the other humans agree.
    """
    # Officially ten accuracies are taken, each against the nine humans that remain.
    agree = humans.count(answer)
    accuracies = []
    for human in humans:
        others = agree
        if human == answer:
            others -= 1
        accuracies.append(min(1, others / 3))
    return sum(accuracies) / len(humans)


def credit_of(humans: list[str]) -> dict[str, float]:
    """Return {answer: its accuracy} of all answers that earn any."""
    return {answer: soft_accuracy(answer, humans) for answer in set(humans)}
