"""holdout.py, subset.py, measure.py, content.py: which rows train, and which are held out."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
from PIL import Image

import data
from config import Source, Stage, Train, UserError
from data import Steps, token_counts
from inputs import content, holdout, measure
from inputs.content import row_keys
from inputs.duplicates import find_duplicates
from inputs.holdout import choose_held_out, open_stage
from inputs.rows import Blocks, RowMixture, open_rows
from inputs.shards import shard
from inputs.subset import RowSubset
from tests.tools.sample_rows import mean_colour_spec, row, rows_of, turns, write


def colour_picture(folder, name, colour):
    """Write a picture of one colour, whose bytes the colour decides."""
    Image.new("RGB", (8, 8), colour).save(folder / name)


@pytest.fixture
def pictures(tmp_path):
    """Return a folder with 100 different pictures, 000.png to 099.png."""
    for i in range(100):
        colour_picture(tmp_path, f"{i:03}.png", (i, 255 - i, 7 * i % 256))
    return tmp_path


def many_rows(count, pictures=100, seed=0):
    """Return rows about pictures, each about one of them, and every fifth without."""
    drawn = random.Random(seed)
    rows = []
    for i in range(count):
        if i % 5 == 4:
            rows.append(row(i, f"How much is {i} + {i}?", f"{2 * i}", image=None))
        else:
            name = f"{drawn.randrange(pictures):03}.png"
            rows.append(row(i, f"<image>\nQuestion {i % 7}?", f"Answer {i}.", image=name))
    return rows


def stage_of(folder, rows, validation, name="rows.json", **options):
    """Write rows, and return a stage that trains on them."""
    (folder / name).write_text(json.dumps(rows))
    return Stage(data=str(folder / name), images=str(folder), validation=validation, **options)


def ids(rows):
    """Return the ids of rows, sorted."""
    return sorted(rows[i]["id"] for i in range(len(rows)))


def held_ids(stage):
    """Return the ids of what a stage holds out. All other rows are those that it trains on."""
    opened = open_stage(stage, "stage.a")
    held = ids(opened.held_out)
    assert not set(held) & set(ids(opened.training))
    return held


# ---- the split


def test_neither_order_nor_files_nor_formats_decide_what_is_held_out(pictures, tmp_path):
    rows = many_rows(300)
    want = held_ids(stage_of(pictures, rows, 0.2))
    assert 30 < len(want) < 100

    # Another order, lines, and tar files.
    shuffled = random.Random(1).sample(rows, len(rows))
    assert held_ids(stage_of(pictures, shuffled, 0.2)) == want
    lines = pictures / "lines.jsonl"
    lines.write_text("\n".join(json.dumps(r) for r in shuffled))
    assert held_ids(Stage(data=str(lines), validation=0.2)) == want
    shard(open_rows(lines), pictures / "shards", 60_000)
    shards = Stage(data=str(pictures / "shards"), validation=0.2)
    assert len(open_rows(shards.data).files) > 1 and held_ids(shards) == want

    # Pictures under other names, rows of another form, and as the bytes of a data: URL.
    (pictures / "renamed").mkdir()
    forms = []
    for r in shuffled:
        question, answer = (turn["value"] for turn in r["conversations"])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        form = {"id": r["id"], "messages": messages}
        if "image" in r:
            (pictures / "renamed" / f"x{r['image']}").write_bytes(
                (pictures / r["image"]).read_bytes()
            )
            form["images"] = [f"x{r['image']}"]
        forms.append(form)
    (pictures / "renamed" / "forms.json").write_text(json.dumps(forms))
    assert held_ids(Stage(data=str(pictures / "renamed/forms.json"), validation=0.2)) == want

    # Two files of a mixture, whatever their weights.
    write(pictures, shuffled[:90], "few.json")
    write(pictures, shuffled[90:], "more.json")
    mixture = {
        "few": Source(str(pictures / "few.json"), weight=3.0),
        "more": Source(str(pictures / "more.json"), weight=0.5),
    }
    mixed = Stage(mixture=mixture, validation=0.2)
    assert held_ids(mixed) == want
    training = open_stage(mixed, "stage.a").training
    few, more = training.parts
    assert few.rows + more.rows == len(training) == 300 - len(want)
    assert (few.per_epoch, more.per_epoch) == (3 * few.rows, round(0.5 * more.rows))

    # A number of rows.
    count = held_ids(stage_of(pictures, rows, 25.0))
    assert held_ids(stage_of(pictures, shuffled, 25.0)) == count
    assert held_ids(dataclasses.replace(mixed, validation=25.0)) == count


def test_parquet_holds_out_the_rows_of_its_json(pictures):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    rows = many_rows(120)
    table = []
    for r in rows:
        content = None
        if "image" in r:
            content = {"bytes": (pictures / r["image"]).read_bytes(), "path": r["image"]}
        table.append({"id": r["id"], "image": content, "conversations": r["conversations"]})
    file = pictures / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(table), file, row_group_size=16)
    try:
        open_rows(file)[0]
    except UserError:
        pytest.skip("parquet is not read as rows yet")
    for validation in (0.2, 25.0):
        want = held_ids(stage_of(pictures, rows, validation))
        assert held_ids(Stage(data=str(file), validation=validation)) == want


def test_a_row_that_was_held_out_stays_so_when_rows_are_added(pictures):
    rows = many_rows(400)
    before = held_ids(stage_of(pictures, rows[:200], 0.2))
    after = held_ids(stage_of(pictures, rows[::-1], 0.2))
    assert set(before) < set(after)
    assert [i for i in after if i < 200] == before
    wider = held_ids(stage_of(pictures, rows[:200], 0.4))
    assert set(before) < set(wider)


def test_a_share_is_a_share_of_the_rows_and_a_number_is_exact(tmp_path):
    """Rows of different content: as many as a fair coin would hold out; a number exactly."""
    keys = row_keys(write(tmp_path, [row(i, f"What is {i}?", image=None) for i in range(3000)]))
    for share in (0.02, 0.3, 0.9):
        found = choose_held_out(keys, share, "").sum()
        assert abs(found - 3000 * share) < 4 * math.sqrt(3000 * share * (1 - share))
    for number in (1, 17, 2999):
        assert choose_held_out(keys, float(number), "").sum() == number


def test_a_number_takes_all_rows_of_a_picture_and_says_how_many_it_became(pictures):
    rows = [row(i, f"<image>\n{i}?", image=f"{i // 4:03}.png") for i in range(80)]
    opened = open_stage(stage_of(pictures, rows, 10.0), "stage.a")
    note = "68 rows to train on, 12 held out by content (10 and the others of their pictures)"
    assert len(opened.held_out) == 12 and opened.notes == [note]
    opened = open_stage(stage_of(pictures, rows, 12.0), "stage.a")
    assert opened.notes == ["68 rows to train on, 12 held out by content"]


def test_duplicates_never_stand_on_both_sides(pictures):
    """300 random sets, with rows of the same picture under two names and of the same question."""
    bytes_of = {}
    for i in range(8):
        content_of_file = (pictures / f"{i:03}.png").read_bytes()
        (pictures / f"again{i}.png").write_bytes(content_of_file)
        bytes_of[f"{i:03}.png"] = bytes_of[f"again{i}.png"] = content_of_file

    rows = []
    contents = []  # of each row what decides its side: what it shows, else what it asks
    drawn = random.Random(0)
    for i in range(400):
        number = drawn.randrange(8)
        question = f"Question {drawn.randrange(9)}?"
        names = [f"{number:03}.png", f"again{number}.png"]
        if i % 3 == 0:
            rows.append(row(i, question, image=None))
            contents.append(question)
            continue
        if i % 3 == 1:
            name = drawn.choice(names)
            rows.append(row(i, f"<image>\n{question}", f"{i}", image=name))
            names = [name]
        else:
            names.insert(0, f"{drawn.randrange(8):03}.png")
            drawn.shuffle(names)
            rows.append(row(i, f"<image><image><image> {question}", image=names))
        contents.append(frozenset(bytes_of[name] for name in names))
    keys = row_keys(write(pictures, rows))

    tried = 0
    for seed in range(300):
        drawn = random.Random(seed)
        numbers = drawn.sample(range(400), drawn.randrange(8, 60))
        validation = drawn.choice([0.3, 0.5, float(drawn.randrange(1, len(numbers)))])
        try:
            is_held = choose_held_out(keys[numbers], validation, "")
        except UserError as e:
            assert "holds out none" in str(e) or "holds out all" in str(e)
            continue
        held = {contents[i] for i in np.array(numbers)[is_held]}
        left = {contents[i] for i in np.array(numbers)[~is_held]}
        assert held and left and not held & left, f"seed {seed}"
        tried += 1
    assert tried > 250


@pytest.mark.parametrize("validation", [0.25, 30.0])
def test_all_ranks_hold_out_the_same_and_train_on_the_rest(pictures, validation):
    stage = stage_of(pictures, many_rows(150), validation, global_batch=16, epochs=1)
    spec = mean_colour_spec()
    alone = open_stage(stage, "stage.a")
    want = rows_of([Steps(alone.training, spec, stage, Train())[2]])
    held = rows_of(Steps(alone.held_out, spec, stage, Train(), validation=True)[i] for i in (0, 1))
    for world in (1, 2, 4):
        trained = []
        validated = []
        for rank in range(world):
            opened = open_stage(stage, "stage.a")  # each rank by itself
            counts = token_counts(opened.training, spec)
            steps = Steps(opened.training, spec, stage, Train(), rank, world, counts=counts)
            trained += rows_of([steps[2]])
            steps = Steps(opened.held_out, spec, stage, Train(), rank, world, validation=True)
            validated += rows_of(steps[i] for i in (0, 1))
        assert sorted(trained) == sorted(want) and sorted(validated) == sorted(held)


def test_a_bad_row_is_placed_and_training_says_what_is_wrong_with_it(pictures):
    rows = many_rows(60)
    rows[7] = row(7, "<image>\nWhat?", image="none.png")
    rows[8] = rows[10] = [1]
    stage = stage_of(pictures, rows, 0.2)
    opened = open_stage(stage, "stage.a")
    assert len(opened.training) + len(opened.held_out) == 60
    places = [rows.chosen.tolist() for rows in (opened.training, opened.held_out)]
    assert 8 in places[0] and 7 in places[0] + places[1]
    nearly_all = open_stage(dataclasses.replace(stage, validation=59.0), "stage.a")
    assert nearly_all.training.chosen.tolist() == [8, 10]
    everything = RowMixture([opened.training, opened.held_out], [1, 1])
    steps = Steps(
        everything, mean_colour_spec(), Stage(), Train(on_bad_row="skip"), validation=True
    )
    assert sum("none.png" in line or "JSON list" in line for line in steps[0].skipped) == 3


@pytest.mark.parametrize(
    "validation, what",
    [
        (0.0, "stage.a.validation: 0 is neither a share below 1 nor a whole number of rows; fix: "),
        (2.5, "stage.a.validation: 2.5 is neither a share"),
        (40.0, "stage.a.validation: 40, of 40 rows; fix: write a number below 40"),
        (1e9, "of 40 rows; fix: write a number below 40"),
        (1e-9, "1e-09 holds out none of 40 rows, which have 2 different pictures or questions"),
        (39.0, "39 holds out all of 40 rows, which have 2 different pictures or questions"),
    ],
)
def test_what_holds_out_nothing_or_everything_is_one_line(pictures, validation, what):
    rows = [row(i, f"<image>{i}", image=f"{i % 2:03}.png") for i in range(40)]
    with pytest.raises(UserError) as e:
        open_stage(stage_of(pictures, rows, validation), "stage.a")
    assert what in str(e.value) and "\n" not in str(e.value)


def test_a_source_of_which_nothing_is_left_is_named(pictures):
    rows = [row(i, f"<image>{i}", image=f"{i:03}.png") for i in range(40)]
    held = held_ids(stage_of(pictures, rows, 1.0))
    write(pictures, [rows[i] for i in held], "one.json")
    write(pictures, [r for r in rows if r["id"] not in held], "rest.json")
    mixture = {name: Source(str(pictures / f"{name}.json")) for name in ("one", "rest")}
    with pytest.raises(UserError, match="1 holds out all 1 rows of .*one.json; fix: write a small"):
        open_stage(Stage(mixture=mixture, validation=1.0), "stage.a")


def test_a_file_of_held_out_rows_is_read_as_before(pictures):
    write(pictures, many_rows(5), "val.json")
    stage = stage_of(pictures, many_rows(9), str(pictures / "val.json"))
    opened = open_stage(stage, "stage.a")
    assert (len(opened.training), len(opened.held_out), opened.notes) == (9, 5, [])
    assert not isinstance(opened.training, RowSubset)
    opened = open_stage(dataclasses.replace(stage, validation=""), "stage.a")
    assert opened.held_out is None


# ---- chosen rows


def test_chosen_rows_keep_their_place_their_media_their_files_and_their_blocks(pictures):
    for name in "ab":
        rows = [row(f"{name}{i}", f"<image>{i}", image=f"{i:03}.png") for i in range(6)]
        write(pictures, rows, f"{name}.jsonl")
        lines = "\n".join(json.dumps(r) for r in rows)
        (pictures / f"{name}.jsonl").write_text(lines)
    whole = open_rows(f"{pictures}/*.jsonl")
    chosen = RowSubset(whole, np.array([1, 4, 5, 8]))
    assert [r["id"] for r in chosen] == ["a1", "a4", "a5", "b2"] and chosen[-1]["id"] == "b2"
    assert chosen.where(3) == f"{pictures}/b.jsonl:line 3 (id b2)"
    assert chosen.media(1, chosen[1])[0].source == pictures / "004.png"
    assert chosen.file_spans() == [(pictures / "a.jsonl", 0, 3), (pictures / "b.jsonl", 3, 4)]
    only = RowSubset(whole, np.array([7]))
    assert only.file_spans() == [(pictures / "b.jsonl", 0, 1)]

    # Blocks of 3, 1, 2 and 6 rows: of the second none is chosen.
    whole.blocks = Blocks(np.array([3, 4, 6, 12]), 2)
    blocks = RowSubset(whole, np.array([1, 4, 5, 8])).blocks
    assert blocks.ends.tolist() == [1, 3, 4] and blocks.at_once == 2
    assert RowSubset(whole, np.array([4, 8])).blocks.ends.tolist() == [1, 2]


def test_token_counts_of_chosen_rows_are_taken_from_those_of_the_whole_file(
    pictures, monkeypatch, capsys
):
    spec = mean_colour_spec()
    stage = stage_of(pictures, many_rows(80), 0.25)
    whole = open_rows(stage.data)
    counts = token_counts(whole, spec)
    monkeypatch.setattr(data, "make_samples", None)  # nothing is counted again
    for validation in (0.25, 10.0):
        opened = open_stage(dataclasses.replace(stage, validation=validation), "stage.a")
        for rows in (opened.training, opened.held_out):
            assert np.array_equal(token_counts(rows, spec), counts[rows.chosen])
    assert capsys.readouterr().out.count("counting the tokens") == 1


# ---- the hashes


def test_hashes_are_of_the_content_and_say_what_is_the_same(pictures):
    (pictures / "copy.png").write_bytes((pictures / "000.png").read_bytes())
    rows = [
        row(0, "<image>\nWho?", "A dog.", image="000.png"),
        row(1, "Who?  <image>", "A dog. ", image="copy.png"),  # the same
        row(2, "<image>\nWho?", "A cat.", image="000.png"),  # another answer
        row(3, "<image>\nWhere?", "A dog.", image="000.png"),  # another question
        row(4, "<image>\nWho?", "A dog.", image="001.png"),  # another picture
        row(5, "Who?", "A dog.", image=None),
        row(6, "Who?", "Me.", image=None),
        row(7, "<image><image> Who?", "A dog.", image=["000.png", "001.png"]),
        row(8, "<image><image> Who?", "A dog.", image=["001.png", "000.png"]),  # another order
        row(9, "<image>\nWho?", "A dog.", image="none.png"),
        row(10, "<image>\nWho?", "A dog.", image="none.png"),
    ]
    keys = row_keys(write(pictures, rows))
    shown, asked, answered = keys.T.tolist()
    assert shown[0] == shown[1] == shown[2] == shown[3] != shown[4]
    assert shown[5] == shown[6] == 0 and asked[5] == asked[6]
    assert shown[7] == shown[8] and asked[7] != asked[8]
    assert asked[9] == asked[10] == 0  # nobody knows whether they show the same
    assert (keys >= 0).all() and answered[0] == answered[1] != answered[2]
    same, differing = find_duplicates(keys)
    assert same.tolist() == [[1, 0]] and differing.tolist() == [[2, 0], [6, 5]]


def test_a_video_is_known_by_its_size_and_ends(tmp_path):
    noise = random.Random(0).randbytes(300_000)
    middle = noise[:150_000] + b"other" + noise[150_005:]
    files = {"a": noise, "copy": noise, "middle": middle, "end": noise[:-1] + b"x"}
    rows = []
    for name, content_of_file in files.items():
        (tmp_path / f"{name}.mp4").write_bytes(content_of_file)
        conversation = turns("<image> What?", "A dog.")
        rows.append({"id": name, "video": f"{name}.mp4", "conversations": conversation})
    found = write(tmp_path, rows)
    a, copy, middle, end = row_keys(found)[:, 0].tolist()
    assert a == copy == middle != end

    shard(found, tmp_path / "out", 10**9)
    assert row_keys(open_rows(tmp_path / "out"))[:, 0].tolist() == [a, copy, middle, end]


def test_hashes_of_many_rows_are_kept_and_made_again_where_pictures_change(
    pictures, monkeypatch, capsys
):
    monkeypatch.setattr(content, "FEW_ROWS", 100)
    monkeypatch.setattr(measure.Chunks, "CHUNK", 16)
    rows = many_rows(200)
    rows[5] = row(5, "<image>\nWhat?", image="late.png")  # not one that is looked at
    stage = stage_of(pictures, rows, 0.2)
    first = row_keys(open_rows(stage.data), workers=2)
    assert "rows.json: reading all its pictures for a hash" in capsys.readouterr().out
    assert len(list(pictures.glob("rows.json.*.content"))) == 1
    assert len(open_rows(f"{pictures}/rows*")) == 200  # it is no file of rows

    # Kept, but for the row whose picture was not there.
    read = []
    real = content.digest_of_medium
    monkeypatch.setattr(
        content, "digest_of_medium", lambda medium: (read.append(medium.name), real(medium))[1]
    )
    colour_picture(pictures, "late.png", (1, 1, 1))
    again = row_keys(open_rows(stage.data))
    assert read == ["late.png"] and again[5, 1] != 0 == first[5, 1]
    assert np.array_equal(np.delete(again, 5, 0), np.delete(first, 5, 0))

    # Other pictures of the same names, and other columns.
    for i in range(100):
        colour_picture(pictures, f"{i:03}.png", (255 - i, i, i))
    changed = np.delete(row_keys(open_rows(stage.data))[:, 0], 5)
    assert not np.isin(changed, again[again[:, 0] > 0, 0]).any()
    read.clear()
    row_keys(open_rows(stage.data, columns={"id": "id"}))
    assert len(read) == 160


# ---- at_least


def rated(i, **ratings):
    """Return a row as FineVision has them, with columns of ratings."""
    made = {"texts": [{"user": f"What is {i}?", "assistant": f"{i}."}], "source": "x"}
    return {"id": i, **made, **ratings}


@pytest.mark.parametrize("packed", ["json", "jsonl", "tar"])
def test_at_least_leaves_the_rows_that_are_rated_so(tmp_path, packed, monkeypatch):
    rows = []
    for i in range(40):
        relevance = [1, 4, 5, None, "4", 3.5, "", math.nan][i % 8]
        rows.append(rated(i, relevance_min=relevance, formatting_min=i % 3))
    del rows[1]["relevance_min"]
    stage = stage_of(tmp_path, rows, "", at_least={"relevance_min": 4})
    if packed == "jsonl":
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(json.dumps(r) for r in rows))
        stage = dataclasses.replace(stage, data=str(file))
    elif packed == "tar":
        shard(open_rows(stage.data), tmp_path / "out", 10**6)
        stage = dataclasses.replace(stage, data=str(tmp_path / "out"))
    opened = open_stage(stage, "stage.a")
    want = [i for i in range(40) if i % 8 in (1, 2, 4) and i != 1]
    assert ids(opened.training) == want and opened.notes == ["at_least: 14 of 40 rows"]

    both = dataclasses.replace(stage, at_least={"relevance_min": 4, "formatting_min": 2.0})
    assert ids(open_stage(both, "stage.a").training) == [i for i in want if i % 3 == 2]

    # Of these some are held out, the same as without the others.
    held = held_ids(dataclasses.replace(stage, validation=0.3))
    everything = dataclasses.replace(stage, at_least={}, validation=0.3)
    assert held == [i for i in held_ids(everything) if i in want]

    # Of a large file the numbers are kept.
    monkeypatch.setattr(holdout, "FEW_ROWS", 10)
    assert ids(open_stage(stage, "stage.a").training) == want
    monkeypatch.setattr(holdout, "measure_number", lambda *_, **__: 1 / 0)
    assert ids(open_stage(stage, "stage.a").training) == want


def test_at_least_of_a_parquet_file_reads_its_column(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [rated(i, relevance_min=[1, 4, None, 5][i % 4]) for i in range(20)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "fine.parquet", row_group_size=6)
    stage = Stage(data=str(tmp_path / "fine.parquet"), at_least={"relevance_min": 4})
    opened = open_stage(stage, "stage.a")
    assert ids(opened.training) == [i for i in range(20) if i % 4 in (1, 3)]
    assert opened.training.blocks.ends.tolist() == [3, 6, 9, 10]
    with pytest.raises(UserError, match="no column 'relevanc', only id, relevance_min, source, te"):
        open_stage(dataclasses.replace(stage, at_least={"relevanc": 4}), "stage.a")


def test_at_least_in_a_mixture_is_said_of_each_source(tmp_path):
    write(tmp_path, [rated(i, relevance_min=i % 5) for i in range(20)], "fine.json")
    write(tmp_path, [row(f"plain{i}", image=None) for i in range(6)], "plain.json")
    sources = {
        "fine": Source(str(tmp_path / "fine.json"), at_least={"relevance_min": 4}, weight=2.0),
        "plain": Source(str(tmp_path / "plain.json")),
    }
    opened = open_stage(Stage(mixture=sources), "stage.a")
    assert opened.notes == ["fine at_least: 4 of 20 rows"]
    assert [part[:2] for part in opened.training.parts] == [(4, 8), (6, 6)]
    with pytest.raises(UserError, match="stage.a.at_least: set beside a mixture; fix: "):
        open_stage(Stage(mixture=sources, at_least={"relevance_min": 1}), "stage.a")


def test_a_row_that_cannot_be_read_is_not_lost_to_a_rating(tmp_path):
    lines = [json.dumps(rated(i, relevance_min=i)) for i in range(6)]
    lines[1] = '{"relevance_min": 1'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    stage = Stage(data=str(tmp_path / "rows.jsonl"), at_least={"relevance_min": 4})
    assert open_stage(stage, "stage.a").training.chosen.tolist() == [1, 4, 5]


@pytest.mark.parametrize(
    "at_least, what",
    [
        (
            {"relevanc": 4},
            "stage.a.at_least.relevanc: no row has a number there, they have source, ",
        ),
        (
            {"source": 4},
            "rows.json:row 0 (id 0): source is 'x', and no number; fix: write a number",
        ),
        ({"flag": 1}, "rows.json:row 0 (id 0): flag is True, and no number"),
        ({"relevance_min": 9}, "stage.a.at_least: none of 8 rows has so much; fix: lower it"),
        ({"relevance_min": "4"}, "stage.a.at_least.relevance_min: '4' is no number; fix: write a"),
        ({"relevance_min": True}, "stage.a.at_least.relevance_min: True is no number"),
    ],
)
def test_what_at_least_cannot_mean_is_one_line(tmp_path, at_least, what):
    rows = [rated(i, relevance_min=i, flag=True) for i in range(8)]
    with pytest.raises(UserError) as e:
        open_stage(stage_of(tmp_path, rows, "", at_least=at_least), "stage.a")
    assert what in str(e.value) and "\n" not in str(e.value)
