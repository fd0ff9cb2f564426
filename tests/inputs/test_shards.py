"""shards.py: shards give the samples of the plain files, and what is wrong with one is named."""

import io
import json
import os
import tarfile

import pytest
from PIL import Image

import data
from config import Stage, Train, UserError
from data import Steps
from inputs.rows import open_rows
from inputs.shards import member_ending, shard
from tests.tools.fuzz import run_case
from tests.tools.sample_rows import (
    flat,
    make_sample,
    mean_colour_spec,
    row,
    write,
    write_pictures_and_rows,
)


@pytest.fixture(scope="module")
def spec():
    return mean_colour_spec()


@pytest.fixture
def many(tmp_path):
    return write_pictures_and_rows(tmp_path)


def test_shards_give_the_samples_and_steps_of_the_plain_files(many, spec, tmp_path):
    out = tmp_path / "shards"
    assert shard(many, out, 20_000) == len(list(out.glob("*.tar"))) > 2 and not list(
        tmp_path.glob(".shards*")
    )
    assert len(list(out.glob("*.tar.index"))) == len(list(out.glob("*.tar")))
    stage = Stage(global_batch=8, micro_batch_tokens=200)
    plain = Steps(many, spec, stage, Train(seed=1))
    for given in (out, f"{out}/*.tar", f"{out}/0000*.tar"):
        rows = open_rows(given)
        assert [rows[i] for i in range(38)] == [many[i] for i in range(38)]
        made = Steps(rows, spec, stage, Train(seed=1))
        assert flat(made[i] for i in range(5)) == flat(plain[i] for i in range(5))
        assert not any(made[i].error for i in range(5))
    last = sorted(out.glob("*.tar"))[-1]
    before = sum(name.endswith(".json") for name in tarfile.open(last).getnames()) - 1
    assert rows.where(37) == f"{last}:row {before} (id two \u56fe \\ud83d)"
    picture, _ = rows.media(37, rows[37])
    assert picture.source == (tmp_path / "c.JPEG").read_bytes()  # as they were
    one = open_rows(sorted(out.glob("*.tar"))[0])
    assert one[0] == many[0] and len(one) < 38
    assert (
        shard(rows, tmp_path / "again", 10**9) == 1
        and open_rows(tmp_path / "again")[37] == many[37]
    )
    names = tarfile.open(tmp_path / "again/00000.tar").getnames()
    assert names[:2] == ["000000000.json", "000000001.json"] and "000000020.png" in names
    assert names[-3:] == ["000000037.json", "000000037.0.jpeg", "000000037.1.png"]


def test_what_is_wrong_with_shards_is_one_line(many, tmp_path, spec):
    def tar(name, *members):
        with tarfile.open(tmp_path / name, "w") as made:
            for member, content in members:
                (tmp_path / "content").write_bytes(content)
                made.add(tmp_path / "content", member)
        return tmp_path / name

    text = json.dumps(row("x", "<image><image>", image=["p.png", "q.png"])).encode()
    a, b = ((tmp_path / f"{name}.png").read_bytes() for name in "ab")
    mixed = open_rows(
        tar(
            "mixed.tar",
            ("d/k.1.png", b),
            ("d/k.json", text),
            ("d/k.0.png", a),
            ("d/l.json", b"[1]"),
        )
    )
    pictures = [media.source for media in mixed.media(0, mixed[0])]
    assert len(mixed) == 2 and pictures == [a, b]  # other writers sort by name
    with pytest.raises(UserError, match="mixed.tar:row 1: a JSON list, not a row; fix: "):
        mixed[1]
    short = open_rows(tar("short.tar", ("k.json", text), ("k.png", a)))
    with pytest.raises(UserError, match="short.tar:row 0: image q.png: not in the shard; fix: "):
        make_sample(short, 0, spec)
    broken = open_rows(tar("broken.tar", ("k.json", text), ("k.0.png", a), ("k.1.png", b"<html>")))
    with pytest.raises(
        UserError, match=r"broken.tar:row 0 \(id x\): image q.png: an HTML page; fix: "
    ):
        make_sample(broken, 0, spec)
    for bad, what in (
        (tar("none.tar", ("k.png", a)), "none.tar:/k: neither a .json nor a .txt"),
        (tar("two.tar", ("k.json", text), ("k.json", text)), "two.tar:/k: not exactly one .json"),
        (tar("empty.tar"), "empty.tar: no rows"),
        (tmp_path / "gone.tar", "gone.tar: no such file or directory"),
        (tmp_path / "cut.tar", "cut.tar: not a tar file, or a damaged one"),
        (tmp_path, "an empty folder"),
    ):
        (tmp_path / "cut.tar").write_bytes((tmp_path / "mixed.tar").read_bytes()[:700])
        if bad == tmp_path:
            bad = tmp_path / "folder"
            bad.mkdir()
        with pytest.raises(UserError, match=what + ".*; fix: "):
            open_rows(bad)


