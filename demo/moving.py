"""The moving demo world: clips of two shapes that move one after the other, as LLaVA files.

    python -m demo.moving out/moving/world       # the data of recipes/moving.toml: 16,000 clips
    python -m demo.moving out/moving/world --seed 1 --scenes 2000

A clip is a list of three scenes (scenes.py), one a frame: before, between and after two moves. Its
two objects have different colours, and the one object is the first in all three scenes. Each moves
once, by one cell. Between the moves they stand on a diagonal, so there is always room. Pairs of
objects are held out as the compositions of scenes are. Written to OUT:

    videos/{pretrain,finetune,val,benchmark}/*.gif
    pretrain.json                  captions: where both objects are, frame by frame, or notes
    finetune.json                  three questions about each clip, with short answers
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
"""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

from demo import world
from demo.questions import Question, named
from demo.scenes import (
    GRID,
    IMAGE_SIZE,
    PAIRS,
    Scene,
    Thing,
    composition,
    draw_background,
    draw_scene,
    place,
    render,
    split_of,
)

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
    way: str


# ---------------------------------------------------------------------- clips


def shifted(thing: Thing, axis: int) -> Thing:
    """Return the same object in the other cell along an axis (0: of rows, 1: of columns)."""
    cell = list(thing["cell"])
    cell[axis] = 1 - cell[axis]
    distance = (cell[axis] - thing["cell"][axis]) * IMAGE_SIZE / GRID

    # A box is x, y, x, y, but a cell is row, column.
    box = list(thing["box"])
    box[1 - axis] += distance
    box[3 - axis] += distance
    return thing | {"cell": cell, "box": box}


def diagonal(things: list[Thing], cell: tuple[int, int]) -> Scene:
    """Return two objects of the top left cell with one moved to `cell`, one to the opposite."""
    first, second = things
    for axis in range(2):
        if cell[axis] == 1:
            first = shifted(first, axis)
        else:
            second = shifted(second, axis)
    return [first, second]


def film(between: Scene, first: int, axes: tuple[int, int]) -> Clip:
    """Return the clip in which object `first` moves, then the other; axes are by object.

    `first` arrives at its place in the scene `between`, and the other leaves its place there.
    """
    second = 1 - first
    before = list(between)
    before[first] = shifted(between[first], axes[first])
    after = list(between)
    after[second] = shifted(between[second], axes[second])
    return [before, between, after]


def draw_clip(rng: random.Random, split: str) -> Clip:
    """Return a random clip whose objects are of `split`."""
    while True:
        pairs = composition(draw_scene(rng, split, 2))
        if pairs[0][0] != pairs[1][0]:  # two colours
            break
    things = [place(rng, pair, (0, 0)) for pair in rng.sample(pairs, 2)]

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
                change = after[i]["cell"][axis] - before[i]["cell"][axis]
                if change < 0:
                    found.append(Move(i, back))
                elif change > 0:
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
    """Return every question that has one right answer."""
    names = (named(clip[0][0]), named(clip[0][1]))
    either = f"the {names[0]} or the {names[1]}"
    every_way = (*WAYS[0], *WAYS[1])
    happened = moves(clip)

    text = f"Which moved first, {either}?"
    asked = [Question("order", text, names[happened[0].thing], names, "first")]
    for move in sorted(happened, key=lambda move: move.thing):
        name = names[move.thing]
        about = (move.thing,)
        text = f"Which way did the {name} move?"
        asked.append(Question("way", text, move.way, every_way, name, about))
        if happened[0].way != happened[1].way:
            text = f"Which moved {move.way}, {either}?"
            asked.append(Question("direction", text, name, names, move.way, about))
    return asked


def interview(clip: Clip, rng: random.Random) -> list[Question]:
    """Return three questions in random order: the order of the moves, and one about each object.

    About one object it is which way it moved. About the other it is which object moved that way,
    where that has an answer.
    """
    order, *rest = questions(clip)
    one, other = rng.sample(range(2), 2)
    about_one = [q for q in rest if q.about == (one,)]
    about_other = [q for q in rest if q.about == (other,)]
    return rng.sample([order, about_one[0], about_other[-1]], 3)


