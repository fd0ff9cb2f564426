"""parquet_rows.py: columns, row groups, damage; and the order of two levels that data.py makes."""

import io
import itertools
import os
import pickle
import random
import sys

import numpy as np
import pytest
from PIL import Image

from config import Stage, Train, UserError
from data import Order, Steps
from inputs.rows import Blocks, Part, RowMixture, block_of, in_few_blocks, open_rows
from tests.tools.sample_rows import flat, make_sample, mean_colour_spec, row, rows_of, turns, write
from training.made_from import contents_of_pictures, contents_of_rows

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def png(i):
    """Return a small picture of a colour of its own."""
    stored = io.BytesIO()
    Image.new("RGB", (8, 8), (7 * i % 256, i % 256, 3)).save(stored, "PNG")
    return stored.getvalue()


def captions(n):
    """Return rows of a picture in bytes and its caption."""
    return [
        {"id": f"r{i}", "image": {"bytes": png(i), "path": f"{i}.png"}, "caption": f"colour {i}"}
        for i in range(n)
    ]


def put(file, rows, group=4, **options):
    """Write rows, or a table of them, to a parquet file with row groups of `group` rows."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    parquet.write_table(table, file, row_group_size=group, **options)
    return file


def shards(folder, n=24, count=3, group=4):
    """Write rows to several files, and open them with two row groups in memory."""
    rows = captions(n)
    for k in range(count):
        put(folder / f"{k}.parquet", rows[k * n // count : (k + 1) * n // count], group)
    opened = open_rows(folder / "*.parquet")
    opened.blocks = Blocks(opened.blocks.ends, 2)
    return opened


def reads(rows, monkeypatch):
    """Return a list to which each row group that is read is added."""
    found = []
    opened = rows._opened

    def count(k, group=None):
        found.append((k, group))
        return opened(k, group)

    monkeypatch.setattr(rows, "_opened", count)
    return found


@pytest.fixture
def spec():
    return mean_colour_spec()


# ---- rows


PICTURES = {
    "struct": lambda one: one,
    "bytes": lambda one: one["bytes"],
    "structs": lambda one: [one],
    "list of bytes": lambda one: [one["bytes"]],
    "path": lambda one: one["path"],
    "data": lambda one: {"bytes": one["bytes"], "path": None},
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_read_however_they_are_stored(tmp_path, spec, kind):
    rows = captions(6)
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    stored = [{**one, "image": PICTURES[kind](one["image"])} for one in rows]
    found = open_rows(put(tmp_path / "rows.parquet", stored))
    plain = [row(one["id"], "<image>\nDescribe the image.", one["caption"]) for one in rows]
    for i, one in enumerate(plain):
        one["image"] = f"{i}.png"
    expected = write(tmp_path, plain)
    assert len(found) == 6
    for i in range(6):
        ours, theirs = make_sample(found, i, spec), make_sample(expected, i, spec)
        assert ours.ids.equal(theirs.ids) and ours.labels.equal(theirs.labels)
        assert ours.items[0].pixels.equal(theirs.items[0].pixels)
        assert found.where(i) == f"{tmp_path}/rows.parquet:row {i} (id r{i})"


TYPES = {
    "large_string": ("caption", pa.large_string()),
    "string_view": ("caption", pa.string_view()),
    "dictionary": ("caption", pa.dictionary(pa.int32(), pa.string())),
    "large_binary": ("image", pa.large_binary()),
    "binary_view": ("image", pa.binary_view()),
}


@pytest.mark.parametrize("kind", TYPES)
def test_types_that_mean_the_same_are_read_the_same(tmp_path, kind):
    column, wanted = TYPES[kind]
    table = pa.Table.from_pylist([{**one, "image": one["image"]["bytes"]} for one in captions(6)])
    plain = open_rows(put(tmp_path / "plain.parquet", table))
    at = table.column_names.index(column)
    table = table.set_column(at, column, table.column(column).cast(wanted))
    found = open_rows(put(tmp_path / "other.parquet", table))
    for i in range(6):
        assert found[i] == plain[i] and found[i].sources == plain[i].sources == [png(i)]


def test_nested_turns_and_parts_are_read(tmp_path):
    picture = {"bytes": png(1), "path": None}
    texts = {"images": [picture], "texts": [{"user": "Who?", "assistant": "I.", "source": "x"}]}
    content = [{"type": "image", "text": None}, {"type": "text", "text": "Who?"}]
    answer = [{"type": "text", "text": "I."}]
    messages = {
        "images": [picture],
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ],
    }
    for name, one in (("texts", texts), ("messages", messages)):
        found = open_rows(put(tmp_path / f"{name}.parquet", [one] * 3))[2]
        assert found["conversations"] == turns("<image>\nWho?", "I.") and found.sources == [png(1)]


def test_rows_are_those_that_datasets_reads(tmp_path):
    datasets = pytest.importorskip("datasets")
    file = put(tmp_path / "rows.parquet", captions(9))
    theirs = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    theirs = theirs.cast_column("image", datasets.Image())
    ours = open_rows(file)
    for i in range(9):
        one = theirs[i]
        assert ours[i]["conversations"][1]["value"] == one["caption"]
        with Image.open(io.BytesIO(ours.media(i, ours[i])[0].source)) as image:
            assert image.tobytes() == one["image"].tobytes()


def test_only_columns_that_a_row_needs_are_read(tmp_path):
    many = [
        {**one, "n": i, "emb": [0.5] * 9, "thumb": one["image"], "raw": b"x", "nothing": None}
        for i, one in enumerate(captions(6))
    ]
    file = put(tmp_path / "rows.parquet", many)
    with pytest.raises(UserError, match="row 5 .*nothing reads the image under 'thumb'"):
        open_rows(file)[5]
    rows = open_rows(file, columns={"image": "image"})
    assert set(rows[5]) == {"id", "image", "conversations", "n"} and rows[5]["n"] == 5
    assert set(rows._row_group(1).table.column_names) == {"id", "image", "caption", "n"}
    mapped = open_rows(tmp_path / "rows.parquet", columns={"image": "thumb"})
    assert set(mapped._row_group(1).table.column_names) == {"id", "thumb", "caption", "n"}

    # Of a row in no known form, all columns are named.
    for one in many:
        del one["caption"]
    rows = open_rows(put(tmp_path / "unknown.parquet", many), columns={"image": "image"})
    with pytest.raises(UserError, match="the row has emb, id, image, n, nothing, raw, thumb"):
        make_sample(rows, 0, mean_colour_spec())


def test_a_value_that_many_rows_share_is_in_memory_once(tmp_path):
    big = os.urandom(100_000)
    rows = [{"image": {"bytes": big, "path": "a"}, "caption": "x"}] * 300
    found = open_rows(put(tmp_path / "rows.parquet", rows, 300))
    assert found[299].sources == [big]
    assert found._row_group(0).table.nbytes < 1_000_000


def test_numbers_reads_one_column_of_all_files(tmp_path):
    put(tmp_path / "a.parquet", [{"caption": "x", "n": None, "flag": True}, {"n": 2}])
    put(tmp_path / "b.parquet", [{"caption": "x", "n": 2.5}])
    put(tmp_path / "c.parquet", [{"caption": "x"}])
    rows = open_rows(tmp_path)
    nan = np.nan
    np.testing.assert_array_equal(rows.numbers("n"), [nan, 2, 2.5, nan])
    np.testing.assert_array_equal(rows.numbers("flag"), [1, nan, nan, nan])
    with pytest.raises(UserError, match="no column 'm', only caption, flag, n; fix: name one"):
        rows.numbers("m")
    with pytest.raises(UserError, match="a.parquet: caption: its values are string, not numbers"):
        rows.numbers("caption")


# ---- files


def test_a_row_is_read_once_and_so_many_row_groups_are_held(tmp_path, monkeypatch):
    rows = shards(tmp_path)
    found = reads(rows, monkeypatch)
    for i in (0, 3, 4, 1, 7):
        rows.media(i, rows[i])
    assert found == [(0, 0), (0, 1)]
    for i in (23, 0):
        rows.media(i, rows[i])
    assert found == [(0, 0), (0, 1), (2, 1), (0, 0)] and len(rows.held) == 2


def test_a_later_start_parses_no_footer(tmp_path, monkeypatch):
    rows = shards(tmp_path)
    again = pickle.dumps(rows)
    monkeypatch.setattr(parquet, "read_metadata", lambda file: pytest.fail("a footer was parsed"))
    opened = pickle.loads(again)
    assert len(opened) == 24 and opened.file_spans() == rows.file_spans()


def test_a_changed_file_is_noticed(tmp_path):
    rows = shards(tmp_path)
    rows[0]
    put(tmp_path / "2.parquet", captions(9))
    assert rows[0]["id"] == "r0"
    with pytest.raises(UserError, match="2.parquet: has changed since it was opened; fix: start"):
        rows[23]
    assert len(open_rows(tmp_path)) == 16 + 9


def test_what_is_no_parquet_file_is_said(tmp_path, monkeypatch):
    table = pa.Table.from_pylist(captions(3))
    (tmp_path / "page.parquet").write_text("<!doctype html>")
    put(tmp_path / "empty.parquet", table.slice(0, 0))
    put(tmp_path / "twice.parquet", table.rename_columns(["id", "image", "id"]))
    for name, what in (
        ("page", "no parquet file but an HTML page"),
        ("empty", "no rows"),
        ("twice", "several columns named 'id'"),
        ("none", "no such file"),
    ):
        with pytest.raises(UserError, match=f"{name}.parquet: .*{what}.*; fix: "):
            open_rows(tmp_path / f"{name}.parquet")
    put(tmp_path / "rows.parquet", table)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pyarrow: reads .*, not installed; fix: pip install pya"):
        open_rows(tmp_path / "rows.parquet")


def test_a_picture_that_does_not_fit_its_check_sum_is_an_error(tmp_path):
    file = put(tmp_path / "rows.parquet", captions(4), compression="none", write_page_checksum=True)
    content = bytearray(file.read_bytes())
    content[content.index(png(2)) + 50] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="rows.parquet: .*CRC"):
        open_rows(file)[0]


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_file_is_read_as_it_was_or_is_one_line(tmp_path, seed):
    r = random.Random(seed)
    stored = put(tmp_path / "good.parquet", captions(12), write_page_checksum=True).read_bytes()
    good = open_rows(tmp_path / "good.parquet")
    damaged = bytearray(stored)
    if seed % 3 == 0:
        del damaged[r.randrange(len(damaged)) :]
    else:
        # In the footer, or anywhere.
        begin = 0
        if seed % 3 == 1:
            begin = len(damaged) - 8 - int.from_bytes(damaged[-8:-4], "little")
        for _ in range(r.choice((1, 3, 30))):
            damaged[r.randrange(begin, len(damaged))] = r.randrange(256)
    (tmp_path / "bad.parquet").write_bytes(damaged)
    try:
        rows = open_rows(tmp_path / "bad.parquet")
    except UserError as e:
        assert "\n" not in str(e) and "bad.parquet" in str(e) and len(str(e)) < 1000
        return
    for i in range(len(rows)):
        try:
            one = rows[i]
        except UserError as e:
            assert "\n" not in str(e) and "bad.parquet" in str(e) and len(str(e)) < 1000
        else:
            # A changed name of a column makes another row, and none loses what it has silently.
            if one.get("conversations") and "image" in one:
                assert one.sources == good[i].sources


# ---- the order


def order_of(rows, seed=3, epochs=2):
    order = Order(len(rows), seed, rows.parts, rows.blocks)
    return [order(k)[1] for k in range(epochs * order.n)]


def test_an_epoch_goes_through_windows_of_row_groups(tmp_path):
    rows = shards(tmp_path)
    epochs = np.reshape(order_of(rows), (2, 24)).tolist()
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs) and epochs[0] != epochs[1]
    windows = []
    for epoch in epochs:
        for begin in range(0, 24, 8):
            window = epoch[begin : begin + 8]
            blocks = {block_of(rows, row) for row in window}
            assert len(blocks) == 2 and window != sorted(window)
            windows.append(frozenset(block.start for block in blocks))
    assert set(windows[:3]) != set(windows[3:])

    # For ever: a run that is resumed years later sees the same.
    assert epochs[0][:6] == [3, 1, 16, 17, 0, 19]


def test_a_mixture_keeps_the_order_of_a_source_without_blocks():
    ends = np.array([3, 6, 8, 10])
    parts = (Part(30, 20), Part(10, 7, Blocks(ends, 2)), Part(6, 9))
    plain = Order(46, 5, tuple(part._replace(blocks=None) for part in parts))
    order = Order(46, 5, parts)
    stream = []
    for k in range(4 * 36):
        (epoch, found), (_, before) = order(k), plain(k)
        assert epoch == k // 36
        if 30 <= before < 40:
            stream.append(found - 30)
        else:
            assert found == before

    # The blocks' own stream: each turn has every row, window by window.
    for turn in (stream[:10], stream[10:20]):
        assert sorted(turn) == list(range(10))
        blocks = np.searchsorted(ends, turn, side="right").tolist()
        runs = [key for key, _ in itertools.groupby(blocks)]
        assert len(set(blocks[: len(blocks) // 2 - 2])) <= 2 and len(runs) > 3


def test_steps_are_the_same_on_any_ranks_and_a_function_of_their_number(tmp_path, spec):
    texts = write(tmp_path, [row(f"t{i}", "x", image=None) for i in range(10)], "texts.json")
    rows = RowMixture([shards(tmp_path), texts], [1.0, 1.5])
    stage = Stage(global_batch=8, epochs=2)
    one = Steps(rows, spec, stage, Train(seed=1))
    expected = flat([one[i] for i in range(len(one))])
    assert flat([one[i] for i in reversed(range(len(one)))]) == expected[::-1]
    again = pickle.loads(pickle.dumps(one))
    assert flat([again[4]]) == expected[4:5]
    for world in (2, 4):
        ranks = [Steps(rows, spec, stage, Train(seed=1), rank, world) for rank in range(world)]
        for i in range(len(one)):
            assert sorted(rows_of([rank[i] for rank in ranks])) == sorted(rows_of([one[i]]))


def test_a_step_reads_each_row_group_once(tmp_path, spec, monkeypatch):
    rows = shards(tmp_path)
    rows.blocks = Blocks(rows.blocks.ends, 1)
    found = reads(rows, monkeypatch)
    stage = Stage(global_batch=24, steps=1, micro_batch_tokens=0)
    counts = np.random.default_rng(0).integers(20, 90, (24, 3))  # shared by tokens: in any order
    for steps in (
        Steps(rows, spec, stage, Train()),
        Steps(rows, spec, stage, Train(), counts=counts),
        Steps(rows, spec, stage, Train(), validation=True),
    ):
        rows.held.clear()
        found.clear()
        made = rows_of([steps[0]])
        assert sorted(found) == [(k, group) for k in range(3) for group in range(2)]
        if not steps.validation:
            assert made == [steps.order(k)[1] for k in steps._share(0)]


def test_stand_ins_lie_in_the_window(tmp_path, spec, monkeypatch):
    bad = [{**one, "caption": "" if i % 4 else "x"} for i, one in enumerate(captions(24))]
    rows = open_rows(put(tmp_path / "bad.parquet", bad))
    rows.blocks = Blocks(rows.blocks.ends, 1)
    found = reads(rows, monkeypatch)
    step = Steps(rows, spec, Stage(global_batch=4, steps=6), Train(on_bad_row="skip"))[0]
    assert len(rows_of([step])) == 4 and step.skipped and len(found) <= 2 * 4


# ---- what looks at some rows only


def test_a_few_blocks_stand_for_all_rows(tmp_path):
    rows = shards(tmp_path, n=240, count=4, group=20)
    picks = list(in_few_blocks(rows, range(0, 240, 5)))
    assert len(picks) == 48 and len({block_of(rows, i).start for i in picks}) <= 5
    assert max(picks) > 150 and len(set(picks)) > 40
    plain = write(tmp_path, [row(i, image=None) for i in range(5)])
    assert list(in_few_blocks(plain, [4, 1])) == [4, 1]
    mixture = RowMixture([plain, rows], [1.0, 1.0])
    assert list(in_few_blocks(mixture, [0, 3, 7])) == [0, 3, 7] and block_of(mixture, 5).start == 5


@pytest.mark.parametrize("seen", ("whole", "footer", "pieces"))
def test_a_run_notices_that_a_row_group_was_replaced(tmp_path, monkeypatch, seen):
    # Values of the same length: the pieces of row groups show it, or the footer's statistics do.
    options = {"compression": "none", "write_statistics": seen == "footer"}
    if seen != "whole":
        monkeypatch.setattr("training.made_from.WHOLE_PARQUET", 0)
    if seen == "footer":
        monkeypatch.setattr("training.made_from.PIECE", 0)
    file = put(tmp_path / "rows.parquet", captions(12), **options)
    before, pictures = contents_of_rows(open_rows(file)), contents_of_pictures(open_rows(file))
    assert len(pictures) == 12 and contents_of_rows(open_rows(file)) == before

    changed = captions(12)
    changed[5]["caption"] = "colour x"
    put(file, changed, **options)
    assert contents_of_rows(open_rows(file)) != before
    changed[5]["image"]["bytes"] = png(99)
    put(file, changed, **options)
    assert contents_of_pictures(open_rows(file)) != pictures
