"""Wrong recipes: each field of each recipe, the command line, the file itself.

    python -m tests.tools.fuzz.recipes --count 500 --seed 0

A case loads a recipe and makes the cheap checks that train.py makes before it loads weights. One
that is accepted must be written and read back as it is, must be no other recipe than itself, and
its numbers must make a finite update of the optimizer.
"""

import dataclasses
import json
import math
import os
import random
import re
import typing
from pathlib import Path

import torch

import command_line
import config
import train
from data import Order
from inputs.holdout import open_stage
from tests.tools.environment import ROOT
from tests.tools.fuzz import Case, Violation, main, mutate_bytes
from training import small_sets

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))

# What stands in place of a value, as TOML or the command line have it.
ODD = (
    *("-1", "0", "1", "2", "-0.0", "0.5", "1.0", "1.5", "1e-30", "1e11", "1e300", "1e400"),
    *("nan", "inf", "-inf", "true", "false", "18446744073709551616", "9223372036854775807"),
    *("-9223372036854775809", "9" * 400, "9" * 5000, "0x10", "1_000", "01", "+1", "1e", "."),
    *(
        '""',
        '" "',
        '"x"',
        "x",
        "",
        "'",
        '"' * 3,
        '"\\u0000"',
        '"a\\nerror: all is well"',
        '"\\ud83d"',
    ),
    *('"\\u001b[2J"', '"\\U0001f600"', '"\x7f"', '"' + "x" * 50_000 + '"', '"../../etc/passwd"'),
    *('"partial:\\u00b2"', '"partial:-1"', '"partial:' + "9" * 5000 + '"', '"mps"', '"NaN"'),
    *('"0x0"', '"1x"', '"99999999999x9"', '"1x1 1x1"', "[]", "[1]", "[[1]]", "[1, 'a']"),
    *("{}", "{a = 1}", "{a = {b = 1}}", '{"" = 1}', "{a = nan, b = -inf}", "{a = 2000-01-01}"),
    *(
        "1979-05-27",
        "1979-05-27T07:32:00Z",
        "07:32:00",
        "[" * 5000,
        "{a=" * 5000,
        "[" * 40 + "]" * 40,
    ),
    *("1 # a", "1\nb = 2", "1\n[stage.other]", "null", "None", "\0", "\ud83d", "\x85"),
)

# Names of stages and sources, as TOML keys.
NAMES = (
    *('""', '" "', '"a.b"', '"a b"', '"a\\"b"', "'a\\b'", '"ä"', '"\\U0001f600"', '"\\u0000"'),
    *('"\\n"', '"../x"', '"/"', '"' + "x" * 5000 + '"', "0", "-", "_", '"stage"', '"\\u202e"'),
    *('"="', '"["', '"]"', '"#"', '"\\u007f"', "a.b.c"),
)


def case(rng: random.Random, folder: Path) -> Case:
    """Return a recipe with one mistake, or one that is only odd."""
    rows = folder / "rows.json"
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows.write_text(json.dumps([{"id": "a", "conversations": talk}] * 20))
    source = rng.choice(RECIPES)
    recipe = on_rows(config.load([str(source)], source)[0], rows, rng)
    text = config.dumps(recipe)
    file = folder / "recipe.toml"

    kind = rng.choice(("field", "field", "field", "command line", "command line", "name", "bytes"))
    if rng.random() < 0.1:
        kind = "file"
    argv = [str(file)]
    if kind == "field":
        what, text = change_a_field(text, rng)
    elif kind == "command line":
        argv.append(an_override(text, rng))
        what = f"{source.stem}, {argv[1][:100]!r}"
    elif kind == "name":
        name = rng.choice(NAMES)
        table = rng.choice((f"[stage.{name}]", f"[stage.mixed.mixture.{name}]"))
        text += f"\n{table}\ndata = {json.dumps(str(rows))}\n"
        what = table[:100]
    elif kind == "bytes":
        content, what = mutate_bytes(text.encode(), rng)
        file.write_bytes(content)
    if kind in ("field", "command line", "name"):
        file.write_bytes(text.encode(errors="surrogatepass"))
    if kind == "file":
        argv, what = an_odd_file(folder, text, rng)
    return Case(kind, f"{source.stem}: {what}", lambda: as_a_script(argv))


def on_rows(recipe: config.Recipe, rows: Path, rng: random.Random) -> config.Recipe:
    """Return the recipe with stages that train on a file of rows, or on a mixture of it."""
    stages = {}
    for name, stage in recipe.stage.items():
        stage = dataclasses.replace(stage, data=str(rows), images="", validation="", mixture={})
        if rng.random() < 0.3:
            mixture = {"one": config.Source(str(rows)), "two": config.Source(str(rows))}
            stage = dataclasses.replace(stage, data="", mixture=mixture)
        stages[name] = stage
    return dataclasses.replace(recipe, stage=stages)


def change_a_field(text: str, rng: random.Random) -> tuple[str, str]:
    """Return what was changed in a recipe's text, and the text."""
    lines = text.splitlines()
    numbers = [i for i, line in enumerate(lines) if line]
    number = rng.choice(numbers)
    key, _, value = lines[number].partition(" = ")
    odd = rng.choice(ODD)
    way = rng.choice(("value", "value", "value", "value", "inside", "key", "line"))
    if way == "line" or not value:
        lines[number] = f"{rng.choice(('x', 'base', 'model', 'stage', 'seed'))} = {odd}"
    elif way == "key":
        lines[number] = f"{key}{rng.choice(('x', '.x', ' x', '..'))} = {value}"
    elif way == "inside" and re.search(r"[0-9.]+", value):
        lines[number] = f"{key} = {re.sub(r'[0-9.]+', lambda _: odd, value, count=1)}"
    else:
        lines[number] = f"{key} = {odd}"
    return f"{way}: {lines[number][:100]!r}", "\n".join(lines)


