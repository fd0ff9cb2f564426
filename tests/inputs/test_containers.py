"""The same rows in every container, and how a container is recognised: kinds.py, folders.py,
table_rows.py, hub.py and the tars of others."""

import csv
import io
import json
import os
import pickle
import random
import sys
import tarfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from config import Stage, Train, UserError
from data import Steps
from inputs import hub, index
from inputs.folders import choose_files
from inputs.forms import CAPTION_PROMPT
from inputs.pictures import load_image
from inputs.rows import FORMATS, RowMixture, open_rows
from inputs.shards import scan_tar, shard
from inputs.table_rows import ends_in_quotes
from tests.tools.environment import shared
from tests.tools.sample_rows import flat, make_sample, mean_colour_spec, row, rows_of, turns, write

TEXTS = (
    "a cat",
    'it says "stop", twice; ""',
    "two\nlines\n\nand a third",
    "\u56fe\u7247 \U0001f600 caf\u00e9",
    "12",
    "a,b;c\td",
    "[1, 2]",
    "yes",
)
NAMES = ("a.png", "b.jpg", "c.webp", "sub/d.png", "sub/e.PNG", "f.bmp", "g.gif", "h.jpeg")


@pytest.fixture(scope="module")
def spec():
    return mean_colour_spec()


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """What is kept, and the Hugging Face cache, are empty folders of the test."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    """A folder of eight pictures, each of another colour and another format."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        Image.new("RGB", (8, 8), (25 * i, 200 - 20 * i, 60)).save(folder / name)
    return folder


def key_of(name: str) -> str:
    return os.path.splitext(name)[0]


def write_table(file: Path, rows: list[dict], **options):
    with open(file, "w", encoding=options.pop("encoding", "utf-8"), newline="") as lines:
        table = csv.DictWriter(lines, list(rows[0]), **options)
        table.writeheader()
        table.writerows(rows)
    return file


def write_tar(file: Path, members: list[tuple[str, bytes | str]], **options):
    with tarfile.open(file, "w", **options) as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def write_lines(file: Path, rows: list[dict]):
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return file


# ---------------------------------------------------------------- the same rows, in every container


def questions() -> list[dict]:
    """Return rows of an id, a picture, a question and an answer."""
    return [
        {"id": key_of(name), "image": name, "question": f"Which, {text}?", "answer": text}
        for name, text in zip(NAMES, TEXTS, strict=True)
    ]


def captions() -> list[dict]:
    return [
        {"id": key_of(name), "image": name, "caption": text}
        for name, text in zip(NAMES, TEXTS, strict=True)
    ]


def llava(rows: list[dict]) -> list[dict]:
    """Return the same rows as LLaVA's."""
    made = []
    for each in rows:
        answer = each.get("answer", each.get("caption"))
        question = f"<image>\n{each.get('question', CAPTION_PROMPT)}"
        made.append(
            {"id": each["id"], "image": each["image"], "conversations": turns(question, answer)}
        )
    return made


def as_messages(folder, rows):
    made = []
    for each in llava(rows):
        said = [
            {"role": role, "content": turn["value"]}
            for role, turn in zip(("user", "assistant"), each["conversations"], strict=True)
        ]
        made.append({"id": each["id"], "images": [each["image"]], "messages": said})
    return write_lines(folder / "messages.jsonl", made)


def as_semicolons(folder, rows):
    return write_table(folder / "rows.csv", rows, delimiter=";", encoding="utf-8-sig")


def as_tabs(folder, rows):
    return write_table(folder / "rows.tsv", rows, delimiter="\t", lineterminator="\n")


def as_tar_of_json(folder, rows):
    members = []
    for each in rows:
        members.append((each["image"], (folder / each["image"]).read_bytes()))
        said = {name: value for name, value in each.items() if name != "image"}
        members.append((f"{each['id']}.json", json.dumps(said)))
        members.append((f"{each['id']}.cls", "7"))
    return write_tar(folder / "rows.tar", members)


def as_tar_of_texts(folder, rows):
    """As img2dataset writes them: the .json says something about the picture."""
    members = []
    for each in rows:
        members.append((each["image"], (folder / each["image"]).read_bytes()))
        members.append((f"{each['id']}.json", json.dumps({"url": "x", "key": each["id"]})))
        members.append((f"{each['id']}.txt", each["caption"]))
    return write_tar(folder / "rows.tar", members, format=tarfile.GNU_FORMAT)


def as_imagefolder(folder, rows, ending="jsonl"):
    named = [{"id": r["id"], "file_name": r["image"], "text": r["caption"]} for r in rows]
    if ending == "jsonl":
        write_lines(folder / "metadata.jsonl", named)
    else:
        write_table(folder / "metadata.csv", named)
    return folder


