"""The moving demo world: clips of two shapes that move one after the other, as LLaVA files.

    python -m demo.moving out/moving/world       # the data of recipes/moving.toml: 16,000 clips
    python -m demo.moving out/moving/world --seed 1 --scenes 2000

A clip is a list of three scenes (scenes.py), one a frame: before, between and after two moves. Its
two objects have different colours and keep their numbers, 0 and 1, in all three scenes. Each moves
once, into a cell beside its own. Between the moves they are not beside each other, so there is
always room. Pairs of objects are held out as the compositions of scenes are. Written to OUT:

    videos/{pretrain,finetune,val,benchmark}/*.gif
    pretrain.json                  captions: where both objects are, frame by frame, or their moves
    finetune.json                  three questions about each clip, with short answers
    val.json  val_pretrain.json    held-out rows of both sorts, for the validation loss
    tokenizer/                     as world.py's, trained on the rows above
    benchmark/moving.jsonl         order (which moved first?), direction (which moved left?),
                                   way (which way did it move?)
    moving.json                    seed and sizes; written last

What a single frame tells about a question of the benchmark:

- The frame between the moves tells nothing. Eight clips share it, and of each question about them
  every answer is equally often right. `evaluate.py --one-frame` shows only this frame.
- The first frame, or the last, tells something to somebody who knows which of the two it is: what
  stands at the left edge does not move further left. The best guess is right about order in two of
  three cases, about direction in three of four, and about way in nearly half.
- Each clip is there in reverse too, with the other order and the opposite ways. So no frame
  decides those to somebody who does not know which it is.

Rows hold the scenes of the three frames under "scene". The same seed writes the same bytes.

The file in order: making clips, words about them, the benchmark, the whole folder. What it shares
with the world of still pictures is in world.py: the writing of files and the command.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo import world
from demo.questions import COLUMNS, ROWS, Question, named
from demo.scenes import (
    CELL,
    GRID,
    PAIRS,
    Pair,
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
SCENES = 16_000  # training clips, half with captions and half with questions
VAL_SCENES = 200
PLACED = 0.5  # share of the captions that say where the objects are; the others say how they move
GROUPS = 56  # of the benchmark's clips, eight clips each

Cell = tuple[int, int]  # (row, column)
Clip = list[Scene]


@dataclass(frozen=True)
class Move:
    """What happens between two frames."""

    thing: int  # the number of the object
    way: str  # one of WAYS


# ---------------------------------------------------------------------- clips


def beside(rng: random.Random, cell: Sequence[int]) -> list[Cell]:
    """Return a cell beside a (row, column) in its column and one in its row.

    Each is a random one of two. At an edge of the picture there is only one.
    """
    row, column = cell
    return [(beside_number(rng, row), column), (row, beside_number(rng, column))]


def beside_number(rng: random.Random, number: int) -> int:
    """Return the number of a random row beside a row, or of a column beside a column."""
    if number == 0:
        return 1
    if number == GRID - 1:
        return number - 1
    return number + rng.choice((-1, 1))


def draw_cells(rng: random.Random) -> tuple[Cell, Cell]:
    """Return two random cells that are not beside each other."""
    cells = list(itertools.product(range(GRID), repeat=2))
    while True:
        one, other = rng.sample(cells, 2)
        distance = abs(one[0] - other[0]) + abs(one[1] - other[1])
        if distance > 1:
            return one, other


def moved(thing: Thing, cell: Cell) -> Thing:
    """Return the same object in another cell, at the same place within it."""
    row, column = thing["cell"]
    new_row, new_column = cell
    down = (new_row - row) * CELL
    right = (new_column - column) * CELL

    x0, y0, x1, y1 = thing["box"]
    box = [x0 + right, y0 + down, x1 + right, y1 + down]
    return thing | {"cell": [new_row, new_column], "box": box}


def film(between: Scene, first: int, others: Sequence[Cell]) -> Clip:
    """Return the clip in which object `first` moves, then the other.

    `others` has the second cell of either object, beside the one in which it stands between the
    moves.
    """
    second = 1 - first

    # The first arrives at its place in the scene between, so it comes from its other cell. The
    # second leaves for its own.
    before = list(between)
    before[first] = moved(between[first], others[first])
    after = list(between)
    after[second] = moved(between[second], others[second])
    return [before, between, after]


def of_two_colours(pairs: Sequence[Pair]) -> bool:
    """Say whether two (colour, shape) pairs differ in colour."""
    (colour, _), (other_colour, _) = pairs
    return colour != other_colour


def draw_between(rng: random.Random, pairs: Sequence[Pair]) -> Scene:
    """Return the frame between the moves of two random objects of these (colour, shape) pairs."""
    between = []
    for pair, cell in zip(pairs, draw_cells(rng), strict=True):
        between.append(place(rng, pair, cell))
    return between


def draw_clip(rng: random.Random, split: str) -> Clip:
    """Return a random clip whose objects are of `split`."""
    # A scene of two objects, of which only the composition is used: they are placed anew below.
    while True:
        pairs = composition(draw_scene(rng, split, 2))
        if of_two_colours(pairs):
            break

    # A composition is sorted. Which of its objects gets number 0 must be random.
    between = draw_between(rng, rng.sample(pairs, 2))
    others = []
    for thing in between:
        others.append(rng.choice(beside(rng, thing["cell"])))
    return film(between, rng.randrange(2), others)


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


def steps(clip: Clip, thing: int) -> list[str]:
    """Return what an object does between each two frames: a way of WAYS, or "still"."""
    words = []
    for move in moves(clip):
        if move.thing == thing:
            words.append(move.way)
        else:
            words.append("still")
    return words


# ---------------------------------------------------------------------- words about a clip


def placed(thing: Thing) -> str:
    """Return where an object stands: "top left"."""
    row, column = thing["cell"]
    return f"{ROWS[row]} {COLUMNS[column]}"


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
            about=(move.thing,),
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
                about=(move.thing,),
            )
            found.append(direction)
    return found


def interview(clip: Clip, rng: random.Random) -> list[Question]:
    """Return three questions in random order: the order of the moves, and one about each object.

    About one object it is which way it moved. About the other it is which object moved that way,
    where that has an answer.
    """
    order, *rest = questions(clip)
    about = defaultdict(list)  # number of the object -> its way, then its direction if there is one
    for question in rest:
        (number,) = question.about
        about[number].append(question)

    one, other = rng.sample(range(2), 2)
    way = about[one][0]
    direction_or_way = about[other][-1]
    return rng.sample([order, way, direction_or_way], 3)


def caption(clip: Clip, rng: random.Random) -> str:
    """Return what pretraining says of either object: where it is in each frame, or how it moves.

    It is never both: the moves could be read off the places, and would teach nothing about the
    frames.
    """
    tells_places = rng.random() < PLACED
    tracks = []
    for i in rng.sample(range(2), 2):
        if tells_places:
            words = [placed(scene[i]) for scene in clip]
        else:
            words = steps(clip, i)
        tracks.append(f"{named(clip[0][i])}: {', '.join(words)}")
    return ". ".join(tracks) + "."


# ---------------------------------------------------------------------- the benchmark


def every_clip(rng: random.Random, between: Scene) -> list[Clip]:
    """Return eight clips with the frame `between`: by who is first, by the axes of the moves.

    An object has one other cell along either axis, in all eight.
    """
    choices = [beside(rng, thing["cell"]) for thing in between]
    clips = []
    for first in range(2):
        for others in itertools.product(*choices):
            clips.append(film(between, first, others))
    return clips


def make_benchmark(rng: random.Random, split: str) -> list[list[Clip]]:
    """Return groups of eight clips about the pairs of objects of `split`, in turn.

    A pair comes in both orders, because the questions name either object first.
    """
    held_out = []
    for pairs in itertools.permutations(PAIRS, 2):
        if of_two_colours(pairs) and split_of(pairs) == split:
            held_out.append(pairs)

    groups = []
    for pairs in itertools.islice(itertools.cycle(held_out), GROUPS):
        between = draw_between(rng, pairs)
        groups.append(every_clip(rng, between))
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
    first, *rest = [render(scene, background) for scene in clip]
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


def fill_folder(out: Path, seed: int, scenes: int, asks_about: str = "benchmark"):
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
    world.write_summary(out / "moving.json", seed, scenes, counts)


if __name__ == "__main__":
    world.main(__doc__, SCENES, fill_folder)