def an_override(text: str, rng: random.Random) -> str:
    """Return section.key=value for a field of the recipe, with an odd value or an odd key."""
    tables = re.findall(r"^\[(.*)\]$", text, re.MULTILINE)
    table = rng.choice(tables)
    parts = text.split(f"[{table}]\n")
    keys = re.findall(r"^(\w+) = ", parts[1].split("\n\n")[0], re.MULTILINE) or ["x"]
    dotted = f"{table}.{rng.choice(keys)}"
    odd_keys = ("", ".", "x.y", "stage", table, "model.llm_config.a.b", "published.x", "a" * 50_000)
    if rng.random() < 0.2:
        dotted = rng.choice((*odd_keys, dotted + ".x", "model.llm_config" + ".a" * 3000))
    return f"{dotted}={rng.choice(ODD)}"


def an_odd_file(folder: Path, text: str, rng: random.Random) -> tuple[list[str], str]:
    """Return a command line that names something in place of a good recipe's file, and what."""
    file = folder / "recipe.toml"
    argv = [str(file)]
    content = text.encode()
    kinds = ("BOM", "UTF-16", "latin-1", "folder", "pipe", "loop", "huge", "deep keys", "CRLF")
    kinds += ("circle", "chain", "device", "absent", "NUL", "long", "below a file", "empty", "word")
    what = rng.choice(kinds)
    if what == "BOM":
        file.write_bytes(b"\xef\xbb\xbf" + content)
    elif what == "UTF-16":
        file.write_bytes(text.encode("utf-16"))
    elif what == "latin-1":
        file.write_bytes("# ä\n".encode("latin-1") + content)
    elif what == "CRLF":
        file.write_bytes(content.replace(b"\n", b"\r\n"))
    elif what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "loop":
        file.symlink_to(file)
    elif what == "huge":
        file.write_bytes(content + b"# " + b"a" * 10_000_000)
    elif what == "deep keys":
        file.write_bytes(content + b"\n[model.llm_config." + b".".join([b"a"] * 3000) + b"]\n")
    elif what == "circle":
        file.write_text("base = 'b.toml'")
        (folder / "b.toml").write_text(f"base = '../{folder.name}/recipe.toml'")
    elif what == "chain":
        for i in range(100):
            (folder / f"{i}.toml").write_text(f"base = '{i + 1}.toml'")
        argv = [str(folder / "0.toml")]
    elif what == "empty":
        file.write_bytes(b"")
    elif what != "absent":
        below = str(folder / "rows.json" / "recipe.toml")
        words = {"device": "/dev/zero", "NUL": "a\0b", "long": "x" * 5000, "below a file": below}
        argv = [words.get(what, rng.choice(("", "-", "--", "\ud83d", "\x1b[2J", ".", "~")))]
    return argv, what


def as_a_script(argv: list[str]):
    """Load and check a recipe; end well where command_line.cli has one line for what is raised."""
    try:
        load_and_check(argv)
    except OSError as e:
        if not command_line.one_line(e, ""):
            raise


def load_and_check(argv: list[str]):
    """Load a recipe as train.py does, check it; raise Violation for an accepted one's faults."""
    recipe, path = config.load(argv, train.DEMO)
    train.check_recipe(recipe, path)

    # It is written and read back as it is.
    text = config.dumps(recipe)
    again = path.with_name("again.toml")
    again.write_bytes(text.encode())
    if config.dumps(config.load([str(again)], "")[0]) != text:
        raise Violation("another recipe after writing and reading")
    if config.differences(text, recipe) != ([], []) and "nan" not in text:
        raise Violation(f"it differs from itself: {config.differences(text, recipe)}")

    for name, number in numbers_of(recipe):
        if not math.isfinite(number):
            raise Violation(f"{name} is {number}")
    for name, stage in recipe.stage.items():
        rows = open_stage(stage, f"stage.{name}").training
        Order(len(rows), recipe.train.seed, rows.parts)(0)
        facts = small_sets.Facts(len(rows), len(rows), width=2560, ranks=1)
        update(small_sets.choose(stage, facts)[0])


def numbers_of(part, path: str = "") -> list[tuple[str, float]]:
    """Return (name, value) for each number that a field of a recipe holds."""
    found = []
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        full = f"{path}{f.name}"
        if dataclasses.is_dataclass(value):
            found += numbers_of(value, f"{full}.")
        elif isinstance(value, dict):
            for name, inner in value.items():
                if dataclasses.is_dataclass(inner):
                    found += numbers_of(inner, f"{full}.{name}.")
        elif isinstance(value, (int, float)):
            found.append((full, value))
    return found


def update(stage: config.Stage):
    """Raise Violation if some steps of AdamW with the stage's numbers make NaN."""
    weight = torch.nn.Parameter(torch.ones(2))
    group = {"params": [weight], "peak": stage.learning_rate, "weight_decay": stage.weight_decay}
    optimizer = torch.optim.AdamW([group], lr=0.0, betas=(0.9, stage.beta2), eps=1e-8)
    for step in range(3):
        weight.grad = torch.tensor([1.0, -2.0])
        train.update(optimizer, stage, step, steps=5)
    if not weight.isfinite().all():
        raise Violation(f"an update makes {weight.tolist()}")
    if stage.warmup_ratio < 0.5 and stage.learning_rate and not stage.weight_decay:
        if not weight[0] < 1 < weight[1]:
            raise Violation(f"an update goes uphill: {weight.tolist()}")


if __name__ == "__main__":
    main(case, typing.cast(str, __doc__))