def as_imagefolder_of_splits(folder, rows):
    top = folder.parent / "splits"
    top.mkdir()
    folder.rename(top / "train")
    as_imagefolder(top / "train", rows, "csv")
    (top / "test").mkdir()
    Image.new("RGB", (8, 8)).save(top / "test/x.png")
    write_lines(top / "test/metadata.jsonl", [{"file_name": "x.png", "text": "not this one"}])
    return top


def as_captions(folder, rows):
    for each in rows:
        (folder / f"{each['id']}.txt").write_text(each["caption"], encoding="utf-8-sig")
    return folder


def as_parquet(folder, rows, struct=False, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    made = []
    for each in rows:
        picture = (folder / each["image"]).read_bytes()
        if struct:
            picture = {"bytes": picture, "path": each["image"]}
        made.append({**each, "image": picture})
    parquet.write_table(pyarrow.Table.from_pylist(made), folder / "rows.parquet", row_group_size=3)
    return folder / "rows.parquet"


QUESTIONS = {
    "lines": lambda folder, rows: write_lines(folder / "rows.jsonl", rows),
    "messages": as_messages,
    "csv": lambda folder, rows: write_table(folder / "rows.csv", rows),
    "semicolons": as_semicolons,
    "tabs": as_tabs,
    "tar": as_tar_of_json,
    "parquet": as_parquet,
    "parquet of structs": lambda folder, rows: as_parquet(folder, rows, struct=True),
}
CAPTIONS = {
    "csv": lambda folder, rows: write_table(folder / "rows.csv", rows),
    "imagefolder, jsonl": as_imagefolder,
    "imagefolder, csv": lambda folder, rows: as_imagefolder(folder, rows, "csv"),
    "imagefolder, splits": as_imagefolder_of_splits,
    "captions": as_captions,
    "tar": as_tar_of_texts,
    "parquet": as_parquet,
}
MATRIX = [
    *((questions, name, make) for name, make in QUESTIONS.items()),
    *((captions, name, make) for name, make in CAPTIONS.items()),
]
IDS = [f"{rows.__name__} as {name}" for rows, name, _ in MATRIX]


def same_samples(rows, expected, spec):
    """Assert that rows are the expected ones: their ids, and all that their samples hold."""
    assert len(rows) == len(expected)
    for i in range(len(rows)):
        assert rows[i]["id"] == expected[i]["id"]
        made, wanted = make_sample(rows, i, spec), make_sample(expected, i, spec)
        assert made.ids.tolist() == wanted.ids.tolist()
        assert made.labels.tolist() == wanted.labels.tolist()
        assert [item.pixels.tolist() for item in made.items] == [
            item.pixels.tolist() for item in wanted.items
        ]


def by_id(rows: list[dict], opened) -> list[dict]:
    """Return rows in the order of those opened: a folder is read in the order of its names."""
    found = {each["id"]: each for each in rows}
    return [found[opened[i]["id"]] for i in range(len(opened))]


@pytest.mark.parametrize("make_rows, name, make", MATRIX, ids=IDS)
def test_rows_are_the_same_in_every_container(pictures, tmp_path, spec, make_rows, name, make):
    opened = open_rows(make(pictures, make_rows()))
    folder = pictures if pictures.exists() else tmp_path / "splits/train"
    ordered = by_id(llava(make_rows()), opened)
    (tmp_path / "llava.json").write_text(json.dumps(ordered))
    assert opened.recognised and len(opened) == len(NAMES)

    # A worker that is spawned opens them again.
    worker = pickle.loads(pickle.dumps(opened))
    same_samples(worker, open_rows(tmp_path / "llava.json", folder), spec)


def test_containers_in_one_mixture_make_the_same_steps_on_any_number_of_ranks(tmp_path, spec):
    sources = []
    expected = []
    for k, (make_rows, name, make) in enumerate(MATRIX):
        if "splits" in name:
            continue  # it moves the pictures
        folder = tmp_path / str(k)
        (folder / "sub").mkdir(parents=True)
        for i, picture in enumerate(NAMES):
            Image.new("RGB", (8, 8), (25 * i, 3 * k, 60)).save(folder / picture)
        sources.append(open_rows(make(folder, make_rows())))
        ordered = by_id(llava(make_rows()), sources[-1])
        expected.append(write(folder, ordered, f"llava{k}.json"))
    assert {type(rows) for rows in (*sources, *expected)} == set(FORMATS.values())
    weights = [1.0 + k % 2 for k in range(len(sources))]
    stage = Stage(global_batch=16, micro_batch_tokens=300)
    mixture = RowMixture(sources, weights)
    one = Steps(mixture, spec, stage, Train(seed=2))
    assert not any(one[i].error for i in range(6))

    # Row groups are shuffled in an order of their own, all other rows as those of the JSON list.
    chosen = [k for k, source in enumerate(sources) if source.blocks is None]
    assert len(chosen) == len(sources) - 3
    made, plain = (
        Steps(RowMixture([of[k] for k in chosen], [1.0] * len(chosen)), spec, stage, Train())
        for of in (sources, expected)
    )
    assert flat(made[i] for i in range(3)) == flat(plain[i] for i in range(3))
    for world in (2, 4):
        ranks = [Steps(mixture, spec, stage, Train(seed=2), rank, world) for rank in range(world)]
        for i in range(3):
            assert sorted(rows_of([rank[i] for rank in ranks])) == sorted(rows_of([one[i]]))


CASES = {
    "captions.csv": "",
    "metadata.jsonl": "",
    "cauldron.json": "texts",
    "messages_lf.json": "messages",
    "messages_openai.jsonl": "messages",
}


def read_case(name: str) -> list[tuple[str, str, str]]:
    """Return (picture, question, answer) of the rows of a case, read without the project."""
    file = shared(f"cases/formats/{name}")
    if name.endswith(".csv"):
        with open(file, newline="") as lines:
            return [(r["image"], CAPTION_PROMPT, r["caption"]) for r in csv.DictReader(lines)]
    if name.endswith(".jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        rows = json.loads(file.read_text())
    found = []
    for each in rows:
        if "text" in each:
            found.append((each["file_name"], CAPTION_PROMPT, each["text"]))
        elif "texts" in each:
            [picture], [turn] = each["images"], each["texts"]
            found.append((picture, turn["user"], turn["assistant"]))
        else:
            asked, answered = (turn["content"] for turn in each["messages"])
            if isinstance(asked, str):
                found.append((each["images"][0], asked.removeprefix("<image>"), answered))
            else:
                found.append((asked[0]["image_url"]["url"], asked[1]["text"], answered))
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_cases_of_formats_are_read_as_llava(tmp_path, spec, name):
    folder = shared("assets/images/photos")
    expected = read_case(name)
    if "/" in expected[0][0]:
        folder = folder.parent
    rows = open_rows(shared(f"cases/formats/{name}"), folder)
    assert len(rows) == len(expected)
    for i, (picture, question, answer) in enumerate(expected):
        asked, answered = rows[i]["conversations"]
        assert asked["value"].replace("<image>", "").strip() == question
        assert asked["value"].count("<image>") == 1 and answered["value"] == answer
        [medium] = rows.media(i, rows[i])
        assert medium.source == folder / picture
    make_sample(rows, 0, spec)


# ------------------------------------------------------------------ what the library datasets reads


def as_equal_tar(folder, rows):
    """Write a tar whose samples have members of the same types, which datasets wants."""
    members = []
    for each in rows:
        members.append((f"{each['id']}.jpg", (folder / each["image"]).read_bytes()))
        members.append((f"{each['id']}.txt", each["caption"]))
    return write_tar(folder / "rows.tar", members)


def loaded(kind: str, tmp_path, **options):
    """Return the rows that the library datasets reads, with pictures as bytes or paths."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets.load_dataset(kind, split="train", cache_dir=str(tmp_path / "hf"), **options)


def pixels(picture) -> list:
    return np.asarray(picture.convert("RGB")).tolist()


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["csv", "imagefolder, jsonl", "imagefolder, csv", "tar", "parquet", "structs"]
)
def test_containers_hold_what_datasets_reads(pictures, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [each for each in captions() if each["caption"] != "12"]  # pandas makes numbers of it
    if name == "structs":
        made = as_parquet(pictures, rows, struct=True)
    elif name == "tar":
        made = as_equal_tar(pictures, rows)
    else:
        made = CAPTIONS[name](pictures, rows)
    if name == "csv":
        theirs = loaded("csv", tmp_path, data_files=str(made))
    elif made.suffix == ".parquet":
        theirs = loaded("parquet", tmp_path, data_files=str(made))
    elif name == "tar":
        theirs = loaded("webdataset", tmp_path, data_files=str(made))
    else:
        theirs = loaded("imagefolder", tmp_path, data_dir=str(made))
    ours = open_rows(made)
    assert len(ours) == len(theirs) == len(rows)
    for i, other in enumerate(theirs):
        text = other.get("text", other.get("caption", other.get("txt")))
        assert ours[i]["conversations"][1]["value"] == text
        assert ours[i]["id"] == other.get("id", other.get("__key__"))
        [medium] = ours.media(i, ours[i])
        for picture in other.values():
            if isinstance(picture, dict) and "bytes" in picture:
                picture = picture["bytes"]
            if isinstance(picture, bytes):
                assert medium.source == picture
            if isinstance(picture, Image.Image):
                assert pixels(load_image(medium.source)) == pixels(picture)


# ---------------------------------------------------------------------------- recognised by content


ROW = row("x")


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("rows.json", f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n", "JSON lines"),
        ("rows.json", f"\ufeff\n{json.dumps(ROW)}\r\n{json.dumps(ROW)}", "JSON lines"),
        ("rows.jsonl", json.dumps([ROW, ROW], indent=1), "a JSON list"),
        ("rows.csv", json.dumps([ROW]), "a JSON list"),
        ("rows", json.dumps([ROW]), "a JSON list"),
        ("rows.jsonl", json.dumps(ROW), "JSON lines"),
        ("rows.txt", "image,caption\na.png,a cat\n", "a table of image, caption"),
        ("rows.json", "\ufeffimage;question;answer\r\na.png;b;c\r\n", "a table of image, question"),
        ("rows.jsonl", 'image\t"caption"\na.png\tx', "a table of image, caption"),
        ("rows.json", '{"id" 3}\n{"id": 4}\n', "JSON lines"),
    ],
)
def test_a_file_is_what_its_content_says_whatever_its_name(tmp_path, name, content, what):
    if name == "rows.jsonl" and "\t" in content:
        name = "rows.dat"
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert open_rows(tmp_path / name).recognised.startswith(what)


@pytest.mark.parametrize("kind", ["tar", "v7"])
def test_a_tar_of_any_name_and_age_is_one(pictures, spec, kind):
    file = as_tar_of_json(pictures, questions()).rename(pictures / "rows.json")
    if kind == "v7":
        # The headers of before POSIX end behind the name of a link.
        content = bytearray(file.read_bytes())
        with tarfile.open(file) as tar:
            offsets = [member.offset for member in tar]
        for at in offsets:
            content[at + 257 : at + 512] = bytes(255)
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
        file.write_bytes(content)
        assert b"ustar" not in content
    rows = open_rows(file)
    assert rows.recognised.startswith("a tar file; members of other types, passed over: 8")
    make_sample(rows, 7, spec)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows"])
@pytest.mark.parametrize(
    "content, what",
    [
        (b"PK\x03\x04" + bytes(99), "a zip archive or a spreadsheet, no file of rows; fix: unpack"),
        (b"\x1f\x8b\x08" + bytes(99), "a gzip file, no file of rows; fix: unpack it"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a picture or a film, no file of rows; fix: name the"),
        (b"ARROW1\0\0" + bytes(99), "an Arrow file, no file of rows; fix: write it as parquet"),
        (bytes(999), "only zero bytes; fix: fetch"),
        (b"\x07\1\0\3" * 99, "binary, and neither a tar nor a parquet file; fix: "),
        ("image,caption\na.png,b\n".encode("utf-16"), "UTF-16 text; fix: save it as UTF-8"),
        (b"<!DOCTYPE html><html>", "an HTML page; fix: fetch or write it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer.*; fix: run git lfs"),
    ],
)
def test_what_is_no_file_of_rows_is_named(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {what}"):
        open_rows(tmp_path / name)


@pytest.mark.parametrize(
    "content, what",
    [
        ("hello, this is no table\n", "not a JSON list of rows, it begins with 'hello"),
        ("word\n", "not a JSON list of rows, it begins with 'word"),
        (json.dumps({"data": [ROW]}), "a JSON dict, not a list of rows"),
        (json.dumps({"data": [ROW]}, indent=1), "a JSON dict, not a list of rows"),
    ],
)
def test_a_text_that_is_none_of_rows_is_named(tmp_path, content, what):
    (tmp_path / "rows.txt").write_text(content)
    with pytest.raises(UserError, match=f"rows.txt: {what}.*; fix: "):
        open_rows(tmp_path / "rows.txt")


# ------------------------------------------------------------------------------------------- tables


def test_records_end_where_the_csv_module_ends_them(tmp_path):
    rng = random.Random(0)
    for case in range(200):
        ending = rng.choice(("\n", "\r\n"))
        cells = ['"a"', '"b ""c"', 'd"e', '"f\ng,h"', "", "i", '"j"k', '""', '"l\r\n\r\nm"', " n"]
        text = f"image,caption,id{ending}"
        for _ in range(rng.randint(1, 9)):
            text += ",".join(["p", *rng.choices(cells, k=2)]) + ending
            text += rng.choice(("", "", ending, f",,{ending}"))
        file = tmp_path / f"{case}.csv"
        file.write_text(text, newline="")
        expected = [r for r in csv.DictReader(io.StringIO(text, newline="")) if r["image"]]
        rows = open_rows(file)
        assert [rows.raw_row(rows._find(i)) for i in range(len(rows))] == expected, text
        with open(file, newline="") as lines:
            lines = lines.read().split("\n")
        for i in range(len(rows)):
            number = int(rows._find(i).place.rpartition(" ")[2])
            assert lines[number - 1].startswith("p,")


def test_a_line_ends_within_quotes_or_not():
    assert ends_in_quotes(b'a,"b\n', b",", False) and not ends_in_quotes(b'c"\n', b",", True)
    assert not ends_in_quotes(b'5" wide,a"b\n', b",", False)
    assert ends_in_quotes(b'"a""\n', b",", False) and ends_in_quotes(b'x";"y\n', b";", True)


def test_a_table_of_many_rows_is_read_by_offsets(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SMALL", 0)
    rows = [{"image": f"{i}.png", "caption": f"line\n{i}"} for i in range(20_000)]
    table = open_rows(write_table(tmp_path / "rows.csv", rows))
    assert (tmp_path / "rows.csv.index").exists() and isinstance(table.indexes[0], np.memmap)
    assert len(table) == 20_000 and table[12_345]["image"] == "12345.png"
    assert table.where(12_345) == f"{tmp_path}/rows.csv:line {2 + 2 * 12_345}"


@pytest.mark.parametrize(
    "text, what",
    [
        ("", "rows.csv: empty file"),
        ("image,caption\n", "rows.csv: no rows below the names of the columns"),
        ("image,image\na,b\n", "rows.csv: two columns named 'image'"),
        ("a.png,a cat\n", "rows.csv: a table of a.png, a cat: none of .* image,question,answer$"),
        ("photo,said\na.png,a cat\n", "none of .*, or map them: --columns image=NAME"),
        ('image,caption\na,b\nc,"d\ne,f\n', "rows.csv:line 3: a cell begins with a quote"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(tmp_path, text, what):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError, match=what) as e:
        open_rows(tmp_path / "rows.csv")
    assert "; fix: " in str(e.value)


def test_what_is_wrong_with_a_record_is_named_by_its_line(tmp_path):
    text = b'image,caption\n"a.png","x\ny"\nb.png\nc.png,d,e\nd.png,f,,\ne.png,\xff\ng.png,a\0b\n'
    (tmp_path / "rows.csv").write_bytes(text)
    rows = open_rows(tmp_path / "rows.csv")
    assert rows.where(0) == f"{tmp_path}/rows.csv:line 2" and rows[3]["image"] == "d.png"
    for i, what in (
        (1, "line 4: 1 cells, and the first line names 2 columns"),
        (2, "line 5: 3 cells, and the first line names 2 columns"),
        (4, "line 7: not UTF-8 at byte 60"),
        (5, "line 8: no record of a table: a zero byte"),
    ):
        with pytest.raises(UserError, match=f"rows.csv:{what}.*; fix: "):
            rows[i]


def test_columns_map_a_table_and_the_numbers_of_pandas_are_passed_over(pictures, spec):
    (pictures / "rows.csv").write_text(",photo,query,reply\n0,a.png,Who?,a cat\n")
    columns = {"image": "photo", "question": "query", "answer": "reply"}
    rows = open_rows(pictures / "rows.csv", columns=columns)
    assert rows[0]["image"] == "a.png" and "" not in rows[0]
    assert rows[0]["conversations"] == turns("<image>\nWho?", "a cat")
    assert rows.recognised == "a table of photo, query, reply"
    with pytest.raises(UserError, match="photo, query, reply: none of these columns is known"):
        open_rows(pictures / "rows.csv")


# ------------------------------------------------------------------------------------------ folders


def test_a_folder_of_shards_is_one_source_in_the_order_of_names(tmp_path):
    for k in (1, 0, 2):
        write(tmp_path, [row(f"{k}{i}", image=None) for i in range(3)], f"part-{k}.json")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    (tmp_path / "README.md").write_text("# hello")
    rows = open_rows(tmp_path)
    assert rows.recognised == "3 JSON lists"
    assert [rows[i]["id"] for i in range(9)] == [f"{k}{i}" for k in range(3) for i in range(3)]
    write_lines(tmp_path / "more.jsonl", [row("x", image=None)])
    with pytest.raises(
        UserError, match=r"several formats: files of JSON lines \(more.jsonl\), JSON"
    ):
        open_rows(tmp_path)


def test_a_folder_of_tars_has_what_img2dataset_writes_beside_them(pictures, tmp_path):
    out = tmp_path / "tars"
    out.mkdir()
    as_tar_of_texts(pictures, captions()).rename(out / "00000.tar")
    (out / "00000.parquet").write_bytes(b"PAR1 and so on")
    (out / "00000_stats.json").write_text('{"count": 8}')
    assert open_rows(out).recognised == "a tar file"


@pytest.mark.parametrize(
    "names, chosen, left_out",
    [
        (["data/train-00000-of-00002.parquet", "data/test-00000.parquet"], [0], "test (1)"),
        (["train.jsonl", "dev.jsonl", "extra.jsonl"], [0], "other (1), validation (1)"),
        (["a.jsonl", "val.jsonl", "b.jsonl"], [0, 2], "validation (1)"),
        (["training_set/a.csv", "testing_set/a.csv"], [0], "test (1)"),
        (["a.json", "b.json"], [0, 1], ""),
        (["restraint.json", "contest.json"], [0, 1], ""),
        (["train/a.png", "train/a.txt", "test/b.png", "test/b.txt"], [0, 1], "test (2)"),
        (["train/a.png", "train/a.txt", "bus/b.png", "bus/b.txt"], [0, 1, 2, 3], ""),
        (["train.png", "train.txt", "b.png", "b.txt"], [0, 1, 2, 3], ""),
    ],
)
def test_which_files_of_a_folder_are_for_training(names, chosen, left_out):
    found = choose_files(names)
    assert found.names == sorted(names[i] for i in chosen) and found.left_out == left_out


def test_captions_and_pictures_that_stand_alone_are_left_out_and_counted(pictures, tmp_path):
    as_captions(pictures, captions()[:3])
    (pictures / "README.txt").write_text("about")
    rows = open_rows(pictures)
    assert len(rows) == 3 and rows.recognised == (
        "a folder of pictures with captions, 3; pictures without a caption, left out: 5"
        " (f.bmp, ...); texts without a picture, left out: 1 (README.txt)"
    )
    assert rows.where(1) == f"{pictures}:row 1 (id b)" and rows[0]["image"] == "a.png"

    # A caption that changes is read again, and rows that were opened before say so.
    (pictures / "a.txt").write_text("another")
    assert open_rows(pictures)[0]["conversations"][1]["value"] == "another"
    (pictures / "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="b.txt: not UTF-8 at byte 0; fix: save it as UTF-8"):
        open_rows(pictures)


def test_token_counts_of_a_folder_of_captions_are_kept(pictures, spec):
    as_captions(pictures, captions())
    first = open_rows(pictures)
    time.sleep(0.01)
    first.files[0].unlink()  # another rank that starts at the same time writes it, too
    again = open_rows(pictures)
    assert data.token_counts(first, spec).tolist() == data.token_counts(again, spec).tolist()
    assert first.files == again.files and first.states == again.states


def test_pictures_without_any_text_are_no_rows(pictures, tmp_path):
    with pytest.raises(UserError, match="8 pictures, and no text for any of them; the names of"):
        open_rows(pictures)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: an empty folder; fix: name one with files"):
        open_rows(tmp_path / "empty")
    (tmp_path / "empty/notes.md").write_text("x")
    with pytest.raises(UserError, match="empty: a folder without rows; fix: name one with files"):
        open_rows(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="empty: no rows: config.json is one JSON object; fix"):
        open_rows(tmp_path / "empty")
    write(tmp_path / "empty", [ROW], "test.json")
    with pytest.raises(
        UserError, match=r"empty: no rows but those of other splits: test \(1\); fix"
    ):
        open_rows(tmp_path / "empty")


def test_a_row_of_an_imagefolder_may_have_several_pictures(pictures, spec):
    write_lines(pictures / "metadata.jsonl", [{"file_names": ["a.png", "b.jpg"], "text": "two"}])
    rows = open_rows(pictures)
    assert rows[0]["image"] == ["a.png", "b.jpg"] and len(make_sample(rows, 0, spec).items) == 2


def test_links_that_go_round_are_followed_once(pictures):
    as_imagefolder(pictures, captions())
    (pictures / "sub/round").symlink_to(pictures)
    assert len(open_rows(pictures)) == 8


# ----------------------------------------------------------------------------------- tars of others


def test_keys_with_dots_and_folders(pictures, tmp_path):
    picture = (pictures / "a.png").read_bytes()
    members = [
        ("d/p.v1.png", picture),
        ("d/p.v1.json", '{"caption": "one"}'),
        ("d/p.v2.0.png", picture),
        ("d/p.v2.1.png", picture),
        ("d/p.v2.json", '{"caption": "two"}'),
        ("q.json", '{"caption": "three"}'),
        ("q.meta.json", '{"width": 8}'),
        ("q.png", picture),
    ]
    rows = open_rows(write_tar(tmp_path / "a.tar", members))
    said = [(rows[i]["id"], rows[i]["conversations"][1]["value"]) for i in range(len(rows))]
    assert said == [("d/p.v1", "one"), ("d/p.v2", "two"), ("q", "three")]
    assert [len(rows.media(i, rows[i])) for i in range(3)] == [1, 2, 1]


def test_a_json_that_is_a_row_stands_before_a_text(pictures, tmp_path):
    picture = (pictures / "a.png").read_bytes()
    talk = turns("<image>Who?", "A cat.")
    parts = [{"type": "image_url", "image_url": {"url": "x/y.png"}}, {"type": "text", "text": "Q"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]
    members = [
        *(("a.json", json.dumps({"conversations": talk})), ("a.txt", "no"), ("a.png", picture)),
        *(("b.json", '{"caption": null}'), ("b.txt", "\ufeffyes \n"), ("b.webp", picture)),
        *(("c.json", json.dumps({"messages": said})), ("c.png", picture)),
        *(("d.json", json.dumps({"id": 7, "caption": "d"})), ("d.odd", picture), ("d.npy", b"0")),
    ]
    rows = open_rows(write_tar(tmp_path / "a.tar", members))
    assert rows[0] == {"id": "a", "image": "a.png", "conversations": talk}
    assert rows[1]["conversations"][1]["value"] == "yes" and rows[1]["image"] == "b.webp"
    assert rows[2]["image"] == "x/y.png" and rows[3]["id"] == 7
    for i in range(4):
        [medium] = rows.media(i, rows[i])
        assert medium.kind == "image" and medium.source == picture
    assert rows.recognised == "a tar file; members of other types, passed over: 1"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["\u5199\u771f \u00e9", "d/" * 30 + "x" * 60, "sub/" + "y" * 300])
def test_a_name_of_a_tar_may_be_long_and_in_any_letters(tmp_path, kind, name):
    if kind == tarfile.USTAR_FORMAT and len(name) > 255:
        pytest.skip("no such name in a tar file of this format")
    members = []
    for i in range(3):
        members += [(f"{name}{i}.mp4", b"film" * 999), (f"{name}{i}.txt", "moves")]
    rows = open_rows(write_tar(tmp_path / "a.tar", members, format=kind))
    assert [rows[i]["id"] for i in range(3)] == [f"{name}{i}" for i in range(3)]
    assert [rows[i]["video"] for i in range(3)] == [f"{name}{i}.mp4" for i in range(3)]


def test_a_video_of_a_tar_is_one(tmp_path):
    members = [("a.json", '{"caption": "moves"}'), ("a.mp4", b"film")]
    rows = open_rows(write_tar(tmp_path / "a.tar", members))
    [medium] = rows.media(0, rows[0])
    assert medium.kind == "video" and rows[0]["video"] == "a.mp4"


def test_the_index_of_our_own_shards_is_as_it_was(pictures, tmp_path):
    rows = [row("x", "<image><image>", image=["a.png", "b.jpg"]), row("y", image=None)]
    shard(write(pictures, rows), tmp_path / "out", 10**9)
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        places = [[m.offset_data, m.offset_data + m.size] for m in tar]
    found = scan_tar(tmp_path / "out/00000.tar").tolist()
    assert found == [[*places[k], number] for k, number in enumerate((0, 1, 2, 0))]


# --------------------------------------------------------------------------------- Hugging Face ids


def fake_cache(home: Path, repo: str, files: dict[str, bytes]) -> Path:
    """Write a data set to a cache as huggingface_hub keeps it, links to blobs."""
    folder = home / f"datasets--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots/0123abcd"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0123abcd")
    (folder / "blobs").mkdir()
    for k, (name, content) in enumerate(files.items()):
        (folder / f"blobs/{k}").write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(
            os.path.relpath(folder / f"blobs/{k}", (snapshot / name).parent)
        )
    return snapshot


def lines_of(*names: str) -> bytes:
    return "".join(json.dumps(row(name, image=None)) + "\n" for name in names).encode()


@pytest.fixture
def no_network(monkeypatch):
    """huggingface_hub is not installed."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


def ids(rows) -> list:
    return [rows[i]["id"] for i in range(len(rows))]


def test_an_id_is_found_in_the_local_cache(tmp_path, monkeypatch, no_network):
    files = {
        "data/train-00000-of-00002.jsonl": lines_of("a", "b"),
        "data/train-00001-of-00002.jsonl": lines_of("c"),
        "data/test-00000-of-00001.jsonl": lines_of("t"),
        "README.md": b"# hello",
    }
    monkeypatch.chdir(tmp_path)
    for k, variable in enumerate(("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")):
        home = tmp_path / str(k)
        below = ("", "hub", "huggingface/hub")[k]
        fake_cache(home / below, "user/set", files)
        with monkeypatch.context() as context:
            context.setenv(variable, str(home))
            rows = open_rows("user/set")
            assert ids(rows) == ["a", "b", "c"]
            assert ids(open_rows("user/set/")) == ["a", "b", "c"]
            assert rows.recognised == "2 files of JSON lines; splits left out: test (1)"
            assert ids(open_rows("user/set/data/test-*.jsonl")) == ["t"]
            assert ids(open_rows("user/set/data/train-00001-of-00002.jsonl")) == ["c"]
            with pytest.raises(
                UserError, match="user/set/nothing: .* lacks nothing.*; fix: .*hf down"
            ):
                open_rows("user/set/nothing")
    with pytest.raises(UserError) as missing:
        open_rows("user/set")
    assert "nor in the Hugging Face cache, nor to be downloaded" in str(missing.value)
    assert "run hf download --repo-type dataset user/set" in str(missing.value)
    assert "pip install huggingface_hub" in str(missing.value)

    # What is here has the name.
    (tmp_path / "user/set").mkdir(parents=True)
    write(tmp_path / "user/set", [row("here", image=None)])
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "0"))
    assert ids(open_rows("user/set")) == ["here"] and hub.parse_id("user/typo") is None


