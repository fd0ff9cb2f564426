"""What can be asked and said about a scene: questions with one answer each, captions, negatives.

    every = questions(scene)                  # all that have exactly one right answer
    asked = interview(scene, rng, Balance())  # six to eight of them, for a training row
    text = caption(scene, rng, Balance())     # what pretraining says about the picture

There are five kinds of questions: existence ("Is there a red circle?"), colour, shape, count and
relation ("Is the red circle above or below the blue square?").

Two rules keep a model from answering without looking at the picture. Over the training rows,
`Balance` uses the answers to each question text evenly, so the words alone give little away. Within
a row, no question can be answered from the turns before it (`interview`).
"""

import itertools
import random
from collections import Counter, defaultdict
from dataclasses import dataclass

from demo.scenes import COLOURS, PAIRS, POPULAR, SHAPES, Pair, Scene, Thing, composition

NUMBERS = ("zero", "one", "two", "three")
DIRECTIONS = (("above", "below"), ("left", "right"))  # by axis: of rows, of columns
POSITIONS = (
    ("at the top left", "at the top right"),
    ("at the bottom left", "at the bottom right"),
)

TURNS = (6, 8)  # questions about a picture, at least and at most
NOTES = (8, 12)  # notes of a caption, at least and at most
LISTED = 1 / 3  # share of the captions that list the objects; the others are notes


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    `about` identifies the fact that the answer tells: the object's number for its colour or shape,
    (axis, object, object) for a relation. It is empty where the text itself says all.
    """

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]  # every answer that this text can have
    note: str  # what a caption says before the answer
    about: tuple = ()


def named(thing: Thing) -> str:
    """Return "red circle"."""
    return f"{thing['colour']} {thing['shape']}"


# ---------------------------------------------------------------------- questions


def existence_text(pair: Pair) -> str:
    """Return the question whether there is an object of that (colour, shape)."""
    return f"Is there a {pair[0]} {pair[1]}?"


def questions(scene: Scene) -> list[Question]:
    """Return every question that has exactly one right answer in this scene."""
    return (
        existence_questions(scene)
        + attribute_questions(scene)
        + count_questions(scene)
        + relation_questions(scene)
    )


def existence_questions(scene: Scene) -> list[Question]:
    """Return whether each (colour, shape) is there."""
    there = composition(scene)
    asked = []
    for pair in PAIRS:
        answer = "yes" if pair in there else "no"
        note = f"{pair[0]} {pair[1]}"
        asked.append(Question("existence", existence_text(pair), answer, ("yes", "no"), note))
    return asked


def attribute_questions(scene: Scene) -> list[Question]:
    """Return the colour of each shape that occurs once, and the shape of each such colour."""
    colours = Counter(thing["colour"] for thing in scene)
    shapes = Counter(thing["shape"] for thing in scene)
    asked = []
    for i, thing in enumerate(scene):
        colour = thing["colour"]
        shape = thing["shape"]
        if shapes[shape] == 1:
            text = f"What colour is the {shape}?"
            note = f"{shape} colour"
            asked.append(Question("colour", text, colour, tuple(COLOURS), note, (i,)))
        if colours[colour] == 1:
            text = f"What shape is the {colour} object?"
            note = f"{colour} shape"
            asked.append(Question("shape", text, shape, SHAPES, note, (i,)))
    return asked


def count_questions(scene: Scene) -> list[Question]:
    """Return how many objects there are, of each colour and of each shape."""
    colours = Counter(thing["colour"] for thing in scene)
    shapes = Counter(thing["shape"] for thing in scene)
    counts = {"objects": len(scene)}
    for colour in COLOURS:
        counts[f"{colour} objects"] = colours[colour]
    for shape in SHAPES:
        counts[f"{shape}s"] = shapes[shape]

    asked = []
    for what, n in counts.items():
        choices = NUMBERS
        if what == "objects":
            choices = NUMBERS[1:]  # no scene is empty
        text = f"How many {what} are there?"
        asked.append(Question("count", text, NUMBERS[n], choices, what))
    return asked


def relation_questions(scene: Scene) -> list[Question]:
    """Return how two objects stand to each other, for objects that their words identify."""
    pairs = Counter(composition(scene))
    unique = [i for i, thing in enumerate(scene) if pairs[thing["colour"], thing["shape"]] == 1]
    asked = []
    for i, j in itertools.permutations(unique, 2):
        for axis, (before, behind) in enumerate(DIRECTIONS):
            place_of_i = scene[i]["cell"][axis]
            place_of_j = scene[j]["cell"][axis]
            if place_of_i == place_of_j:
                continue

            answer = before if place_of_i < place_of_j else behind
            either = f"{named(scene[i])} {before} or {behind}"
            of_the = "of the" if before == "left" else "the"
            text = f"Is the {either} {of_the} {named(scene[j])}?"
            note = f"{either} {named(scene[j])}"
            about = (axis, min(i, j), max(i, j))
            asked.append(Question("relation", text, answer, (before, behind), note, about))
    return asked


def negatives(scene: Scene) -> dict[str, list[Pair]]:
    """Return absent (colour, shape) pairs by how tempting they are: POPE's three kinds.

    POPE's adversarial negatives are the objects that most often occur beside those in the picture.
    Here they share the colour or the shape of an object that is there.
    """
    there = composition(scene)
    seen = {value for pair in there for value in pair}
    absent = [pair for pair in PAIRS if pair not in there]
    return {
        "random": absent,
        "popular": [pair for pair in absent if pair in POPULAR],
        "adversarial": [pair for pair in absent if seen.intersection(pair)],
    }


# ---------------------------------------------------------------------- which are asked


class Balance:
    """The answers given so far. It keeps those to each question text evenly used."""

    def __init__(self):
        self.answers = defaultdict(Counter)  # question text -> answer -> times asked
        self.kinds = defaultdict(Counter)  # kind -> answer -> times asked

    def surplus(self, question: Question) -> float:
        """Return by how much its answer is ahead of an even share of the answers to its text."""
        used = self.answers[question.text]
        return used[question.answer] - used.total() / len(question.choices)

    def pick(self, rng: random.Random, candidates: list[Question]) -> Question:
        """Return the candidate whose answer lags furthest behind, and count it."""
        rng.shuffle(candidates)  # decides between equals
        best = min(candidates, key=self.surplus)
        self.answers[best.text][best.answer] += 1
        self.kinds[best.kind][best.answer] += 1
        return best

    def majority(self, question: Question) -> str:
        """Return what a reader of these rows would answer who never sees a picture."""
        used = self.answers.get(question.text) or self.kinds[question.kind]
        counts = {answer: n for answer, n in used.items() if answer in question.choices}
        return max(sorted(counts), key=counts.get)


def interview(
    scene: Scene, rng: random.Random, balance: Balance, turns: tuple[int, int] = TURNS
) -> list[Question]:
    """Return the questions asked about one training scene, in random order.

    There are `turns` of them, at least and at most, as far as the scene has so many.
    """
    least, most = turns
    by_kind = defaultdict(list)
    for question in questions(scene):
        by_kind[question.kind].append(question)

    # One existence question per distinct object, each "yes" or "no" by a fair coin: then the
    # answers to the earlier ones say nothing about the next. With more of them, the objects that
    # can be a "yes" would run out.
    plan = ["existence"] * len(set(composition(scene)))
    plan += ["relation", "relation", "colour", "shape", "count", "relation", "colour", "shape"]

    # A scene of one object has few questions. Counts fill it up to the least number.
    planned = len(plan)
    plan += ["count"] * least

    chosen = []
    for i, kind in enumerate(plan):
        # A fact is asked for once: in other words, the answer would be found in the text.
        told = {q.about for q in chosen if q.about}
        candidates = [q for q in by_kind[kind] if q not in chosen and q.about not in told]
        if kind == "existence":
            candidates = tempting_existence(scene, rng, candidates)

        limit = most if i < planned else least
        if candidates and len(chosen) < limit:
            chosen.append(balance.pick(rng, candidates))
    rng.shuffle(chosen)
    return chosen


def tempting_existence(
    scene: Scene, rng: random.Random, candidates: list[Question]
) -> list[Question]:
    """Return the candidates with "yes" or those with "no", by a fair coin.

    Those with "no" ask for one kind of negatives, as the benchmark does, where one is left.
    """
    answer = rng.choice(("yes", "no"))
    candidates = [q for q in candidates if q.answer == answer]
    if answer == "yes":
        return candidates

    kind_of_negatives = rng.choice(list(negatives(scene).values()))
    texts = [existence_text(pair) for pair in kind_of_negatives]
    return [q for q in candidates if q.text in texts] or candidates


# ---------------------------------------------------------------------- captions


def caption(scene: Scene, rng: random.Random, balance: Balance) -> str:
    """Return what pretraining says of a scene: a sentence that lists the objects, or notes.

    Notes are the answers to questions, in fewer words than a question takes. A caption is never
    both: notes behind a list could be copied from the text, and teach nothing about the picture.
    """
    if rng.random() < LISTED:
        return list_objects(rng.sample(scene, len(scene)))

    notes = [f"{q.note}: {q.answer}" for q in interview(scene, rng, balance, NOTES)]
    return ". ".join(notes) + "."


def list_objects(things: list[Thing]) -> str:
    """Return a sentence that lists objects.

    The caller shuffles them: then each word must be looked up in the picture by what was said
    before it, and cannot be found by reading the cells in order.
    """
    phrases = []
    for thing in things:
        row, column = thing["cell"]
        phrases.append(f"a {thing['size']} {named(thing)} {POSITIONS[row][column]}")

    number = NUMBERS[len(things)]
    if len(phrases) == 1:
        return f"There is {number}: {phrases[0]}."
    return f"There are {number}: {', '.join(phrases[:-1])} and {phrases[-1]}."
