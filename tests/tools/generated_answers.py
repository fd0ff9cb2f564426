"""Answers as models write them, the same in every run, and hashes of what is made of them."""

import hashlib
import json
import random

from evals import vqa


class Draw:
    """Draws that are the same in every Python: only random() is promised not to change."""

    def __init__(self, seed):
        self.random = random.Random(seed).random

    def __call__(self, options):
        return options[int(self.random() * len(options))]

    def upto(self, n):
        return int(self.random() * (n + 1))


MARKS = [
    *";/[]\"{}()=+\\_-><@`,?!.'",
    "...",
    ". ",
    " ,",
    ",,",
    "'s",
    "'s ",
    "%",
    "$",
    ":",
    "#",
    "*",
]
MARKS += ["\n", "\t", " ", "  "]
NOUNS = """
    a an the A The none None zero one Two three ten eleven 1 2 10 1,000 1,000,000 3.5 .5 5. 12:30
    2,5 cat Dogs stop-sign ice/cream T-shirt é ß İ ½ ² yes No it's she's shes let's lets
    somebody'd somebodyd ow's'at I'm Im ive <=3. <=3.x can not 4th No.1 e.g. U.S.A. o'clock 'twas
""".split()
LOST = sorted(vqa.CONTRACTIONS)


def short_answers(count=5000):
    """Yield words, numbers and lost apostrophes between all punctuation marks."""
    draw = Draw(7)
    for _ in range(count):
        parts = []
        for _ in range(1 + draw.upto(5)):
            word = draw(LOST if draw.random() < 0.3 else NOUNS)
            parts += [word.upper() if draw.random() < 0.1 else word]
            parts += [
                draw([" ", " ", " ", ""])
                + (draw(MARKS) if draw.random() < 0.5 else "")
                + draw([" ", ""])
            ]
        yield (
            "".join(parts)
            if draw.random() < 0.98
            else draw(NOUNS) + "." * (30 + draw.upto(6)) + draw(NOUNS)
        )


OPTIONS = [
    {"A": "red", "B": "Blue car", "C": "$1,200", "D": "none of these"},
    {"A": "Yes", "B": "no"},
    {letter: f"option {letter.lower()} {'x' * i}" for i, letter in enumerate("ABCDEFGHI")},
]
SAID = """
    A B C D E Z (A) (B) (C) B. C) A: [D] *B* **C**. a b The answer is red Blue car blue yes no
    none of these option x $1,200 1200 -3.5 1e5 2E-3 1,234,567 .75 3/4 could be so thus therefore
    final result = : is it 12 45% i . , ; ! ? ' is: A, B, and (C)
""".split()


def long_answers(count=5000):
    """Yield (choices, answer): letters, options and numbers in sentences, as models reason."""
    draw = Draw(11)
    for _ in range(count):
        words = [draw(SAID) for _ in range(1 + draw.upto(draw([0, 3, 12])))]
        text = "".join(word + draw([" ", " ", " ", " ", ". ", ".\n", "\n", ""]) for word in words)
        if draw.random() < 0.2:
            text += draw(list(draw(OPTIONS).values()))
        yield draw(OPTIONS), text


def digests(outputs, size=500):
    """Return a short hash of every `size` outputs: a difference shows where it is."""
    chunks = [outputs[i : i + size] for i in range(0, len(outputs), size)]
    return [hashlib.sha256(json.dumps(chunk).encode()).hexdigest()[:8] for chunk in chunks]
