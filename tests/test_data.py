"""data.py: images, rows, samples, packing, the order, steps over ranks and workers, and `check`."""

import dataclasses
import json
import multiprocessing
import resource

import numpy as np
import pytest
import torch
from PIL import Image

import data
from config import Stage, Train, UserError
from data import Order, Steps, loader, make_spec
from inputs.pictures import load_image
from inputs.rows import open_rows
from inputs.sample import Sample, SampleSpec, make_sample
from inputs.templates import byte_tokenizer
from inputs.tiling import Tiling
from packing import IGNORE, IMAGE_TOKEN, Item, bin_pack, pack_samples
from tests.tools.environment import run, shared
from tests.tools.sample_rows import MeanColour, flat, row, rows_of, turns, write


@pytest.fixture(scope="module")
def spec():
    return SampleSpec(
        byte_tokenizer(), "plain", max_tokens=1000, views=Tiling(5, transform=MeanColour())
    )


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (40, 50, 60)).save(tmp_path / "b.png")
    return tmp_path


# ---- images


def test_every_golden_image_decodes_so_or_is_named():
    images = shared("assets/images")
    files = json.loads((images / "golden_decode.json").read_text())["files"]
    assert len(files) > 100
    for name, golden in files.items():
        if "error" in golden:
            with pytest.raises(ValueError) as e:
                load_image(images / name)
            assert "\n" not in str(e.value) and type(e.value) is ValueError, name
            continue
        image = load_image(images / name)
        assert image.mode == "RGB" and list(image.size) == golden["transposed_size"], name
        assert list(image.getpixel((0, 0))) == golden["transposed_corner"], name
        mean = np.asarray(image, np.float64).mean((0, 1))
        assert np.abs(mean - golden["rgb_mean"]).max() < 1e-4, (
            name
        )  # the golden is rounded to 4 digits


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty file"),
        (b"\n<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a Git LFS pointer"),
        (bytes(500), "only zero bytes"),
        (b"hello, I am text", "not an image"),
        (b"GIF89a\x00\x00\x10\x00\x00\x00\x00;", "a side of zero pixels"),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load_image(tmp_path / "a.jpg")


