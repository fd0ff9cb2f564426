"""The demo world: the same bytes for a seed, nothing held out in training, true answers."""

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
        (index,) = [
            i for i, shape in enumerate(shapes) if shape == words[4]
        ]  # fails if it is ambiguous
        return colours[index]
    if question.startswith("What shape"):
        (index,) = [i for i, colour in enumerate(colours) if colour == words[4]]
        return shapes[index]
    if question.startswith("How many"):
        noun = words[2] if words[2] != "objects" and words[3] != "objects" else None
        if noun:
            return numbers[sum(shape + "s" == noun for shape in shapes)]
        return numbers[sum(words[2] in ("objects", colour) for colour in colours)]
    (a,), (b,) = (
        [t for t in scene if [t["colour"], t["shape"]] == pair] for pair in (words[2:4], words[-2:])
    )
    axis = 0 if words[4] == "left" else 1
    return (
        words[4]
        if a["box"][axis] + a["box"][axis + 2] < b["box"][axis] + b["box"][axis + 2]
        else words[6]
    )


def spelled_out(note):
    """The question that a caption's note answers."""
    words = note.split()
    if " or " in note:
        of = "of the" if words[2] == "left" else "the"
        return f"Is the {' '.join(words[:5])} {of} {' '.join(words[5:])}?"
    if words[-1] in ("colour", "shape"):
        return f"What {words[1]} is the {words[0]}{' object' if words[1] == 'shape' else ''}?"
    return f"How many {note} are there?" if note.endswith("s") else f"Is there a {note}?"


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


def test_held_out_compositions_are_in_no_training_picture(folder):
    train = {
        scenes.composition(row["scene"])
        for name in ("pretrain", "finetune")
        for row in rows(folder, name)
    }
    val = {
        scenes.composition(row["scene"])
        for name in ("val", "val_pretrain")
        for row in rows(folder, name)
    }
    held = {scenes.composition(row["scene"]) for file in benchmark(folder).values() for row in file}
    assert not train & held and not train & val and not val & held
    assert len(held) > 40 and len(val) > 10
    assert {pair for scene in train for pair in scene} == set(
        scenes.PAIRS
    )  # each object itself has been seen


def test_every_answer_is_true(folder):
    count = 0
    for name in ("finetune", "val"):
        for row in rows(folder, name):
            assert 6 <= len(asked(row)) <= 8 and len(
                {question for question, _ in asked(row)}
            ) == len(asked(row))
            for question, answer in asked(row):
                assert answer == truth(question, row["scene"]), (row["id"], question)
                count += 1
    for file in benchmark(folder).values():
        for row in file:
            assert row["label"] == truth(row["text"], row["scene"]), row
            assert row["label"] in row["choices"]
    assert count > 5000


def test_captions_list_every_object_or_note_true_answers(folder):
    listed = notes = 0
    for row in rows(folder, "pretrain") + rows(folder, "val_pretrain"):
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
    assert (
        0.25 < listed / (len(rows(folder, "pretrain")) + len(rows(folder, "val_pretrain"))) < 0.42
    )
    assert notes > 2000
    assert all(row["objects"] == 1 for row in rows(folder, "pretrain")[:75])


def place(thing):
    """Where the middle of an object lies, from its box."""
    x, y = (
        int((thing["box"][i] + thing["box"][i + 2]) / 2 // (scenes.IMAGE_SIZE / 2)) for i in (0, 1)
    )
    return f"at the {('top', 'bottom')[y]} {('left', 'right')[x]}"


def test_pictures_show_the_objects(folder):
    for row in rows(folder, "finetune")[:200] + benchmark(folder)["attributes"][:100]:
        image = Image.open(folder / "images" / row["image"])
        assert image.size == (48, 48) and image.mode == "RGB"
        background = (
            image.getpixel((0, 0))
            if row["scene"][0]["cell"] != [0, 0]
            else image.getpixel((47, 47))
        )
        for thing in row["scene"]:
            left, top, right, bottom = thing["box"]
            assert 0 < left < right < 48 and 0 < top < bottom < 48
            assert (
                image.getpixel((int((left + right) / 2), int((top + bottom) / 2)))
                == scenes.COLOURS[thing["colour"]]
            )
            # The top left corner of its box belongs to a square only, the bottom left one to all
            # but a circle.
            corners = (image.getpixel((int(left + 1), int(y))) for y in (top + 1, bottom - 1))
            filled = tuple(corner == scenes.COLOURS[thing["colour"]] for corner in corners)
            assert filled == {"circle": (False, False), "square": (True, True)}.get(
                thing["shape"], (False, filled[1])
            )
            assert (
                thing["shape"] != "triangle"
                or image.getpixel((int(left + 2), int(bottom - 1))) != background
            )


def test_training_answers_are_balanced(folder):
    answers, kinds = defaultdict(Counter), Counter()
    for row in rows(folder, "finetune"):
        for question, answer in asked(row):
            answers[question][answer] += 1
            kinds[" ".join(question.split()[:2])] += 1
    for question, counts in answers.items():
        if question.startswith("Is there"):
            assert 0.45 < counts["yes"] / counts.total() < 0.55, question
    directions = sum(
        (counts for q, counts in answers.items() if q.startswith("Is the ")), Counter()
    )
    for pair in (
        ("left", "right"),
        ("above", "below"),
    ):  # each text is too rare here to be judged alone
        assert 0.4 < directions[pair[0]] / (directions[pair[0]] + directions[pair[1]]) < 0.6
    for words, limit in (("What", 0.45), ("How", 0.45)):
        counts = [counts for question, counts in answers.items() if question.startswith(words)]
        assert sum(max(c.values()) for c in counts) / sum(c.total() for c in counts) < limit, words
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
            assert Counter(row["kind"] for row in file).keys() == {
                "colour",
                "shape",
                "count",
                "relation",
            }
            assert min(Counter(row["kind"] for row in file).values()) >= 150 and stated[name] < 35
        else:
            assert len(file) == 300 and stated[name] == 50
    assert (
        stated["colour"] == 25
        and stated["relation"] == 50
        and stated["shape"] == pytest.approx(33.33)
    )


def test_negatives_are_of_their_kind(folder):
    files = benchmark(folder)
    for name in ("random", "popular", "adversarial"):
        for row in files[f"existence_{name}"]:
            pair = tuple(row["text"].rstrip("?").split()[3:5])
            beside = {
                value for thing in row["scene"] for value in (thing["colour"], thing["shape"])
            }
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
    words = {
        w
        for row in rows(folder, "finetune")
        for turn in asked(row)
        for w in " ".join(turn).rstrip("?").split()
    }
    for word in {w.rstrip("?") for w in words}:
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
