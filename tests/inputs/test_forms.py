"""forms.py: rows of every form make the sample of the LLaVA row that says the same."""

import base64
import json
import shutil

import pytest
import torch
from PIL import Image

import data
from config import UserError
from inputs.forms import CAPTION_PROMPT, read_row
from inputs.rows import open_rows
from inputs.turns import MARKS_FIRST
from tests.tools.environment import shared
from tests.tools.sample_rows import make_sample, mean_colour_spec, row, turns, write


@pytest.fixture(scope="module")
def spec():
    return mean_colour_spec()


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (40, 50, 60)).save(tmp_path / "b.png")
    return tmp_path


def llava(*texts, **values):
    """Return a row in LLaVA's own form."""
    return {**values, "conversations": turns(*texts)}


def assert_same(sample, expected):
    """Assert that two samples are equal in all that the model sees."""
    assert torch.equal(sample.ids, expected.ids)
    assert torch.equal(sample.labels, expected.labels)
    assert len(sample.items) == len(expected.items)
    for item, other in zip(sample.items, expected.items, strict=True):
        assert torch.equal(item.pixels, other.pixels) and item.shape == other.shape


def text_part(text):
    return {"type": "text", "text": text}


def message(role, content):
    return {"role": role, "content": content}


ONE = llava("<image>\nColour?", "red", image="a.png")
TWO = llava("<image>\n<image>\nSame?", "no", image=["a.png", "b.png"])
TEXT = llava("Colour?", "red")
MORE = llava("<image>\nColour?", "red", "Sure?", "yes", image="a.png")
CAPTION = llava(f"<image>\n{CAPTION_PROMPT}", "red", image="a.png")
ASKED = [message("user", "<image>Colour?"), message("assistant", "red")]
UNMARKED = turns("Colour?", "red")

# name: (a raw row, the LLaVA row that says the same)
FORMS = {
    "roles under conversations": ({"image": "a.png", "conversations": ASKED}, ONE),
    "messages": ({"images": ["a.png"], "messages": ASKED}, ONE),
    "messages, one image": ({"image": "a.png", "messages": ASKED}, ONE),
    "conversation": ({"image": "a.png", "conversation": turns("<image>Colour?", "red")}, ONE),
    "user and assistant": (
        {
            "image": "a.png",
            "conversations": [
                {"from": "User", "value": "<image>Colour?"},
                {"from": " ASSISTANT", "value": "red"},
            ],
        },
        ONE,
    ),
    "no mark": ({"image": "a.png", "conversations": UNMARKED}, ONE),
    "no mark, images": ({"Images": ["a.png"], "conversations": UNMARKED}, ONE),
    "no mark, two images": (
        {"images": ["a.png", "b.png"], "conversations": turns("Same?", "no")},
        TWO,
    ),
    "no mark, a system turn": (
        {"image": "a.png", "messages": [message("system", "Be brief."), *UNMARKED]},
        {
            "image": "a.png",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                *turns("<image>\nColour?", "red"),
            ],
        },
    ),
    "the same pictures twice": (
        {"image": "a.png", "images": ["a.png"], "conversations": UNMARKED},
        ONE,
    ),
    "nulls": (
        {"id": None, "image": None, "images": [], "video": "", "conversations": UNMARKED},
        TEXT,
    ),
    "structs of nulls": (
        {"images": [{"bytes": None, "path": None}], "conversations": UNMARKED},
        TEXT,
    ),
    "a null among pictures": ({"images": ["a.png", None], "conversations": UNMARKED}, ONE),
    "NaN, as pandas writes null": (
        {"image": float("nan"), "conversations": UNMARKED},
        TEXT,
    ),
    "a struct": ({"image": {"bytes": None, "path": "a.png"}, "conversations": UNMARKED}, ONE),
    "merged turns": (
        {
            "image": "a.png",
            "messages": [
                {"role": "user", "content": "<image>Colour?", "from": None, "value": None},
                {"role": None, "content": "", "from": "gpt", "value": "red"},
            ],
        },
        ONE,
    ),
    "parts with their pictures": (
        {
            "messages": [
                message(
                    "user",
                    [{"type": "image_url", "image_url": {"url": "a.png"}}, text_part("Colour?")],
                ),
                message("assistant", [text_part("red")]),
            ]
        },
        ONE,
    ),
    "parts and a list": (
        {
            "images": ["a.png", "b.png"],
            "messages": [
                message("user", [{"type": "image"}, {"type": "image"}, text_part("Same?")]),
                message("assistant", "no"),
            ],
        },
        TWO,
    ),
    "parts of merged structs": (
        {
            "images": ["a.png"],
            "messages": [
                message(
                    "user",
                    [
                        {"type": "image", "text": None, "index": 0},
                        {"type": "text", "text": "Colour?", "index": None},
                    ],
                ),
                message("assistant", [{"type": "text", "text": "red", "index": None}]),
            ],
        },
        ONE,
    ),
    "a part's own path": (
        {
            "messages": [
                message("user", [{"type": "image", "image": "a.png"}, "Colour?"]),
                message("assistant", "red"),
            ]
        },
        ONE,
    ),
    "texts": (
        {
            "images": ["a.png"],
            "texts": [
                {"user": "Colour?", "assistant": "red", "source": "x"},
                {"user": "Sure?", "assistant": "yes"},
            ],
        },
        MORE,
    ),
    "question and answer": ({"image": "a.png", "question": "Colour?", "answer": "red"}, ONE),
    "a number": (
        {"image": "a.png", "question": "How many?", "answer": 3},
        llava("<image>\nHow many?", "3", image="a.png"),
    ),
    "the most frequent answer": (
        {"image": "a.png", "question": "Colour?", "answers": ["pink", "red", "", "red"]},
        ONE,
    ),
    "of equally frequent ones the first": (
        {"image": "a.png", "question": "Colour?", "answers": ["red", "pink"]},
        ONE,
    ),
    "VQA's answers": (
        {
            "image": "a.png",
            "question": "Colour?",
            "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": 1}],
        },
        ONE,
    ),
    "options that are asked for": (
        {
            "image": "a.png",
            "question": "A. red B. blue?",
            "options": ["red", "blue"],
            "answer": "A",
        },
        llava("<image>\nA. red B. blue?", "A", image="a.png"),
    ),
    "caption": ({"image": "a.png", "caption": "red"}, CAPTION),
    "text": ({"file_name": "a.png", "text": "red"}, CAPTION),
    "captions": ({"image": "a.png", "caption": ["red", "a red thing"]}, CAPTION),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_makes_the_sample_of_the_llava_row_that_says_the_same(folder, spec, name):
    raw, expected = FORMS[name]
    rows = write(folder, [raw, expected])
    assert_same(make_sample(rows, 0, spec), make_sample(rows, 1, spec))
    for key, value in raw.items():
        if key in ("width", "source"):
            assert rows[0][key] == value


