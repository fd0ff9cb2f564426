"""Tokenizers that say which characters each token stands for.

    tok = load_tokenizer("DIR")     # tokenizer.json, tokenizer.model, or vocab.json and merges.txt
    ids, offsets = tok.encode("A dog.</s>")     # ids[k] stands for text[start:end] of offsets[k]

    ids      [319,    11203,  29889,  2]         Llama-2's
    tokens   ["▁A",   "▁dog", ".",    "</s>"]
    offsets  [(0, 1), (1, 5), (5, 6), (6, 10)]

The libraries `tokenizers` and `sentencepiece` split plain text. This file decides what is a control
token and where a text begins, and it keeps the offsets: `templates.tokenize` finds the labels with
them, so no text is tokenized a second time to count its tokens.

Two kinds of vocabularies exist, and both give offsets in characters:

- Byte-level BPE (GPT-2, Phi-2, Qwen2; `tokenizer.json`) splits the bytes of a text, so that one
  character may be several tokens. These share its span, or stand behind it without width.
- SentencePiece (Llama, Gemma; `tokenizer.model`, or converted to `tokenizer.json`) splits the
  characters and writes a space as the word mark ▁, a part of the token behind it. It also puts a
  mark before the whole text, for which there is no character.

`Tokenizer` is what both share; `JsonTokenizer` and `PieceTokenizer` read the two kinds of file.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from checkpoints.fields import VOCABULARY, Fields
from checkpoints.files import parse_json, stand_in, write_file
from config import UserError, is_unicode, printable
from inputs import nanovlm_tokenizer
from inputs.vocabulary_file import MOST_BYTES, check_pieces, check_vocabulary

# The files that belong to a tokenizer, hence those that `save` writes.
OWN_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# The model's files, which are read only for their eos_token_id.
MODEL_FILES = ("generation_config.json", "config.json")

# How a text is split into words before its vocab.json is used. No file says it: it is in the code
# of the class that tokenizer_class names. None is GPT-2's way, which `tokenizers` knows.
WORDS = {
    "GPT2Tokenizer": None,
    "CodeGenTokenizer": None,
    "Qwen2Tokenizer": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

MOST_CONTROLS = 2**15  # Gemma 3 has 6,400
NEVER = "(?!)"  # a regular expression that matches nowhere

Offsets = list[tuple[int, int]]


class Mark(NamedTuple):
    """A place in a text that becomes one given id, whatever is written there."""

    start: int
    end: int
    id: int | None  # None adds no token: the place is only a cut, across which no token reaches


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a folder, or of one vocabulary file.

    In a folder with both tokenizer.json and tokenizer.model the first one wins: it alone is sure to
    hold tokens that were added later. The configuration files beside it are read for bos, eos, pad
    and the chat template. Raise UserError when there is no tokenizer or it cannot be read.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    with failures(f"{path}:tokenizer", "cannot be loaded"):
        files = read_files(path)

    if "tokenizer.json" in files:
        kind = JsonTokenizer
    elif "tokenizer.model" in files:
        kind = PieceTokenizer
    else:
        raise missing_tokenizer(path)

    # The file itself, unless it was made of two others.
    file = path if path.is_file() else folder / kind.name
    if file.is_file():
        other = stand_in(file)
        if other is not None:
            raise other
    with failures(f"{path}:{kind.name}", "cannot be loaded"):
        return kind(files, folder)


def with_controls(tokenizer: Tokenizer, strings: Iterable[str]) -> Tokenizer:
    """Return a tokenizer that has each of these strings as a control token.

    New ones get the ids behind all others. The tokenizer itself stays as it is. Raise UserError for
    a tokenizer.model, whose vocabulary is closed.
    """
    missing = [string for string in strings if string not in tokenizer.special]
    if not missing:
        return tokenizer
    if "tokenizer.json" not in tokenizer.files:
        what = f"no control token {missing[0]}, and a tokenizer.model takes no new ones"
        raise UserError(tokenizer.folder, what, "give a folder with tokenizer.json")

    # The library counts entries, so in a vocabulary with gaps a new id may be taken already.
    model = tokenizers.Tokenizer.from_str(tokenizer.files["tokenizer.json"].decode())
    taken = set(model.get_vocab().values())
    added = [tokenizers.AddedToken(s, special=True, normalized=False) for s in missing]
    known = {string: model.token_to_id(string) for string in missing}
    model.add_special_tokens(added)
    for string, before in known.items():
        if before is None and model.token_to_id(string) in taken:
            what = f"no free id for {string}: the ids have gaps"
            raise UserError(tokenizer.folder / "tokenizer.json", what, "give another tokenizer")
    files = tokenizer.files | {"tokenizer.json": model.to_str(pretty=True).encode()}

    # Where tokenizer_config.json lists all added tokens, some of transformers' classes read only
    # that list.
    settings = parse(files, "tokenizer_config.json", tokenizer.folder)
    if "added_tokens_decoder" in settings:
        listed = dict(settings.table("added_tokens_decoder").values)
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        for string in missing:
            entry = {"content": string, **flags, "special": True}
            listed[str(model.token_to_id(string))] = entry
        content = settings.values | {"added_tokens_decoder": listed}
        files["tokenizer_config.json"] = json.dumps(content, indent=2).encode()
    return type(tokenizer)(files, tokenizer.folder)


@contextlib.contextmanager
def failures(where: Path | str, what: str):
    """Turn whatever the two libraries raise into a UserError of where and what.

    They raise what they like on a damaged file. A panic of Rust is no Exception.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        is_panic = type(error).__module__ == "pyo3_runtime"
        if not isinstance(error, Exception) and not is_panic:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(where, f"{what}: {reason}", "copy it again") from error


