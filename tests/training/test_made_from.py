"""What a run is made from: every kind of change of a content is named, and no date or path is."""

import dataclasses
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from config import LoRA, Model, Recipe, Source, Stage
from training import made_from
from training.made_from import compare, look


def write_rows(folder: Path, count: int = 4):
    """Write rows with pictures of 300 kB, of which no one is like another."""
    folder.mkdir()
    rows = []
    for i in range(count):
        (folder / f"{i}.png").write_bytes(bytes([i % 256]) * 300_000)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"a{i}"}]
        rows.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))


def write_model(folder: Path):
    """Write what looks like a model to somebody who only hashes it."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "adapter_model.safetensors"):
        (folder / name).write_bytes(name.encode() * 9)


def write_shard(rows: Path, file: Path):
    """Write the rows and pictures of a folder as a tar file."""
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, row in enumerate(json.loads((rows / "rows.json").read_text())):
            (rows / "row").write_text(json.dumps(row))
            tar.add(rows / "row", f"{i}.json")
            tar.add(rows / row["image"], f"{i}.png")


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    """A recipe that names one of everything."""
    for name in ("first", "second", "third", "held"):
        write_rows(tmp_path / name)
    for name in ("llm", "vision", "tokenizer", "adapter"):
        write_model(tmp_path / name)
    write_shard(tmp_path / "third", tmp_path / "third.tar")
    mixture = {
        "a": Source(f"{tmp_path}/second/rows.json"),
        "b": Source(f"{tmp_path}/third.tar"),
    }
    model = Model(
        llm=f"{tmp_path}/llm", vision=f"{tmp_path}/vision", tokenizer=f"{tmp_path}/tokenizer"
    )
    one = Stage(data=f"{tmp_path}/first/rows.json", validation=f"{tmp_path}/held/rows.json")
    two = Stage(mixture=mixture, lora=LoRA(adapter=f"{tmp_path}/adapter"))
    return Recipe(model=model, stage={"one": one, "two": two})


def replace_in(file: Path, old: bytes, new: bytes):
    """Change a file, and give it the date that it had."""
    content = file.read_bytes()
    assert old in content
    before = file.stat()
    file.write_bytes(content.replace(old, new, 1))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def remove_row(file: Path):
    """Remove the last row."""
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))


def swap_rows(file: Path):
    """Bring the rows into another order, with the same size."""
    file.write_text(json.dumps(json.loads(file.read_text())[::-1]))


# What is done to which file, and the kinds of which that is a change.
CHANGES = {
    "a row is gone": ("first/rows.json", remove_row, ["stage.one rows", "stage.one pictures"]),
    "two rows are swapped": ("first/rows.json", swap_rows, ["stage.one rows"]),
    "an answer": ("first/rows.json", (b'"a3"', b'"a9"'), ["stage.one rows"]),
    "a picture": ("first/2.png", (b"\2" * 9, b"\7" * 9), ["stage.one pictures"]),
    "a picture is gone": ("first/1.png", Path.unlink, ["stage.one pictures"]),
    "a source of a mixture": ("second/rows.json", (b"a1", b"b1"), ["stage.two a rows"]),
    "its picture": ("second/0.png", (b"\0", b"\1"), ["stage.two a pictures"]),
    "a row in a shard": ("third.tar", (b'"a2"', b'"a8"'), ["stage.two b rows"]),
    "a picture in a shard": ("third.tar", (b"\3" * 99, b"\4" * 99), ["stage.two b pictures"]),
    "a tokenizer": ("tokenizer/tokenizer.json", (b"json", b"JSON"), ["tokenizer"]),
    "a chat template": ("tokenizer/chat_template.jinja", Path.touch, ["tokenizer"]),
    "the language model": ("llm/model.safetensors", (b"model", b"MODEL"), ["model.llm"]),
    "the encoder's config": ("vision/config.json", (b"config", b"CONFIG"), ["model.vision"]),
    "a shard of weights": ("vision/model-2.safetensors", Path.touch, ["model.vision"]),
    "an adapter": ("adapter/adapter_model.safetensors", (b"a", b"b"), ["stage.two adapter"]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_decides_the_result_is_named_when_it_changes(recipe, tmp_path, case):
    name, change, kinds = CHANGES[case]
    before = look(recipe, recipe.stage)
    if callable(change):
        change(tmp_path / name)
    else:
        replace_in(tmp_path / name, *change)
    changes = compare(before, look(recipe, recipe.stage))
    assert [text.partition(" (")[0] for text in changes.deciding] == kinds
    assert Path(name).name in changes.deciding[0] or "tar" in name
    assert changes.key and not changes.others


def test_paths_and_dates_decide_nothing(recipe, tmp_path):
    """The same files elsewhere, newer, and once through JSON are the same."""
    before = json.loads(json.dumps(look(recipe, recipe.stage)))
    for file in tmp_path.rglob("*.*"):
        os.utime(file, (5, 5))
    shutil.move(tmp_path / "first", tmp_path / "moved")
    moved = dataclasses.replace(recipe.stage["one"], data=f"{tmp_path}/moved/rows.json")
    recipe = dataclasses.replace(recipe, stage={**recipe.stage, "one": moved})
    assert compare(before, look(recipe, recipe.stage)) == ([], [], "")


def test_held_out_rows_and_code_do_not_decide(recipe, tmp_path):
    before = look(recipe, recipe.stage)
    before["code"]["torch"] = "1.0"
    replace_in(tmp_path / "held/rows.json", b"a1", b"b1")
    changes = compare(before, look(recipe, recipe.stage))
    assert [text.partition(" (")[0] for text in changes.others] == ["code", "stage.one held-out"]
    assert (changes.deciding, changes.key) == ([], "")


def test_a_stage_that_is_done_needs_nothing_any_more(recipe, tmp_path):
    before = look(recipe, recipe.stage)
    remove_row(tmp_path / "first/rows.json")
    assert compare(before, look(recipe, ["two"])).deciding == []


def test_a_key_stands_for_one_change_only(recipe, tmp_path):
    before = look(recipe, recipe.stage)
    keys = set()
    for answer in (b"b1", b"c1"):
        replace_in(tmp_path / "first/rows.json", b"a1", answer)
        keys.add(compare(before, look(recipe, recipe.stage)).key)
        replace_in(tmp_path / "first/rows.json", answer, b"a1")
    assert len(keys) == 2


def test_a_bounded_part_of_many_pictures_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(made_from, "PICTURE_ROWS", 8)
    write_rows(tmp_path / "many", 20)
    recipe = Recipe(stage={"one": Stage(data=f"{tmp_path}/many/rows.json")})
    found = look(recipe, recipe.stage)["stage.one pictures"]
    assert len(found) == 8 and {"0.png", "10.png", "17.png"} <= set(found)


def test_a_picture_that_would_never_end_is_not_waited_for(tmp_path):
    write_rows(tmp_path / "odd")
    (tmp_path / "odd/1.png").unlink()
    os.mkfifo(tmp_path / "odd/1.png")
    (tmp_path / "odd/2.png").unlink()
    (tmp_path / "odd/2.png").mkdir()
    recipe = Recipe(stage={"one": Stage(data=f"{tmp_path}/odd/rows.json")})
    found = look(recipe, recipe.stage)["stage.one pictures"]
    assert found["1.png"] == "not a file" and found["2.png"].startswith("0 files")