def test_bytes_and_data_urls_are_the_files_they_hold(folder, spec):
    content = (folder / "a.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    rows = write(folder, [ONE, ONE | {"image": url}])
    expected = make_sample(rows, 0, spec)
    assert_same(make_sample(rows, 1, spec), expected)
    parts = [{"type": "image_url", "image_url": {"url": url}}, text_part("Colour?")]
    rows = write(folder, [{"messages": [message("user", parts), message("assistant", "red")]}])
    assert_same(make_sample(rows, 0, spec), expected)

    # JSON has no bytes, other containers do.
    for value in (content, [content], {"bytes": content, "path": None}, [{"bytes": content}]):
        made = read_row({"image": value, "question": "Colour?", "answer": "red"}, "here")
        assert made.sources == [content] and made["image"] == "image"
    named = read_row({"image": {"bytes": b"", "path": "x.png"}, "text": "red"}, "here")
    assert named["image"] == "x.png" and named.sources == [None]
    named = read_row({"image": {"bytes": content, "path": "x.png"}, "text": "red"}, "here")
    assert named["image"] == "x.png" and named.sources == [content]


@pytest.mark.parametrize("mark", ["<video>", "<image>", ""])
@pytest.mark.parametrize("key, value", [("video", "a.mp4"), ("videos", ["a.mp4"])])
def test_a_video_stands_at_its_mark(mark, key, value):
    made = read_row({key: value, "messages": turns(f"{mark}Why?", "So.")}, "here")
    text = made["conversations"][0]["value"]
    assert text == ("<image>Why?" if mark else "<image>\nWhy?") and made["video"] == "a.mp4"
    assert (MARKS_FIRST in made.notes) == (not mark)


def test_a_video_s_mark_is_a_text_where_there_is_no_video():
    made = read_row(
        {"image": "a.png", "conversations": turns("<image>What is <video>?", "A tag.")}, ""
    )
    assert made["conversations"][0]["value"] == "<image>What is <video>?" and len(made.notes) == 1
    made = read_row({"conversations": turns("What is <video>?", "A tag.")}, "here")
    assert made["conversations"] == turns("What is <video>?", "A tag.")
    assert made.notes[1] == "<video> in a row without a video, which is a text"


def test_a_row_keeps_what_else_it_has_and_all_its_answers():
    raw = {"image": "a.png", "question": "q", "answers": [{"answer": "x"}, {"answer": "y"}], "w": 3}
    made = read_row(raw, "here")
    assert made["w"] == 3 and made.unread == ("w",) and made["answers"] == ["x", "y"]
    assert made.notes[1:] == ("several answers, the most frequent is trained",)
    made = read_row({"image": "a.png", "caption": ["x", "y", "z"]}, "here")
    assert made.notes[1:] == ("3 captions, the first is trained",)
    assert made["answers"] == ["x", "y", "z"]


def test_columns_map_what_has_other_names(folder, spec):
    raw = {"photo": "a.png", "q": "Colour?", "a": "red", "image": "none.png", "caption": "no"}
    columns = {"image": "photo", "question": "q", "answer": "a"}
    expected = make_sample(write(folder, [ONE]), 0, spec)
    write(folder, [raw])
    rows = open_rows(folder / "rows.json", columns=columns)
    assert_same(make_sample(rows, 0, spec), expected)
    assert rows[0].notes == ("read as question = q, answer = a, image = photo",)

    # What is mapped is looked for nowhere else.
    write(folder, [raw | {"video": "a.mp4"}])
    rows = open_rows(folder / "rows.json", columns=columns)
    assert_same(make_sample(rows, 0, spec), expected)
    write(folder, [raw | {"photo": None}, raw])
    rows = open_rows(folder / "rows.json", columns=columns)
    assert make_sample(rows, 0, spec).items == []
    write(folder, [raw | {"a": ""} | llava("x", "y"), raw])
    rows = open_rows(folder / "rows.json", columns=columns)
    with pytest.raises(UserError, match="row 0: conversations: missing, the row has a, caption"):
        make_sample(rows, 0, spec)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"picture": "x"}, "columns.picture: unknown part; fix: one of: id, image, "),
        ({"image": 3}, "columns.image: 3 is no key; fix: write it in quotes"),
        (
            {"image": "x", "answer": "A"},
            "columns.image: no row .* anything under 'x'; fix: name a key of the rows: image, ans",
        ),
    ],
)
def test_columns_that_map_nothing_are_an_error(folder, columns, message):
    write(folder, [{"image": "a.png", "question": "q", "answer": "a", "A": "b"}] * 3)
    with pytest.raises(UserError, match=message):
        open_rows(folder / "rows.json", columns=columns)


