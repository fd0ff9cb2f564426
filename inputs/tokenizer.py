"""Tokenizers that say which characters each token stands for.

    tok = load_tokenizer("DIR")                  # tokenizer.json, tokenizer.model, or vocab.json and merges.txt
    ids, offsets = tok.encode("A dog.</s>")      # text[start:end] of offsets[k] are the characters of ids[k]

The libraries `tokenizers` and `sentencepiece` split plain text; this file says what is a control token and where a
text begins, and keeps the offsets, so that labels are found (templates.py) and no text is tokenised twice to count.
"""

import datetime
import functools
import itertools
import json
import os
import re
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from config import UserError

OWN_FILES = (  # what belongs to a tokenizer, hence what `save` writes
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json merges.txt chat_template.jinja chat_template.json"
).split()
MODEL_FILES = ("generation_config.json", "config.json")  # the model's, read only for eos_token_id
# How a vocab.json is used depends on code, which its tokenizer_class names: the regex of its words, or GPT-2's
WORDS = {
    "GPT2Tokenizer": None,
    "CodeGenTokenizer": None,
    "Qwen2Tokenizer": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def load_tokenizer(path):
    """A folder with `tokenizer.json`, `tokenizer.model`, or `vocab.json` and `merges.txt`; or a file -> Tokenizer.

    In a folder with both, `tokenizer.json` wins: it alone is sure to hold tokens that were added later, and the
    golden rows are equal through either. The config files beside it are read for bos, eos, pad and chat template.
    Raises UserError when there is no tokenizer or it cannot be read.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    kinds = {"tokenizer.json": JsonTokenizer, "tokenizer.model": PieceTokenizer}
    files = {
        name: (folder / name).read_bytes()
        for name in (*OWN_FILES, *MODEL_FILES)
        if (folder / name).is_file()
    }
    if path.is_file():  # this vocabulary and no other
        files = {name: data for name, data in files.items() if name not in kinds}
        files["tokenizer.model" if path.suffix == ".model" else "tokenizer.json"] = (
            path.read_bytes()
        )
    elif {"vocab.json", "merges.txt"} <= files.keys() and not kinds.keys() & files.keys():
        files["tokenizer.json"] = _byte_level(files, path)
    for name, kind in kinds.items():
        if name in files:
            try:
                return kind(files)
            except Exception as error:  # both libraries raise what they like on a damaged file
                what = " ".join(str(error).split())[:200] or type(error).__name__
                raise UserError(
                    f"{path}:{name}", f"cannot be loaded: {what}", "copy it again"
                ) from error
    what = (
        "has neither tokenizer.json nor tokenizer.model"
        if folder.is_dir()
        else "no such folder or file"
    )
    fix = "name a folder that holds one of the two"
    if ranks := sorted(folder.glob("*.tiktoken")):
        what = f"{ranks[0].name} needs its repository's code, which is never run"
        fix = "copy tokenizer.json from the newer revision of the repository"
    raise UserError(f"{path}:tokenizer", what, fix)


class Tokenizer:
    """What both kinds share. Made by `load_tokenizer`.

    vocab_size    1 + the largest id
    special       {string: id} of the control tokens, which stand for structure and not for their spelling
    bos_id        the id that opens every sequence, or None when this tokenizer does not prepend one
    eos_id, eos   id and string of the end token, or None; pad_id likewise
    named         {"bos_token": string, ...}, for chat templates
    token_id(string) -> id or None; token(id) -> string or None

    It keeps the bytes of its files: `save` needs no folder that may be gone by then, and a pickle (for a
    DataLoader worker) is those bytes, read again.

    A Llama vocabulary puts a word mark before a text. Text behind a control token gets none (Hugging Face's
    `"legacy": false`: TinyLlama's and the golden rows'), unless the config says `"legacy": true`. Hence the models
    `_first` for the beginning of a text, `_bare` without the mark, and `_later`, which is one of the two.
    """

    def __init__(self, files):
        self.files, self.config = files, _read(files, "tokenizer_config.json")
        lead, end = (
            self._load()
        )  # ids that the vocabulary file itself knows as bos and eos, or None
        self._later = self._first if self.config.get("legacy") is True else self._bare
        self.named = _named(files)
        ids = {role: self.token_id(token) for role, token in self.named.items()}
        asked = self.config.get("add_bos_token")
        prepends = lead is not None if asked is None else asked
        self.bos_id, self.pad_id = (
            ids.get("bos_token", lead) if prepends else None,
            ids.get("pad_token"),
        )
        ends = (
            ids.get("eos_token"),
            *(_read(files, name).get("eos_token_id") for name in MODEL_FILES),
            end,
        )
        ends = [e[0] if isinstance(e, list) else e for e in ends if e is not None]
        self.eos_id = ends[0] if ends else None
        self.eos = self.token(self.eos_id) if ends else None
        for role, i in (("bos_token", lead), ("eos_token", self.eos_id)):
            if i is not None:
                self.named.setdefault(role, self.token(i))
        takes, longest = self._takes, sorted(self.special, key=len, reverse=True)
        forms = [
            r"\s*" * takes(s, "lstrip") + re.escape(s) + r"\s*" * takes(s, "rstrip")
            for s in longest
        ]
        self._controls = re.compile("|".join(forms) or "(?!)")

    def __reduce__(self):
        return type(self), (self.files,)

    def encode(self, text, special=True):
        """text -> (ids, offsets), without bos. Token k touches the characters text[start:end] of offsets[k].

        Together the spans cover the text; tokens that are parts of one character share it or stand at it with
        no width. With special=False a control token's string is text like any other.
        """
        return self.encode_around(text, self.controls(text) if special else [])

    def controls(self, text):
        """[(start, end, id)] of the control tokens in a text, with the space around that some take in (Phi-3's do)."""
        found, special = self._controls.finditer(text), self.special
        return [(*m.span(), special.get(m[0], special.get(m[0].strip()))) for m in found]

    def encode_around(self, text, marks):
        """As `encode`, where `marks`, sorted (start, end, id), are the only places that become given ids.

        Control strings in the text between them are plain text. A negative id is an image's: behind it a text
        begins anew, word mark included, as in TinyLLaVA. An id None adds nothing: no token reaches across it.
        """
        ids, offsets, cursor, model = [], [], 0, self._first
        for start, end, mark in [*marks, (len(text), len(text), None)]:
            if cursor < start:
                pieces, spans = self._pieces(model, text[cursor:start])
                # A normaliser may drop characters (an accent under NFC): the token before takes them.
                nexts = [s for s, _ in spans[1:]] + [start - cursor]
                ids += pieces  # none for CLIP's " ", hence strict=False
                offsets += [
                    (cursor + s, cursor + max(e, n))
                    for (s, e), n in zip(spans, nexts, strict=False)
                ]
            if mark is not None:
                ids.append(mark)
                offsets.append((start, end))
            cursor, model = (
                end,
                self._bare if mark is None else self._first if mark < 0 else self._later,
            )
        return ids, offsets

    def decode(self, ids):
        """ids -> text, without control tokens, images, and ids that no token has (an embedding's padding)."""
        ids, controls = [i for i in map(int, ids) if i >= 0], set(self.special.values())
        return self._first.decode(
            [i for i in ids if i not in controls and self.token(i) is not None]
        )

    def save(self, folder):
        """Writes the tokenizer's own files, chat template included, into `folder`, each one whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (name for name in OWN_FILES if name in self.files):
            with open(temporary := folder / f".{name}.{os.getpid()}", "wb") as file:
                file.write(self.files[name])
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / name)

    @property
    def marks_words(self):
        """Whether a text begins with a word mark, as it does in Llama's vocabularies."""
        return self._first is not self._bare

    @property
    def chat_template(self):
        """The Jinja source of the chat template, the newest place first, or None."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode()
        found = self.config.get("chat_template") or _read(self.files, "chat_template.json").get(
            "chat_template"
        )
        return (
            {f["name"]: f["template"] for f in found}.get("default")
            if isinstance(found, list)
            else found
        )

    def compile_chat_template(self):
        """The chat template, to `render` in the sandbox and with the names that transformers gives it. UserError."""
        try:
            import jinja2.sandbox
        except ImportError:
            raise UserError(
                "template: chat", "the package jinja2 is missing", "pip install jinja2"
            ) from None

        def refuse(message):
            raise jinja2.TemplateError(message)

        # {% generation %} stands around an answer, for transformers; here it is no more than what is inside.
        tag, plain = r"(\{%[-+]?\s*)(end)?generation\b", {None: "if true", "end": "endif"}
        source = re.sub(tag, lambda m: m[1] + plain[m[2]], self.chat_template)
        kind, more = jinja2.sandbox.ImmutableSandboxedEnvironment, ["jinja2.ext.loopcontrols"]
        env = kind(trim_blocks=True, lstrip_blocks=True, extensions=more)
        env.filters["tojson"] = functools.partial(
            json.dumps, ensure_ascii=False
        )  # Jinja's own escapes HTML
        env.globals |= {
            "raise_exception": refuse,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }
        try:
            return env.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(
                "template: chat", f"the chat template is not Jinja: {error}", "copy it again"
            ) from error


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, through `tokenizers`."""

    def _load(self):
        self._first = self._bare = first = tokenizers.Tokenizer.from_str(
            self.files["tokenizer.json"].decode()
        )
        first.no_truncation()  # some files carry these two: they would cut, or fill up
        first.no_padding()
        lead = first.encode("").ids  # shows what the post-processor puts before every text
        first.post_processor = (
            None  # bos is ours to add, and ByteLevel's cuts spaces out of the offsets
        )
        first.encode_special_tokens = True  # control strings in plain text are spelled out
        self.token_id, self.token = first.token_to_id, first.id_to_token
        added = first.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self._takes = lambda token, side: getattr(
            added[self.special[token]], side
        )  # space on that side
        self.vocab_size = max([first.get_vocab_size(False), *(i + 1 for i in added)])
        # The word mark comes from a Prepend normalizer (older files) or a Metaspace pre-tokenizer (newer ones).
        clean, split = (
            json.loads(p.__getstate__()) if p else {}
            for p in (first.normalizer, first.pre_tokenizer)
        )
        steps = clean.get("normalizers", [clean] if clean else [])
        rest = [step for step in steps if step["type"] != "Prepend"]
        opens = split.get("prepend_scheme") == "first"
        if opens or rest != steps:
            spec = json.loads(first.to_str()) | {
                "normalizer": {"type": "Sequence", "normalizers": rest}
            }
            spec["pre_tokenizer"] = split | {"prepend_scheme": "never"} if opens else split or None
            self._bare = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self._bare.encode_special_tokens = True
        return lead[0] if lead else None, None

    def _pieces(self, model, text):
        encoding = model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


class PieceTokenizer(Tokenizer):
    """`tokenizer.model`, through `sentencepiece`."""

    def _load(self):
        proto = self.files["tokenizer.model"]
        self._first = first = sentencepiece.SentencePieceProcessor(model_proto=proto)
        # Protobuf merges what is appended: normalizer_spec (field 3) {add_dummy_prefix (field 3): false}.
        self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        size = first.vocab_size()
        controls = [i for i in range(size) if first.is_control(i) or first.is_unknown(i)]
        added = {int(i): token for i, token in self.config.get("added_tokens_decoder", {}).items()}
        self.special = {first.id_to_piece(i): i for i in controls} | _read(
            self.files, "added_tokens.json"
        )
        self.special |= {
            token["content"]: i for i, token in added.items() if token.get("special", True)
        }
        self._takes = lambda token, side: added.get(self.special[token], {}).get(side, False)
        # A vocabulary may spell a control token as a piece of text (Gemma's <end_of_turn>). Typed text is cut there.
        typed = [
            s for s, i in self.special.items() if i < size and i not in controls and len(s) > 1
        ]
        self._typed = re.compile(
            "|".join(f"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in typed) or "(?!)"
        )
        self._added = {i: token for token, i in self.special.items()}
        self.vocab_size = max(size, 1 + max(self._added))
        return [i if i >= 0 else None for i in (first.bos_id(), first.eos_id())]

    def token_id(self, token):
        i = self.special.get(token, self._first.piece_to_id(token))
        return i if self.token(i) == token else None

    def token(self, i):
        return self._added.get(i) or (
            self._first.id_to_piece(i) if i < self._first.vocab_size() else None
        )

    def _pieces(self, model, text):
        cuts = [0, *(m.start() for m in self._typed.finditer(text)), len(text)]
        ids, spans = [], []
        for start, end in itertools.pairwise(cuts):
            found = model.encode_as_offset_mapping(text[start:end])
            ids += found["ids"]
            spans += [(start + s, start + e) for s, e in found["offsets"]]
            model = self._bare
        return ids, spans


def _read(files, name):
    """A JSON file among them; {} where there is none."""
    return json.loads(files.get(name, b"{}"))


def _named(files):
    """{"bos_token": string, ...}: the tokens that the config files give a role, without those that are null."""
    named = _read(files, "special_tokens_map.json") | _read(files, "tokenizer_config.json")
    named = {
        k: v["content"] if isinstance(v, dict) else v
        for k, v in named.items()
        if k.endswith("_token")
    }
    return {k: v for k, v in named.items() if isinstance(v, str)}


def _byte_level(files, path):
    """`vocab.json` and `merges.txt`, as GPT-2, Phi-2 and Qwen2 use them -> the bytes of a tokenizer.json."""
    settings = _read(files, "tokenizer_config.json")
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if kind not in WORDS:
        what = f"the tokenizer_class is {kind}, so how vocab.json splits words is not known"
        raise UserError(
            f"{path}:tokenizer_config.json",
            what,
            f"copy tokenizer.json too, or use {', '.join(WORDS)}",
        )
    pairs = [tuple(line.split(" ")) for line in files["merges.txt"].decode().split("\n")]
    pairs = [pair for pair in pairs if len(pair) == 2 and pair[0] != "#version:"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(_read(files, "vocab.json"), pairs))
    model.decoder = decoders.ByteLevel()
    model.pre_tokenizer = level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=not WORDS[kind]
    )
    if WORDS[kind]:
        model.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(tokenizers.Regex(WORDS[kind]), "isolated")
        model.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    added = sorted((int(i), token) for i, token in settings.get("added_tokens_decoder", {}).items())
    model.add_tokens([tokenizers.AddedToken(**token) for _, token in added])
    model.add_special_tokens(
        [s for s in _named(files).values() if model.token_to_id(s) is not None]
    )
    if lost := [token["content"] for i, token in added if model.token_to_id(token["content"]) != i]:
        what = f"the ids of added tokens leave a gap before {lost[0]!r}"
        raise UserError(f"{path}:tokenizer_config.json", what, "copy tokenizer.json too")
    return model.to_str().encode()
