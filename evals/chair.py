"""CHAIR on COCO (Rohrbach et al., 2018): which objects of a caption are not in the picture?

The model describes 500 pictures in detail. CHAIRi is the percentage of the objects it mentions that
are not there, CHAIRs that of the captions with at least one of them: less is better. Recall is the
percentage of the objects in a picture that its caption mentions, length the mean number of tokens:
who says little hallucinates little.

Files: annotations/instances_val2014.json and captions_val2014.json (or both without the folder) and
val2014/ as COCO publishes them, and synonyms.txt, which is data/synonyms.txt of
github.com/LisaAnne/Hallucination: the 80 objects and their other names, an object a line. nltk is
needed (evals/words.py).

There is no official list of 500 pictures. Papers draw their own, mostly by the order of a listed
folder. chair_images.jsonl, if it is there, names them in rows with an "image_id", as published
captions have them, so that such a file is a list. Otherwise 500 pictures are drawn by a fixed seed.

Scored as chair.py of OPERA does it (github.com/shikiw/OPERA, Huang et al., 2024), with its prompt
and its 512 tokens: recent papers on multimodal models share this version. It differs from the code
of 2018 in one point: words are brought to WordNet's base form by their part of speech, where the
older code only makes plurals singular. What is in a picture is what COCO's annotators outlined or
mentioned in a caption.

The trap: verbs count. "seated" becomes "seat", which is a chair, and "skiing" skis. "men" stays
"men", which is no object.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from config import UserError
from evals import words
from evals.files import (
    LARGEST_ID,
    MEND_FILE,
    Row,
    errors_at,
    find_first,
    read_rows,
    read_text,
    read_values,
    write_json_lines,
)

MAX_NEW_TOKENS = 512
PUBLISHED = ("CHAIRs", {"LLaVA-1.5 7B, greedy, on the 500 pictures of OPERA": 45.0})
PROMPT = "Please describe this image in detail."

PICTURES = 500
SEED = 2014

# The part of speech of a word for WordNet, by the first letter of the Treebank's tag.
WORDNET = {"J": "a", "V": "v", "N": "n", "R": "r"}

# Two words that are read as one, and what they are read as: mostly themselves.
PAIRS = (
    "motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, "
    "fire hydrant, stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, "
    "tennis racket, wine glass, hot dog, cell phone, mobile phone, teddy bear, hair drier, "
    "potted plant, laptop computer, home plate, train track"
).split(", ")
READ_AS = {pair: pair for pair in PAIRS}
READ_AS |= {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}

# A baby elephant is no person, and neither is a passenger jet.
ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
for animal in ANIMALS:
    READ_AS |= {f"baby {animal}": animal, f"adult {animal}": animal}
for vehicle in ("jet", "train"):
    READ_AS[f"passenger {vehicle}"] = vehicle


def examples(data_dir):
    """Return a question about each picture; "label" has the names of the objects in it.

    Own keys: "image_id"; "names": {name: object}, one dict for all.
    """
    names = read_names(Path(data_dir) / "synonyms.txt")
    instances = find_first(data_dir, "annotations/instances_val2014.json", "instances_val2014.json")
    images, categories, outlines = read_parts(instances, "images", "categories", "annotations")
    files = {}
    for where, row in images:
        files[row.integer("id", 0, LARGEST_ID)] = (where, row.file("file_name"))
    chosen = choose(Path(data_dir) / "chair_images.jsonl", files)

    shown = {image: set() for image in chosen}
    add_outlined(shown, categories, outlines, names)
    add_mentioned(shown, instances.with_name("captions_val2014.json"), names)

    found = []
    for image in chosen:
        where, file = files[image]
        found.append(
            {
                "id": str(image),
                "image": f"val2014/{file}",
                "prompt": PROMPT,
                "label": sorted(shown[image]),
                "image_id": image,
                "names": names,
                "where": where,
            }
        )
    return found


def read_names(file):
    """Return {name: object} of synonyms.txt; the last line that has a name counts."""
    if not file.exists():
        fix = "take data/synonyms.txt of github.com/LisaAnne/Hallucination"
        raise UserError(file, "no such file: the names of COCO's objects", fix)

    names = {}
    for line in read_text(file).splitlines():
        synonyms = line.strip().split(", ")
        for name in synonyms:
            names[name] = synonyms[0]
    return names


def choose(file, images):
    """Return the ids of the pictures that are asked about: those of the file, if it is there."""
    if not file.exists():
        # Of Python's generators only random() is promised to stay the same.
        draw = random.Random(SEED).random
        drawn = {image: draw() for image in sorted(images)}
        return sorted(drawn, key=drawn.get)[:PICTURES]

    chosen = []
    for where, row in read_rows(file):
        image = row.integer("image_id", 0, LARGEST_ID)
        if image not in images:
            what = f"picture {image} is not in instances_val2014.json"
            raise UserError(where, what, "name pictures of val2014")
        chosen.append(image)
    return chosen


def read_parts(file, *parts):
    """Return for each of these lists in a file of COCO its [("file:row", Row)]."""
    # The file is large, so it is read once.
    whole = read_values(file)
    lists = []
    for part in parts:
        values = whole.get(part)
        if not isinstance(values, list):
            raise UserError(file, f"not as published: it has no list {part!r}", MEND_FILE)
        rows = [Row(value, f"{file}:{i}", part) for i, value in enumerate(values)]
        lists.append([(row.where, row) for row in rows])
    return lists


def add_outlined(shown, categories, outlines, names):
    """Add to `shown` {image: objects} what COCO's annotators outlined."""
    objects = {}
    for where, row in categories:
        with errors_at(where):
            objects[row.integer("id", 0, LARGEST_ID)] = names[row.text("name")]

    for where, row in outlines:
        with errors_at(where):
            image = row.integer("image_id", 0, LARGEST_ID)
            if image in shown:
                shown[image].add(objects[row.integer("category_id", 0, LARGEST_ID)])


