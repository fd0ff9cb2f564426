"""vocabulary_file.py: what a tokenizer.json may ask for, and panics of the library.

python -m pytest tests/inputs/test_vocabulary_file.py
"""

import json
import re

import pytest
import tokenizers

from config import UserError
from inputs import tokenizer, vocabulary_file
from inputs.templates import byte_tokenizer
from inputs.tokenizer import JsonTokenizer, load_tokenizer
from inputs.vocabulary_file import check_vocabulary
from tests.tools.vocabularies import VOCABULARIES, shared, train_pieces, write

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


def sequence(key, *steps):
    return {"type": "Sequence", key: list(steps)}


def normalizers(*steps):
    return {"normalizer": sequence("normalizers", *steps)}


def split(regex):
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": step}


def replace(regex, content):
    return {"type": "Replace", "pattern": {"Regex": regex}, "content": content}


@pytest.mark.parametrize(
    "change, why",
    [
        # What grows.
        (normalizers(*[DOUBLE] * 40), "make a text up to 2199023255552 times as long"),
        (normalizers(*[{"type": "ByteLevel"}] * 30), "times as long"),
        (normalizers(DOUBLE | {"content": "a" * 10**6}), "longer than 1000 characters"),
        (normalizers(DOUBLE | {"content": "a" * 1000}), "up to 2000 times as long"),
        (normalizers(DOUBLE | {"pattern": {"String": ""}, "content": "a" * 99}), "times as long"),
        (
            normalizers(*[replace("(?=.)", "a")] * 30),
            "computes for more than 2 seconds|64 times as much",
        ),
        (normalizers({"type": "Prepend", "prepend": "a" * 10**6}), "longer than 1000 characters"),
        ({"decoder": sequence("decoders", *[DOUBLE] * 40)}, "times as long"),
        (
            {
                "pre_tokenizer": sequence(
                    "pretokenizers",
                    *[
                        split("")["pre_tokenizer"],
                        {"type": "Metaspace", "replacement": "a", "prepend_scheme": "always"},
                    ]
                    * 30,
                )
            },
            "times as long",
        ),
        (normalizers(*[{"type": "NFC"}] * 101), "not a list of at most 100"),
        (
            normalizers(*[sequence("normalizers", *[{"type": "NFC"}] * 50)] * 50),
            "more than 100 steps",
        ),
        # Expressions: too slow, none, or a table that points outside of itself.
        (split(r"(a|a)*(?<=\x01)"), "retry-limit"),
        (split(".?" * 22 + r"(?<=\x01)"), "computes for more than 2 seconds|retry-limit"),
        (split("("), "cannot be loaded: .*parenthesis"),
        ({"decoder": replace(r"(a|a)*(?<=\x01)", "")}, "retry-limit"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
            "cannot be loaded: .+",
        ),
        # Ids that no embedding has.
        (
            {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}},
            "model.vocab: an id of the vocabulary is 2147483648, more than",
        ),
        ({"added_tokens": [{"id": 2**31, "content": "<x>"}]}, "added_tokens.0.id"),
        ({"added_tokens": [{"id": 1, "content": ""}]}, "added_tokens.0.content: '' is empty"),
        (
            {"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 10**9}},
            "max_input_chars_per_word",
        ),
    ],
)
def test_what_asks_for_too_much_is_named(change, why, tmp_path):
    byte_tokenizer().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}.*({why}).*; fix: "):
        load_tokenizer(tmp_path)


@shared
def test_published_files_pass():
    files = sorted(VOCABULARIES.glob("*/tokenizer.json"))
    assert len(files) >= 5
    for file in files:
        check_vocabulary(file.read_bytes(), file)


def test_steps_of_other_published_files_pass():
    """Expressions and steps of Llama 3, GPT-4o, DeepSeek, Falcon, XLM-R and ALBERT."""
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    gpt4o = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    deepseek = (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    )
    threes = r"(?=(\d{3})+(?!\d))"
    for expression in (llama3, gpt4o, deepseek, threes):
        spec = {"model": {"type": "BPE", "vocab": {}, "merges": []}} | split(expression)
        check_vocabulary(json.dumps(spec).encode(), "tokenizer.json")

    albert = normalizers(
        DOUBLE | {"pattern": {"String": "``"}, "content": '"'},
        {"type": "NFKD"},
        {"type": "StripAccents"},
        {"type": "Lowercase"},
        replace(" {2,}", " "),
    )
    spec = {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}} | albert
    check_vocabulary(json.dumps(spec).encode(), "tokenizer.json")


