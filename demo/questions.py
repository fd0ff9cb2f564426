"""What can be asked and said about a scene: questions with one answer each, captions, negatives.

    every = questions(scene)                  # all that have exactly one right answer
    asked = interview(scene, rng, Balance())  # four to seven of them, for a training row
    asked = relations(scene, rng, Balance())  # up to four about where its objects stand
    text = read_places(scene)                 # what pretraining says about the picture

There are five kinds of questions: existence ("Is there a red circle?"), colour, shape, count and
relation ("Is red above or below blue?").

Two rules keep a model from answering without looking at the picture. Over the training rows,
`Balance` uses the answers to each question text evenly, so the words alone give little away. Within
a row, no question can be answered from the turns before it (`untold`).

The file in order: the questions of each kind, negatives, which questions are asked, captions.
"""

import itertools
import random
from collections import Counter, defaultdict
from dataclasses import dataclass

from demo.scenes import COLOURS, PAIRS, POPULAR, SHAPES, Pair, Scene, Thing, composition, pair_of

NUMBERS = ("zero", "one", "two", "three", "four")
DIRECTIONS = (("above", "below"), ("left", "right"))  # by axis: of rows, of columns
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")

# A kind of its own in the plan of a row, because shapes are harder to count than colours.
COUNT_OF_A_SHAPE = "count of a shape"


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    A fact is the number of an object in the scene, for its colour and its shape; (axis, number) for
    where it stands; or a colour or a shape, for how many objects have it: "the red object" says
    that there is one. `about` holds the facts that are asked for, and `names` those that the text
    of the question gives away. A question that is asked tells both.
    """

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]  # every answer that this text can have
    about: tuple = ()
    names: tuple = ()
    note: str = ""  # what a caption of moving.py says before the answer


def named(thing: Thing) -> str:
    """Return "red circle"."""
    return f"{thing['colour']} {thing['shape']}"


# ---------------------------------------------------------------------- questions


def existence_text(pair: Pair) -> str:
    """Return the question whether there is an object of that (colour, shape)."""
    colour, shape = pair
    return f"Is there a {colour} {shape}?"


def questions(scene: Scene) -> list[Question]:
    """Return every question that has exactly one right answer in this scene."""
    return (
        existence_questions(scene)
        + attribute_questions(scene)
        + count_questions(scene)
        + relation_questions(scene)
    )


def existence_questions(scene: Scene) -> list[Question]:
    """Return the question for each (colour, shape) whether it is there."""
    present = composition(scene)
    found = []
    for pair in PAIRS:
        question = Question(
            kind="existence",
            text=existence_text(pair),
            answer="yes" if pair in present else "no",
            choices=("yes", "no"),
            about=tuple(i for i, thing in enumerate(scene) if pair_of(thing) == pair),
        )
        found.append(question)
    return found


def count_attributes(scene: Scene) -> tuple[Counter, Counter]:
    """Return how often each colour occurs in a scene, and how often each shape."""
    colours = Counter()
    shapes = Counter()
    for thing in scene:
        colours[thing["colour"]] += 1
        shapes[thing["shape"]] += 1
    return colours, shapes


def attribute_questions(scene: Scene) -> list[Question]:
    """Return the questions for colours and shapes.

    An object is asked for by its shape or by its colour, so no other object may have that too.
    """
    colours, shapes = count_attributes(scene)
    found = []
    for i, thing in enumerate(scene):
        colour = thing["colour"]
        shape = thing["shape"]
        if shapes[shape] == 1:
            question = Question(
                kind="colour",
                text=f"What colour is the {shape}?",
                answer=colour,
                choices=tuple(COLOURS),
                about=(i,),
                names=(shape,),
            )
            found.append(question)
        if colours[colour] == 1:
            question = Question(
                kind="shape",
                text=f"What shape is the {colour} object?",
                answer=shape,
                choices=SHAPES,
                about=(i,),
                names=(colour,),
            )
            found.append(question)
    return found


def count_questions(scene: Scene) -> list[Question]:
    """Return the questions how many objects there are: in all, of each colour, of each shape."""
    colours, shapes = count_attributes(scene)
    counts = {("objects",): len(scene)}
    for colour in COLOURS:
        counts[f"{colour} objects", colour] = colours[colour]
    for shape in SHAPES:
        counts[f"{shape}s", shape] = shapes[shape]

    found = []
    for (what, *attribute), n in counts.items():
        # Of more objects than training has, some counts have no word.
        if n >= len(NUMBERS):
            continue

        choices = NUMBERS
        if what == "objects":
            choices = NUMBERS[1:]  # no scene is empty

        question = Question(
            kind="count",
            text=f"How many {what} are there?",
            answer=NUMBERS[n],
            choices=choices,
            about=tuple(attribute),
        )
        found.append(question)
    return found


def relation_questions(scene: Scene) -> list[Question]:
    """Return the questions how two objects stand to each other.

    They call an object by its colour, so no other object may have that.
    """
    colours, _ = count_attributes(scene)
    unique = [i for i, thing in enumerate(scene) if colours[thing["colour"]] == 1]

    found = []
    for i, j in itertools.permutations(unique, 2):
        for axis in range(2):
            # Two objects of one row are neither above nor below each other.
            if scene[i]["cell"][axis] != scene[j]["cell"][axis]:
                found.append(relation_question(scene, i, j, axis))
    return found


def relation_question(scene: Scene, i: int, j: int, axis: int) -> Question:
    """Return the question where object i stands from object j along an axis."""
    before, after = DIRECTIONS[axis]
    answer = after
    if scene[i]["cell"][axis] < scene[j]["cell"][axis]:
        answer = before

    first = scene[i]["colour"]
    second = scene[j]["colour"]
    of = "of " if before == "left" else ""
    return Question(
        kind="relation",
        text=f"Is {first} {before} or {after} {of}{second}?",
        answer=answer,
        choices=(before, after),
        about=((axis, i), (axis, j)),
        names=(i, j, first, second),
    )


# ---------------------------------------------------------------------- negatives


def negatives(scene: Scene) -> dict[str, list[Pair]]:
    """Return absent (colour, shape) pairs by how tempting they are: POPE's three kinds.

    POPE's adversarial negatives are the objects that most often occur beside those in the picture.
    Here they share the colour or the shape of an object that is there.
    """
    present = composition(scene)
    attributes = set()  # colours and shapes that are there
    for pair in present:
        attributes.update(pair)

    absent = [pair for pair in PAIRS if pair not in present]
    return {
        "random": absent,
        "popular": [pair for pair in absent if pair in POPULAR],
        "adversarial": [pair for pair in absent if attributes.intersection(pair)],
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
        # Of several that lag equally far, min takes the first: which that is must be random.
        rng.shuffle(candidates)
        best = min(candidates, key=self.surplus)

        self.answers[best.text][best.answer] += 1
        self.kinds[best.kind][best.answer] += 1
        return best

    def majority(self, question: Question) -> str:
        """Return what a reader of these rows would answer who never sees a picture."""
        # A text that was never asked is answered as questions of its kind are.
        used = self.answers[question.text]
        if not used:
            used = self.kinds[question.kind]

        # Those may have answers that do not fit this text: "left" where it asks "above or below".
        counts = {answer: n for answer, n in used.items() if answer in question.choices}

        # Sorted, so that a tie does not depend on which answer was counted first.
        return max(sorted(counts), key=counts.get)


def interview(scene: Scene, rng: random.Random, balance: Balance) -> list[Question]:
    """Return the four to seven questions asked about one training scene, in random order."""
    plan = ["existence", "existence", "colour", "shape"]
    rng.shuffle(plan)
    plan += [COUNT_OF_A_SHAPE, "count", "count"]
    return choose(scene, plan, rng, balance)


def relations(scene: Scene, rng: random.Random, balance: Balance) -> list[Question]:
    """Return up to four questions how objects of a scene stand to each other, in random order.

    A scene in which fewer than two objects have a colour of their own has none.
    """
    return choose(scene, ["relation"] * 4, rng, balance)


def choose(scene: Scene, plan: list[str], rng: random.Random, balance: Balance) -> list[Question]:
    """Return a question for each kind that the plan names, in random order.

    A scene of few objects leaves some of the plan out.
    """
    by_kind = defaultdict(list)
    for question in questions(scene):
        by_kind[question.kind].append(question)
        if question.kind == "count" and set(SHAPES).intersection(question.about):
            by_kind[COUNT_OF_A_SHAPE].append(question)

    chosen = []
    for kind in plan:
        candidates = untold(by_kind[kind], chosen)
        if kind == "existence":
            candidates = tempting_existence(scene, rng, candidates)
        if candidates:
            chosen.append(balance.pick(rng, candidates))
    rng.shuffle(chosen)
    return chosen


def untold(candidates: list[Question], chosen: list[Question]) -> list[Question]:
    """Return the candidates that neither tell nor are told by what is already chosen.

    A fact is asked for once: asked again in other words, its answer would stand in the text. And of
    two relations along one axis, none may share an object. What is left of one object is left of
    another one more often than not, too: a model could learn that rule from the text alone.
    """
    asked = set()
    told = set()
    for question in chosen:
        asked.update(question.about)
        told.update(question.about, question.names)

    # In both directions, because the order in which they are asked is not settled yet.
    return [
        candidate
        for candidate in candidates
        if candidate not in chosen
        and told.isdisjoint(candidate.about)
        and asked.isdisjoint(candidate.names)
    ]


def tempting_existence(
    scene: Scene, rng: random.Random, candidates: list[Question]
) -> list[Question]:
    """Return the candidates with "yes" or those with "no", by a fair coin.

    There are none if no candidate has "yes": with "no" as the only answer left, the coin would not
    be fair, and the questions before it would tell. Those with "no" ask for one of POPE's kinds of
    negatives, as the benchmark does. If none of that kind is left, they are all that have "no".
    """
    answer = rng.choice(("yes", "no"))
    with_yes = [q for q in candidates if q.answer == "yes"]
    if answer == "yes" or not with_yes:
        return with_yes

    with_no = [q for q in candidates if q.answer == "no"]
    pairs = rng.choice(list(negatives(scene).values()))
    texts = list(map(existence_text, pairs))
    tempting = [q for q in with_no if q.text in texts]
    if not tempting:
        return with_no
    return tempting


# ---------------------------------------------------------------------- captions


def place_of(thing: Thing) -> str:
    """Return where an object stands: "top left"."""
    row, column = thing["cell"]
    return f"{ROWS[row]} {COLUMNS[column]}"


def read_places(scene: Scene) -> str:
    """Return what stands where, in reading order: "top left: red circle. middle right: ...".

    Every word follows from the picture and the words before it. So it teaches to see: first where
    something is, then what.
    """
    phrases = [f"{place_of(thing)}: {named(thing)}" for thing in scene]
    return ". ".join(phrases) + "."