def test_missing_folder_truncated_and_absurd_images(tmp_path, monkeypatch):
    def reason(name):
        with pytest.raises(ValueError) as e:
            load_image(tmp_path / name)
        return str(e.value)

    assert reason("none.jpg") == "no such file or directory"
    assert reason("") == "is a directory"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("whole.jpg", "whole.png", "whole.webp"):
        noise.save(tmp_path / name)
        assert load_image(tmp_path / name).size == (64, 64)
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[: len(raw) // 2])
        assert reason(name).startswith(("truncated", "damaged")), name
    Image.new("L", (1, 500)).save(tmp_path / "thin.png")
    Image.new("L", (1, 501)).save(tmp_path / "thinner.png")
    assert load_image(tmp_path / "thin.png").size == (1, 500)
    assert "1 x 501 pixels, a side ratio" in reason("thinner.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # Pillow only warns up to twice this
    assert "more than 400 pixels" in reason("thin.png")


def test_exif_turns_and_damaged_exif_does_not_matter(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "damaged.png", exif=b"Exif\0\0\xff\xff\xff\xff\0\0\0\x08")
    assert load_image(tmp_path / "turned.png").size == (2, 4)
    assert load_image(tmp_path / "damaged.png").size == (4, 2)


# ---- rows


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
        (b'{"a": 1}\n{"a": 2}', "not JSON at line 2 .*Extra data"),
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


# ---- samples


def test_samples_of_no_one_and_two_images(folder, spec):
    rows = write(
        folder,
        [
            row("text", "Hi", image=None),
            row("one"),
            row("two", "<image> and <image>?", image=["b.png", "a.png"]),
        ],
    )
    text, one, two = (make_sample(rows, i, spec) for i in range(3))
    decode = spec.tokenizer.decode
    for sample, images in ((text, 0), (one, 1), (two, 2)):
        assert (
            sample.ids.dtype == sample.labels.dtype == torch.int64
            and sample.ids.shape == sample.labels.shape
        )
        at = sample.ids == IMAGE_TOKEN
        assert (
            int(at.sum()) == 5 * images == 5 * len(sample.items)
            and (sample.labels[at] == IGNORE).all()
        )
        learned = sample.labels != IGNORE
        assert (
            (sample.labels[learned] == sample.ids[learned]).all()
            and not learned[0]
            and sample.cut == 0
        )
        assert decode(sample.ids[learned].tolist()) == " A dog."
        assert sample.labels[-1] == spec.tokenizer.eos_id
    runs = "".join("i" if t == IMAGE_TOKEN else "." for t in two.ids.tolist()).split("iiiii")
    assert len(runs) == 3 and all(set(run) == {"."} for run in runs)
    assert [int(item.pixels[0, 0, 0, 0]) for item in two.items] == [40, 10]
    assert two.items[0].pixels.shape == (1, 3, 2, 2)


def test_first_label_is_never_a_target(folder, spec):
    rows = write(folder, [row("caption", "Hi", "ab", image=None)])
    sample = make_sample(rows, 0, dataclasses.replace(spec, template="pretrain"))
    assert sample.labels.tolist()[0] == IGNORE and (sample.labels[1:] == sample.ids[1:]).all()


def test_an_over_long_row_loses_text_and_never_an_image(folder, spec):
    rows = write(folder, [row("x"), row("late", "What? <image> <image>", image=["a.png", "b.png"])])
    whole = make_sample(rows, 0, spec)
    short = make_sample(rows, 0, dataclasses.replace(spec, max_tokens=len(whole.ids) - 3))
    assert (
        short.cut == 3
        and torch.equal(short.ids, whole.ids[:-3])
        and torch.equal(short.labels, whole.labels[:-3])
    )
    exact = make_sample(rows, 0, dataclasses.replace(spec, max_tokens=len(whole.ids)))
    assert exact.cut == 0
    first_target = int((whole.labels != IGNORE).nonzero()[0])
    with pytest.raises(UserError, match="nothing supervised in the first .*raise max_tokens"):
        make_sample(rows, 0, dataclasses.replace(spec, max_tokens=first_target))
    assert make_sample(rows, 0, dataclasses.replace(spec, max_tokens=first_target + 1)).cut
    late = make_sample(rows, 1, spec)
    image_end = int((late.ids == IMAGE_TOKEN).nonzero()[-1]) + 1
    for limit in (
        image_end - 1,
        image_end - 5,
        image_end - 8,
    ):  # inside the last image, before it, inside the first
        with pytest.raises(
            UserError,
            match=f"row 1 .*image cut, it ends at token {image_end} .*fix: raise max_tokens",
        ):
            make_sample(rows, 1, dataclasses.replace(spec, max_tokens=limit))
    with pytest.raises(
        UserError, match="nothing supervised"
    ):  # the image is whole, the answer is gone
        make_sample(rows, 1, dataclasses.replace(spec, max_tokens=image_end))


BAD = {
    "missing": (row("m", image="none.png"), "none.png: no such file or directory"),
    "marks": (row("n", "<image><image>"), "2 <image> in what the humans say but 1 images"),
    "no mark": (row("o", "What?"), "0 <image> in what the humans say but 1 images"),
    "mark in a text": (row("p", image=None), "1 <image> in what the humans say but 0 images"),
    "roles": ({"id": "r", "conversations": turns("a", "b", "c")}, "conversations[2]: "),
    "role": ({"id": "q", "conversations": [{"from": "user", "value": "a"}]}, "conversations[0]: "),
    "nothing": ({"id": "s", "conversations": turns("a", " ")}, "nothing is supervised"),
    "no turns": ({"id": "t"}, "conversations: "),
    "video": (
        {"id": "v", "video": "a.mp4", "conversations": turns("a", "b")},
        "but 1 videos in the row",
    ),
    "no video": (
        {"id": "v", "video": "a.mp4", "conversations": turns("<image> a", "b")},
        "a.mp4: no such file",
    ),
    "both": (
        {"id": "v", "video": "a.mp4", "image": "a.png", "conversations": turns("a", "b")},
        "an image and a video",
    ),
    "no dict": ([1], "a JSON list, not a row"),
    "surrogate": (row("w", "Hi \ud83d", image=None), "text that is not Unicode"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_line_with_file_row_id_what_and_fix(folder, spec, name):
    bad, what = BAD[name]
    rows = write(folder, [row("good"), bad])
    with pytest.raises(UserError) as e:
        make_sample(rows, 1, spec)
    where = f"{folder}/rows.json:row 1" + (f" (id {bad['id']})" if isinstance(bad, dict) else "")
    assert str(e.value).startswith(where + ": ") and what in str(e.value)
    assert str(e.value).partition("; fix: ")[2] and "\n" not in str(e.value)


# ---- packing


def sample(length, i=0, images=0):
    ids = torch.arange(length) + 100 * i
    labels = torch.where(torch.arange(length) % 2 == 0, IGNORE, ids)
    return Sample(ids, labels, [Item(torch.full((1, 3, 2, 2), float(i)))] * images, i, 0)


def test_a_pack_keeps_samples_apart():
    batch = pack_samples([sample(4, 1, images=2), sample(3, 2), sample(5, 3, images=1)])
    assert batch.input_ids.tolist() == [100, 101, 102, 103, 200, 201, 202, 300, 301, 302, 303, 304]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 12] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 5 and batch.rows == [1, 2, 3] and batch.supervised == 2 + 1 + 2
    assert batch.images[:, 0, 0, 0].tolist() == [1, 1, 3] and batch.images.shape == (3, 3, 2, 2)
    assert pack_samples([sample(3)]).images is None
    moved = batch.to("meta")
    tensors = [moved.input_ids, moved.labels, moved.positions, moved.cu_seqlens, moved.images]
    assert all(t.is_meta for t in tensors) and moved.rows == batch.rows
    part = batch.part(slice(1, 3), slice(2, 3))
    alone = pack_samples([sample(3, 2), sample(5, 3, images=1)])
    for name, value in vars(alone).items():
        other = getattr(part, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, (
            name
        )
    assert batch.part(slice(1, 2), slice(2, 2)).images is None


def test_fill_holds_the_budget_and_loses_nothing():
    lengths = np.random.default_rng(0).integers(50, 1500, 300).tolist() + [9000]
    bins = bin_pack(lengths, 8192)
    assert sorted(j for b in bins for j in b) == list(range(301))
    assert all(sum(lengths[j] for j in b) <= 8192 or len(b) == 1 for b in bins)
    assert len(bins) == 1 + -(-sum(lengths[:-1]) // 8192)  # and that is the fewest possible
    assert all(b == sorted(b) for b in bins) and bins == sorted(bins) == bin_pack(lengths, 8192)
    assert bin_pack([3, 3, 7, 7], 10) == [[0, 2], [1, 3]]  # in stream order it would take three
    assert bin_pack([3, 3, 3], 0) == [[0], [1], [2]] and bin_pack([5, 6, 4], 9) == [[0, 2], [1]]


# ---- the order


def test_the_order_is_a_permutation_per_epoch_and_a_pure_function():
    order = Order(50, seed=3)
    epochs = [[order(k)[1] for k in range(50 * e, 50 * e + 50)] for e in range(3)]
    assert (
        all(sorted(rows) == list(range(50)) for rows in epochs)
        and epochs[0] != epochs[1] != epochs[2]
    )
    assert order(49)[0] == 0 and order(50)[0] == 1
    assert [Order(50, 3)(k)[1] for k in (120, 7, 60)] == [
        epochs[2][20],
        epochs[0][7],
        epochs[1][10],
    ]
    assert [order(k)[1] for k in range(50)] == epochs[0]  # and back
    assert [Order(50, 4)(k)[1] for k in range(50)] != epochs[0]
    assert [Order(8, 0)(k)[1] for k in range(8)] == [
        3,
        2,
        1,
        6,
        0,
        7,
        4,
        5,
    ]  # for ever: a resumed run relies on it
    with pytest.raises(UserError, match="train.seed: -1 is negative"):
        Order(8, -1)


# ---- steps


@pytest.fixture
def many(folder):
    rows = [row(i, "Hi" + "." * (7 * i % 40), image=None) for i in range(20)]
    rows += [row(20 + i, "<image>" + "." * i, image="ab"[i % 2] + ".png") for i in range(17)]
    return write(folder, rows)


STAGE = Stage(global_batch=8, micro_batch_tokens=200, epochs=1.0)


def test_steps_follow_the_order_and_hold_the_budget(many, spec):
    steps = Steps(many, spec, STAGE, Train(seed=1))
    assert len(steps) == 5 and len(Steps(many, spec, Stage(global_batch=8, steps=3), Train())) == 3
    assert len(Steps(many, spec, Stage(global_batch=37, epochs=2.0), Train())) == 2
    order = Order(37, 1)
    for i in range(5):
        step = steps[i]
        assert sorted(rows_of([step])) == sorted(order(k)[1] for k in range(8 * i, 8 * i + 8))
        assert 1 < len(step.batches) < 8 and all(len(b.input_ids) <= 200 for b in step.batches)
        for batch in step.batches:
            images = [10 if r % 2 == 0 else 40 for r in batch.rows if r >= 20]
            assert (batch.images[:, 0, 0, 0].tolist() if images else batch.images) == (
                images or None
            )
            assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == len(batch.input_ids)
    assert set(rows_of(steps[i] for i in range(5))) == set(range(37))
    single = Steps(many, spec, dataclasses.replace(STAGE, micro_batch_tokens=0), Train(seed=1))[0]
    assert [len(b.rows) for b in single.batches] == [1] * 8 and sorted(rows_of([single])) == sorted(
        rows_of([steps[0]])
    )


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_one_rank(many, spec, world):
    one = Steps(many, spec, STAGE, Train())
    ranks = [Steps(many, spec, STAGE, Train(), rank, world) for rank in range(world)]
    for i in range(len(one)):
        parts = [rows_of([rank[i]]) for rank in ranks]
        assert all(parts) and sorted(sum(parts, [])) == sorted(rows_of([one[i]]))
        assert sum(b.supervised for rank in ranks for b in rank[i].batches) == sum(
            b.supervised for b in one[i].batches
        )
    with pytest.raises(UserError, match="stage.global_batch: 2, for 3 ranks; fix: write 3 or more"):
        Steps(many, spec, Stage(global_batch=2), Train(), 0, 3)


def test_workers_and_the_place_of_resuming_change_nothing(many, spec):
    steps = Steps(many, spec, STAGE, Train())
    expected = flat(steps[i] for i in range(5))
    state = torch.get_rng_state()
    for start, workers in ((0, 0), (0, 2), (3, 1), (5, 0)):
        assert (
            flat(step for step, wait in loader(steps, start, workers) if wait >= 0)
            == expected[start:]
        )
    assert torch.equal(
        torch.get_rng_state(), state
    )  # else the data loader would shift the seeds of dropout
    assert steps[0].seconds > 0


def test_a_step_of_many_micro_batches_needs_few_open_files(many, spec):
    stage = Stage(global_batch=200, micro_batch_tokens=0, steps=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        held = [step for step, _ in loader(Steps(many, spec, stage, Train()), workers=1)]
        assert [len(step.batches) for step in held] == [200] * 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def some_bad(folder):
    rows = [row(i, image=f"none{i}.png" if i in (3, 4, 5, 11) else "a.png") for i in range(16)]
    return write(folder, rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_stops_with_its_line(some_bad, spec, workers):
    with pytest.raises(UserError) as e:
        list(loader(Steps(some_bad, spec, STAGE, Train()), workers=workers))
    assert type(e.value) is UserError and "\n" not in str(e.value)
    assert not multiprocessing.active_children()  # they would hold up what comes next, or the exit
    assert str(e.value).startswith(
        str(some_bad.file)
    ) and ".png: no such file or directory; fix: " in str(e.value)


def test_a_bad_row_is_skipped_for_the_next_of_the_epoch(some_bad, spec):
    train = Train(on_bad_row="skip", seed=2)
    steps, order = Steps(some_bad, spec, STAGE, train), Order(16, 2)
    expected, skipped = [], 0
    for k in range(16):
        j = k
        while order(j % 16)[1] in (3, 4, 5, 11):
            j, skipped = j + 1, skipped + 1
        expected.append(order(j % 16)[1])
    made = [steps[0], steps[1]]
    assert sorted(rows_of(made[:1])) == sorted(expected[:8]) and sorted(
        rows_of(made[1:])
    ) == sorted(expected[8:])
    messages = made[0].skipped + made[1].skipped
    assert len(messages) == skipped >= 4 and all("(id " in m and "; fix: " in m for m in messages)
    ranks = [Steps(some_bad, spec, STAGE, train, rank, 2)[i] for rank in range(2) for i in range(2)]
    assert sorted(rows_of(ranks)) == sorted(expected) and flat(made) == flat(
        s for s, _ in loader(steps, workers=2)
    )


def test_when_every_row_is_bad_skipping_ends(folder, spec, monkeypatch):
    rows = write(folder, [row(i, image="none.png") for i in range(16)])
    with pytest.raises(
        UserError, match="no usable row among 16, the last one: .*none.png: no such file.*; fix: "
    ):
        list(loader(Steps(rows, spec, STAGE, Train(on_bad_row="skip"))))
    tried = []
    monkeypatch.setattr(data, "make_sample", lambda *args: tried.append(args) or make_sample(*args))
    monkeypatch.setattr(data, "GIVE_UP", 4)
    assert (
        "no usable row among 4" in Steps(rows, spec, STAGE, Train(on_bad_row="skip"))[0].error
        and len(tried) == 4
    )


def test_cut_tokens_are_counted(folder, spec):
    rows = write(folder, [row(i, "Hi", "x" * (10 * i + 5), image=None) for i in range(4)])
    full = [len(make_sample(rows, i, spec).ids) for i in range(4)]
    spec = dataclasses.replace(spec, max_tokens=full[2] - 1)
    step = Steps(rows, spec, Stage(global_batch=4), Train())[0]
    assert sorted(step.cut) == [(2, 1), (3, full[3] - full[2] + 1)]


def test_validation_reads_every_row_once(many, some_bad, spec):
    train = Train(workers=0)
    for world in (1, 2, 3):
        found = [
            b.rows
            for r in range(world)
            for b in data.validation_batches(many, spec, STAGE, train, r, world)
        ]
        assert sorted(sum(found, [])) == list(range(37))
    batches = list(data.validation_batches(many, spec, STAGE, Train(workers=1)))
    assert [min(b.rows) // 8 for b in batches] == sorted(min(b.rows) // 8 for b in batches)
    assert all(len(b.input_ids) <= 200 for b in batches)
    # The last chunk of 17 rows by 16 has one row: the other rank has none, and does not fail.
    assert (
        sum(
            len(b.rows)
            for b in data.validation_batches(many, spec, Stage(global_batch=36), train, 1, 2)
        )
        == 18
    )


def test_validation_names_bad_rows(some_bad, spec):
    lines = []
    skip = Train(on_bad_row="skip", workers=0)
    rows = [
        r
        for b in data.validation_batches(some_bad, spec, STAGE, skip, log=lines.append)
        for r in b.rows
    ]
    assert sorted(rows) == sorted(set(range(16)) - {3, 4, 5, 11}) and len(lines) == 4
    with pytest.raises(UserError, match="row 3 "):
        list(data.validation_batches(some_bad, spec, STAGE, Train(workers=0)))


# ---- check


def run_check(capsys, *argv):
    """(printed lines, the final error or None)"""
    try:
        data.main(["check", *map(str, argv)])
        error = None
    except UserError as e:
        error = str(e)
    return capsys.readouterr().out.splitlines(), error


def test_check_names_every_bad_row_and_counts_the_rest(folder, capsys):
    good = [
        row("g1"),
        row("g2", "<image><image>", image=["a.png", "b.png"]),
        row("g3", "Hi", image=None),
        row("g4"),
    ]
    rows = write(folder, [bad for bad, _ in BAD.values()] + good)
    lines, error = run_check(capsys, "--data", rows.file, "--image-tokens", 7)
    for i, (_, what) in enumerate(BAD.values()):
        (line,) = [
            line
            for line in lines
            if line.startswith((f"{rows.file}:row {i} ", f"{rows.file}:row {i}:"))
        ]
        assert what in line and "; fix: " in line
    n = len(BAD)
    assert (
        error
        == f"{rows.file}: {n} of {n + 4} rows are bad; fix: mend or remove them, or set train.on_bad_row=skip"
    )
    good = "1 text-only, 2 with one image or video, 1 with several"
    assert f"{rows.file}: {n + 4} rows, {n} bad; the good ones: {good}" in lines
    assert (
        any("█" in line for line in lines)
        and "  over-long: 0 rows lose 0 tokens of their tails" in lines
    )


def test_check_takes_the_tokenizer_and_the_lengths_of_training(folder, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.save(folder / "tok")
    rows = write(
        folder, [row("x"), row("long", answer="y" * 300), row("z", "a" * 300 + "<image>"), row("w")]
    )
    args = [
        "--data",
        rows.file,
        "--tokenizer",
        folder / "tok",
        "--template",
        "plain",
        "--image-tokens",
        5,
    ]
    lines, error = run_check(capsys, *args, "--max-tokens", 100)
    spec = SampleSpec(tokenizer, "plain", 10**6, Tiling(5, transform=MeanColour()))
    length = [len(make_sample(rows, i, spec).ids) for i in range(4)]
    (note,) = [line for line in lines if "note: " in line]
    assert (
        f"row 1 (id long): note: over-long, loses {length[1] - 100} tokens" in note
        and "; fix: " in note
    )
    assert (
        f"  over-long: 2 rows lose {length[1] + length[2] - 200} tokens of their tails" not in lines
    )
    assert f"  tokens: {length[0]} shortest, " in "\n".join(
        lines
    ) and f"{length[1]} longest" in "\n".join(lines)
    assert "row 2 (id z)" in "\n".join(lines) and error and "1 of 4" in error
    lines, error = run_check(capsys, *args, "--max-tokens", 1000)
    targets = [int((make_sample(rows, i, spec).labels != IGNORE).sum()) for i in range(4)]
    assert (
        error is None
        and f"  supervised: {100 * sum(targets) / sum(length):.1f} % of {sum(length)} tokens"
        in lines
    )


def test_check_of_a_recipe_reads_every_stage(folder, capsys):
    byte_tokenizer().save(folder / "tok")
    write(folder, [row("x")], "one.json")
    write(folder, [row("y"), row("z", image="none.png")], "two.json")
    recipe = folder / "r.toml"
    recipe.write_text(
        f'model.tokenizer = "{folder}/tok"\nmodel.feature_select = "cls_patch"\n'
        'model.llm_config = {model_type = "llama"}\n'
        'model.vision_config = {model_type = "siglip_vision_model", image_size = 24, patch_size = 8}\n'
        f'[stage.a]\ndata = "{folder}/one.json"\n'
        f'[stage.b]\ntemplate = "phi"\ndata = "{folder}/one.json"\nvalidation = "{folder}/two.json"\n'
    )
    lines, error = run_check(capsys, recipe)
    assert [line for line in lines if line[:3] == "== "] == [
        "== stage a",
        "== stage b",
        "== stage b, validation",
    ]
    assert (
        error
        == f"{recipe}: 1 of 4 rows are bad; fix: mend or remove them, or set train.on_bad_row=skip"
    )
    assert sum("9 per image" in line for line in lines) == 3
    lines, error = run_check(
        capsys, recipe, f"stage.b.validation={folder}/one.json", "stage.a.max_tokens=14"
    )
    assert error is None and sum("note: over-long, loses 2 tokens" in line for line in lines) == 1
    for override, what in (
        ("stage.a.data=", f"{recipe}:stage.a.data: not set; fix: "),
        ("stage.b.data=none.json", "none.json: no such file or directory; fix: "),
        ("stage.b.template=nope", "template: 'nope' is unknown"),
        ("model.tokenizer=", "model.tokenizer: not set; fix: "),
        ("model.tokenizer=none", "no such folder; fix: "),
    ):
        lines, error = run_check(capsys, recipe, override)
        assert what in error and not lines


def test_inspect_shows_the_first_samples_of_training(folder, capsys):
    byte_tokenizer().save(folder / "tok")
    write(folder, [row(f"{i} <b>[[x]]") for i in range(5)], "rows.json")
    recipe, page = folder / "r.toml", folder / "page.html"
    recipe.write_text(
        f'model.tokenizer = "{folder}/tok"\nmodel.feature_select = "cls_patch"\ntrain.seed = 3\n'
        'model.llm_config = {model_type = "llama"}\n'
        'model.vision_config = {model_type = "siglip_vision_model", image_size = 24, patch_size = 8}\n'
        f'[stage.a]\ndata = "{folder}/rows.json"\ntemplate = "phi"\n'
    )
    data.main(["inspect", str(recipe), "--rows", "2", "--page", str(page)])
    lines, order = capsys.readouterr().out.splitlines(), Order(5, 3)
    shown = [line for line in lines if line.startswith("--- ")]
    assert [line.split("row ")[1][0] for line in shown] == [str(order(k)[1]) for k in (0, 1)]
    assert all("views: 1 of 24 x 24" in line for line in shown)
    html, first = page.read_text(), order(0)[1]
    assert (
        html.count('<img src="data:image/png;base64,') == 2 and html.count("<mark>") == 2 + 1
    )  # and the legend
    assert f"{first} &lt;b&gt;[[x]]" in html and chr(27) not in html


def test_the_command_line_ends_with_one_line(folder):
    write(folder, [row("x", image="none.png")])
    done = run("data.py", "check", "--data", folder / "rows.json", ok=False)
    assert done.returncode == 1 and "none.png: no such file" in done.stdout
    assert (
        done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
        and "; fix: " in done.stderr
    )
    with pytest.raises(SystemExit, match="error: command line: .*; fix: see python .* --help"):
        data.main(["chekc"])
    with pytest.raises(SystemExit, match="command line: name a recipe, or rows with --data"):
        data.main(["check"])


def test_check_reports_each_unreadable_asset_in_one_line(tmp_path, capsys):
    images = shared("assets/images")
    files = json.loads((images / "golden_decode.json").read_text())["files"]
    (tmp_path / "rows.json").write_text(json.dumps([row(name, image=name) for name in files]))
    lines, error = run_check(capsys, "--data", tmp_path / "rows.json", "--images", images)
    named = [line.partition("(id ")[2].partition(")")[0] for line in lines if "; fix: " in line]
    assert sorted(named) == sorted(name for name, golden in files.items() if "error" in golden)
    assert f"{len(named)} of {len(files)} rows are bad" in error


def test_the_sample_rows_make_samples(capsys):
    assets = shared("assets")
    file, tokenizer = (
        assets / "conversations/llava_format_samples.json",
        assets / "tokenizers/microsoft--phi-2",
    )
    lines, error = run_check(capsys, "--data", file, "--images", assets, "--tokenizer", tokenizer)
    missing = [line for line in lines if "no such file or directory; fix: " in line]
    assert len(missing) == 14 and "14 of 22 rows are bad" in error
    assert (
        f"{file}: 22 rows, 14 bad; the good ones: 4 text-only, 4 with one image or video, 0 with several"
        in lines
    )
    rows = open_rows(file, assets)
    spec = make_spec(
        str(tokenizer), "phi", max_tokens=2048, views=Tiling(3, transform=MeanColour())
    )
    samples = [make_sample(rows, i, spec) for i in range(14, 22)]
    assert [len(s.items) for s in samples] == [0] * 4 + [1] * 4
    text = spec.tokenizer.decode(samples[4].labels[samples[4].labels != IGNORE].tolist())
    assert text.strip() == "B" and pack_samples(samples).images.shape == (4, 3, 2, 2)
