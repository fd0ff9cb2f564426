"""duplicates.py and overlaps.py: rows that occur twice, and rows with a benchmark's pictures."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import data
from config import UserError
from inputs import overlaps
from inputs.duplicates import print_duplicates
from inputs.overlaps import Benchmark
from inputs.pictures import load_image
from inputs.rows import open_rows
from inputs.shards import shard
from tests.tools.environment import shared
from tests.tools.sample_rows import row, write


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return some photos of the reference data, made smaller."""
    folder = tmp_path_factory.mktemp("photos")
    made = []
    for name in ("chelsea.png", "coffee.png", "rocket.jpg", "wolves.jpg", "page.png", "coins.png"):
        image = load_image(shared("assets/images/photos") / name)
        image.thumbnail((200, 200))
        image.save(folder / name)
        made.append(folder / name)
    return made


def check(*arguments, capsys) -> str:
    """Return what `data.py check` prints."""
    capsys.readouterr()
    data.main(["check", *map(str, arguments)])
    return capsys.readouterr().out


def found_in(text: str) -> dict[str, str]:
    """Return {row: what is said of its picture} of what `check --against` prints."""
    lines = re.findall(r"\(id (\w+)\): image \S+ is .*?([^/ ]+) \(([^()]*)\)$", text, re.M)
    return {name: f"{picture}: {how}" for name, picture, how in lines}


# ---- duplicates


def test_duplicates_are_counted_and_the_first_are_named(tmp_path, capsys):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    rows = [row(0, "<image>\nWho?", image="a.png"), row(1, "Where?", image=None)]
    rows += [row(i, "<image>\nWho?", image="b.png") for i in range(2, 7)]
    rows += [row(7, "<image>\nWho?", "A cat.", image="a.png"), row(8, "Why?", image=None)]
    file = write(tmp_path, rows).file
    lines = check("--data", file, capsys=capsys).splitlines()
    begin = lines.index(
        "  duplicates: 5 rows have the same pictures, question and answer as an earlier row"
    )
    assert lines[begin + 1 :] == [
        *(f"    {file}:row {i} (id {i}) has those of {file}:row 0 (id 0)" for i in (2, 3, 4)),
        "  duplicates: 1 rows have the same pictures and question as an earlier row, and another "
        "answer",
        f"    {file}:row 7 (id 7) has those of {file}:row 0 (id 0)",
    ]

    print_duplicates(write(tmp_path, [rows[0], rows[1], rows[8]]))
    assert not capsys.readouterr().out


# ---- benchmarks


def write_benchmarks(photos, folder) -> dict[str, Path]:
    """Write the photos as they are into benchmarks of every kind; return these by kind."""
    places = {"folder": folder / "bench", "tar": folder / "bench.tar", "rows": folder / "rows.json"}
    (places["folder"] / "inner").mkdir(parents=True)
    (places["folder"] / "annotations.json").write_text("[]")
    for photo in photos:
        (places["folder"] / "inner" / photo.name).write_bytes(photo.read_bytes())
    with tarfile.open(places["tar"], "w") as tar:
        tar.add(places["folder"], "x")
    named = [row(i, image=f"bench/inner/{photo.name}") for i, photo in enumerate(photos)]
    places["rows"].write_text(json.dumps(named))
    return places