def test_a_panic_of_the_library_is_one_line(tmp_path):
    """At the load, at encode and at decode: it is no Exception."""
    slow = tokenizers.Regex(r"(b|b)*(?<=\x01)")
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"b": 0, "b" * 50: 1}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(slow, "isolated")
    model.decoder = tokenizers.decoders.Replace(slow, "")
    tok = JsonTokenizer({"tokenizer.json": model.to_str().encode()}, tmp_path)
    with pytest.raises(UserError, match="tokenizer.json: cannot encode a text: .*retry-limit"):
        tok.encode("b" * 50)
    with pytest.raises(UserError, match="tokenizer.json: cannot decode: .*retry-limit"):
        tok.decode([1])

    with pytest.raises(KeyboardInterrupt), tokenizer.failures("file", "cannot be loaded"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(
    "content, what",
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"<html>404</html>", "an HTML page"),
        (b"\0" * 100, "cannot be loaded"),
        (b"\xff\xfe", "cannot be loaded"),
    ],
)
def test_what_lies_in_the_place_of_a_file_is_named(name, content, what, tmp_path):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=f"{name}: {what}.*; fix: "):
            load_tokenizer(path)


def test_a_cut_sentencepiece_file_is_one_line(tmp_path):
    content = train_pieces()
    for length in (3, 100, 2000, len(content) - 1):
        (tmp_path / "tokenizer.model").write_bytes(content[:length])
        with pytest.raises(UserError, match="tokenizer.model: cannot be loaded: .*; fix: copy it"):
            load_tokenizer(tmp_path)


def varint(value):
    """A number as protobuf writes it."""
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def test_a_sentencepiece_table_that_grows_is_named(tmp_path):
    """Each "a" becomes a text of 300,000 characters."""
    # A double-array trie: "a" leads from the root to a node, whose leaf has the value 0, the place
    # of the text among the texts. Its form is that of darts-clone.
    units = [0] * 1024
    units[0] = 1 << 10  # the root: its children are at 1 ^ label
    node = 1 ^ ord("a")
    units[node] = (512 << 10) | 256 | ord("a")  # has a leaf, at node ^ 512
    units[node ^ 512] = 1 << 31
    trie = b"".join(unit.to_bytes(4, "little") for unit in units)
    table = len(trie).to_bytes(4, "little") + trie + b"b" * 300_000 + b"\0"
    spec = b"\x12" + varint(len(table)) + table  # precompiled_charsmap
    content = train_pieces() + b"\x1a" + varint(len(spec)) + spec  # normalizer_spec, once more
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model: .*(64 times|of memory|seconds).*; fix: "):
        load_tokenizer(tmp_path)


def test_a_file_larger_than_any_tokenizers_is_not_read(tmp_path, monkeypatch):
    byte_tokenizer().save(tmp_path)
    monkeypatch.setattr(tokenizer, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="tokenizer.json: .* MB that a tokenizer may have; fix: "):
        load_tokenizer(tmp_path)
    assert vocabulary_file.MOST_BYTES >= 100 * 10**6


def test_more_control_tokens_than_a_vocabulary_has_are_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_pieces())
    added = {f"<{i}>": 340 + i for i in range(40_000)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(UserError, match="tokenizer.model: 400.. control tokens, more than 32768"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("added_tokens.json", {"": 340}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"340": {"content": ""}}}),
    ],
)
def test_an_added_token_without_a_string_is_named(name, content, tmp_path):
    """It would be found between all characters."""
    (tmp_path / "tokenizer.model").write_bytes(train_pieces())
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{name}:.*empty.*; fix: "):
        load_tokenizer(tmp_path)


def test_a_vocabulary_may_leave_ids_out(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 9}, []))
    tok = load_tokenizer(write(tmp_path / "a", model))
    assert tok.vocab_size == 10 and tok.encode("b")[0] == [9]


def test_space_before_a_control_token_is_found_in_one_pass(tmp_path):
    """A token that takes in the space in front of it, in a text of nothing but space."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, " ": 1}, []))
    model.add_special_tokens([tokenizers.AddedToken("<m>", lstrip=True)])
    tok = load_tokenizer(write(tmp_path / "a", model))
    text = "a" + " " * 60_000 + "a  <m> <m>"
    assert [text[mark.start : mark.end] for mark in tok.controls(text)] == ["  <m>", " <m>"]