def read_files(path: Path) -> dict[str, bytes]:
    """Return {name: bytes} of all files of the tokenizer in a folder, or around one file.

    In a folder of nanoVLM they are those of the tokenizer that its config.json names, with what
    that adds (nanovlm_tokenizer.py). Raise UserError where there is none.
    """
    folder = path.parent if path.is_file() else path
    files = {}
    for name in OWN_FILES + MODEL_FILES:
        if (folder / name).is_file():
            files[name] = read_bounded(folder / name)

    if path.is_file():
        # The caller named this vocabulary and no other.
        files.pop("tokenizer.json", None)
        files.pop("tokenizer.model", None)
        name = "tokenizer.model" if path.suffix == ".model" else "tokenizer.json"
        files[name] = read_bounded(path)
        return files

    # Another config.json is not this function's business, nor whether it can be read.
    if nanovlm_tokenizer.may_be_needed(files.get("config.json", b"")):
        config = parse(files, "config.json", folder)
        if nanovlm_tokenizer.is_needed(config):
            if "tokenizer.json" not in files:
                files = read_files(nanovlm_tokenizer.named_folder(config, folder))
            return nanovlm_tokenizer.extend(files, config)

    # Without a vocabulary file of either kind, one can be made of GPT-2's two files.
    has_vocabulary = "tokenizer.json" in files or "tokenizer.model" in files
    if not has_vocabulary and "vocab.json" in files and "merges.txt" in files:
        files["tokenizer.json"] = build_byte_level(files, path)
    return files


