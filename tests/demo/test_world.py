"""The demo world: the same bytes for a seed, nothing held out in training, true answers."""

import itertools
import json
import random
from collections import Counter, defaultdict

import pytest
from PIL import Image

from demo import scenes, world
from inputs.tokenizer import load_tokenizer
from tests.tools.demo_world import asked, digest
from tests.tools.environment import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "data"
    world.write(out, seed=3, scenes=1000)
    return out


def rows(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def benchmark(folder):
    files = sorted((folder / "benchmark").glob("*.jsonl"))
    return {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files
    }


def truth(question, scene):
    """Return the answer from the words and the boxes, with nothing of the world's own logic."""
    words = question.rstrip("?").split()
    colours = [thing["colour"] for thing in scene]
    shapes = [thing["shape"] for thing in scene]
    numbers = ["zero", "one", "two", "three"]
    if question.startswith("Is there"):
        return "yes" if (words[3], words[4]) in set(zip(colours, shapes, strict=True)) else "no"
    if question.startswith("What colour"):
        # This fails if the question is ambiguous.
        (index,) = [i for i, shape in enumerate(shapes) if shape == words[4]]
        return colours[index]
    if question.startswith("What shape"):
        (index,) = [i for i, colour in enumerate(colours) if colour == words[4]]
        return shapes[index]
    if question.startswith("How many"):
        # "objects", "red objects" or "circles".
        if words[2] == "objects":
            return numbers[len(scene)]
        if words[3] == "objects":
            return numbers[colours.count(words[2])]
        return numbers[shapes.count(words[2].removesuffix("s"))]

    # "Is the red circle left or right of the blue square?", by the middles of the boxes.
    (a,) = [t for t in scene if [t["colour"], t["shape"]] == words[2:4]]
    (b,) = [t for t in scene if [t["colour"], t["shape"]] == words[-2:]]
    axis = 0 if words[4] == "left" else 1
    middle_of_a = a["box"][axis] + a["box"][axis + 2]
    middle_of_b = b["box"][axis] + b["box"][axis + 2]
    if middle_of_a < middle_of_b:
        return words[4]
    return words[6]


def spelled_out(note):
    """The question that a caption's note answers."""
    words = note.split()
    if " or " in note:
        of = "of the" if words[2] == "left" else "the"
        return f"Is the {' '.join(words[:5])} {of} {' '.join(words[5:])}?"
    if words[-1] == "colour":
        return f"What colour is the {words[0]}?"
    if words[-1] == "shape":
        return f"What shape is the {words[0]} object?"
    if note.endswith("s"):
        return f"How many {note} are there?"
    return f"Is there a {note}?"


def test_same_seed_same_bytes_from_the_command_line(folder, tmp_path):
    """In another process, whose sets have another order."""
    run("-m", "demo.world", tmp_path / "again", "--seed", 3, "--scenes", 1000, PYTHONHASHSEED="7")
    assert digest(tmp_path / "again") == digest(folder)


def test_another_seed_other_scenes(folder):
    other = world.make_benchmark(random.Random("4/benchmark"))["attributes"]
    same = [
        row["scene"] == scene
        for row, (_, scene) in zip(benchmark(folder)["attributes"], other, strict=False)
    ]
    assert sum(same) < 3


def compositions(of_rows):
    return {scenes.composition(row["scene"]) for row in of_rows}


def test_held_out_compositions_are_in_no_training_picture(folder):
    train = compositions(rows(folder, "pretrain") + rows(folder, "finetune"))
    val = compositions(rows(folder, "val") + rows(folder, "val_pretrain"))
    held = compositions(itertools.chain.from_iterable(benchmark(folder).values()))
    assert not train & held
    assert not train & val
    assert not val & held
    assert len(held) > 40
    assert len(val) > 10

    # Each object itself has been seen.
    seen_alone = set(itertools.chain.from_iterable(train))
    assert seen_alone == set(scenes.PAIRS)


def test_every_answer_is_true(folder):
    count = 0
    for name in ("finetune", "val"):
        for row in rows(folder, name):
            turns = asked(row)
            texts = {question for question, _ in turns}
            assert 6 <= len(turns) <= 8
            assert len(texts) == len(turns)
            for question, answer in turns:
                assert answer == truth(question, row["scene"]), (row["id"], question)
                count += 1
    for file in benchmark(folder).values():
        for row in file:
            assert row["label"] == truth(row["text"], row["scene"]), row
            assert row["label"] in row["choices"]
    assert count > 5000


def test_captions_list_every_object_or_note_true_answers(folder):
    listed = notes = 0
    captions = rows(folder, "pretrain") + rows(folder, "val_pretrain")
    for row in captions:
        ((_, text),) = asked(row)
        assert len(row["scene"]) == row["objects"]
        if text.startswith("There "):
            listed += 1
            for thing in row["scene"]:
                assert "a {size} {colour} {shape} {at}".format(**thing, at=place(thing)) in text
            assert text.count(" a ") == row["objects"]
        else:
            for note in text.rstrip(".").split(". "):
                notes += 1
                question, answer = spelled_out(note.partition(": ")[0]), note.partition(": ")[2]
                assert answer == truth(question, row["scene"]), (row["id"], note)
    assert 0.25 < listed / len(captions) < 0.42
    assert notes > 2000
    assert all(row["objects"] == 1 for row in rows(folder, "pretrain")[:75])


def place(thing):
    """Where the middle of an object lies, from its box."""
    left, top, right, bottom = thing["box"]
    x = int((left + right) / 2 // (scenes.IMAGE_SIZE / 2))
    y = int((top + bottom) / 2 // (scenes.IMAGE_SIZE / 2))
    return f"at the {('top', 'bottom')[y]} {('left', 'right')[x]}"


def test_pictures_show_the_objects(folder):
    for row in rows(folder, "finetune")[:200] + benchmark(folder)["attributes"][:100]:
        image = Image.open(folder / "images" / row["image"])
        assert image.size == (48, 48) and image.mode == "RGB"

        # The first corner is free unless the first object is there.
        background = image.getpixel((47, 47))
        if row["scene"][0]["cell"] != [0, 0]:
            background = image.getpixel((0, 0))
        for thing in row["scene"]:
            left, top, right, bottom = thing["box"]
            assert 0 < left < right < 48 and 0 < top < bottom < 48
            colour = scenes.COLOURS[thing["colour"]]
            middle = (int((left + right) / 2), int((top + bottom) / 2))
            assert image.getpixel(middle) == colour

            # The top left corner of its box belongs to a square only, the bottom left one to all
            # but a circle. A triangle is so thin there that a pixel may be mixed.
            top_corner = image.getpixel((int(left + 1), int(top + 1)))
            bottom_corner = image.getpixel((int(left + 1), int(bottom - 1)))
            assert (top_corner == colour) == (thing["shape"] == "square")
            if thing["shape"] == "circle":
                assert bottom_corner != colour
            elif thing["shape"] == "square":
                assert bottom_corner == colour
            else:
                assert image.getpixel((int(left + 2), int(bottom - 1))) != background


def test_training_answers_are_balanced(folder):
    answers = defaultdict(Counter)
    kinds = Counter()
    for row in rows(folder, "finetune"):
        for question, answer in asked(row):
            answers[question][answer] += 1
            kinds[" ".join(question.split()[:2])] += 1
    for question, counts in answers.items():
        if question.startswith("Is there"):
            assert 0.45 < counts["yes"] / counts.total() < 0.55, question

    # Each text about a relation is too rare here to be judged alone.
    directions = Counter()
    for question, counts in answers.items():
        if question.startswith("Is the "):
            directions.update(counts)
    for one, other in (("left", "right"), ("above", "below")):
        assert 0.4 < directions[one] / (directions[one] + directions[other]) < 0.6

    for word in ("What", "How"):
        of_word = [counts for question, counts in answers.items() if question.startswith(word)]
        most_frequent = sum(max(counts.values()) for counts in of_word)
        total = sum(counts.total() for counts in of_word)
        assert most_frequent / total < 0.45, word
    assert min(kinds.values()) > 250  # no kind is rare


def test_text_alone_gets_chance_in_the_benchmark(folder):
    """Whatever the training rows say: each text comes equally often with each of its answers."""
    stated = json.loads((folder / "benchmark" / "text_only.json").read_text())
    for name, file in benchmark(folder).items():
        answers = defaultdict(Counter)
        for row in file:
            answers[row["text"]][row["label"]] += 1
        for text, counts in answers.items():
            assert len(set(counts.values())) == 1, text
        if name == "attributes":
            kinds = Counter(row["kind"] for row in file)
            assert kinds.keys() == {"colour", "shape", "count", "relation"}
            assert min(kinds.values()) >= 150
            assert stated[name] < 35
        else:
            assert len(file) == 300
            assert stated[name] == 50
    assert stated["colour"] == 25
    assert stated["relation"] == 50
    assert stated["shape"] == pytest.approx(33.33)


def test_negatives_are_of_their_kind(folder):
    files = benchmark(folder)
    for name in ("random", "popular", "adversarial"):
        for row in files[f"existence_{name}"]:
            pair = tuple(row["text"].rstrip("?").split()[3:5])
            beside = set()
            for thing in row["scene"]:
                beside.update((thing["colour"], thing["shape"]))
            if name == "popular":
                assert pair in scenes.POPULAR
            if name == "adversarial" and row["label"] == "no":
                assert beside.intersection(pair)


def test_tokenizer(folder):
    tok = load_tokenizer(folder / "tokenizer")
    assert tok.vocab_size <= 512 and tok.eos == "<eos>" and tok.token_id("<eos>") == tok.eos_id
    for text in (
        "Is there a red circle?",
        "Größe: 日本 🙂\n\ttabs  spaces",
        "x" * 50,
        "".join(map(chr, range(1, 256))),
    ):
        assert tok.decode(tok.encode(text, special=False)[0]) == text

    words = set()
    for row in rows(folder, "finetune"):
        for question, answer in asked(row):
            words.update(question.rstrip("?").split())
            words.update(answer.split())
    for word in words:
        assert len(tok.encode(" " + word)[0]) == 1, word
    assert len(tok.encode("USER: yes ASSISTANT: no<eos>")[0]) == 7


def test_refuses_to_overwrite_and_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already; fix:"):
        world.write(tmp_path / "there", scenes=10)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(world, "make_benchmark", fail)
    with pytest.raises(OSError, match="disk full"):
        world.write(tmp_path / "new", scenes=10)
    assert [f.name for f in tmp_path.iterdir()] == ["there"]
