"""Generated files, captions and answers of CHAIR and AMBER, and a stand-in for nltk and spaCy.

The files are as COCO and AMBER publish theirs, the names of the objects are ours in part. The
stand-in knows no English: it splits, tags and shortens words by their endings, and compares their
letters. It is enough to compare a scorer with the official one, if that is run with the same.
"""

import json
import re
from types import SimpleNamespace

from tests.tools.generated_answers import Draw

# An object a line, with its other names: some are of two words, some belong to two objects.
SYNONYMS = """
person, man, woman, child, rider, skier, people
bicycle, bike, trike
car, van, taxi, jeep
motorcycle, motor bike, motor cycle, scooter
airplane, plane, air plane, jet
train, locomotive
traffic light, stop light, street light
bird, owl, duck, crow
cat, kitten
dog, puppy
elephant
bear, panda
tie, bow, bow tie
skis, ski
wine glass
cup, mug
hot dog
cake, cupcake
chair, seat, stool
potted plant, houseplant
dining table, table, desk
toilet, potty
tv, monitor, television
cell phone, phone, mobile phone, iPhone
book
clock\x20
teddy bear, teddybear
oven, stove top oven, mug
"""

# What stands between the names of objects: two words that are one, verbs, and what is no object.
AROUND = """
    baby elephant|adult bear|baby bird|passenger jet|passenger train|train tracks|home plate|
    toilet seat|seat of the toilet|a toilet and two seats|hot dogs|wine glasses|bow tie|red bow|
    motor bikes|air planes|skiing|seated|sits|parked|booked|riding|tabled|dressing|a very|quickly|
    plate|window|sky|grass|streets|tree|shadow|two|3|U.S.|p.m.|St.|No. 5|and|, and|; the|next to|
    a man's|women|men|people|children|the|The|THE|an|of|with|in front of|dog's|dog-like|cars/vans|
    (cat)|"bird"|*bear*|chair.|table.The|cup...|cake!|clock?|tv's|dog\n|\tcat|\u00e9l\u00e9phant|
    \u732b|\U0001f436|caf\u00e9|it\u2019s|\u201ccar\u201d|\u2014
""".replace("\n    ", "").strip("\n").split("|")  # fmt: skip
MARKS = [" ", " ", " ", " ", " ", ", ", ". ", ".", " . ", "; ", "\n", " - ", "'s ", ".\n\n", "... "]


def names_of_objects():
    """Return all names, and the first of each line."""
    lines = [line.strip().split(", ") for line in SYNONYMS.strip("\n").split("\n")]
    return [name for line in lines for name in line], [line[0] for line in lines]


def caption(draw, names, most):
    """Return a text of up to so many objects among other words, with odd marks between them."""
    parts = []
    for _ in range(draw.upto(most)):
        word = draw(names)
        if draw.random() < 0.25:
            word += draw(["s", "es"])
        if draw.random() < 0.1:
            word = word.upper()
        parts += [draw(["a ", "the ", "", "two "]), word, draw(MARKS)]
        if draw.random() < 0.7:
            parts += [draw(AROUND), draw(MARKS)]
    return "".join(parts)


# ----------------------------------------------------------------------------------------- CHAIR


def coco(folder, count=600):
    """Write COCO's files of `count` pictures, and synonyms.txt; return a caption of each."""
    draw = Draw(31)
    names, objects = names_of_objects()
    categories = [{"id": 3 * i + 1, "name": name} for i, name in enumerate(objects)]
    images = []
    outlines = []
    captions = []
    answers = []
    for i in range(count):
        image = 7 * i + 2
        images.append({"id": image, "file_name": f"COCO_val2014_{image:012d}.jpg"})
        shown = [draw(categories) for _ in range(draw.upto(6))]
        for category in shown:
            outlines.append({"image_id": image, "category_id": category["id"]})
        for _ in range(2):
            captions.append({"image_id": image, "caption": caption(draw, names, 3)})

        # Most of what an answer names is there.
        likely = 3 * [category["name"] for category in shown] + [draw(names) for _ in range(3)]
        answers.append(caption(draw, likely, 12))

    annotations = folder / "annotations"
    annotations.mkdir(parents=True)
    parts = {"images": images, "categories": categories, "annotations": outlines}
    (annotations / "instances_val2014.json").write_text(json.dumps(parts))
    parts = {"images": images, "annotations": captions}
    (annotations / "captions_val2014.json").write_text(json.dumps(parts))
    (folder / "synonyms.txt").write_text(SYNONYMS)
    rows = [json.dumps({"image_id": image["id"]}) + "\n" for image in images]
    (folder / "chair_images.jsonl").write_text("".join(rows))
    return answers


