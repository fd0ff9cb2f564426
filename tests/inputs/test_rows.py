"""rows.py and index.py: formats, offsets, mixtures; and what data.py makes of them: counts."""

import collections
import dataclasses
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import data
from config import Stage, Train, UserError
from data import Order, Steps, token_counts
from inputs import index, json_list
from inputs.forms import read_row
from inputs.holdout import open_stage
from inputs.image_processor import ImageProcessor
from inputs.json_rows import JsonList
from inputs.media import media_names
from inputs.rows import FORMATS, Part, RowMixture, Rows, open_rows
from inputs.shards import shard
from inputs.tiling import Tiling
from packing import IGNORE
from tests.tools.environment import ROOT
from tests.tools.sample_rows import (
    make_sample,
    mean_colour_spec,
    row,
    rows_of,
    turns,
    write,
    write_pictures_and_rows,
)

HARD = [
    '"',
    '\\"',
    "]",
    "}",
    "[{",
    ",",
    "\n",
    "\u56fe\u7247",
    "\U0001f600",
    "\ud83d",
    "\\",
    '\\\\"',
    "\t",
    "a" * 50,
    "",
]
VALUES = [
    12,
    -1.5e-7,
    1e300,
    True,
    False,
    None,
    [],
    {},
    [[["x]"]]],
    {"a": {"}": "{"}},
    float("inf"),
    -0.0,
]


def odd_row(r: random.Random) -> dict:
    text = "".join(r.choices(HARD, k=r.randint(0, 9)))
    return {
        "id": r.choice(["", text, r.randint(0, 10**9)]),
        text + "k": r.choice(VALUES),
        "conversations": turns(text),
    }


@pytest.fixture
def always(monkeypatch):
    """Files of any size get an index, and are read row by row."""
    monkeypatch.setattr(index, "SMALL", 0)


@pytest.fixture(scope="module")
def spec():
    return mean_colour_spec()


@pytest.fixture
def many(tmp_path):
    return write_pictures_and_rows(tmp_path)


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (40, 50, 60)).save(tmp_path / "b.png")
    return tmp_path


# ---- what is a file of rows


def test_rows_of_a_list_and_of_lines(folder):
    rows = write(folder, [row("x"), {"conversations": []}])
    assert len(rows) == 2 and rows[0]["id"] == "x" and rows.images == folder
    assert (
        rows.where(0) == f"{folder}/rows.json:row 0 (id x)"
        and rows.where(1) == f"{folder}/rows.json:row 1"
    )
    text = f"\ufeff{json.dumps(row('y'))}\n\n{json.dumps(row('z'))}\n{{oops\n[1]\n"
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    lines = open_rows(folder / "rows.jsonl", folder)
    assert (
        len(lines) == 4
        and lines[0]["id"] == "y"
        and lines.where(1) == f"{folder}/rows.jsonl:line 3 (id z)"
    )
    with pytest.raises(UserError, match=r"rows.jsonl:line 4: not JSON .*column 2.*; fix: "):
        lines[2]
    with pytest.raises(UserError, match=r"rows.jsonl:line 5: a JSON list, not a row; fix: "):
        lines[3]


@pytest.mark.parametrize(
    "content, what",
    [
        (b"", "rows.json: empty file"),
        (b" \n", "rows.json: empty file"),
        (b"[]", "rows.json: no rows"),
        (b'{"a": 1}', "rows.json: a JSON dict, not a list of rows"),
        (b'[{"a": 1},\n  {"b" 2}]', "rows.json: not JSON at line 2 column 8"),
        (b'[{"a": 1}]\n{"a": 2}', "not JSON at line 2 .*Extra data"),
        (b'["\xff"]', "rows.json: not UTF-8 at byte 2"),
        (b"<html></html>", "rows.json: an HTML page"),
    ],
)
def test_a_file_that_is_no_list_of_rows(tmp_path, content, what):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(UserError, match=what + ".*; fix: "):
        open_rows(tmp_path / "rows.json")


