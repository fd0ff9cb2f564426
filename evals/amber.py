"""AMBER (Wang et al., 2023): hallucination in descriptions, and in answers of yes or no.

The task `amber` asks both; `amber-g` asks only for the descriptions of the 1004 pictures, `amber-d`
only the 14,216 questions. AMBER, the published number, is the mean of 100 - CHAIR and F1.

Files as published (github.com/junyangwang0410/AMBER): data/query/query_all.json,
data/annotations.json, and for descriptions data/relation.json and data/safe_words.txt; the pictures
AMBER_*.jpg in image/. Descriptions need nltk, and spaCy with its large English vectors
(evals/words.py).

Scored as AMBER's inference.py does it, to its last rounding. Of a description count the nouns that
relation.json knows. Those are right that are an object of the picture, one associated with it, or
whose vector is near to one (a cosine above 0.8).

    CHAIR   % of the nouns that are wrong                  less is better
    Cover   % of the picture's objects that are mentioned  more is better
    Hal     % of descriptions with a wrong noun            less is better
    Cog     % mentioned of the objects that people and models imagine, and are not there

Accuracy, precision, recall and F1 are those of the answer No: it is what finds a hallucination.
Chance is what always saying no gets: of the questions for existence all have that answer.

The trap: only the answers Yes and No count, in just these letters. "No." and "no" are wrong.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from checkpoints.files import write_file
from config import UserError
from evals import words
from evals.files import LARGEST_ID, Row, errors_at, find_first, read_rows, read_text, read_values
from evals.options import WORD

MAX_NEW_TOKENS = 512
QUESTION_TOKENS = 16  # of amber-d: any answer but a bare Yes or No is wrong, so a short one will do
PUBLISHED = ("AMBER", {"LLaVA-1.5": 83.5})
UNREAD = "are not just Yes or No, and are wrong"

NEAR = 0.8  # the cosine above which two words mean the same

# The kinds of questions, by the name of their scores: attributes together, then each alone.
STATE = ("discriminative-attribute-state",)
NUMBER = ("discriminative-attribute-number",)
ACTION = ("discriminative-attribute-action",)
KINDS = {
    "existence": ("discriminative-hallucination",),
    "attribute": STATE + NUMBER + ACTION,
    "state": STATE,
    "number": NUMBER,
    "action": ACTION,
    "relation": ("discriminative-relation", "relation"),
}
QUESTIONS = KINDS["existence"] + KINDS["attribute"] + KINDS["relation"]
GENERATIVE = "generative"

# The official code counts from here, so that a ratio of nothing is 0.
COUNT_FROM = 0.001

# And it adds this to precision + recall for the same reason, ten times as much for existence.
EPSILON = 0.0001
EPSILON_OF = {"existence": 0.001}


def examples(data_dir, descriptions=True, questions=True):
    """Return the requests for descriptions and the questions, in the order of the file.

    "label" is "yes" or "no"; of a description {"truth": objects, "hallu": objects not there}.
    Own keys: "kind"; of a description "words", what relation.json and safe_words.txt say.
    """
    data = find_first(data_dir, "data/annotations.json", "annotations.json").parent
    kinds = ()
    vocabulary = None
    if descriptions:
        words.check(vectors=True)
        vocabulary = read_vocabulary(data)
        kinds += (GENERATIVE,)
    if questions:
        kinds += QUESTIONS

    labels = read_labels(data / "annotations.json", vocabulary)
    asked = []
    for where, row in read_rows(data / "query/query_all.json"):
        with errors_at(where):
            name = row.integer("id", 1, LARGEST_ID)
            label = labels[name]
            if label["kind"] not in kinds:
                continue
            prompt = row.text("query")
            if label["kind"] != GENERATIVE:
                prompt += WORD
            example = {"id": str(name), "image": row.file("image"), "prompt": prompt}
            asked.append(example | label | {"where": where})
    return in_folder(asked, data_dir)


def in_folder(asked, data_dir):
    """Return the examples with their pictures where they lie in the data folder."""
    if not asked:
        return []
    first = asked[0]["image"]
    file = find_first(data_dir, f"image/{first}", f"images/{first}", first)
    folder = file.parent.relative_to(data_dir)
    return [example | {"image": str(folder / example["image"])} for example in asked]


@dataclass(frozen=True)
class Vocabulary:
    """The words that AMBER knows: of each object those associated with it, and the safe ones."""

    associated: dict[str, list[str]]
    known: frozenset[str]  # the objects and what is associated with them
    safe: frozenset[str]  # right in every description


def read_vocabulary(data):
    """Return what relation.json and safe_words.txt of the folder `data` say."""
    file = data / "relation.json"
    relation = Row(read_values(file), str(file))
    associated = {word: relation.texts(word) for word in relation.values}
    known = {*associated}
    for others in associated.values():
        known.update(others)
    safe = read_text(data / "safe_words.txt").splitlines()
    return Vocabulary(associated, frozenset(known), frozenset(safe))


def read_labels(file, vocabulary):
    """Return {id: {"kind", "label"}}; of a description also "words", the vocabulary."""
    labels = {}
    for where, row in read_rows(file):
        kind = row.text("type", (GENERATIVE, *QUESTIONS))
        label = {"kind": kind, "label": None}
        if kind != GENERATIVE:
            label["label"] = row.text("truth", ("yes", "no"))
        elif vocabulary is not None:
            objects = {key: row.texts(key) for key in ("truth", "hallu")}
            for word in objects["truth"] + objects["hallu"]:
                if word not in vocabulary.associated:
                    what = f"{word!r} is not in relation.json"
                    raise UserError(where, what, "fetch both files again")
            label |= {"label": objects, "words": vocabulary}
        labels[row.integer("id", 1, LARGEST_ID)] = label
    return labels


def unread(examples, answers):
    """Return how many answers to a question are neither Yes nor No."""
    count = 0
    for example, answer in zip(examples, answers, strict=True):
        count += example["kind"] != GENERATIVE and answer not in ("Yes", "No")
    return count


def score(examples, answers):
    """Return the score AMBER if both parts are there, then those of each."""
    descriptions = []
    questions = []
    for example, answer in zip(examples, answers, strict=True):
        if example["kind"] == GENERATIVE:
            descriptions.append((example, answer))
        else:
            questions.append((example, answer))

    scores = {}
    if descriptions:
        scores |= description_scores(descriptions)
    if questions:
        scores |= question_scores(questions)
    if descriptions and questions:
        mean = (100 - scores["CHAIR"]["score"] + scores["F1"]["score"]) / 2
        scores = {"AMBER": {"score": mean, "chance": None, "n": len(examples)}} | scores
    return scores


def percent(part, whole):
    """Return 100 part / whole as the official code rounds it."""
    return round(part / (whole + COUNT_FROM) * 100, 1)


# ------------------------------------------------------------------------------------ descriptions


@dataclass
class Found:
    """What a description mentions."""

    nouns: int  # of those that AMBER knows
    wrong: int  # the nouns that nothing in the picture is
    covered: set[int]  # the places of the objects that it mentions, in the list of those there
    imagined: set[int]  # likewise in the list of those that are not there


def description_scores(described):
    """Return the scores of [(example, answer)]."""
    n = len(described)
    there = 0
    not_there = 0
    read = []
    tagged = words.tagged([answer for _, answer in described])
    for (example, _), tokens in zip(described, tagged, strict=True):
        nouns = [words.lemma(word, "n") for word, tag in tokens if tag.startswith("NN")]
        read.append(read_description(nouns, example["label"], example["words"]))
        there += len(example["label"]["truth"])
        not_there += len(example["label"]["hallu"])

    nouns = sum(found.nouns for found in read)
    wrong = sum(found.wrong for found in read)
    clean = sum(found.wrong == 0 for found in read)
    reached = {
        "CHAIR": percent(wrong, nouns),
        "Cover": percent(sum(len(found.covered) for found in read), there),
        "Hal": round(100 - clean / (n + COUNT_FROM) * 100, 1),
        "Cog": percent(sum(len(found.imagined) for found in read), not_there),
    }
    return {name: {"score": value, "chance": None, "n": n} for name, value in reached.items()}


def read_description(nouns, objects, vocabulary):
    """Return what the nouns of a description say about a picture with these `objects`."""
    truth = names_of(objects["truth"], vocabulary.associated)
    hallu = names_of(objects["hallu"], vocabulary.associated)
    known = [noun for noun in nouns if noun in vocabulary.known]

    found = Found(len(known), 0, set(), set())
    for noun in known:
        if noun in vocabulary.safe:
            continue
        place = place_of(noun, truth)
        if place is not None:
            found.covered.add(place)
            continue

        # A noun may name one imagined object, and be near to the name of another.
        found.imagined |= {place_of(noun, hallu), place_near(noun, hallu)} - {None}

        place = place_near(noun, truth)
        if place is not None:
            found.covered.add(place)
        else:
            found.wrong += 1
    return found


def names_of(objects, associated):
    """Return [(name, place of the object)]: first the words associated with each, then its own."""
    names = []
    for place, word in enumerate(objects):
        names += [(other, place) for other in associated[word]]
    for place, word in enumerate(objects):
        names.append((word, place))
    return names


def place_of(noun, names):
    """Return the place of the first object with this name; None if there is none."""
    for name, place in names:
        if name == noun:
            return place
    return None


def place_near(noun, names):
    """Return the place of the first object with a name that means the same; None likewise."""
    for name, place in names:
        if words.similarity(noun, name) > NEAR:
            return place
    return None


# --------------------------------------------------------------------------------------- questions


def question_scores(asked):
    """Return the scores of [(example, answer)]: of all questions, then of each kind."""
    scores = rates(asked, "", EPSILON)
    for name, kinds in KINDS.items():
        of_kind = [(example, answer) for example, answer in asked if example["kind"] in kinds]
        if of_kind:
            scores |= rates(of_kind, f"{name} ", EPSILON_OF.get(name, EPSILON))
    return scores


def rates(asked, prefix, epsilon):
    """Return accuracy, precision, recall and F1; a positive is the answer No."""
    labels = [example["label"] for example, _ in asked]
    reached = confusion(labels, [answer for _, answer in asked], epsilon)
    always_no = confusion(labels, ["No"] * len(labels), epsilon)

    scores = {}
    for name, value in reached.items():
        scores[prefix + name] = {"score": value, "chance": always_no[name], "n": len(labels)}
    return scores


def confusion(labels, said, epsilon):
    """Return the four numbers as the official code rounds them, F1 from the rounded two."""
    pairs = list(zip(labels, said, strict=True))
    right_no = pairs.count(("no", "No"))
    right = right_no + pairs.count(("yes", "Yes"))

    precision = percent(right_no, said.count("No"))
    recall = percent(right_no, labels.count("no"))
    p = precision / 100
    r = recall / 100
    return {
        "accuracy": percent(right, len(pairs)),
        "precision": precision,
        "recall": recall,
        "F1": round(2 * p * r / (p + r + epsilon) * 100, 1),
    }


def write(examples, answers, stem, data_dir):
    """Write STEM-responses.json as AMBER's inference.py reads it (--inference_data)."""
    rows = []
    for example, answer in zip(examples, answers, strict=True):
        rows.append({"id": int(example["id"]), "response": answer})
    file = Path(f"{stem}-responses.json")
    write_file(file, json.dumps(rows, indent=1))
    return [file]