# ----------------------------------------------------------------------------------------- AMBER

RELATION = {
    "sky": [], "grass": ["ground"], "wall": ["building"], "ground": ["floor"], "tree": ["forest"],
    "road": ["path", "street"], "dog": ["puppy", "animal"], "cat": ["kitten", "animal"], "sea": [],
    "ship": ["boat"], "boat": ["ship"], "child": ["kid", "person"], "man": ["person"], "sun": [],
    "woman": ["person", "lady"], "table": ["desk"], "chair": ["seat"], "orange": ["fruit"],
    "cup": ["mug"], "flower": ["plant"], "cloud": [], "bird": ["animal"], "bench": ["seat"],
    "hill": ["mountain"], "lake": ["water", "sea"], "shoes": [], "trees": [],
}  # fmt: skip
SAFE = ["fruit", "orange", "shoe", "light"]
KINDS = [
    "discriminative-hallucination",
    "discriminative-attribute-state",
    "discriminative-attribute-number",
    "discriminative-attribute-action",
    "discriminative-relation",
    "relation",
]
ANSWERS = 3 * ["Yes"] + 4 * ["No"] + ["yes", "no", "No.", "Yes.", "", " No", "Maybe"]


def amber(folder, descriptions=540, questions=915):
    """Write AMBER's files; return an answer to each description and question."""
    draw = Draw(41)
    objects = list(RELATION)
    names = [*objects, *(name for others in RELATION.values() for name in others), *SAFE, "street"]
    annotations = []
    queries = []
    answers = []
    for i in range(1, descriptions + questions + 1):
        image = f"AMBER_{(i - 1) % descriptions + 1}.jpg"
        if i <= descriptions:
            truth = [draw(objects) for _ in range(draw.upto(6))]
            hallu = [word for word in (draw(objects) for _ in range(draw.upto(5)))
                     if word not in truth]  # fmt: skip
            row = {"id": i, "type": "generative", "truth": truth, "hallu": hallu}
            query = "Describe this image."
            answers.append(caption(draw, 3 * truth + hallu + [draw(names) for _ in range(3)], 10))
        else:
            kind = draw(KINDS)
            label = "no" if kind == KINDS[0] else draw(["yes", "no"])
            row = {"id": i, "type": kind, "truth": label}
            query = f"Is there a thing {i} in this image?"
            answers.append(draw(ANSWERS))
        annotations.append(row)
        queries.append({"id": i, "image": image, "query": query})

    data = folder / "data"
    (data / "query").mkdir(parents=True)
    (data / "annotations.json").write_text(json.dumps(annotations))
    (data / "query/query_all.json").write_text(json.dumps(queries))
    (data / "relation.json").write_text(json.dumps(RELATION))
    (data / "safe_words.txt").write_text("\n".join(SAFE))
    (folder / "image").mkdir()
    for i in range(1, descriptions + 1):
        (folder / f"image/AMBER_{i}.jpg").touch()
    return answers


# ------------------------------------------------------------------------------------ the stand-in

IRREGULAR = {"men": "men", "women": "woman", "children": "child", "people": "people"}


def word_tokenize(text):
    return re.findall(r"[\w.]*\w|'s|[^\w\s]", text)


def pos_tag(tokens):
    return [(token, tag_of(token)) for token in tokens]


def tag_of(token):
    if not token[0].isalpha():
        return "."
    for ending, tag in (("ing", "VBG"), ("ed", "VBD"), ("ly", "RB"), ("s", "NNS")):
        if token.endswith(ending):
            return tag
    if token in ("a", "an", "the"):
        return "DT"
    return "NN"


class Lemmatizer:
    def lemmatize(self, word, pos="n"):
        if pos == "v":
            return re.sub("(ing|ed)$", "", word)
        if pos == "n" and word not in IRREGULAR:
            return re.sub("(?<=[sxz])es$|(?<!s)s$", "", word)
        return IRREGULAR.get(word, word)


def tagged(texts):
    return [pos_tag(word_tokenize(text)) for text in texts]


def lemma(word, pos):
    return Lemmatizer().lemmatize(word, pos)


def similarity(first, second):
    """The share of common letters: 6 / 7 for "street" and "tree"."""
    common = set(first) & set(second)
    return 2 * len(common) / (len(set(first)) + len(set(second)))


WORDS = SimpleNamespace(
    tagged=tagged, lemma=lemma, similarity=similarity, check=lambda vectors=False: None
)
