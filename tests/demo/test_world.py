"""The demo world: the same bytes for a seed, nothing held out in training, true answers."""

import colorsys
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
    world.write(out, seed=3, scenes=2400)
    return out


def rows(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def benchmark(folder):
    files = sorted((folder / "benchmark").glob("*.jsonl"))
    return {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files
    }


def trained_look(folder):
    """The benchmark's files whose pictures look as those in training do."""
    return {name: f for name, f in benchmark(folder).items() if not name.startswith("unseen_")}


def truth(question, scene):
    """Return the answer from the words and the boxes, with nothing of the world's own logic."""
    words = question.rstrip("?").split()
    colours = [thing["colour"] for thing in scene]
    shapes = [thing["shape"] for thing in scene]
    numbers = ["zero", "one", "two", "three", "four"]
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

    # "Is red left or right of blue?", by the middles of the boxes. This fails, too, if the question
    # is ambiguous.
    (a,) = [thing for thing in scene if thing["colour"] == words[1]]
    (b,) = [thing for thing in scene if thing["colour"] == words[-1]]
    axis = 0 if words[2] == "left" else 1
    middle_of_a = a["box"][axis] + a["box"][axis + 2]
    middle_of_b = b["box"][axis] + b["box"][axis + 2]
    if middle_of_a < middle_of_b:
        return words[2]
    return words[4]


def test_same_seed_same_bytes_from_the_command_line(folder, tmp_path):
    """In another process, whose sets have another order."""
    run("-m", "demo.world", tmp_path / "again", "--seed", 3, "--scenes", 2400, PYTHONHASHSEED="7")
    assert digest(tmp_path / "again") == digest(folder)


def test_another_seed_other_scenes(folder):
    other = world.make_benchmark(random.Random("4/benchmark"), "benchmark")["attributes"]
    same = [
        row["scene"] == scene
        for row, (_, scene) in zip(benchmark(folder)["attributes"], other.asked, strict=False)
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
    fewest = {"finetune": 4, "val": 4, "relations": 1, "val_relations": 1}
    for name, least in fewest.items():
        for row in rows(folder, name):
            turns = asked(row)
            texts = {question for question, _ in turns}
            assert least <= len(turns) <= 7
            assert len(texts) == len(turns)
            for question, answer in turns:
                assert answer == truth(question, row["scene"]), (row["id"], question)
                count += 1
    for file in benchmark(folder).values():
        for row in file:
            assert row["label"] == truth(row["text"], row["scene"]), row
            assert row["label"] in row["choices"]
    assert count > 5000


def test_captions_say_what_is_where(folder):
    for row in rows(folder, "pretrain") + rows(folder, "val_pretrain"):
        ((question, text),) = asked(row)
        assert question == "What is where?"

        # Every object in reading order.
        statements = []
        for thing in row["scene"]:
            statements.append(f"{place(thing)}: {thing['colour']} {thing['shape']}")
        assert text == ". ".join(statements) + "."
        assert len(row["scene"]) == row["objects"]


def middle(thing):
    """The middle of an object from its box, (x, y)."""
    left, top, right, bottom = thing["box"]
    return (left + right) / 2, (top + bottom) / 2


def place(thing):
    """Where the middle of an object lies, in words."""
    x, y = middle(thing)
    row = ("top", "middle", "bottom")[int(y // 24)]
    column = ("left", "centre", "right")[int(x // 24)]
    return f"{row} {column}"


def test_pictures_show_the_objects(folder):
    shown = rows(folder, "finetune")[:200] + benchmark(folder)["attributes"][:100]
    for row in shown:
        image = Image.open(folder / "images" / row["image"])
        assert image.size == (72, 72) and image.mode == "RGB"

        # Nine cells, at most four objects: one cell shows the background.
        taken = [thing["cell"] for thing in row["scene"]]
        y, x = next(cell for cell in itertools.product(range(3), repeat=2) if [*cell] not in taken)
        background = image.getpixel((24 * x + 12, 24 * y + 12))
        assert min(background) >= 225
        for thing in row["scene"]:
            left, top, right, bottom = thing["box"]
            assert 0 < left < right < 72 and 0 < top < bottom < 72
            fill = tuple(thing["fill"])
            x, y = middle(thing)
            assert image.getpixel((int(x), int(y))) == fill

            # The top left corner of its box belongs to a square only, the bottom left one to all
            # but a circle. A triangle is so thin there that a pixel may be mixed.
            top_corner = image.getpixel((int(left + 1), int(top + 1)))
            bottom_corner = image.getpixel((int(left + 1), int(bottom - 1)))
            assert (top_corner == fill) == (thing["shape"] == "square")
            if thing["shape"] == "circle":
                assert bottom_corner != fill
            elif thing["shape"] == "square":
                assert bottom_corner == fill
            else:
                assert image.getpixel((int(left + 2), int(bottom - 1))) != background


def test_an_object_covers_several_patches_and_has_many_shades_and_sizes(folder):
    """Of the demo's encoder, whose patches have 12 pixels."""
    widths = set()
    fills = defaultdict(set)
    for row in rows(folder, "finetune"):
        for thing in row["scene"]:
            left, top, right, bottom = thing["box"]
            widths.add(right - left)
            fills[thing["colour"]].add(tuple(thing["fill"]))
            columns = int((right - 0.25) // 12) - int(left // 12) + 1
            lines = int((bottom - 0.25) // 12) - int(top // 12) + 1
            assert columns * lines >= 4
    assert widths == set(range(13, 21))
    assert fills.keys() == scenes.COLOURS.keys()
    for colour, shades in fills.items():
        assert len(shades) > 100, colour
        for shade in shades:
            # The nearest colour word is the right one, by hue.
            hue = 360 * colorsys.rgb_to_hsv(*shade)[0]
            distances = {}
            for name, hues in scenes.COLOURS.items():
                away = abs(hue - sum(hues) / 2) % 360
                distances[name] = min(away, 360 - away)
            assert min(distances, key=distances.get) == colour


def test_unseen_looks_are_what_training_never_shows(folder):
    trained = rows(folder, "pretrain") + rows(folder, "finetune")
    widths = set()
    places = set()
    for row in trained:
        assert len(row["scene"]) <= 4
        for thing in row["scene"]:
            widths.add(thing["box"][2] - thing["box"][0])
            x, y = middle(thing)
            places.add((x % 24, y % 24))

    files = benchmark(folder)
    assert {name for name in files if name.startswith("unseen_")} == {
        "unseen_sizes",
        "unseen_positions",
        "unseen_backgrounds",
        "unseen_objects",
    }
    for row in files["unseen_sizes"]:
        for thing in row["scene"]:
            assert thing["box"][2] - thing["box"][0] not in widths
    for row in files["unseen_positions"]:
        for thing in row["scene"]:
            # Near a corner of the cells, where all trained middles are far from.
            x, y = middle(thing)
            assert abs((x + 12) % 24 - 12) < 3 and abs((y + 12) % 24 - 12) < 3
    assert all(9 <= x <= 15 and 9 <= y <= 15 for x, y in places)
    for row in files["unseen_backgrounds"]:
        image = Image.open(folder / "images" / row["image"])
        assert max(image.getpixel((0, 0))) <= 190
    for row in files["unseen_objects"]:
        assert len(row["scene"]) > 4
    for name in files:
        if name.startswith("unseen_"):
            kinds = Counter(row["kind"] for row in files[name])
            assert kinds.keys() == {"existence", "colour", "shape", "count", "relation"}
            assert min(kinds.values()) >= 30


def test_no_question_of_a_row_gives_away_the_answer_to_another(folder):
    """A question, its answer included, tells what an object is; then that is asked nowhere else.

    "The red object" tells, too, that there is one.
    """
    asked_for = Counter()
    for row in rows(folder, "finetune"):
        found = []  # objects that a question of the row finds or describes
        single = set()  # "red objects" or "circles", of which a question says that there is one
        counted = set()  # "red objects" or "circles", of which a question asks how many there are
        for question, answer in asked(row):
            words = question.rstrip("?").split()
            asked_for[words[0], words[1]] += 1
            if words[:2] == ["Is", "there"] and answer == "yes":
                found.append((words[3], words[4]))
            elif words[:2] == ["What", "colour"]:
                found.append((answer, words[-1]))
                single.add(f"{words[-1]}s")
            elif words[:2] == ["What", "shape"]:
                found.append((words[-2], answer))
                single.add(f"{words[-2]} objects")
            elif words[:2] == ["How", "many"]:
                counted.add(question.removeprefix("How many ").removesuffix(" are there?"))
        assert len(found) == len(set(found)), row["conversations"]
        assert not single & counted, row["conversations"]

    # Each of these kinds is asked often enough.
    assert min(asked_for.values()) > 300 and len(asked_for) == 4


def test_relations_of_a_row_share_no_object(folder):
    """Else the text tells: what is left of one object is mostly left of the next one, too."""
    count = 0
    for row in rows(folder, "relations"):
        seen = set()
        for question, _ in asked(row):
            words = question.rstrip("?").split()
            axis = words[2] == "left"
            for colour in (words[1], words[-1]):
                assert (axis, colour) not in seen
                seen.add((axis, colour))
                count += 1
    assert count > 2000


def test_a_benchmark_to_choose_recipes_by_asks_about_val(tmp_path, folder):
    world.write(tmp_path / "dev", seed=3, scenes=2400, asks_about="val")
    asked_about = compositions(itertools.chain.from_iterable(benchmark(tmp_path / "dev").values()))
    held = compositions(itertools.chain.from_iterable(benchmark(folder).values()))
    assert not asked_about & held
    assert not asked_about & compositions(rows(folder, "pretrain") + rows(folder, "finetune"))

    # All else is the same.
    for name in ("pretrain", "finetune", "relations", "val"):
        file = f"{name}.json"
        assert (tmp_path / "dev" / file).read_bytes() == (folder / file).read_bytes()


def test_training_answers_are_balanced(folder):
    answers = defaultdict(Counter)
    kinds = Counter()
    for row in rows(folder, "finetune") + rows(folder, "relations"):
        for question, answer in asked(row):
            answers[question][answer] += 1
            kind = "relation" if " or " in question else " ".join(question.split()[:2])
            kinds[kind] += 1
    for question, counts in answers.items():
        if question.startswith("Is there"):
            assert 0.45 < counts["yes"] / counts.total() < 0.55, question

    # Each text about a relation is too rare here to be judged alone.
    directions = Counter()
    for question, counts in answers.items():
        if " or " in question:
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
    for file in benchmark(folder).values():
        answers = defaultdict(Counter)
        for row in file:
            answers[row["text"]][row["label"]] += 1
        for text, counts in answers.items():
            assert len(set(counts.values())) == 1, text

    for name, file in trained_look(folder).items():
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
