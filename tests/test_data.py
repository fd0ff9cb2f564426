"""data.py: packing, the order, steps over ranks and workers."""

import dataclasses
import multiprocessing
import resource

import pytest
import torch
from PIL import Image

import data
from config import Stage, Train, UserError
from data import Order, Steps, loader
from inputs.sample import Sample
from packing import IGNORE, Batch, Item
from tests.tools.sample_rows import (
    flat,
    make_sample,
    mean_colour_spec,
    row,
    rows_of,
    write,
)


@pytest.fixture(scope="module")
def spec():
    return mean_colour_spec()


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (40, 50, 60)).save(tmp_path / "b.png")
    return tmp_path


# ---- packing


def sample(length, i=0, images=0):
    ids = torch.arange(length) + 100 * i
    labels = torch.where(torch.arange(length) % 2 == 0, IGNORE, ids)
    return Sample(ids, labels, [Item(torch.full((1, 3, 2, 2), float(i)))] * images, i, 0)


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
    monkeypatch.setattr(
        data, "make_samples", lambda *args: tried.append(args) or [make_sample(*args)]
    )
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
    cut = {reading.row: reading.cut for reading in step.readings}
    assert cut == {0: 0, 1: 0, 2: 1, 3: full[3] - full[2] + 1} and step.cut == cut[2] + cut[3]


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


def test_the_batches_of_a_step_are_cut_once(many, spec, monkeypatch):
    """Every use of them would else cut all of them: quadratic in a loop over them."""
    step = Steps(many, spec, dataclasses.replace(STAGE, micro_batch_tokens=0), Train())[0]
    cut = []
    part = Batch.part
    monkeypatch.setattr(Batch, "part", lambda *args: cut.append(1) or part(*args))
    assert len(step.batches) == 8 and step.batches[0] is step.batches[0]
    assert len(cut) == 8


@pytest.mark.parametrize("pin", [True, False])
def test_validation_pins_memory_if_asked(many, spec, monkeypatch, pin):
    asked = []
    load = data.loader
    monkeypatch.setattr(
        data, "loader", lambda *args, **more: asked.append(more.pop("pin_memory")) or load(*args)
    )
    train = Train(workers=0)
    assert list(data.validation_batches(many, spec, STAGE, train, pin_memory=pin))
    assert asked == [pin]
