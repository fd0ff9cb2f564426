"""Checked access to the fields of a file that comes from outside: config.json and its like.

    fields = Fields(read_json(path), path)
    hidden_size = fields.integer("hidden_size", 1, 2**20)
    eps = fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6)
    vision = fields.table("vision_config")               # Fields again; its name goes into messages
    shape = vision.integer("image_size", 1, 2**14)

Whoever wrote the file may have made a mistake in any field: a string, null, a list, 0, a negative
number, 2**40. Each getter says the kind and the range that the program can work with. A value
outside is a UserError that names the file and the key, before anything is computed from it. Checks
between two fields (a head count that divides a width) belong to the reader: `fields.refuse(...)`.
"""

from __future__ import annotations

from pathlib import Path

from config import UserError, is_unicode, printable

REQUIRED = object()  # the default of a field that has none

# The largest sizes of a model, several times those of any that is published. They bound the memory
# and the time that a config.json can ask for.
WIDTH = 2**16
INTERMEDIATE = 2**18
LAYERS = 512
HEADS = 2**10
HEAD_DIM = 2**12
VOCABULARY = 2**21
SIDE = 2**12  # pixels along a picture that an encoder sees
VIEWS = 1000  # whose tokens those of a picture's tiles may be

# An adapter's rank and alpha.
MOST_RANK = 2**14
ALPHA = (0.0, 1e6)

# The eps of a norm: 1e-12 is BERT's. At 0 a row of zeros would become NaN.
EPS = (1e-15, 1.0)


class Fields:
    """The fields of one JSON object, with where it comes from."""

    def __init__(
        self, values, where: Path | str, path: str = "", fix: str = "correct it, or download again"
    ):
        """Take a JSON object. Raises UserError if it is none.

        where: the file, for messages. path: the dotted name of this object in the file. fix: the
        end of each message.
        """
        self.where = where
        self.path = path
        self.fix = fix
        if not isinstance(values, dict):
            what = f"{printable(repr(values), 60)} is not an object"
            raise UserError(self.name(""), what, fix)
        self.values = values

    def __contains__(self, key: str) -> bool:
        """Say whether the field is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, low: int, high: int, default=REQUIRED):
        """Return a whole number from `low` to `high`, both included."""
        value = self._get(key, default)
        if key not in self:
            return value

        # Some writers give 4096.0. True is an int in Python, and a mistake here.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(key, f"not a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default=REQUIRED):
        """Return a finite number from `low` to `high`, both included, as a float."""
        value = self._get(key, default)
        if key not in self:
            return value
        # NaN is in no range. A whole number may be too large for a float.
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise self.refuse(key, f"not a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default=REQUIRED):
        """Return true or false."""
        value = self._get(key, default)
        if key in self and not isinstance(value, bool):
            raise self.refuse(key, "not true or false")
        return value

    def text(self, key: str, choices=(), default=REQUIRED, most: int = 100_000):
        """Return a text of at most `most` characters; one of `choices`, unless that is empty."""
        value = self._get(key, default)
        if key not in self:
            return value
        if not isinstance(value, str):
            raise self.refuse(key, "not a text")
        if not is_unicode(value):
            raise self.refuse(key, "not Unicode: half a surrogate pair")
        if len(value) > most:
            raise self.refuse(key, f"longer than {most} characters")
        if choices and value not in choices:
            raise self.refuse(key, f"not one of {', '.join(sorted(choices))}")
        return value

    def list(self, key: str, kind: type, default=REQUIRED, most: int = 100_000):
        """Return a list of at most `most` values, each of the type `kind`."""
        value = self._get(key, default)
        if key not in self:
            return value
        name = kind.__name__
        if not isinstance(value, list) or len(value) > most:
            raise self.refuse(key, f"not a list of at most {most} values")
        for element in value:
            is_wrong_bool = isinstance(element, bool) and kind not in (bool, object)
            if not isinstance(element, kind) or is_wrong_bool:
                raise self.refuse(key, f"not a list of {name}")
            if isinstance(element, str) and not is_unicode(element):
                raise self.refuse(key, "not Unicode: half a surrogate pair")
        return value

    def numbers(self, key: str, low: float, high: float, default=REQUIRED, most: int = LAYERS):
        """Return a list of at most `most` numbers, each as `number` takes it."""
        elements = self._elements(key, default, most)
        return [elements.number(i, low, high) for i in elements.values]

    def integers(self, key: str, low: int, high: int, default=REQUIRED, most: int = LAYERS):
        """Return a list of at most `most` whole numbers, each as `integer` takes it."""
        elements = self._elements(key, default, most)
        return [elements.integer(i, low, high) for i in elements.values]

    def table(self, key: str, optional: bool = False) -> Fields:
        """Return the fields of an object in this one; of an empty one, if optional and absent."""
        default = {} if optional else REQUIRED
        return Fields(self._get(key, default), self.where, self._dotted(key), self.fix)

    def refuse(self, key: str, why: str) -> UserError:
        """Return the error for a field: its value, and why that cannot be."""
        try:
            value = printable(repr(self.values.get(key)), 60)
        except RecursionError:
            value = "what is nested so deeply"
        return UserError(self.name(key), f"{value} is {why}", self.fix)

    def _elements(self, key: str, default, most: int) -> Fields:
        """Return the elements of a list as fields, whose names are their places."""
        elements = self.list(key, object, default, most)
        by_place = {str(i): element for i, element in enumerate(elements)}
        return Fields(by_place, self.where, self._dotted(key), self.fix)

    def _get(self, key: str, default):
        """Return the raw value of a field; its default if it is absent or null."""
        value = self.values.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise UserError(self.name(key), "missing", self.fix)
        return default

    def name(self, key: str) -> str:
        """Return FILE:a.b.c, as messages name a field."""
        dotted = self._dotted(key)
        return f"{self.where}:{dotted}" if dotted else str(self.where)

    def _dotted(self, key: str) -> str:
        """Return a.b.c, the name of a field in the file."""
        return ".".join(filter(None, (self.path, key)))