def test_missing_files_and_folders(folder):
    with pytest.raises(UserError, match="none.json: no such file or directory; fix: "):
        open_rows(folder / "none.json")
    write(folder, [row("x")])
    with pytest.raises(UserError, match="none: no such folder of images; fix: "):
        open_rows(folder / "rows.json", folder / "none")


# ---- the index


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 24])
def test_every_row_of_a_list_is_found_whatever_it_holds(tmp_path, always, monkeypatch, chunk):
    monkeypatch.setattr(json_list, "CHUNK", chunk)
    r = random.Random(chunk)
    for n, options in enumerate(
        [
            {},
            {"indent": 1},
            {"separators": (",", ":")},
            {"ensure_ascii": False},
            {"indent": "\t", "ensure_ascii": False},
        ]
    ):
        rows = [odd_row(r) for _ in range(60)]
        text = json.dumps(rows, **options).encode("utf-8", "replace").decode()
        file = tmp_path / f"{n}.json"
        file.write_bytes(
            b"\xef\xbb\xbf" * (n % 2)
            + r.choice(["", " \r\n"]).encode()
            + text.encode()
            + b" \n" * (n % 3)
        )
        found, expected = open_rows(file), json.loads(text)
        assert len(found) == 60 and [found[i] for i in range(60)] == expected
        assert (tmp_path / f"{n}.json.index").exists() and found[-1] == expected[-1]
        with pytest.raises(IndexError):
            found[60]


@pytest.mark.parametrize("chunk", [1, 3, 1 << 24])
def test_what_is_no_row_of_a_list_is_named_when_it_is_read(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_list, "CHUNK", chunk)
    (tmp_path / "rows.json").write_text('[12345 , -1.5e10,"a",{"id": 3}]')
    rows = open_rows(tmp_path / "rows.json")
    assert len(rows) == 4 and rows[3] == {"id": 3}
    for i, kind in enumerate(("int", "float", "str")):
        with pytest.raises(UserError, match=f"rows.json:row {i}: a JSON {kind}, not a row; fix: "):
            rows[i]


@pytest.mark.parametrize(
    "text, what",
    [
        ('[{"a": 1},\n  {"b" 2}, {"c": 3}]', r"line 2 column 8 \(row 1, byte 18\): Expecting ':'"),
        (
            '[{"a": "\u00e9"},\n {"b": "\u00e9" 2}]',
            r"line 2 column 12 \(row 1, byte 26\): Expecting ','",
        ),
        ('[{"a": 1} {"b": 2}]', r"line 1 column 11 \(row 1, byte 10\): Expecting ','"),
        ('[{"a": 1}, ]', r"line 1 column 12 \(row 1, byte 11\): Expecting value"),
        ('[{"a": 1}, {"b": "c', r"line 1 column 18 \(row 1, byte 17\): Unterminated string"),
        ('[{"a": 1}', r"line 1 column 10 \(row 1, byte 9\): Expecting ','"),
        ('[{"a": 1}] x', r"line 1 column 12 \(row 1, byte 11\): Extra data"),
        ('[{"a": tru}]', r"line 1 column 8 \(row 0, byte 7\): Expecting value"),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 24])
def test_a_row_that_does_not_parse_is_named_with_line_row_and_byte(
    tmp_path, monkeypatch, text, what, chunk
):
    monkeypatch.setattr(json_list, "CHUNK", chunk)
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"rows.json: not JSON at {what}.*; fix: "):
        open_rows(tmp_path / "rows.json")
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


def test_bytes_that_are_not_utf8_are_named_by_their_offset(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "CHUNK", 4)
    for cut, at in ((b'[{"a": "\xff"}]', 8), (b'[{"a": "\xe5\x9b', 8)):
        (tmp_path / "rows.json").write_bytes(cut)
        with pytest.raises(UserError, match=f"rows.json: not UTF-8 at byte {at}; fix: "):
            open_rows(tmp_path / "rows.json")