def caption(clip: Clip, rng: random.Random) -> str:
    """Return what pretraining says of a clip: where each object is in each frame, or notes.

    The tracks teach which object is whose from frame to frame. Notes are the answers to questions,
    in fewer words. A caption is never both: the notes could be read off the tracks.
    """
    if rng.random() < TRACKED:
        tracks = []
        for i in range(2):
            places = [placed(scene[i]) for scene in clip]
            tracks.append(f"{named(clip[0][i])}: {', '.join(places)}")
        return ". ".join(rng.sample(tracks, 2)) + "."

    notes = [f"{q.note}: {q.answer}" for q in interview(clip, rng)]
    return ". ".join(notes) + "."


# ---------------------------------------------------------------------- the benchmark


def every_clip(things: list[Thing]) -> list[Clip]:
    """Return all clips of two objects: by place between, by who is first, by the axes."""
    clips = []
    for cell, first, axes in itertools.product(
        CELLS, range(2), itertools.product(range(2), repeat=2)
    ):
        clips.append(film(diagonal(things, cell), first, axes))
    return clips


def make_benchmark(rng: random.Random) -> list[list[Clip]]:
    """Return all clips of each held-out pair of objects, named in either order."""
    groups = []
    for pairs in itertools.permutations(PAIRS, 2):
        things = [place(rng, pair, (0, 0)) for pair in pairs]
        two_colours = pairs[0][0] != pairs[1][0]
        if two_colours and split_of(things) == "benchmark":
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


def save_clip(out: Path, split: str, number: int, clip: Clip, background: tuple) -> str:
    """Write a clip as a GIF, which is lossless for so few colours; return its name for a row."""
    name = f"{split}/{number:05d}.gif"
    first, *rest = [render(scene, background) for scene in clip]
    first.save(out / "videos" / name, save_all=True, append_images=rest, duration=500, loop=0)
    return name


def benchmark_rows(out: Path, rng: random.Random) -> list[dict]:
    """Return the rows of the benchmark and write its clips."""
    rows = []
    number = 0
    for group, clips in enumerate(make_benchmark(rng)):
        background = draw_background(rng)
        for clip in clips:
            video = save_clip(out, "benchmark", number, clip, background)
            number += 1
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


def fill_folder(out: Path, seed: int, scenes: int):
    """Write the whole data set into the folder `out`, which it makes."""
    streams = world.random_streams(seed)
    for split in world.SPLITS:
        (out / "videos" / split).mkdir(parents=True)
    (out / "benchmark").mkdir()
    files = {"pretrain": [], "finetune": [], "val": [], "val_pretrain": []}

    rng = streams["pretrain"]
    for i in range(scenes // 2):
        clip = draw_clip(rng, "train")
        video = save_clip(out, "pretrain", i, clip, draw_background(rng))
        files["pretrain"].append(caption_row(f"pretrain-{i:05d}", video, clip, rng))

    rng = streams["finetune"]
    for i in range(scenes - scenes // 2):
        clip = draw_clip(rng, "train")
        video = save_clip(out, "finetune", i, clip, draw_background(rng))
        files["finetune"].append(question_row(f"finetune-{i:05d}", video, clip, rng))

    # Held-out rows of both sorts, two about each clip.
    rng = streams["val"]
    for i in range(VAL_SCENES):
        clip = draw_clip(rng, "val")
        video = save_clip(out, "val", i, clip, draw_background(rng))
        files["val_pretrain"].append(caption_row(f"val_pretrain-{i:05d}", video, clip, rng))
        files["val"].append(question_row(f"val-{i:05d}", video, clip, rng))

    benchmark = benchmark_rows(out, streams["benchmark"])
    world.write_lines(out / "benchmark" / "moving.jsonl", benchmark)

    for name, rows in files.items():
        world.write_rows(out / f"{name}.json", rows)
    world.train_tokenizer(files["pretrain"] + files["finetune"], out / "tokenizer")

    counts = {name: len(rows) for name, rows in files.items()}
    counts["moving"] = len(benchmark)
    summary = {"seed": seed, "scenes": scenes, "image_size": IMAGE_SIZE, "rows": counts}
    world.write_json(out / "moving.json", summary)


if __name__ == "__main__":
    world.main(__doc__, SCENES, fill_folder)