def add_mentioned(shown, file, names):
    """Add to `shown` {image: objects} what COCO's annotators mentioned in their captions."""
    (rows,) = read_parts(file, "annotations")
    images = []
    captions = []
    for _, row in rows:
        image = row.integer("image_id", 0, LARGEST_ID)
        if image in shown:
            images.append(image)
            captions.append(row.text("caption"))

    for image, caption in zip(images, read_captions(captions, names), strict=True):
        shown[image].update(caption.objects)


@dataclass(frozen=True)
class Caption:
    """What a caption says: its objects, each as often as it is mentioned, and its length."""

    objects: list[str]
    tokens: int


def read_captions(texts, names):
    """Return the Caption of each text; names: {name: object}."""
    read = []
    for tokens in words.tagged([text.lower() for text in texts]):
        lemmas = [words.lemma(word, WORDNET.get(tag[:1], "n")) for word, tag in tokens]
        joined = join_pairs(lemmas)

        # "The seat of the toilet" is no chair.
        said = joined
        if "toilet" in said:
            said = [word for word in said if word != "seat"]
        objects = [names[word] for word in said if word in names]
        read.append(Caption(objects, len(joined)))
    return read


def join_pairs(said):
    """Return the words, with those pairs that mean one thing as one word, from left to right."""
    joined = []
    i = 0
    while i < len(said):
        pair = " ".join(said[i : i + 2])
        if pair in READ_AS:
            joined.append(READ_AS[pair])
            i += 2
        else:
            joined.append(said[i])
            i += 1
    return joined


def score(examples, answers):
    """Return CHAIRs, CHAIRi, recall and length; a ratio of nothing is 0."""
    captions = read_captions(answers, examples[0]["names"])

    mentioned = 0
    hallucinated = 0
    with_hallucination = 0
    present = 0
    recalled = 0
    tokens = 0
    for example, caption in zip(examples, captions, strict=True):
        truth = set(example["label"])
        wrong = [name for name in caption.objects if name not in truth]
        mentioned += len(caption.objects)
        hallucinated += len(wrong)
        with_hallucination += bool(wrong)
        present += len(truth)
        recalled += len(truth & set(caption.objects))
        tokens += caption.tokens

    # The official code prints a hundredth of the length as if it were a ratio.
    reached = {
        "CHAIRs": with_hallucination / len(captions),
        "CHAIRi": hallucinated / max(mentioned, 1),
        "recall": recalled / max(present, 1),
        "length": 0.01 * tokens / len(captions),
    }
    scores = {}
    for name, ratio in reached.items():
        scores[name] = {"score": 100 * ratio, "chance": None, "n": len(captions)}
    return scores


def write(examples, answers, stem, data_dir):
    """Write STEM-captions.jsonl as the official chair.py reads it (--cap_file)."""
    rows = []
    for example, answer in zip(examples, answers, strict=True):
        rows.append({"image_id": example["image_id"], "caption": answer})
    file = Path(f"{stem}-captions.jsonl")
    write_json_lines(file, rows)
    return [file]