def test_an_imagefolder_in_the_cache_has_its_pictures(pictures, tmp_path, monkeypatch, spec):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    named = [{"file_name": "a.png", "text": "a cat"}]
    content = "".join(json.dumps(each) for each in named).encode()
    files = {"train/metadata.jsonl": content, "train/a.png": (pictures / "a.png").read_bytes()}
    fake_cache(tmp_path / "hub", "user/set", files)
    rows = open_rows("user/set")
    assert rows.recognised == "an imagefolder with metadata.jsonl"
    assert len(make_sample(rows, 0, spec).items) == 1

    # Its files are links to blobs, which may be handed on; links to elsewhere may not.
    assert shard(rows, tmp_path / "out", 10**6) == 1
    link = Path(rows.images / "a.png")
    link.unlink()
    link.symlink_to(pictures / "b.jpg")
    with pytest.raises(UserError, match="lies outside of"):
        shard(rows, tmp_path / "again", 10**6)


def test_configurations_of_a_data_set_are_named_and_chosen(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    files = {f"{name}/train.jsonl": lines_of(name) for name in ("ai2d", "docvqa")}
    fake_cache(tmp_path, "user/many", files)
    with pytest.raises(
        UserError, match="2 data sets: ai2d, docvqa; fix: name one, such as user/many"
    ):
        open_rows("user/many")
    assert ids(open_rows("user/many/docvqa")) == ["docvqa"]


def test_a_cache_that_lacks_a_shard_is_not_trained_on(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    fake_cache(tmp_path, "user/half", {"train-00001-of-00003.jsonl": lines_of("b")})
    with pytest.raises(UserError, match="cache lacks train-00000-of-00003 of it, and it cannot be"):
        open_rows("user/half")


def test_what_is_not_cached_is_downloaded_and_only_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    hosted = {
        "code.py": b"raise SystemExit",
        "train.jsonl": lines_of("a"),
        "val[1].jsonl": lines_of("v"),
        "model.bin": b"x",
    }
    asked = []

    class Api:
        def dataset_info(self, repo, timeout):
            files = [types.SimpleNamespace(rfilename=name) for name in hosted]
            return types.SimpleNamespace(siblings=files)

    def snapshot_download(repo, repo_type, allow_patterns):
        asked.append((repo, repo_type, allow_patterns))
        return str(fake_cache(tmp_path / "hub", repo, {"train.jsonl": hosted["train.jsonl"]}))

    fake = types.SimpleNamespace(HfApi=Api, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert ids(open_rows("user/new")) == ["a"]
    assert asked == [("user/new", "dataset", ["train.jsonl"])]
    assert ids(open_rows("user/new")) == ["a"] and len(asked) == 1
    with pytest.raises(UserError, match="user/other/fr: the data set has no rows in fr; fix: see"):
        open_rows("user/other/fr")


@pytest.mark.parametrize(
    "name", ["rows.json", "data/rows.json", "a/b/rows.jsonl", "../a/b", "/a/b"]
)
def test_a_path_that_is_not_there_is_no_id(name, no_network):
    assert hub.parse_id(name) is None
    with pytest.raises(UserError, match="no such file or directory; fix: name a file of rows"):
        open_rows(name)


# ------------------------------------------------------------------------------------------ data.py


def test_check_says_what_was_recognised_and_maps_columns(pictures, capsys):
    (pictures / "rows.csv").write_text("photo,said\na.png,a cat\nb.jpg,a dog\n")
    words = ["check", "--data", str(pictures / "rows.csv"), "--template", "plain"]
    data.main([*words, "--columns", "image=photo", "caption=said"])
    assert "recognised: a table of photo, said\n" in capsys.readouterr().out
    for wrong in ("photo", "picture=photo", "image="):
        with pytest.raises(
            UserError, match=f"--columns: '{wrong}' maps no column; fix: write part"
        ):
            data.main([*words, "--columns", wrong])
