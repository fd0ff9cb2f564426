"""The embedded demo world: small pictures of shapes with questions about them, written as LLaVA files.

    python -m demo.world out/world                       # the demo's data set: 24,000 training scenes
    python -m demo.world out/world --seed 1 --scenes 2000

A scene is one to three objects (colour, shape, size) on a 2 x 2 grid. Its *composition* is the multiset of
(colour, shape), and a hash of it decides where the scene may appear, so nothing that is measured was trained
on: the benchmark asks about combinations of objects the model has never seen together. Written to OUT:

    images/{pretrain,finetune,val,benchmark}/*.png
    pretrain.json                  dense captions, where a model learns to see: lists of objects, and notes
    finetune.json                  6-8 questions per picture with short answers
    val.json  val_pretrain.json    held-out rows of both sorts, for the validation loss
    tokenizer/                     a byte-level BPE of 512 entries, trained on the rows above
    benchmark/existence_*.jsonl    yes/no, in the row format and with the three kinds of negatives of POPE
    benchmark/attributes.jsonl     colour, shape, count, relation: one-word answers
    benchmark/text_only.json       what the best answer to the words alone reaches there
    world.json                     seed and sizes; written last

Every row keeps its objects under "scene" (colour, shape, size, cell [row, column], box in pixels). The same
seed writes the same bytes.
"""

import itertools
import json
import os
import random
import shutil
import sys
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import config

IMAGE_SIZE = 48  # pixels: a cell of the grid is 24, one patch of the demo's encoder
GRID = 2
SCALE = 4  # drawn four times larger and averaged down, for clean edges
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 190, 20),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"large": 19, "small": 12}  # pixels across
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
# Drawn twice as often as the others, so that "popular" negatives mean something.
POPULAR = [("red", "circle"), ("green", "triangle"), ("blue", "square"), ("yellow", "circle")]
REPEAT = 0.5  # how often a further object takes the first one's colour or shape: counts and confusions need it
NUMBERS = ("zero", "one", "two", "three")
DIRECTIONS = (("above", "below"), ("left", "right"))  # of rows, of columns
POSITIONS = (("at the top left", "at the top right"), ("at the bottom left", "at the bottom right"))

SCENES = 24_000  # training scenes, half with captions and half with questions
EASY_SHARE = 0.15  # captions of scenes with a single object: the easiest to learn from
VAL_SCENES = 300
EXISTENCE_QUESTIONS = 300  # per split
ATTRIBUTE_QUESTIONS = 150  # per kind
TURNS = (6, 8)  # questions per picture, at least and at most
NOTES = (8, 12)  # the same, for the notes of a caption
LISTED = 1 / 3  # share of the captions that list the objects instead
OBJECTS = (1, 3, 4)  # weights of one, two and three objects: with one there is little to ask
BENCHMARK_PERCENT, VAL_PERCENT = 12, 4  # of all compositions; the rest is for training
SALT = 1970  # of the hash that deals them out; chosen so that every answer to every question can be held out

VOCAB_SIZE = 512
EOS = "<eos>"


class Question(NamedTuple):
    kind: str
    text: str
    answer: str
    choices: tuple  # every answer that this text can have
    note: str  # what a caption says before the answer
    about: tuple = ()  # the objects whose colour, shape or relation it tells


# ---------------------------------------------------------------------------------------------- scenes


def composition(scene):
    """What a scene is made of, wherever it stands: its sorted (colour, shape) pairs."""
    return tuple(sorted((thing["colour"], thing["shape"]) for thing in scene))


def split_of(scene):
    """`train`, `val` or `benchmark`: a fixed function of the composition alone, the same for every seed."""
    number = zlib.crc32(repr((SALT, composition(scene))).encode()) % 100
    if number < BENCHMARK_PERCENT:
        return "benchmark"
    return "val" if number < BENCHMARK_PERCENT + VAL_PERCENT else "train"