def test_a_line_that_does_not_parse_is_named_when_it_is_read(tmp_path, always):
    (tmp_path / "rows.jsonl").write_bytes(
        b'\xef\xbb\xbf{"id": 1}\r\n \t\r\n\n{"id": 2}\n{"id" 3}\n{"id": "\xff"}'
    )
    rows = open_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 4 and [rows[i]["id"] for i in (0, 1)] == [1, 2]
    assert rows.where(1) == f"{tmp_path}/rows.jsonl:line 4 (id 2)"
    with pytest.raises(
        UserError, match=r"rows.jsonl:line 5: not JSON at line 1 column 7, from byte 29: .*; fix: "
    ):
        rows[2]
    with pytest.raises(UserError, match="rows.jsonl:line 6: not UTF-8 at byte 46; fix: "):
        rows[3]


def scans(monkeypatch):
    """Return a list to which every scan of a JSON list adds its file."""
    counted = []
    scan = JsonList.scan

    def counting(self, file):
        counted.append(file)
        return scan(self, file)

    monkeypatch.setattr(JsonList, "scan", counting)
    return counted


def test_the_index_is_scanned_once_and_again_when_the_file_changes(tmp_path, always, monkeypatch):
    counted = scans(monkeypatch)
    first = write(tmp_path, [row(i) for i in range(5)])
    assert len(open_rows(first.file)) == 5 and len(counted) == 1
    assert isinstance(first.indexes[0], np.memmap)
    os.utime(first.file, ns=(1, 1))  # another time
    assert len(open_rows(first.file)) == 5 and len(counted) == 2
    with pytest.raises(
        UserError, match="rows.json: has changed since it was opened; fix: start again"
    ):
        first[0]
    text = first.file.read_text()
    first.file.write_text(
        text.replace('"id": 0', '"id": 7')
    )  # the same size and time, another head
    os.utime(first.file, ns=(1, 1))
    assert open_rows(first.file)[0]["id"] == 7 and len(counted) == 3
    os.utime(write(tmp_path, [row(i) for i in range(6)]).file, ns=(1, 1))  # another size
    assert len(open_rows(first.file)) == 6 and len(counted) == 5
    saved = tmp_path / "rows.json.index"
    whole = saved.read_bytes()
    for damage in (b"", whole[:50], whole[:-8], b"x" * len(whole)):
        saved.write_bytes(damage)
        assert open_rows(first.file)[5]["id"] == 5 and saved.read_bytes() == whole
    assert len(counted) == 9 and not list(tmp_path.glob(".*"))


