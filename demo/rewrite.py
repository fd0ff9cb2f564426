"""Worse captions of the same pictures, or fewer rows: data sets for the laboratory's grids.

    python -m demo.rewrite out/world/pretrain.json OUT.json --wrong 0.5     # half of the words
    python -m demo.rewrite out/world/pretrain.json OUT.json --missing 0.5   # half of the statements
    python -m demo.rewrite out/world/pretrain.json OUT.json --terse         # names of the objects
    python -m demo.rewrite out/world/finetune.json OUT.json --rows 1500     # the first rows

Pictures, questions and the order of the rows stay as they are, so whatever differs between models
that are trained on two such files comes from the words. The same command writes the same bytes.
"""

import json
import random
import re
from pathlib import Path

import command_line
from config import UserError
from demo.questions import COLUMNS, ROWS, named
from demo.scenes import COLOURS, SHAPES, Scene
from demo.world import write_rows

SEED = 0

# Words that can stand in each other's place. A wrong word is another one of its group.
GROUPS = (tuple(COLOURS), SHAPES, ROWS, COLUMNS)


def with_wrong_words(caption: str, rng: random.Random, share: float) -> str:
    """Return a caption in which each word of GROUPS is replaced with this chance."""

    def replace(match: re.Match) -> str:
        word = match[0]
        for group in GROUPS:
            if word in group and rng.random() < share:
                return rng.choice([other for other in group if other != word])
        return word

    return re.sub(r"\w+", replace, caption)


def with_missing_statements(caption: str, rng: random.Random, share: float) -> str:
    """Return a caption from which each statement is left out with this chance, but for one."""
    statements = caption.removesuffix(".").split(". ")
    kept = [statement for statement in statements if rng.random() >= share]
    if not kept:
        kept = [rng.choice(statements)]
    return ". ".join(kept) + "."


def terse(scene: Scene, rng: random.Random) -> str:
    """Return a caption that names the objects of a scene, in random order, and nothing else."""
    names = [named(thing) for thing in scene]
    rng.shuffle(names)
    return ", ".join(names) + "."


def read_rows(file: Path) -> list[dict]:
    """Return the rows that demo/world.py wrote. Raises UserError if there is no such file."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        fix = "write the world with `python -m demo.world OUT` first"
        raise UserError(file, "no such file", fix) from None


def main(argv: list[str]):
    parser = command_line.parser(__doc__)
    parser.add_argument("rows_of", metavar="IN.json", type=Path, help="rows of a demo world")
    parser.add_argument("out", metavar="OUT.json", type=Path, help="file to write")
    share = command_line.within(float, 0, 1)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--wrong", type=share, metavar="SHARE", help="of the words are others")
    how.add_argument("--missing", type=share, metavar="SHARE", help="of the statements are gone")
    how.add_argument("--terse", action="store_true", help="only the objects are named")
    how.add_argument(
        "--rows",
        type=command_line.within(int, 1, 10**7),
        metavar="N",
        help="only the first N rows, word for word",
    )
    args = parser.parse_args(argv)

    rows = read_rows(args.rows_of)[: args.rows]
    rng = random.Random(SEED)
    for row in rows:
        answer = row["conversations"][1]
        if args.wrong is not None:
            answer["value"] = with_wrong_words(answer["value"], rng, args.wrong)
        elif args.missing is not None:
            answer["value"] = with_missing_statements(answer["value"], rng, args.missing)
        elif args.terse:
            answer["value"] = terse(row["scene"], rng)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(args.out, rows)


if __name__ == "__main__":
    command_line.cli(main, __doc__)