def draw_scene(rng, split, count=None):
    """A random scene of `split` with `count` objects (None: one to three), in reading order."""
    weights = [2 if pair in POPULAR else 1 for pair in PAIRS]
    while True:
        n = count or rng.choices((1, 2, 3), weights=OBJECTS)[0]
        pairs = rng.choices(PAIRS, weights=weights, k=n)
        for i in range(1, n):
            if rng.random() < REPEAT:
                colour, shape = pairs[i]
                pairs[i] = (pairs[0][0], shape) if rng.random() < 0.5 else (colour, pairs[0][1])
        if split_of([{"colour": colour, "shape": shape} for colour, shape in pairs]) == split:
            break
    cells = sorted(rng.sample(range(GRID * GRID), n))
    return [place(rng, pair, divmod(cell, GRID)) for pair, cell in zip(pairs, cells, strict=True)]


def place(rng, pair, cell):
    """One object, moved from the middle of its cell by up to a pixel, in quarters."""
    size = rng.choice(list(SIZES))
    width = SIZES[size] * SCALE
    margin = (IMAGE_SIZE // GRID * SCALE - width) // 2
    top, left = (IMAGE_SIZE // GRID * SCALE * c + margin + rng.randint(-SCALE, SCALE) for c in cell)
    box = [edge / SCALE for edge in (left, top, left + width, top + width)]
    return {"colour": pair[0], "shape": pair[1], "size": size, "cell": list(cell), "box": box}


def render(scene, background):
    """The picture of a scene, (IMAGE_SIZE, IMAGE_SIZE) RGB."""
    image = Image.new("RGB", (IMAGE_SIZE * SCALE, IMAGE_SIZE * SCALE), background)
    draw = ImageDraw.Draw(image)
    for thing in scene:
        left, top, right, bottom = (edge * SCALE for edge in thing["box"])
        colour = COLOURS[thing["colour"]]
        if thing["shape"] == "circle":
            draw.ellipse((left, top, right, bottom), fill=colour)
        elif thing["shape"] == "square":
            draw.rectangle((left, top, right, bottom), fill=colour)
        else:
            draw.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=colour)
    return image.reduce(SCALE)


# ------------------------------------------------------------------------------------ words about a scene


def caption(scene, rng, balance):
    """What pretraining says of a scene: one time in three a sentence that lists the objects, else notes.

    A list in random order, so that each word must be looked up by what was said before it, not by counting along.
    Notes are the answers to questions in fewer words than a question takes. Never both: notes behind a list could
    be copied from the text, and nothing would be learned about the picture.
    """
    if rng.random() < LISTED:
        things = [
            "a {size} {colour} {shape} ".format(**thing)
            + POSITIONS[thing["cell"][0]][thing["cell"][1]]
            for thing in rng.sample(scene, len(scene))
        ]
        listed = f"{', '.join(things[:-1])} and {things[-1]}" if len(things) > 1 else things[0]
        return f"There {'is' if len(things) == 1 else 'are'} {NUMBERS[len(things)]}: {listed}."
    return ". ".join(f"{q.note}: {q.answer}" for q in interview(scene, rng, balance, NOTES)) + "."


def questions(scene):
    """Every question that has exactly one right answer in this scene."""
    pairs, asked = Counter(composition(scene)), []
    colours, shapes = (Counter(thing[key] for thing in scene) for key in ("colour", "shape"))
    for colour, shape in PAIRS:
        there = "yes" if (colour, shape) in pairs else "no"
        asked.append(
            Question(
                "existence",
                existence_text((colour, shape)),
                there,
                ("yes", "no"),
                f"{colour} {shape}",
            )
        )
    for i, thing in enumerate(scene):
        colour, shape = thing["colour"], thing["shape"]
        if shapes[shape] == 1:
            text, note = f"What colour is the {shape}?", f"{shape} colour"
            asked.append(Question("colour", text, colour, tuple(COLOURS), note, (i,)))
        if colours[colour] == 1:
            text, note = f"What shape is the {colour} object?", f"{colour} shape"
            asked.append(Question("shape", text, shape, SHAPES, note, (i,)))
    counts = (
        {"objects": len(scene)}
        | {f"{c} objects": colours[c] for c in COLOURS}
        | {f"{s}s": shapes[s] for s in SHAPES}
    )
    for what, n in counts.items():
        choices = NUMBERS if what != "objects" else NUMBERS[1:]
        asked.append(Question("count", f"How many {what} are there?", NUMBERS[n], choices, what))
    unique = [i for i, thing in enumerate(scene) if pairs[thing["colour"], thing["shape"]] == 1]
    for i, j in itertools.permutations(unique, 2):
        a, b = ("{colour} {shape}".format(**scene[k]) for k in (i, j))
        for axis, words in enumerate(DIRECTIONS):
            at, of = scene[i]["cell"][axis], scene[j]["cell"][axis]
            if at != of:
                ask = f"{a} {words[0]} or {words[1]}"
                text, note = (
                    f"Is the {ask} of the {b}?" if axis else f"Is the {ask} the {b}?",
                    f"{ask} {b}",
                )
                asked.append(
                    Question(
                        "relation", text, words[at > of], words, note, (axis, min(i, j), max(i, j))
                    )
                )
    return asked


def existence_text(pair):
    return f"Is there a {pair[0]} {pair[1]}?"


def negatives(scene):
    """Absent (colour, shape) pairs by how tempting they are: POPE's random, popular and adversarial.

    POPE's adversarial negatives are the objects that most often occur beside those in the picture; here they
    are those with the colour of one object and the shape of no such one, or the other way round.
    """
    absent = [pair for pair in PAIRS if pair not in composition(scene)]
    seen = {value for pair in composition(scene) for value in pair}
    return {
        "random": absent,
        "popular": [pair for pair in absent if pair in POPULAR],
        "adversarial": [pair for pair in absent if seen.intersection(pair)],
    }


class Balance:
    """Keeps the answers to each question text evenly used, so that the words alone give little away."""

    def __init__(self):
        self.answers = defaultdict(Counter)  # question text -> answer -> times asked
        self.kinds = defaultdict(Counter)

    def pick(self, rng, candidates):
        """The candidate whose answer lags furthest behind its even share among the answers to that text."""
        rng.shuffle(candidates)

        def surplus(q):
            used = self.answers[q.text]
            return used[q.answer] - used.total() / len(q.choices)

        best = min(candidates, key=surplus)
        self.answers[best.text][best.answer] += 1
        self.kinds[best.kind][best.answer] += 1
        return best

    def majority(self, question):
        """What a reader of the training rows who never sees a picture would answer."""
        counts = self.answers.get(question.text) or self.kinds[question.kind]
        counts = {answer: n for answer, n in counts.items() if answer in question.choices}
        return max(sorted(counts), key=counts.get)


def interview(scene, rng, balance, turns=TURNS):
    """The questions asked about one training scene, `turns` at least and at most, in random order."""
    by_kind = defaultdict(list)
    for question in questions(scene):
        by_kind[question.kind].append(question)
    least, most = turns
    # One existence question per distinct object, each "yes" or "no" by a fair coin: then the answers to the
    # earlier ones say nothing about the next (with more, the objects that can be a "yes" would run out).
    plan = ["existence"] * len(set(composition(scene)))
    plan += ["relation", "relation", "colour", "shape", "count", "relation", "colour", "shape"] + [
        "count"
    ] * least
    chosen = []
    for i, kind in enumerate(plan):
        # Nothing is asked again in other words: the answer would be found in the text, not in the picture.
        told = {q.about for q in chosen if q.about}
        candidates = [q for q in by_kind[kind] if q not in chosen and q.about not in told]
        if kind == "existence":
            answer = rng.choice(("yes", "no"))
            candidates = [q for q in candidates if q.answer == answer]
            if answer == "no":
                tempting = [
                    existence_text(pair) for pair in rng.choice(list(negatives(scene).values()))
                ]
                candidates = [q for q in candidates if q.text in tempting] or candidates
        if candidates and len(chosen) < (most if i < len(plan) - least else least):
            chosen.append(balance.pick(rng, candidates))
    rng.shuffle(chosen)
    return chosen


# ------------------------------------------------------------------------------------------------ files


def make_row(name, image, scene, turns):
    """One LLaVA row; `turns` is a list of (question, answer)."""
    conversations = []
    for i, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": ("<image>\n" if i == 0 else "") + question})
        conversations.append({"from": "gpt", "value": answer})
    return {
        "id": name,
        "image": image,
        "objects": len(scene),
        "conversations": conversations,
        "scene": scene,
    }


def caption_row(name, image, scene, rng, balance):
    return make_row(name, image, scene, [("Describe the scene.", caption(scene, rng, balance))])


def question_row(name, image, scene, rng, balance):
    return make_row(
        name, image, scene, [(q.text, q.answer) for q in interview(scene, rng, balance)]
    )


def make_benchmark(rng):
    """{file name: [(Question, scene)]}. Every text comes once with each of its possible answers, each time
    with another scene, so whoever answers from the words alone gets exactly the chance level."""
    total = 3 * EXISTENCE_QUESTIONS + 4 * ATTRIBUTE_QUESTIONS
    scenes = [draw_scene(rng, "benchmark") for _ in range(2 * total)]
    where, texts, choices = defaultdict(list), defaultdict(set), {}
    for i, scene in enumerate(scenes):
        for question in questions(scene):
            where[question.text, question.answer].append((i, question))
            texts[question.kind].add(question.text)
            choices[question.text] = question.choices
    used = set()

    def block(text, fits):
        """[(number of the scene, Question)] with each answer to `text` once, or None."""
        found = []
        for answer in choices[text]:
            free = (
                (i, q)
                for i, q in where[text, answer]
                if i not in used and (answer != "no" or fits(text, scenes[i]))
            )
            found.append(next(free, None))
        return found if all(found) else None

    def fill(texts, total, fits=None):
        """Goes round the texts, adding a block of each, until there are `total` questions."""
        rows, texts = [], sorted(texts)
        rng.shuffle(texts)
        while len(rows) < total:
            before = len(rows)
            for text in texts:
                found = block(text, fits) if len(rows) < total else None
                for i, question in found or []:
                    used.add(i)
                    rows.append((question, scenes[i]))
            if len(rows) == before:
                raise RuntimeError(f"too few held-out scenes for questions like {texts[0]!r}")
        rng.shuffle(rows)
        return rows

    files = {}
    for name in ("random", "popular", "adversarial"):
        tempting = lambda text, scene, name=name: (
            text in map(existence_text, negatives(scene)[name])
        )  # noqa: E731
        pairs = (
            POPULAR if name == "popular" else PAIRS
        )  # no other has a fitting "no": looking for one takes long
        files[f"existence_{name}"] = fill(map(existence_text, pairs), EXISTENCE_QUESTIONS, tempting)
    kinds = ("colour", "shape", "count", "relation")
    files["attributes"] = [row for kind in kinds for row in fill(texts[kind], ATTRIBUTE_QUESTIONS)]
    return files


def text_only(files, balance):
    """Percent of each benchmark file, and of each kind of attribute, that the words alone get right."""
    right = defaultdict(list)
    for name, rows in files.items():
        for question, _ in rows:
            for key in {name, question.kind} - {"existence"}:
                right[key].append(question.answer == balance.majority(question))
    return {key: round(100 * sum(values) / len(values), 2) for key, values in sorted(right.items())}


def train_tokenizer(rows, folder):
    """A byte-level BPE (any text comes back exactly) in which the world's words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = {
        "human": "USER: ",
        "gpt": " ASSISTANT: ",
    }  # the words of the chat templates, so they are cheap too
    texts = (
        "".join(roles[turn["from"]] + turn["value"] for turn in row["conversations"])
        for row in rows
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def fill_folder(out, seed, scenes):
    # One stream of random numbers per file, so that changing one's size leaves the others as they were.
    streams = {
        name: random.Random(f"{seed}/{name}")
        for name in ("pretrain", "finetune", "val", "benchmark")
    }
    balance, notes, val_balance, val_notes = Balance(), Balance(), Balance(), Balance()
    pretrain, finetune, val, val_pretrain = [], [], [], []
    started, done = time.monotonic(), 0
    for name in streams:
        (out / "images" / name).mkdir(parents=True)
    (out / "benchmark").mkdir()

    def picture(split, number, scene):
        nonlocal done
        image = f"{split}/{number:05d}.png"
        background = tuple(streams[split].randint(225, 250) for _ in "rgb")
        render(scene, background).save(
            out / "images" / image, compress_level=1
        )  # small files anyway; speed matters
        done += 1
        if sys.stdout.isatty() and done % 500 == 0:
            print(
                f"\r{out.name}: {done:,} pictures, {done / (time.monotonic() - started):.0f}/s",
                end="",
                flush=True,
            )
        return image

    n_pretrain = scenes // 2
    for i in range(n_pretrain):
        scene = draw_scene(streams["pretrain"], "train", 1 if i < EASY_SHARE * n_pretrain else None)
        image = picture("pretrain", i, scene)
        pretrain.append(caption_row(f"pretrain-{i:05d}", image, scene, streams["pretrain"], notes))
    for i in range(scenes - n_pretrain):
        scene = draw_scene(streams["finetune"], "train")
        image = picture("finetune", i, scene)
        finetune.append(
            question_row(f"finetune-{i:05d}", image, scene, streams["finetune"], balance)
        )
    for i in range(VAL_SCENES):
        scene = draw_scene(streams["val"], "val")
        image = picture("val", i, scene)
        val.append(question_row(f"val-{i:05d}", image, scene, streams["val"], val_balance))
        val_pretrain.append(
            caption_row(f"val-pretrain-{i:05d}", image, scene, streams["val"], val_notes)
        )

    benchmark, number = make_benchmark(streams["benchmark"]), 0
    for name, rows in benchmark.items():
        lines = []
        for i, (question, scene) in enumerate(rows):
            row = {
                "question_id": i + 1,
                "image": picture("benchmark", number, scene),
                "text": question.text,
            }
            row |= {"label": question.answer, "kind": question.kind, "choices": question.choices}
            lines.append(json.dumps(row | {"objects": len(scene), "scene": scene}))
            number += 1
        (out / "benchmark" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    words = text_only(benchmark, balance)
    (out / "benchmark" / "text_only.json").write_text(json.dumps(words, indent=2) + "\n")

    files = {"pretrain": pretrain, "finetune": finetune, "val": val, "val_pretrain": val_pretrain}
    for name, rows in files.items():
        (out / f"{name}.json").write_text(
            "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
        )
    train_tokenizer(pretrain + finetune, out / "tokenizer")
    summary = {"seed": seed, "scenes": scenes, "image_size": IMAGE_SIZE}
    summary |= {"rows": {name: len(rows) for name, rows in {**files, **benchmark}.items()}}
    (out / "world.json").write_text(json.dumps(summary, indent=2) + "\n")
    if sys.stdout.isatty():
        print(f"\r{out.name}: {done:,} pictures in {time.monotonic() - started:.0f} s")


def write(out, seed=0, scenes=SCENES, fill=fill_folder):
    """Writes the whole data set to the new folder `out` with `fill`; nothing is left there if it does not finish."""
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out}: exists already; fix: remove it or name another folder")
    temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")
    try:
        fill(temporary, seed, scenes)
        # The pictures are not fsynced one by one: after a power cut the same seed makes them again.
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(doc=__doc__, scenes=SCENES, fill=fill_folder):
    """The command of this file, and of moving.py, whose `fill` makes clips of the scenes."""
    parser = config.parser(doc)
    parser.add_argument("out", metavar="OUT", help="new folder to write")
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed, another data set (default 0)"
    )
    parser.add_argument(
        "--scenes", type=int, default=scenes, help=f"how many to train on (default {scenes})"
    )
    args = parser.parse_args()
    try:
        write(args.out, args.seed, args.scenes, fill)
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