def test_a_read_only_folder_gets_its_index_in_the_cache_and_without_one_it_stays_in_memory(
    tmp_path, always, monkeypatch
):
    counted, put = scans(monkeypatch), index.write_file
    allowed = [tmp_path / "cache"]

    def write_file(path, content):
        if not any(path.is_relative_to(folder) for folder in allowed):
            raise OSError(30, "Read-only file system")
        put(path, content)

    monkeypatch.setattr(index, "write_file", write_file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = write(tmp_path, [row("x")])
    assert rows[0]["id"] == "x" and not (tmp_path / "rows.json.index").exists()
    assert open_rows(rows.file)[0]["id"] == "x" and len(counted) == 1
    (tmp_path / "other").mkdir()
    other = write(
        tmp_path / "other", [row("y"), row("z")]
    )  # the same name elsewhere: an index of its own
    assert len(other) == 2 and len(open_rows(rows.file)) == 1 and len(counted) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nowhere"))
    assert open_rows(rows.file)[0]["id"] == "x" and len(counted) == 3


def test_a_small_file_leaves_nothing_beside_it(tmp_path):
    write(tmp_path, [row("x")])
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_processes_that_start_together_scan_once_and_agree(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row(i) for i in range(20000)]))
    code = """
import sys, time
from inputs import index
from inputs.json_rows import JsonList
from inputs.media import media_names
from inputs.rows import open_rows

index.SMALL = 0
scan = JsonList.scan

def slow(self, file):
    print("scanned")
    time.sleep(0.3)
    return scan(self, file)

JsonList.scan = slow
(table,) = open_rows(sys.argv[1]).indexes
print(len(table), table.sum(), type(table).__name__)
"""
    start = [sys.executable, "-c", code, str(file)]
    started = [
        subprocess.Popen(start, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    said = [process.communicate()[0].split("\n") for process in started]
    assert sum(lines.count("scanned") for lines in said) == 1
    assert (
        len({lines[-2] for lines in said}) == 1
        and said[0][-2].startswith("20000 ")
        and "memmap" in said[0][-2]
    )


def test_rows_are_sent_to_a_process_by_name(tmp_path, always):
    rows = write(tmp_path, [row(i) for i in range(1000)])
    sent = pickle.dumps(rows)
    assert len(sent) < 1000 and pickle.loads(sent)[999] == rows[999]


def damages(whole: bytes, other: bytes) -> list[bytes]:
    """Return contents that an index file may have and must not be believed in."""
    array = np.load(io.BytesIO(whole))

    def saved(changed):
        buffer = io.BytesIO()
        np.save(buffer, changed)
        return buffer.getvalue()

    wrong = array.copy()
    wrong[3, 0] += 1
    return [
        other,
        saved(wrong),
        saved(wrong[:-1]),
        saved(array.astype(float)),
        saved(array[:, :2]),
        saved(array[0]),
        saved(np.array(7)),
        saved(np.array(["x"])),
        whole[: len(whole) // 2],
        whole.replace(b"(8, 3)", b"(9, 3)"),
        whole.replace(b"descr", b"d(scr"),
        whole.replace(b"'<i8'", b"'|O'}"),
    ]


def test_a_damaged_or_foreign_index_is_made_again(tmp_path, always):
    rows = write(tmp_path, [row(i) for i in range(6)])
    other = write(tmp_path, [row("other" * i) for i in range(6)], "other.json")
    saved = tmp_path / "rows.json.index"
    whole = saved.read_bytes()
    for damage in damages(whole, Path(f"{other.file}.index").read_bytes()):
        assert damage != whole
        saved.write_bytes(damage)
        assert [open_rows(rows.file)[i] for i in range(6)] == [row(i) for i in range(6)]
        assert saved.read_bytes() == whole
    saved.unlink()
    os.mkfifo(saved)
    assert open_rows(rows.file)[5] == row(5)


def test_an_index_does_not_outlive_a_change_in_the_middle_of_its_file(tmp_path, always):
    """The size, the time, the beginning and the end may all be the same."""
    texts = [row(i, "x" * 5000, image=None) for i in range(20)]
    rows = write(tmp_path, texts)
    stat = rows.file.stat()
    texts[9]["conversations"][0]["value"], texts[10]["id"] = "x" * 4999, 100
    rows.file.write_text(json.dumps(texts))
    assert rows.file.stat().st_size == stat.st_size
    os.utime(rows.file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = open_rows(rows.file)
    assert [found[i] for i in range(20)] == texts


def test_what_a_killed_process_left_beside_an_index_is_removed(tmp_path, always):
    (tmp_path / ".rows.json.index.abcd_123").write_text("half")
    (tmp_path / ".rows.json.mine.abcd_123").write_text("precious")
    write(tmp_path, [row("x")])
    names = sorted(os.listdir(tmp_path))
    assert names == [".rows.json.mine.abcd_123", "rows.json", "rows.json.index"]


def test_rows_are_read_without_a_home_and_without_locks(tmp_path, always, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(index, "fcntl", None)
    assert write(tmp_path, [row("x")])[0] == row("x")


# ---- what comes from outside

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize(
    "text, what",
    [
        (f'{{"a": {DEEP}}}', "nested too deeply"),
        (f'{{"a": {"9" * 5000}}}', "a number of thousands of digits"),
    ],
)
def test_json_that_is_more_than_a_reader_takes_is_one_line(tmp_path, ending, text, what):
    file = tmp_path / f"rows.{ending}"
    file.write_text(f"[{text}]" if ending == "json" else text)
    with pytest.raises(UserError, match=f"rows.{ending}:.*{what}.*; fix: "):
        open_rows(file)[0]


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_utf16_is_named(tmp_path, ending, coding):
    text = json.dumps([row("x")] if ending == "json" else row("x"))
    (tmp_path / f"rows.{ending}").write_bytes(text.encode(coding))
    with pytest.raises(UserError, match=f"rows.{ending}: UTF-16 text; fix: save it as UTF-8"):
        open_rows(tmp_path / f"rows.{ending}")


@pytest.mark.parametrize("ending", ["json", "jsonl", "tar"])
def test_only_regular_files_are_read(tmp_path, ending):
    os.mkfifo(tmp_path / f"rows.{ending}")
    (tmp_path / f"zero.{ending}").symlink_to("/dev/zero")
    for name in ("rows", "zero"):
        with pytest.raises(UserError, match=f"{name}.{ending}: .*not a regular file.*; fix: "):
            open_rows(tmp_path / f"{name}.{ending}")


@pytest.mark.parametrize("key", ["images", "Image", "IMAGES", "videos", "image_path", "image_url"])
def test_pictures_are_read_whatever_they_stand_under(tmp_path, key):
    made = row("x", "What?", image=None)
    made[key] = ["a.png"]
    rows = write(tmp_path, [made, row("y", "What?", image=None) | {key: None}])
    (picture,) = rows.media(0, rows[0])
    assert picture.name == "a.png" and picture.source == tmp_path / "a.png"
    assert picture.kind == ("video" if key == "videos" else "image")
    assert rows[0]["conversations"][0]["value"] == "<image>\nWhat?"
    assert rows.media(1, rows[1]) == []
    assert rows[1]["conversations"][0]["value"] == "What?"


# ---- formats


def test_every_format_offers_what_rows_promises_and_the_same_rows(tmp_path):
    many = write_pictures_and_rows(tmp_path)
    expected = [many[i] for i in range(38)]
    text = "\n".join(json.dumps(each) for each in expected)
    (tmp_path / "lines.jsonl").write_text(text)
    shard(many, tmp_path / "shards", 20_000)
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    # A column has one type.
    listed = [
        {**row, "id": str(i), "image": media_names(row)[1] or None}
        for i, row in enumerate(expected)
    ]
    table = pyarrow.Table.from_pylist(listed)
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=5)
    names = ("lines.jsonl", "shards", "rows.parquet")
    opened = [many, *(open_rows(tmp_path / name) for name in names)]
    kinds = ("list", "lines", "tar", "parquet")
    assert [type(rows) for rows in opened] == [FORMATS[kind] for kind in kinds]
    for rows in [*opened, RowMixture([many], [1.0])]:
        found = [rows[i] | {"id": expected[i]["id"]} for i in range(38)]
        assert isinstance(rows, Rows) and found == expected
        media = rows.media(37, rows[37])
        assert [(m.kind, m.name) for m in media] == [("image", "c.JPEG"), ("image", "a.png")]
        assert rows.media(0, rows[0]) == []
        assert "(id 20)" in rows.where(20) and rows.where(20) == rows.where(20, rows[20])
        spans = rows.file_spans()
        assert spans[0].begin == 0 and spans[-1].end == 38
        assert all(a.end == b.begin for a, b in zip(spans, spans[1:], strict=False))
    assert isinstance(opened[0].media(20, many[20])[0].source, Path)
    assert isinstance(opened[2].media(20, many[20])[0].source, bytes)


def test_a_glob_is_of_files_of_one_format(tmp_path):
    write(tmp_path, [row("x"), row("y")], "1.json")
    write(tmp_path, [row("z")], "2.json")
    rows = open_rows(f"{tmp_path}/*.json")
    assert [rows[i]["id"] for i in range(3)] == ["x", "y", "z"]
    assert rows.where(2) == f"{tmp_path}/2.json:row 0 (id z)"
    assert len(open_rows(f"{tmp_path}/2*.json")) == 1
    (tmp_path / "3.jsonl").write_text(json.dumps(row("w")))
    with pytest.raises(
        UserError,
        match=r"several formats: files of JSON lines \(.*3.jsonl\), JSON lists \(.*1.json\); fix",
    ):
        open_rows(f"{tmp_path}/*.json*")


# ---- mixtures


def test_a_mixture_takes_of_each_source_what_its_weight_says(tmp_path):
    a, b, c = (
        write(tmp_path, [row(f"{k}{i}") for i in range(n)], f"{k}.json")
        for k, n in (("a", 10), ("b", 7), ("c", 4))
    )
    mixture = RowMixture([a, b, c], [0.5, 1.0, 2.5])
    assert len(mixture) == 21 and mixture.parts == (Part(10, 5), Part(7, 7), Part(4, 10))
    assert (
        mixture[9]["id"] == "a9" and mixture[10]["id"] == "b0" and mixture.where(20) == c.where(3)
    )
    (picture,) = mixture.media(11, read_row({"image": "x.png"}, "here"))
    assert picture.source == tmp_path / "x.png"
    order = Order(21, 3, mixture.parts)
    epochs = [[order(k)[1] for k in range(22 * e, 22 * e + 22)] for e in range(4)]
    for e, epoch in enumerate(epochs):
        times = collections.Counter(epoch)
        assert sum(times[r] for r in range(10)) == 5 and max(times[r] for r in range(10)) == 1
        assert [times[r] for r in range(10, 17)] == [1] * 7
        assert sorted(times[r] for r in range(17, 21)) == [2, 2, 3, 3], e
    for e in (
        0,
        2,
    ):  # half of `a` each: in two epochs all of it, and 20 of 4 rows of `c` five times each
        times = collections.Counter(epochs[e] + epochs[e + 1])
        assert [times[r] for r in range(10)] == [1] * 10 and [times[r] for r in range(17, 21)] == [
            5
        ] * 4
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0]) and order(22)[0] == 1
    again = Order(21, 3, mixture.parts)
    assert [again(k)[1] for k in (70, 3, 30)] == [epochs[3][4], epochs[0][3], epochs[1][8]]
    assert [Order(21, 4, mixture.parts)(k)[1] for k in range(22)] != epochs[0]
    assert set(order.candidates(5)) <= set(epochs[0]) and next(order.candidates(5)) == epochs[0][5]
    assert any(r >= 10 for r in epochs[0][:5])  # sources are mixed, not one after the other
    twins = [Order(20, 0, (Part(10, 5), Part(10, 5)))(k)[1] for k in range(10)]
    assert {r for r in twins if r < 10} != {
        r - 10 for r in twins if r >= 10
    }  # each has an order of its own
    first = [r for r in epochs[0] if 10 <= r < 17]
    assert first != sorted(first)
    with pytest.raises(UserError, match="b.json: weight 0.01 takes none of 7 rows; fix: "):
        RowMixture([a, b], [1, 0.01])


def test_steps_of_a_mixture(tmp_path, spec, many):
    mixture = RowMixture([many, many], [1.0, 0.5])
    steps = Steps(mixture, spec, Stage(global_batch=8, epochs=2.0), Train())
    assert len(steps) == 15 and steps.order.n == 57  # 38 + 19
    seen = collections.Counter(r for i in range(15) for r in rows_of([steps[i]]))
    assert all(seen[r] >= 2 for r in range(38)) and all(seen[r] >= 1 for r in range(38, 76))
    ranks = [Steps(mixture, spec, Stage(global_batch=8), Train(), rank, 2)[3] for rank in range(2)]
    assert sorted(rows_of(ranks)) == sorted(rows_of([steps[3]]))


# ---- token counts, and who makes which samples


def test_token_counts_are_those_of_the_samples_and_kept(many, tmp_path, spec, monkeypatch):
    (tmp_path / "rows.json").unlink()
    rows = write(tmp_path, [many[i] for i in range(37)] + [{"id": "bad"}])
    counts = token_counts(rows, spec, workers=1)
    for i in range(37):
        sample = make_sample(rows, i, spec)
        assert counts[i].tolist() == [
            len(sample.ids),
            len(sample.items),
            int((sample.labels != IGNORE).sum()),
        ]
    assert counts[37].tolist() == [0, 0, 0] and isinstance(counts, np.memmap)
    tried = []

    def make(*args, **options):
        tried.append(1)
        return [make_sample(*args, **options)]

    monkeypatch.setattr(data, "make_samples", make)
    assert np.array_equal(token_counts(rows, spec), counts) and not tried
    wider = {"views": dataclasses.replace(spec.views, tokens=6)}
    for change in ({"max_tokens": 30}, {"template": "phi", "tokenizer": spec.tokenizer}, wider):
        other = token_counts(rows, dataclasses.replace(spec, **change))
        assert not np.array_equal(other, counts) and len(tried) == 38
        tried.clear()
    doubled = token_counts(RowMixture([rows, rows], [1, 1]), spec)
    assert np.array_equal(doubled, np.concatenate([counts, counts]))


def test_counts_of_shards_are_those_of_the_files(tmp_path, spec):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = write(tmp_path, [row(i, "<image>" + "x" * i) for i in range(40)])
    shard(rows, tmp_path / "out", 20_000)
    found = open_rows(tmp_path / "out")
    assert len(found.files) > 1 and np.array_equal(
        token_counts(found, spec), token_counts(rows, spec)
    )


def test_ranks_with_counts_make_the_step_of_one_rank_with_as_many_tokens_each(many, spec, tmp_path):
    rows = write(
        tmp_path, [row(i, "x" * (13 * i % 200), image=None) for i in range(64)], "texts.json"
    )
    stage, counts = Stage(global_batch=32, micro_batch_tokens=400), token_counts(rows, spec)
    one = Steps(rows, spec, stage, Train())
    for world in (1, 2, 3):
        ranks = [
            Steps(rows, spec, stage, Train(), rank, world, counts=counts) for rank in range(world)
        ]
        dealt = [Steps(rows, spec, stage, Train(), rank, world) for rank in range(world)]
        for i in range(len(one)):
            assert sorted(rows_of([rank[i] for rank in ranks])) == sorted(rows_of([one[i]]))
            tokens, before = (
                [sum(len(b.input_ids) for b in r[i].batches) for r in rs] for rs in (ranks, dealt)
            )
            assert max(tokens) - min(tokens) <= 0.03 * max(tokens)
            assert world == 1 or max(tokens) < max(before)


def test_uint8_pixels_reach_the_batch_as_they_are(many, spec, tmp_path):
    spec = dataclasses.replace(spec, views=Tiling(5, processor=ImageProcessor(8)))
    steps = Steps(many, spec, Stage(global_batch=38), Train(on_bad_row="skip"))
    batches = [b for b in steps[0].batches if b.images is not None]
    assert batches and all(b.images.dtype == torch.uint8 for b in batches)


# ---- as a recipe names them


def test_a_recipe_mixes_sources_by_name(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name, n in (("some", 10), ("rare", 40)):
        write(tmp_path, [row(f"{name}{i}", "x", image=None) for i in range(n)], f"{name}.json")
    file = tmp_path / "r.toml"
    file.write_text(
        f'[stage.a.mixture.some]\ndata = "{tmp_path}/some.json"\nweight = 2\n'
        f'[stage.a.mixture.rare]\ndata = "{tmp_path}/rare.json"\n'
    )
    recipe, _ = config.load([str(file), "stage.a.mixture.rare.weight=0.25"], file)
    rows = open_stage(recipe.stage["a"], "stage.a").training
    assert rows.parts == (Part(10, 20), Part(40, 10))
    file.write_text(config.dumps(recipe))
    assert config.load([str(file)], file)[0] == recipe
    for wrong, message in (
        ("stage.a.data=b.json", "stage.a.data: set beside a mixture; fix"),
        ("stage.a.mixture.rere.weight=1", 'rere.weight: unknown source; fix: did you mean "rare"?'),
        ("stage.a.mixture.rare.wait=1", 'unknown key; fix: did you mean "weight"?'),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            open_stage(config.load([str(file), wrong], file)[0].stage["a"], "stage.a")
