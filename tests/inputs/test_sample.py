"""sample.py: ids, labels and items of a row; what is cut; and what makes no sample."""

import dataclasses
import re

import pytest
import torch
from PIL import Image

from config import UserError
from inputs.sample import load_items
from packing import IGNORE, IMAGE_TOKEN
from tests.tools.sample_rows import BAD, make_sample, mean_colour_spec, row, write


@pytest.fixture(scope="module")
def spec():
    return mean_colour_spec()


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (40, 50, 60)).save(tmp_path / "b.png")
    return tmp_path


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


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_line_with_file_row_id_what_and_fix(folder, spec, name):
    bad, what = BAD[name]
    rows = write(folder, [row("good"), bad])
    with pytest.raises(UserError) as e:
        make_sample(rows, 1, spec)
    where = f"{folder}/rows.json:row 1" + (f" (id {bad['id']})" if isinstance(bad, dict) else "")
    assert str(e.value).startswith(where + ": ") and what in str(e.value)
    assert str(e.value).partition("; fix: ")[2] and "\n" not in str(e.value)


def test_counting_measures_what_training_loads(folder, spec):
    rows = write(folder, [row("two", "<image> and <image>?", image=["b.png", "a.png"])])
    whole = make_sample(rows, 0, spec)
    measured = make_sample(rows, 0, spec, pixels=False)
    assert torch.equal(measured.ids, whole.ids) and torch.equal(measured.labels, whole.labels)
    assert [item.shape for item in measured.items] == [item.shape for item in whole.items]
    loaded = load_items(rows, 0, spec)
    for item, expected in zip(loaded, whole.items, strict=True):
        assert torch.equal(item.pixels, expected.pixels) and item.shape == expected.shape


# ---- messages that name what to do


def test_the_form_of_a_row_is_told_where_another_one_is_given(folder, spec):
    """What no form is: none of it is silently nothing."""
    role = {"role": "user", "content": "Hi"}
    form = re.escape('fix: write turns as {"from": "human", "value": "..."}, {"from": "gpt", ')
    row_form = re.escape('fix: write a row as {"image": "a.jpg", "conversations": [{"from": "hum')
    cases = [
        ({"conversations": [role]}, "conversations.0.: wrong last turn; fix: end with a gpt turn"),
        ({"conversations": [{"from": "bot", "value": "Hi"}]}, f"from 'bot', .*{form}"),
        ({"messages": role}, "messages: empty, or not a list; fix: give a human turn"),
        ({"file_name": "a.png", "words": "b"}, f"the row has file_name, words; {row_form}"),
        ({"conversation": []}, f"the row has conversation; {row_form}"),
        (
            {"conversations": [{"from": "gpt", "value": "Yo"}]},
            "conversations.0.: an answer without a question, .*; fix: write the question",
        ),
        ({"conversations": [{"from": "system", "value": "Yo"}]}, "wrong last turn; fix: end with"),
    ]
    rows = write(folder, [given for given, _ in cases])
    for i, (_, what) in enumerate(cases):
        with pytest.raises(UserError, match=f"row {i}: .*{what}"):
            make_sample(rows, i, spec)


@pytest.mark.parametrize(
    "name, fix",
    [
        ("http://a.org/a.png", "download it, and write the file's name into the row"),
        ("data:image/png;base64,iVBORw0KGgo=", "write the file itself to the folder"),
        ("data:image/png;base64," + "A" * 10_000, "write the file itself to the folder"),
        ("data:image/png,iVBORw0KGgo=", "write the file itself to the folder"),
        ("sub\\a.png", "write / between folders and file"),
        ("e\u0301.png", "write the name in Unicode's form NFC"),
        ("none.png", "fetch the image again, or remove the row"),
    ],
)
def test_a_name_without_a_file_gets_a_hint(folder, spec, name, fix):
    (folder / "\u00e9.png").write_bytes((folder / "a.png").read_bytes())
    with pytest.raises(UserError) as e:
        make_sample(write(folder, [row("x", image=name)]), 0, spec)
    assert f"; fix: {fix}" in str(e.value) and len(str(e.value)) < 1000