def write_copies(photos, folder) -> list[dict]:
    """Write copies of photos, and rows about them: the same file, saved as PNG and as JPEG."""
    same, png, jpeg, small = (load_image(photo) for photo in photos[:4])
    folder.mkdir()
    (folder / "same.png").write_bytes(photos[0].read_bytes())
    png.save(folder / "png.png", compress_level=1)
    jpeg.save(folder / "jpeg.jpg", quality=60)
    small.resize((small.width // 2, small.height // 2)).save(folder / "small.jpg")
    jpeg.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(folder / "other.png")
    Image.new("RGB", (30, 20), "white").save(folder / "white.png")
    names = ("same.png", "png.png", "jpeg.jpg", "small.jpg", "other.png", "white.png")
    return [row(name.split(".")[0], image=name) for name in names]


@pytest.mark.parametrize("kind", ["folder", "tar", "rows"])
def test_rows_with_pictures_of_a_benchmark_are_named(photos, tmp_path, capsys, kind):
    pytest.importorskip("imagehash")
    place = write_benchmarks(photos, tmp_path)[kind]
    Image.new("RGB", (60, 60), "black").save(tmp_path / "bench" / "black.png")
    copies = write_copies(photos, tmp_path / "own")
    rows = write(tmp_path / "own", copies)
    said = check("--data", rows.file, "--against", place, capsys=capsys)
    found = found_in(said)
    assert list(found) == ["same", "png", "jpeg", "small"]
    assert found["same"] == "chelsea.png: the same file"
    assert found["png"] == "coffee.png: the same pixels"
    assert re.fullmatch(r"rocket.jpg: looks the same, [0-4] of 64 bits differ", found["jpeg"])
    assert re.fullmatch(r"wolves.jpg: looks the same, [0-4] of 64 bits differ", found["small"])
    count = 7 if kind == "folder" else 6
    assert f"  against: 4 of 6 rows have one of the {count} pictures of {place}" in said

    # Rows that hold their pictures, and of another benchmark none.
    shard(rows, tmp_path / "shards", 10**6)
    Image.new("RGB", (60, 60), "blue").save(tmp_path / "blue.png")
    said = check(
        *("--data", tmp_path / "shards", "--against", place, tmp_path / "blue.png"), capsys=capsys
    )
    assert found_in(said) == found
    assert f"  against: 0 of 6 rows have one of the 1 pictures of {tmp_path}/blue.png" in said


def test_pictures_in_any_column_of_a_parquet_file_are_found(photos, tmp_path, capsys):
    pytest.importorskip("imagehash")
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    contents = [photo.read_bytes() for photo in photos]
    table = [
        {"image": {"bytes": contents[0], "path": "x"}, "choices": [], "thumb": None, "text": "a"},
        {"image": None, "choices": [{"bytes": c} for c in contents[1:3]], "thumb": b"no picture"},
        {"image": None, "choices": [{"bytes": None}], "thumb": contents[3], "text": "c"},
    ]
    (tmp_path / "bench").mkdir()
    file = tmp_path / "bench" / "test-00000.parquet"
    parquet.write_table(arrow.Table.from_pylist(table), file)
    copies = write_copies(photos, tmp_path / "own")
    rows = write(tmp_path / "own", copies)
    for place in (file, tmp_path / "bench"):
        said = check("--data", rows.file, "--against", place, capsys=capsys)
        assert "(id same): image " in said and f"is {file}:row 0 image (the same file)" in said
        assert f"is {file}:row 1 choices (the same pixels)" in said
        assert f"is {file}:row 1 choices (looks the same, " in said
        assert f"is {file}:row 2 thumb (looks the same, " in said
        assert f"against: 4 of 6 rows have one of the 4 pictures of {place}" in said


def test_without_imagehash_exact_copies_are_found_and_a_line_says_so(
    photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, "imagehash", None)
    place = write_benchmarks(photos, tmp_path)["folder"]
    rows = write(tmp_path / "own", write_copies(photos, tmp_path / "own"))
    said = check("--data", rows.file, "--against", place, capsys=capsys)
    assert list(found_in(said)) == ["same", "png"] and said.count("pip install ImageHash") == 1
    assert "ImageHash" not in check("--data", rows.file, capsys=capsys)


def test_photos_are_told_apart_and_their_copies_found(tmp_path):
    """The distances that the docstring states."""
    pytest.importorskip("imagehash")
    images = [load_image(p) for p in sorted(shared("assets/images/photos").iterdir())]
    hashes = [overlaps.perceptual_hash(image) for image in images]
    for i, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=50)
        copy = overlaps.perceptual_hash(load_image(buffer.getvalue()))
        assert (copy ^ hashes[i]).bit_count() <= overlaps.LOOKS_SAME
        others = [(other ^ hashes[i]).bit_count() for other in hashes if other != hashes[i]]
        assert min(others) >= 22 and len(others) == len(images) - 1
    for colour in ("black", "white", "red"):
        assert overlaps.perceptual_hash(Image.new("RGB", (40, 30), colour)) is None


def test_many_pictures_are_read_by_several_workers_each_once(tmp_path):
    for i in range(40):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    for i in range(9):
        (tmp_path / f"{2 * i:02}.txt").write_text("no picture")
    for workers in (0, 2):
        benchmark = Benchmark.of(tmp_path, workers)
        assert benchmark.names == [f"{tmp_path}/{i:02}.png" for i in range(40)]
        assert len(benchmark.by_file) == len(benchmark.by_pixels) == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_a_benchmark_without_pictures_is_one_line(tmp_path, workers):
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 999)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no picture")
    for name, what in (
        ("none", "none: no such file or directory; fix: "),
        ("bad.tar", "bad.tar: not a tar file, or a damaged one: "),
        ("bad.parquet", "bad.parquet: cannot be read: "),
        ("notes", "notes: no pictures in it; fix: name a folder of pictures"),
    ):
        if "parquet" in name:
            pytest.importorskip("pyarrow")
        with pytest.raises(UserError) as e:
            Benchmark.of(tmp_path / name, workers)
        assert what in str(e.value) and "\n" not in str(e.value)


def test_a_row_that_cannot_be_read_is_left_to_check(photos, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(photos[0].read_bytes())
    rows = write(tmp_path, [row("a"), row("b", image="none.png"), [1]])
    benchmark = Benchmark.of(tmp_path / "a.png")
    overlaps.print_overlaps(open_rows(rows.file), benchmark)
    assert "against: 1 of 3 rows have one of the 1 pictures" in capsys.readouterr().out
