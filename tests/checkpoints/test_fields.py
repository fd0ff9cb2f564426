"""Files from outside are read with a kind and a range for each field; the errors name the field."""

import pytest

from checkpoints.fields import Fields
from checkpoints.files import parse_json
from config import UserError, printable

GETTERS = {
    "integer": lambda fields: fields.integer("key", 1, 2**20),
    "number": lambda fields: fields.number("key", 0.0, 1.0),
    "flag": lambda fields: fields.flag("key"),
    "text": lambda fields: fields.text("key", ("a", "b")),
    "list": lambda fields: fields.list("key", int),
    "table": lambda fields: fields.table("key"),
}
GOOD = {"integer": 7, "number": 0.5, "flag": True, "text": "a", "list": [1, 2]}
ODD = [
    "",
    "7",
    None,
    [],
    [True],
    ["x"],
    {},
    {"a": 1},
    0,
    -1,
    2**40,
    1e300,
    float("nan"),
    float("inf"),
    True,
    "c",
]
TAKES = {  # the odd values that a getter may take
    "integer": [],
    "number": [0],
    "flag": [True],
    "text": [],
    "list": [[]],
    "table": [{}, {"a": 1}],
}


@pytest.mark.parametrize("getter", GETTERS)
def test_odd_values_are_refused_with_file_and_key(getter):
    """A value of another kind or outside of the range is a UserError that names file and key."""
    for value in ODD:
        fields = Fields({"key": value}, "config.json", "outer")
        allowed = any(type(value) is type(good) and value == good for good in TAKES[getter])
        if allowed:
            GETTERS[getter](fields)
            continue
        with pytest.raises(UserError, match=r"^config\.json:outer\.key: .*; fix: "):
            GETTERS[getter](fields)


@pytest.mark.parametrize("getter", GOOD)
def test_good_values_pass(getter):
    """A value of the kind and in the range comes out as it went in."""
    assert GETTERS[getter](Fields({"key": GOOD[getter]}, "config.json")) == GOOD[getter]


def test_defaults():
    """An absent field and null give the default; a whole float is a whole number."""
    fields = Fields({"null": None, "float": 4096.0}, "config.json")
    assert fields.integer("absent", 1, 9, default=3) == 3
    assert fields.text("null", default="x") == "x"
    assert fields.integer("float", 1, 2**20) == 4096
    assert fields.table("absent", optional=True).values == {}


def test_lists_of_numbers():
    """Each element has a kind and a range; the message names its place."""
    fields = Fields({"mean": [0, 0.5], "sizes": [1, 2.0], "odd": [1, float("nan")]}, "a.json")
    assert fields.numbers("mean", 0.0, 1.0) == [0.0, 0.5]
    assert fields.integers("sizes", 1, 9) == [1, 2]
    with pytest.raises(UserError, match=r"^a\.json:odd\.1: nan is not a number from 0 to 9; fix: "):
        fields.numbers("odd", 0.0, 9.0)
    with pytest.raises(UserError, match=r"^a\.json:sizes\.1: 2.0 is not a whole number"):
        fields.integers("sizes", 1, 1)
    for values in ([None], "12", 3, {"0": 1}, [1] * 600, [True]):
        with pytest.raises(UserError, match=r"^a\.json:sizes"):
            Fields({"sizes": values}, "a.json").integers("sizes", 0, 9)


def test_half_a_surrogate_pair_is_no_text():
    """JSON may hold "\\ud83d", which no file can."""
    fields = Fields({"key": "a\ud83d", "list": ["a", "\ud83d"]}, "config.json")
    for read in (lambda: fields.text("key"), lambda: fields.list("list", str)):
        with pytest.raises(UserError, match="not Unicode"):
            read()


def test_values_that_cannot_be_shown():
    """A whole number that no float holds, and a list as deep as a reader takes it."""
    deep = parse_json("[" * 900 + "]" * 900)
    for value in (10**400, -(10**400), deep):
        with pytest.raises(UserError, match=r"^a\.json:key: .* is not a number"):
            Fields({"key": value}, "a.json").number("key", 0.0, 1.0)


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe", "[" * 100_000, "9" * 5000, "{", "", '{"a": 1,}'],
)
def test_every_bad_json_is_a_value_error(text):
    """Deep nesting, 5,000 digits, bytes that are not UTF-8: ValueError and nothing else."""
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_with_a_byte_order_mark():
    """Files from Windows begin with a byte order mark."""
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_messages_cannot_be_forged_by_data():
    """A line break, an escape and half a surrogate pair are escaped; a long text is cut."""
    error = UserError("a.json:x\nerror: all is well", "\x1b[2J\u202e\ud83d", "fix it")
    assert str(error) == ("a.json:x\\nerror: all is well: \\x1b[2J\\u202e\\ud83d; fix: fix it")
    assert len(printable("x" * 10**6)) < 450
    assert printable("häuser 家") == "häuser 家"
