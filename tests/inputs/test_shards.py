"""shards.py: shards give the samples of the plain files, and what is wrong with one is named."""

import json
import tarfile

import pytest

import data
from config import Stage, Train, UserError
from data import Steps
from inputs.rows import open_rows
from inputs.sample import make_sample
from inputs.shards import shard
from tests.tools.sample_rows import flat, mean_colour_spec, row, write, write_pictures_and_rows


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
    assert rows.where(37) == f"{last}:row {before} (id two \u56fe \ud83d)"
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
        (tar("none.tar", ("k.png", a)), "none.tar:/k: not exactly one .json"),
        (tar("two.tar", ("k.json", text), ("k.json", text)), "two.tar:/k: not exactly one .json"),
        (tar("empty.tar"), "empty.tar: no rows"),
        (tmp_path / "gone.tar", "gone.tar: no such file or directory"),
        (tmp_path / "cut.tar", "cut.tar: not a tar file, or a damaged one"),
        (tmp_path, "a folder without .tar shards"),
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