QUESTION = {"question": "q", "answer": "a"}
PICTURED = {"image": "a.png", **QUESTION}

# name: (a raw row, what the message says)
WRONG = {
    "no known form": (
        {"file": "x", "words": "y"},
        "the row has file, id, words; fix: .* with columns",
    ),
    "no answer": (
        {"image": "a.png", "question": "q"},
        "the row has id, image, question; fix: write its answer",
    ),
    "no picture": ({"text": "y"}, "the row has id, text; fix: name its picture under"),
    "no question": (
        {"image": "a.png", "answer": "y"},
        "answer, id, image; fix: write its question",
    ),
    "other pictures": (
        PICTURED | {"images": ["b.png"]},
        "pictures under 'image' and 'images', and not the same ones; fix: name the key",
    ),
    "an unread file": (
        QUESTION | {"photo": "a.PNG"},
        "nothing reads the image under 'photo'; fix: .* columns = {image = \"photo\"}",
    ),
    "an unread film": (QUESTION | {"clip": "a.mp4"}, 'columns = {video = "clip"}'),
    "unread files": (
        QUESTION | {"photos": ["a.jpeg", "b.jpeg"]},
        "nothing reads the image under 'photos'",
    ),
    "an unread struct": (
        QUESTION | {"photo": {"path": "a.webp"}},
        "nothing reads the image under 'photo'",
    ),
    "an unread URL": (
        PICTURED | {"photo": "data:image/png;base64,AA"},
        "nothing reads the image under 'photo'",
    ),
    "a picture in an object": (
        QUESTION | {"input": {"pictures": [{"file": {"path": "a.png"}}]}},
        "nothing reads the image under 'input'",
    ),
    "a picture of a turn": (
        {"messages": [message("user", "q") | {"images": ["a.png"]}, message("assistant", "a")]},
        r"messages\[0\]: nothing reads the image under 'images'; fix: name it under",
    ),
    "a picture of a pair": (
        {"texts": [{"user": "q", "assistant": "a", "image": "a.png"}]},
        r"texts\[0\]: nothing reads the image under 'image'",
    ),
    "a picture in a text": (
        {"messages": [message("user", [text_part("q") | {"image": "a.png"}])]},
        r"messages\[0\]: part 0: nothing reads the image under 'image'",
    ),
    "a mark too many": (
        {
            "images": ["a.png"],
            "messages": [message("user", "<image><image>"), message("assistant", "a")],
        },
        "2 <image> in what the humans say but 1 images in the row",
    ),
    "a mark in an answer": (
        {"image": "a.png", "conversations": turns("q", "<image> a")},
        "0 <image> in what the humans say but 1 images in the row",
    ),
    "a part too many": (
        {
            "images": [],
            "messages": [message("user", [{"type": "image"}]), message("assistant", "a")],
        },
        "1 <image> in what the humans say but 0 images in the row",
    ),
    "pictures in two places": (
        {
            "images": ["b.png"],
            "messages": [
                message("user", [{"type": "image", "image": "a.png"}]),
                message("assistant", "a"),
            ],
        },
        "pictures among the parts of a turn, and others under 'images'; fix",
    ),
    "a part of another type": (
        {"messages": [message("user", [{"type": "audio", "audio": "a.wav"}])]},
        r"messages\[0\]: part 0: a part of type 'audio'; fix: write text, image",
    ),
    "a part of another source": (
        {"messages": [message("user", [{"type": "image", "source": {"data": "x"}}])]},
        r"part 0: no image, it has source; fix: write",
    ),
    "a part without a text": (
        {"messages": [message("user", [{"type": "text", "value": "q"}])]},
        r"part 0: no text, it has value; fix: write",
    ),
    "no part": ({"messages": [message("user", [3])]}, r"messages\[0\]: part 0: 3 is no part; fix"),
    "a turn of other words": (
        {"messages": [{"role": "user", "text": "q"}]},
        r"messages\[0\]: not a speaker and a text, it has role, text; fix",
    ),
    "a call of a tool": (
        {
            "messages": [
                message("user", "q"),
                message("assistant", None) | {"tool_calls": [{"a": 1}]},
            ]
        },
        r"messages\[1\]: not a speaker and a text, it has content, role, tool_calls; fix",
    ),
    "another role": (
        {"messages": [message("tool", "q")]},
        r"messages\[0\]: from 'tool', 'human' was due",
    ),
    "two questions": (
        {"messages": [*ASKED[:1], *ASKED]},
        r"messages\[1\]: from 'human', 'gpt' was due",
    ),
    "no list": ({"messages": "Hi"}, "messages: empty, or not a list"),
    "no pair": ({"image": "a.png", "texts": ["q"]}, r"texts\[0\]: 'q' has no user and assistant"),
    "half a pair": (
        {"image": "a.png", "texts": [{"user": "q", "assistant": ""}]},
        r"texts\[0\]: .* has no user and assistant; fix",
    ),
    "no name": ({"image": 3, **QUESTION}, "image: 3 is no image; fix: write a file name"),
    "an object without a name": (
        {"image": {"x": "a.png"}, **QUESTION},
        "image: .* is no image; fix",
    ),
    "a list too deep": ({"image": [["a.png"]], **QUESTION}, "image: .'a.png'. is no image; fix"),
    "no text": ({"image": "a.png", "question": ["q"], "answer": "a"}, "question: .'q'. is no text"),
    "no truth value": (
        {"image": "a.png", "question": "q", "answer": True},
        "answer: True is no text",
    ),
    "infinity": (
        {"image": "a.png", "question": "q", "answer": float("inf")},
        "answer: inf is no text",
    ),
    "answers of another kind": (
        {"image": "a.png", "question": "q", "answers": [{"x": "a"}]},
        "answers: .* has no answer; fix",
    ),
    "the number of an option": (
        PICTURED | {"answer": 1, "options": ["red", "blue"]},
        "answer: 1 stands for one of options; fix: write the option's text",
    ),
    "the letter of a choice": (
        PICTURED | {"answer": "B", "Choices": ["red", "blue"]},
        "answer: 'B' stands for one of Choices; fix",
    ),
    "an image and a video": (PICTURED | {"video": "a.mp4"}, "an image and a video in one row"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_row_is_one_line_with_file_row_key_and_fix(folder, spec, name):
    raw, what = WRONG[name]
    rows = write(folder, [{"id": "x", **raw}])
    with pytest.raises(UserError, match=what) as e:
        make_sample(rows, 0, spec)
    assert str(e.value).startswith(f"{folder}/rows.json:row 0 (id x): ")
    assert "; fix: " in str(e.value) and "\n" not in str(e.value)


def test_one_of_two_values_of_a_key_is_not_lost_in_silence(folder, spec):
    twice = '{"id": 1, "image": "a.png", "image": null, "question": "q", "answer": "a"}'
    (folder / "rows.jsonl").write_text(twice)
    with pytest.raises(UserError, match=r"rows.jsonl:line 1: .*two values under 'image'; fix: "):
        open_rows(folder / "rows.jsonl")[0]
    (folder / "rows.jsonl").write_text(twice.replace("null", '"a.png"'))
    assert len(make_sample(open_rows(folder / "rows.jsonl"), 0, spec).items) == 1


def test_a_number_of_any_length_is_an_answer(folder):
    assert (
        read_row(QUESTION | {"answer": 10**400}, "here")["conversations"][1]["value"]
        == "1" + 400 * "0"
    )


def test_the_same_bytes_under_two_keys_are_one_picture():
    row = read_row(QUESTION | {"image": b"x", "Image": b"x"}, "here")
    assert row["image"] == "image" and row.sources == [b"x"]


def test_unread_bytes_are_an_error_unless_columns_say_which_are_meant(folder):
    raw = {"image": "a.png", "question": "q", "answer": "a", "small": {"bytes": b"x", "path": None}}
    with pytest.raises(UserError, match="here: nothing reads the image under 'small'"):
        read_row(raw, "here")
    assert read_row(raw, "here", {"image": "image"})["image"] == "a.png"


@pytest.mark.parametrize(
    "raw, what",
    [
        (QUESTION | {"photo": b"x"}, "nothing reads the image under 'photo'"),
        (PICTURED | {"photo": {"bytes": b"x", "path": "b.png"}}, "the image under 'photo'"),
        (QUESTION | {"photos": ["b.png"]}, "nothing reads the image under 'photos'"),
        (PICTURED | {"answer": 1, "options": ["x", "y"]}, "1 stands for one of options"),
    ],
)
def test_columns_of_parquet_that_are_not_read_hide_nothing(folder, spec, raw, what):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([raw]), folder / "rows.parquet")
    with pytest.raises(UserError, match=f"rows.parquet:row 0: .*{what}"):
        make_sample(open_rows(folder / "rows.parquet"), 0, spec)


def test_pictures_in_a_map_of_parquet_hide_nothing(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    maps = pyarrow.map_(pyarrow.string(), pyarrow.binary())
    columns = {
        "shown": pyarrow.array([[("first", b"x")]], maps),
        "question": ["q"],
        "answer": ["a"],
    }
    parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")
    with pytest.raises(UserError, match="row 0: nothing reads the image under 'shown'"):
        open_rows(folder / "rows.parquet")[0]


# ---- what check says


def test_check_says_how_rows_were_read_and_which_keys_are_not(folder, capsys):
    gpt_first = turns("", "Hello.")[1:] + turns("Colour?", "red")
    write(
        folder,
        [
            llava("Colour?", "red", image="a.png", width=3),
            llava("Colour?", "red", images=["a.png"], license="free", width=4),
            {"messages": ASKED, "images": ["a.png"], "width": None},
            {"messages": ASKED, "images": ["a.png"]},
            {"conversations": gpt_first},
        ],
    )
    data.main(["check", "--data", str(folder / "rows.json")])
    lines = capsys.readouterr().out.splitlines()
    file = f"{folder}/rows.json"
    first = next(i for i, line in enumerate(lines) if "5 rows, 0 bad" in line)
    assert lines[first + 1 : first + 7] == [
        "  2 rows: read as conversations",
        "  2 rows: read as conversations = messages, image = images",
        "  1 row: read as conversations, image = images",
        f"  2 rows: no <image> mark, pictures stand first (first: {file}:row 0)",
        f"  1 row: an answer before the first question, left out (first: {file}:row 4)",
        "  not read: width, license",
    ]


def test_check_says_one_thing_more_of_llava_rows(folder, capsys):
    write(folder, [row("x"), row("y", "Hi", image=None), {"video": None, **row("z")}])
    data.main(["check", "--data", str(folder / "rows.json")])
    lines = capsys.readouterr().out.splitlines()
    assert "  3 rows: read as conversations" in lines and "not read" not in str(lines)
    assert sum(": read" in line or "(first" in line for line in lines) == 1


# ---- rows of others


def open_with_pictures(folder, names):
    """Open a case of cases/formats beside the pictures that its rows name."""
    photos = folder / "photos"
    photos.mkdir()
    for path in shared("assets/images").rglob("*"):
        if path.is_file():
            (photos / path.name).symlink_to(path)
    for name in names:
        shutil.copy(shared("cases/formats") / name, folder / name)


def test_cases_of_other_forms_are_read_as_their_llava_rows(folder, spec):
    """Rows of the same forty pictures: ids and labels of all, pixels of some."""
    open_with_pictures(
        folder, ("cauldron.json", "messages_lf.json", "messages_openai.jsonl", "metadata.jsonl")
    )
    cauldron = json.loads((folder / "cauldron.json").read_text())
    asked = []
    captioned = []
    for raw in cauldron:
        image, (pair,) = raw["images"][0], raw["texts"]
        asked.append(llava(f"<image>\n{pair['user']}", pair["assistant"], image=image))
        text = pair["assistant"]
        captioned.append(llava(f"<image>\n{CAPTION_PROMPT}", text, image=image))

    assert len(asked) == 40
    asked = write(folder, asked, "asked.json")
    captioned = write(folder, captioned, "captioned.json")
    expected = [make_sample(asked, i, spec, pixels=i % 8 == 0) for i in range(40)]
    for name in ("cauldron.json", "messages_lf.json", "messages_openai.jsonl"):
        rows = open_rows(folder / name)
        for i in range(40):
            assert_same(make_sample(rows, i, spec, pixels=i % 8 == 0), expected[i])
            assert rows.media(i, rows[i]) == asked.media(i, asked[i])

    rows = open_rows(folder / "metadata.jsonl", folder / "photos")
    for i in range(40):
        sample = make_sample(rows, i, spec, pixels=False)
        assert_same(sample, make_sample(captioned, i, spec, pixels=False))
        assert rows.media(i, rows[i])[0].source == captioned.media(i, captioned[i])[0].source


def test_cases_of_roles_and_of_pictures_under_other_keys(spec):
    rows = open_rows(shared("cases/roles/rows.json"))
    expected = make_sample(rows, 0, spec)
    assert len(expected.items) == 1
    for i in range(len(rows)):
        assert_same(make_sample(rows, i, spec), expected)
    ignored = open_rows(shared("cases/images_key_ignored/rows.json"))
    assert_same(make_sample(ignored, 0, spec), expected)
    assert MARKS_FIRST in ignored[0].notes

    # A greeting before the first question is left out, as TinyLLaVA does, and that is said.
    for case in ("starts_with_gpt/rows.json", "answers_row/gpt.json"):
        rows = open_rows(shared(f"cases/{case}"))
        assert_same(make_sample(rows, 0, spec), expected)
        assert rows[0].notes[1:] == ("an answer before the first question, left out",)
    for i in (1, 2, 3):
        with pytest.raises(UserError, match=rf"row {i} \(id {i + 1}\): conversations\["):
            make_sample(open_rows(shared("cases/starts_with_gpt/rows.json")), i, spec)


@pytest.mark.parametrize("name", ["mllm_demo", "mllm_video_demo"])
def test_the_rows_of_llamafactory(folder, spec, name):
    """Their pictures are not at hand: in square mode none is opened to count tokens."""
    file = shared(f"assets/conversations/llamafactory/{name}.json")
    speakers = {"user": "human", "assistant": "gpt"}
    written = []
    for raw in json.loads(file.read_text()):
        conversation = []
        for turn in raw["messages"]:
            text = turn["content"].replace("<video>", "<image>")
            conversation.append({"from": speakers[turn["role"]], "value": text})
        kind = "video" if "videos" in raw else "image"
        written.append({kind: raw[f"{kind}s"], "conversations": conversation})
    expected = write(folder, written)
    rows = open_rows(file, folder)
    for i in range(len(expected)):
        sample = make_sample(rows, i, spec, pixels=False)
        assert_same(sample, make_sample(expected, i, spec, pixels=False))
        assert len(sample.items) >= 1