def test_sharding_writes_all_or_nothing(many, tmp_path, monkeypatch):
    rows = write(tmp_path, [row("x"), row("y", image="none.png")], "bad.json")
    with pytest.raises(
        UserError, match=r"bad.json:row 1 \(id y\): image .*none.png: no such file; fix: "
    ):
        shard(rows, tmp_path / "out", 10**6)
    with pytest.raises(UserError, match="exists already; fix: "):
        shard(many, tmp_path, 10**6)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(tarfile.TarFile, "addfile", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shard(many, tmp_path / "out", 10**6)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_that_shards(many, tmp_path, capsys):
    data.main(["shard", str(many.file), str(tmp_path / "out"), "--size", "1"])
    assert (
        capsys.readouterr().out == f"{tmp_path}/out: 38 rows in 1 tar files\n"
        and len(open_rows(tmp_path / "out")) == 38
    )
    with pytest.raises(SystemExit, match="command line: shard takes rows and a new folder; fix: "):
        data.main(["shard", str(many.file)])


# ---- what must not get into a shard, and what a shard must not do


@pytest.mark.parametrize(
    "name", ["../secret.png", "{folder}/secret.png", "link.png", "out/secret.png"]
)
def test_nothing_from_outside_of_the_images_is_packed_and_training_may_read_it(
    tmp_path, spec, name
):
    """A shard is handed on. Training reads what its user can read."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "out").symlink_to(tmp_path)
    name = name.format(folder=tmp_path)
    write(tmp_path, [row("x", image=name)])
    rows = open_rows(tmp_path / "rows.json", images)
    make_sample(rows, 0, spec)
    with pytest.raises(UserError, match=r"row 0 \(id x\): image .*: lies outside of .*; fix: copy"):
        shard(rows, tmp_path / "out", 10**6)
    assert sorted(os.listdir(tmp_path)) == ["images", "rows.json", "secret.png"]


def test_absolute_names_and_links_inside_of_the_images_are_packed(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "a.png")
    (images / "link.png").symlink_to("a.png")
    (tmp_path / "also").symlink_to(images)
    names = [str(images / "a.png"), "link.png", "../images/a.png"]
    write(tmp_path, [row("x", "<image>" * 3, image=names)])
    assert shard(open_rows(tmp_path / "rows.json", tmp_path / "also"), tmp_path / "out", 10**6) == 1
    packed = open_rows(tmp_path / "out")
    expected = (images / "a.png").read_bytes()
    assert [media.source for media in packed.media(0, packed[0])] == [expected] * 3


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_file_is_not_packed_and_not_waited_for(tmp_path, kind):
    if kind == "fifo":
        os.mkfifo(tmp_path / "a.png")
    else:
        os.symlink("/dev/zero", tmp_path / "a.png")
    rows = write(tmp_path, [row("x")])
    with pytest.raises(UserError, match="not a regular file|lies outside"):
        shard(rows, tmp_path / "out", 10**6)


def test_what_a_killed_start_left_is_written_anew(many, tmp_path):
    left = tmp_path / ".out.part"
    left.mkdir()
    (left / ".barellava").write_text("shards")
    for name in ("00000.tar", "00007.tar", "00007.tar.index", ".00000.tar.index.abcdefgh"):
        (left / name).write_bytes(b"half")
    count = shard(many, tmp_path / "out", 10**9)
    assert count == 1 and len(open_rows(tmp_path / "out")) == 38
    names = sorted(os.listdir(tmp_path / "out"))
    assert names == [".barellava", "00000.tar", "00000.tar.index"] and not left.exists()

    # Somebody else's folder of this name stays.
    left = tmp_path / ".other.part"
    left.mkdir()
    (left / "precious").write_text("precious")
    with pytest.raises(UserError, match="other.part: holds precious, which this program did not"):
        shard(many, tmp_path / "other", 10**9)
    assert (left / "precious").read_text() == "precious"


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(many, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(UserError, match="out: cannot be written: No space left on device; fix: "):
        shard(many, tmp_path / "out", 10**6)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written|a file, not a folder"):
        shard(many, tmp_path / "file" / "out", 10**6)


def test_the_ending_of_a_member_cannot_be_taken_for_something_else():
    names = ["a.JPEG", "a", "a.json", "a.7", "a.tar.gz", "a.\u00b2", "a.j/../b", "a." + "x" * 90]
    assert [member_ending(name) for name in names] == ["jpeg", *["jpg"] * 3, "gz", *["jpg"] * 3]


def header_with(field: slice, value: bytes) -> bytes:
    """Return a shard of one row whose picture's header has this value in a field."""
    content = json.dumps(row("x", image="a.png")).encode()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in (("a.png", b"picture"), ("a.json", content)):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    whole = bytearray(file.getvalue())
    whole[field] = value
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    return bytes(whole)


SIZE, KIND, NAME = slice(124, 136), slice(156, 157), slice(0, 8)


@pytest.mark.parametrize(
    "field, value",
    [
        (SIZE, b"\xff" * 10 + b"\xfe\x00"),  # -512, which leads back to this header
        (SIZE, b"\xff" * 12),  # -1
        (SIZE, b"77777777777\0"),
        (SIZE, b"\x80" + b"\xff" * 11),
        (KIND, b"2"),  # a link
        (KIND, b"1"),
        (KIND, b"6"),  # a FIFO
        (KIND, b"3"),  # a device
        (KIND, b"S"),  # sparse
        (KIND, b"x"),
        (KIND, b"L"),
        (NAME, "a.\u00b2.png".encode()[:8]),
        (NAME, b"../a.png"),
    ],
)
def test_odd_members_of_a_shard_are_one_line(tmp_path, spec, field, value):
    (tmp_path / "a.tar").write_bytes(header_with(field, value))

    def read():
        make_sample(open_rows(tmp_path / "a.tar"), 0, spec)

    assert run_case(read, seconds=20).kind == "refused"
