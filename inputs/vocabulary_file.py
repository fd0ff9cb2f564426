"""What a vocabulary file may ask for: it comes from outside, and its rules are a small program.

    check_vocabulary(content, path)      # a UserError, or `tokenizers` can take this tokenizer.json
    check_pieces(content, path)          # the same for `sentencepiece` and a tokenizer.model

The normalizer, pre_tokenizer and decoder of a tokenizer.json are lists of steps. A text can grow in
each: forty times Replace "a" -> "aa" make terabytes of one letter. A step can be a regular
expression that takes for ever on some texts. The library has no limits for either. It ends the
process where memory is short.

So growth is bounded by a rule. Regular expressions, and tables that map characters to texts, are
tried on a few samples in a process that has limits (bounded.py), before this one builds them.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from checkpoints.fields import VOCABULARY, Fields
from checkpoints.files import parse_json
from config import UserError
from inputs import bounded

# The largest published file, Gemma 3's, has 33 MB.
MOST_BYTES = 2**27

# Llama's steps keep the length of a text.
MOST_GROWTH = 64
MOST_STEPS = 100
LONGEST_TEXT = 1000  # of a step; most are a character

# What a text may be made of. An expression that is slow on one of them would be slow in training.
# Behind a run of one character come others: many expressions are slow only where they fail.
LINE = (
    'The quick brown fox said: "It\'s 3.14 (or 1,020,000)?!"\r\n\t- Jump over 567 lazy dogs = 89% '
    "Um 12\u202f\u20ac, \u00e9t\u00e9; \u4f60\u597d\u3002 "
)
SAMPLES = [
    LINE * 20,
    *(character * 2000 + LINE for character in " \n\taZ0.-_'\u00e9\u4e2d\u2581\U0001f600"),
    "a " * 1000 + LINE,
    "aB1 \n" * 400 + LINE,
]


def check_vocabulary(content: bytes, where: Path) -> int:
    """Return the largest id of the vocabulary itself, -1 for an empty one.

    Raise UserError for a tokenizer.json that is no JSON, or asks for too much.
    """
    try:
        fields = Fields(parse_json(content), where, fix="copy the file again")
    except ValueError as e:
        raise UserError(where, f"cannot be loaded: {e}", "copy it again") from None

    largest = check_ids(fields)
    parts = {}
    steps = {}
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = fields.table(name, optional=True)
        parts[name] = part.values or None
        steps[name] = flatten(part)
    check_growth(steps["normalizer"] + steps["pre_tokenizer"], fields)
    check_growth(steps["decoder"], fields)

    if any(is_program(step) for part in steps.values() for step in part):
        try_out(parts, where)
    return largest


def check_ids(fields: Fields) -> int:
    """Return the largest id of the vocabulary itself, -1 for an empty one.

    Raise UserError for an id that no embedding has, or an added token without a string.
    """
    model = fields.table("model")
    vocabulary = model.values.get("vocab")
    if isinstance(vocabulary, dict):
        # The library refuses an id that is no number.
        largest = max((i for i in vocabulary.values() if isinstance(i, int)), default=-1)
    else:
        # Unigram's are pairs of a piece and its score, in the order of the ids.
        largest = len(model.list("vocab", list, most=VOCABULARY)) - 1
    if largest > VOCABULARY:
        what = f"an id of the vocabulary is {largest}, more than {VOCABULARY}"
        raise UserError(model.name("vocab"), what, model.fix)

    # WordPiece looks at each part of a word of up to so many characters.
    model.integer("max_input_chars_per_word", 0, LONGEST_TEXT, default=None)

    for i, value in enumerate(fields.list("added_tokens", dict, default=[], most=VOCABULARY)):
        token = Fields(value, fields.where, f"added_tokens.{i}", fields.fix)
        token.integer("id", 0, VOCABULARY)
        if not token.text("content", most=LONGEST_TEXT):
            raise token.refuse("content", "empty")
    return largest


def flatten(part: Fields) -> list[Fields]:
    """Return the steps of a normalizer, pre-tokenizer or decoder in order, Sequences opened."""
    steps = []
    waiting = [part]
    while waiting:
        step = waiting.pop()
        inner = []
        for key in ("normalizers", "pretokenizers", "decoders"):
            for i, value in enumerate(step.list(key, dict, default=[], most=MOST_STEPS)):
                inner.append(Fields(value, step.where, f"{step.path}.{key}.{i}", step.fix))
        if not inner:
            steps.append(step)
        waiting += reversed(inner)
        if len(steps) + len(waiting) > MOST_STEPS:
            raise UserError(part.where, f"{part.path} has more than {MOST_STEPS} steps", part.fix)
    return steps


def check_growth(steps: list[Fields], fields: Fields):
    """Raise UserError for steps that together can make a text much longer."""
    growth = 1.0
    for step in steps:
        growth *= growth_of(step)
    if growth > MOST_GROWTH:
        what = f"its steps make a text up to {growth:.0f} times as long, more than {MOST_GROWTH}"
        raise UserError(fields.where, what, "use the tokenizer of the model's authors")


def growth_of(step: Fields) -> float:
    """Return how many times as long a step can make a text, beyond a few characters more."""
    kind = step.text("type", default="")
    if kind == "Replace":
        content = step.text("content", most=LONGEST_TEXT)
        pattern = step.table("pattern")
        if "Regex" in pattern:
            return max(1, len(content))  # unless it matches nothing at all, which `try_out` finds
        string = pattern.text("String", most=LONGEST_TEXT)
        if not string:  # it stands between all characters
            return len(content) + 1
        return max(1.0, len(content) / len(string))
    if kind == "Prepend":
        step.text("prepend", most=LONGEST_TEXT)
        return 1.0
    # Two characters for one: the bytes of a letter; a word mark before each piece; a table.
    if kind in ("ByteLevel", "Metaspace", "Precompiled"):
        return 2.0
    return 1.0


def is_program(step: Fields) -> bool:
    """Return whether only trying shows what a step does."""
    pattern = step.values.get("pattern")
    is_regex = isinstance(pattern, dict) and "Regex" in pattern
    return is_regex or step.values.get("type") == "Precompiled"


def try_out(parts: dict[str, dict | None], where: Path):
    """Raise UserError if the steps of a tokenizer fail on a sample or need too much for it."""
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "post_processor": None,
        **parts,
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }
    ask({"job": "split", "tokenizer": json.dumps(spec), "samples": SAMPLES}, where)


def check_pieces(content: bytes, where: Path):
    """Raise UserError for a tokenizer.model that cannot be read, or needs too much for a sample.

    It has a table that maps characters to texts of any length, like Precompiled.
    """
    model = base64.b64encode(content).decode()
    ask({"job": "pieces", "model": model, "samples": SAMPLES}, where)


def ask(request: dict, where: Path):
    """Have the samples tried out in another process. Raise UserError if that fails."""
    try:
        reply = bounded.ask(request)
        why = reply.get("refused")
    except bounded.OverLimit as error:
        why = f"on a short text it {error}"
    if why is not None:
        raise UserError(where, f"cannot be loaded: {why}", "copy it again")
