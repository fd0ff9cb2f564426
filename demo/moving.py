"""The moving demo world: short clips of two shapes that move one after the other, written as LLaVA files.

    python -m demo.moving out/moving/world                       # the data of recipes/moving.toml: 16,000 training clips
    python -m demo.moving out/moving/world --seed 1 --scenes 2000

A clip is three frames as world.py draws them: before, between and after two moves. Each of two objects, of different
colours, moves by one cell, and between the moves they stand on a diagonal. What is held out is world.py's split of
combinations of objects. Written to OUT:

    videos/{pretrain,finetune,val,benchmark}/*.gif
    pretrain.json                  where a model learns to see: either where both objects are, frame by frame, or notes
    finetune.json                  three questions per clip with short answers
    val.json  val_pretrain.json    held-out rows of both sorts, for the validation loss
    tokenizer/                     as world.py's, of the rows above
    benchmark/moving.jsonl         order (which moved first?), direction (which moved left?), way (where to?)
    moving.json                    seed and sizes; written last

The benchmark has every clip that a pair of objects can make. Eight of them share the frame between, and of each
question about them every answer is equally often right; each clip is there in reverse too, so a frame that may be any
of the three never decides a question. (Known to be the first or the last, it decides half of the directions: what
stands at the left edge does not move further left.) Rows hold each frame's objects under "scene", as world.py's rows
hold theirs. The same seed writes the same bytes.
"""

import itertools
import json
import random

from demo import world
from demo.world import GRID, IMAGE_SIZE, PAIRS, Question

WAYS = (("up", "down"), ("left", "right"))  # along the rows' axis, along the columns'
CELLS = tuple(itertools.product(range(GRID), repeat=2))
ALIKE = 0.3  # share of the training clips whose objects move the same way
SCENES = 16_000  # training clips, half with notes and half with questions
VAL_SCENES = 200
TRACKED = 0.5  # share of the captions that are no notes


# ------------------------------------------------------------------------------------------------ clips


def shifted(thing, axis):
    """The same object in the other cell along an axis (0: of rows, 1: of columns)."""
    cell, box = list(thing["cell"]), list(thing["box"])
    cell[axis] = 1 - cell[axis]
    for edge in (1 - axis, 3 - axis):  # a box is x, y, x, y
        box[edge] += (cell[axis] - thing["cell"][axis]) * IMAGE_SIZE / GRID
    return thing | {"cell": cell, "box": box}


def film(between, first, axes):
    """Three scenes: object `first` moves to where it is in the scene `between`, then the other leaves it, each along
    its axis."""
    before, after = list(between), list(between)
    before[first] = shifted(between[first], axes[first])
    after[1 - first] = shifted(between[1 - first], axes[1 - first])
    return [before, between, after]


def draw_clip(rng, split):
    while (
        len(dict(pairs := world.composition(world.draw_scene(rng, split, 2)))) < 2
    ):  # of one colour
        pass
    things = [world.place(rng, pair, (0, 0)) for pair in rng.sample(pairs, 2)]
    axis = rng.randrange(2)
    axes = axis, axis if rng.random() < ALIKE else 1 - axis
    return film(diagonal(things, rng.choice(CELLS)), rng.randrange(2), axes)


def diagonal(things, cell):
    """Two objects of the top left cell, one moved to `cell`, the other to the cell opposite."""
    scene = []
    for thing, opposite in zip(things, (0, 1), strict=True):
        for axis in range(2):
            thing = shifted(thing, axis) if cell[axis] != opposite else thing
        scene.append(thing)
    return scene


def moves(clip):
    """[(number of the object, direction)] in the order in which it happens."""
    found = []
    for before, after in itertools.pairwise(clip):
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            for axis, words in enumerate(WAYS):
                if a["cell"][axis] != b["cell"][axis]:
                    found.append((i, words[b["cell"][axis] > a["cell"][axis]]))
    return found


# ------------------------------------------------------------------------------------ words about a clip


def named(thing):
    return "{colour} {shape}".format(**thing)


def placed(thing):
    row, column = thing["cell"]
    return f"{('top', 'bottom')[row]} {('left', 'right')[column]}"


def questions(clip):
    """Every question that has one right answer."""
    names, ways = tuple(map(named, clip[0])), dict(moves(clip))
    either, every = f"the {names[0]} or the {names[1]}", tuple(itertools.chain(*WAYS))
    asked = [
        Question("order", f"Which moved first, {either}?", names[moves(clip)[0][0]], names, "first")
    ]
    for i, way in sorted(ways.items()):
        asked.append(
            Question("way", f"Which way did the {names[i]} move?", way, every, names[i], (i,))
        )
        if ways[0] != ways[1]:
            asked.append(
                Question("direction", f"Which moved {way}, {either}?", names[i], names, way, (i,))
            )
    return asked


