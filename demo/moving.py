"""The moving demo world: clips of two shapes that move one after the other, as LLaVA files.

    python -m demo.moving out/moving/world       # the data of recipes/moving.toml: 16,000 clips
    python -m demo.moving out/moving/world --seed 1 --scenes 2000

A clip is a list of three scenes (scenes.py), one a frame: before, between and after two moves. It
is smaller than the world of still pictures: 2 x 2 cells, one patch of the encoder each, two sizes
and one shade of a colour. Its two objects have different colours and keep their numbers, 0 and 1,
in all three scenes. Each moves once, by one cell. Between the moves they stand on a diagonal, so
there is always room. Pairs of objects are held out as the compositions of scenes are. Written to
OUT:

    videos/{pretrain,finetune,val,benchmark}/*.gif
    pretrain.json                  captions: where both objects are, frame by frame, or notes
    finetune.json                  two questions about each clip, with short answers
    val.json  val_pretrain.json    held-out rows of both sorts, for the validation loss
    tokenizer/                     as world.py's, trained on the rows above
    benchmark/moving.jsonl         order (which moved first?), direction (which moved left?),
                                   way (which way did it move?)
    moving.json                    seed and sizes; written last

The benchmark has every clip that a pair of objects can make, so no single frame decides a question:

- Eight clips share the frame between the moves. Of each question about them, every answer is
  equally often right.
- Each clip is there in reverse too. A frame that may be any of the three therefore tells nothing.
- Somebody who knows that a frame is the first or the last can tell half of the directions from it:
  what stands at the left edge does not move further left.

Rows hold the scenes of the three frames under "scene". The same seed writes the same bytes.

The file in order: making clips, words about them, the benchmark, the whole folder. What it shares
with the world of still pictures is in world.py: the writing of files and the command.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo import world
from demo.questions import Question, named
from demo.scenes import (
    PAIRS,
    SCALE,
    Pair,
    Scene,
    Thing,
    draw_background,
    draw_pairs,
    render,
    split_of,
)

IMAGE_SIZE = 48  # pixels
GRID = 2  # cells a side
CELL = IMAGE_SIZE // GRID  # pixels: one patch of the encoder
WIDTHS = (12, 19)  # of objects, pixels
FILLS = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 190, 20),
}

WAYS = (("up", "down"), ("left", "right"))  # by axis: of rows, of columns
CELLS = tuple(itertools.product(range(GRID), repeat=2))
ALIKE = 0.3  # share of the training clips whose objects move along the same axis
SCENES = 16_000  # training clips, half with captions and half with questions
VAL_SCENES = 200
TRACKED = 0.5  # share of the captions that follow the objects; the others are notes

Clip = list[Scene]


@dataclass(frozen=True)
class Move:
    """What happens between two frames."""

    thing: int  # the number of the object
    way: str  # one of WAYS


# ---------------------------------------------------------------------- clips


def place(rng: random.Random, pair: Pair) -> Thing:
    """Return one object of random size in the first cell, up to a pixel from its middle."""
    # All in quarters of a pixel, the grid that `render` draws on: its edges are then whole numbers.
    width = rng.choice(WIDTHS) * SCALE
    margin = (CELL * SCALE - width) // 2
    top = margin + rng.randint(-SCALE, SCALE)
    left = margin + rng.randint(-SCALE, SCALE)
    box = [left, top, left + width, top + width]

    colour, shape = pair
    return {
        "colour": colour,
        "shape": shape,
        "cell": [0, 0],
        "box": [edge / SCALE for edge in box],
        "fill": list(FILLS[colour]),
    }


def shifted(thing: Thing, axis: int) -> Thing:
    """Return the same object in the other cell along an axis (0: of rows, 1: of columns)."""
    old = thing["cell"][axis]
    new = 1 - old
    cell = list(thing["cell"])
    cell[axis] = new

    # A box is x, y, x, y, but a cell is row, column: axis 0 moves the edges 1 and 3.
    distance = (new - old) * IMAGE_SIZE / GRID
    box = list(thing["box"])
    box[1 - axis] += distance
    box[3 - axis] += distance
    return thing | {"cell": cell, "box": box}


def diagonal(things: list[Thing], cell: tuple[int, int]) -> Scene:
    """Return two objects of the top left cell, object 0 moved to `cell`, object 1 to the opposite.

    Along each axis exactly one of them moves.
    """
    one, other = things
    for axis in range(2):
        if cell[axis] == 1:
            one = shifted(one, axis)
        else:
            other = shifted(other, axis)
    return [one, other]


def film(between: Scene, first: int, axes: tuple[int, int]) -> Clip:
    """Return the clip in which object `first` moves, then the other.

    `axes` has the axis along which object 0 moves, then that of object 1.
    """
    second = 1 - first

    # The first arrives at its place in the scene between, so it comes from the cell beside it. The
    # second leaves its place there.
    before = list(between)
    before[first] = shifted(between[first], axes[first])
    after = list(between)
    after[second] = shifted(between[second], axes[second])
    return [before, between, after]


def of_two_colours(pairs: Sequence[Pair]) -> bool:
    """Say whether two (colour, shape) pairs differ in colour."""
    (colour, _), (other_colour, _) = pairs
    return colour != other_colour


def draw_clip(rng: random.Random, split: str) -> Clip:
    """Return a random clip whose objects are of `split`."""
    while True:
        pairs = draw_pairs(rng, 2)
        if split_of(pairs) == split and of_two_colours(pairs):
            break
    things = [place(rng, pair) for pair in pairs]

    axis = rng.randrange(2)
    if rng.random() < ALIKE:
        axes = (axis, axis)
    else:
        axes = (axis, 1 - axis)
    between = diagonal(things, rng.choice(CELLS))
    return film(between, rng.randrange(2), axes)


def moves(clip: Clip) -> list[Move]:
    """Return the two moves in the order in which they happen."""
    found = []
    for before, after in itertools.pairwise(clip):
        for i in range(2):
            for axis, (back, forth) in enumerate(WAYS):
                old = before[i]["cell"][axis]
                new = after[i]["cell"][axis]
                if new < old:
                    found.append(Move(i, back))
                elif new > old:
                    found.append(Move(i, forth))
    return found


# ---------------------------------------------------------------------- words about a clip


def placed(thing: Thing) -> str:
    """Return where an object stands: "top left"."""
    row, column = thing["cell"]
    vertical = ("top", "bottom")[row]
    horizontal = ("left", "right")[column]
    return f"{vertical} {horizontal}"


def questions(clip: Clip) -> list[Question]:
    """Return every question that has one right answer: order, then way and direction by object."""
    names = tuple(map(named, clip[0]))
    either = f"the {names[0]} or the {names[1]}"
    every_way = (*WAYS[0], *WAYS[1])
    first, second = moves(clip)

    order = Question(
        kind="order",
        text=f"Which moved first, {either}?",
        answer=names[first.thing],
        choices=names,
        note="first",
    )
    found = [order]

    # By object, not by time: else the order of the questions would tell who moved first.
    for move in sorted((first, second), key=lambda move: move.thing):
        name = names[move.thing]
        way = Question(
            kind="way",
            text=f"Which way did the {name} move?",
            answer=move.way,
            choices=every_way,
            note=name,
        )
        found.append(way)

        # If both move the same way, the question which one did has no answer.
        if first.way != second.way:
            direction = Question(
                kind="direction",
                text=f"Which moved {move.way}, {either}?",
                answer=name,
                choices=names,
                note=move.way,
            )
            found.append(direction)
    return found


def interview(clip: Clip, rng: random.Random) -> list[Question]:
    """Return two questions in random order: the order of the moves, and one about one object.

    That is which way it moved or, where it has an answer, which object moved that way. A third
    question would be answered by the text: who sees a move up and a move left, and reads that the
    circle moved up, need not look whether it is the square that moved left.
    """
    order, *rest = questions(clip)
    return rng.sample([order, rng.choice(rest)], 2)


def write_notes(answered: list[Question]) -> str:
    """Return questions with their answers in few words: "first: red circle. blue square: up."."""
    notes = [f"{question.note}: {question.answer}" for question in answered]
    return ". ".join(notes) + "."


def caption(clip: Clip, rng: random.Random) -> str:
    """Return what pretraining says of a clip: where each object is in each frame, or notes.

    The tracks teach to recognize an object from frame to frame. Notes are questions with their
    answers, in few words. A caption is never both: the notes could be read off the tracks.
    """
    if rng.random() >= TRACKED:
        return write_notes(interview(clip, rng))

    tracks = []
    for i in range(2):
        places = [placed(scene[i]) for scene in clip]
        tracks.append(f"{named(clip[0][i])}: {', '.join(places)}")
    shuffled = rng.sample(tracks, 2)
    return ". ".join(shuffled) + "."


# ---------------------------------------------------------------------- the benchmark


def every_clip(things: list[Thing]) -> list[Clip]:
    """Return all clips of two objects: by place between, by who is first, by the axes."""
    every_axes = list(itertools.product(range(2), repeat=2))
    clips = []
    for cell in CELLS:
        between = diagonal(things, cell)
        for first in range(2):
            for axes in every_axes:
                clips.append(film(between, first, axes))
    return clips


def make_benchmark(rng: random.Random, split: str) -> list[list[Clip]]:
    """Return all clips of each pair of objects of `split`, one list a pair.

    A pair comes twice, because the questions name either object first.
    """
    groups = []
    for pairs in itertools.permutations(PAIRS, 2):
        # Place all pairs, held out or not: the random draws do not depend on the split then.
        things = [place(rng, pair) for pair in pairs]
        if of_two_colours(pairs) and split_of(pairs) == split:
            groups.append(every_clip(things))
    return groups


# ---------------------------------------------------------------------- files


def make_row(name: str, video: str, clip: Clip, turns: list[tuple[str, str]]) -> dict:
    """Return one LLaVA row; `turns` are (question, answer)."""
    conversation = world.make_conversation(turns)
    return {"id": name, "video": video, "conversations": conversation, "scene": clip}


def caption_row(name: str, video: str, clip: Clip, rng: random.Random) -> dict:
    """Return a row for pretraining."""
    return make_row(name, video, clip, [("What happens?", caption(clip, rng))])


def question_row(name: str, video: str, clip: Clip, rng: random.Random) -> dict:
    """Return a row for finetuning."""
    turns = [(q.text, q.answer) for q in interview(clip, rng)]
    return make_row(name, video, clip, turns)


def save_clip(
    out: Path, split: str, number: int, clip: Clip, background: tuple[int, int, int]
) -> str:
    """Write a clip as a GIF and return its name for a row. So few colours make it lossless."""
    name = f"{split}/{number:05d}.gif"
    first, *rest = [render(scene, background, IMAGE_SIZE) for scene in clip]
    first.save(out / "videos" / name, save_all=True, append_images=rest, duration=500, loop=0)
    return name


def caption_rows(out: Path, rng: random.Random, count: int) -> list[dict]:
    """Return the rows of pretraining and write their clips."""
    rows = []
    for i in range(count):
        clip = draw_clip(rng, "train")
        video = save_clip(out, "pretrain", i, clip, draw_background(rng))
        rows.append(caption_row(f"pretrain-{i:05d}", video, clip, rng))
    return rows


def question_rows(out: Path, rng: random.Random, count: int) -> list[dict]:
    """Return the rows of finetuning and write their clips."""
    rows = []
    for i in range(count):
        clip = draw_clip(rng, "train")
        video = save_clip(out, "finetune", i, clip, draw_background(rng))
        rows.append(question_row(f"finetune-{i:05d}", video, clip, rng))
    return rows


def held_out_rows(out: Path, rng: random.Random) -> dict[str, list[dict]]:
    """Return the rows of both validation files, two about each clip, and write the clips."""
    files = {"val": [], "val_pretrain": []}
    for i in range(VAL_SCENES):
        clip = draw_clip(rng, "val")
        video = save_clip(out, "val", i, clip, draw_background(rng))
        files["val_pretrain"].append(caption_row(f"val_pretrain-{i:05d}", video, clip, rng))
        files["val"].append(question_row(f"val-{i:05d}", video, clip, rng))
    return files


def benchmark_rows(out: Path, rng: random.Random, split: str) -> list[dict]:
    """Return the rows of the benchmark and write its clips."""
    rows = []
    clip_number = 0
    for group, clips in enumerate(make_benchmark(rng, split)):
        # One background for the group, so that equal scenes are equal frames.
        background = draw_background(rng)
        for clip in clips:
            video = save_clip(out, "benchmark", clip_number, clip, background)
            clip_number += 1
            for question in questions(clip):
                row = {
                    "question_id": len(rows) + 1,
                    "group": group,
                    "video": video,
                    "text": question.text,
                    "label": question.answer,
                    "kind": question.kind,
                    "choices": question.choices,
                    "scene": clip,
                }
                rows.append(row)
    return rows


def fill_folder(out: Path, seed: int, scenes: int, asks_about: str):
    """Write the whole data set into the folder `out`, which it makes.

    The benchmark is about the pairs of objects of the split `asks_about`.
    """
    for split in world.SPLITS:
        (out / "videos" / split).mkdir(parents=True)
    (out / "benchmark").mkdir()

    # The clips, and the rows about them.
    streams = world.random_streams(seed)
    n_captions = scenes // 2
    files = {
        "pretrain": caption_rows(out, streams["pretrain"], n_captions),
        "finetune": question_rows(out, streams["finetune"], scenes - n_captions),
        **held_out_rows(out, streams["val"]),
    }
    benchmark = benchmark_rows(out, streams["benchmark"], asks_about)

    # The files that hold the rows.
    for name, rows in files.items():
        world.write_rows(out / f"{name}.json", rows)
    world.write_lines(out / "benchmark" / "moving.jsonl", benchmark)
    world.train_tokenizer(files["pretrain"] + files["finetune"], out / "tokenizer")

    # The summary comes last: a folder that has it is complete.
    counts = {name: len(rows) for name, rows in files.items()}
    counts["moving"] = len(benchmark)
    world.write_summary(out / "moving.json", seed, scenes, IMAGE_SIZE, counts)


if __name__ == "__main__":
    world.main(__doc__, SCENES, fill_folder)