def read_bounded(path: Path) -> bytes:
    """Return the bytes of a file. Raise UserError for one that is larger than any tokenizer's."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        what = f"{size >> 20} MB, more than the {MOST_BYTES >> 20} MB that a tokenizer may have"
        raise UserError(path, what, "give the tokenizer of the model's authors")
    return path.read_bytes()


def missing_tokenizer(path: Path) -> UserError:
    """Return the error for a folder without a tokenizer that can be read."""
    what = "no such folder or file"
    fix = "name a folder that holds one of the two"
    if path.is_dir():
        what = "has neither tokenizer.json nor tokenizer.model"

    ranks = sorted(path.glob("*.tiktoken"))
    if ranks:
        what = f"{ranks[0].name} needs its repository's code, which is never run"
        fix = "copy tokenizer.json from the newer revision of the repository"
    return UserError(f"{path}:tokenizer", what, fix)


class Tokenizer:
    """What both kinds of tokenizer share. Made by `load_tokenizer`.

    vocab_size    1 + the largest id
    special       {string: id} of the control tokens, which are structure and not their spelling
    bos_id        the id that opens every sequence, None when this tokenizer does not prepend one
    eos_id, eos   id and string of the token that ends a text, or None
    pad_id        the id of the padding token, or None
    named         {"bos_token": string, ...}, for chat templates
    token_id(string) -> id or None; token(id) -> string or None

    The bytes of its files are kept. So `save` needs no folder, which may be gone by then, and a
    pickle (for a DataLoader worker) is those bytes, read again.

    A SentencePiece vocabulary puts its word mark before a text, so "dog" and " dog" begin with the
    same token. Text behind a control token gets no mark (Hugging Face's `"legacy": false`), unless
    tokenizer_config.json says `"legacy": true`. Hence three models of the library, which differ in
    nothing else; with a byte-level vocabulary all three are the same one:

    _first    for the beginning of a text: with the mark
    _bare     for a text that goes on: without the mark
    _later    for text behind a control token: one of the two
    """

    name = ""  # of the vocabulary file

    def __init__(self, files: dict[str, bytes], folder: Path = Path()):
        """Read the files. Raise UserError for a wrong field in one of those in JSON.

        folder: where they came from, for messages.
        """
        self.files = files
        self.folder = folder
        settings = self._parse("tokenizer_config.json")
        self.config = settings.values

        # The vocabulary file itself may know a bos and an eos.
        known_bos, known_eos = self._load_vocabulary()
        self._later = self._bare
        if settings.flag("legacy", default=False):
            self._later = self._first

        self.named = read_named(files, folder)
        ids = {role: self.token_id(string) for role, string in self.named.items()}
        self.pad_id = ids.get("pad_token")

        # The config may say that bos is prepended, or that it is not; else the vocabulary decides.
        prepends_bos = settings.flag("add_bos_token", default=known_bos is not None)
        self.bos_id = ids.get("bos_token", known_bos) if prepends_bos else None

        self.eos_id = self._find_eos(ids.get("eos_token"), known_eos)
        self.eos = None if self.eos_id is None else self.token(self.eos_id)

        # A chat template may write the two, so they have names even where the config gives none.
        if known_bos is not None:
            self.named.setdefault("bos_token", self.token(known_bos))
        if self.eos_id is not None:
            self.named.setdefault("eos_token", self.eos)

        self._controls = self._compile_controls()

    def _load_vocabulary(self) -> tuple[int | None, int | None]:
        """Read the vocabulary file; return the ids that it knows as bos and eos, each or None.

        Set special, vocab_size, _first and _bare.
        """
        raise NotImplementedError

    def largest_plain_id(self) -> int:
        """Return the largest id that plain text may become. Control tokens are spelled out."""
        raise NotImplementedError

    def _encode_plain(self, model, text: str) -> tuple[list[int], Offsets]:
        """Return ids and offsets of a text in which nothing is a control token."""
        raise NotImplementedError

    def _takes_space(self, token: str, side: str) -> bool:
        """Return whether a control token takes in the space on its side "lstrip" or "rstrip"."""
        raise NotImplementedError

    def _find_eos(self, named: int | None, known: int | None) -> int | None:
        """Return the id that ends a text: the first of what config, model and vocabulary say."""
        candidates = [named]
        for name in MODEL_FILES:
            fields = self._parse(name)
            if isinstance(fields.values.get("eos_token_id"), list):
                # A model that stops at several: the first is the usual one.
                candidates += fields.integers("eos_token_id", 0, VOCABULARY)[:1]
            else:
                candidates.append(fields.integer("eos_token_id", 0, VOCABULARY, default=None))
        candidates.append(known)

        for candidate in candidates:
            if candidate is not None:
                return candidate
        return None

    def _parse(self, name: str) -> Fields:
        """Return the fields of the JSON file of that name."""
        return parse(self.files, name, self.folder)

    def _compile_controls(self) -> re.Pattern:
        """Return the expression that finds control tokens in a text, the longest first.

        Raise UserError for more than a vocabulary has: the expression would be slow.
        """
        if len(self.special) > MOST_CONTROLS:
            what = f"{len(self.special)} control tokens, more than {MOST_CONTROLS}"
            fix = "use the tokenizer of the model's authors"
            raise UserError(self.folder / self.name, what, fix)
        forms = []
        for token in sorted(self.special, key=len, reverse=True):
            form = re.escape(token)
            if self._takes_space(token, "lstrip"):
                # From where the space begins: each later place would look through it again.
                form = r"(?:(?<!\s)\s+)?" + form
            if self._takes_space(token, "rstrip"):
                form = form + r"\s*"
            forms.append(form)
        return re.compile("|".join(forms) or NEVER)

    def __reduce__(self):
        return type(self), (self.files, self.folder)

    def encode(self, text: str, special: bool = True) -> tuple[list[int], Offsets]:
        """Return (ids, offsets) without bos: ids[k] stands for text[start:end] of offsets[k].

        Together the spans cover the text. Tokens that are parts of one character share its span or
        stand at it with no width. With special=False a control token's string is plain text.
        """
        marks = []
        if special:
            marks = self.controls(text)
        return self.encode_around(text, marks)

    def controls(self, text: str) -> list[Mark]:
        """Return the control tokens in a text, with the space that some take in (Phi-3's do)."""
        marks = []
        for found in self._controls.finditer(text):
            # What was found may begin or end with space that the token takes in.
            string = found[0]
            if string not in self.special:
                string = string.strip()
            marks.append(Mark(found.start(), found.end(), self.special.get(string)))
        return marks

    def encode_around(self, text: str, marks: list[Mark]) -> tuple[list[int], Offsets]:
        """Return (ids, offsets) where `marks`, in order, are the only places that become given ids.

        Control strings in the text between the marks are spelled out like other text. A negative id
        is an image's: behind it a text begins anew, word mark included, as in TinyLLaVA.

        Raise ValueError("what; fix: action") for half a surrogate pair, which JSON may hold as
        "\\ud83d" and no vocabulary takes.
        """
        if not is_unicode(text):
            what = "text that is not Unicode (half a surrogate pair)"
            raise ValueError(f"{what}; fix: mend the row, or remove it")

        ids = []
        offsets = []
        cursor = 0
        model = self._first

        # A mark that adds nothing, so that the loop also takes the text behind the last one.
        end_of_text = Mark(len(text), len(text), None)
        with failures(self.folder / self.name, "cannot encode a text"):
            for start, end, mark_id in [*marks, end_of_text]:
                # The plain text before the mark.
                if cursor < start:
                    plain_ids, spans = self._encode_plain(model, text[cursor:start])
                    ids += plain_ids
                    for first, last in cover(spans, start - cursor):
                        offsets.append((cursor + first, cursor + last))

                # The mark itself. Its kind decides whether the text behind it gets a word mark.
                if mark_id is not None:
                    ids.append(mark_id)
                    offsets.append((start, end))
                if mark_id is None:
                    model = self._bare
                elif mark_id < 0:
                    model = self._first
                else:
                    model = self._later
                cursor = end
        return ids, offsets

    def decode(self, ids) -> str:
        """Return the text of ids.

        Control tokens are left out, as are images (negative ids) and ids that no token has, such as
        those of an embedding's padding.
        """
        controls = set(self.special.values())
        kept = []
        for i in map(int, ids):
            if i >= 0 and i not in controls and self.token(i) is not None:
                kept.append(i)
        with failures(self.folder / self.name, "cannot decode"):
            return self._first.decode(kept)

    def save(self, folder: str | Path):
        """Write the tokenizer's own files, chat template included, each whole or not at all."""
        for name in OWN_FILES:
            if name in self.files:
                write_file(Path(folder) / name, self.files[name])

    @property
    def marks_words(self) -> bool:
        """Whether a text begins with a word mark, as in Llama's vocabularies."""
        return self._first is not self._bare

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, or None; of several places the newest one wins.

        Raise UserError if it is no text.
        """
        if "chat_template.jinja" in self.files:
            try:
                return self.files["chat_template.jinja"].decode()
            except UnicodeDecodeError as e:
                where = self.folder / "chat_template.jinja"
                raise UserError(where, f"not UTF-8 ({e.reason})", "copy it again") from None

        fields = self._parse("tokenizer_config.json")
        if not fields.values.get("chat_template"):
            fields = self._parse("chat_template.json")
        if not isinstance(fields.values.get("chat_template"), list):
            return fields.text("chat_template", default=None, most=10**6)

        # Several with names, such as one for tools.
        by_name = {}
        for value in fields.list("chat_template", dict, most=100):
            entry = Fields(value, fields.where, "chat_template", fields.fix)
            by_name[entry.text("name")] = entry.text("template", most=10**6)
        return by_name.get("default")


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, through `tokenizers`."""

    name = "tokenizer.json"

    def _load_vocabulary(self) -> tuple[int | None, int | None]:
        content = self.files["tokenizer.json"]
        largest = check_vocabulary(content, self.folder / "tokenizer.json")
        model = tokenizers.Tokenizer.from_str(content.decode())

        # Some files carry these two settings, which would cut or fill up every text.
        model.no_truncation()
        model.no_padding()

        # What the post-processor puts around an empty text is what it puts before every text. After
        # that it goes: bos is ours to add, and ByteLevel's cuts spaces out of the offsets.
        around = model.encode("").ids
        model.post_processor = None

        # Control strings in plain text are spelled out; the real ones are found by `controls`.
        model.encode_special_tokens = True

        # Added tokens are those that were given an id after the vocabulary was trained. Only those
        # that are called special are control tokens; the library finds the others in any text.
        self._added = model.get_added_tokens_decoder()
        self.special = {}
        self.vocab_size = 1 + max(largest, *self._added, -1)
        for i, token in self._added.items():
            if token.special:
                self.special[token.content] = i

        self._first = model
        self._bare = without_word_mark(model)

        # The file does not say which token is eos.
        bos = around[0] if around else None
        return bos, None

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, or None."""
        return self._first.token_to_id(token)

    def token(self, i: int) -> str | None:
        """Return the string of an id, or None."""
        return self._first.id_to_token(i)

    def largest_plain_id(self) -> int:
        """Return the largest id that plain text may become."""
        ids = set(self._first.get_vocab().values())
        return max(ids - set(self.special.values()), default=0)

    def _takes_space(self, token: str, side: str) -> bool:
        return getattr(self._added[self.special[token]], side)

    def _encode_plain(self, model, text: str) -> tuple[list[int], Offsets]:
        encoding = model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


class PieceTokenizer(Tokenizer):
    """`tokenizer.model`, through `sentencepiece`."""

    name = "tokenizer.model"

    def _load_vocabulary(self) -> tuple[int | None, int | None]:
        proto = self.files["tokenizer.model"]
        check_pieces(proto, self.folder / "tokenizer.model")
        model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self._first = model

        # The file is a protobuf message, and of a field that occurs again the later value holds. So
        # appending normalizer_spec (field 3) { add_dummy_prefix (field 3): false } switches off the
        # word mark before a text.
        without_mark = proto + b"\x1a\x02\x18\x00"
        self._bare = sentencepiece.SentencePieceProcessor(model_proto=without_mark)

        # Control tokens are those of the vocabulary itself, and those that the files beside it add.
        size = model.vocab_size()
        self.special = {}
        for i in range(size):
            if model.is_control(i) or model.is_unknown(i):
                self.special[model.id_to_piece(i)] = i
        own_controls = set(self.special.values())
        added = self._parse("added_tokens.json")
        for token in added.values:
            if not token:
                raise added.refuse(token, "the id of an empty token")
            self.special[token] = added.integer(token, 0, VOCABULARY)
        self._added = read_added(self._parse("tokenizer_config.json"))
        for i, token in self._added.items():
            if token.get("special", True):
                self.special[token["content"]] = i

        # A vocabulary may hold a control token as a piece of text, too (Gemma's <end_of_turn>), and
        # sentencepiece then finds it wherever somebody typed it. So typed text is cut behind the
        # string's first character: no piece reaches across, and it is spelled out.
        places = []
        for string, i in self.special.items():
            if i < size and i not in own_controls and len(string) > 1:
                places.append(f"(?<={re.escape(string[0])})(?={re.escape(string[1:])})")
        self._typed = re.compile("|".join(places) or NEVER)

        self._strings = {i: string for string, i in self.special.items()}
        self.vocab_size = max(size, 1 + max(self._strings))

        # sentencepiece says -1 where a vocabulary has no such token.
        bos = model.bos_id() if model.bos_id() >= 0 else None
        eos = model.eos_id() if model.eos_id() >= 0 else None
        return bos, eos

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, or None."""
        i = self.special.get(token)
        if i is None:
            i = self._first.piece_to_id(token)  # for an unknown one, the id of <unk>
        if self.token(i) == token:
            return i
        return None

    def token(self, i: int) -> str | None:
        """Return the string of an id, or None."""
        if i in self._strings:
            return self._strings[i]
        if i < self._first.vocab_size():
            return self._first.id_to_piece(i)
        return None

    def largest_plain_id(self) -> int:
        """Return the largest id that plain text may become."""
        ids = set(range(self._first.vocab_size()))
        return max(ids - set(self.special.values()), default=0)

    def _takes_space(self, token: str, side: str) -> bool:
        return self._added.get(self.special[token], {}).get(side, False)

    def _encode_plain(self, model, text: str) -> tuple[list[int], Offsets]:
        cuts = [0]
        for found in self._typed.finditer(text):
            cuts.append(found.start())
        cuts.append(len(text))

        ids = []
        offsets = []
        for start, end in itertools.pairwise(cuts):
            mapping = model.encode_as_offset_mapping(text[start:end])
            ids += mapping["ids"]
            for first, last in mapping["offsets"]:
                offsets.append((start + first, start + last))
            model = self._bare  # behind a cut the text goes on
        return ids, offsets


def cover(spans: Offsets, length: int) -> Offsets:
    """Return spans of tokens widened so that they cover the whole text of `length` characters.

    A normalizer may drop characters, such as an accent under NFC: the token before takes them.
    """
    next_starts = [start for start, _ in spans[1:]]
    next_starts.append(length)

    covered = []
    # strict=False: a text may have no tokens at all (CLIP's " "), and then there is no span.
    for (start, end), next_start in zip(spans, next_starts, strict=False):
        covered.append((start, max(end, next_start)))
    return covered


def without_word_mark(model: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return the model that puts no word mark before a text, the same one if it puts none anyway.

    In older files a Prepend normalizer makes the mark, in newer ones a Metaspace pre-tokenizer.
    """
    normalizer = describe(model.normalizer)
    steps = []
    if normalizer:
        # A Sequence has several, any other normalizer is the only step.
        steps = normalizer.get("normalizers", [normalizer])
    kept = [step for step in steps if step["type"] != "Prepend"]

    pre_tokenizer = describe(model.pre_tokenizer)
    is_metaspace = pre_tokenizer.get("prepend_scheme") == "first"
    if kept == steps and not is_metaspace:
        return model

    spec = json.loads(model.to_str())
    spec["normalizer"] = {"type": "Sequence", "normalizers": kept}
    if is_metaspace:
        spec["pre_tokenizer"] = pre_tokenizer | {"prepend_scheme": "never"}
    bare = tokenizers.Tokenizer.from_str(json.dumps(spec))
    bare.encode_special_tokens = True  # which a file does not carry
    return bare


def describe(part) -> dict:
    """Return a normalizer or pre-tokenizer as tokenizer.json writes it, {} for None."""
    if part is None:
        return {}
    return json.loads(part.__getstate__())


def parse(files: dict[str, bytes], name: str, folder: Path) -> Fields:
    """Return the fields of the JSON file of that name among `files`, none where it is not there.

    Raise UserError if it is not a JSON object.
    """
    where = folder / name
    try:
        value = parse_json(files.get(name, b"{}"))
    except ValueError as e:
        raise UserError(where, f"not JSON ({e})", "copy it again") from None
    return Fields(value, where, fix="copy the file again")


def read_named(files: dict[str, bytes], folder: Path) -> dict[str, str]:
    """Return {"bos_token": string, ...}: the tokens to which the config files give a role."""
    settings = parse(files, "tokenizer_config.json", folder)
    roles = parse(files, "special_tokens_map.json", folder)
    named = {}
    for role in (roles.values | settings.values).keys():
        if not role.endswith("_token"):
            continue
        fields = settings if role in settings.values else roles
        token = fields.values[role]
        if isinstance(token, dict):
            token = fields.table(role).text("content")
        if isinstance(token, str):  # add_bos_token is a boolean, and a role may be null
            named[role] = token
    return named


def read_added(settings: Fields) -> dict[int, dict]:
    """Return the tokens of added_tokens_decoder by id. Raise UserError for a wrong field."""
    decoder = settings.table("added_tokens_decoder", optional=True)
    added = {}
    for i in decoder.values:
        if not i.isdecimal() or len(i) > 9 or int(i) > VOCABULARY:
            raise decoder.refuse(i, f"the token of {printable(repr(i), 40)}, which is no id")
        token = decoder.table(i)
        if not token.text("content"):
            raise token.refuse("content", "empty")
        for key in ("special", "lstrip", "rstrip", "normalized", "single_word"):
            token.flag(key, default=False)
        added[int(i)] = token.values
    return added


def build_byte_level(files: dict[str, bytes], path: Path) -> bytes:
    """Return the tokenizer.json that vocab.json and merges.txt stand for (GPT-2, Phi-2, Qwen2).

    Raise UserError where the files do not say how words are split, or leave out an added token.
    """
    where = f"{path}:tokenizer_config.json"
    folder = path.parent if path.is_file() else path
    fields = parse(files, "tokenizer_config.json", folder)
    settings = fields.values
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if kind not in WORDS:
        what = f"the tokenizer_class is {kind}, so how vocab.json splits words is not known"
        raise UserError(where, what, f"copy tokenizer.json too, or use {', '.join(WORDS)}")

    # Every line of merges.txt is a pair of pieces that are joined, the most frequent pair first.
    pairs = []
    for line in files["merges.txt"].decode().split("\n"):
        pair = tuple(line.split(" "))
        if len(pair) == 2 and pair[0] != "#version:":
            pairs.append(pair)
    vocabulary = parse(files, "vocab.json", folder)
    ids = {piece: vocabulary.integer(piece, 0, VOCABULARY) for piece in vocabulary.values}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ids, pairs))

    # Text -> words -> bytes, each written as one printable character (a space as Ġ).
    words = WORDS[kind]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    model.decoder = decoders.ByteLevel()
    if words is None:
        model.pre_tokenizer = byte_level
    else:
        model.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
        model.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])

    # The library counts the ids of added tokens on from the vocabulary, so in order they must come
    # out as the config says.
    added = dict(sorted(read_added(fields).items()))
    model.add_tokens([tokenizers.AddedToken(**token) for token in added.values()])

    # Tokens with a role are control tokens, also those that the vocabulary itself holds.
    named = read_named(files, folder).values()
    model.add_special_tokens([token for token in named if model.token_to_id(token) is not None])

    for i, token in added.items():
        if model.token_to_id(token["content"]) != i:
            what = f"the ids of added tokens leave a gap before {token['content']!r}"
            raise UserError(where, what, "copy tokenizer.json too")
    return model.to_str().encode()