def interview(clip, rng):
    """Three questions: the order, of one object which way it moved, and of the other that or which moved that way."""
    order, *rest = questions(clip)
    either, other = ([q for q in rest if q.about == (i,)] for i in rng.sample(range(2), 2))
    return rng.sample([order, either[0], other[-1]], 3)


def caption(clip, rng):
    """Half of them follow each object through the frames: what it takes to learn to tell whose move is whose. The
    others are notes, answers in fewer words. Never both: the one could be read off the other."""
    if rng.random() < TRACKED:
        tracks = [
            f"{named(track[0])}: {', '.join(map(placed, track))}"
            for track in zip(*clip, strict=True)
        ]
        return ". ".join(rng.sample(tracks, 2)) + "."
    return ". ".join(f"{q.note}: {q.answer}" for q in interview(clip, rng)) + "."


def make_row(name, video, clip, turns):
    """One LLaVA row; `turns` is a list of (question, answer)."""
    row = world.make_row(name, None, clip, turns)
    return {"id": name, "video": video, "conversations": row["conversations"], "scene": clip}


def make_benchmark(rng):
    """[[clip]]: of each held-out pair of objects, named in either order, every clip that they can make."""
    groups = []
    for pairs in itertools.permutations(PAIRS, 2):
        things = [world.place(rng, pair, (0, 0)) for pair in pairs]
        if pairs[0][0] != pairs[1][0] and world.split_of(things) == "benchmark":
            every = itertools.product(CELLS, range(2), CELLS)
            groups.append(
                [film(diagonal(things, cell), first, axes) for cell, first, axes in every]
            )
    return groups


# ------------------------------------------------------------------------------------------------ files


def fill_folder(out, seed, scenes):
    # One stream of random numbers per file, so that changing one's size leaves the others as they were.
    streams = {
        name: random.Random(f"{seed}/{name}")
        for name in ("pretrain", "finetune", "val", "benchmark")
    }
    files = {"pretrain": [], "finetune": [], "val": [], "val_pretrain": []}
    for split in streams:
        (out / "videos" / split).mkdir(parents=True)
    (out / "benchmark").mkdir()

    def save(split, number, clip, background):
        video = f"{split}/{number:05d}.gif"
        first, *rest = (world.render(scene, background) for scene in clip)
        first.save(out / "videos" / video, save_all=True, append_images=rest, duration=500, loop=0)
        return video

    def shade(rng):
        return tuple(rng.randint(225, 250) for _ in "rgb")

    for split, count in (
        ("pretrain", scenes // 2),
        ("finetune", scenes - scenes // 2),
        ("val", VAL_SCENES),
    ):
        rng = streams[split]
        for i in range(count):
            clip = draw_clip(rng, "val" if split == "val" else "train")
            video = save(split, i, clip, shade(rng))
            if split != "finetune":
                name = "val_pretrain" if split == "val" else split
                turns = [("What happens?", caption(clip, rng))]
                files[name].append(make_row(f"{name}-{i:05d}", video, clip, turns))
            if split != "pretrain":
                turns = [(q.text, q.answer) for q in interview(clip, rng)]
                files[split].append(make_row(f"{split}-{i:05d}", video, clip, turns))

    lines, number = [], 0
    for group, clips in enumerate(make_benchmark(streams["benchmark"])):
        background = shade(streams["benchmark"])
        for clip in clips:
            video, number = save("benchmark", number, clip, background), number + 1
            for q in questions(clip):
                row = {
                    "question_id": len(lines) + 1,
                    "group": group,
                    "video": video,
                    "text": q.text,
                }
                row |= {"label": q.answer, "kind": q.kind, "choices": q.choices, "scene": clip}
                lines.append(json.dumps(row))
    (out / "benchmark" / "moving.jsonl").write_text("\n".join(lines) + "\n")

    for name, rows in files.items():
        (out / f"{name}.json").write_text(
            "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
        )
    world.train_tokenizer(files["pretrain"] + files["finetune"], out / "tokenizer")
    summary = {"seed": seed, "scenes": scenes, "image_size": IMAGE_SIZE}
    summary |= {"rows": {name: len(rows) for name, rows in files.items()} | {"moving": len(lines)}}
    (out / "moving.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    world.main(__doc__, SCENES, fill_folder)
